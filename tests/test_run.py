"""The command line from outside: what a run writes, repeats, survives and refuses."""

import ast
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import apfl
import baselines
import data
import fedin
import generator
import models
import run

ROOT = Path(__file__).resolve().parents[1]
RESNETS = ("--train-images 120 --clients 5 --participation 0.6 --local-epochs 1 --partition iid "
           "--batch-size 12").split()
RESNET10 = [*RESNETS, "--model", "resnet10"]  # with batch normalisation, and a third of the time
CNN = [*RESNETS, "--model", "cnn"]
FEW = ("--generator-steps 3 --generator-batch 2 --synthetic-per-class 4 --friend-epochs 1 "
       "--noise-dim 4").split()
APFL = [*CNN, "--method", "apfl", *FEW]
DROPOUT = ("--missing-classes 0.2 --train-images 300 --clients 6 --local-epochs 1 --model cnn "
           "--rounds 2").split()


def go(out: Path, *flags: str) -> list[dict]:
    """A run through main, in this process; returns the lines of metrics.jsonl without timings."""
    assert run.main([*flags, "--out", str(out)]) == 0
    return lines(out)


def lines(out: Path) -> list[dict]:
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for entry in entries:
        del entry["seconds"]
    return entries


def result(out: Path) -> dict:
    written = json.loads((out / "result.json").read_text())
    return {name: value for name, value in written.items() if not name.endswith(("seconds",
                                                                                 "per_second"))}


def start(out: Path, *flags: str) -> subprocess.Popen:
    """A run as a process of its own, which hears Ctrl-C also where the tests run in background."""
    return subprocess.Popen([sys.executable, str(ROOT / "run.py"), *flags, "--out", str(out)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))


def refused(capsys, *flags: str, status: int = 2) -> str:
    """The one line on standard error of a command that must fail."""
    assert run.main(list(flags)) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n") and error.startswith("error: ")
    return error


# ------------------------------------------------------------------------------- what a run writes


def test_a_run_leaves_its_files_and_says_where(tmp_path, capsys):
    out = tmp_path / "a" / "run"
    entries = go(out, *RESNETS, "--rounds", "3", "--eval-every", "2", "--seed", "7")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "result.json", "curves.png"}
    assert [entry["round"] for entry in entries] == [2, 3]
    raw = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert raw.keys() == {"round", "accuracy", "personal_accuracy", "loss", "upload_mb",
                          "download_mb", "samples", "seconds", "clock"}
    assert all(0 <= raw[name] <= 100 for name in ("accuracy", "personal_accuracy"))
    assert raw["samples"] == 3 * 24  # participants x images, one epoch

    config = json.loads((out / "config.json").read_text())
    assert config["method"] == "fedin" and config["seed"] == 7 and config["mu"] == 0.1
    assert config["versions"]["torch"] == torch.__version__ and config["device"]

    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["round"] == 3 and saved["memory"] == {}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    final = json.loads((out / "result.json").read_text())
    best = max(entries, key=lambda entry: entry["accuracy"])
    assert final["accuracy"] == entries[-1]["accuracy"] and final["rounds"] == 3
    assert (final["best_accuracy"], final["best_round"]) == (best["accuracy"], best["round"])
    assert final["last10_accuracy"] == sum(entry["accuracy"] for entry in entries) / 2
    assert final["samples"] == 3 * 3 * 24 and final["images_per_second"] > 0

    captured = capsys.readouterr()
    assert captured.err == ""
    for text in ("fedin on digits", "3 of 5 clients", "resnet26", "17,446,090",
                 "traffic: about", "3/3", str(out)):
        assert text in captured.out


def test_defaults_are_fedin_on_digits_and_the_settings_are_the_papers():
    assert {"method": "fedin", "dataset": "digits", "setting": "quick", "clients": 10,
            "participation": 0.5, "rounds": 10, "local_epochs": 2, "batch_size": 16, "lr": 1e-3,
            "optimizer": "adam", "alpha": 0.5, "model": "resnets", "eval_every": 1, "mu": 0.1,
            "noise": 0.0, "projection": "simplified", "aggregation": "layerwise",
            "feature_batch_size": 16, "feature_batches": 1, "threads": 1, "checkpoint_every": 1,
            }.items() <= run.resolve({}).items()
    paper = run.resolve({"dataset": "svhn"})
    assert {"setting": "fedin", "clients": 100, "participation": 0.1, "rounds": 500,
            "local_epochs": 5, "batch_size": 16, "lr": 1e-3, "optimizer": "adam", "alpha": 0.5,
            "model": "resnets", "eval_every": 5}.items() <= paper.items()
    local = run.resolve({"dataset": "cifar10", "method": "local"})
    assert {"setting": "apfl", "clients": 10, "participation": 1, "rounds": 50, "local_epochs": 20,
            "batch_size": 50, "lr": 2e-4, "alpha": 0.1, "model": "cnn", "eval_every": 1,
            }.items() <= local.items()
    quick = run.resolve({"method": "local"})
    assert {"participation": 1, "local_epochs": 5, "batch_size": 50, "model": "cnn",
            "rounds": 10}.items() <= quick.items()
    widths = run.resolve({"dataset": "svhn", "method": "fedrolex"})
    assert {"setting": "fedin", "model": "resnet152-widths"}.items() <= widths.items()
    assert run.resolve({"method": "heterofl"})["model"] == "resnet18-widths"
    feddf = run.resolve({"method": "feddf"})
    assert {"model": "cnn", "participation": 1, "distillation_steps": 50, "proxy": "holdout",
            }.items() <= feddf.items()
    assert run.resolve({"method": "feddf", "dataset": "emnist"})["distillation_steps"] == 500
    assert run.resolve({"method": "fedgen", "dataset": "emnist"})["setting"] == "apfl"
    assert run.resolve({"method": "moon"})["mu"] == 1
    assert run.resolve({"method": "fedprox"})["mu"] == 0.1
    assert run.resolve({"method": "fedprox", "setting": "apfl"})["mu"] == 0.01


def test_every_setting_of_a_method_reaches_one_of_its_functions():
    for name, method in run.METHODS.items():
        settings = run.resolve({"method": name})
        bound = run.bind(method, settings)
        reached = {keyword for function in bound if function for keyword in function.keywords}
        elsewhere = {"ablate", "lambda", "semantics", "noise_dim", "proxy"}
        assert set(run.METHOD_DEFAULTS[name]) - elsewhere <= reached
        assert ("balance" in reached) == ("lambda" in settings)
        assert {"local_epochs", "batch_size"} <= reached


