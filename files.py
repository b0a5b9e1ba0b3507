"""What a run leaves in its folder, how it is resumed, and what others can do with it.

In reading order: whose folder it is; config.json; checkpoint.pt; metrics.jsonl; result.json; how
runs end; and the networks that a run has trained, for which alone methods are known here.
Whatever is wrong with a file is a ValueError of one line that says what to do.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import time
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import apfl
import baselines
import data
import fedin
import models
import ranks
from data import first_line, write_atomically


class Progress(NamedTuple):
    """Everything that the next round or stage needs."""

    round: int  # the last one that is finished
    server: dict
    memory: dict  # client id -> what stays on its device, for those that have taken part
    totals: dict  # sums over all rounds so far
    line: dict  # of metrics.jsonl, the last one
    after: dict  # stage after the last round -> what came of it, for those that are finished


# ------------------------------------------------------------------------------ whose folder it is

LOCK = ".run-lock"  # the file that is locked; its presence alone means nothing
HALF_WRITTEN = re.compile(r"(config\.json|checkpoint\.pt|metrics\.jsonl|result\.json|\w+\.png)"
                          r"\.[0-9a-f]{12}\.tmp")  # what write_atomically leaves if it is killed
NOTHING = (LOCK, "error.log", ".DS_Store", "._*", ".directory", ".localized", ".nfs*", "Thumbs.db",
           "desktop.ini", "lost+found")  # of a start that failed, of file managers and systems
_held: tuple | None = None  # this process's lock, and the folders that it made for its run


def take(out: Path, resume: bool) -> None:
    """Take the folder of a run for this process, as long as it lives or until leave().

    A new run gets one that is empty, which is made where there is none.  It is the operating system
    that locks, so nothing is left of a process that was killed, but what it had half written.
    Raises ValueError if the folder is another process's, or does not hold what it should.
    """
    from filelock import FileLock, Timeout

    global _held
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    if resume:
        read_config(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{out} is in use by a run that is still going: wait for its end, or "
                         "choose another --out") from error
    _held = lock, made
    half_written = [path for path in out.iterdir() if HALF_WRITTEN.fullmatch(path.name)]
    if not resume and not all(path in half_written or any(map(path.match, NOTHING))
                              for path in out.iterdir()):
        raise ValueError(f"{out} is not empty: go on with its run by --resume --out {quoted(out)}, "
                         "or choose another --out")
    for path in half_written:
        path.unlink()


def leave() -> None:
    """Give up this process's folder; what was made for a run that left nothing is removed."""
    global _held
    if _held is None:
        return
    (lock, made), _held = _held, None
    with suppress(OSError):  # Windows, where no open file can be removed, does it on release
        Path(lock.lock_file).unlink()
    with suppress(OSError):
        lock.release()
    with suppress(OSError):  # where something is left
        for folder in made:
            folder.rmdir()


