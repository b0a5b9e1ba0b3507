"""The command line from outside: what a run writes, repeats and refuses; methods; the layout."""

import ast
import inspect
import io
import json
import math
import pickle
import platform
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import apfl
import baselines
import data
import fedin
import generator
import models
import run
from baselines import Flag
from commands import (CNN, RESNET10, RESNETS, ROOT, config, go, lines, participants, refused,
                      start)
from tiny import few_digits

WIDTH_METHODS = [name for name, method in run.METHODS.items() if method.networks == "-widths"]


# ------------------------------------------------------------------------------- what a run writes


@pytest.fixture(scope="module")
def five_resnets(tmp_path_factory):
    """A run of FedIN's five networks, read by several tests: its flags, folder and output."""
    out = tmp_path_factory.mktemp("resnets") / "a" / "run"
    flags = [*RESNETS, *"--rounds 2 --eval-every 2 --noise 0.5 --augment".split()]
    shown = io.StringIO()
    with redirect_stdout(shown):
        go(out, *flags, "--workers", "1")
    return flags, out, shown.getvalue()


def test_a_run_says_what_it_does_and_where_its_files_are(five_resnets):
    _, out, shown = five_resnets
    for text in ("fedin on", "3 of 5 clients", "resnet26", "17,446,090", "traffic: about", "2/2",
                 str(out), "checkpoint.pt"):
        assert text in shown


def test_a_run_leaves_its_files(tmp_path, capsys):
    out = tmp_path / "a" / "run"
    entries = go(out, *CNN, "--rounds", "3", "--eval-every", "2", "--seed", "7")
    assert capsys.readouterr().err == ""
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "result.json", "curves.png"}
    assert [entry["round"] for entry in entries] == [2, 3]
    raw = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert raw.keys() == {"round", "accuracy", "personal_accuracy", "loss", "upload_mb",
                          "download_mb", "samples", "seconds", "clock"}
    assert all(0 <= raw[name] <= 100 for name in ("accuracy", "personal_accuracy"))
    assert raw["samples"] == 3 * 24  # participants x images, one epoch

    settings = config(out)
    assert settings["method"] == "fedin" and settings["seed"] == 7 and settings["mu"] == 0.1
    assert settings["versions"] == {"python": platform.python_version(),
                                    "torch": torch.__version__,
                                    "torchvision": torchvision.__version__}
    assert settings["device"] and "out" not in settings and "resume" not in settings

    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["round"] == 3 and saved["memory"] == {}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    final = json.loads((out / "result.json").read_text())
    best = max(entries, key=lambda entry: entry["accuracy"])
    assert final["accuracy"] == entries[-1]["accuracy"] and final["rounds"] == 3
    assert (final["best_accuracy"], final["best_round"]) == (best["accuracy"], best["round"])
    assert final["last10_accuracy"] == sum(entry["accuracy"] for entry in entries) / 2
    assert final["samples"] == 3 * 3 * 24 and final["images_per_second"] > 0