def test_participants_are_rounded_and_at_least_one():
    assert run.num_participants({"participation": 0.1, "clients": 100}) == 10
    assert run.num_participants({"participation": 0.01, "clients": 10}) == 1
    chosen = [run.draw_participants({"seed": 1, "clients": 10, "participation": 0.5}, t)
              for t in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 5 and chosen[0] == sorted(chosen[0])


def test_traffic_is_the_bytes_of_what_was_sent(tmp_path):
    entries = go(tmp_path, *RESNETS, "--rounds", "2", "--seed", "3")
    settings = json.loads((tmp_path / "config.json").read_text())
    archs = models.MODELS["resnets"]
    meta = [models.build_empty(models.architecture_of(k, 5, archs), 1, 10, torch.device("meta"))
            for k in range(5)]
    sizes = [sum(4 * p.numel() for p in net.parameters()) +  # weights, running statistics, counters
             sum(8 * b.numel() if b.dtype == torch.int64 else 4 * b.numel() for b in net.buffers())
             for net in meta]
    features = 4 * 73_728  # one batch of 16, four bytes a float
    for t, entry in enumerate(entries, start=1):
        weights = sum(sizes[k] for k in run.draw_participants(settings, t))
        assert entry["upload_mb"] == pytest.approx((weights + 3 * features) / 1e6, abs=1e-9)
        received = 0 if t == 1 else 3 * features
        assert entry["download_mb"] == pytest.approx((weights + received) / 1e6, abs=1e-9)


def test_accuracies_are_those_of_the_models_that_the_clients_use(tmp_path):
    last = go(tmp_path, *CNN, "--method", "local", "--partition", "dirichlet", "--rounds", "2",
              "--participation", "0.4")[-1]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < len(saved["memory"]) < 5  # some clients still use the initial weights
    experiment = run.prepare_experiment(json.loads((tmp_path / "config.json").read_text()))
    x = data.standardise(experiment.data.x_test, *experiment.statistics)
    net, on_all, on_own = models.build("cnn", 1, 10).eval(), [], []
    for k in range(5):
        net.load_state_dict(saved["memory"].get(k, saved["server"]["weights"]["cnn"]))
        with torch.no_grad():
            right = (net(x).argmax(1) == experiment.data.y_test).double()
        on_all.append(right.mean().item())
        on_own.extend(right[experiment.test_shares[k]].tolist())
    assert last["accuracy"] == pytest.approx(100 * sum(on_all) / 5)
    assert last["personal_accuracy"] == pytest.approx(100 * sum(on_own) / len(on_own))
    assert len(on_own) == 360 and last["accuracy"] != last["personal_accuracy"]


def test_a_round_lasts_as_long_as_its_slowest_participant(tmp_path):
    entries = go(tmp_path, *CNN, "--rounds", "2")
    settings = json.loads((tmp_path / "config.json").read_text())
    speeds = run.prepare_experiment(settings).speeds
    assert all(1 <= speed <= run.SPEED_SPREAD for speed in speeds) and len(set(speeds)) == 5
    slowest = [min(speeds[k] for k in run.draw_participants(settings, t)) for t in (1, 2)]
    assert entries[0]["clock"] == pytest.approx(24 / slowest[0])
    assert entries[1]["clock"] == pytest.approx(24 / slowest[0] + 24 / slowest[1])


def test_fedin_learns_the_digits(tmp_path):
    entries = go(tmp_path, "--model", "resnet10", "--partition", "iid", "--clients", "4",
                 "--participation", "1", "--rounds", "3", "--train-images", "600")
    assert entries[-1]["accuracy"] > 60  # chance is 10
    assert entries[-1]["loss"] < entries[0]["loss"] / 2


# ------------------------------------------------------- switched off is the method that is left


def test_fedin_without_in_is_fedprox_and_without_prox_too_fedavg(tmp_path):
    def entries(name, *flags):
        go(tmp_path / name, *RESNET10, "--rounds", "2", *flags)
        text = (tmp_path / name / "metrics.jsonl").read_text()
        return re.sub(r', "seconds": [0-9.]+', "", text)

    prox = entries("prox", "--method", "fedprox")
    assert entries("in", "--ablate", "in") == prox
    average = entries("average", "--method", "fedavg")
    assert entries("in-prox", "--ablate", "in", "prox") == average
    assert entries("mu-zero", "--method", "fedprox", "--mu", "0") == average != prox


def test_noise_zero_is_no_noise_and_ablate_opt_is_the_plain_sum(tmp_path):
    plain = go(tmp_path / "plain", *CNN, "--rounds", "2")
    assert go(tmp_path / "quiet", *CNN, "--rounds", "2", "--noise", "0") == plain
    assert go(tmp_path / "noisy", *CNN, "--rounds", "2", "--noise", "0.8") != plain
    opt = go(tmp_path / "opt", *CNN, "--rounds", "2", "--ablate", "opt")
    assert go(tmp_path / "sum", *CNN, "--rounds", "2", "--projection", "sum") == opt != plain


@pytest.fixture(scope="module")
def plain_fedin(tmp_path_factory):
    """The lines of a run of FedIN without options."""
    return go(tmp_path_factory.mktemp("plain") / "out", *CNN, "--rounds", "2")


@pytest.mark.parametrize("flags", ["--projection exact", "--feature-batches 2", "--augment",
                                   "--feature-batch-size 8", "--optimizer sgd", "--mu 5"])
def test_an_option_makes_a_difference(flags, tmp_path, plain_fedin):
    assert go(tmp_path, *CNN, "--rounds", "2", *flags.split()) != plain_fedin


def test_aggregation_per_architecture_is_layerwise_where_there_is_one_alone(tmp_path):
    flags = [*CNN, "--rounds", "2"]
    assert go(tmp_path / "a", *flags, "--aggregation", "per-architecture") == go(tmp_path / "b",
                                                                                 *flags)
    flags = [*RESNETS, "--method", "fedavg", "--rounds", "1"]
    assert go(tmp_path / "c", *flags, "--aggregation", "per-architecture") != go(tmp_path / "d",
                                                                                 *flags)


# ------------------------------------------------------------------------------ every baseline

BASELINES = {  # method -> flags of a run of some seconds
    "scaffold": RESNET10, "fednova": CNN, "moon": CNN, "fedgen": CNN, "inclusivefl": RESNETS,
    "inco": [*RESNETS, "--model", "resnet14"], "feddf": [*RESNETS, "--distillation-steps", "2"],
    **dict.fromkeys(run.WIDTH_METHODS, [*RESNETS, "--batch-size", "24"]),
}


@pytest.fixture(scope="module")
def baseline_run(tmp_path_factory):
    """From a baseline's name to the folder of a run of two rounds, which is made once."""
    made = {}

    def folder_of(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp(method) / "run"
            go(made[method], *BASELINES[method], "--method", method, "--rounds", "2",
               "--eval-every", "2", "--workers", "2")
        return made[method]

    return folder_of


@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_run(method, baseline_run):
    last = lines(baseline_run(method))[-1]
    assert 0 <= last["accuracy"] <= 100 and last["loss"] > 0 and last["round"] == 2
    server = torch.load(baseline_run(method) / "checkpoint.pt", weights_only=True)["server"]
    config = json.loads((baseline_run(method) / "config.json").read_text())
    initial = models.initial_weights(tuple(server["weights"]), 1, 10, data.torch_stream(
        config["seed"], data.INITIAL_WEIGHTS), torch.device("cpu"))
    for arch, state in server["weights"].items():
        moved = [not torch.equal(tensor, initial[arch][name]) for name, tensor in state.items()]
        assert any(moved) and all(tensor.isfinite().all() for tensor in state.values())
    assert ("full_accuracy" in last) == (method in run.WIDTH_METHODS)


@pytest.mark.parametrize("method", ["scaffold", "moon", "fedgen", "fedrolex"])
def test_what_a_method_keeps_is_in_the_checkpoint(method, baseline_run, tmp_path):
    flags = [*BASELINES[method], "--method", method, "--eval-every", "2", "--workers", "1"]
    go(tmp_path, *flags, "--rounds", "1")
    assert go(tmp_path, "--resume", "--rounds", "2") == lines(baseline_run(method))


def test_a_client_is_sent_what_its_method_says(baseline_run):
    def config(method):
        return json.loads((baseline_run(method) / "config.json").read_text())

    def size(method, t, weigh):
        archs = run.architectures_of(config(method))
        return sum(weigh(archs[k * len(archs) // 5], k) for k in run.draw_participants(
            config(method), t)) / 1e6

    def whole(arch, k):
        return models.num_bytes(models.shapes(arch, 1, 10))

    def parameters(arch, k):
        return sum(4 * tensor.numel() for name, tensor in models.shapes(arch, 1, 10).items()
                   if models.is_parameter(name))

    for method in ("fednova", "moon", "inco", "inclusivefl", "feddf"):
        last = lines(baseline_run(method))[-1]
        assert last["upload_mb"] == last["download_mb"] == pytest.approx(size(method, 2, whole))
    last = lines(baseline_run("scaffold"))[-1]  # weights and control variates
    both = size("scaffold", 2, lambda arch, k: whole(arch, k) + parameters(arch, k))
    assert last["upload_mb"] == last["download_mb"] == pytest.approx(both)

    last = lines(baseline_run("scalefl"))[-1]
    assert last["upload_mb"] == last["download_mb"] == pytest.approx(size("scalefl", 2, whole))
    for method in ("heterofl", "fedrolex"):
        experiment = run.prepare_experiment(config(method))

        def drawn(arch, k):
            client = experiment.method.assign(experiment.clients[k], experiment.architectures,
                                              experiment.stream(2, k))
            return whole(client.arch, k)

        def with_own_rows(arch, k):
            """Rows of classes that it lacks are not sent; the classes that it has are."""
            client = experiment.method.assign(experiment.clients[k], experiment.architectures,
                                              experiment.stream(2, k))
            held = len(experiment.data.y_train[client.indices].unique())
            row = models.shapes(client.arch, 1, 10)["classifier.0.fc.weight"].shape[1] + 1
            return drawn(arch, k) - (10 - held) * 4 * row + held * 8

        last = lines(baseline_run(method))[-1]
        assert last["download_mb"] == pytest.approx(size(method, 2, drawn))
        assert last["upload_mb"] == pytest.approx(size(method, 2, with_own_rows))

    last = lines(baseline_run("fedgen"))[-1]
    saved = torch.load(baseline_run("fedgen") / "checkpoint.pt", weights_only=True)["server"]
    generator_and_classes = models.num_bytes([saved["generator"], torch.arange(10)])
    assert last["upload_mb"] == pytest.approx(size("fedgen", 2, lambda *_: whole("cnn", 0) + 80))
    assert last["download_mb"] == pytest.approx(size(
        "fedgen", 2, lambda *_: whole("cnn", 0) + generator_and_classes))


def test_only_stateful_methods_keep_something_on_their_clients(baseline_run):
    for method in BASELINES:
        out = baseline_run(method)
        saved = torch.load(out / "checkpoint.pt", weights_only=True)
        config = json.loads((out / "config.json").read_text())
        took_part = set(run.draw_participants(config, 1)) | set(run.draw_participants(config, 2))
        stateful = method in ("scaffold", "moon")
        assert set(saved["memory"]) == (took_part if stateful else set())
        if method == "scaffold":
            variate = saved["memory"][min(took_part)]
            assert all(models.is_parameter(name) for name in variate)


def test_full_accuracy_is_the_whole_networks_and_accuracy_the_mean_over_rates(baseline_run):
    out = baseline_run("heterofl")
    last, saved = lines(out)[-1], torch.load(out / "checkpoint.pt", weights_only=True)
    experiment = run.prepare_experiment(json.loads((out / "config.json").read_text()))
    (whole,) = saved["server"]["weights"].values()
    prepare = partial(data.standardise, mean=experiment.statistics[0],
                      deviation=experiment.statistics[1])
    rows = torch.cat([client.indices for client in experiment.clients])
    accuracies = []
    for arch in models.MODELS["resnet18-widths"]:
        net = models.build(arch, 1, 10)
        net.load_state_dict({name: whole[name][tuple(map(slice, tensor.shape))]
                             for name, tensor in net.state_dict().items()})
        models.collect_statistics(net, [prepare(experiment.data.x_train[rows])])
        predicted = models.predict(net, experiment.data.x_test, prepare)
        accuracies.append(100 * (predicted == experiment.data.y_test).double().mean().item())
    assert last["accuracy"] == pytest.approx(sum(accuracies) / 5)
    assert last["full_accuracy"] == pytest.approx(accuracies[-1])


def test_batches_for_static_statistics_mix_all_clients(monkeypatch):
    settings = run.resolve({"method": "heterofl", "train_images": 300, "clients": 3,
                            "partition": "pathological"})
    experiment = run.prepare_experiment(settings)
    for client in experiment.clients:  # so that clients differ by more than their images do
        experiment.data.x_train[client.indices] //= 1 + 2 * client.id
    monkeypatch.setattr(models, "TEST_BATCH", 60)  # in order, a batch would be of one client
    weights = models.initial_weights(["resnet18-1/16"], 1, 10, torch.Generator(),
                                     torch.device("cpu"))["resnet18-1/16"]
    collected = []
    monkeypatch.setattr(models, "predict", lambda model, *_: collected.append(model) or 0)
    run.predicted_right(experiment, [(0, "resnet18-1/16", "key", weights)])
    whole = models.build("resnet18-1/16", 1, 10)
    whole.load_state_dict(weights)
    rows = torch.cat([client.indices for client in experiment.clients])
    models.collect_statistics(whole, [data.standardise(experiment.data.x_train[rows],
                                                       *experiment.statistics)])
    in_order = models.build("resnet18-1/16", 1, 10)
    in_order.load_state_dict(weights)
    models.collect_statistics(in_order, [data.standardise(
        experiment.data.x_train[client.indices], *experiment.statistics)
        for client in experiment.clients])
    mixed, at_once, apart = [net.intermediate[0][0].norm[1].running_var
                             for net in (*collected, whole, in_order)]
    torch.testing.assert_close(mixed, at_once, rtol=0.05, atol=0)
    assert ((apart - at_once).abs() > 0.1 * at_once).any()


def test_scaffolds_server_counts_the_clients_that_take_part():
    settings = run.resolve({"method": "scaffold", "missing_classes": 0.2})
    bound = run.prepare_experiment(settings).method.server_update.keywords
    assert list(bound["owners"]) == list(range(9))  # of ten clients the last has dropped out
    assert bound["owners"][0] == "resnet10" and bound["owners"][8] == "resnet26"


def test_moon_with_mu_zero_is_fedavg_from_the_command_line_too(tmp_path):
    flags = [*CNN, "--rounds", "2"]
    plain = go(tmp_path / "a", *flags, "--method", "fedavg")
    assert go(tmp_path / "b", *flags, "--method", "moon", "--mu", "0") == plain
    assert go(tmp_path / "c", *flags, "--method", "moon") != plain


def test_feddf_without_steps_is_fedavg_and_each_proxy_leads_elsewhere(tmp_path):
    np.savez(tmp_path / "other.npz", x_train=np.eye(8, dtype=np.uint8)[None].repeat(9, 0) * 255,
             y_train=np.arange(9) % 2, x_test=np.zeros((2, 8, 8), np.uint8), y_test=np.arange(2))
    flags = [*CNN, "--rounds", "1", "--train-images", "1430"]  # few are left over for the server
    plain = go(tmp_path / "plain", *flags, "--method", "fedavg")
    flags += ["--method", "feddf", "--distillation-steps"]
    assert go(tmp_path / "none", *flags, "0") == plain
    ends = []
    for name in ("holdout", "noise", str(tmp_path / "other.npz")):
        out = tmp_path / str(len(ends))
        go(out, *flags, "2", "--proxy", name)
        server = torch.load(out / "checkpoint.pt", weights_only=True)["server"]
        ends.append(server["weights"]["cnn"]["classifier.fc.bias"].tolist())
    plain = torch.load(tmp_path / "none" / "checkpoint.pt", weights_only=True)["server"]
    ends.append(plain["weights"]["cnn"]["classifier.fc.bias"].tolist())
    assert all(a != b for i, a in enumerate(ends) for b in ends[:i])


def test_images_held_out_for_the_server_are_no_clients_nor_of_unseen_classes():
    labels = data.load("digits").y_train
    settings = run.resolve({"method": "feddf"})
    chosen, held_out = run.choose_images(settings, labels)
    assert len(held_out) == 144 and len(chosen) == 1437 - 144  # a tenth
    assert torch.cat([chosen, held_out]).sort().values.tolist() == list(range(1437))
    few = run.resolve({"method": "feddf", "train_images": 1400})
    chosen, held_out = run.choose_images(few, labels)
    assert len(held_out) == 140 and len(chosen) == 1400 - (140 - 37)
    assert run.choose_images(run.resolve({"method": "fedavg"}), labels)[1].tolist() == []

    dropout = run.resolve({"method": "feddf", "missing_classes": 0.2, "train_images": 400})
    proxy = run.prepare_experiment(dropout).method.distil.keywords["proxy"]
    loaded = data.load("digits")
    held_out = run.choose_images(dropout, loaded.y_train)[1]
    kept = held_out[loaded.y_train[held_out] < 8]
    assert torch.equal(proxy.images, loaded.x_train[kept]) and len(kept) < len(held_out)


def test_a_proxy_of_other_channels_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "colour.npz", x_train=np.zeros((9, 8, 8, 3), np.uint8),
             y_train=np.arange(9) % 2, x_test=np.zeros((2, 8, 8, 3), np.uint8), y_test=np.arange(2))
    error = refused(capsys, "--method", "feddf", "--proxy", str(tmp_path / "colour.npz"), "--out",
                    str(tmp_path / "out"))
    assert "9 images of 3 channels" in error


def test_a_server_that_diverges_stops_the_run(tmp_path, capsys, monkeypatch):
    method = run.METHODS["feddf"]
    monkeypatch.setitem(run.METHODS, "feddf", method._replace(distil=partial(
        baselines.feddf_distil, step_size=1e38)))
    error = refused(capsys, *CNN, "--method", "feddf", "--distillation-steps", "3", "--out",
                    str(tmp_path), status=1)
    assert "round 1, the server's training: a weight is not finite" in error


def test_methods_prints_every_method_and_its_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--methods"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and run.ABOUT.keys() == run.METHODS.keys()
    rows = {row.split()[0]: row for row in re.split(r"\n\n+", out) if row.strip()}
    assert rows.keys() == {"method", *run.METHODS, "its"}  # a header and a footer
    assert "--self-distillation" in rows["scalefl"] and "per-architecture" in rows["moon"]
    assert " -widths " in rows["fedrolex"] and "control" in rows["scaffold"]
    assert "async" in rows["fedprox"] and "async" not in rows["fedin"]
    assert max(map(len, out.splitlines())) <= 101


# ------------------------------------------------------- AP-FL: stages after the last round


@pytest.fixture(autouse=True)
def few_test_images_for_the_beta_curve(monkeypatch):
    monkeypatch.setattr(run, "BETA_TEST_IMAGES", 20)


def test_apfl_leaves_pictures_and_the_accuracies_of_all_its_models(tmp_path, capsys):
    entries = go(tmp_path, *APFL, "--rounds", "2")
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "result.json", "curves.png",
        "samples.png", "beta.png"}
    names = [f"{kind}_{name}" for kind in ("client", "friend", "personalised", "global")
             for name in ("accuracy", "personal_accuracy")]
    assert set(entries[-1]) - set(entries[0]) == set(names)
    assert all(0 <= entries[-1][name] <= 100 for name in names)
    assert entries[-1]["accuracy"] == entries[-1]["personalised_accuracy"]
    assert entries[-1]["personal_accuracy"] == entries[-1]["personalised_personal_accuracy"]
    final = json.loads((tmp_path / "result.json").read_text())
    assert final["friend_accuracy"] == entries[-1]["friend_accuracy"]
    assert final["generator_seconds"] > 0 and final["friends_seconds"] > 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["beta"], config["semantics"], config["lambda"]) == (0.1, "segments", 0.5)
    shown = capsys.readouterr()
    assert shown.err == "" and "personalised models" in shown.out and "generator" in shown.out


