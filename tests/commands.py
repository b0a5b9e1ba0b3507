"""Runs through the real command line, in this process or another, and the files that they leave."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from tiny import few_digits

import apfl
import data
import federation
import generator
import models
import partitions
import run

ROOT = Path(__file__).resolve().parents[1]

# Flags of runs of some seconds, on 400 digits
FEW_DIGITS = ["--dataset", few_digits(), "--setting", "quick"]
RESNETS = [*FEW_DIGITS, *("--train-images 60 --clients 5 --participation 0.6 --local-epochs 1 "
                          "--partition iid --batch-size 12").split()]
RESNET10 = [*RESNETS, "--model", "resnet10"]  # with batch normalisation, in a third of the time
CNN = [*RESNETS, "--model", "cnn", "--train-images", "120"]
ASYNC = [flag for flag in CNN if flag not in ("--participation", "0.6")]
ASYNC += ["--aggregation", "async"]

# AP-FL with a tiny generator, of two of three clients per round, and with a dropout client
FEW = ("--semantics segments --generator-steps 3 --generator-batch 2 --synthetic-per-class 4 "
       "--friend-epochs 1 --noise-dim 4").split()
TWO_OF_THREE = [*CNN, *"--train-images 72 --clients 3 --participation 0.67 --seed 4".split()]
APFL = [*TWO_OF_THREE, "--method", "apfl", *FEW]
DROPOUT = [*FEW_DIGITS, *("--missing-classes 0.2 --train-images 300 --clients 6 --local-epochs 1 "
                          "--model cnn --rounds 2").split()]
SMALL = (8, 4), 5  # values of generator.WIDTHS and apfl.BETA_TEST_IMAGES, see make_small


def make_small(monkeypatch) -> None:
    """Give AP-FL a narrow generator, and few images for its curve over beta."""
    monkeypatch.setattr(generator, "WIDTHS", SMALL[0])
    monkeypatch.setattr(apfl, "BETA_TEST_IMAGES", SMALL[1])


# ----------------------------------------------------------------------------- runs in this process

def go(out: Path, *flags: str) -> list[dict]:
    """Run main in this process; return the lines of metrics.jsonl without timings."""
    assert run.main([*flags, "--out", str(out)]) == 0
    return lines(out)


def refused(capsys, *flags: str, status: int = 2) -> str:
    """Error message, one line, of a command that has to fail with this status."""
    assert run.main(list(flags)) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n") and error.startswith("error: ")
    return error


def experiment_of(settings: dict) -> federation.Experiment:
    """Set up the experiment of resolved settings, or of a config.json, without a folder."""
    loaded = data.load(settings["dataset"], settings.get("data_dir", "data"))
    if settings.get("classes_per_client", 0) is None:
        settings = settings | {"classes_per_client": partitions.classes_each(
            len(loaded.classes), settings["missing_classes"])}
    split = models.on_device(partitions.split_by_settings(loaded, settings), settings["device"])
    return federation.prepare_experiment(run.METHODS[settings["method"]], settings, split)


def participants(settings: dict, t: int, gone: tuple = ()) -> list[int]:
    """Clients of round t, by the definition of their random stream."""
    rng = data.numpy_stream(settings["seed"], data.PARTICIPANTS, t)
    available = [k for k in range(settings["clients"]) if k not in gone]
    count = max(1, round(settings["participation"] * settings["clients"]))
    return sorted(rng.choice(available, min(count, len(available)), replace=False).tolist())


# ----------------------------------------------------------------------------------- files of a run

def lines(out: Path) -> list[dict]:
    """Lines of metrics.jsonl, without timings."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for entry in entries:
        del entry["seconds"]
    return entries


def result(out: Path) -> dict:
    """Content of result.json, without timings and memory."""
    written = json.loads((out / "result.json").read_text())
    return {name: value for name, value in written.items()
            if name not in ("seconds", "images_per_second", "memory_mb")}


def config(out: Path) -> dict:
    """Content of config.json."""
    return json.loads((out / "config.json").read_text())


def checkpoint(out: Path) -> dict:
    """Content of checkpoint.pt."""
    return torch.load(out / "checkpoint.pt", weights_only=True)


# ------------------------------------------------------------------------- a run as another process

KILLED_AFTER_LINE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import files, run

def append_metrics(path, entry, append=files.append_metrics):
    append(path, entry)
    if entry["round"] == {number}:
        os.kill(os.getpid(), signal.SIGKILL)

files.append_metrics = append_metrics
run.main()
"""


def start(out: Path, *flags: str, killed_after_line: int | None = None) -> subprocess.Popen:
    """Start a run as another process, which hears Ctrl-C even if tests run in the background.

    killed_after_line: round whose line of metrics.jsonl is the last thing that it writes
    """
    program = [str(ROOT / "run.py")]
    if killed_after_line is not None:
        program = ["-c", KILLED_AFTER_LINE.format(root=str(ROOT), number=killed_after_line)]
    return subprocess.Popen([sys.executable, *program, *flags, "--out", str(out)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
