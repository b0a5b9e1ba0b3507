"""Captured steps on a GPU: against the steps themselves, equal bits, memory.  It runs alone:

    python -m pytest -q tests/test_gpu.py

Without a GPU, and in a run of all tests, which hides it from itself, this is skipped.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from commands import APFL, CNN, RESNETS, checkpoint, experiment_of, go, make_small, start
from tiny import TinyNet, alike, stream, tiny_data, weights

import apfl
import baselines
import data
import graphs
import models
import run
from federation import Experiment, Task, first_server, train_client, train_server

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and to run "
                                "alone: python -m pytest tests/test_gpu.py")
DEVICE = torch.device("cuda")
ON_GPU = ["--device", str(DEVICE)]
RUNS = {  # the sixteen methods, and what changes a step
    "local": CNN, "fedavg": RESNETS, "fedavg-ft": CNN, "fedprox": RESNETS, "scaffold": RESNETS,
    "fednova": CNN, "moon": RESNETS, "fedgen": CNN, "feddf": CNN, "ccvr": CNN, "inco": RESNETS,
    "inclusivefl": RESNETS, "fedin": RESNETS, "apfl": APFL,
    **dict.fromkeys(("heterofl", "fedrolex", "scalefl"), [*RESNETS, "--model", "resnet18-widths"])}
VARIANTS = [("fedin", "--noise", "0.8"), ("fedin", "--projection", "exact"), ("fedin", "--amp"),
            ("fedavg", "--optimizer", "sgd", "--momentum", "0.9"), ("fedprox", "--augment"),
            ("scalefl", "--self-distillation", "0.5", "--rounds", "3"), ("moon", "--amp")]


@pytest.fixture(autouse=True)
def as_a_run_begins(monkeypatch):
    make_small(monkeypatch)
    graphs.make_deterministic()
    monkeypatch.setattr(graphs, "enabled", True)
    monkeypatch.setattr(graphs, "_uncapturable", set())
    torch.set_num_threads(1)


def flags_of(method: str, *others: str) -> list[str]:
    """Flags of a small run of a method on the GPU."""
    full = ["--participation", "1"] if method in ("fedgen", "feddf") else []
    return [*RUNS[method], "--method", method, *full, *ON_GPU, *others]


def begun(method: str, *others: str) -> tuple[Experiment, dict, dict]:
    """An experiment on the GPU, and server and memory after its first round."""
    experiment = experiment_of(run.resolve(run.read_command_line(flags_of(method, *others))))
    server = models.on_device(first_server(experiment), DEVICE)
    server, memory, _ = run.train_round(experiment, 1, server, {})
    return experiment, server, memory


@pytest.fixture
def captures(monkeypatch) -> list:
    """One entry per graph that is captured."""
    found, capture = [], graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *given: found.append(1) or capture(*given))
    return found


def losses(work: Callable[[], object], experiment: Experiment, captured: bool) -> torch.Tensor:
    """Losses of at most ten steps of some training, with graphs or without."""
    found, replayed = [], graphs.replayed

    def listening(*arguments, **options):
        take = replayed(*arguments, **options)

        def taken(*batch):
            loss = take(*batch)
            found.append(loss.clone())
            return loss

        return taken

    experiment.places.clear()
    with patch.object(graphs, "enabled", captured), patch.object(graphs, "replayed", listening):
        work(experiment._replace(server_place=graphs.Place(DEVICE)))
    return torch.stack(found[:10]).double().cpu()


def check(work: Callable[[Experiment], object], experiment: Experiment, captures: list) -> None:
    """Check the losses of captured steps against those of the steps themselves."""
    captures.clear()
    by_graph = losses(work, experiment, captured=True)
    assert captures and not graphs._uncapturable and len(by_graph) > 1
    captures.clear()
    by_step = losses(work, experiment, captured=False)
    assert not captures
    torch.testing.assert_close(by_graph[0], by_step[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_graph, by_step, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method, others", [*((method, ()) for method in RUNS),
                                            *((method, others) for method, *others in VARIANTS)])
def test_captured_steps_are_the_steps_of_every_method(method, others, captures):
    experiment, server, memory = begun(method, "--local-epochs", "3", *others)
    task = run.make_tasks(experiment, 2, server, memory, experiment.available[:1])[0]
    check(lambda run: train_client(run, run.method.client_update, task), experiment, captures)


@pytest.mark.parametrize("method", ["fedgen", "feddf"])
def test_captured_steps_are_the_steps_of_the_server(method, captures):
    experiment, server, memory = begun(method)
    tasks = run.make_tasks(experiment, 2, server, memory, experiment.available)
    updates = {task.client.id: train_client(experiment, experiment.method.client_update,
                                            task).update for task in tasks}
    check(lambda run: train_server(run, partial(run.method.distil, server, updates, run.network,
                                                data.streams(0, 2, 0))), experiment, captures)


def test_captured_steps_are_the_steps_of_the_generator_and_of_friend_models(captures):
    experiment, server, _ = begun("apfl", "--generator-steps", "10")
    options = {"noise_dim": 4, "generator_steps": 10, "generator_batch": 3, "balance": 0.5,
               "teacher": "clients", "distance": "rms"}
    check(lambda run: train_server(run, partial(apfl.apfl_generator, run, server, **options)),
          experiment, captures)
    net = apfl.load_generator(apfl.apfl_generator(experiment, server, **options), 1, 4)
    update = partial(apfl.apfl_friend_update, friend_epochs=3, batch_size=12, synthetic_per_class=4,
                     friend_labels="all")
    for client in experiment.clients[:2]:
        task = Task(client, 0, (server["weights"][client.arch], net))
        check(lambda run, task=task: train_client(run, update, task), experiment, captures)


def test_clients_take_turns_on_one_network_as_on_new_ones():
    place, shared = graphs.Place(DEVICE), models.on_device(tiny_data(), DEVICE)
    scratch = partial(models.scratch_network, TinyNet, (1, 8, 8), DEVICE, optimizer="adam", lr=1e-2)
    place.networks["tiny"] = scratch()
    for count, seed in ((20, 5), (18, 6), (2, 7), (20, 8), (1, 9)):
        images = shared._replace(indices=shared.indices[:count])
        received = models.on_device(weights(seed), DEVICE)
        update = partial(baselines.fedprox_client_update, received=received, data=images,
                         stream=stream, mu=0.1, local_epochs=2, batch_size=8)
        with place.entered():
            ours = update(*place.networks["tiny"])
        plain = update(*scratch())
        torch.testing.assert_close(ours.update.weights, plain.update.weights, rtol=1e-3, atol=1e-4)
        assert ours.loss == pytest.approx(plain.loss, rel=1e-3)
    assert [len(made) for _, made in place.kept.values()] == [3] and not graphs._uncapturable


# ----------------------------------------------------------------------------------- equal commands

def final(out: Path) -> tuple:
    """Weights in a checkpoint, and memory of the clients."""
    saved = checkpoint(out)
    return saved["server"], saved["memory"], saved["stage_results"]


@pytest.mark.parametrize("method, others", [("fedin", ()), ("fedin", ("--amp",)), ("moon", ()),
                                            ("scaffold", ()), ("apfl", ()), ("feddf", ()),
                                            ("scalefl", ())])
def test_equal_commands_give_equal_bits_with_any_workers(tmp_path, method, others):
    flags = flags_of(method, "--rounds", "3", *others)
    first = go(tmp_path / "first", *flags)
    for name, workers in (("again", ()), ("one", ("--workers", "1")), ("ten", ("--workers", "10"))):
        assert go(tmp_path / name, *flags, *workers) == first
        assert alike(final(tmp_path / name), final(tmp_path / "first"))


@pytest.mark.parametrize("method", ["fedavg", "apfl"])
def test_ten_workers_capture_at_a_time_and_give_the_bits_of_one(tmp_path, method):
    flags = flags_of(method, "--rounds", "2", "--clients", "10", "--participation", "1",
                     "--partition", "dirichlet", "--train-images", "300")
    assert go(tmp_path / "ten", *flags) == go(tmp_path / "one", *flags, "--workers", "1")
    assert alike(final(tmp_path / "ten"), final(tmp_path / "one"))
    assert not graphs._uncapturable


@pytest.mark.parametrize("method", ["fedin", "scaffold"])
def test_a_killed_run_resumes_to_equal_bits(tmp_path, method):
    flags = flags_of(method, "--rounds", "4")
    assert start(tmp_path / "killed", *flags, killed_after_line=3).wait() == -9
    whole = go(tmp_path / "whole", *flags)
    assert go(tmp_path / "killed", "--resume") == whole
    assert alike(final(tmp_path / "killed"), final(tmp_path / "whole"))


def test_a_run_without_graphs_agrees_with_one_with_graphs(tmp_path):
    flags = flags_of("fedin", "--rounds", "2")
    with_graphs, without = go(tmp_path / "with", *flags), go(tmp_path / "without", *flags,
                                                             "--no-graphs")
    for one, other in zip(with_graphs, without, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert {**one, "loss": 0, "accuracy": 0, "personal_accuracy": 0} == {
            **other, "loss": 0, "accuracy": 0, "personal_accuracy": 0}


def test_memory_does_not_grow_over_rounds():
    experiment, server, memory = begun("fedin", "--participation", "1", "--workers", "2",
                                       "--model", "resnet10")
    reserved = []
    for t in range(2, 14):
        server, memory, _ = run.train_round(experiment, t, server, memory)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= reserved[5] * 1.02


@pytest.mark.parametrize("method", RUNS)
def test_every_method_runs_with_all_its_steps_captured(tmp_path, method):
    go(tmp_path / "run", *flags_of(method, "--rounds", "2"))
    assert not graphs._uncapturable