def test_the_rounds_of_apfl_and_fedavg_ft_are_fedavgs(tmp_path):
    plain = go(tmp_path / "fedavg", *CNN, "--method", "fedavg", "--rounds", "2")
    tuned = go(tmp_path / "fedavg-ft", *CNN, "--method", "fedavg-ft", "--rounds", "2")
    apfl_lines = go(tmp_path / "apfl", *APFL, "--rounds", "2")
    counts = 3 * 8 * 10 / 1e6  # three participants tell how many images of ten classes they have
    for a, b in zip(plain, apfl_lines):
        assert a["upload_mb"] + counts == pytest.approx(b["upload_mb"], abs=1e-12)
        for name in ("loss", "samples", "clock"):
            assert a[name] == b[name]
    assert plain[0]["accuracy"] == apfl_lines[0]["accuracy"] and plain[0] == tuned[0]
    for last in (apfl_lines[-1], tuned[-1]):
        assert last["global_accuracy"] == plain[-1]["accuracy"]
        assert last["global_personal_accuracy"] == plain[-1]["personal_accuracy"]
    weights = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["server"]["weights"]
               for name in ("fedavg", "fedavg-ft", "apfl")]
    for state in weights[1:]:
        assert all(torch.equal(state["cnn"][name], weights[0]["cnn"][name])
                   for name in weights[0]["cnn"])


