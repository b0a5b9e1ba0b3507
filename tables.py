"""Make the papers' tables and figures, each from one command.

    python tables.py --list                         names, and the number of runs at a scale
    python tables.py fedin-1 --scale small          FedIN, Table 1
    python tables.py all --scale smoke              everything, tiny, to see that it works

Markdown, CSV and a picture go to results/SCALE.  Runs lie in runs/tables/SCALE, and each finished
one has a line in results/SCALE/runs.jsonl.  A run is repeated only if a figure needs its networks
and they are gone.  The same command resumes interrupted runs.

In reading order: scales; the runs of each table; one run; running what is missing; runs.jsonl;
numbers of a table; analyses of networks; Markdown, CSV and pictures; main().
"""

import csv
import hashlib
import io
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cache, partial
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

import analysis
import data
import files
import models
import partitions
import pictures
import run
import semantics
import widths

RUNS, RESULTS, RUN_PY = Path("runs/tables"), Path("results"), Path(__file__).with_name("run.py")
PAPERS = RUN_PY.parent / "results" / "papers.csv"

# Settings that are not in a run's id, since they do not change its numbers
MACHINE = ("device", "workers", "threads", "data_dir", "checkpoint_every")

# ------------------------------------------------------------------------------------------- scales

# Flags by --setting, on top of its own values, and by method (AP-FL's stages, FedDF's distillation)
SMOKE = {"rounds": 2, "local_epochs": 1, "test_images": 60, "eval_every": 1, "checkpoint_every": 2}
SCALES = {
    "smoke": {"fedin": SMOKE | {"clients": 8, "participation": 0.25, "train_images": 160},
              "apfl": SMOKE | {"train_images": 400},
              "method apfl": {"generator_steps": 3, "generator_batch": 2, "synthetic_per_class": 2,
                              "friend_epochs": 1}, "method feddf": {"distillation_steps": 5}},
    "small": {"fedin": {"clients": 20, "participation": 0.25, "rounds": 20, "local_epochs": 1,
                        "train_images": 5000, "test_images": 1000, "eval_every": 4},
              "apfl": {"rounds": 10, "local_epochs": 2, "train_images": 5000, "test_images": 1000,
                       "eval_every": 2},
              "method apfl": {"generator_steps": 60, "generator_batch": 10,
                              "synthetic_per_class": 100, "friend_epochs": 3},
              "method feddf": {"distillation_steps": 100}},
    "paper": {"fedin": {"eval_every": 1}, "apfl": {}}}
SEEDS = {"smoke": 1, "small": 3, "paper": 3}
WIDTHS = {"smoke": "resnet18-widths", "small": "resnet18-widths", "paper": "resnet152-widths"}

# FedIN's Table 5: number of clients in the paper -> number here; participants per round
CLIENTS = {"smoke": {10: 5, 20: 6, 50: 7, 100: 8, 200: 9},
           "small": {10: 5, 20: 8, 50: 12, 100: 20, 200: 40},
           "paper": {10: 10, 20: 20, 50: 50, 100: 100, 200: 200}}
A_ROUND = {"smoke": 2, "small": 5, "paper": 10}

# AP-FL's Fig. 5: synthetic samples per class.  FedIN's Fig. 10: steps, in the paper a million
SAMPLES = {"smoke": (2, 4), "small": (10, 30, 100, 200), "paper": (50, 200, 400, 600, 800, 1000)}
ATTACK_STEPS = {"smoke": 50, "small": 5000, "paper": 100_000}

# --------------------------------------------------------------------------- the runs of each table

Key = tuple[str, str]  # row and column of a table
Lines = Mapping[Key, list[dict]]  # lines of runs.jsonl for seeds 0, 1, ...
Values = dict[Key, list]  # a value per seed, None for a seed without one
Papers = Mapping[Key, tuple]  # a paper's number, its standard deviation or None, its text


class Cell(NamedTuple):
    """A place in a table: run.py's flags but for scale and seed, and the result to show."""

    flags: Mapping[str, Any]
    value: str = "accuracy"  # name in result.json


class Measured(NamedTuple):
    """Outcome of a table's runs."""

    values: Values
    notes: Sequence[str] = ()  # sentences to print with them
    draw: Callable | None = None  # (file, title=); None: values beside the paper's


class Table(NamedTuple):
    """A table or figure of a paper."""

    title: str
    cells: Mapping[Key, Cell]
    measure: Callable | None = None  # (table, lines, args) -> Measured; None: final
    networks: bool = False  # needs the networks of its runs, so their folders; takes one seed


SETS = {"Fashion-MNIST": "fashionmnist", "SVHN": "svhn", "CIFAR-10": "cifar10",
        "CIFAR-100": "cifar100", "EMNIST": "emnist"}
SPLITS = {"IID": {"partition": "iid"}, "Non-IID": {"partition": "dirichlet", "alpha": 0.5}}
NON_IID = {"Non-IID": SPLITS["Non-IID"]}
TARGETS = {"Fashion-MNIST": 85, "SVHN": 80, "CIFAR-10": 60}  # percent, FedIN, Table 1
TARGET_SOURCE = "(below the paper's scale nine tenths of FedAvg's final accuracy, non-IID, by seed)"
ABLATIONS = {"FedAvg": {"method": "fedavg"}, "FedIN w/o IN": {"method": "fedin", "ablate": ["in"]},
             "FedIN w/o Prox": {"method": "fedin", "ablate": ["prox"]},
             "FedIN w/o Opt": {"method": "fedin", "ablate": ["opt"]}, "FedIN": {"method": "fedin"}}

# FedAvg in AP-FL's tables needs no run: AP-FL's rounds are FedAvg's to the last bit
APFL_METHODS = {
    "Local": Cell({"method": "local"}), "FedAvg": Cell({"method": "apfl"}, "global_accuracy"),
    "FedProx": Cell({"method": "fedprox"}), "SCAFFOLD": Cell({"method": "scaffold"}),
    "FedGen": Cell({"method": "fedgen"}), "FedDF": Cell({"method": "feddf"}),
    "AP-FL": Cell({"method": "apfl"})}


def fedin_methods(scale: str) -> dict[str, dict]:
    """Rows of FedIN's Table 1: method -> its flags."""
    nets = {"model": WIDTHS[scale]}
    return {"FedAvg": {"method": "fedavg"}, "FedProx": {"method": "fedprox"},
            "Scaffold": {"method": "scaffold"}, "FedNova": {"method": "fednova"},
            "MOON": {"method": "moon"}, "HeteroFL": {"method": "heterofl", **nets},
            "InclusiveFL": {"method": "inclusivefl"}, "FedRolex": {"method": "fedrolex", **nets},
            "ScaleFL": {"method": "scalefl", **nets}, "InCoAvg": {"method": "inco"},
            "FedIN": {"method": "fedin"}, "FedIN (+Noise)": {"method": "fedin", "noise": 0.8}}


