"""A run's folder: its lock, config.json, checkpoint.pt, metrics.jsonl, result.json, its end.

A wrong file raises a ValueError of one line with its remedy.  Of several ranks the first writes.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import ranks
from data import first_line, write_atomically
from models import on_device

LOCK = ".run-lock"  # the locked file; its mere presence means nothing
# Names of the files that write_atomically leaves if it is killed
HALF_WRITTEN = re.compile(r"(config\.json|checkpoint\.pt|metrics\.jsonl|result\.json|\w+\.png)"
                          r"\.[0-9a-f]{12}\.tmp")
MAY_CHANGE = ("rounds", "workers", "device", "data_dir")  # settings that --resume may change
INPUTS = ("dataset", "proxy", "semantics", "word_vectors")  # settings that may name a file
NEW_RUN = "start a new run with another --out"
START_OVER = "move it away, and --resume starts at round 1"
# This process's lock, and the folders that it made for its run
_held: tuple | None = None


class Progress(NamedTuple):
    """Everything that the next round or stage needs."""

    round: int  # the last finished one
    server: dict
    memory: dict  # client id -> what stays on its device, for clients that have taken part
    totals: dict  # sums over all rounds so far
    last_metrics: dict  # entry of metrics.jsonl of the last evaluated round
    stage_results: dict  # stage after the last round -> its result, for finished stages


def first_progress(server: dict) -> Progress:
    """Progress before round 1."""
    totals = {"upload_mb": 0.0, "download_mb": 0.0, "samples": 0, "clock": 0.0,
              "training_seconds": 0.0, "seconds": 0.0}
    return Progress(0, server, {}, totals, {}, {})


# ------------------------------------------------------------------------------------- folder, lock

def claim(out: Path, resume: bool) -> None:
    """Lock a run's folder for this process until release() or the process's end.

    The operating system holds the lock, so a killed process leaves at most half-written files.
    A new run needs a folder that is empty but for these, hidden files and error.log.
    Raises ValueError if another process has the folder, or if it does not hold what it should.
    """
    from filelock import FileLock, Timeout  # 60 ms, which --help can do without

    global _held

    # Refuse what cannot be a run's folder
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    if resume:
        read_config(out)

    # Lock before looking at what the folder holds
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{out} is in use by a run that has not ended: wait for its end, or "
                         "choose another --out") from error
    except (OSError, NotImplementedError) as error:  # another user's folder; no locks
        raise ValueError(f"{out} cannot be locked ({first_line(error)}): choose an --out where you "
                         "may write, on a file system with locks") from error
    _held = lock, new_folders

    # Remove half-written files, unless others show that the folder is in use
    names = [name for name in os.listdir(out) if name != "error.log" and not name.startswith(".")]
    half_written = list(filter(HALF_WRITTEN.fullmatch, names))
    if len(half_written) < len(names) and not resume:
        raise ValueError(f"{out} is not empty: resume its run with --resume --out {quoted(out)}, "
                         "or choose another --out")
    for name in half_written:
        (out / name).unlink()


def release() -> None:
    """Unlock this process's folder; remove the folders made for a run that left nothing in them."""
    global _held
    if _held is None:
        return
    (lock, new_folders), _held = _held, None
    with suppress(OSError):  # Windows removes no open file; there lock.release() does it
        Path(lock.lock_file).unlink()
    with suppress(OSError):  # a folder that is not empty stays
        lock.release()
        for folder in new_folders:
            folder.rmdir()


def quoted(path: Path) -> str:
    """A path as it is typed into a shell."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


# ------------------------------------------------------------------------------------ configuration

def write(path: Path, fill: Callable) -> None:
    """Let fill(file) write a file of the run, atomically."""
    if ranks.is_first():
        write_atomically(path, fill)


def write_json(path: Path, value: dict) -> None:
    """Write a dict as indented JSON, atomically."""
    write(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def versions() -> dict[str, str]:
    """Versions of Python, torch, torchvision and this code, and the machine."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": version("torchvision"), "commit": commit(), "machine": machine()}


