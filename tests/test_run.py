"""The command line from outside: settings, files and numbers of a run, refusals, all methods."""

import ast
import inspect
import json
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from commands import (CNN, RESNET10, RESNETS, ROOT, checkpoint, config, experiment_of, go, lines,
                      participants, refused, result)
from tiny import few_digits

import baselines
import data
import federation
import fedin
import files
import generator
import models
import ranks
import run
import widths
from settings import command_line, implied_flags, typed_as
from tests import curves

TWO_ROUNDS = ["--rounds", "2", "--eval-every", "2"]


# ----------------------------------------------------------------------------------- files of a run

def test_a_run_says_what_it_does_and_leaves_its_files(tmp_path, capsys):
    out = tmp_path / "a" / "run"
    before = torch.get_rng_state(), str(np.random.get_state())
    entries = go(out, *CNN, "--rounds", "3", "--eval-every", "2", "--seed", "7", "--noise", "0.5")
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == str(np.random.get_state())
    shown = capsys.readouterr()
    assert shown.err == "" and all(text in shown.out for text in (
        "fedin on", "clients per round: 3 of 5", "cnn: 876,938 parameters", "traffic: about", "3/3",
        str(out)))
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "result.json", "curves.png"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [entry["round"] for entry in entries] == [2, 3]
    raw = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert raw.keys() == {"round", "accuracy", "personal_accuracy", "loss", "upload_mb",
                          "download_mb", "samples", "seconds", "clock"}
    assert all(0 <= raw[name] <= 100 for name in ("accuracy", "personal_accuracy"))
    assert raw["samples"] == 3 * 24  # participants x images, one epoch

    settings, saved, final = config(out), checkpoint(out), result(out)
    assert {"method": "fedin", "seed": 7, "mu": 0.1}.items() <= settings.items()
    assert settings["versions"] == {"python": platform.python_version(),
                                    "torch": torch.__version__,
                                    "torchvision": torchvision.__version__.split("+")[0],
                                    "commit": files.commit(), "machine": files.machine()}
    assert settings["device"] and not {"out", "resume"} & settings.keys()
    assert saved["round"] == 3 and saved["memory"] == {}
    best = max(entries, key=lambda entry: entry["accuracy"])
    assert final["accuracy"] == entries[-1]["accuracy"] and final["rounds"] == 3
    assert (final["best_accuracy"], final["best_round"]) == (best["accuracy"], best["round"])
    assert final["last10_accuracy"] == sum(entry["accuracy"] for entry in entries) / 2
    assert final["samples"] == 3 * 3 * 24


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("no font")

    monkeypatch.setattr("pictures.draw_curves", fail)
    go(tmp_path, *CNN, "--rounds", "1")
    assert result(tmp_path)["rounds"] == 1 and not (tmp_path / "curves.png").exists()
    assert "warning: curves.png could not be drawn (no font)" in capsys.readouterr().out


def test_feddf_says_that_its_students_never_were_better(tmp_path, monkeypatch, capsys):
    feddf, looks = [*CNN, "--method", "feddf", "--rounds", "1"], iter(range(9))
    monkeypatch.setattr(baselines, "num_right", lambda model, data: next(looks))
    for steps, distilled in (("0", False), ("60", True)):
        (line,) = go(tmp_path / steps, *feddf, "--distillation-steps", steps)
        assert line["distilled"] is distilled
        assert ("numbers of averages alone" in capsys.readouterr().out) is not distilled
    fedgen = [*CNN, "--method", "fedgen", "--rounds", "1"]
    assert "distilled" not in go(tmp_path / "fedgen", *fedgen)[0]
    monkeypatch.setattr(baselines, "num_right", lambda model, data: next(wins))
    wins = iter([0, 1, 1, 0])  # a better student in round 1, none in round 2
    (line,) = go(tmp_path / "two", *feddf, "--distillation-steps", "1", "--rounds", "2",
                 "--eval-every", "2")
    assert line["distilled"] is False and "averages alone" not in capsys.readouterr().out


