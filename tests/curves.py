"""Accuracy of runs over rounds, finished or not, as CSV and as a picture (not collected by pytest).

    python -m tests.curves FOLDER ... > results/fedin_cut.csv
    python -m tests.curves --draw results/fedin_cut.csv [clock]

The picture has a panel per seed and a line per run, over rounds or over virtual time.  Runs with
equal flags, of other machines or code, are numbered in the order of the file.
"""

import csv
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import files
import pictures
import run
from settings import RECORDED, implied_flags

COLUMNS = ["round", "clock", "accuracy", "personal_accuracy", "loss", "samples"]


def lines_of(words: Sequence[str]) -> list[dict]:
    """Make a run with these flags in a temporary folder; returns its lines of metrics.jsonl."""
    with TemporaryDirectory() as folder, patch("sys.stdout", sys.stderr):
        status = run.main([*words, "--out", folder + "/run"])
        if status != 0:
            sys.exit(status)
        return in_rounds(Path(folder, "run"))


def in_rounds(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl, with the accuracies that the models had in the rounds."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line | {name: files.accuracy_in_rounds(line, name)
                    for name in ("accuracy", "personal_accuracy")} for line in lines]


def write_csv(columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Print rows as CSV, each at once."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for row in chain([columns], rows):
        writer.writerow(row)
        sys.stdout.flush()


def command(settings: dict) -> str:
    """Command for these settings, without flags that have today's default, device and workers."""
    skipped = {*RECORDED, *implied_flags(settings), "device", "workers"}
    typed = {name: value for name, value in settings.items()
             if name not in skipped and value is not None and value is not False and value != []}
    for name in [*typed]:
        fewer = {other: value for other, value in typed.items() if other != name}
        with suppress(ValueError):  # others need this flag
            if name != "method" and run.resolve(fewer) == run.resolve(typed):
                typed = fewer
    return shlex.join(["python", "run.py", *run.command_line(typed)])


def write(folders: Iterable[str]) -> None:
    """Print a line for each evaluated round of each run."""
    rows = []
    for folder in map(Path, folders):
        settings = files.read_config(folder)
        known = [command(settings), *map(settings["versions"].get, ("commit", "machine"))]
        rows += [known + [line.get(name) for name in COLUMNS] for line in in_rounds(folder)]
    write_csv(["command", "commit", "machine", *COLUMNS], rows)


def draw(path: Path, over: str = "round") -> None:
    """Draw a CSV of runs; a line is named by its flags that not all runs have."""
    curves: dict[tuple, list] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            flags = re.split(" (?=--)", line["command"])
            panel = next((flag for flag in flags if flag.startswith("--seed ")), "--seed 0")
            flags = tuple(flag for flag in flags if flag != panel)
            points = curves.setdefault((panel, flags, line["machine"], line["commit"]), [])
            points.append((float(line[over]), float(line["accuracy"])))

    # Names; runs with equal flags get a number
    common, panels = set.intersection(*(set(flags) for _, flags, *_ in curves)), {}
    for (panel, flags, *_), points in curves.items():
        lines = panels.setdefault(panel.strip("-"), {})
        name = ", ".join(flag.strip("-") for flag in flags if flag not in common)
        number = sum(other.split(" #")[0] == name for other in lines) + 1
        lines[name + f" #{number}" * (number > 1)] = (*zip(*points), None)
    pictures.draw_lines(path.with_suffix(".png"), panels, (over, "accuracy, %"), path.stem)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--draw"]:
        draw(Path(sys.argv[2]), *sys.argv[3:])
    else:
        write(sys.argv[1:])