def quoted(path: Path) -> str:
    """A path as it is typed into a shell, with spaces in it or not."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


# ------------------------------------------------------------------------- folder and configuration

def write(path: Path, fill: Callable) -> None:
    """Let fill(file) write a file of the run, atomically.

    As everywhere here, only the first of several processes does it; see ranks.
    """
    if ranks.is_first():
        write_atomically(path, fill)


def write_json(path: Path, value: dict) -> None:
    """Write a dict as indented JSON, atomically."""
    write(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


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
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{out / 'config.json'} is damaged: start anew with another --out")
    return settings


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


def check_same(settings: dict, digests: Mapping[str, str]) -> dict:
    """The setting "digests", with these; raises ValueError if the run began with other data.

    digests: flag -> data.digest of what its value has brought
    """
    before = settings.get("digests")
    before = before if isinstance(before, dict) else {}  # of a run that had none, or damaged
    for name, digest in digests.items():
        if before.get(name, digest) != digest:
            flag, value = f"--{name.replace('_', '-')}", settings[name]
            remedy = f"say by {flag} where that is" if Path(value).suffix else "restore its files"
            raise ValueError(f"{flag} {value} is not what this run began with: {remedy}, or begin "
                             "a new run with another --out")
    return {"digests": before | digests}


# -------------------------------------------------------------------------------------- checkpoints

START_OVER = ": move it away, and --resume starts at round 1"


def save_checkpoint(out: Path, progress: Progress) -> None:
    """Write the progress of a run in plain types, which load without unpickling."""
    write(out / "checkpoint.pt", lambda file: torch.save(progress._asdict(), file))


def load_checkpoint(out: Path, device: str) -> Progress | None:
    """The progress that save_checkpoint wrote, or None if there is none yet.

    Raises ValueError if the file is damaged.
    """
    path = out / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # which torch.load does not
        if damaged is None:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            return Progress(**data.on_device(saved, device))
    except Exception as error:  # torch, pickle and zipfile raise a dozen kinds on a broken file
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise ValueError(f"{path} is damaged{START_OVER}") from error
    raise ValueError(f"{path} is damaged{START_OVER}")


def check_fits(out: Path, saved: Progress, rounds: int, pattern: Progress) -> None:
    """Raise ValueError if a checkpoint cannot be of the run in a folder.

    pattern: what progress is like before round 1, and memory where a client takes part; its
        tensors need no values, and its stages no outcomes
    """
    fits = all(type(value) is kind for value, kind in zip(saved, (int, *[dict] * 5)))
    fits = fits and 0 <= saved.round <= rounds and is_alike(saved.server, pattern.server) and all(
        k in pattern.memory and is_alike(kept, pattern.memory[k])
        for k, kept in saved.memory.items())
    fits = fits and is_alike(saved.totals, pattern.totals) and all(
        type(value) in (int, float) for value in saved.totals.values())
    fits = fits and (not saved.line or {"round", "loss", "accuracy"} <= saved.line.keys())
    if not (fits and all(type(outcome) is dict and name in pattern.after
                         for name, outcome in saved.after.items())):
        raise ValueError(f"{out / 'checkpoint.pt'} is of another run, or damaged{START_OVER}")


def is_alike(value: object, pattern: object) -> bool:
    """Whether a nest of dicts and lists has the names, types and shapes of a pattern, or more."""
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(name in value and is_alike(value[name], part)
                                               for name, part in pattern.items())
    if isinstance(pattern, Tensor):
        return isinstance(value, Tensor) and (value.shape, value.dtype) == (pattern.shape,
                                                                            pattern.dtype)
    return pattern is None or type(value) is type(pattern)


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
    if ranks.is_first():
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
            wanted = entry["round"] <= last_round and is_evaluated(entry["round"], settings)
        except (ValueError, LookupError, TypeError, RecursionError):
            break
        if wanted and line.endswith(b"\n"):
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
    if history and history[-1] != progress.line and (
            history[-1]["round"] == progress.line.get("round")):
        history[-1] = progress.line
        replace_last_line(path, progress.line)
    return history


def has_become_absurd(history: Sequence[Mapping]) -> bool:
    """Whether the last loss, and not the one before, is finite but so high that nothing is learnt.

    That is a million times the first one, or what guessing costs (10 is more), if that is less.
    """
    limit = 1e6 * min(max(history[0]["loss"], 1e-6), 10)
    absurd = [entry["loss"] > limit for entry in history[-2:]]
    return absurd[-1] and not all(absurd[:-1] or [False])


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


# ------------------------------------------------------------------------------------- how runs end

@contextmanager
def noted(place: str):
    """Note on an error that comes from in here where that is, unless it says so itself."""
    try:
        yield
    except Exception as error:
        if place not in str(error):
            error.add_note(place)
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its GPU had too little; torch has no type for the first."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "allocate memory" in str(error))


def one_line(text: str) -> str:
    """A message as a line of at most 300 characters; what to do stands at its end, and stays."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:125]} ... {line[-170:]}"


def ending(out: Path | None, error: BaseException, speaks: bool) -> tuple[str, int]:
    """What to say of a run that an error ends, and its exit status.

    out: its folder, None if it had not begun
    speaks: whether this process says it, and so adds a traceback of the unforeseen to error.log
    """
    go_on = f"go on with: python run.py --resume --out {quoted(out)}" if out else ""
    if isinstance(error, KeyboardInterrupt):
        return f"stopped; {go_on}" if out else "stopped before the first round", 130
    if isinstance(error, (OSError, ValueError)) and not out:
        return str(error), 2
    if isinstance(error, OSError):
        return (f"{first_line(error)[:120]}; mend that, then {go_on} (from the last checkpoint)"), 2
    place = "".join(f"{note}, " for note in reversed(getattr(error, "__notes__", [])))
    if isinstance(error, FloatingPointError):
        return f"{place}{error}; {out} keeps its last checkpoint", 1
    said = f"{place}{type(error).__name__}: {first_line(error)[:100]}"
    if is_out_of_memory(error):
        said += "; fewer --workers or a smaller --batch-size need less memory"
    log = (out or Path()) / "error.log"
    if speaks:
        with suppress(OSError), open(log, "a", encoding="utf-8", errors="replace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {place}{ranks.traceback_of(error)}\n")
            said += f"; details are in {log}"
    return said + (", beside the last checkpoint" if out else ""), 3