def test_defaults_are_fedin_on_digits_and_the_settings_are_the_papers():
    assert {"method": "fedin", "dataset": "digits", "setting": "quick", "clients": 10,
            "participation": 0.5, "rounds": 10, "local_epochs": 1, "batch_size": 16, "lr": 4e-4,
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
    assert {"participation": 1, "local_epochs": 5, "batch_size": 50, "model": "cnn", "lr": 4e-4,
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
        settings = run.resolve({"method": name} | ({"noise": 0.8} if name == "fedin" else {}))
        bound = baselines.bind(method, settings)
        functions = [*bound.stages.values(), *filter(callable, bound)]
        reached = {keyword for function in functions for keyword in function.keywords}
        elsewhere = {"ablate", "lambda", "semantics", "word_vectors", "proxy"}
        own = {flag for flag in method.defaults if run.FLAGS[flag].default is baselines.NOT_SAID}
        assert own - elsewhere <= reached
        assert ("balance" in reached) == ("lambda" in settings)
        assert {"local_epochs", "batch_size"} <= reached


def test_workers_are_as_many_as_cores_but_no_more_than_participants(monkeypatch):
    monkeypatch.setattr(run, "num_cores", lambda: 64)
    assert run.resolve({"device": "cpu", "clients": 20, "participation": 0.25})["workers"] == 5
    monkeypatch.setattr(run, "num_cores", lambda: 2)
    assert run.resolve({"device": "cpu", "clients": 20, "participation": 0.25})["workers"] == 2


@pytest.mark.parametrize("wrong", [{"loss": math.inf}, {"kept": {"w": torch.tensor(math.nan)}},
                                   {"update": [torch.tensor(-math.inf)]}])
def test_what_is_not_finite_is_noticed_wherever_it_is(wrong):
    experiment = run.prepare_experiment(run.resolve({"model": "cnn", "train_images": 200}))
    task = baselines.Task(experiment.clients[3], 1, None)
    fine = baselines.Result([torch.ones(2)], 1.0, 1, {"w": torch.ones(1)})
    assert run.train_client(experiment, lambda *_: fine, task) == fine
    with pytest.raises(FloatingPointError, match="client 3"):
        run.train_client(experiment, lambda *_: fine._replace(**wrong), task)


def test_the_servers_training_has_a_stream_of_its_round():
    seeds = []

    def distil(server, updates, build, stream):
        seeds.append(stream(data.GENERATOR_NOISE).initial_seed())
        return server

    experiment = run.prepare_experiment(run.resolve({"model": "cnn", "train_images": 200}))
    method = experiment.method._replace(distil=distil, server_update=lambda server, updates: server)
    experiment = experiment._replace(method=method, train=lambda update, tasks: {
        task.client.id: baselines.Result(None, 1.0, 1) for task in tasks})
    server = run.first_progress(experiment).server
    for t in (1, 2):
        run.train_round(experiment, t, server, {})
    assert seeds == [data.torch_stream(0, data.GENERATOR_NOISE, t).initial_seed() for t in (1, 2)]


def test_participants_are_rounded_and_at_least_one():
    assert run.num_participants({"participation": 0.1, "clients": 100}) == 10
    assert run.num_participants({"participation": 0.01, "clients": 10}) == 1
    experiment = run.prepare_experiment(run.resolve({"seed": 1, "partition": "iid"}))
    chosen = [run.draw_participants(experiment, t) for t in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 5 and chosen[0] == sorted(chosen[0])
    assert chosen[2] == participants(experiment.settings, 2)


def test_traffic_is_the_bytes_of_what_was_sent(five_resnets):
    _, out, _ = five_resnets
    settings = config(out)
    archs = models.MODELS["resnets"]
    meta = [models.build_empty(models.architecture_of(k, 5, archs), 1, 10, torch.device("meta"))
            for k in range(5)]
    sizes = [sum(4 * p.numel() for p in net.parameters()) +  # weights, running statistics, counters
             sum(8 * b.numel() if b.dtype == torch.int64 else 4 * b.numel() for b in net.buffers())
             for net in meta]
    row = 4 * 4608  # bytes of the features of an image; a client sends its twelve, receives 16
    first, second = (sum(sizes[k] for k in participants(settings, t)) for t in (1, 2))
    (entry,), final = lines(out), json.loads((out / "result.json").read_text())
    assert entry["upload_mb"] == pytest.approx((second + 3 * 12 * row) / 1e6, abs=1e-9)
    assert entry["download_mb"] == pytest.approx((second + 3 * 16 * row) / 1e6, abs=1e-9)
    both = first + second  # and in round 1 nobody has features to receive
    assert final["download_mb"] == pytest.approx((both + 3 * 16 * row) / 1e6, abs=1e-9)
    assert final["upload_mb"] == pytest.approx((both + 2 * 3 * 12 * row) / 1e6, abs=1e-9)


def test_accuracies_are_those_of_the_models_that_the_clients_use(tmp_path):
    last = go(tmp_path, *CNN, "--method", "local", "--partition", "dirichlet", "--rounds", "2",
              "--participation", "0.4")[-1]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < len(saved["memory"]) < 5  # some clients still use the initial weights
    experiment = run.prepare_experiment(config(tmp_path))
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
    assert len(on_own) == 40 and last["accuracy"] != last["personal_accuracy"]


def test_a_round_lasts_as_long_as_its_slowest_participant(tmp_path):
    entries = go(tmp_path, *CNN, "--rounds", "2")
    settings = config(tmp_path)
    speeds = run.prepare_experiment(settings).speeds
    assert all(1 <= speed <= apfl.SPEED_SPREAD for speed in speeds) and len(set(speeds)) == 5
    slowest = [min(speeds[k] for k in participants(settings, t)) for t in (1, 2)]
    assert entries[0]["clock"] == pytest.approx(24 / slowest[0])
    assert entries[1]["clock"] == pytest.approx(24 / slowest[0] + 24 / slowest[1])


def test_fedin_learns_the_digits(tmp_path):
    entries = go(tmp_path, "--dataset", few_digits(), "--setting", "quick", "--model", "cnn",
                 "--partition", "iid", "--clients", "2", "--participation", "1", "--rounds", "3")
    assert entries[-1]["accuracy"] > 60  # chance is 10
    assert entries[-1]["loss"] < entries[0]["loss"] / 2


# ------------------------------------------------------- switched off is the method that is left


def test_fedin_without_in_is_fedprox_and_without_prox_too_fedavg(tmp_path):
    def entries(name, *flags):
        go(tmp_path / name, *flags, "--rounds", "2", "--eval-every", "2")
        text = (tmp_path / name / "metrics.jsonl").read_text()
        return re.sub(r', "seconds": [0-9.]+', "", text)

    prox = entries("prox", *RESNET10, "--method", "fedprox")
    assert entries("in", *RESNET10, "--ablate", "in") == prox
    average = entries("average", *CNN, "--method", "fedavg")
    assert entries("in-prox", *CNN, "--ablate", "in", "prox") == average
    assert entries("mu-zero", *CNN, "--method", "fedprox", "--mu", "0") == average
    assert entries("mu", *CNN, "--method", "fedprox") != average


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


def test_options_of_sgd_and_of_noise_do_what_they_say(tmp_path):
    def weights(name, *flags):
        go(tmp_path / name, *CNN, "--rounds", "2", *" ".join(flags).split())
        saved = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["server"]
        return saved["weights"]["cnn"]["classifier.fc.bias"].tolist()

    sgd = weights("sgd", "--optimizer sgd")
    off = weights("off", "--optimizer sgd --momentum 0 --weight-decay 0")
    others = [weights("momentum", "--optimizer sgd --momentum 0.9"),
              weights("decay", "--optimizer sgd --weight-decay 0.1")]
    assert off == sgd and sgd not in others and others[0] != others[1]
    noise = [weights("noise", "--noise 0.8"), weights("all", "--noise 0.8 --noise-on features"),
             weights("upload", "--noise 0.8 --noise-on upload"), weights("quiet")]
    assert sum(noise[0] == one for one in noise) == 2  # itself and the default spelt out
    assert noise[2] != noise[1] != noise[3] != noise[2]


def test_aggregation_per_architecture_is_layerwise_where_there_is_one_alone(tmp_path):
    flags = [*CNN, "--rounds", "2"]
    assert go(tmp_path / "a", *flags, "--aggregation", "per-architecture") == go(tmp_path / "b",
                                                                                 *flags)
    for method in ("fedavg", "fedin", "scaffold", "inclusivefl"):
        for name, function in (("layerwise", models.layerwise_average),
                               ("per-architecture", models.per_architecture_average)):
            bound = baselines.bind(run.METHODS[method], run.resolve({"method": method,
                                                                     "aggregation": name}))
            assert bound.server_update.keywords["aggregation"] is function


# ------------------------------------------------------------------------------ every baseline

BASELINES = {  # method -> flags of a run of some seconds
    "scaffold": RESNET10, "fednova": CNN, "moon": CNN, "fedgen": CNN, "inclusivefl": RESNETS,
    "inco": [*RESNETS, "--model", "resnet14"], "feddf": [*CNN, "--distillation-steps", "2"],
    **dict.fromkeys(WIDTH_METHODS, RESNETS),
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
    initial = models.initial_weights(tuple(server["weights"]), 1, 10, data.torch_stream(
        config(baseline_run(method))["seed"], data.INITIAL_WEIGHTS), torch.device("cpu"))
    for arch, state in server["weights"].items():
        moved = [not torch.equal(tensor, initial[arch][name]) for name, tensor in state.items()]
        assert any(moved) and all(tensor.isfinite().all() for tensor in state.values())
    assert ("full_accuracy" in last) == (method in WIDTH_METHODS)


@pytest.mark.parametrize("method", ["scaffold", "moon", "fedgen", "fedrolex"])
def test_what_a_method_keeps_is_in_the_checkpoint(method, baseline_run, tmp_path):
    flags = [*BASELINES[method], "--method", method, "--eval-every", "2", "--workers", "1"]
    go(tmp_path, *flags, "--rounds", "1")
    assert go(tmp_path, "--resume", "--rounds", "2") == lines(baseline_run(method))


def test_a_client_is_sent_what_its_method_says(baseline_run):
    def size(method, t, weigh):
        settings = config(baseline_run(method))
        archs = run.METHODS[method].architectures(models.MODELS[settings["model"]])
        return sum(weigh(archs[k * len(archs) // 5], k) for k in participants(settings, t)) / 1e6

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
        experiment = run.prepare_experiment(config(baseline_run(method)))

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
        took_part = {k for t in (1, 2) for k in participants(config(out), t)}
        stateful = method in ("scaffold", "moon")
        assert set(saved["memory"]) == (took_part if stateful else set())
        if method == "scaffold":
            variate = saved["memory"][min(took_part)]
            assert all(models.is_parameter(name) for name in variate)


def test_full_accuracy_is_the_whole_networks_and_accuracy_the_mean_over_rates(baseline_run):
    out = baseline_run("heterofl")
    last, saved = lines(out)[-1], torch.load(out / "checkpoint.pt", weights_only=True)
    experiment = run.prepare_experiment(config(out))
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
    monkeypatch.setattr(baselines, "TEST_BATCH", 60)  # in order, a batch would be of one client
    weights = models.initial_weights(["resnet18-1/16"], 1, 10, torch.Generator(),
                                     torch.device("cpu"))["resnet18-1/16"]
    collected = []
    monkeypatch.setattr(baselines, "predict", lambda model, *_: collected.append(model) or 0)
    baselines.predicted_right(experiment, [(0, "resnet18-1/16", "key", weights)])
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


def test_dropout_clients_have_no_share_in_static_statistics(monkeypatch):
    experiment = run.prepare_experiment(run.resolve(
        {"method": "heterofl", "train_images": 100, "clients": 4, "missing_classes": 0.2}))
    seen = []
    monkeypatch.setattr(
        baselines, "collect_statistics", lambda model, batches: seen.extend(batches))
    weights = run.first_progress(experiment).server["weights"]["resnet18-1"]
    baselines.predicted_right(experiment, [(0, "resnet18-1", "key", weights)])
    there = sum(len(client.indices) for client in experiment.clients[:3])
    assert experiment.dropouts == [3] and sum(map(len, seen)) == there


@pytest.mark.parametrize("num_classes, each", [(26, 6), (100, 20)])
@pytest.mark.parametrize("missing", [0.1, 0.2])
def test_in_the_dropout_setting_ten_clients_hold_all_classes(num_classes, each, missing, tmp_path):
    y = np.arange(5 * num_classes) % num_classes
    np.savez(tmp_path / "many.npz", x_train=np.zeros((len(y), 8, 8), np.uint8), y_train=y,
             x_test=np.zeros((len(y), 8, 8), np.uint8), y_test=y)
    typed = {"dataset": str(tmp_path / "many.npz"), "setting": "quick", "missing_classes": missing}
    experiment = run.prepare_experiment(run.resolve(typed))
    gone = round(missing * num_classes)
    assert experiment.settings["classes_per_client"] == each and experiment.dropouts == [9]
    assert experiment.seen == list(range(num_classes - gone))
    assert experiment.unseen == list(range(num_classes - gone, num_classes))
    fewer = run.prepare_experiment(run.resolve(typed | {"classes_per_client": each // 2}))
    labels = [fewer.data.y_train[client.indices].unique() for client in fewer.clients]
    assert {len(own) for own in labels} == {each // 2}
    assert len(fewer.dropouts) == -(-gone // (each // 2))


def test_scaffolds_server_counts_the_clients_that_take_part():
    settings = run.resolve({"method": "scaffold", "missing_classes": 0.2})
    bound = run.prepare_experiment(settings).method.server_update.keywords
    assert list(bound["owners"]) == list(range(9))  # of ten clients the last has dropped out
    assert [bound["owners"][k].arch for k in (0, 8)] == ["resnet10", "resnet26"]


def test_fine_tuning_has_epochs_of_its_own(tmp_path):
    saved = {}
    for epochs in ("", "0", "1", "3"):
        flags = ["--finetune-epochs", epochs] if epochs else []
        go(tmp_path / epochs / "run", *CNN, "--method", "fedavg-ft", "--rounds", "2", *flags)
        saved[epochs] = torch.load(tmp_path / epochs / "run" / "checkpoint.pt", weights_only=True)
    tuned = {epochs: one["after"]["late"][0]["classifier.fc.bias"].tolist()
             for epochs, one in saved.items()}
    rounds = [one["server"]["weights"]["cnn"]["classifier.fc.bias"].tolist()
              for one in saved.values()]
    assert all(one == rounds[0] for one in rounds) and tuned["0"] == rounds[0]
    assert tuned[""] == tuned["1"] != tuned["3"] != tuned["0"]  # 1 is what --local-epochs says


def test_moon_with_mu_zero_is_fedavg_from_the_command_line_too(tmp_path):
    flags = [*CNN, "--rounds", "2"]
    plain = go(tmp_path / "a", *flags, "--method", "fedavg")
    assert go(tmp_path / "b", *flags, "--method", "moon", "--mu", "0") == plain
    assert go(tmp_path / "c", *flags, "--method", "moon") != plain


def test_feddf_without_steps_is_fedavg_and_each_proxy_leads_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "num_right", lambda *_: 0)  # so that the last student counts
    np.savez(tmp_path / "other.npz", x_train=np.eye(8, dtype=np.uint8)[None].repeat(9, 0) * 255,
             y_train=np.arange(9) % 2, x_test=np.zeros((2, 8, 8), np.uint8), y_test=np.arange(2))
    flags = [*CNN, "--rounds", "1", "--train-images", "390"]  # few are left over for the server
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


def test_the_servers_images_are_no_clients_nor_of_unseen_classes():
    settings = run.resolve({"method": "feddf", "missing_classes": 0.2, "train_images": 400})
    keywords = run.prepare_experiment(settings).method.distil.keywords
    loaded = data.load("digits")
    _, *held_out = data.choose_images(loaded.y_train, 0, train_images=400, proxy="holdout")
    for name, rows in zip(("proxy", "validation"), held_out):
        kept = rows[loaded.y_train[rows] < 8]
        assert torch.equal(keywords[name].images, loaded.x_train[kept]) and len(kept) < len(rows)
    assert torch.equal(keywords["validation"].labels, loaded.y_train[kept])


def test_a_proxy_of_other_channels_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "colour.npz", x_train=np.zeros((9, 8, 8, 3), np.uint8),
             y_train=np.arange(9) % 2, x_test=np.zeros((2, 8, 8, 3), np.uint8), y_test=np.arange(2))
    error = refused(capsys, "--method", "feddf", "--proxy", str(tmp_path / "colour.npz"), "--out",
                    str(tmp_path / "out"))
    assert "9 images of 3 channels" in error


def test_a_server_that_diverges_stops_the_run(tmp_path, capsys, monkeypatch):
    feddf = run.METHODS["feddf"]
    monkeypatch.setitem(run.METHODS, "feddf", feddf._replace(distil=partial(
        feddf.distil, step_size=1e38)))
    error = refused(capsys, *CNN, "--method", "feddf", "--distillation-steps", "3", "--out",
                    str(tmp_path / "feddf"), status=1)
    assert "round 1, distillation: a weight is not finite any more" in error
    monkeypatch.setattr(generator, "LATENT_LR", 1e30)
    error = refused(capsys, *CNN, "--method", "fedgen", "--out", str(tmp_path / "fedgen"),
                    status=1)
    assert "round 1, the server's training: a weight is not finite" in error


def test_methods_prints_every_method_and_its_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--methods"])
    out = capsys.readouterr().out
    table, footer = out.split("\nfeddf, which averages within")
    rows = {row.split()[0]: row for row in re.split(r"\n\n+", table) if row.strip()}
    assert stop.value.code == 0 and rows.keys() == {"method", *run.METHODS}
    assert "scalefl, which averages each coordinate" in footer
    assert "--self-distillation" in rows["scalefl"] and "per-architecture" in rows["moon"]
    assert " -widths " in rows["fedrolex"] and "control" in rows["scaffold"]
    assert "async" in rows["fedprox"] and "async" not in rows["fedin"]
    assert max(map(len, out.splitlines())) <= 101


# ------------------------------------------------------------------------ the same bytes again


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, five_resnets):
    flags, one, _ = five_resnets
    assert go(tmp_path, *flags, "--workers", "2") == lines(one)
    states = [torch.load(out / "checkpoint.pt", weights_only=True)["server"]
              for out in (one, tmp_path)]
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


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, hint", [
    ("--method fedsgd", "unknown --method 'fedsgd': choose one of local, fedavg, "),
    ("--method heterofl --aggregation per-architecture", "--aggregation is not read by --method "
     "heterofl, which averages each coordinate over the sub-models that hold it"),
    ("--method feddf --aggregation layerwise", "--aggregation is not read by --method feddf, "
     "which averages within each architecture"),
    ("--method fedrolex --model cnn", "give --model resnet18-widths or resnet152-widths"),
    ("--model resnet18-widths", "or --method heterofl or fedrolex or scalefl"),
    ("--method scaffold --aggregation async --model cnn", "or --method fedavg or fedavg-ft or f"),
    ("--method scaffold --mu 1", "--mu is not read by --method scaffold"),
    ("--method heterofl --self-distillation 1", "--self-distillation is not read by --method hete"),
    ("--method feddf --proxy imagenet", "unknown --proxy 'imagenet': choose one of holdout, "),
    ("--method feddf --proxy nowhere.npz", "nowhere.npz"),
    ("--method feddf --distillation-steps -1", "--distillation-steps must be a whole number at"),
    ("--dataset minst", "unknown --dataset 'minst': choose one of digits, "),
    ("--dataset nowhere.npz", "nowhere.npz"),
    ("--model resnet152", "unknown --model 'resnet152'"),
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
    ("--ablate everything", "unknown --ablate 'everything': choose one of in, prox, opt"),
    ("--ablate in --ablate prox x", "unknown --ablate 'x'"),
    ("--method feddf --distillation-steps 0 --proxy noise", "--proxy is not read with --distil"),
    ("--alpha 0", "--alpha must be a number above 0, not '0'"),
    ("--alpha inf", "--alpha must be at most 1e+09, not 'inf'"),
    ("--lr nan", "--lr must be a number above 0"),
    ("--rounds 0", "--rounds must be a whole number at least 1"),
    ("--clients 2.5", "--clients must be a whole number"),
    ("--participation 1.5", "must be at most 1, not '1.5'"),
    ("--rounds 1" + 400 * "0", "--rounds must be at most 1e+09"),
    ("--device meta", "--device meta cannot be used"),
    ("--clients 300000000 --partition iid", "use fewer --clients"),
    ("--batch-size 1", "--batch-size must be a whole number at least 2"),
    ("--seed -1", "--seed"),
    ("--noise -1", "--noise"),
    ("--train-images 5 --clients 10", "5 training images cannot give each of 10 clients"),
    ("--train-images 30 --clients 10", "no Dirichlet(0.5) split of 30 images"),
    ("--train-images 5 --clients 10 --partition iid", "use fewer --clients or more images"),
    ("--train-images 2000", "more than the 1437 training images"),
    ("--test-images 2000", "more than the 360 test images"),
    ("--clients 200", "no Dirichlet(0.5) split of 1437 images"),
    ("--partition pathological --classes-per-client 11", "more than the 10 classes"),
    ("--device quantum", "--device quantum cannot be used"),
    ("--resume", "no run"),
    ("--method fedavg --beta 0.5", "--beta is not read by --method fedavg"),
    ("--method fedavg --mixing 0.5", "--mixing is not read with --aggregation layerwise"),
    ("--method apfl --speed-spread 2", "--speed-spread is not read with --aggregation lay"),
    ("--method apfl --aggregation async --participation 0.5", "--participation is not read with "
     "--aggregation async"),
    ("--method apfl --word-vectors x.txt", "--word-vectors is not read with --semantics segm"),
    ("--aggregation async", "--aggregation async does not go with --method fedin"),
    ("--method fedavg --aggregation async", "--aggregation async needs one architecture"),
    ("--method apfl --model resnets", "--model resnets does not go with --method apfl: give --mod"),
    ("--missing-classes 0.2 --alpha 0.5", "--alpha is not read with --missing-classes"),
    ("--missing-classes 0.2 --partition iid", "--partition is not read with --missing-classes"),
    ("--missing-classes 0.2 --classes-per-client 9", "give --classes-per-client 8 or less"),
    ("--missing-classes 0.9", "at least two classes"),
    ("--missing-classes 0.3 --clients 2", "one client must take part"),
    ("--missing-classes 1.2", "must be at most 1"),
    ("--noise-on upload", "--noise-on is not read with --noise 0"),
    ("--noise 0.8 --noise-on upload --ablate in", "--noise-on is not read with --ablate in"),
    ("--momentum 0.9", "--momentum is not read with --optimizer adam"),
    ("--method scaffold --optimizer sgd --momentum 0.9", "is not read with --method scaffold"),
    ("--optimizer sgd --momentum 1", "--momentum must be at most 0.999"),
    ("--method apfl --finetune-epochs 3", "--finetune-epochs is not read by --method apfl"),
    ("--method apfl --beta 2", "--beta must be at most 1"),
    ("--method apfl --generator-batch 1", "--generator-batch must be a whole number at least 2"),
    ("--method apfl --semantics nowhere.npz", "no file nowhere.npz: check --semantics"),
    ("--method apfl --semantics glove", "unknown --semantics 'glove'"),
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


# ------------------------------------------------------------------------------ flags as data


def test_help_names_every_flag_its_default_and_the_papers_values(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert all(baselines.typed_as(name) in text for name in run.FLAGS)
    for phrase in ("mu/2 = 0.05", "Eq. 13", "Table 2b", "Sec. 4.3: 0.8", " fedin: --noise",
                   "fedprox, moon, fedin: --mu", "fedprox: 0.01 (apfl), else 0.1; moon: 1.0",
                   "10 (quick), 100 (fedin), 10 (apfl)", "FILE.npz"):
        assert phrase in text


def test_a_row_alone_makes_a_flag(monkeypatch, capsys):
    monkeypatch.setitem(run.METHODS, "fedavg", run.METHODS["fedavg"]._replace(
        defaults={"aggregation": "layerwise", "warmth": baselines.By("dataset", {"svhn": 2}, 3)}))
    monkeypatch.setitem(run.FLAGS, "warmth", Flag(
        "warmth", int, "a number", above=0, high=9, unless={"aggregation": ["async"]},
        decides={"": {"lr": 0.25}}))
    assert run.resolve({"method": "fedavg"})["warmth"] == 3
    assert run.resolve({"method": "fedavg", "dataset": "svhn"})["warmth"] == 2
    assert run.resolve({"method": "fedavg"})["lr"] == 4e-4
    assert run.resolve({"method": "fedavg", "warmth": 5})["lr"] == 0.25
    assert "warmth" not in run.resolve({"method": "fedprox"})
    for flags, hint in (("fedavg --warmth 10", "--warmth must be at most 9, not '10'"),
                        ("fedavg --warmth 0", "--warmth must be a whole number above 0"),
                        ("fedavg --warmth 1 --lr 1", "--lr is not read with --warmth"),
                        ("fedprox --warmth 1", "--warmth is not read by --method fedprox"),
                        ("fedavg --warmth 1 --aggregation async --model cnn",
                         "--warmth is not read with --aggregation async")):
        assert hint in refused(capsys, "--method", *flags.split())


def test_a_flag_is_read_if_one_of_its_conditions_holds():
    svhn = {"dataset": "svhn", "data_dir": "x"}
    assert run.resolve({**svhn, "method": "fedavg"})["data_dir"] == "x"
    assert run.resolve({**svhn, "method": "apfl"})["data_dir"] == "x"
    assert run.resolve({"method": "apfl", "semantics": "bert", "data_dir": "x"})["data_dir"] == "x"
    assert "data_dir" not in run.resolve({"method": "apfl"})


def test_no_two_rows_are_of_one_flag_or_method():
    tables = (baselines, fedin, apfl)
    assert len(run.FLAGS) == len(run.COMMON) + sum(len(table.FLAGS) for table in tables)
    assert len(run.METHODS) == sum(len(table.METHODS) for table in tables) == 16
    assert list(run.FLAGS)[:3] == ["method", "dataset", "setting"]


def test_every_default_of_a_row_is_a_value_that_can_be_typed():
    for name, flag in run.FLAGS.items():
        defaults = [flag.default] + [method.defaults[name] for method in run.METHODS.values()
                                     if name in method.defaults]
        for default in defaults:
            values = [*default.values.values(), default.otherwise] if isinstance(
                default, baselines.By) else [default]
            for value in values:
                if value not in (baselines.NOT_SAID, None) and flag.kind not in (bool, list):
                    assert baselines.read_value(flag, str(value)) == value, name


# -------------------------------------------------------------------------------------- layout

MODULES = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}
BELOW = {  # module -> what it may import of the project: that which is below it
    "data": set(), "models": set(), "generator": {"data", "models"}, "ranks": {"data"},
    "baselines": {"data", "generator", "models", "ranks"}, "fedin": {"baselines", "data", "models"},
    "apfl": {"baselines", "data", "generator", "models"}, "pictures": set(),
    "files": {"apfl", "baselines", "data", "fedin", "models", "ranks"},
    "run": {"apfl", "baselines", "data", "fedin", "files", "generator", "models", "pictures", "ranks"},
}


def imported(module: str) -> set[str]:
    """The packages and modules that a module imports, wherever in it."""
    nodes = list(ast.walk(MODULES[module]))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_imports_run_downwards_only_and_nothing_imports_run():
    assert MODULES.keys() >= BELOW.keys()
    for name in MODULES.keys() - {"tables", "analysis"}:  # tools, which stand above run.py
        assert imported(name) & MODULES.keys() <= BELOW[name], name
    assert imported("models") <= {"torch", *sys.stdlib_module_names}


def test_starting_loads_torch_and_no_other_heavy_package():
    program = ("import sys, torch; before = set(sys.modules); import run; "
               "run.main(['--method', 'fedsgd']); print(set(sys.modules) - before)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    loaded = {name.split(".")[0] for name in ast.literal_eval(done.stdout)}
    assert "unknown --method" in done.stderr and "models" in loaded
    assert loaded <= {*MODULES, "torch", "numpy", "tqdm", *sys.stdlib_module_names} | {
        name for name in loaded if name.startswith("_")}


def test_bfloat16_is_of_the_training_alone(tmp_path):
    features = [*RESNET10, "--method", "fedin", "--rounds", "2", "--noise", "0.1"]
    many_steps = [*CNN, "--method", "fedavg", "--rounds", "2", "--local-epochs", "6"]
    for name, flags in (("features", features), ("many_steps", many_steps)):
        usual = go(tmp_path / name, *flags)
        rough = go(tmp_path / f"{name}-amp", *flags, "--amp")
        for one, other in zip(usual, rough):
            assert one["loss"] != other["loss"] == pytest.approx(one["loss"], rel=0.1)
            assert one["upload_mb"] == other["upload_mb"]  # float32, the features too
        saved = torch.load(tmp_path / f"{name}-amp" / "checkpoint.pt", weights_only=True)
        kinds = {tensor.dtype for tensor in models.tensors_in(saved)}
        assert kinds <= {torch.float32, torch.int64}


def test_what_an_older_run_did_not_have_was_off(tmp_path):
    flags = [*CNN, "--method", "fedavg", "--rounds", "1"]
    go(tmp_path, *flags)
    (tmp_path / "config.json").write_text(json.dumps(
        {name: value for name, value in config(tmp_path).items()
         if name not in ("amp", "test_images")}))
    assert len(go(tmp_path, "--resume", "--rounds", "2")) == 2
    assert config(tmp_path)["amp"] is False and config(tmp_path)["test_images"] is None


def test_models_can_be_copied_alone(tmp_path):
    shutil.copy(ROOT / "models.py", tmp_path)
    program = ("import sys, models, torch; x = torch.zeros(2, 3, 32, 32); "
               "print(*(tuple(models.build(arch, 3, 10)(x).shape) for arch in ('cnn', 'resnet10')),"
               " 'torchvision' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.stdout == "(2, 10) (2, 10) False\n", done.stderr


def test_every_function_is_short_and_has_a_docstring():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node in tree.body:
                assert ast.get_docstring(node), f"{name}.{node.name}"
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


# -------------------------------------------------------------------------------------- README


def test_the_documents_name_only_flags_that_exist():
    known = {baselines.typed_as(name) for name in run.FLAGS} | {"--help", "--methods"}
    added = {"--server-lr",  # by the example of a new method
             "--nproc-per-node", "--nnodes",  # of torchrun
             "--list", "--scale", "--seeds", "--jobs", "--only"}  # of tables.py
    for name in ("README.md", "PAPERS.md", "RESULTS.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / name).read_text()))
        assert named - known <= added, name
        assert len(named) > 5


def test_what_the_readme_calls_alone_uses_nothing_of_the_project():
    whole = " ".join((ROOT / "README.md").read_text().split())
    text = whole.split("uses. `project_gradient`")[1].split("use nothing")[0]
    named = {"project_gradient", *re.findall(r"`(?:\w+\.)?(\w+)`", text)} - {"held"}
    assert len(named) == 9
    for name in named:
        (function,) = {getattr(module, name) for module in (fedin, baselines, models, generator)
                       if hasattr(module, name)}
        used = inspect.getclosurevars(function).globals.keys()
        assert used <= {"torch", "F"} | ({"grid"} if name == "average" else set()), name  # held's


def test_the_readmes_method_is_a_method_by_one_change_of_one_module(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    section = (ROOT / "README.md").read_text().split("## Add a method")[1]
    example = section.split("```python\n")[1].split("```")[0]
    with open(tmp_path / "baselines.py", "a") as file:
        file.write("\n\n" + example)
    program = """
import sys, run
for out, *flags in (["whole", "--method", "fedlr", "--server-lr", "1", *sys.argv[1:]],
                    ["half", "--method", "fedlr", *sys.argv[1:]],
                    ["half", "--resume", "--rounds", "2"]):
    assert run.main([*flags, "--out", out]) == 0
run.main(["--method", "fedavg", "--server-lr", "1"])
run.main(["--methods"])
"""
    done = subprocess.run([sys.executable, "-c", program, *CNN, "--rounds", "1"], cwd=tmp_path,
                          text=True, capture_output=True)
    assert "--server-lr is not read by --method fedavg" in done.stderr, done.stderr
    assert re.search(r"\nfedlr .* --server-lr", done.stdout)
    whole, half = (lines(tmp_path / name) for name in ("whole", "half"))
    plain = go(tmp_path / "plain", *CNN, "--method", "fedavg", "--rounds", "1")
    assert whole == plain and half[0] != plain[0] and len(half) == 2