def cells(setting: str, rows: Mapping[str, Mapping | Cell],
          columns: Mapping[str, Mapping]) -> dict[Key, Cell]:
    """Cells of a table: each row's flags with each column's, in a setting."""
    joined = {}
    for row, content in rows.items():
        cell = content if isinstance(content, Cell) else Cell(content)
        for column, flags in columns.items():
            joined[row, column] = cell._replace(flags={"setting": setting, **cell.flags, **flags})
    return joined


def columns_of(names: Sequence[str], splits: Mapping[str, Mapping] = SPLITS) -> dict[str, dict]:
    """Columns "CIFAR-10, IID" and so on -> their flags."""
    columns = {}
    for name in names:
        for split, flags in splits.items():
            columns[f"{name}, {split}"] = {"dataset": SETS[name], **flags}
    return columns


def tables_of(paper: str, entries: Mapping[str, tuple]) -> dict[str, Table]:
    """Tables of a paper.  entries: name -> title, cells, and other fields of Table"""
    return {name: Table(f"{paper}, {title}", *rest) for name, (title, *rest) in entries.items()}


def fedin_tables(scale: str) -> dict[str, Table]:
    """FedIN's Tables 1 to 6, and one of every method in its setting."""
    methods, sets, fedin_cells = fedin_methods(scale), list(SETS)[:3], partial(cells, "fedin")
    cifar, skewed_cifar = columns_of(["CIFAR-10"]), columns_of(["CIFAR-10"], NON_IID)

    # Rows: some of the methods, with further flags
    def several(names: str, **flags: str) -> dict[str, dict]:
        return {name: methods[name] | flags for name in names.split()}

    equal = several("FedProx Scaffold FedNova MOON FedIN", model="resnet18")
    separate = several("FedAvg FedProx Scaffold FedNova MOON InclusiveFL FedIN",
                       aggregation="per-architecture")
    measured = several("FedAvg Scaffold MOON HeteroFL FedRolex FedIN")
    noise = {f"noise {level:g}": {"method": "fedin", "noise": level}
             for level in (0.0, 0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 3.0, 5.0)}
    all_methods = {"Local": {"method": "local"}, **methods}
    for name, method in (("FedAvg", "fedavg"), ("FedAvg-FT", "fedavg-ft"), ("FedGen", "fedgen"),
                         ("FedDF", "feddf"), ("AP-FL", "apfl")):
        all_methods[f"{name}, CNN"] = {"method": method, "model": "cnn"}

    # Columns
    skewed = {name: {"dataset": SETS[name], **SPLITS["Non-IID"]} for name in sets}
    counts = {}
    for split, flags in SPLITS.items():
        for paper_count, count in CLIENTS[scale].items():
            share = {"clients": count, "participation": A_ROUND[scale] / count}
            counts[f"{split}, {paper_count} clients"] = {"dataset": "cifar10", **share, **flags}
    numbers = ", ".join(f"{count} for {paper}" for paper, count in CLIENTS[scale].items())
    numbers = (f"Numbers of clients here: {numbers}. Participants per round: {A_ROUND[scale]} (not "
               "given in the paper).")

    # Name -> title, cells, measure
    return tables_of("FedIN", {
        "fedin-1": ("Table 1: accuracy, %; rounds to the target in non-IID, and how many times "
                    "fewer than FedAvg", fedin_cells(methods, columns_of(sets)), with_rounds),
        "fedin-2a": ("Table 2a: accuracy, %, all clients with ResNet18", fedin_cells(equal, cifar)),
        "fedin-2b": ("Table 2b: accuracy, %, without one part", fedin_cells(ABLATIONS, cifar)),
        "fedin-3": ("Table 3: accuracy, %, averages within each architecture alone",
                    fedin_cells(separate, columns_of(["Fashion-MNIST"]))),
        "fedin-4": ("Table 4: cost of a method", fedin_cells(measured, skewed_cifar), overheads),
        "fedin-5": ("Table 5: accuracy, %, by the number of clients, CIFAR-10", fedin_cells(
            several("FedAvg InclusiveFL FedIN"), counts), partial(final, notes=[numbers])),
        "fedin-6": ("Table 6: accuracy, %, by the noise on the features, non-IID",
                    fedin_cells(noise, skewed)),
        "methods": ("every method in its setting: accuracy, %, non-IID", fedin_cells(
            all_methods, columns_of(["CIFAR-10", "Fashion-MNIST"], NON_IID)))})


def fedin_figures(scale: str) -> dict[str, Table]:
    """FedIN's figures that show measurements: 3 to 10."""
    methods, fedin_cells = fedin_methods(scale), partial(cells, "fedin")
    skewed_cifar = columns_of(["CIFAR-10"], NON_IID)
    three = {name: methods[name] for name in ("FedAvg", "InclusiveFL", "FedIN")}
    noise = fedin_cells({"without noise": methods["FedIN"],
                         "with noise": methods["FedIN (+Noise)"]}, skewed_cifar)

    # Fig. 6c and 6d: features that a client sends.  The axis of 6d is not readable in our copy
    (flags,), only_fedin = skewed_cifar.values(), {"FedIN": methods["FedIN"]}
    sizes = {str(size): flags | {"feature_batch_size": size} for size in (8, 16, 32, 64, 128)}
    batches = {str(count): flags | {"feature_batches": count} for count in (1, 2, 3, 4, 5)}

    # Name -> title, cells, measure, whether it needs networks
    all_classes = partial(scattered, tuple(models.RESNETS), 100, None)
    one_class = partial(scattered, ("resnet10", "resnet14", "resnet26"), 200, 0)
    stages, maps = partial(similarity, draw_stages), partial(similarity, draw_maps)
    return tables_of("FedIN", {
        "fedin-fig3": ("Fig. 3: features s_out of five architectures, t-SNE",
                       fedin_cells({"FedAvg": methods["FedAvg"]}, skewed_cifar), all_classes, True),
        "fedin-fig4": ("Fig. 4: images reconstructed from features", noise,
                       partial(attacked, False), True),
        "fedin-fig5": ("Fig. 5: smoothed accuracy, non-IID CIFAR-10", fedin_cells(
            methods, skewed_cifar), partial(curves, "CIFAR-10", analysis.SMOOTHING)),
        "fedin-fig6ab": ("Fig. 6a and 6b: mean CKA between clients, by stage",
                         fedin_cells(three, columns_of(["CIFAR-10"])), stages, True),
        "fedin-fig6c": ("Fig. 6c: accuracy, %, by |S|, non-IID CIFAR-10",
                        fedin_cells(only_fedin, sizes), partial(swept, "features in a batch, |S|")),
        "fedin-fig6d": ("Fig. 6d: accuracy, %, by the number of batches, non-IID CIFAR-10",
                        fedin_cells(only_fedin, batches), partial(swept, "batches of features")),
        "fedin-fig7": ("Fig. 7: CKA between clients, stages 2 and 3, non-IID CIFAR-10",
                       fedin_cells(three, skewed_cifar), maps, True),
        "fedin-fig8": ("Fig. 8: stage 3 features of one class, t-SNE, non-IID CIFAR-10",
                       fedin_cells(three, skewed_cifar), one_class, True),
        "fedin-fig9": ("Fig. 9: smoothed accuracy, ablations, non-IID CIFAR-10", fedin_cells(
            ABLATIONS, skewed_cifar), partial(curves, "", analysis.SMOOTHING)),
        "fedin-fig10": ("Fig. 10: reconstruction from features, with and without noise", noise,
                        partial(attacked, True), True)})