@cache
def commit() -> str:
    """Commit of this code, with + if it has changed since."""
    folder = shlex.quote(str(Path(__file__).parent))
    output = subprocess.getoutput(f"git -C {folder} status --porcelain=2 --branch "
                                  "--untracked-files=no -- '*.py'")
    name = re.search(r"^# branch.oid (\w{7})", output)
    changed = re.search("^[^#]", output, re.MULTILINE)
    return "unknown" if name is None else name[1] + "+" * bool(changed)


@cache
def machine() -> str:
    """Processor, cores, and the GPU if there is one."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = ranks.num_cores()
    return f"{(names or ['unknown processor'])[0]}, {cores} core{'s' * (cores > 1)}{gpu}"


def has_run(out: Path) -> bool:
    """Whether a run has begun in a folder."""
    return (out / "config.json").exists()


def finished_result(out: Path, settings: Mapping) -> dict | None:
    """Content of result.json, None if the run has not ended; --rounds may have grown since."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        result = json.loads((out / "result.json").read_text())
        if result["rounds"] == settings["rounds"]:
            return result
    return None


def read_config(out: Path) -> dict:
    """Settings of the run in a folder.  Raises ValueError if there is no run."""
    path = out / "config.json"
    if not path.exists():
        raise ValueError(f"there is no run in {out} to resume: check --out, or leave out --resume "
                         "to start one")
    with suppress(ValueError):
        if isinstance(settings := json.loads(path.read_text()), dict):
            return settings
    raise ValueError(f"{path} is damaged: {NEW_RUN}")


def check_agreement(out: Path, settings: dict, typed: dict) -> None:
    """Raise ValueError if a typed flag contradicts the run in out, or an input file is missing."""
    for name, value in typed.items():
        flag, before = f"--{name.replace('_', '-')}", settings.get(name)
        if name not in settings:
            raise ValueError(f"{flag} is not read by the run in {out}: leave it out")
        moved = is_input_file(name, before) and is_input_file(name, value)
        if before != value and name not in MAY_CHANGE and not moved:
            raise ValueError(f"{flag} {value} differs from the {before} of the run in {out}: leave "
                             f"it out, or {NEW_RUN}")
    if typed.get("rounds", settings["rounds"]) < settings["rounds"]:
        raise ValueError(f"--rounds {typed['rounds']} is less than the {settings['rounds']} of "
                         f"the run in {out}: it may only grow")
    for name, value in (settings | typed).items():
        if is_input_file(name, value) and not Path(value).exists():
            raise ValueError(f"the run in {out} reads {value}, and there is no such file: pass its "
                             f"location with --{name.replace('_', '-')} (in Python {name}=)")


def is_input_file(name: str, value: object) -> bool:
    """Whether the value of a setting is the path of a file."""
    return name in INPUTS and isinstance(value, str) and value.lower().endswith((".npz", ".txt"))


def check_same(settings: dict, digests: Mapping[str, str]) -> dict:
    """The digests of the data by setting, with new ones.  Raises ValueError if a digest differs."""
    before = settings.get("digests", {})
    for name, digest in digests.items():
        if before.get(name, digest) != digest:
            flag, value = f"--{name.replace('_', '-')}", settings[name]
            remedy = (f"pass its location with {flag} (in Python {name}=)" if Path(value).suffix
                      else "restore its files")
            raise ValueError(
                f"{flag} {value} is not what this run began with: {remedy}, or {NEW_RUN}")
    return {"digests": before | digests}


# -------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(out: Path, progress: Progress) -> None:
    """Write the progress of a run in plain types, which load without unpickling."""
    write(out / "checkpoint.pt", lambda file: torch.save(progress._asdict(), file))