def test_the_stages_traffic_is_on_the_last_line_and_in_the_totals(tmp_path):
    entries = go(tmp_path, *APFL, "--rounds", "2")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    size = models.num_bytes(saved["server"]["weights"])
    late = 5 - len(saved["server"]["teachers"])
    sent = 5 * (size + models.num_bytes(saved["after"]["generator"]))
    assert late > 0 and len(saved["after"]["late"]) == late
    assert entries[-1]["download_mb"] == pytest.approx((3 * size + sent) / 1e6)
    assert result(tmp_path)["download_mb"] == pytest.approx((6 * size + sent) / 1e6)


def test_final_accuracies_are_those_of_the_saved_models(tmp_path):
    last = go(tmp_path, "--method", "apfl", *FEW, *DROPOUT, "--beta", "0.3")[-1]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    experiment = run.prepare_experiment(json.loads((tmp_path / "config.json").read_text()))
    x = data.standardise(experiment.data.x_test, *experiment.statistics)
    labels, right = experiment.data.y_test, {}
    for k in range(6):
        own = saved["after"]["late"][5] if k == 5 else saved["server"]["teachers"][k]["weights"]
        friend = saved["after"]["friends"][k]
        for kind, state in (("client", own), ("friend", friend), ("personalised", {
                name: 0.3 * own[name] + 0.7 * friend[name] for name in own})):
            net = models.build("cnn", 1, 10).eval()
            net.load_state_dict(state)
            with torch.no_grad():
                right[kind, k] = (net(x).argmax(1) == labels).double()
    for kind in ("client", "friend", "personalised"):
        whole = [100 * right[kind, k].mean().item() for k in range(6)]
        assert last[f"{kind}_accuracy"] == pytest.approx(sum(whole[:5]) / 5, abs=0.06)
        assert last[f"dropout_{kind}_accuracy"] == pytest.approx(whole[5], abs=0.3)
        own = 100 * right[kind, 5][experiment.test_shares[5]].mean().item()
        assert last[f"dropout_{kind}_personal_accuracy"] == pytest.approx(own, abs=1.5)
    by_class = [100 * right["personalised", 5][labels == c].mean().item() for c in range(10)]
    seen, unseen = sum(by_class[:8]) / 8, sum(by_class[8:]) / 2
    assert last["seen_accuracy"] == pytest.approx(seen, abs=0.4)
    assert last["unseen_accuracy"] == pytest.approx(unseen, abs=1.5)
    assert last["harmonic_accuracy"] == pytest.approx(
        2 * last["seen_accuracy"] * last["unseen_accuracy"]
        / max(1e-9, last["seen_accuracy"] + last["unseen_accuracy"]))