# ----------------------------------------------------------------------------- the trained networks

METHODS = {**baselines.METHODS, **fedin.METHODS, **apfl.METHODS}


class TrainedNetwork(nn.Module):
    """A network with what turns uint8 images (N, C, 32, 32) into its input; puts out logits.

    classes: the names of what it tells apart
    data.to_images makes such images of arrays of any size.
    """

    def __init__(self, net: nn.Module, mean: Sequence[float], deviation: Sequence[float],
                 classes: Sequence[str]):
        super().__init__()
        self.net, self.classes = net, list(classes)
        for name, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def prepare(self, images: Tensor) -> Tensor:
        """Standardise images as in training."""
        return data.standardise(images, self.mean, self.deviation)

    def forward(self, images: Tensor) -> Tensor:
        wanted = (len(images), len(self.mean), data.IMAGE_SIZE, data.IMAGE_SIZE)
        if images.dtype != torch.uint8 or images.shape != wanted:
            raise ValueError(f"images must be uint8 of shape {wanted}, not {images.dtype} of shape "
                             f"{tuple(images.shape)}")
        return models.predict_logits(self.net, images, self.prepare)


def trained_network(folder: str | Path, arch: str | None = None, client: int | None = None,
                    dataset: str | Path | None = None) -> TrainedNetwork:
    """A network that a run has trained, ready to predict.

    arch: the server's network of an architecture, of --model resnet18-widths for instance
        "resnet18-1/4"; None: of the largest
    client: instead the one that this client uses in the end: of AP-FL its personalised model
    dataset: where the run's data are now, if they have moved.  Networks cut by width need them, for
        the statistics of batch normalisation
    Raises ValueError if the folder has none such.
    """
    try:
        return load_trained(Path(folder), arch, client, dataset)
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever a checkpoint or configuration of other content leads to
        raise ValueError(f"{folder} holds no run that can be read ({type(error).__name__}: "
                         f"{first_line(error)[:100]})") from error


def load_trained(out: Path, arch: str | None, client: int | None,
                 dataset: str | Path | None) -> TrainedNetwork:
    """What trained_network does, but for errors that a damaged folder leads to."""
    settings, saved = read_config(out), load_checkpoint(out, "cpu")
    method = baselines.bind(METHODS[settings["method"]], settings)
    if saved is None or "input" not in settings or (client is not None
                                                    and method.stages.keys() - saved.after.keys()):
        raise ValueError(f"{out} is not at its end: go on with its run by --resume")
    archs = method.architectures(models.MODELS[settings["model"]])
    if client is None:
        if not method.has_server:
            raise ValueError(f"--method {settings['method']} has networks of clients alone: say of "
                             "which client")
        arch = arch or archs[-1]
    elif arch is not None or not 0 <= client < settings["clients"]:
        raise ValueError(f"either an architecture or one of {settings['clients']} clients, not "
                         f"{arch} and {client}")
    else:
        arch = models.architecture_of(client, settings["clients"], archs)
    if arch not in archs:
        raise ValueError(f"{out} has no {arch}: choose one of {', '.join(archs)}")
    if client is not None and saved.after:
        weights = list(apfl.final_models(method, saved.server, saved.after).values())[-1][client]
    else:
        one = baselines.Client(client, torch.empty(0, dtype=torch.int64), arch)
        _, weights = method.deploy(saved.server, one, saved.memory.get(client))
    of = settings["input"]
    net = models.load_network(arch, of["channels"], len(of["classes"]), weights)
    trained = TrainedNetwork(net, of["mean"], of["deviation"], of["classes"])
    if method.networks == "-widths":
        loaded = data.load(dataset or settings["dataset"], settings.get("data_dir", "data"))
        check_same(settings, {"dataset": loaded.digest})
        shared = baselines.filled(data.share_out, settings)(loaded, settings["clients"],
                                                            settings["seed"])
        rows = torch.cat([part for k, part in enumerate(shared.parts) if k not in shared.dropouts])
        models.collect_statistics(net, baselines.spread_batches(shared.data.x_train, rows,
                                                                trained.prepare))
    return trained