def load_checkpoint(out: Path, device: str) -> Progress | None:
    """The saved progress, None if there is none yet.  Raises ValueError if the file is damaged."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        # torch.load compares no checksums.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        # By position: field names are no part of the format.
        return Progress(*on_device(list(saved.values()), device))
    # On a broken file torch, pickle and zipfile raise a dozen kinds of errors.
    except Exception as error:
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise ValueError(f"{path} is damaged: {START_OVER}") from error


def check_fits(out: Path, saved: Progress, rounds: int, pattern: Progress) -> None:
    """Raise ValueError unless a checkpoint is like pattern: before round 1, with all memories."""
    fits = (is_alike(saved._asdict(), pattern._replace(memory={})._asdict())
            and 0 <= saved.round <= rounds
            and all(client in pattern.memory and is_alike(kept, pattern.memory[client])
                    for client, kept in saved.memory.items()))
    if not fits:
        raise ValueError(f"{out / 'checkpoint.pt'} is of another run, or damaged: {START_OVER}")


def is_alike(value: object, pattern: object) -> bool:
    """Whether a nest of dicts has a pattern's names, types and shapes; None matches anything."""
    if isinstance(pattern, dict) and isinstance(value, dict):
        return all(name in value and is_alike(value[name], part) for name, part in pattern.items())
    if isinstance(pattern, Tensor) and isinstance(value, Tensor):
        return (value.shape, value.dtype) == (pattern.shape, pattern.dtype)
    return pattern is None or type(value) is type(pattern)


# ------------------------------------------------------------------------------------------ metrics

def is_evaluated(t: int, settings: dict) -> bool:
    """Whether the models are evaluated after round t."""
    return t % settings["eval_every"] == 0 or t == settings["rounds"]


def json_line(entry: dict) -> bytes:
    """A dict as a line of a .jsonl file."""
    return (json.dumps(entry) + "\n").encode()


def append_metrics(path: Path, entry: dict) -> None:
    """Add a line to metrics.jsonl; it is on the disk when this returns."""
    if ranks.is_first():
        with open(path, "ab") as file:
            file.write(json_line(entry))
            file.flush()
            os.fsync(file.fileno())


def replace_last_line(path: Path, entry: dict) -> None:
    """Replace the last line of metrics.jsonl, atomically."""
    write(path, lambda file: file.writelines(
        [*path.read_bytes().splitlines(keepends=True)[:-1], json_line(entry)]))


def metrics_so_far(out: Path, progress: Progress, settings: dict) -> list[dict]:
    """Entries of metrics.jsonl as if the run had reached progress.round without a stop.

    The file loses all others: of later rounds, and of a round that was evaluated only because it
    was the last before --rounds grew.
    """
    history = rounds_so_far(out, progress, settings)
    write_rounds(out, history)
    return history


def rounds_so_far(out: Path, progress: Progress, settings: dict) -> list[dict]:
    """Entries of metrics.jsonl up to progress.round.  Raises ValueError if one is missing."""
    path, history = out / "metrics.jsonl", []
    content = path.read_bytes() if path.exists() else b""
    due = [t for t in range(1, progress.round + 1) if is_evaluated(t, settings)]

    # Entries of these rounds, up to a line that is none
    with suppress(ValueError, LookupError, TypeError):
        for line in content.splitlines(keepends=True):
            entry = json.loads(line)
            if entry["round"] in due and line.endswith(b"\n"):
                history.append(entry)
    if len(history) != len(due):
        raise ValueError(f"{path} lacks lines of finished rounds: restore it, or {NEW_RUN}")

    # Stages after the last round write over its entry, so it comes from the checkpoint.
    if history and history[-1]["round"] == progress.last_metrics.get("round"):
        history[-1] = progress.last_metrics
    return history


def write_rounds(out: Path, history: Sequence[dict]) -> None:
    """Have metrics.jsonl hold these entries alone."""
    path, lines = out / "metrics.jsonl", b"".join(map(json_line, history))
    if lines != (path.read_bytes() if path.exists() else b""):
        write(path, lambda file: file.write(lines))