def test_harmonic_accuracy_of_known_predictions():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    experiment = run.Experiment(
        {}, None, data.Dataset(None, None, None, labels, ["a", "b", "c"]),
        [baselines.Client(k, None, "cnn") for k in range(2)], dropouts=[1], seen=[0, 1], unseen=[2],
        test_shares=[torch.tensor([0, 2]), torch.tensor([4, 5])], statistics=None, speeds=[],
        free={})
    right = {0: torch.tensor([1, 1, 1, 1, 0, 0]).bool(), 1: torch.tensor([1, 1, 1, 0, 1, 0]).bool()}
    entry = run.accuracies(experiment, right)
    assert entry["accuracy"] == pytest.approx(100 * 8 / 12)
    assert entry["personal_accuracy"] == pytest.approx(75)
    assert entry["dropout_accuracy"] == pytest.approx(100 * 4 / 6)
    assert entry["dropout_personal_accuracy"] == 50
    assert (entry["seen_accuracy"], entry["unseen_accuracy"]) == (75, 50)
    assert entry["harmonic_accuracy"] == pytest.approx(60)


@pytest.fixture(scope="module")
def plain_apfl(tmp_path_factory):
    """The last line of a run of AP-FL without options."""
    return go(tmp_path_factory.mktemp("plain") / "out", *APFL, "--rounds", "1")[-1]


@pytest.mark.parametrize("flags", ["--beta 0.9", "--beta-on friend", "--lambda 0.9",
                                   "--semantics onehot", "--friend-labels all",
                                   "--generator-steps 5"])
def test_an_option_of_apfl_makes_a_difference(flags, tmp_path, plain_apfl):
    assert go(tmp_path, *APFL, "--rounds", "1", *flags.split())[-1] != plain_apfl


def test_apfl_works_with_a_resnet_and_with_augmentation(tmp_path):
    entry, = go(tmp_path, *APFL, "--model", "resnet10", "--rounds", "1", "--augment")
    assert entry["accuracy"] == entry["personalised_accuracy"]


# --------------------------------------------------------------------------- the dropout setting


