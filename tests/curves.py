"""Accuracy of runs over rounds, finished or not, as CSV and as a picture (not collected by pytest).

    python -m tests.curves FOLDER ... > results/fedin_cut.csv
    python -m tests.curves --draw results/fedin_cut.csv [clock]

The picture has a panel per seed and a line per command, over rounds or over virtual time.
"""

import csv
import json
import shlex
import sys
from pathlib import Path

import files
import pictures
import run
from settings import RECORDED

COLUMNS = ["command", "commit", "machine", "round", "clock", "accuracy", "personal_accuracy",
           "loss", "samples"]


def command(settings: dict) -> str:
    """Shortest command with these settings."""
    typed = {name: value for name, value in settings.items()
             if name not in RECORDED and value is not None and value is not False and value != []}
    for name in [*typed]:
        fewer = {other: value for other, value in typed.items() if other != name}
        if name != "method" and run.resolve(fewer) == run.resolve(typed):
            typed = fewer
    return shlex.join(["python", "run.py", *run.command_line(typed)])


def write(folders: list[str]) -> None:
    """Print a line for each evaluated round of each run."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for folder in map(Path, folders):
        settings = files.read_config(folder)
        known = [command(settings), *map(settings["versions"].get, ("commit", "machine"))]
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            writer.writerow(known + [line.get(name) for name in COLUMNS[3:]])


def draw(path: Path, over: str = "round") -> None:
    """Draw a CSV of runs; a line is named by the words that not all of its panel have."""
    curves: dict[tuple, list] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            words = line["command"].split()
            seed = words[words.index("--seed") + 1] if "--seed" in words else "0"
            points = curves.setdefault((f"seed {seed}", line["command"], line["machine"]), [])
            points.append((float(line[over]), float(line["accuracy"])))
    common = set.intersection(*(set(name.split()) for _, name, _ in curves))
    panels: dict[str, dict] = {}
    for (panel, name, machine), points in curves.items():
        own = " ".join(word for word in name.split() if word not in common)
        panels.setdefault(panel, {})[f"{own} ({machine})"] = (*zip(*points), None)
    pictures.draw_lines(path.with_suffix(".png"), panels, (over, "accuracy, %"), path.stem)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--draw"]:
        draw(Path(sys.argv[2]), *sys.argv[3:])
    else:
        write(sys.argv[1:])