def loss_is_absurd(history: Sequence[Mapping]) -> bool:
    """Whether the last loss, and not the one before, is finite but too high for any learning.

    The limit is a million times the first loss, or 10^7 if that is less: guessing costs below 10.
    """
    limit = 1e6 * min(max(history[0]["loss"], 1e-6), 10)
    return [entry["loss"] > limit for entry in history[-2:]] in ([True], [False, True])


# --------------------------------------------------------------------------------------- the result

def accuracy_in_rounds(entry: Mapping, name: str = "accuracy") -> float | None:
    """An accuracy of the models that clients use in the rounds, before any later stage."""
    return entry.get(f"global_{name}", entry[name])


def summarise(history: list[dict], totals: dict) -> dict:
    """Content of result.json; best round and mean of the last ten are by accuracy_in_rounds."""
    last, best = history[-1], max(history, key=accuracy_in_rounds)
    recent = list(map(accuracy_in_rounds, history[-10:]))
    per_round = ("round", "upload_mb", "download_mb", "samples", "clock", "seconds")
    return {"rounds": last["round"],
            **{name: value for name, value in last.items() if name not in per_round},
            "best_accuracy": accuracy_in_rounds(best), "best_round": best["round"],
            "last10_accuracy": sum(recent) / len(recent),
            **{name: value for name, value in totals.items() if name != "training_seconds"},
            "seconds": round(totals["seconds"], 3),
            "images_per_second": round(totals["samples"] / totals["training_seconds"], 1)}


def peak_memory(device: str) -> dict[str, float]:
    """Largest memory so far, in 10^6 bytes, of this process and of torch on its GPU."""
    peak = {}
    with suppress(ImportError):  # Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    if torch.device(device).type == "cuda":
        peak["gpu_memory_mb"] = torch.cuda.max_memory_reserved(device) / 1e6
    return {name: round(value, 1) for name, value in peak.items()}


# ------------------------------------------------------------------------------------- end of a run

@contextmanager
def error_context(place: str):
    """Note a place on an error that comes from inside, unless its message names the place."""
    try:
        yield
    except Exception as error:
        if place not in str(error):
            error.add_note(place)
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its GPU had too little memory; torch has no type for the first."""
    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or "allocate memory" in str(error)


def one_line(text: str) -> str:
    """A message as a line of at most 300 characters; its end, the remedy, is kept."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:125]} ... {line[-170:]}"


def describe_ending(out: Path | None, error: BaseException, speaks: bool) -> tuple[str, int]:
    """Message and exit status of a run that an error ends; a speaker logs unforeseen errors.

    out: the run's folder, None before the run has begun
    """
    resume = f"resume with: python run.py --resume --out {quoted(out)}" if out else ""

    # Stopped by the user, or something that the user can mend
    if isinstance(error, KeyboardInterrupt):
        return f"stopped; {resume}" if out else "stopped before the first round", 130
    if isinstance(error, (OSError, ValueError)) and not out:
        return str(error), 2
    if isinstance(error, torch.OutOfMemoryError):
        fewer = f", or {resume} --workers 1" if out else ""
        return f"the GPU's memory is full: start a new run with a smaller --batch-size{fewer}", 2
    if isinstance(error, OSError):
        return f"{first_line(error)[:120]}; mend that, then {resume} (from the last checkpoint)", 2

    # Diverged
    place = "".join(f"{note}, " for note in reversed(getattr(error, "__notes__", [])))
    if isinstance(error, FloatingPointError):
        return f"{place}{error}; {out} keeps its last checkpoint", 1

    # Unforeseen
    message = f"{place}{type(error).__name__}: {first_line(error)[:100]}"
    if is_out_of_memory(error):
        message += "; fewer --workers or a smaller --batch-size need less memory"
    log = (out or Path()) / "error.log"
    if speaks:
        with suppress(OSError), open(log, "a", encoding="utf-8", errors="replace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {place}{ranks.traceback_of(error)}\n")
            message += f"; details are in {log}"
    return message + (", beside the last checkpoint" if out else ""), 3