def test_of_dropout_clients_images_nothing_reaches_the_global_model(tmp_path):
    digits = data.read_digits()
    arrays = {"x_train": digits.x_train[:, 0].numpy(), "y_train": digits.y_train.numpy(),
              "x_test": digits.x_test[:, 0].numpy(), "y_test": digits.y_test.numpy(),
              "classes": np.array(digits.classes)}
    gone = arrays["y_train"] >= 8
    noise = np.random.default_rng(0).integers(256, size=arrays["x_train"].shape, dtype=np.uint8)
    states = []
    for name, images in (("plain", arrays["x_train"]),
                         ("noise", np.where(gone[:, None, None], noise, arrays["x_train"]))):
        np.savez(tmp_path / f"{name}.npz", **(arrays | {"x_train": images}))
        go(tmp_path / name, "--dataset", str(tmp_path / f"{name}.npz"), "--setting",
                     "quick", "--method", "apfl", *FEW, *DROPOUT, "--semantics", "segments")
        states.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True))
    plain, noisy = states
    assert all(torch.equal(a, b) for part in ("weights", "teachers") for a, b in zip(
        models.tensors_in(plain["server"][part]), models.tensors_in(noisy["server"][part])))
    assert all(torch.equal(a, b) for a, b in zip(models.tensors_in(plain["after"]["generator"]),
                                                 models.tensors_in(noisy["after"]["generator"])))
    assert not torch.equal(plain["after"]["late"][5]["classifier.fc.weight"],
                           noisy["after"]["late"][5]["classifier.fc.weight"])
    assert sorted(plain["server"]["teachers"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", ["fedavg", "fedavg-ft", "local", "fedprox"])
def test_every_method_reports_on_dropout_clients(method, tmp_path):
    last = go(tmp_path, "--method", method, *DROPOUT)[-1]
    assert {"seen_accuracy", "unseen_accuracy", "harmonic_accuracy", "dropout_accuracy",
            "dropout_personal_accuracy"} <= last.keys()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if method == "local":  # who trains alone has nothing to drop out from
        assert sorted(saved["memory"]) == list(range(6))
    if method == "fedavg-ft":  # the dropout client learns its two classes, and forgets the others
        assert sorted(saved["after"]["late"]) == list(range(6))
        assert last["unseen_accuracy"] > last["seen_accuracy"]
    if method in ("fedavg", "fedprox"):
        assert last["unseen_accuracy"] == 0


def test_dropout_clients_are_never_drawn():
    settings = {"seed": 0, "clients": 10, "participation": 1.0}
    assert run.draw_participants(settings, 1, dropouts=[8, 9]) == list(range(8))
    half = settings | {"participation": 0.5}
    drawn = [run.draw_participants(half, t, dropouts=[3]) for t in range(1, 40)]
    assert all(len(chosen) == 5 and 3 not in chosen for chosen in drawn)
    assert {k for chosen in drawn for k in chosen} == set(range(10)) - {3}


# ------------------------------------------------------------------------ asynchronous aggregation


ASYNC = [flag for flag in CNN if flag not in ("--participation", "0.6")]
ASYNC += ["--aggregation", "async"]


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "apfl"])
def test_asynchronous_runs_log_the_clock_and_staleness(method, tmp_path):
    few = FEW if method == "apfl" else []
    entries = go(tmp_path, *ASYNC, "--method", method, "--rounds", "3", *few)
    clocks = [entry["clock"] for entry in entries]
    assert clocks == sorted(clocks) and clocks[0] > 0
    assert entries[0]["staleness_mean"] < entries[1]["staleness_mean"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mixing"] == 0.6 and config["staleness"] == "polynomial"
    assert "participation" not in config
    one_upload = entries[0]["upload_mb"] / 5
    assert entries[1]["upload_mb"] == pytest.approx(5 * one_upload)
    assert entries[1]["download_mb"] == pytest.approx(entries[0]["download_mb"])


def test_arrivals_follow_the_speeds_of_the_clients(tmp_path):
    entries = go(tmp_path, *ASYNC, "--method", "fedavg", "--rounds", "3", "--speed-spread", "9")
    experiment = run.prepare_experiment(json.loads((tmp_path / "config.json").read_text()))
    exponents = data.numpy_stream(0, data.SPEEDS).uniform(size=5)
    assert experiment.speeds == [9.0 ** exponent for exponent in exponents]
    times = sorted((24 * n / speed, k) for k, speed in enumerate(experiment.speeds)
                   for n in range(1, 16))[:15]
    for t, entry in enumerate(entries, start=1):
        assert entry["clock"] == pytest.approx(times[5 * t - 1][0])
    version, received, staleness = 0, dict.fromkeys(range(5), 0), []
    for _, k in times:
        staleness.append(version - received[k])
        version += 1
        received[k] = version
    assert [entry["staleness_mean"] for entry in entries] == pytest.approx(
        [sum(staleness[5 * t:5 * t + 5]) / 5 for t in range(3)])


def test_asynchronous_runs_repeat_with_any_workers_and_resume_amid_their_events(tmp_path):
    flags = [*ASYNC, "--method", "fedavg"]
    whole = go(tmp_path / "one", *flags, "--rounds", "3", "--workers", "1")
    assert go(tmp_path / "two", *flags, "--rounds", "3", "--workers", "2") == whole
    go(tmp_path / "parts", *flags, "--rounds", "2")
    assert go(tmp_path / "parts", "--resume", "--rounds", "3") == whole
    assert result(tmp_path / "parts") == result(tmp_path / "one")


def test_mixing_zero_never_moves_and_staleness_matters(tmp_path):
    flags = [*ASYNC, "--method", "fedavg", "--rounds", "2"]
    still = go(tmp_path / "still", *flags, "--mixing", "0")
    assert still[0]["accuracy"] == still[1]["accuracy"]
    runs = [go(tmp_path / kind, *flags, "--staleness", kind)
            for kind in ("constant", "polynomial", "hinge")]
    assert runs[0] == runs[2] != runs[1]  # with five clients nobody is beyond the hinge


# ------------------------------------------------------------------------ the same bytes again


def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    flags = [*RESNETS, "--rounds", "2", "--noise", "0.5", "--augment"]
    one = go(tmp_path / "one", *flags, "--workers", "1")
    assert go(tmp_path / "two", *flags, "--workers", "2") == one
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["server"]
              for name in ("one", "two")]
    for a, b in zip(*(list(models.tensors_in(state)) for state in states)):
        assert torch.equal(a, b)


def test_another_seed_gives_another_run(tmp_path):
    assert go(tmp_path / "a", *CNN, "--rounds", "1") != go(tmp_path / "b", *CNN, "--rounds", "1",
                                                           "--seed", "1")


def test_global_generators_are_left_alone(tmp_path):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    go(tmp_path, *RESNET10, "--rounds", "1", "--noise", "0.5", "--augment")
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


# ---------------------------------------------------------------------------- stop and resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, as (flags, lines, result)."""
    out, flags = tmp_path_factory.mktemp("whole"), [*RESNET10, "--rounds", "4"]
    return flags, go(out, *flags), result(out)


def resumed_is(whole, out: Path) -> bool:
    flags, entries, final = whole
    return go(out, "--resume") == entries and result(out) == final


@pytest.mark.parametrize("lines_before", [2])
def test_killed_and_resumed_a_run_ends_as_if_never_stopped(tmp_path, whole, lines_before):
    process = start(tmp_path / "out", *whole[0])
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None:
        if (tmp_path / "out" / "config.json").exists() and (
                lines_before == 0 or metrics.exists() and
                metrics.read_bytes().count(b"\n") >= lines_before):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert resumed_is(whole, tmp_path / "out")


def test_a_checkpoint_that_cannot_be_renamed_stops_the_run_and_loses_nothing(
        tmp_path, whole, monkeypatch, capsys):
    rename, calls = os.replace, []

    def failing(source, target):
        calls.append(str(target))
        if sum(target.endswith("checkpoint.pt") for target in calls) == 3:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    out = tmp_path / "out"
    message = refused(capsys, *whole[0], "--out", str(out))
    assert "No space left" in message and f"--resume --out {out}" in message
    assert torch.load(out / "checkpoint.pt", weights_only=True)["round"] == 2
    assert len(lines(out)) == 3  # the line of round 3 came before its checkpoint
    monkeypatch.undo()
    assert resumed_is(whole, out)


def test_a_torn_last_line_is_dropped_and_rounds_may_grow(tmp_path, whole):
    flags, entries, final = whole
    go(tmp_path, *flags[:-1], "2")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "accur')
    assert go(tmp_path, "--resume", "--rounds", "4") == entries
    assert json.loads((tmp_path / "config.json").read_text())["rounds"] == 4
    assert go(tmp_path, "--resume") == entries  # nothing left to do
    assert result(tmp_path) == final


def test_a_grown_run_has_the_lines_of_one_that_was_as_long_from_the_start(tmp_path):
    flags = [*CNN, "--eval-every", "2"]
    assert [entry["round"] for entry in go(tmp_path / "grown", *flags, "--rounds", "3")] == [2, 3]
    grown = go(tmp_path / "grown", "--resume", "--rounds", "4")
    assert grown == go(tmp_path / "long", *flags, "--rounds", "4")


def test_ctrl_c_between_checkpoints_saves_the_last_finished_round(tmp_path, monkeypatch, capsys):
    flags = [*CNN, "--rounds", "3", "--checkpoint-every", "3"]
    entries = go(tmp_path / "whole", *flags)
    capsys.readouterr()
    append = run.append_metrics

    def interrupted(path, entry):
        if entry["round"] == 3:
            raise KeyboardInterrupt
        append(path, entry)

    monkeypatch.setattr(run, "append_metrics", interrupted)
    assert "--resume" in refused(capsys, *flags, "--out", str(tmp_path / "parts"), status=130)
    monkeypatch.undo()
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["round"] == 2
    assert go(tmp_path / "parts", "--resume") == entries


def test_local_resumes_with_its_clients_models(tmp_path):
    flags = [*CNN, "--method", "local"]
    entries = go(tmp_path / "whole", *flags, "--rounds", "3")
    go(tmp_path / "parts", *flags, "--rounds", "2")
    memory = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["memory"]
    settings = run.resolve({"clients": 5, "participation": 0.6})
    assert memory.keys() == {k for t in (1, 2) for k in run.draw_participants(settings, t)}
    assert go(tmp_path / "parts", "--resume", "--rounds", "3") == entries


