"""What a run leaves in its folder, and how it is resumed.  Knows nothing of methods.

In reading order: atomic writes; the folder and config.json; checkpoint.pt; metrics.jsonl; and
result.json.  Whatever is wrong with a file is a ValueError of one line that says what to do.
"""

import json
import os
import pickle
import platform
import re
import struct
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

import ranks
from data import first_line


class Progress(NamedTuple):
    """Everything that the next round or stage needs."""

    round: int  # the last one that is finished
    server: dict
    memory: dict  # client id -> what stays on its device, for those that have taken part
    totals: dict  # sums over all rounds so far
    line: dict  # of metrics.jsonl, the last one
    after: dict  # stage after the last round -> what came of it, for those that are finished


# ------------------------------------------------------------------------------------ atomic writes

def write_atomically(path: Path, write: Callable) -> None:
    """Let write(file) fill a file that gets its name only once it is safely on the disk.

    As everywhere here, only the first of several processes does it; see ranks.
    """
    if not ranks.is_first():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch.save's own, after any other: a full disk, a Ctrl-C
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise OSError(f"cannot write {temporary}: {first_line(error)}") from error
    os.replace(temporary, path)


def write_json(path: Path, value: dict) -> None:
    """Write a dict as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


# ---------------------------------------------------------------------------- folder, configuration

def check_free(out: Path) -> None:
    """Raise ValueError if the folder of a new run holds a run, or anything else, already."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if held - {"config.json.tmp"}:  # which a run leaves that is killed in its first instant
        raise ValueError(f"{out} is not empty: go on with its run by --resume --out {out}, or "
                         "choose another --out")


def versions() -> dict[str, str]:
    """Of Python, torch and torchvision, without importing the last, which takes long."""
    text = Path(find_spec("torchvision").origin).with_name("version.py").read_text()
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": re.search(r"__version__ = ['\"](.+)['\"]", text)[1]}


def read_config(out: Path) -> dict:
    """The settings of the run in a folder.  Raises ValueError if there is no run."""
    try:
        settings = json.loads((out / "config.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"there is no run in {out} to resume: check --out, or leave out --resume "
                         "to start one") from error
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{out / 'config.json'} is damaged: start anew with another --out")
    return settings


def write_config(out: Path, settings: dict) -> None:
    """Make the folder of a run, where there is none yet, with its settings."""
    if ranks.is_first():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", settings)


def check_agreement(out: Path, settings: dict, typed: dict, may_change: Collection[str]) -> None:
    """Raise ValueError if what was typed differs from the settings of a run, and may not."""
    for name, value in typed.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in settings:
            raise ValueError(f"{flag} is not read by the run in {out}: leave it out")
        if settings[name] != value and name not in may_change:
            raise ValueError(f"{flag} {value} differs from the {settings[name]} of the run in "
                             f"{out}: leave it out, or start a new run with another --out")
    if typed.get("rounds", settings["rounds"]) < settings["rounds"]:
        raise ValueError(f"--rounds {typed['rounds']} is less than the {settings['rounds']} of "
                         f"the run in {out}: it may only grow")


# -------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(out: Path, progress: Progress) -> None:
    """Write the progress of a run in plain types, which load without unpickling."""
    write_atomically(out / "checkpoint.pt", lambda file: torch.save(progress._asdict(), file))


def load_checkpoint(out: Path, device: str) -> Progress | None:
    """The progress that save_checkpoint wrote, or None if there is none yet.

    Raises ValueError if the file is damaged.
    """
    path = out / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        return Progress(**torch.load(path, map_location=device, weights_only=True))
    except (RuntimeError, EOFError, TypeError, LookupError, struct.error,
            pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged: move it away, and --resume starts at round 1"
                         ) from error


# ------------------------------------------------------------------------------------------ metrics

def is_evaluated(t: int, settings: dict) -> bool:
    """Whether round t is one of those after which the models are evaluated."""
    return t % settings["eval_every"] == 0 or t == settings["rounds"]


def append_metrics(path: Path, entry: dict) -> None:
    """Add a line to metrics.jsonl, on the disk when this returns."""
    if not ranks.is_first():
        return
    with open(path, "ab") as file:
        file.write((json.dumps(entry) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def replace_last_line(path: Path, entry: dict) -> None:
    """Put another line in the place of the last one of metrics.jsonl, atomically."""
    if not ranks.is_first():
        return
    lines = [*path.read_bytes().splitlines()[:-1], json.dumps(entry).encode(), b""]
    write_atomically(path, lambda file: file.write(b"\n".join(lines)))


def trim_metrics(path: Path, last_round: int, settings: dict) -> list[dict]:
    """The lines that metrics.jsonl would hold had the run reached last_round without a stop.

    Dropped are later lines, a torn last one, and that of a round that was evaluated only because it
    was the last before --rounds grew.  Raises ValueError if a line is missing.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, history = [], []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if line.endswith(b"\n") and entry["round"] <= last_round and is_evaluated(
                entry["round"], settings):
            kept.append(line)
            history.append(entry)
    if len(kept) != sum(is_evaluated(t, settings) for t in range(1, last_round + 1)):
        raise ValueError(f"{path} lacks lines of rounds that are done: restore it, or start a new "
                         "run with another --out")
    if len(kept) < len(lines):
        write_atomically(path, lambda file: file.writelines(kept))
    return history


def metrics_so_far(out: Path, progress: Progress, settings: dict) -> list[dict]:
    """The lines of trim_metrics, the last as it was before stages after it wrote over it."""
    path = out / "metrics.jsonl"
    history = trim_metrics(path, progress.round, settings)
    if history and history[-1]["round"] == progress.line["round"] and history[-1] != progress.line:
        history[-1] = progress.line
        replace_last_line(path, progress.line)
    return history


# --------------------------------------------------------------------------------------- the result

def in_round(entry: dict, name: str = "accuracy") -> float | None:
    """The accuracy of a line, that of the last line before the stages after the last round."""
    return entry.get(f"global_{name}", entry[name])


def summarise(history: list[dict], totals: dict) -> dict:
    """What result.json holds: the last evaluation, the best, the mean of the last ten, totals.

    Best and mean are over the models that clients use in the rounds, not after later stages.
    """
    last, best = history[-1], max(history, key=in_round)
    recent = [in_round(entry) for entry in history[-10:]]
    of_round = ("round", "upload_mb", "download_mb", "samples", "clock", "seconds")
    return {"rounds": last["round"],
            **{name: value for name, value in last.items() if name not in of_round},
            "best_accuracy": in_round(best), "best_round": best["round"],
            "last10_accuracy": sum(recent) / len(recent),
            **{name: value for name, value in totals.items() if name != "training_seconds"},
            "seconds": round(totals["seconds"], 3),
            "images_per_second": round(totals["samples"] / totals["training_seconds"], 1)}
