"""Runs through the real command line, in this process or another, and what they leave."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import apfl
import data
import generator
import run
from tiny import few_digits

ROOT = Path(__file__).resolve().parents[1]
FEW_DIGITS = ["--dataset", few_digits(), "--setting", "quick"]
RESNETS = [*FEW_DIGITS, *("--train-images 60 --clients 5 --participation 0.6 --local-epochs 1 "
                          "--partition iid --batch-size 12").split()]
RESNET10 = [*RESNETS, "--model", "resnet10"]  # with batch normalisation, and a third of the time
CNN = [*RESNETS, "--model", "cnn", "--train-images", "120"]
ASYNC = [flag for flag in CNN if flag not in ("--participation", "0.6")]
ASYNC += ["--aggregation", "async"]
FEW = ("--semantics segments --generator-steps 3 --generator-batch 2 --synthetic-per-class 4 "
       "--friend-epochs 1 --noise-dim 4").split()
TWO_OF_THREE = [*CNN, *"--train-images 72 --clients 3 --participation 0.67 --seed 4".split()]
APFL = [*TWO_OF_THREE, "--method", "apfl", *FEW]
SMALL = (8, 4), 5  # generator.WIDTHS and apfl.BETA_TEST_IMAGES, for less of the same
DROPOUT = [*FEW_DIGITS, *("--missing-classes 0.2 --train-images 300 --clients 6 --local-epochs 1 "
                          "--model cnn --rounds 2").split()]


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


def config(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())


def make_small(monkeypatch) -> None:
    """The same code on a narrow generator and few images for the curve over beta."""
    monkeypatch.setattr(generator, "WIDTHS", SMALL[0])
    monkeypatch.setattr(apfl, "BETA_TEST_IMAGES", SMALL[1])


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
    """A run as a process of its own, which hears Ctrl-C also where the tests run in background.

    killed_after_line: the round whose line of metrics.jsonl is the last that it does
    """
    program = [str(ROOT / "run.py")]
    if killed_after_line is not None:
        program = ["-c", KILLED_AFTER_LINE.format(root=str(ROOT), number=killed_after_line)]
    return subprocess.Popen([sys.executable, *program, *flags, "--out", str(out)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))


def refused(capsys, *flags: str, status: int = 2) -> str:
    """The one line on standard error of a command that must fail."""
    assert run.main(list(flags)) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n") and error.startswith("error: ")
    return error


def participants(settings: dict, t: int, gone: tuple = ()) -> list[int]:
    """Who is drawn in round t, from the definition of the stream."""
    rng = data.numpy_stream(settings["seed"], data.PARTICIPANTS, t)
    there = [k for k in range(settings["clients"]) if k not in gone]
    count = max(1, round(settings["participation"] * settings["clients"]))
    return sorted(rng.choice(there, min(count, len(there)), replace=False).tolist())