def test_ctrl_c_leaves_a_run_to_resume(tmp_path, whole):
    process = start(tmp_path / "out", *whole[0])
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.count("\n") == 1 and "--resume" in error and "Traceback" not in error
    assert resumed_is(whole, tmp_path / "out")


@pytest.fixture(scope="module")
def whole_apfl(tmp_path_factory):
    """An AP-FL run that was never stopped: its flags, metrics and result."""
    flags = ["--method", "apfl", *DROPOUT, *FEW, "--synthetic-per-class", "20",
             "--generator-steps", "20"]
    out = tmp_path_factory.mktemp("apfl") / "out"
    return flags, go(out, *flags), result(out)


@pytest.mark.parametrize("stage", ["generator", "friends"])
def test_killed_in_a_stage_and_resumed_a_run_ends_as_if_never_stopped(stage, tmp_path, whole_apfl):
    process = start(tmp_path / "out", *whole_apfl[0])
    path = tmp_path / "out" / {"late": "metrics.jsonl", "generator": "checkpoint.pt",
                               "friends": "samples.png"}[stage]

    def has_come() -> bool:
        if not path.exists():
            return False
        if stage == "late":
            return path.read_bytes().count(b"\n") == 2
        return stage == "friends" or "late" in torch.load(path, weights_only=True)["after"]

    while process.poll() is None:
        if has_come():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert stage not in torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["after"]
    assert resumed_is(whole_apfl, tmp_path / "out")


def test_ctrl_c_in_the_generator_stage_keeps_the_stages_before(tmp_path, whole_apfl, monkeypatch,
                                                               capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_generator", interrupted)
    out = tmp_path / "out"
    assert "--resume" in refused(capsys, *whole_apfl[0], "--out", str(out), status=130)
    monkeypatch.undo()
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["round"] == 2 and sorted(saved["after"]) == ["late"]
    assert resumed_is(whole_apfl, out)


def test_a_finished_apfl_run_may_grow_and_finished_twice_is_the_same(tmp_path, whole_apfl):
    flags, entries, final = whole_apfl
    out = tmp_path / "grown"
    go(out, *flags[:flags.index("--rounds")], "--rounds", "1", *flags[flags.index("--rounds") + 2:])
    assert "friend_accuracy" in lines(out)[0]
    assert go(out, "--resume", "--rounds", "2") == entries and result(out) == final
    assert go(out, "--resume") == entries and result(out) == final


def test_a_generator_that_diverges_stops_the_run(tmp_path, monkeypatch, capsys):
    plain = apfl.train_generator
    monkeypatch.setattr(apfl, "train_generator", lambda *a, **o: plain(*a, **o, lr=1e30))
    out = ["--out", str(tmp_path)]
    assert "generator" in refused(capsys, *APFL, "--rounds", "1", *out, status=1)


def test_resume_refuses_what_does_not_agree(tmp_path, capsys):
    out = ["--resume", "--out", str(tmp_path / "out")]
    assert "no run" in refused(capsys, *out)
    go(tmp_path / "out", *CNN, "--rounds", "2")
    before = lines(tmp_path / "out")
    capsys.readouterr()
    assert "--lr" in refused(capsys, *out, "--lr", "0.5")
    assert "--method" in refused(capsys, *out, "--method", "fedavg")
    assert "--classes-per-client" in refused(capsys, *out, "--classes-per-client", "2")
    assert "only grow" in refused(capsys, *out, "--rounds", "1")
    assert "not empty" in refused(capsys, *CNN, "--out", str(tmp_path / "out"))
    assert lines(tmp_path / "out") == before
    (tmp_path / "out" / "metrics.jsonl").rename(tmp_path / "elsewhere")
    assert "metrics.jsonl lacks lines" in refused(capsys, *out)
    (tmp_path / "elsewhere").rename(tmp_path / "out" / "metrics.jsonl")
    assert go(tmp_path / "out", "--resume", "--lr", "0.001", "--workers", "1") == before
    capsys.readouterr()
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"PK\x03\x04 nonsense")
    assert "damaged" in refused(capsys, *out)
    for text in ("{", '{"method": "fedin", "rounds": 3}', '{"method": []}'):
        (tmp_path / "out" / "config.json").write_text(text)
        assert "config.json is damaged" in refused(capsys, *out)