def apfl_tables(scale: str) -> dict[str, Table]:
    """AP-FL's tables, and its figures that show measurements."""
    sets, apfl_cells = ["CIFAR-10", "CIFAR-100", "EMNIST", "Fashion-MNIST"], partial(cells, "apfl")

    # Table 2 and Fig. 4: every method, by number of clients and skew
    skewed = {f"{clients} clients, alpha {alpha:g}": {"clients": clients, "alpha": alpha}
              for clients in (5, 10) for alpha in (0.01, 0.05, 0.1)}
    mild = {name: flags for name, flags in skewed.items() if flags["alpha"] == 0.1}
    splits = columns_of(sets[:3], skewed) | columns_of(sets[3:], mild)
    panels = {name: {"dataset": SETS[name], "clients": 5, "alpha": alpha}
              for name, alpha in zip(sets, (0.01, 0.05, 0.1, 0.1))}

    # Table 3: models of the dropout client.  AP-FL's, before there is a generator, is FedAvg-FT's
    missing = {f"{percent} % missing": {"missing_classes": percent / 100} for percent in (10, 20)}
    dropout = {"Local": Cell({"method": "local"}, "dropout_accuracy"),
               "FedAvg-FT": Cell({"method": "apfl"}, "dropout_client_accuracy"),
               "AP-FL": Cell({"method": "apfl"}, "dropout_personalised_accuracy")}

    # Table 4: friend models, by semantics
    friends, flags = {}, {"method": "apfl", "missing_classes": 0.2}
    for mean, value in (("A_n", "friend_personal_accuracy"),
                        ("A_d", "dropout_friend_personal_accuracy")):
        rows = {name: Cell({**flags, "semantics": name.lower()}, value)
                for name in ("word2vec", "BERT", "CLIP")}
        friends |= apfl_cells(rows, columns_of(sets, {mean: {}}))

    # Fig. 5: friend models, by two flags
    rows, flags = {}, {"method": "apfl", "clients": 10, "alpha": 0.1}
    for row in ("CIFAR-10", "EMNIST", "Fashion-MNIST (not in the paper)"):
        rows[row] = Cell({**flags, "dataset": SETS[row.split(" ")[0]]}, "friend_accuracy")
    dims = {str(dim): {"noise_dim": dim} for dim in (20, 100, 400, 512)}
    samples = {str(count): {"synthetic_per_class": count} for count in SAMPLES[scale]}

    # Name -> title, cells, measure
    return tables_of("AP-FL", {
        "apfl-1": ("Table 1: classes of each client in the dropout setting", {}, dealt_classes),
        "apfl-2": ("Table 2: accuracy on the whole test set, %", apfl_cells(APFL_METHODS, splits)),
        "apfl-3": ("Table 3: accuracy of the dropout client on the whole test set, %",
                   apfl_cells(dropout, columns_of(sets, missing))),
        "apfl-4": ("Table 4: accuracy of friend models on clients' own shares of the test set, %; "
                   "A_n: participants, A_d: the dropout client", friends),
        "apfl-fig4": ("Fig. 4: accuracy over rounds, five clients; star: AP-FL's personalised "
                      "models", apfl_cells(APFL_METHODS, panels), partial(curves, "", 0.0)),
        "apfl-fig5a": ("Fig. 5: friend models' accuracy, %, by the length of the noise",
                       apfl_cells(rows, dims), partial(swept, "length of z")),
        "apfl-fig5b": ("Fig. 5: friend models' accuracy, %, by the number of samples",
                       apfl_cells(rows, samples), partial(swept, "synthetic samples per class"))})


def all_tables(scale: str) -> dict[str, Table]:
    """Name -> table or figure.  The papers' other figures are drawings."""
    return fedin_tables(scale) | fedin_figures(scale) | apfl_tables(scale)


# ------------------------------------------------------------------------------------------ one run

def flags_of(cell: Cell, args: Namespace, seed: int) -> dict:
    """Flags of a cell's run."""
    scale, setting, method = SCALES[args.scale], cell.flags["setting"], cell.flags["method"]
    flags = {**scale[setting], **scale.get(f"method {method}", {}), **cell.flags}
    if method == "apfl":
        flags["semantics"] = semantics_of(cell, args.data_dir)

    # Stand-ins for every data set and encoder
    if args.scale == "smoke":
        flags |= {"dataset": "digits"} | ({"semantics": "onehot"} if method == "apfl" else {})

    if flags["dataset"] in data.DOWNLOADED or flags.get("semantics") in semantics.ENCODERS:
        flags["data_dir"] = args.data_dir
    return flags | {"seed": seed}


def semantics_of(cell: Cell, data_dir: str) -> str:
    """Value of --semantics: embeddings-ENCODER-DATASET.npz in --data-dir, or else the encoder."""
    # A cell without an encoder takes CLIP, or word vectors if their file alone is there
    encoder = cell.flags.get("semantics")
    for choice in [encoder] if encoder else ["clip", "word2vec"]:
        path = Path(data_dir) / f"embeddings-{choice}-{cell.flags['dataset']}.npz"
        if path.exists():
            return str(path)
    return encoder or "clip"


def run_id(flags: dict) -> str:
    """Name of a run: method, data set, seed, and ten digits that stand for all settings."""
    # Settings that are off do not count, so that a new flag of run.py changes no id
    settings = run.resolve(flags)
    decisive = {}
    for name, value in settings.items():
        if name not in MACHINE and value is not None and value is not False and value != []:
            decisive[name] = Path(value).name if isinstance(value, str) else value

    # Embeddings from a file count as their encoder
    if decisive.get("semantics", "").startswith("embeddings-"):
        decisive["semantics"] = decisive["semantics"].split("-")[1]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
    return f"{flags['method']}-{Path(settings['dataset']).stem}-{flags['seed']}-{digest}"