def test_a_round_lasts_as_long_as_its_slowest_participant_and_totals_are_sums(run_of):
    out = run_of(*CNN, "--rounds", "2")
    entries, final, speeds = lines(out), result(out), experiment_of(config(out)).speeds
    assert all(1 <= speed <= federation.SPEED_SPREAD for speed in speeds) and len(set(speeds)) == 5
    first, second = (24 / min(speeds[k] for k in participants(config(out), t)) for t in (1, 2))
    assert [entry["clock"] for entry in entries] == pytest.approx([first, first + second])
    for name in ("upload_mb", "download_mb", "samples"):
        assert final[name] == pytest.approx(sum(entry[name] for entry in entries))


def test_fedin_learns_colour_images_of_a_file(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    images = np.clip(80 * labels[:, None, None, None] + rng.normal(40, 9, (60, 20, 24, 3)), 0, 255)
    np.savez(tmp_path / "mine.npz", x_train=images.astype(np.uint8), y_train=labels,
             x_test=images[:9].astype(np.uint8), y_test=labels[:9], classes=["low", "mid", "high"])
    entries = go(tmp_path / "out", "--dataset", str(tmp_path / "mine.npz"), *CNN[2:],
                 "--train-images", "60", *"--clients 3 --rounds 3 --batch-size 5".split())
    assert entries[-1]["accuracy"] > 60 and entries[-1]["loss"] < entries[0]["loss"] / 2
    assert config(tmp_path / "out")["input"]["classes"] == ["low", "mid", "high"]


# ---------------------------------------------------------------------------- settings and defaults

APFLS = ("apfl", "local", "fedavg-ft", "fedgen", "feddf", "ccvr")  # methods in AP-FL's tables alone
DEFAULTS = [  # flags as typed, and others as the run has them
    ("", "--method fedin --dataset digits --setting quick --clients 10 --participation 0.5 "
     "--rounds 10 --local-epochs 1 --batch-size 16 --lr 4e-4 --partition dirichlet --alpha 0.5 "
     "--model resnets --eval-every 1 --mu 0.1 --noise 0 --projection simplified --threads 1 "
     "--aggregation layerwise --feature-batch-size 16 --feature-batches 1 --checkpoint-every 1"),
    ("--dataset svhn", "--setting fedin --clients 100 --participation 0.1 --rounds 500 "
     "--local-epochs 5 --batch-size 16 --lr 1e-3 --optimizer adam --alpha 0.5 --model resnets "
     "--eval-every 5"),
    ("--dataset cifar10 --method local", "--setting apfl --clients 10 --participation 1 "
     "--rounds 50 --local-epochs 20 --batch-size 50 --lr 2e-4 --optimizer adam --alpha 0.1 "
     "--model cnn --eval-every 1"),
    *((f"--method {method}", "--setting quick --participation 1 --local-epochs 5 --batch-size 50 "
       "--model cnn --lr 4e-4 --rounds 10") for method in APFLS),
    *((f"--method {method} --dataset emnist", "--setting apfl") for method in APFLS),
    *((f"--method {method}", "--model resnet18-widths") for method in widths.METHODS),
    ("--method fedrolex --dataset svhn", "--model resnet152-widths"),
    ("--method feddf", "--distillation-steps 50 --proxy holdout"),
    ("--method feddf --setting apfl", "--distillation-steps 500"),
    ("--method fedprox", "--mu 0.1"), ("--method fedprox --setting apfl", "--mu 0.01"),
    ("--method moon", "--mu 1"), ("--method apfl --dataset svhn", "--semantics segments"),
    ("--method apfl --dataset cifar10", "--semantics clip --synthetic-per-class 600 "
     "--friend-epochs 20 --lambda 0.5 --beta-on client"),
    ("--missing-classes 0.2", "--partition pathological"), ("--ablate opt", "--projection sum")]


@pytest.mark.parametrize("typed, expected", DEFAULTS)
def test_defaults_are_the_papers(typed, expected):
    typed, expected = (run.read_command_line(flags.split()) for flags in (typed, expected))
    assert expected.items() <= run.resolve(typed).items()


@pytest.mark.parametrize("flags, words", [
    ("--method fedavg --dataset mine.npz --rounds 110 --workers 1", 8),
    ("--method fedin --ablate in --seed 3 --lr 0.002", 10),
    ("--method apfl --missing-classes 0.2 --semantics onehot --lambda 1", 10),
    ("--method fedavg --setting apfl --aggregation async --clients 20 --mixing 0.5", 12)])
def test_a_command_from_settings_gives_them_again(flags, words):
    settings = run.resolve(run.read_command_line(flags.split()))
    typed = shlex.split(curves.command(settings | {"input": {}, "versions": {}}))
    assert typed[:2] == ["python", "run.py"] and len(typed) == words
    again = run.resolve(run.read_command_line(typed[2:]))
    assert again | {"workers": settings["workers"]} == settings


@pytest.mark.parametrize("cores, workers", [(64, 5), (2, 2)])
def test_workers_are_as_many_as_cores_but_no_more_than_participants(cores, workers, monkeypatch):
    monkeypatch.setattr(ranks, "num_cores", lambda: cores)
    settings = run.resolve({"device": "cpu", "clients": 20, "participation": 0.25})
    assert settings["workers"] == workers


@pytest.mark.parametrize("name, missing, expected", [
    ("gray", 0.1, (0.1, 2)), ("colour", 0.1, (0.01, 2)), ("many", 0.1, (0.1, 6))])
def test_settings_that_depend_on_the_data(name, missing, expected, tmp_path, monkeypatch):
    classes, shape = 26 if name == "many" else 10, (8, 8, 3) if name == "colour" else (8, 8)
    y, x = np.arange(5 * classes) % classes, np.zeros((5 * classes, *shape), np.uint8)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.chdir(tmp_path)
    typed = {"method": "apfl", "dataset": "data.npz", "setting": "quick",
             "missing_classes": missing, "semantics": "onehot"}
    try:
        settings, split, _, _ = run.read_inputs(typed, tmp_path / "out", False)
    finally:
        files.release()
    assert (settings["beta"], settings["classes_per_client"]) == expected
    gone = round(missing * classes)
    assert split.dropouts == [9] and split.unseen == list(range(classes - gone, classes))


@pytest.mark.parametrize("name", run.METHODS)
def test_every_flag_of_a_method_reaches_one_of_its_functions(name):
    method = run.METHODS[name]
    reached = {parameter.name for function in method if callable(function)
               for parameter in inspect.signature(function).parameters.values()
               if parameter.kind is parameter.KEYWORD_ONLY}
    # These are read by run.resolve, settings.py, federation.py and partitions.py.
    elsewhere = {"setting", "model", "ablate", "lambda", "proxy"}
    assert method.defaults.keys() - elsewhere <= reached
    assert ("balance" in reached) == ("lambda" in method.defaults)
    assert ("proxy" in reached) == ("proxy" in method.defaults)
    assert {"local_epochs", "batch_size"} <= reached


def test_every_other_flag_is_read_by_name():
    text = "".join((ROOT / f"{name}.py").read_text() for name in
                   ("run", "federation", "partitions", "files"))
    read = set(re.findall(r'settings(?:\.get\(|\[)"(\w+)"', text))
    assert {*run.COMMON, *run.SETTINGS["quick"]} - read <= {"method", "dataset", "batch_size"}
    assert all(values.keys() == run.SETTINGS["quick"].keys() for values in run.SETTINGS.values())


CASES = [{"method": method, "dataset": dataset} for method in run.METHODS
         for dataset in ("digits", "svhn")]
CASES += [{"ablate": ["in", "prox"]}, {"noise": 0.8}, {"optimizer": "sgd", "momentum": 0.9},
          {"partition": "pathological", "classes_per_client": 3}, {"augment": True, "amp": True},
          {"method": "apfl", "missing_classes": 0.2, "aggregation": "async", "beta": 0.5},
          {"method": "fedprox", "model": "cnn", "aggregation": "async", "staleness": "hinge"},
          {"method": "feddf", "distillation_steps": 0}, {"train_images": 100, "seed": 2**32 - 1}]


def typed_again(settings: dict) -> dict:
    """Settings of the command line that types each of these settings, but for implied ones."""
    flags = {name: value for name, value in settings.items() if value is not None
             and value is not False and value != [] and name not in implied_flags(settings)}
    return run.resolve(run.read_command_line(command_line(flags)))


@pytest.mark.parametrize("typed", CASES, ids=str)
def test_typing_every_setting_gives_the_settings_again(typed, tmp_path):
    settings = run.resolve(typed)
    assert typed_again(settings) == settings
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert run.settings_to_resume(tmp_path, {}) == settings


@pytest.mark.parametrize("name", [*run.resolve({}), "other"])
def test_a_damaged_setting_is_noticed_on_resume(name, tmp_path):
    """Whatever is not refused is a setting that can be typed."""
    for value in (None, True, -1, "x", "--help", ["in"], {}, ...):
        damaged = {key: item for key, item in (run.resolve({}) | {name: value}).items()
                   if item is not ...}
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        try:
            settings = run.settings_to_resume(tmp_path, {})
        except ValueError as error:
            assert "config.json is damaged" in str(error) or "--device" in str(error)
        else:
            assert settings.pop("other", None) is None
            assert typed_again(settings) == settings, value


# ---------------------------------------------------------- switched off is the method that is left

@pytest.mark.parametrize("base, flags, others", [
    (RESNET10, "--ablate in", "--method fedprox"), (CNN, "--ablate in prox", "--method fedavg"),
    (CNN, "--ablate opt", "--projection sum"), (CNN, "--noise 0", ""),
    *((CNN, flags, "--method fedavg") for flags in (
        "--method fedprox --mu 0", "--method moon --mu 0",
        "--method feddf --distillation-steps 0"))])
def test_switched_off_a_method_is_the_one_that_is_left(base, flags, others, run_of):
    one, other = (run_of(*base, "--rounds", "2", *words.split()) for words in (flags, others))
    kept = [{name: value for name, value in line.items() if name != "distilled"}
            for line in lines(one)]
    assert kept == lines(other)


def test_each_option_makes_a_difference(run_of):
    options = ["", "--projection exact", "--projection sum", "--feature-batches 2", "--augment",
               "--feature-batch-size 8", "--mu 5", "--ablate prox", "--noise 0.8",
               "--noise 0.8 --noise-on upload", "--optimizer sgd", "--seed 1",
               "--optimizer sgd --momentum 0.9", "--optimizer sgd --weight-decay 0.1",
               "--method fedavg", "--method fedprox", "--method moon"]
    losses = {option: [entry["loss"] for entry in lines(run_of(*CNN, "--rounds", "2",
                                                               *option.split()))]
              for option in options}
    assert len(set(map(str, losses.values()))) == len(options), losses


# -------------------------------------------------------------------------------- repeatable, equal

def test_any_number_of_workers_gives_the_same_bytes(run_of):
    flags = [*RESNET10, *TWO_ROUNDS, "--noise", "0.5", "--augment", "--workers"]
    one, two = run_of(*flags, "1"), run_of(*flags, "2")
    assert lines(one) == lines(two)
    pairs = zip(*(models.tensors_in(checkpoint(out)["server"]) for out in (one, two)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_participants_are_rounded_at_least_one_and_equal_for_all_methods():
    assert federation.num_participants({"participation": 0.1, "clients": 100}) == 10
    assert federation.num_participants({"participation": 0.01, "clients": 10}) == 1
    chosen = {}
    for method in run.METHODS:
        settings = run.resolve({"method": method, "dataset": few_digits(), "setting": "quick",
                                "train_images": 300, "participation": 0.5, "seed": 1,
                                **({"semantics": "onehot"} if method == "apfl" else {})})
        chosen[method] = [federation.draw_participants(experiment_of(settings), t)
                          for t in (1, 1, 2)]
    one, again, two = chosen.pop("fedin")
    assert one == again != two == participants(settings, 2)
    assert one == sorted(set(one)) and len(one) == 5
    assert all(rounds == [one, one, two] for rounds in chosen.values())


def test_with_amp_training_alone_is_in_bfloat16(run_of):
    """Features, uploads and checkpoints stay float32, and weights are cast anew in each step."""
    flags = [*CNN, "--rounds", "2", "--noise", "0.1", "--local-epochs", "4"]
    rough = run_of(*flags, "--amp")
    for one, other in zip(lines(run_of(*flags)), lines(rough)):
        assert one["loss"] != other["loss"] == pytest.approx(one["loss"], rel=0.1)
        assert one["upload_mb"] == other["upload_mb"]
    assert {tensor.dtype for tensor in models.tensors_in(checkpoint(rough))} <= {
        torch.float32, torch.int64}


# ------------------------------------------------------------------------------------- every method

WIDTHS = [*RESNETS, "--clients", "2", "--participation", "1"]
METHODS = {  # method -> flags of a run of some seconds
    "fedin": [*RESNETS, "--noise", "0.5", "--augment"], "scaffold": RESNET10, "fednova": CNN,
    "moon": CNN, "inco": [*RESNETS, "--model", "resnet14"], "inclusivefl": RESNETS, "fedgen": CNN,
    "feddf": [*CNN, "--distillation-steps", "2"], **dict.fromkeys(widths.METHODS, WIDTHS)}


@pytest.fixture(scope="module")
def method_run(tmp_path_factory):
    """Function from a method to folders of its run, of two rounds and as it was after the first."""
    made = {}

    def folders_of(method: str) -> tuple[Path, Path]:
        if method in made:
            return made[method]
        whole, half = made[method] = [tmp_path_factory.mktemp(method) / name for name in "ab"]

        def save(out: Path, progress: files.Progress, save=files.save_checkpoint) -> None:
            save(out, progress)
            if progress.round == 1:
                shutil.copytree(out, half)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "save_checkpoint", save)
            go(whole, *METHODS[method], "--method", method, *TWO_ROUNDS)
        return whole, half

    return folders_of


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_resumes(method, method_run):
    whole, half = method_run(method)
    (last,), saved = lines(whole), checkpoint(whole)
    assert 0 <= last["accuracy"] <= 100 and last["loss"] > 0 and last["round"] == 2
    assert ("full_accuracy" in last) == (method in widths.METHODS)

    # Every global network has moved, and clients of stateful methods alone keep something.
    initial = federation.first_server(experiment_of(config(whole)))["weights"]
    for arch, state in saved["server"]["weights"].items():
        assert any(not torch.equal(tensor, initial[arch][name]) for name, tensor in state.items())
        assert all(tensor.isfinite().all() for tensor in state.values())
    took_part = {k for t in (1, 2) for k in participants(config(whole), t)}
    assert set(saved["memory"]) == (took_part if method in ("scaffold", "moon") else set())

    if method in ("scaffold", "moon", "fedgen", "fedrolex"):  # more than weights is kept
        assert go(half, "--resume") == [last]


@pytest.mark.parametrize("method", METHODS)
def test_clients_send_and_receive_what_their_method_says(method, method_run):
    whole, _ = method_run(method)
    experiment, (last,) = experiment_of(config(whole)), lines(whole)
    upload = download = 0
    for k in participants(experiment.settings, 2):
        client = experiment.clients[k]
        if method in ("heterofl", "fedrolex"):  # the rate is drawn in each round
            stream = data.streams(experiment.settings["seed"], 2, k)
            client = experiment.method.assign(client, list(experiment.networks), stream)
        shapes = models.shapes(experiment.networks[client.arch])
        both = models.num_bytes(shapes)
        if method == "scaffold":  # a variate, or its change, per parameter
            both += models.num_bytes([tensor for name, tensor in shapes.items()
                                      if models.is_parameter(name)])
        upload, download = upload + both, download + both
        if method in ("heterofl", "fedrolex"):  # the classes, and no rows of other ones
            num_held = len(experiment.data.y_train[client.indices].unique())
            row = 4 * (shapes["classifier.0.fc.weight"].shape[1] + 1)
            upload += 8 * num_held - (10 - num_held) * row
        if method == "fedgen":  # class counts; the generator and its ten classes
            upload += 80
            download += models.num_bytes(checkpoint(whole)["server"]["generator"]) + 80
        if method == "fedin":  # s_in and s_out, sent of its twelve images and received of sixteen
            upload += 12 * 4 * (64 * 8 * 8 + 512)
            download += 16 * 4 * (64 * 8 * 8 + 512)
    assert (1e6 * last["upload_mb"], 1e6 * last["download_mb"]) == (
        pytest.approx(upload), pytest.approx(download))


# ---------------------------------------------------------------------------------------- bad input

MISTAKES = [
    ("--method fedsgd", "--method: invalid choice: 'fedsgd' (choose from "),
    ("--dataset minst", "unknown dataset 'minst': choose one of digits, "),
    ("--dataset nowhere.npz", "no file nowhere.npz"), ("--resume", "no run in runs/fedin-digits-0"),
    ("--model resnet152", "--model: invalid choice: 'resnet152'"),
    ("--epochs 3", "unrecognized arguments: --epochs 3"), ("--part iid", "arguments: --part iid"),
    ("--ablate in --ablate prox x", "--ablate: invalid choice: 'x' (choose from "),
    ("--rounds", "--rounds: expected one argument"), ("--method feddf --proxy photos", "--proxy"),
    ("--device quantum", "--device quantum cannot"), ("--device meta", "--device meta cannot be"),
    ("--method apfl --semantics nowhere.npz", "no file nowhere.npz: check --semantics"),
    ("--method apfl --semantics word2vec --word-vectors nowhere.txt", "nowhere.txt cannot be read"),
    # Combinations
    ("--method fedrolex --model cnn", "give --model resnet18-widths or resnet152-widths"),
    ("--model resnet18-widths", "or --method heterofl or fedrolex or scalefl"),
    ("--method apfl --model resnets", "--model resnets does not go with --method apfl: give --mod"),
    ("--aggregation async", "--aggregation async does not go with --method fedin: give --aggregat"),
    ("--method scaffold --aggregation async --model cnn", "or --method fedavg or fedavg-ft or f"),
    ("--method fedavg --aggregation async", "--aggregation async needs one architecture"),
    ("--train-images 5", "5 training images cannot give each of 10 clients"),
    ("--train-images 2000", "more than the 1437 training images"),
    ("--clients 200", "no Dirichlet(0.5) split of 1437 images"),
    ("--partition pathological --classes-per-client 11", "more than the 10 classes"),
    ("--missing-classes 0.9", "at least two classes")]
UNREAD = {  # reason -> commands whose last flag is not read for it
    "by --method local": ["--method local --mu 1", "--method local --aggregation layerwise"],
    "by --method fedavg": ["--method fedavg --noise 0.8", "--method fedavg --beta 0.5"],
    "by --method heterofl": ["--method heterofl --self-distillation 1"],
    "": ["--method scaffold --optimizer sgd --momentum 0.9", "--method local --speed-spread 2"],
    "with --optimizer adam": ["--momentum 0.9", "--weight-decay 0.1"],
    "with --aggregation layerwise": ["--mixing 0.5", "--staleness hinge", "--speed-spread 2"],
    "with --aggregation async": ["--method apfl --aggregation async --participation 0.5"],
    "with --partition iid": ["--partition iid --alpha 0.5"],
    "with --partition dirichlet": ["--classes-per-client 2"],
    "with --semantics segments": ["--method apfl --word-vectors x.txt"],
    "with --dataset digits": ["--data-dir data"], "with --noise 0": ["--noise-on upload"],
    "with --distillation-steps 0": ["--method feddf --distillation-steps 0 --proxy noise"],
    "with --ablate in": ["--ablate in --projection sum", "--noise 1 --ablate in --noise-on upload"],
    "with --missing-classes": ["--missing-classes 0.2 --alpha 1"],
    "with --friend synthetic": ["--method apfl --virtual-per-class 3"],
    "with --friend calibrated": ["--method apfl --friend calibrated --teacher clients"],
    "with --dataset few.npz": [
        "--method apfl --dataset few.npz --friend calibrated --data-dir data"],
    "with --ablate prox": ["--ablate prox --mu 0.2"]}
BOUNDS = {  # bounds of a number -> commands whose last flag does not keep them
    "a number above 0": ["--alpha 0", "--alpha inf", "--lr nan"],
    "a whole number at least 1": ["--rounds 0", "--clients 2.5", "--rounds 1" + 400 * "0"],
    "a whole number at least 2": ["--batch-size 1"], "a whole number at least 0": ["--seed -1"],
    "a number above 0 and at": ["--participation 1.5"], "a number at least 0": ["--noise -1"],
    "a number at least 0 and at most 0.999": ["--optimizer sgd --momentum 1"],
    "a number at least 0 and at most 1": ["--method apfl --beta 2"]}
MISTAKES += [(flags, f"{re.findall('--[a-z-]+', flags)[-1]}{hint} {reason}") for cases, hint in (
    (UNREAD, " is not read"), (BOUNDS, ": must be")) for reason in cases for flags in cases[reason]]


@pytest.mark.parametrize("flags, hint", MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_leaves_nothing(flags, hint, tmp_path, capsys,
                                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hint in refused(capsys, *flags.split())
    assert list(tmp_path.iterdir()) == []


def test_broken_data_are_one_line(tmp_path, capsys):
    good = {"x_train": np.zeros((40, 8, 8), np.uint8), "y_train": np.arange(40) % 2,
            "x_test": np.zeros((4, 8, 8), np.uint8), "y_test": np.arange(4) % 2}
    path = tmp_path / "bad.npz"
    np.savez(path, **good | {"x_train": np.full((40, 8, 8), np.nan, np.float32)})
    assert "bad.npz" in (error := refused(capsys, "--dataset", str(path))) and "NaN" in error
    path.write_bytes(pickle.dumps(good))
    assert "bad.npz cannot be read" in refused(capsys, "--dataset", str(path))


# ------------------------------------------------------------------------------------------- layout

MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
LAYERS = [  # a module imports only modules of lines above its own
    "data models pictures", "graphs partitions semantics ranks", "files generator", "federation",
    "evaluation baselines", "ccvr fedin fedgen widths", "apfl", "settings", "run",
    "analysis experiments", "report", "tables"]


def imported(module: str) -> set[str]:
    """Packages and modules that a module imports, wherever in it."""
    nodes = list(ast.walk(MODULES[module]))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_imports_run_downwards_only():
    below = set()
    assert MODULES.keys() == set(" ".join(LAYERS).split())
    for layer in map(str.split, LAYERS):
        for name in layer:
            assert imported(name) & MODULES.keys() <= below, name
        below |= set(layer)
    assert imported("models") <= {"torch", *sys.stdlib_module_names}
    assert {name for name in MODULES if "argparse" in imported(name)} <= {
        "run", "experiments", "report", "tables"}


def test_starting_loads_torch_and_no_other_heavy_package():
    program = ("import sys, torch; before = set(sys.modules); import run; "
               "run.main(['--method', 'fedsgd']); print(set(sys.modules) - before)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    loaded = {name.split(".")[0] for name in ast.literal_eval(done.stdout)}
    assert "'fedsgd'" in done.stderr and "models" in loaded
    loaded -= {*MODULES, "torch", "numpy", "tqdm", "filelock", *sys.stdlib_module_names}
    assert all(name.startswith("_") for name in loaded), loaded


def test_functions_are_short_and_public_ones_have_docstrings():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node in tree.body:
                assert ast.get_docstring(node), f"{name}.{node.name}"
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


# ----------------------------------------------------------------------------------------- language

NO_BEGINNING = "what of that which who whose how so likewise where when".split()


def begins_badly(text: str) -> bool:
    """Whether a text begins with a word that is neither noun nor verb, or with "the same"."""
    words = re.findall(r"[\w']+", text.lower())
    return words[:2] == ["the", "same"] or bool(words) and words[0] in NO_BEGINNING


def comments(path: Path) -> list[tuple[int, str]]:
    """Line and text of each comment, without the lines that continue a comment."""
    found, before = [], 0
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                alone, number = token.line.strip().startswith("#"), token.start[0]
                if not alone or before != number - 1:
                    found.append((number, token.string.strip("# -")))
                before = number if alone else 0
    return found


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]),
                         ids=lambda path: path.stem)
def test_docstrings_and_comments_begin_with_a_noun_or_a_verb(path):
    texts = comments(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            texts.append((node.body[0].lineno, ast.get_docstring(node) or ""))
    bad = [f"{path.name}:{line}: {text[:60]}" for line, text in texts if begins_badly(text)]
    assert bad == []
    assert [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100] == []


def test_help_names_every_flag_and_says_what_it_is(capsys):
    for action in run.parser()._actions:
        assert action.option_strings[-1] == typed_as(action.dest)
        assert not begins_badly(action.help) and len(action.help.split()) > 1, action.dest
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for phrase in (*run.METHODS, *data.DATASETS, "mu/2 = 0.05", "Eq. 13", "Table 2b", "Sec. 4.3",
                   "--rounds 10 500 50", "--lr 0.0004 0.001 0.0002", "FILE.npz"):
        assert phrase in text


# ------------------------------------------------------------------------------------------- README

README = (ROOT / "README.md").read_text()


def test_the_documents_name_only_flags_and_functions_that_exist():
    flags = {typed_as(action.dest) for action in run.parser()._actions}
    flags |= {"--nproc-per-node", "--nnodes", "--array", "--wrap"}  # flags of torchrun and Slurm
    for text in (README, *((ROOT / name).read_text() for name in ("report.py", "tables.py"))):
        flags |= set(re.findall(r'add(?:_argument|_one)?\("(--[\w-]+)"', text))
    for name in ("README.md", "PAPERS.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / name).read_text()))
        assert named <= flags and len(named) > 5, name
    names = {node.name for tree in MODULES.values() for node in tree.body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    table = README.split("| method | file |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(?:\w+\.)?(\w+)`", table)) - {"py"}
    assert named <= names and len(named) > 20


NET, X, Y = models.CNN(1, 3), torch.rand(4, 1, 32, 32), torch.arange(4) % 3
START, LOGITS, NONE = models.copy_parameters(NET), torch.rand(4, 3), torch.zeros(3).bool()
SGD = torch.optim.SGD(NET.parameters(), 0.1)
ALONE = {  # function -> a call of it
    "add_noise": lambda f: f(X, 0.8, X), "project_gradient": lambda f: f(X, -X),
    "add_proximal_gradient": lambda f: f(NET, START, 0.0),
    "fedavg_step": lambda f: f(NET, SGD, X, Y), "accumulated_norm": lambda f: f(5, 0.9),
    "fedprox_step": lambda f: f(NET, SGD, X, Y, START, mu=0.1),
    "heterofl_step": lambda f: f(NET, SGD, X, Y, NONE),
    "contrastive_loss": lambda f: f(X, X, -X, 0.5), "diversity_loss": lambda f: f(X, distance="l2"),
    "distillation_loss": lambda f: f(LOGITS, -LOGITS),
    "average": lambda f: f(START, {0: START}, {0: 4}), "interpolate": lambda f: f(START, START, 1)}


@pytest.mark.parametrize("name", ALONE)
def test_functions_that_can_be_copied_run_alone(name):
    """The README's are pasted below its imports, and called; one of them needs another."""
    (text,) = [" ".join(part.split()) for part in README.split("\n\n") if "They run alone" in part]
    imports = re.findall(r"`((?:from [\w.]+ )?import [^`]+)`", text)
    assert set(re.findall(r"`(?:\w+\.)?(\w+)`", text)) == ALONE.keys()
    scope = {}
    for one in ("add_proximal_gradient", name) if name == "fedprox_step" else (name,):
        (function,) = {getattr(module, one) for module in (fedin, baselines, models, generator,
                                                           widths) if hasattr(module, one)}
        exec("\n".join([*imports, inspect.getsource(function)]), scope)
    ALONE[name](scope[name])


def test_the_readmes_method_is_a_method_by_one_change_of_one_module(run_of, tmp_path):
    """Its second block is the end of add_arguments, and the first block follows."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    section = README.split("## Add a method")[1].split("\n## ")[0]
    method, flag = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    added = re.search(r"Add `(\w+)` to the import from `(\w+)`", section)
    with open(tmp_path / "baselines.py", "a") as file:
        file.write(f"{flag}\nfrom {added[2]} import {added[1]}\n\n{method}")
    (name,), (option,) = re.findall(r'"(\w+)"\] = ', method), re.findall(r'add\("([\w-]+)', flag)

    flags = ["--method", name, *CNN, "--rounds", "1", "--out"]
    commands = [["whole", option, "1"], ["half"], ["half", "--resume", "--rounds", "2"]]
    program = (f"import run\nfor flags in {commands}: assert run.main({flags} + flags) == 0\n"
               f"run.main(['--method', 'fedavg', '{option}', '1'])\nrun.main(['--help'])")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True,
                          capture_output=True)
    assert f"{option} is not read by --method fedavg" in done.stderr, done.stderr
    assert f"{option} " in done.stdout and name in done.stdout
    whole, half = (lines(tmp_path / folder) for folder in ("whole", "half"))
    plain = lines(run_of(*CNN, "--rounds", "2", "--method", "fedavg"))
    assert whole == plain[:1] and half[0] != plain[0] and len(half) == 2