@pytest.mark.parametrize("lr", [1e6, 1e39])  # at 1e39 the loss of the one step is finite still
def test_a_run_that_diverges_later_keeps_its_last_good_checkpoint(tmp_path, capsys, lr):
    flags = [*CNN, "--optimizer", "sgd", "--batch-size", "24" if lr > 1e38 else "12"]
    go(tmp_path, *flags, "--rounds", "1")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"lr": lr}))
    capsys.readouterr()
    out = ["--out", str(tmp_path)]
    assert "round 2, client" in refused(capsys, "--resume", "--rounds", "3", *out, status=1)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["round"] == 1 == len(lines(tmp_path))
    assert all(tensor.isfinite().all() for tensor in models.tensors_in(saved))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_round_and_client(tmp_path, capsys):
    flags = [*CNN, "--optimizer", "sgd", "--rounds", "3"]
    out = ["--out", str(tmp_path / "out")]
    message = refused(capsys, *flags, *out, "--lr", "1e6", status=1)
    first = run.draw_participants(run.resolve({"clients": 5, "participation": 0.6}), 1)[0]
    assert f"round 1, client {first}:" in message
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, hint", [
    ("--method fedsgd", "invalid choice: 'fedsgd'"),
    ("--method heterofl --aggregation per-architecture", "--aggregation is not read with --method "
     "heterofl, which averages each coordinate over the sub-models that hold it"),
    ("--method feddf --aggregation layerwise", "--aggregation is not read with --method feddf, "
     "which averages within each architecture"),
    ("--method fedrolex --model cnn", "give --model resnet18-widths or resnet152-widths"),
    ("--model resnet18-widths", "only --method heterofl, fedrolex, scalefl can do"),
    ("--method scaffold --aggregation async --model cnn", "works with fedavg, fedavg-ft, fedprox"),
    ("--method scaffold --mu 1", "--mu is not read by --method scaffold"),
    ("--method heterofl --self-distillation 1", "--self-distillation is not read by --method hete"),
    ("--method feddf --proxy imagenet", "unknown --proxy 'imagenet': give holdout, noise, or"),
    ("--method feddf --proxy nowhere.npz", "nowhere.npz"),
    ("--method feddf --distillation-steps -1", "--distillation-steps: must be a whole number at"),
    ("--dataset minst", "unknown dataset 'minst'"),
    ("--dataset nowhere.npz", "nowhere.npz"),
    ("--model resnet152", "invalid choice"),
    ("--epochs 3", "unrecognized arguments: --epochs 3"),
    ("--part iid", "unrecognized arguments: --part iid"),  # an abbreviation
    ("--method fedavg --noise 0.8", "--noise is not read by --method fedavg"),
    ("--method local --mu 1", "--mu is not read by --method local"),
    ("--method local --aggregation layerwise", "--aggregation is not read"),
    ("--partition iid --alpha 0.5", "--alpha is not read with --partition iid"),
    ("--alpha 0.5 --classes-per-client 2", "--classes-per-client is not read with --partition"),
    ("--data-dir data", "--data-dir is not read with --dataset digits"),
    ("--ablate prox --mu 0.2", "--mu is not read with --ablate prox"),
    ("--ablate in --projection exact", "--projection is not read with --ablate in"),
    ("--ablate everything", "invalid choice"),
    ("--alpha 0", "--alpha: must be a number above 0, not '0'"),
    ("--alpha inf", "--alpha: must be at most 1e+09, not 'inf'"),
    ("--lr nan", "--lr: must be a number above 0"),
    ("--rounds 0", "--rounds: must be a whole number at least 1"),
    ("--clients 2.5", "--clients: must be a whole number"),
    ("--participation 1.5", "must be at most 1, not '1.5'"),
    ("--rounds 1" + 400 * "0", "--rounds: must be at most 1e+09"),
    ("--device meta", "--device meta cannot be used"),
    ("--clients 300000000 --partition iid", "use fewer --clients"),
    ("--batch-size 1", "--batch-size: must be a whole number at least 2"),
    ("--seed -1", "--seed"),
    ("--noise -1", "--noise"),
    ("--train-images 5 --clients 10", "5 training images cannot give each of 10 clients"),
    ("--train-images 30 --clients 10", "no Dirichlet(0.5) split of 30 images"),
    ("--train-images 5 --clients 10 --partition iid", "use fewer --clients or more images"),
    ("--train-images 2000", "more than the 1437 training images"),
    ("--clients 200", "no Dirichlet(0.5) split of 1437 images"),
    ("--partition pathological --classes-per-client 11", "more than the 10 classes"),
    ("--device quantum", "--device quantum cannot be used"),
    ("--resume", "no run"),
    ("--method fedavg --beta 0.5", "--beta is not read by --method fedavg"),
    ("--method fedavg --mixing 0.5", "--mixing is not read with this --aggregation"),
    ("--method apfl --speed-spread 2", "--speed-spread is not read with this --aggregation"),
    ("--method apfl --aggregation async --participation 0.5", "--participation is not read with "
     "--aggregation async"),
    ("--method apfl --word-vectors x.txt", "--word-vectors is not read with this --semantics"),
    ("--aggregation async", "--aggregation async works with"),
    ("--method fedavg --aggregation async", "--aggregation async needs one architecture"),
    ("--method apfl --model resnets", "--method apfl needs one architecture"),
    ("--missing-classes 0.2 --alpha 0.5", "--alpha is not read with --missing-classes"),
    ("--missing-classes 0.2 --partition iid", "--partition is not read with --missing-classes"),
    ("--missing-classes 0.2 --classes-per-client 2", "--classes-per-client is not read with"),
    ("--missing-classes 0.9", "at least two classes"),
    ("--missing-classes 0.3 --clients 2", "one client must take part"),
    ("--missing-classes 1.2", "must be at most 1"),
    ("--method apfl --beta 2", "--beta: must be at most 1"),
    ("--method apfl --generator-batch 1", "--generator-batch: must be a whole number at least 2"),
    ("--method apfl --semantics nowhere.npz", "no file nowhere.npz: check --semantics"),
    ("--method apfl --semantics glove", "unknown semantics 'glove'"),
    ("--method apfl --semantics word2vec", "name it by --word-vectors FILE"),
    ("--method apfl --semantics word2vec --word-vectors nowhere.txt", "nowhere.txt cannot be read"),
])
def test_bad_input_ends_in_one_line_that_names_it(flags, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hint in refused(capsys, *flags.split())
    assert list(tmp_path.iterdir()) == []


def test_bad_data_ends_in_one_line(tmp_path, capsys):
    good = {"x_train": np.zeros((40, 8, 8), np.uint8), "y_train": np.arange(40) % 2,
            "x_test": np.zeros((4, 8, 8), np.uint8), "y_test": np.arange(4) % 2}
    nan = np.full((40, 8, 8), np.nan, np.float32)
    for change, hint in (({"x_train": nan}, "NaN"), ({"y_test": np.array([0, 1, 2, 0])}, "label 2"),
                         ({"y_train": np.arange(40) % 2 * 2, "y_test": np.array([0, 2, 0, 2])},
                          "class 1")):
        np.savez(tmp_path / "bad.npz", **(good | change))
        error = refused(capsys, "--dataset", str(tmp_path / "bad.npz"), "--setting", "quick")
        assert hint in error and "bad.npz" in error
    np.savez(tmp_path / "good.npz", **good)
    np.savez(tmp_path / "objects.npz", **(good | {"y_train": np.array([None] * 40)}))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:2000])
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(good))
    for name in ("objects", "cut", "pickle"):
        error = refused(capsys, "--dataset", str(tmp_path / f"{name}.npz"), "--setting", "quick")
        assert f"{name}.npz cannot be read" in error


def test_an_own_data_set_runs_by_its_path(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = np.clip(80 * labels[:, None, None, None] + rng.normal(40, 9, (60, 20, 24, 3)), 0, 255)
    np.savez(tmp_path / "mine.npz", x_train=images.astype(np.uint8), y_train=labels,
             x_test=images[:9].astype(np.uint8), y_test=labels[:9], classes=["low", "mid", "high"])
    entries = go(tmp_path / "out", "--dataset", str(tmp_path / "mine.npz"), "--setting", "quick",
                 "--model", "cnn", "--clients", "3", "--rounds", "3", "--participation", "1",
                 "--partition", "iid", "--batch-size", "5")
    assert entries[-1]["accuracy"] > 60


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(out) in refused(capsys, *CNN, "--out", str(out))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    message = refused(capsys, *CNN, "--out", str(tmp_path / "full"))
    assert "--resume" in message and "another --out" in message


def test_errors_from_a_shell_have_no_traceback_and_status_two(tmp_path):
    process = start(tmp_path / "out", "--method", "fedavg", "--noise", "1")
    out, error = process.communicate()
    assert process.returncode == 2 and out == "" and error.count("\n") == 1
    assert "--noise is not read by --method fedavg" in error


# -------------------------------------------------------------------------------------- layout


def test_help_names_every_flag_and_the_papers_values(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for phrase in ("--feature-batch-size", "--checkpoint-every", "mu/2 = 0.05", "Eq. 13",
                   "Table 2b", "Sec. 4.3", "fedin:", "fedprox, fedin:"):
        assert phrase in text


def test_readme_names_only_flags_that_exist():
    known = {flag for action in run.parser()._actions for flag in action.option_strings}
    elsewhere = {"--upgrade", "--requirement"}  # pip's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / "README.md").read_text()))
    assert named - known - elsewhere == set() and {"--resume", "--noise", "--ablate"} <= named


def test_imports_run_downwards_only():
    allowed = {"data": set(), "models": set(), "generator": {"data", "models"},
               "baselines": {"data", "generator", "models"},
               "fedin": {"baselines", "data", "models"},
               "apfl": {"baselines", "data", "generator", "models"},
               "run": {"apfl", "baselines", "data", "fedin", "generator", "models"}}
    for name, below in allowed.items():
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names}
        used |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert used & set(allowed) <= below, name


def test_every_public_function_has_a_docstring():
    for module in (apfl, baselines, data, fedin, generator, models, run):
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert ast.get_docstring(node), f"{module.__name__}.{node.name}"