def is_finished(folder: Path) -> bool:
    """Whether a run has ended and its networks are there."""
    return (folder / "result.json").exists() and (folder / "checkpoint.pt").exists()


# -------------------------------------------------------------------------- running what is missing

def run_missing(jobs: Mapping[str, dict], args: Namespace) -> dict[str, str]:
    """Make the runs (id -> flags) that are not finished, args.jobs at a time; id -> error."""
    # A run may have ended before its line was written
    lines, failed, folder = recorded(args.scale), {}, RUNS / args.scale
    finished = {name for name in jobs if is_finished(folder / name)}
    for name in finished - lines.keys():
        record(name, jobs[name], args.scale)

    # Ctrl-C reaches the processes too: they save what they have, and no other begins
    missing = sorted(jobs.keys() - finished, key=lambda name: (jobs[name]["seed"], name))
    pool = ThreadPoolExecutor(args.jobs)
    futures = {pool.submit(run_alone, folder / name, jobs[name], args.jobs): name
               for name in missing}
    bar = pictures.progress_bar(as_completed(futures), "runs", "run", len(missing))
    try:
        for future in bar:
            name, error = futures[future], future.result()
            if error:
                failed[name] = error
                bar.write(f"{name}: {error}", file=sys.stdout)
            else:
                record(name, jobs[name], args.scale)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def run_alone(folder: Path, flags: Mapping[str, Any], jobs: int) -> str:
    """Begin or resume a run in a process of its own; its error in a line, or nothing."""
    if flags.get("semantics") == "word2vec":
        return (f"no word vectors: put embeddings-word2vec-{flags['dataset']}.npz (classes, "
                "embeddings) into --data-dir")

    # The processes share the cores
    words = run.command_line(flags) + ["--resume"] * (folder / "config.json").exists()
    if not torch.cuda.is_available():
        words += ["--workers", str(max(1, run.num_cores() // jobs))]

    # The log lies beside the folder
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        command = [sys.executable, "-u", str(RUN_PY), *words, "--out", str(folder)]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if status < 0:
        return f"killed by signal {-status}: fewer --jobs need less memory"
    return log.read_text(encoding="utf-8").splitlines()[-1] if status else ""


# --------------------------------------------------------------------------------------- runs.jsonl

def record(name: str, flags: Mapping[str, Any], scale: str) -> None:
    """Add the line of a finished run to runs.jsonl."""
    folder = RUNS / scale / name
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(text) for text in metrics]
    append(scale, name, flags, result=json.loads((folder / "result.json").read_text()),
           rounds=[entry["round"] for entry in entries],
           accuracy=[files.accuracy_in_rounds(entry) for entry in entries],
           digests=files.read_config(folder)["digests"])


def append(scale: str, name: str, flags: Mapping[str, Any], **values: Any) -> None:
    """Add a line to runs.jsonl, with command, commit and machine."""
    line = {"id": name, "command": shlex.join(["python", "run.py", *run.command_line(flags)]),
            "commit": commit(), "machine": machine(), **values}
    path = RESULTS / scale / "runs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def recorded(scale: str) -> dict[str, dict]:
    """Id of a run -> its last line in runs.jsonl, without torn lines."""
    path, lines = RESULTS / scale / "runs.jsonl", {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            line = json.loads(text)
            lines[line["id"]] = line
    return lines


@cache
def commit() -> str:
    """Commit of this code, with + if it has changed since."""
    output = subprocess.getoutput(f"git -C {shlex.quote(str(RUN_PY.parent))} status --porcelain=2 "
                                  "--branch --untracked-files=no -- '*.py'")
    name = re.search(r"^# branch.oid (\w{7})", output)
    changed = re.search("^[^#]", output, re.MULTILINE)
    return "unknown" if name is None else name[1] + "+" * bool(changed)


@cache
def machine() -> str:
    """Processor, cores, and the GPU if there is one."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{(names or ['unknown processor'])[0]}, {run.num_cores()} cores{gpu}"


# ------------------------------------------------------------------------------- numbers of a table

def final(table: Table, lines: Lines, args: Namespace, notes: Sequence[str] = ()) -> Measured:
    """Result that each cell names, per seed."""
    values = {}
    for key, runs in lines.items():
        values[key] = [line["result"].get(table.cells[key].value) for line in runs]
    return Measured(values, notes)


def swept(label: str, table: Table, lines: Lines, args: Namespace) -> Measured:
    """Final accuracies, drawn as a line per row over the columns, which are numbers."""
    values, curves = final(table, lines, args).values, {}
    columns = list(dict.fromkeys(column for _, column in values))

    # Means over the seeds that all cells with runs have, since other seeds have other splits
    seeds = min(len(per_seed) for per_seed in values.values() if per_seed)
    for row in dict.fromkeys(row for row, _ in values):
        points = [mean_and_spread(values[row, column][:seeds]) for column in columns]
        means = [float("nan") if mean is None else mean for mean, _ in points]
        if any(mean is not None for mean, _ in points):
            curves[row] = columns, means, [spread or 0 for _, spread in points]
    return Measured(values, draw=partial(pictures.draw_lines, lines={"": curves},
                                         labels=(label, "accuracy, %")))


def targets_of(name: str, lines: Lines, args: Namespace) -> list[float]:
    """Target accuracy on a data set per seed, in percent."""
    if args.scale == "paper":
        return [TARGETS[name]] * args.seeds
    return [0.9 * line["accuracy"][-1] for line in lines.get(("FedAvg", f"{name}, Non-IID"), [])]


def with_rounds(table: Table, lines: Lines, args: Namespace) -> Measured:
    """Accuracies, and per data set the rounds to the target and the speed-up over FedAvg."""
    accuracies, values, texts = final(table, lines, args).values, {}, []
    for name in TARGETS:
        targets = targets_of(name, lines, args)
        texts += [f"{name} {statistics.mean(targets):.1f}"] if targets else []

        # Accuracies, and the first round at the target
        for (row, column), runs in lines.items():
            if column.startswith(f"{name}, "):
                values[row, column] = accuracies[row, column]
            if column == f"{name}, Non-IID" and targets:
                values[row, f"{name}, round"] = [
                    analysis.rounds_to_target(line["rounds"], line["accuracy"], target)
                    for line, target in zip(runs, targets)]

        # Speed-up, over the seeds that both methods have, if all of them reach the target
        base = values.get(("FedAvg", f"{name}, round"), [])
        for row in dict.fromkeys(row for row, _ in lines):
            pairs = list(zip(base, values.get((row, f"{name}, round"), [])))
            if pairs and not any(None in pair for pair in pairs):
                values[row, f"{name}, speed"] = [
                    analysis.speed_up(*map(statistics.mean, zip(*pairs)))]
    return Measured(values, [f"Targets, %: {', '.join(texts)} {TARGET_SOURCE}."] if texts else [])


def of_common_seeds(lines: Lines) -> Lines:
    """Cells that have runs, each cut to the seeds that all of them in its column have."""
    fewest: dict[str, int] = {}
    for (_, column), runs in lines.items():
        if runs:
            fewest[column] = min(len(runs), fewest.get(column, len(runs)))
    return {key: runs[:fewest[key[1]]] for key, runs in lines.items() if runs}


def mean_curves(lines: Lines, weight: float) -> dict[str, dict[str, tuple]]:
    """Column -> row -> rounds, mean accuracy and its standard deviation over seeds, smoothed."""
    panels: dict[str, dict] = {}
    for (row, column), runs in lines.items():
        per_seed = [analysis.smoothed(line["accuracy"], weight) for line in runs]
        means, spreads = zip(*map(mean_and_spread, zip(*per_seed)))
        band = [spread or 0.0 for spread in spreads]
        panels.setdefault(column, {})[row] = runs[0]["rounds"], means, band
    return panels


def curves(goal: str, weight: float, table: Table, lines: Lines, args: Namespace) -> Measured:
    """Final accuracies and smoothed curves, with the target on a data set if one is named."""
    common, targets, ends = of_common_seeds(lines), {}, {}
    counts = " or ".join(sorted({str(len(runs)) for runs in common.values()}))
    smoothing = f", smoothed exponentially with weight {weight} (not given in the papers)"
    notes = [f"Curves are means over the seeds that all methods of a panel have ({counts}), with a "
             f"band of one standard deviation{smoothing * (weight > 0)}."]

    # Target of FedIN's Fig. 5
    if goal and (per_seed := targets_of(goal, common, args)):
        targets[f"{goal}, Non-IID"] = statistics.mean(per_seed)
        notes.append(f"Target: {statistics.mean(per_seed):.1f} % {TARGET_SOURCE}.")

    # Accuracy after the stages that follow AP-FL's last round
    for (row, column), runs in common.items():
        if row == "AP-FL":
            ends[column, row] = statistics.mean(line["result"]["accuracy"] for line in runs)
    if ends:
        notes.append("AP-FL's line covers FedAvg's, since their rounds are equal.")
    return Measured(final(table, lines, args).values, notes, partial(
        pictures.draw_lines, lines=mean_curves(common, weight), targets=targets, ends=ends,
        labels=("round", "smoothed " * (weight > 0) + "accuracy, %")))


# ----------------------------------------------------------------------------- analyses of networks

# Each once for all figures
compare_clients, attack = cache(analysis.compare_clients), cache(analysis.attack)


def similarity(draw: Callable, table: Table, lines: Lines, args: Namespace) -> Measured:
    """Mean CKA between different clients by stage (FedIN, Fig. 6a, 6b and 7)."""
    values, comparisons = {}, {}
    for (row, column), runs in lines.items():
        comparisons[row, column] = seen = compare_clients(RUNS / args.scale / runs[0]["id"])
        stages = {f"stage {number}": cka for number, cka in enumerate(seen.maps)}
        for stage, cka in (stages | {"stage 3, unbiased": seen.unbiased[3]}).items():
            values[row, f"{column}, {stage}"] = [analysis.mean_similarity(cka)]
    images = len(seen.labels)
    return Measured(values, [
        f"Clients after one more round of local training, {images:,} test images. CKA is between "
        "different clients, by the biased estimate (not given in the paper). In stage 3, of 512 "
        f"features, it is up to {512 / (512 + images):.2f} for unrelated features, and 0 by the "
        "unbiased estimate."], partial(draw, comparisons))


def draw_stages(comparisons: Mapping[Key, Any], path: Any, title: str) -> None:
    """Draw mean CKA over stages, a panel per split."""
    panels: dict[str, dict] = {}
    for (row, column), seen in comparisons.items():
        means = [analysis.mean_similarity(cka) for cka in seen.maps]
        panels.setdefault(column, {})[row] = list(map(str, range(len(means)))), means, None
    pictures.draw_lines(path, panels, ("stage", "mean CKA between clients"), title)


def draw_maps(comparisons: Mapping[Key, Any], path: Any, title: str) -> None:
    """Draw CKA of each client with each, by method, stages 2 and 3."""
    maps = {f"{row}, stage {stage}": seen.maps[stage] for stage in (2, 3)
            for (row, _), seen in comparisons.items()}
    names = next(iter(comparisons.values())).names
    if len(names) > 25:  # too many to write: networks alone, each at its first client
        archs = [name.split(": ")[1] for name in names]
        names = [arch if arch != before else "" for before, arch in zip(["", *archs], archs)]
    pictures.draw_maps(path, maps, names, ("client", "client, network", "CKA"), title,
                       columns=len(comparisons), limits=(0, 1))


def scattered(archs: Sequence[str], count: int, label: int | None, table: Table, lines: Lines,
              args: Namespace) -> Measured:
    """t-SNE of stage 3 features of some networks, of test images of a class (None: of all)."""
    values, panels = {}, {}
    for (row, _), runs in lines.items():
        seen = compare_clients(RUNS / args.scale / runs[0]["id"])
        wanted = torch.ones_like(seen.labels) if label is None else seen.labels == label
        images = wanted.nonzero()[:count, 0]
        features = {arch: seen.features[arch][images] for arch in archs}
        panels[row] = analysis.tsne(features)
        values[row, "nearest neighbours of the same network, share"] = [
            analysis.own_neighbours(features)]

    class_text = "" if label is None else f" of class {label} (not given in the paper)"
    return Measured(values, [
        f"Clients after one more round of local training, {len(images)} test images{class_text}. "
        "The nearest neighbour among features of other images is of the same network with a share "
        f"of {1 / len(archs):.2f} if networks see alike, and of 1 if they lie apart."],
                    partial(pictures.draw_points, points=panels))


def attacked(with_losses: bool, table: Table, lines: Lines, args: Namespace) -> Measured:
    """Attack on features of a run's ResNet18, with the noise of its training (Fig. 4 and 10)."""
    images, losses, values, steps = {}, {}, {}, ATTACK_STEPS[args.scale]
    for (row, column), runs in lines.items():
        level = table.cells[row, column].flags.get("noise", 0.0)
        images["true images"], outcome = attack(RUNS / args.scale / runs[0]["id"], args.data_dir,
                                                steps=steps, level=level)
        images[row], losses[row] = outcome.images, outcome.losses
        values[row, "loss at the end"] = [outcome.losses[-1]]
        values[row, "variance of the noise"] = [outcome.noise]
        values[row, "PSNR, dB"], values[row, "SSIM"] = [outcome.psnr], [outcome.ssim]
    return Measured(values, [f"The attack takes {steps:,} steps. PSNR and SSIM are means over "
                             f"{len(images['true images'])} images."], partial(
        pictures.draw_reconstruction, images=images, losses=losses if with_losses else {}))


def overheads(table: Table, lines: Lines, args: Namespace) -> Measured:
    """Cost of a method, by rule for the paper's networks and as measured (FedIN, Table 4)."""
    resnets, cut = ([models.shapes(partial(make, 3, 10)) for make in networks.values()]
                    for networks in (models.RESNETS, widths.MODELS["resnet152-widths"]))
    features = {"further": 16 * (64 * 8 * 8 + 512)}  # |S| times the sizes of s_in and s_out
    rules = {"FedAvg": (resnets, {}, {}), "Scaffold": (resnets, {"copies": 2}, {"copies": 2}),
             "MOON": (resnets, {}, {"copies": 3}), "HeteroFL": (cut, {}, {"copies": 2}),
             "FedRolex": (cut, {}, {"copies": 2}), "FedIN": (resnets, features, features)}
    values = {}
    for (row, column), runs in lines.items():
        # By rule: a client may send part of a network, but keeps the whole
        networks, upload, memory = rules[row]
        whole = networks[-1:] if networks is cut else networks
        values[row, "parameters sent, M"] = [
            analysis.mean_millions(networks, models.is_parameter, **upload)]
        values[row, "memory by rule, MiB"] = [analysis.memory_mib(whole, **memory)]

        # As measured
        flags = flags_of(table.cells[row, column], args, 0)
        settings = run.resolve(flags)
        updates = run.num_participants(settings) * settings["rounds"]
        values[row, "measured: upload per update, MB"] = [
            line["result"]["upload_mb"] / updates for line in runs]
        values[row, "measured: peak of the process, GiB"] = [
            peak_memory(flags, args) for _ in runs[:1]]
    return Measured(values, [
        "By rule: the paper's networks for ten classes and colour images. The paper's 16.29 is of "
        "HeteroFL's networks for 1000 classes; for ten it is 15.51. Memory is the state of one "
        "client per network (HeteroFL, FedRolex: of the whole ResNet152), times a method's copies.",
        f"Measured: with the networks of this scale ({WIDTHS[args.scale]} for HeteroFL and "
        "FedRolex). A peak is of a process for the first two rounds, with library and data."])


def peak_memory(flags: dict, args: Namespace) -> float | None:
    """Peak memory in GiB of a process for the first two rounds of a run, kept in runs.jsonl."""
    name, flags = f"{run_id(flags)}-peak", flags | {"rounds": 2, "eval_every": 2}
    line = recorded(args.scale).get(name)
    if line is not None or args.jobs == 0:
        return line and line["peak_gib"]

    # Linux counts no less than this process has ever had; see chosen
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RUN_PY), *run.command_line(flags), "--out", f"{folder}/run"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    if status == 0:
        append(args.scale, name, flags, peak_gib=peak)
    return peak if status == 0 else None


def dealt_classes(table: Table, lines: Lines, args: Namespace) -> Measured:
    """Classes and images of each client with --missing-classes 0.2 on CIFAR-10 (AP-FL, Table 1)."""
    cell = Cell({"method": "fedavg", "setting": "apfl", "dataset": "cifar10"})
    flags = flags_of(cell, args, 0)
    split = partitions.split_data(data.load(flags["dataset"], args.data_dir), 10, 0,
                                  train_images=flags.get("train_images"), missing_classes=0.2)
    counts = torch.stack([split.data.y_train[part].bincount(minlength=10) for part in split.parts])
    values = {(f"client {client}", "classes"): [" ".join(map(str, row.nonzero()[:, 0].tolist()))]
              for client, row in enumerate(counts)}
    return Measured(values, substitutions([cell], args), partial(
        pictures.draw_maps, maps={"": counts.double()}, names=[row for row, _ in values],
        labels=("class", "", "training images")))


# ----------------------------------------------------------------------- Markdown, CSV and pictures

def papers_numbers() -> dict[str, Papers]:
    """Table -> the paper's numbers (apfl-1: classes of clients), from results/papers.csv."""
    tables: dict[str, dict] = {}
    with open(PAPERS, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            value, spread = line["value"], line["deviation"]
            number = float(value) if re.fullmatch(r"[\d.]+", value) else value
            tables.setdefault(line["table"], {})[line["row"], line["column"]] = (
                number, float(spread) if spread else None, value + f" ± {spread}" * bool(spread))
    return tables


def mean_and_spread(values: Sequence) -> tuple[Any, float | None]:
    """Mean and standard deviation over the seeds that have a value.  Words stay as they are."""
    present = [value for value in values if value is not None]
    if not present or isinstance(present[0], str):
        return (present[0] if present else None), None
    return statistics.mean(present), statistics.stdev(present) if len(present) > 1 else None


def number_text(value: Any, spread: float | None, paper_text: str) -> str:
    """A mean and its standard deviation, with as many decimals as the paper's number has."""
    # Words and whole numbers stay as they are
    if value is None or isinstance(value, str) or isinstance(value, int) and spread is None:
        return "–" if value is None else str(value)
    digits = 1 if abs(value) >= 10 else 2
    if paper_text:
        digits = max(1, len(paper_text.split(" ")[0].partition(".")[2]))
    text = f"{value:.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def cell_text(key: Key, values: Values, papers: Papers) -> str:
    """A cell in Markdown: the paper's number if the table has any, a slash, ours."""
    per_seed, (*_, paper_text) = values.get(key, []), papers.get(key, ("",))
    text = number_text(*mean_and_spread(per_seed), paper_text)

    # Not every seed was run, or reached the target
    count = sum(value is not None for value in per_seed)
    seeds = max(len(others) for (_, column), others in values.items() if column == key[1])
    if 0 < count < seeds:
        text += f" ({count} of {seeds})"
    return f"{paper_text or '–'} / {text}" if papers else text


def agreement(values: Values, papers: Papers) -> dict[str, tuple[int, int]]:
    """Column -> number of pairs of rows in the paper's order, number of pairs to compare."""
    columns: dict[str, tuple[int, int]] = {}
    keys = [key for key in values if values[key] and key in papers]
    for pair in combinations(keys, 2):
        column = pair[0][1]
        if pair[1][1] != column:
            continue

        # Means over the seeds of both.  A row that misses a target with one of them comes last
        means, seeds = [], min(len(values[key]) for key in pair)
        for key in pair:
            missed = column.endswith(", round") and None in values[key][:seeds]
            means.append(float("inf") if missed else mean_and_spread(values[key][:seeds])[0])
        printed = [papers[key][0] for key in pair]
        if all(isinstance(number, (int, float)) for number in means + printed):
            counts = columns.get(column, (0, 0)), analysis.in_order(printed, means)
            columns[column] = tuple(map(sum, zip(*counts)))
    return {column: counts for column, counts in columns.items() if counts[1]}


def markdown(name: str, table: Table, values: Values, papers: Papers, notes: Sequence[str]) -> str:
    """A table as Markdown, with notes above it and its picture below."""
    # Rows with a number of ours or of the paper, transposed if there are many columns
    known = {row for row, _ in values} | {key[0] for key in papers if key in table.cells}
    columns = list(dict.fromkeys(column for _, column in values))
    grid = [["", *columns]]
    for row in dict.fromkeys(row for row, _ in [*table.cells, *values] if row in known):
        grid.append([row, *(cell_text((row, column), values, papers) for column in columns)])
    if len(columns) > 12:
        grid = list(zip(*grid))
    grid.insert(1, ["---"] * len(grid[0]))
    text = "\n".join("| " + " | ".join(line) + " |" for line in grid)

    # Remarks
    spread = (", mean ± standard deviation over seeds; (k of n): over k seeds alone"
              if any(len(per_seed) > 1 for per_seed in values.values()) else "")
    remarks = [f"Every cell: {'the paper / ours' if papers else 'ours'}{spread}."]
    pairs = [f"{column} {alike} of {total}"
             for column, (alike, total) in agreement(values, papers).items()]
    if pairs:
        remarks.append("Pairs of rows in the paper's order (ties are not), over the seeds of both: "
                       + "; ".join(pairs) + ".")
    return "\n\n".join([f"# {table.title}", *notes, text, *remarks,
                        f"![{table.title}]({name}.png)"]) + "\n"


def notes_of(table: Table, lines: Lines, seeds: int, args: Namespace) -> list[str]:
    """Sentences on scale, seeds, command, commits and machines, and on differences."""
    # Scale and seeds
    scale, texts, used = SCALES[args.scale], [], list(table.cells.values())
    for setting in dict.fromkeys(cell.flags["setting"] for cell in used) or ["apfl"]:
        parts = [setting, *(["method apfl", "method feddf"] * (setting == "apfl"))]
        flags = [f"{flag} {value}" for part in parts for flag, value in scale.get(part, {}).items()]
        texts.append(f"`--setting {setting}` with {', '.join(flags) or 'nothing else'}")
    notes = [f"Scale **{args.scale}**: {'; '.join(texts)}. Seeds: "
             f"{', '.join(map(str, range(seeds)))}."]

    # Command, commits, machines
    runs = [line for per_seed in lines.values() for line in per_seed]
    commits, machines = (", ".join(sorted({line[name] for line in runs}))
                         for name in ("commit", "machine"))
    origin = f"runs of commit {commits} on {machines}" if runs else f"commit {commit()}, no runs"
    analyses = f" Analyses of commit {commit()} on {machine()}." if table.networks else ""
    notes.append(f"`{args.command}`; {origin}.{analyses}")

    # Differences from the paper
    if args.scale != "paper" and any("-widths" in cell.flags.get("model", "") for cell in used):
        notes.append(f"HeteroFL, FedRolex, ScaleFL: {WIDTHS[args.scale]} (paper: ResNet152).")
    return notes + substitutions(used, args)


def substitutions(cells_used: Sequence[Cell], args: Namespace) -> list[str]:
    """Sentences on data sets and embeddings that are not those of the cells."""
    notes: dict[str, None] = {}
    for cell in cells_used:
        asked, used = {"semantics": "clip", **cell.flags}, flags_of(cell, args, 0)
        for name in ("dataset", "semantics"):
            if used.get(name, asked[name]) != asked[name]:
                notes[f"In place of --{name} {asked[name]}: {Path(used[name]).name}."] = None
    return list(notes)


def lacking_runs(ids: Mapping[Key, list], lines: Lines, failed: Mapping[str, str]) -> list[str]:
    """Sentences on cells that lack runs, one per reason."""
    by_reason: dict[str, list[str]] = {}
    for key, names in ids.items():
        if len(lines[key]) < len(names):
            reasons = sorted({failed[name] for name in names if name in failed})
            by_reason.setdefault("; ".join(reasons) or "not run", []).append(" / ".join(key))
    notes = []
    for reason, texts in by_reason.items():
        more = f" and {len(texts) - 6} more" if len(texts) > 6 else ""
        notes.append(f"Lacking runs: {', '.join(texts[:6])}{more} ({reason}).")
    return notes


def csv_text(name: str, values: Values, papers: Papers, scale: str) -> str:
    """A table as CSV, a line per cell: the paper's number, ours, and every seed's."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "scale", "row", "column", "paper", "paper deviation", "mean",
                     "deviation", "by seed"])
    for (row, column), per_seed in values.items():
        writer.writerow([name, scale, row, column, *papers.get((row, column), (None, None))[:2],
                         *mean_and_spread(per_seed), " ".join(map(str, per_seed))])
    return file.getvalue()


def draw_values(values: Values, papers: Papers, path: Any, title: str) -> None:
    """Draw the paper's numbers and ours, a panel per column."""
    units = {"round": "rounds to the target", "speed": "times as fast as FedAvg", "M": "millions",
             "MB": "MB", "MiB": "MiB", "GiB": "GiB"}
    columns: dict[str, dict] = {}
    for (row, column), per_seed in values.items():
        paper, *_ = papers.get((row, column), (None,))
        columns.setdefault(column, {})[row] = paper, *mean_and_spread(per_seed)
    labels = {column: units.get(column.rpartition(", ")[2], "accuracy, %") for column in columns}
    pictures.draw_numbers(path, columns, labels, title)


# --------------------------------------------------------------------------------------------- main

def make(name: str, table: Table, args: Namespace, failed: Mapping[str, str]) -> str:
    """Write a table's Markdown, CSV and picture to results/SCALE; returns the Markdown."""
    # Lines of seeds 0, 1, ..., up to the first that lacks
    known, lines = recorded(args.scale), {}
    ids = {key: list(jobs) for key, jobs in jobs_of(table, args).items()}
    for key, names in ids.items():
        usable = takewhile(lambda run_name: run_name in known and not (
            table.networks and not is_finished(RUNS / args.scale / run_name)), names)
        lines[key] = [known[run_name] for run_name in usable]
    if table.cells and not any(lines.values()):
        return f"{name}: no run is finished" + " whose networks are here" * table.networks

    # Numbers
    measure, papers = table.measure or final, papers_numbers().get(name, {})
    with_runs = {key: runs for key, runs in lines.items() if runs or not table.networks}
    values, remarks, draw = measure(table, with_runs, args)
    seeds = max((len(names) for names in ids.values()), default=1)
    notes = [*notes_of(table, lines, seeds, args), *lacking_runs(ids, lines, failed), *remarks]
    text = markdown(name, table, values, papers, notes)

    # Files
    path = RESULTS / args.scale / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending, content in ((".md", text), (".csv", csv_text(name, values, papers, args.scale))):
        data.write_atomically(path.with_suffix(ending),
                              lambda file, content=content: file.write(content.encode()))
    if any(values.values()):
        draw = draw or partial(draw_values, values, papers)
        data.write_atomically(path.with_suffix(".png"), partial(
            draw, title=f"{table.title} (scale: {args.scale})"))
    return text


def jobs_of(table: Table, args: Namespace) -> dict[Key, dict[str, dict]]:
    """Runs of each cell of a table, by seed: id -> flags."""
    jobs, seeds = {}, 1 if table.networks else args.seeds
    for key, cell in table.cells.items():
        per_seed = [flags_of(cell, args, seed) for seed in range(seeds)]
        jobs[key] = {run_id(flags): flags for flags in per_seed}
    return jobs


def listing(args: Namespace) -> str:
    """Every table and figure, with the number of its runs."""
    lines, every = [], set()
    for name, table in all_tables(args.scale).items():
        ids = {run_name for jobs in jobs_of(table, args).values() for run_name in jobs}
        lines.append(f"{name:14}{len(ids):5} runs  {table.title}")
        every |= ids
    return "\n".join([*lines, f"{'all':14}{len(every):5} runs  all of these, which share runs", "",
                      f"Scale {args.scale}, seeds: {args.seeds} (figures that need networks: 1). "
                      "FedIN's Fig. 1 and 2 and AP-FL's Fig. 1 to 3 are drawings."])


def raise_usage_error(message: str) -> NoReturn:
    """Raise ValueError where argparse would end the process; main prints it as one line."""
    raise ValueError(f"{message} (python tables.py --help lists all flags)")


def read_arguments(words: Sequence[str]) -> Namespace:
    """Read the command line.  Raises ValueError if it is wrong."""
    parser = ArgumentParser(prog="python tables.py", allow_abbrev=False,
                            description=(__doc__ or "").split("\n")[0])
    parser.error = raise_usage_error
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="fedin-1, apfl-fig4, ..., see --list; fedin-2 is "
        "fedin-2a and fedin-2b; or all")
    add("--list", action="store_true", help="print all names and stop")
    add("--scale", choices=SCALES, default="smoke", help="rounds, clients, epochs and images; "
        "smoke (default) is a trial, with digits in place of every data set")
    add("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 per run (default: 3; 1 at the "
        "scale of smoke and for figures that need networks)")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: number of cores, on a GPU "
        "1); 0: tables of finished runs alone (figures still analyse their networks)")
    add("--only", nargs="+", default=[], metavar="TEXT", help="run only rows and columns with such "
        "a text in their names, as CIFAR-10")
    add("--data-dir", default="data", help="folder of downloads, and of your own embeddings-"
        "ENCODER-DATASET.npz (classes, embeddings) for clip, bert or word2vec (default: data)")
    args = parser.parse_args(words)

    # Defaults and bounds
    args.command = shlex.join(["python", "tables.py", *words])
    cores = 1 if torch.cuda.is_available() else run.num_cores()
    args.jobs = cores if args.jobs is None else args.jobs
    args.seeds = SEEDS[args.scale] if args.seeds is None else args.seeds
    if args.seeds < 1 or args.jobs < 0:
        raise ValueError("--seeds must be at least 1, and --jobs at least 0")
    return args


def chosen(names: Sequence[str], tables: Mapping[str, Table]) -> dict[str, Table]:
    """Tables with these names, or these and letters (fedin-2: fedin-2a), in their own order."""
    matching = set()
    for name in names:
        pattern = ".*" if name == "all" else re.escape(name) + "[a-z]*"
        keys = {key for key in tables if re.fullmatch(pattern, key)}
        if not keys:
            raise ValueError(f"unknown name {name}: choose among {', '.join(tables)}, or all")
        matching |= keys

    # In this order, peaks of memory are measured before analyses make this process large
    return {name: table for name, table in tables.items() if name in matching}


def chosen_jobs(tables: Mapping[str, Table], args: Namespace) -> dict[str, dict]:
    """Runs to make: id -> flags.  Raises ValueError if --only has a text that is in no name."""
    known, jobs, names = recorded(args.scale), {}, {}
    for table in tables.values():
        for key, jobs_of_cell in jobs_of(table, args).items():
            names |= dict.fromkeys(key)
            if not args.only or any(text in name for text in args.only for name in key):
                jobs |= {name: flags for name, flags in jobs_of_cell.items()
                         if table.networks or name not in known}
    for text in args.only:
        if not any(text in name for name in names):
            raise ValueError(f"--only {text} is in none of these names: {', '.join(names)}")
    return jobs


def make_all(args: Namespace) -> int:
    """Run what is missing, then make each table; returns the exit status."""
    tables = chosen(args.names, all_tables(args.scale))
    jobs, failed = chosen_jobs(tables, args), {}
    commit()  # cached now, since the code may be another one when runs end
    if jobs and args.jobs > 0:
        failed = run_missing(jobs, args)

    # An error in a table, of whatever kind, leaves the others to be made
    for name, table in tables.items():
        try:
            print(f"\n{make(name, table, args, failed)}", flush=True)
        except Exception as error:
            failed[name] = data.first_line(error)
            print(f"\n{name}: {type(error).__name__}: {failed[name]}", flush=True)
    if (RESULTS / args.scale).exists():
        print(f"results are in {RESULTS / args.scale}")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Make tables; status 0, 1 if a run or table failed, 2 for a user error, 130 if interrupted."""
    try:
        args = read_arguments(sys.argv[1:] if argv is None else argv)
        if args.list or not args.names:
            print(listing(args))
            return 0
        return make_all(args)
    except KeyboardInterrupt:
        print("error: interrupted: type the same command to resume", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(files.one_line(f"error: {error}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout, sys.stderr = pictures.Display(sys.stdout), pictures.Display(sys.stderr)
    sys.exit(main())
