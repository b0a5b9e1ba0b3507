"""Make the papers' tables and figures, each from one command.

    python tables.py --list                         what there is, its runs, and how long they take
    python tables.py fedin-1 --scale small          FedIN, Table 1
    python tables.py all --scale smoke              everything, tiny: to see that it works

For each, Markdown, CSV and a picture go to results/SCALE: the paper's number, ours over the seeds,
and whether methods come in the same order.  Runs lie in runs/tables; what came of a finished one is
a line of results/SCALE/runs.jsonl and is not run again, unless a figure needs its networks and
they are gone; one that was stopped goes on.

Reads from top to bottom: scales; the runs of each table, in plain lists of run.py's flags to change
as you like; data; running what is missing; putting numbers together; the analyses; main().  The
papers' numbers are in results/papers.csv.
"""

import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from itertools import combinations, takewhile
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

import analysis
import apfl
import baselines
import data
import fedin
import files
import generator
import models
import pictures
import run

RUNS, RESULTS = Path("runs/tables"), Path("results")
PAPERS = Path(__file__).with_name("results") / "papers.csv"

# ------------------------------------------------------------------------------------------- scales

# What a scale sets besides --setting fedin or apfl.  A method reads of it what it has.
SMOKE = {"rounds": 2, "local_epochs": 1, "test_images": 60, "eval_every": 1, "checkpoint_every": 2}
SCALES = {
    "smoke": {
        "fedin": SMOKE | {"clients": 8, "participation": 0.25, "train_images": 160},
        "apfl": SMOKE | {"train_images": 400, "generator_steps": 3, "generator_batch": 2,
                         "synthetic_per_class": 2, "friend_epochs": 1, "distillation_steps": 5}},
    "small": {
        "fedin": {"clients": 20, "participation": 0.25, "rounds": 20, "local_epochs": 1,
                  "train_images": 5000, "test_images": 1000, "eval_every": 4},
        "apfl": {"rounds": 10, "local_epochs": 2, "train_images": 5000, "test_images": 1000,
                 "eval_every": 2, "generator_steps": 60, "generator_batch": 10,
                 "synthetic_per_class": 100, "friend_epochs": 3, "distillation_steps": 100}},
    "paper": {"fedin": {"eval_every": 1}, "apfl": {}},
}
SEEDS = {"smoke": 1, "small": 3, "paper": 3}
WIDTHS = {"smoke": "resnet18-widths", "small": "resnet18-widths", "paper": "resnet152-widths"}
CLIENTS = {  # FedIN's Table 5: how many there are for the paper's numbers
    "smoke": {10: 5, 20: 6, 50: 7, 100: 8, 200: 9},
    "small": {10: 5, 20: 8, 50: 12, 100: 20, 200: 40},
    "paper": {10: 10, 20: 20, 50: 50, 100: 100, 200: 200}}
A_ROUND = {"smoke": 2, "small": 5, "paper": 10}  # of these; a tenth of ten would leave no average
SAMPLES = {  # AP-FL's Fig. 5: synthetic samples a class of a friend model
    "smoke": (2, 4), "small": (10, 30, 100, 200), "paper": (50, 200, 400, 600, 800, 1000)}
ATTACK_STEPS = {"smoke": 50, "small": 5000, "paper": 100_000}  # the paper's Fig. 10: a million

# --------------------------------------------------------------------------- the runs of each table


class Cell(NamedTuple):
    """A place in a table: run.py's flags but for scale and seed, and which result it shows."""

    flags: Mapping[str, Any]
    value: str = "accuracy"  # of result.json


Cells = Mapping[tuple[str, str], Cell]  # (row, column) -> cell
Found = Mapping[tuple[str, str], list[dict]]  # (row, column) -> lines of runs of seeds 0, 1, ...
Values = dict[tuple[str, str], list]  # (row, column) -> a value a seed, None where there is none


class Measured(NamedTuple):
    """What comes of a table's runs."""

    values: Values
    extra: Any = None  # what its picture shows besides
    notes: Sequence[str] = ()  # what has to be said of it, in sentences


class Table(NamedTuple):
    """A table or figure of a paper."""

    title: str
    cells: Cells
    measure: Callable[["Table", Found, "Place"], Measured]
    draw: Callable  # (path, measured, papers, title)
    networks: bool = False  # whether measure needs trained networks, so the runs' folders: one seed


SETS = {"Fashion-MNIST": "fashionmnist", "SVHN": "svhn", "CIFAR-10": "cifar10",
        "CIFAR-100": "cifar100", "EMNIST": "emnist"}
SPLITS = {"IID": {"partition": "iid"}, "Non-IID": {"partition": "dirichlet", "alpha": 0.5}}
TARGETS = {"Fashion-MNIST": 85, "SVHN": 80, "CIFAR-10": 60}  # FedIN, Table 1
LEVELS = (0.0, 0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 3.0, 5.0)  # FedIN, Table 6
FEATURES = (8, 16, 32, 64, 128)  # FedIN, Fig. 6c
BATCHES = (1, 2, 3, 4, 5)  # FedIN, Fig. 6d, whose axis is not readable in our copy
NOISE_DIMS = (20, 100, 400, 512)  # AP-FL, Fig. 5


def fedin_methods(scale: str) -> dict[str, dict]:
    """Rows of FedIN's Table 1: method -> its flags."""
    widths = {"model": WIDTHS[scale]}
    return {"FedAvg": {"method": "fedavg"}, "FedProx": {"method": "fedprox"},
            "Scaffold": {"method": "scaffold"}, "FedNova": {"method": "fednova"},
            "MOON": {"method": "moon"}, "HeteroFL": {"method": "heterofl", **widths},
            "InclusiveFL": {"method": "inclusivefl"}, "FedRolex": {"method": "fedrolex", **widths},
            "ScaleFL": {"method": "scalefl", **widths}, "InCoAvg": {"method": "inco"},
            "FedIN": {"method": "fedin"}, "FedIN (+Noise)": {"method": "fedin", "noise": 0.8}}


ABLATIONS = {"FedAvg": {"method": "fedavg"}, "FedIN w/o IN": {"method": "fedin", "ablate": ["in"]},
             "FedIN w/o Prox": {"method": "fedin", "ablate": ["prox"]},
             "FedIN w/o Opt": {"method": "fedin", "ablate": ["opt"]}, "FedIN": {"method": "fedin"}}
APFL_METHODS = {  # AP-FL's rounds are FedAvg's to the last bit, so FedAvg needs no run of its own
    "Local": Cell({"method": "local"}), "FedAvg": Cell({"method": "apfl"}, "global_accuracy"),
    "FedProx": Cell({"method": "fedprox"}), "SCAFFOLD": Cell({"method": "scaffold"}),
    "FedGen": Cell({"method": "fedgen"}), "FedDF": Cell({"method": "feddf"}),
    "AP-FL": Cell({"method": "apfl"})}


def cells(setting: str, rows: Mapping[str, Mapping | Cell],
          columns: Mapping[str, Mapping]) -> Cells:
    """Each row's flags with each column's, in a setting."""
    made = {}
    for row, given in rows.items():
        cell = given if isinstance(given, Cell) else Cell(given)
        for column, flags in columns.items():
            made[row, column] = cell._replace(flags={"setting": setting, **cell.flags, **flags})
    return made


def columns_of(names: Sequence[str], splits: Mapping[str, Mapping] = SPLITS) -> dict[str, dict]:
    """"CIFAR-10, IID" and so on -> flags."""
    return {f"{name}, {split}": {"dataset": SETS[name], **flags}
            for name in names for split, flags in splits.items()}


def fedin_tables(scale: str) -> dict[str, Table]:
    """FedIN's Tables 1 to 6, and one of all methods in its setting."""
    methods, sets = fedin_methods(scale), list(SETS)[:3]
    cifar, non_iid = columns_of(["CIFAR-10"]), {"Non-IID": SPLITS["Non-IID"]}

    def several(names: str, **flags: Any) -> dict[str, dict]:
        return {name: methods[name] | flags for name in names.split(", ")}

    counts = {f"{split}, {count} clients": {
        "dataset": "cifar10", "clients": own, "participation": A_ROUND[scale] / own, **flags}
              for split, flags in SPLITS.items() for count, own in CLIENTS[scale].items()}
    apart = several("FedAvg, FedProx, Scaffold, FedNova, MOON, InclusiveFL, FedIN",
                    aggregation="per-architecture")
    noise = {f"noise {level:g}": {"method": "fedin", "noise": level} for level in LEVELS}
    apfl_scale = SCALES[scale]["apfl"]
    stages = {name: value for name, value in apfl_scale.items() if name in STAGES}
    steps = {name: apfl_scale[name] for name in ("distillation_steps",) if name in apfl_scale}
    ours = {"Local": {"method": "local"}, **methods, **{f"{name}, CNN": {
        "method": name.lower(), "model": "cnn"} for name in ("FedAvg", "FedAvg-FT", "FedGen")},
            "FedDF, CNN": {"method": "feddf", "model": "cnn", **steps},
            "AP-FL, CNN": {"method": "apfl", "model": "cnn", **stages}}
    return {
        "fedin-1": Table("FedIN, Table 1: accuracy, %; rounds to the target in non-IID, and how "
                         "many times fewer than FedAvg", cells("fedin", methods, columns_of(sets)),
                         with_rounds, plot_numbers),
        "fedin-2a": Table("FedIN, Table 2a: accuracy, %, where all clients have ResNet18", cells(
            "fedin", several("FedProx, Scaffold, FedNova, MOON, FedIN", model="resnet18"), cifar),
            final, plot_numbers),
        "fedin-2b": Table("FedIN, Table 2b: accuracy, %, without one part or another",
                          cells("fedin", ABLATIONS, cifar), final, plot_numbers),
        "fedin-3": Table("FedIN, Table 3: accuracy, %, averages within each architecture alone",
                         cells("fedin", apart, columns_of(["Fashion-MNIST"])), final, plot_numbers),
        "fedin-4": Table("FedIN, Table 4: what a method costs", cells(
            "fedin", several("FedAvg, Scaffold, MOON, HeteroFL, FedRolex, FedIN"),
            columns_of(["CIFAR-10"], non_iid)), overheads, plot_numbers),
        "fedin-5": Table("FedIN, Table 5: accuracy, %, by the number of clients, CIFAR-10", cells(
            "fedin", several("FedAvg, InclusiveFL, FedIN"), counts), by_clients, plot_numbers),
        "fedin-6": Table("FedIN, Table 6: accuracy, %, by the noise on the features, non-IID",
                         cells("fedin", noise, {name: {"dataset": SETS[name], **SPLITS["Non-IID"]}
                                                for name in sets}), final, plot_numbers),
        "methods": Table("Every method in FedIN's setting: accuracy, %, non-IID",
                         cells("fedin", ours, columns_of(["CIFAR-10", "Fashion-MNIST"], non_iid)),
                         final, plot_numbers)}


def fedin_figures(scale: str) -> dict[str, Table]:
    """FedIN's figures with anything measured in them: 3 to 10."""
    methods = fedin_methods(scale)
    three = {name: methods[name] for name in ("FedAvg", "InclusiveFL", "FedIN")}
    non_iid = columns_of(["CIFAR-10"], {"Non-IID": SPLITS["Non-IID"]})
    ((_, skewed),) = non_iid.items()
    sizes = {str(size): skewed | {"feature_batch_size": size} for size in FEATURES}
    batches = {str(count): skewed | {"feature_batches": count} for count in BATCHES}
    own = {"FedIN": methods["FedIN"]}
    both = cells("fedin", {"without noise": methods["FedIN"],
                           "with noise": methods["FedIN (+Noise)"]}, non_iid)
    return {
        "fedin-fig3": Table("FedIN, Fig. 3: features s_out of five architectures, t-SNE",
                            cells("fedin", {"FedAvg": three["FedAvg"]}, non_iid),
                            scattered_architectures, plot_points, networks=True),
        "fedin-fig4": Table("FedIN, Fig. 4: images reconstructed from features", both, attacked,
                            partial(plot_reconstruction, False), networks=True),
        "fedin-fig5": Table("FedIN, Fig. 5: smoothed accuracy, non-IID CIFAR-10",
                            cells("fedin", methods, non_iid), to_the_target,
                            partial(plot_curves, "smoothed accuracy, %")),
        "fedin-fig6ab": Table("FedIN, Fig. 6a and 6b: mean CKA between clients, by stage", cells(
            "fedin", three, columns_of(["CIFAR-10"])), similarity, plot_stages, networks=True),
        "fedin-fig6c": Table("FedIN, Fig. 6c: accuracy, %, by |S|, non-IID CIFAR-10", cells(
            "fedin", own, sizes), final, partial(plot_sweep, "features in a batch, |S|")),
        "fedin-fig6d": Table("FedIN, Fig. 6d: accuracy, %, by the number of batches, non-IID "
                             "CIFAR-10", cells("fedin", own, batches), final,
                             partial(plot_sweep, "batches of features")),
        "fedin-fig7": Table("FedIN, Fig. 7: CKA between clients, stages 2 and 3, non-IID CIFAR-10",
                            cells("fedin", three, non_iid), similarity, plot_maps, networks=True),
        "fedin-fig8": Table("FedIN, Fig. 8: stage 3 features of one class, t-SNE, non-IID CIFAR-10",
                            cells("fedin", three, non_iid), scattered_clients, plot_points,
                            networks=True),
        "fedin-fig9": Table("FedIN, Fig. 9: smoothed accuracy, ablations, non-IID CIFAR-10",
                            cells("fedin", ABLATIONS, non_iid), over_rounds,
                            partial(plot_curves, "smoothed accuracy, %")),
        "fedin-fig10": Table("FedIN, Fig. 10: reconstruction from features, with and without noise",
                             both, attacked, partial(plot_reconstruction, True), networks=True)}


def apfl_tables(scale: str) -> dict[str, Table]:
    """AP-FL's tables and those of its figures with anything measured in them."""
    sets = ["CIFAR-10", "CIFAR-100", "EMNIST", "Fashion-MNIST"]
    skewed = {f"{clients} clients, alpha {alpha:g}": {"clients": clients, "alpha": alpha}
              for clients in (5, 10) for alpha in (0.01, 0.05, 0.1)}
    mild = {name: split for name, split in skewed.items() if split["alpha"] == 0.1}
    missing = {f"{percent} % missing": {"missing_classes": percent / 100} for percent in (10, 20)}
    late = {  # FedAvg-FT does what AP-FL's dropouts do before there is a generator
        "Local": Cell({"method": "local"}, "dropout_accuracy"),
        "FedAvg-FT": Cell({"method": "apfl"}, "dropout_client_accuracy"),
        "AP-FL": Cell({"method": "apfl"}, "dropout_personalised_accuracy")}
    friends = {mean: {name: Cell({"method": "apfl", "semantics": encoder, "missing_classes": 0.2},
                                 f"{whose}friend_personal_accuracy") for name, encoder in
                      (("word2vec", "word2vec"), ("BERT", "bert"), ("CLIP", "clip"))}
               for mean, whose in (("A_n", ""), ("A_d", "dropout_"))}
    semantics = {key: cell for mean, rows in friends.items() for key, cell in cells(
        "apfl", rows, columns_of(sets, {mean: {}})).items()}
    friend = Cell({"method": "apfl", "clients": 10, "alpha": 0.1}, "friend_accuracy")
    swept = {row: friend._replace(flags={**friend.flags, "dataset": SETS[name]}) for row, name in (
        ("CIFAR-10", "CIFAR-10"), ("EMNIST", "EMNIST"),
        ("Fashion-MNIST (not in the paper)", "Fashion-MNIST"))}
    dims = {str(dim): {"noise_dim": dim} for dim in NOISE_DIMS}
    samples = {str(count): {"synthetic_per_class": count} for count in SAMPLES[scale]}
    four = {name: {"dataset": SETS[name], "clients": 5, "alpha": alpha}
            for name, alpha in zip(sets, (0.01, 0.05, 0.1, 0.1))}
    return {
        "apfl-1": Table("AP-FL, Table 1: classes of each client in the dropout setting", {},
                        dealt_classes, plot_classes),
        "apfl-2": Table("AP-FL, Table 2: accuracy on the whole test set, %", cells(
            "apfl", APFL_METHODS, columns_of(sets[:3], skewed) | columns_of(sets[3:], mild)),
            final, plot_numbers),
        "apfl-3": Table("AP-FL, Table 3: accuracy of the dropout client on the whole test set, %",
                        cells("apfl", late, columns_of(sets, missing)), final, plot_numbers),
        "apfl-4": Table("AP-FL, Table 4: accuracy of friend models on clients' own shares of the "
                        "test set, %; A_n: clients that took part, A_d: the dropout client",
                        semantics, final, plot_numbers),
        "apfl-fig4": Table("AP-FL, Fig. 4: accuracy over rounds, five clients; star: AP-FL's "
                           "personalised models", cells("apfl", APFL_METHODS, four), unsmoothed,
                           partial(plot_curves, "accuracy, %")),
        "apfl-fig5a": Table("AP-FL, Fig. 5: friend models' accuracy, %, by the length of the noise",
                            cells("apfl", swept, dims), final, partial(plot_sweep, "length of z")),
        "apfl-fig5b": Table("AP-FL, Fig. 5: friend models' accuracy, %, by the number of samples",
                            cells("apfl", swept, samples), final,
                            partial(plot_sweep, "synthetic samples a class"))}


def all_tables(scale: str) -> dict[str, Table]:
    """Name -> what there is to make.  (The papers' other figures are drawings.)"""
    return fedin_tables(scale) | fedin_figures(scale) | apfl_tables(scale)


# --------------------------------------------------------------------------------------------- data

class Place(NamedTuple):
    """Where a command works."""

    scale: str
    seeds: int
    jobs: int
    data_dir: str
    command: str  # as it was typed
    only: tuple[str, ...] = ()  # words of which a row or column has to have one to be run

    @property
    def results(self) -> Path:
        return RESULTS / self.scale


FULL = {"digits": (1437, 360), "svhn": (73257, 26032), "cifar10": (50000, 10000),
        "cifar100": (50000, 10000), "emnist": (124800, 20800), "fashionmnist": (60000, 10000)}
COLOURED = {"svhn", "cifar10", "cifar100"}
STAND_INS = RUNS / "smoke"


def flags_of(cell: Cell, place: Place, seed: int) -> dict:
    """Of a cell's run: flag -> value."""
    flags = dict(cell.flags)
    taken = {flag.name for flag in run.COMMON} | run.METHODS[flags["method"]].defaults.keys()
    scaled = {name: value for name, value in SCALES[place.scale][flags["setting"]].items()
              if name in taken}
    name, flags["dataset"] = flags["dataset"], dataset(flags["dataset"], place)
    if flags["method"] == "apfl":
        flags["semantics"] = embeddings(flags.get("semantics"), name, place)
    if flags["dataset"] in data.DOWNLOADED or flags.get("semantics") in generator.ENCODERS:
        flags["data_dir"] = place.data_dir
    return {**scaled, **flags, "seed": seed}


def dataset(name: str, place: Place) -> str:
    """What stands for a data set: itself, but at the scale of smoke something small.

    That is digits for gray sets of ten classes (and SVHN), and for others random images where the
    set is not there: nothing is downloaded.
    """
    if place.scale != "smoke" or data.cache_path(name, place.data_dir).exists():
        return name
    return "digits" if name in ("fashionmnist", "svhn") else str(STAND_INS / f"random-{name}.npz")


def embeddings(encoder: str | None, name: str, place: Place) -> str:
    """What stands for an encoder's embeddings of a data set's classes, for --semantics.

    encoder: None: CLIP, or word vectors where their file is there and none of CLIP's
    A file embeddings-ENCODER-DATASET.npz in --data-dir with classes and embeddings goes before the
    encoder; at the scale of smoke random ones, one a class, if there is none.
    """
    used = dataset(name, place)
    for choice in [encoder] if encoder else ["clip", "word2vec"]:
        path = Path(place.data_dir) / f"embeddings-{choice}-{name}.npz"
        if path.exists() and used == name:
            return str(path)
    if place.scale != "smoke":
        return encoder or "clip"
    stem = Path(used).stem.removeprefix("random-")
    return str(STAND_INS / f"random-{encoder or 'clip'}-{stem}.npz")


def write_stand_ins(flags: Mapping[str, Any], place: Place) -> None:
    """Write the random images and embeddings that a run needs, if they are not there yet."""
    for path in (Path(flags[name]) for name in ("dataset", "semantics") if name in flags):
        if path.parent != STAND_INS or path.exists():
            continue
        _, *encoder, name = path.stem.split("-")
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = random_embeddings(*encoder, flags["dataset"], place.data_dir) if encoder else (
            random_images(name))
        data.write_atomically(path, lambda file: np.savez(file, **arrays))


def random_images(name: str) -> dict[str, np.ndarray]:
    """As many classes as a data set has, each of a random look, in noise; arrays of an .npz."""
    classes = {"cifar10": 10, "cifar100": 100, "emnist": 26}[name]
    rng = np.random.default_rng(classes)
    shape = (32, 32, 3) if name in COLOURED else (32, 32)
    looks, arrays = rng.integers(256, size=(classes, *shape)), {}
    for part, count in (("train", 1000), ("test", 200)):
        labels = np.arange(count) % classes
        noisy = looks[labels] / 2 + rng.integers(128, size=(count, *shape))
        arrays |= {f"x_{part}": noisy.astype(np.uint8), f"y_{part}": labels}
    return arrays


def random_embeddings(encoder: str, name: str, data_dir: str) -> dict[str, np.ndarray]:
    """A random vector for each class of a data set, another one by encoder; arrays of an .npz."""
    classes = data.load(name, data_dir).classes
    rng = np.random.default_rng([("clip", "bert", "word2vec").index(encoder), len(classes)])
    return {"classes": np.array(classes), "embeddings": rng.normal(size=(len(classes), 16))}


def stand_ins(cells: Sequence[Cell], place: Place) -> list[str]:
    """What is not what the paper has, in sentences."""
    said = {}
    for cell in cells:
        flags, used = cell.flags, flags_of(cell, place, 0)
        name = flags["dataset"]
        if used["dataset"] != name:
            what = "digits" if used["dataset"] == "digits" else "random images"
            said[f"In place of {name}: {what}."] = None
        if "semantics" in used and used["semantics"] != flags.get("semantics", "clip"):
            which = Path(used["semantics"]).stem.split("-")[:2]
            said[f"Embeddings of {name}: {' '.join(reversed(which))}."] = None
    return list(said)


# -------------------------------------------------------------------------- running what is missing

MACHINE = ("device", "workers", "threads", "data_dir", "checkpoint_every")  # of no account
STAGES = {  # flags of AP-FL -> the first stage after the rounds that they have a part in
    **dict.fromkeys(("semantics", "word_vectors", "teacher", "distance", "lambda", "noise_dim",
                     "generator_steps", "generator_batch"), "generator"),
    **dict.fromkeys(("friend_labels", "synthetic_per_class", "friend_epochs"), "friends"),
    **dict.fromkeys(("beta", "beta_on"), "end")}


class Job(NamedTuple):
    """A run that a table needs."""

    flags: dict  # of run.py
    settings: dict  # as it resolves them
    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def rounds(self) -> str:
        """What its rounds are; equal ones need not be run twice."""
        return digest({name: value for name, value in self.settings.items() if name not in STAGES})


def digest(settings: Mapping[str, Any]) -> str:
    """Of settings that say what comes of a run: ten hexadecimal digits.

    Without those that are off, so that a flag which run.py may get one day changes no others; an
    encoder is the same whether it is run or a file has what it gave.
    """
    said = {name: Path(value).name if isinstance(value, str) else value for name, value in
            settings.items() if not (name in MACHINE or value is None or value is False
                                     or value == [])}
    if said.get("semantics", "").startswith("embeddings-"):
        said["semantics"] = said["semantics"].split("-")[1]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:10]


def job_of(cell: Cell, place: Place, seed: int) -> Job:
    """The run of a cell."""
    flags = flags_of(cell, place, seed)
    settings = run.resolve(flags)
    name = f"{settings['method']}-{Path(settings['dataset']).stem}-{seed}-{digest(settings)}"
    return Job(flags, settings, RUNS / place.scale / name)


def command_line(flags: Mapping[str, Any]) -> list[str]:
    """Flags and values as they are typed."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [baselines.typed_as(name), *map(str, values)]
    return words


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end, and its networks are there."""
    return (folder / "result.json").exists() and (folder / "checkpoint.pt").exists()


def arguments(job: Job, siblings: Sequence[Job]) -> list[str]:
    """What to tell run.py: to begin, or to go on with what is there.

    siblings: other runs, after whose rounds a new one begins if they are the same
    """
    if not (job.folder / "config.json").exists():
        others = (other for other in siblings if other.rounds == job.rounds and other.id != job.id
                  and is_finished(other.folder))
        other = next(others, None)
        if job.settings["method"] != "apfl" or other is None:
            return [*command_line(job.flags), "--out", str(job.folder)]
        begin_after_rounds(job, other)
    moved = {name: job.flags[name] for name in ("data_dir", "semantics") if name in job.flags}
    return ["--resume", "--out", str(job.folder), *command_line(moved)]


def begin_after_rounds(job: Job, other: Job) -> None:
    """Make the folder of a run that begins where the rounds of another end, whose it shares.

    Stages that the two have in common are taken over too.
    """
    before = files.read_config(other.folder)
    differ = {STAGES[name] for name in STAGES if before.get(name) != job.settings.get(name) and
              not (job.settings.get(name) is None and name == "beta")}
    order = ["late", "generator", "friends", "end"]
    kept = order[:min(map(order.index, differ), default=len(order))]
    progress = files.load_checkpoint(other.folder, "cpu")
    after = {name: outcome for name, outcome in progress.after.items() if name in kept}
    settings = before | {name: job.settings[name] for name in STAGES if name in job.settings}
    settings["digests"] = {name: value for name, value in before["digests"].items()
                           if name not in STAGES}
    job.folder.mkdir(parents=True, exist_ok=True)
    lines = (other.folder / "metrics.jsonl").read_bytes()
    data.write_atomically(job.folder / "metrics.jsonl", lambda file: file.write(lines))
    files.save_checkpoint(job.folder, progress._replace(after=after))
    files.write_json(job.folder / "config.json", settings)  # the last: with it there is a run


def begin_worker(jobs: int) -> None:
    """Set up one of so many processes that make runs: its share of the cores, and its end.

    It ends with the process that started it, however that one does, which alone hears Ctrl-C.
    """
    def end_with_parent() -> None:
        wait_for_any([multiprocessing.parent_process().sentinel])
        os._exit(1)

    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        number = int(multiprocessing.current_process().name.rpartition("-")[2])
        os.sched_setaffinity(0, cores[number % jobs::jobs] or cores)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=end_with_parent, daemon=True).start()


_stopped, _running = threading.Event(), threading.Event()  # of a process that makes runs


def stop(*_: object) -> None:
    """End the run that is going, as Ctrl-C would, and begin no other: what SIGTERM does."""
    _stopped.set()
    if _running.is_set():
        raise KeyboardInterrupt


def do(argv: Sequence[str], log: Path) -> tuple[int, str, float]:
    """Run run.py in this process: its exit status, what it said last, peak memory in GiB."""
    if _stopped.is_set():
        return 130, "stopped", 0.0
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        _running.set()
        status = run.main(list(argv))
        _running.clear()
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
    return status, last[0] if last else "", peak_so_far()


def peak_so_far() -> float:
    """The most memory that this process has had, in GiB."""
    status = Path("/proc/self/status")  # the other source counts what its parent had
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**20
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(
        30 if sys.platform == "darwin" else 20)


def pool_of(jobs: int) -> ProcessPoolExecutor:
    """Processes for so many runs at a time, each on its own cores."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), begin_worker, (jobs,))


def run_missing(jobs: Sequence[Job], siblings: Sequence[Job], place: Place) -> dict[str, str]:
    """Make the runs that are not finished, place.jobs at a time; what went wrong, by run.

    Of runs with the same rounds the first goes ahead, and the others begin where those end, as they
    do where those of siblings end, other runs that may be there.
    """
    failed = impossible(jobs, place)
    left = [job for job in jobs if job.id not in failed and not is_finished(job.folder)]
    lines = recorded(place)
    for job in jobs:
        if is_finished(job.folder) and job.id not in lines:  # stopped between the two
            record(job, place)
    if not left:
        return failed
    for job in left:
        write_stand_ins(job.flags, place)
    cost = {job.id: seconds(job.settings) for job in left}
    groups: dict[str, list[Job]] = {}
    for job in sorted(left, key=lambda job: (job.settings["seed"], -cost[job.id])):
        groups.setdefault(job.rounds, []).append(job)
    bar = pictures.watch(None, "", "s", total=round(sum(cost.values())),
                         bar_format="{desc}{percentage:3.0f} % [{elapsed}, {remaining} left]")
    going: dict = {}
    with pool_of(place.jobs) as pool:
        def begin(group: list[Job]) -> None:
            if group:
                job = group.pop(0)
                argv = arguments(job, [*jobs, *siblings])
                work = pool.submit(do, argv, job.folder.with_suffix(".log"))
                going[work] = job, group

        try:
            for group in groups.values():
                begin(group)
            ended: dict[str, Job] = {}
            while going:
                finished, _ = wait(going, timeout=2, return_when=FIRST_COMPLETED)
                for work in finished:
                    job, group = going.pop(work)
                    status, said, _ = work.result()
                    if status == 0:
                        record(job, place)
                    else:
                        failed[job.id] = said
                        bar.write(f"{job.id}: {said}", file=sys.stdout)
                    ended[job.id] = job
                    begin(group)
                bar.n = round(sum(map(cost.get, ended)) + sum(
                    cost[job.id] * share_done(job) for job, _ in going.values()))
                bar.set_description_str(f"{len(ended)} of {len(left)} runs: ")
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    bar.close()
    return failed


def impossible(jobs: Sequence[Job], place: Place) -> dict[str, str]:
    """Run -> why it cannot be made, of those that lack their data set or embeddings."""
    lacking = {name: absent(name, place) for name in {job.settings["dataset"] for job in jobs}}
    return {job.id: reason for job in jobs if (
        reason := lacking[job.settings["dataset"]] or without_vectors(job.flags, place))}


def absent(name: str, place: Place) -> str:
    """Why a data set cannot be had, in a line; "" if it can."""
    if name in data.DOWNLOADED and not data.cache_path(name, place.data_dir).exists():
        try:
            data.load(name, place.data_dir)
        except ValueError as error:
            return str(error)
    return ""


def without_vectors(flags: Mapping[str, Any], place: Place) -> str:
    """Why a run cannot have its word vectors, in a line; "" if it can, or has no need of any."""
    if flags.get("semantics") != "word2vec":
        return ""
    return (f"there are no word vectors: put embeddings-word2vec-{flags['dataset']}.npz, with "
            f"classes and embeddings, into {place.data_dir}")


def share_done(job: Job) -> float:
    """How much of a run's rounds is done, as far as its log tells."""
    try:
        lines = (job.folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0.0
    return min(0.99, lines * job.settings["eval_every"] / job.settings["rounds"])


# Seconds a training image on one core with AVX-512, by the network; other ResNets as the five.
PACE = {"cnn": 0.8e-3, "resnets": 3.2e-3, "resnet18": 3.2e-3, "resnet18-widths": 4e-3,
        "resnet152-widths": 40e-3}
SLOWER = {"fedin": 1.6, "moon": 1.6, "feddf": 2.0}
A_SAMPLE = 11e-3  # seconds of the generator's training a sample and step


def seconds(settings: Mapping[str, Any]) -> float:
    """About how long a run takes on one core, from the images that pass through networks."""
    stem = Path(settings["dataset"]).stem.removeprefix("random-")
    train, test = (settings.get(f"{part}_images") or count
                   for part, count in zip(("train", "test"), FULL.get(stem, (50000, 10000))))
    pace = PACE.get(settings["model"], PACE["resnets"])
    clients, method = settings["clients"], settings["method"]
    share = settings.get("participation", 1)
    passes = settings["rounds"] * settings["local_epochs"] * train * share
    models_used = clients if method == "local" else len(models.MODELS[settings["model"]])
    evaluations = settings["rounds"] / settings["eval_every"] * models_used
    total = pace * (passes * SLOWER.get(method, 1) + evaluations * test / 3)  # forward: a third
    if method == "apfl":
        classes = {"cifar100": 100, "emnist": 26}.get(stem, 10)
        total += settings["generator_steps"] * settings["generator_batch"] * classes * A_SAMPLE
        total += pace * clients * classes * (settings["synthetic_per_class"]
                                             * settings["friend_epochs"])
        curve = 11 * min(test, apfl.BETA_TEST_IMAGES)  # over as many betas
        total += pace / 3 * clients * (3 * test + curve)  # three kinds of models
    return 3 + total  # to start


# ------------------------------------------------------------------- what came of runs, in one file

def record(job: Job, place: Place) -> None:
    """Add a line on a finished run to runs.jsonl: what came of it, and from which data."""
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    append(place, job.id, job.flags,
           result=json.loads((job.folder / "result.json").read_text()),
           rounds=[entry["round"] for entry in lines],
           accuracy=[files.in_round(entry) for entry in lines],
           digests=files.read_config(job.folder)["digests"])


def append(place: Place, name: str, flags: Mapping[str, Any], **found: Any) -> None:
    """Add a line to runs.jsonl, with command, commit and machine."""
    line = {"id": name, "command": shlex.join(["python", "run.py", *command_line(flags)]),
            "commit": commit(), "machine": machine(), **found}
    place.results.mkdir(parents=True, exist_ok=True)
    path = place.results / "runs.jsonl"
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def recorded(place: Place) -> dict[str, dict]:
    """Run -> its line in runs.jsonl, the last if there are several; a torn line is none."""
    path, found = place.results / "runs.jsonl", {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[line["id"]] = line
    return found


@cache
def commit() -> str:
    """Of this code, with + if it was changed since."""
    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True, check=True,
                                  cwd=Path(__file__).parent).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)


@cache
def machine() -> str:
    """Processor, cores, and the GPU if there is one."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if (
        Path("/proc/cpuinfo").exists()) else [platform.processor()]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.machine()}, {run.num_cores()} cores{gpu}"


# ----------------------------------------------------------------------- from runs to what is shown

def final(table: Table, found: Found, place: Place) -> Measured:
    """The result that each cell names, of every run."""
    return Measured({key: [line["result"].get(table.cells[key].value) for line in lines]
                     for key, lines in found.items()})


def by_clients(table: Table, found: Found, place: Place) -> Measured:
    """Final accuracies (FedIN, Table 5)."""
    own = CLIENTS[place.scale]
    stand_for = "" if place.scale == "paper" else "Numbers of clients here: " + ", ".join(
        f"{ours} for {theirs}" for theirs, ours in own.items()) + "; "
    return final(table, found, place)._replace(notes=[
        f"{stand_for}{A_ROUND[place.scale]} of them take part in each round (the paper does not "
        "say how many)."])


def of_common_seeds(found: Found) -> Found:
    """The cells that have any runs, each with as many as every one of its column, for its seeds."""
    fewest: dict[str, int] = {}
    for (_, column), lines in found.items():
        if lines:
            fewest[column] = min(len(lines), fewest.get(column, len(lines)))
    return {key: lines[:fewest[key[1]]] for key, lines in found.items() if lines}


def mean_curves(found: Found, weight: float) -> dict[tuple[str, str], tuple[list, list, list]]:
    """(Row, column) -> rounds, mean accuracy and its deviation over seeds, smoothed.

    weight: of what was before
    """
    curves = {}
    for key, lines in found.items():
        by_seed = np.array([analysis.smoothed(line["accuracy"], weight) for line in lines])
        spread = by_seed.std(axis=0, ddof=1) if len(lines) > 1 else 0 * by_seed[0]
        curves[key] = lines[0]["rounds"], by_seed.mean(axis=0), spread
    return curves


def targets_of(name: str, found: Found, place: Place) -> list[float]:
    """By seed, the accuracy whose round is looked for: the paper's, or by what FedAvg reaches.

    That is, at other scales, nine tenths of its last accuracy, non-IID, with the same seed.
    """
    if place.scale == "paper":
        return [TARGETS[name]] * place.seeds
    return [0.9 * line["accuracy"][-1] for line in found.get(("FedAvg", f"{name}, Non-IID"), [])]


def with_rounds(table: Table, found: Found, place: Place) -> Measured:
    """Accuracies, and by data set the round of the target and the speed against FedAvg's."""
    accuracies, values, said = final(table, found, place).values, {}, []
    for name in TARGETS:
        targets = targets_of(name, found, place)
        said += [f"{name} {statistics.mean(targets):.1f}"] if targets else []
        for (row, column), lines in found.items():
            if column.startswith(f"{name}, "):
                values[row, column] = accuracies[row, column]
            if column == f"{name}, Non-IID" and targets:
                values[row, f"{name}, round"] = [
                    analysis.rounds_to_target(line["rounds"], line["accuracy"], target)
                    for line, target in zip(lines, targets)]
        for row in dict.fromkeys(row for row, _ in found):
            base, own = (values.get((which, f"{name}, round"), []) for which in ("FedAvg", row))
            base, own = zip(*zip(base, own)) if own else ((), ())  # the seeds of both
            if own and None not in base + own:
                values[row, f"{name}, speed"] = [
                    analysis.speed_up(statistics.mean(base), statistics.mean(own))]
    return Measured(values, None, [
        f"Targets, %: {', '.join(said)}{how_targets(place)}."] if said else [])


def how_targets(place: Place) -> str:
    """Where targets come from, if not from the paper."""
    return "" if place.scale == "paper" else (
        ", nine tenths of what FedAvg reaches with the same seed, non-IID")


def over_rounds(table: Table, found: Found, place: Place, weight: float = analysis.SMOOTHING
                ) -> Measured:
    """Final accuracies; and smoothed curves by panel, the column (FedIN, Fig. 5 and 9)."""
    panels, common = {}, of_common_seeds(found)
    for (row, column), curve in mean_curves(common, weight).items():
        panels.setdefault(column, {})[row] = curve
    seeds = " and ".join(sorted({str(len(lines)) for lines in common.values()}))
    return Measured(final(table, found, place).values, {"lines": panels}, [
        f"Curves are means over the seeds that all of a panel have (how many: {seeds}), with a "
        f"band of their deviation, smoothed exponentially with weight {weight} (the papers state "
        "none)."])


def to_the_target(table: Table, found: Found, place: Place) -> Measured:
    """As over_rounds, and by panel the target accuracy of Table 1 (FedIN, Fig. 5)."""
    values, extra, notes = over_rounds(table, found, place)
    by_seed = {column: targets_of(column.split(", ")[0], of_common_seeds(found), place)
               for _, column in found}
    targets = {column: statistics.mean(each) for column, each in by_seed.items() if each}
    return Measured(values, extra | {"targets": targets}, [
        *notes, *(f"Target: {value:.1f} %{how_targets(place)}." for value in targets.values())])


def unsmoothed(table: Table, found: Found, place: Place) -> Measured:
    """Final accuracies; curves by panel, and what AP-FL ends at (AP-FL, Fig. 4)."""
    values, extra, _ = over_rounds(table, found, place, weight=0)
    ends = {(column, "AP-FL"): statistics.mean(line["result"]["accuracy"] for line in lines)
            for (row, column), lines in of_common_seeds(found).items() if row == "AP-FL"}
    return Measured(values, extra | {"ends": ends}, [
        "AP-FL's rounds are FedAvg's, so its line covers that one's; what it does after the last "
        "round leads to the star."])


# ------------------------------------------------------------------------------------- the analyses

def overheads(table: Table, found: Found, place: Place) -> Measured:
    """FedIN's Table 4: by rule for the paper's networks, and as measured at this scale."""
    def states(name: str) -> list[dict]:
        return [models.shapes(arch, 3, 10) for arch in models.MODELS[name]]

    nets, widths = states("resnets"), states("resnet152-widths")
    image = torch.empty(1, 3, 32, 32, device="meta")
    net = models.build_empty("resnet18", 3, 10, image.device).eval()
    features = sum(part.numel() for part in fedin.fedin_further_traffic(
        net, image, feature_batch_size=fedin.FEATURE_BATCH_SIZE,
        feature_batches=fedin.FEATURE_BATCHES))
    rules = {"FedAvg": (nets, {}, {}), "Scaffold": (nets, {"copies": 2}, {"copies": 2}),
             "MOON": (nets, {}, {"copies": 3}), "HeteroFL": (widths, {}, {"copies": 2}),
             "FedRolex": (widths, {}, {"copies": 2}),
             "FedIN": (nets, {"further": features}, {"further": features})}
    values = {}
    for (row, column), lines in found.items():
        sent_by, sends, keeps = rules[row]
        whole = sent_by[-1:] if sent_by is widths else sent_by
        values[row, "parameters sent, M"] = [
            analysis.mean_millions(sent_by, models.is_parameter, **sends)]
        values[row, "memory by rule, MiB"] = [analysis.memory_mib(whole, **keeps)]
        job = job_of(table.cells[row, column], place, 0)
        sent = run.num_participants(job.settings) * job.settings["rounds"]
        values[row, "measured: MB up a client, round"] = [
            line["result"]["upload_mb"] / sent for line in lines]
        values[row, "measured: peak of the process, GiB"] = [
            peak_memory(job, place) for _ in lines[:1]]
    return Measured(values, None, [
        "By rule: the paper's networks with heads of ten classes, colour images. The paper's 16.29 "
        "is of HeteroFL's networks with heads of 1000 classes; with ten it is 15.51. Memory is the "
        "states of one client of each network (HeteroFL, FedRolex: of the whole ResNet152), as "
        "often as a method keeps them.",
        f"Measured: with the networks of this scale ({WIDTHS[place.scale]} for HeteroFL and "
        "FedRolex). Peaks are of a process of its own that does the first two rounds, the library "
        "and the data among them."])


def peak_memory(job: Job, place: Place) -> float | None:
    """Peak memory, in GiB, of a process that does the first two rounds of a run.

    It is kept in runs.jsonl, and measured if it is not there and runs may be made, else None.
    """
    name, flags = f"{job.id}-peak", job.flags | {"rounds": 2, "eval_every": 2}
    before = recorded(place).get(name)
    if before is not None or place.jobs == 0:
        return before and before["peak_gib"]
    with tempfile.TemporaryDirectory() as folder, pool_of(1) as pool:
        status, _, peak = pool.submit(do, [*command_line(flags), "--out", f"{folder}/run"],
                                      Path(folder) / "log").result()
    if status == 0:
        append(place, name, flags, peak_gib=peak)
    return peak if status == 0 else None


@cache
def look(folder: Path) -> analysis.Look:
    """How alike the clients of a run see, found out once for all figures."""
    return analysis.look(folder)


def folder_of(lines: Sequence[dict], place: Place) -> Path:
    """Where the first of these finished runs has its files."""
    return RUNS / place.scale / lines[0]["id"]


def similarity(table: Table, found: Found, place: Place) -> Measured:
    """Mean CKA between different clients by stage; and what was looked at, by row and column."""
    values, looks = {}, {}
    for (row, column), lines in found.items():
        if lines:
            seen = looks[row, column] = look(folder_of(lines, place))
            stages = {f"stage {number}": similar for number, similar in enumerate(seen.maps)}
            stages["stage 3, unbiased"] = seen.unbiased[3]
            for stage, similar in stages.items():
                values[row, f"{column}, {stage}"] = [analysis.mean_similarity(similar)]
    images = len(next(iter(looks.values())).labels)
    return Measured(values, looks, [
        f"Clients are as after one more round of local training. CKA of {images:,} test images, "
        "between different clients, by the biased estimate (the paper names none): features that "
        f"have nothing in common have up to {512 / (512 + images):.2f} in stage 3, of 512 numbers, "
        "where the unbiased one has 0."])


def scattered_clients(table: Table, found: Found, place: Place) -> Measured:
    """Fig. 8: of one class, from a client with ResNet10, with ResNet14, with ResNet26."""
    return scattered(found, place, ("resnet10", "resnet14", "resnet26"), 200, label=0)


def scattered_architectures(table: Table, found: Found, place: Place) -> Measured:
    """Fig. 3: of all classes, from a client of each architecture."""
    return scattered(found, place, models.MODELS["resnets"], 100)


def scattered(found: Found, place: Place, archs: Sequence[str], images: int,
              label: int | None = None) -> Measured:
    """t-SNE of the stage 3 features of some networks, of so many images, of one class if given."""
    values, panels = {}, {}
    for (row, _), lines in found.items():
        if lines:
            seen = look(folder_of(lines, place))
            chosen = torch.arange(len(seen.labels)) if label is None else (
                seen.labels == label).nonzero().flatten()
            features = {arch: seen.features[arch][chosen[:images]] for arch in archs}
            images_shown = len(chosen[:images])
            panels[row] = analysis.scatter(features)
            values[row, "nearest neighbours of the same network, share"] = [
                analysis.own_neighbours(features)]
    what = f" of class {label} (the paper does not say which)" if label is not None else ""
    return Measured(values, panels, [
        f"Clients are as after one more round of local training; {images_shown} test images{what}. "
        "A point's nearest neighbour among features of other images is of the same network with a "
        f"share of {1 / len(archs):.2f} where networks see alike, and of 1 where they lie apart."])


def attacked(table: Table, found: Found, place: Place) -> Measured:
    """The attack on the features of a run's ResNet18, with the noise that it was trained with."""
    rows, losses, values = {}, {}, {}
    for (row, column), lines in found.items():
        if lines:
            level = table.cells[row, column].flags.get("noise", 0.0)
            rows["true images"], done = attack_on(folder_of(lines, place), place, level)
            rows[row], losses[row] = done.images, done.losses
            values[row, "loss at the end"] = [done.losses[-1]]
            values[row, "variance of the noise"] = [done.noise]
            values[row, "PSNR, dB"], values[row, "SSIM"] = [done.psnr], [done.ssim]
    return Measured(values, (rows, losses), [
        f"The attack takes {ATTACK_STEPS[place.scale]:,} steps, on {len(rows['true images'])} "
        "images; PSNR and SSIM are means over these."])


@cache
def attack_on(folder: Path, place: Place, level: float) -> tuple[Tensor, analysis.Attack]:
    """The attack at a scale, once for all figures."""
    return analysis.attack(folder, place.data_dir, steps=ATTACK_STEPS[place.scale], level=level)


def dealt_classes(table: Table, found: Found, place: Place) -> Measured:
    """AP-FL's Table 1, as --missing-classes 0.2 deals out CIFAR-10's classes; images of each."""
    cell = Cell({"method": "fedavg", "setting": "apfl", "dataset": "cifar10",
                 "missing_classes": 0.2})
    flags = flags_of(cell, place, 0)
    write_stand_ins(flags, place)
    experiment = run.prepare_experiment(run.resolve(flags))
    counts = torch.stack([experiment.data.y_train[client.indices].bincount(minlength=10)
                          for client in experiment.clients]).cpu()
    held = {(f"client {k}", "classes"): [" ".join(map(str, row.nonzero().flatten().tolist()))]
            for k, row in enumerate(counts)}
    return Measured(held, counts, stand_ins([cell], place))


# --------------------------------------------------------------------------------- putting together

class Printed(NamedTuple):
    """A number, or the classes of a client, as a paper has it."""

    value: Any
    deviation: float | None
    text: str


Papers = Mapping[tuple[str, str], Printed]  # (row, column) -> what the paper has there


def papers_numbers() -> dict[str, Papers]:
    """Table -> the numbers that the papers have there, from results/papers.csv."""
    found: dict[str, dict] = {}
    with open(PAPERS, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            value, deviation = line["value"], line["deviation"]
            found.setdefault(line["table"], {})[line["row"], line["column"]] = Printed(
                float(value) if re.fullmatch(r"[\d.]+", value) else value,
                float(deviation) if deviation else None,
                value + f" ± {deviation}" * bool(deviation))
    return found


def mean_and_deviation(values: Sequence) -> tuple[Any, float | None]:
    """Over seeds, of those that there are; words stay as they are."""
    there = [value for value in values if value is not None]
    if not there or isinstance(there[0], str):
        return (there[0] if there else None), None
    return statistics.mean(there), statistics.stdev(there) if len(there) > 1 else None


def shown(value: Any, deviation: float | None, beside: str) -> str:
    """A mean, with its deviation, in as many decimals as the paper's number beside it has.

    Without one: one decimal from ten on, else two.  Words and whole numbers stay as they are.
    """
    if value is None or isinstance(value, str) or isinstance(value, int) and deviation is None:
        return "–" if value is None else str(value)
    decimals = beside.split(" ")[0].partition(".")[2]
    digits = max(1, len(decimals)) if beside else 1 if abs(value) >= 10 else 2
    text = f"{value:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def agreement(values: Values, papers: Papers) -> dict[str, tuple[int, int]]:
    """Column -> of how many pairs of rows our order is the paper's, and of how many.

    Two rows are compared over the seeds that both have; who did not get to a target with each of
    these comes after who did.
    """
    found = {}
    for column in dict.fromkeys(column for _, column in values):
        rows = [key for key, of in values.items() if of and key[1] == column and key in papers]
        counts = [analysis.in_order(*pair) for pair in (
            numbers_of(pair, values, papers) for pair in combinations(rows, 2)) if pair]
        alike, pairs = map(sum, zip(*counts)) if counts else (0, 0)
        if pairs:
            found[column] = alike, pairs
    return found


def numbers_of(pair: Sequence[tuple[str, str]], values: Values, papers: Papers
               ) -> tuple[list[float], list[float]] | None:
    """Two cells' numbers in the paper, and ours over the seeds of both; None if one has none."""
    seeds = min(len(values[key]) for key in pair)
    theirs, ours = [papers[key].value for key in pair], []
    for key in pair:
        of = values[key][:seeds]
        reached = None not in of or not key[1].endswith(", round")
        ours.append(mean_and_deviation(of)[0] if reached else float("inf"))
    numeric = all(isinstance(each, (int, float)) for each in theirs + ours)
    return (theirs, ours) if numeric else None


def markdown(name: str, table: Table, values: Values, papers: Papers, notes: Sequence[str]) -> str:
    """A table as Markdown: in each cell the paper's number, a stroke, ours."""
    keys = values.keys() | {key for key in papers if key in table.cells}
    rows = list(dict.fromkeys(row for row, _ in [*table.cells, *values] if any(
        row == key[0] for key in keys)))
    columns = list(dict.fromkeys(column for _, column in values))
    across = len(columns) <= 12  # else a line a column, as the paper has its long tables
    most = {column: max(len(of) for key, of in values.items() if key[1] == column)
            for column in columns}

    def cell(row: str, column: str) -> str:
        of = values.get((row, column), [])
        theirs = papers[row, column].text if (row, column) in papers else ""
        ours = shown(*mean_and_deviation(of), theirs)
        there = sum(value is not None for value in of)
        if 0 < there < most[column]:  # of the seeds, as where not every one reached a target
            ours += f" ({there} of {most[column]})"
        return f"{theirs or '–'} / {ours}" if papers else ours

    head = ["", *(columns if across else rows)]
    body = [[row, *(cell(row, column) for column in columns)] for row in rows] if across else [
        [column, *(cell(row, column) for row in rows)] for column in columns]
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]
    agreed = agreement(values, papers)
    spread = any(len(of) > 1 for of in values.values())
    said = [f"Every cell: {'the paper / ours' if papers else 'ours'}" + spread * (
        ", mean ± standard deviation over the seeds; (k of n): over k of these alone") + "."]
    if agreed:
        said.append("Pairs of rows in the paper's order, over the seeds of both (equal ones are "
                    "not): " + "; ".join(f"{column} {alike} of {pairs}"
                                         for column, (alike, pairs) in agreed.items()) + ".")
    return "\n\n".join([f"# {table.title}", *notes, "\n".join(lines), *said,
                        f"![{table.title}]({name}.png)"]) + "\n"


def notes_of(table: Table, found: Found, place: Place, failed: Mapping[str, str]) -> list[str]:
    """What has to be said with numbers: scale, seeds, command, commits, machines, what lacks."""
    settings = {cell.flags["setting"]: None for cell in table.cells.values()} or {"apfl": None}
    scale = "; ".join(f"`--setting {name}` with " + (", ".join(
        f"{flag} {value}" for flag, value in SCALES[place.scale][name].items()) or "nothing else")
        for name in settings)
    lines = [line for those in found.values() for line in those]
    commits, machines = (", ".join(sorted({line[what] for line in lines}))
                         for what in ("commit", "machine"))
    made = f"runs of commit {commits} on {machines}" if lines else f"commit {commit()}, no runs"
    said = [f"Scale **{place.scale}**: {scale}. Seeds: "
            f"{', '.join(map(str, range(seeds_of(table, place))))}.",
            f"`{place.command}`; {made}."
            + (f" Analyses of commit {commit()} on {machine()}." if table.networks else ""),
            *stand_ins(list(table.cells.values()), place)]
    if place.scale != "paper" and any("-widths" in str(cell.flags.get("model", ""))
                                      for cell in table.cells.values()):
        said.append(f"HeteroFL, FedRolex, ScaleFL: {WIDTHS[place.scale]} (paper: ResNet152).")
    copies: dict[str, set] = {}
    for key, those in found.items():
        copies.setdefault(table.cells[key].flags["dataset"], set()).update(
            line["digests"]["dataset"] for line in those if "digests" in line)
    said += [f"Not all runs had the same copy of {name}."
             for name, digests in copies.items() if len(digests) > 1]
    return said + lacking_runs(table, found, place, failed)


def lacking_runs(table: Table, found: Found, place: Place, failed: Mapping[str, str]) -> list[str]:
    """Which cells lack runs, a sentence for each reason."""
    why: dict[str, list[str]] = {}
    for key, cell in table.cells.items():
        seeds = range(seeds_of(table, place))
        if len(found[key]) < len(seeds):
            reasons = {failed[name] for name in (job_of(cell, place, seed).id for seed in seeds)
                       if name in failed}
            why.setdefault("; ".join(sorted(reasons)) or "not run", []).append(" / ".join(key))
    return [f"Lacking runs: {', '.join(names[:6])}"
            + (f" and {len(names) - 6} more" if len(names) > 6 else "") + f" ({reason})."
            for reason, names in why.items()]


def write_csv(path: Path, name: str, values: Values, papers: Papers, scale: str) -> None:
    """One line a cell: the paper's number, ours, and every seed's."""
    def fill(file) -> None:
        lines = [["table", "scale", "row", "column", "paper", "paper deviation", "mean",
                  "deviation", "by seed"]]
        for (row, column), of in values.items():
            lines.append([name, scale, row, column, *papers.get((row, column), (None, None))[:2],
                          *mean_and_deviation(of), " ".join(map(str, of))])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        file.write(text.getvalue().encode())

    data.write_atomically(path, fill)


# ----------------------------------------------------------------------------------------- pictures

def plot_numbers(path, measured: Measured, papers: Papers, title: str) -> None:
    """The paper's numbers and ours, a panel a column."""
    columns: dict[str, dict] = {}
    for (row, column), of in measured.values.items():
        paper, *_ = papers.get((row, column), (None,))
        columns.setdefault(column, {})[row] = paper, *mean_and_deviation(of)
    labels = {column: label_of(column) for column in columns}
    pictures.draw_numbers(path, columns, labels, title)


def label_of(column: str) -> str:
    """What the numbers of a column are, where its name does not say so."""
    ending = column.rpartition(", ")[2]
    measures = {"round": "rounds to the target", "speed": "times as fast as FedAvg",
                "M": "millions", "MiB": "MiB", "GiB": "GiB"}
    return "MB" if column.startswith("measured: MB") else measures.get(ending, "accuracy, %")


def plot_sweep(label: str, path, measured: Measured, papers: Papers, title: str) -> None:
    """A line a row over the columns, which are numbers; what lacks is a gap.

    Over the seeds that all have that were run at all: others' means are of other splits.
    """
    values, lines = measured.values, {}
    columns = list(dict.fromkeys(column for _, column in values))
    seeds = min((len(of) for of in values.values() if of), default=0)
    for row in dict.fromkeys(row for row, _ in values):
        by_column = [mean_and_deviation(values.get((row, each), [])[:seeds]) for each in columns]
        if any(mean is not None for mean, _ in by_column):
            means = [np.nan if mean is None else mean for mean, _ in by_column]
            lines[row] = columns, means, [deviation or 0 for _, deviation in by_column]
    pictures.draw_lines(path, {"": lines}, (label, "accuracy, %"), title)


def plot_curves(label: str, path, measured: Measured, papers: Papers, title: str) -> None:
    """Accuracy over rounds, a panel a column."""
    extra = dict(measured.extra)
    pictures.draw_lines(path, extra.pop("lines"), ("round", label), title, **extra)


def plot_stages(path, measured: Measured, papers: Papers, title: str) -> None:
    """Mean CKA over stages, a panel a split."""
    panels: dict[str, dict] = {}
    for (row, column), seen in measured.extra.items():
        means = [analysis.mean_similarity(similar) for similar in seen.maps]
        panels.setdefault(column, {})[row] = list(map(str, range(len(means)))), means, None
    pictures.draw_lines(path, panels, ("stage", "mean CKA between clients"), title)


def plot_maps(path, measured: Measured, papers: Papers, title: str) -> None:
    """CKA of each client with each, by method, stages 2 and 3."""
    looks = measured.extra
    maps = {f"{row}, stage {stage}": seen.maps[stage] for stage in (2, 3)
            for (row, _), seen in looks.items()}
    names = next(iter(looks.values())).names
    if len(names) > 25:  # too many to be written
        archs = [name.split(": ")[1] for name in names]
        names = [arch if arch != before else "" for before, arch in zip(["", *archs], archs)]
    pictures.draw_maps(path, maps, names, ("client", "client, network", "CKA"), title,
                       columns=len(looks), limits=(0, 1))


def plot_points(path, measured: Measured, papers: Papers, title: str) -> None:
    """The plane of t-SNE, a panel a method."""
    pictures.draw_points(path, measured.extra, title)


def plot_reconstruction(with_losses: bool, path, measured: Measured, papers: Papers,
                        title: str) -> None:
    """True and reconstructed images, and the attacker's losses."""
    rows, losses = measured.extra
    pictures.draw_reconstruction(path, rows, losses if with_losses else {}, title)


def plot_classes(path, measured: Measured, papers: Papers, title: str) -> None:
    """Images of each class that each client has."""
    pictures.draw_maps(path, {"": measured.extra.double()}, [row for row, _ in measured.values],
                       ("class", "", "training images"), title)


# --------------------------------------------------------------------------------------------- main

def make(name: str, table: Table, place: Place, failed: Mapping[str, str]) -> str:
    """Write what comes of a table's runs to results/SCALE; returns the Markdown."""
    lines, found = recorded(place), {}
    for key, cell in table.cells.items():
        ids = [job_of(cell, place, seed).id for seed in range(seeds_of(table, place))]
        there = takewhile(lambda each: each in lines and not (
            table.networks and not is_finished(RUNS / place.scale / each)), ids)
        found[key] = [lines[each] for each in there]
    if table.cells and not any(found.values()):
        return f"{name}: no run is finished" + " whose networks are here" * table.networks
    measured = table.measure(table, found, place)
    values, papers = measured.values, papers_numbers().get(name, {})
    notes = [*notes_of(table, found, place, failed), *measured.notes]
    text = markdown(name, table, values, papers, notes)
    place.results.mkdir(parents=True, exist_ok=True)
    data.write_atomically(place.results / f"{name}.md", lambda file: file.write(text.encode()))
    write_csv(place.results / f"{name}.csv", name, values, papers, place.scale)
    if any(values.values()):
        data.write_atomically(place.results / f"{name}.png", lambda file: table.draw(
            file, measured, papers, f"{table.title} (scale: {place.scale})"))
    return text


def seeds_of(table: Table, place: Place) -> int:
    """How many seeds a table takes; 1 where it looks into networks, or has no runs."""
    return 1 if table.networks or not table.cells else place.seeds


def jobs_of(table: Table, place: Place) -> list[Job]:
    """The runs that a table needs, each once."""
    found = {}
    for key, cell in table.cells.items():
        if place.only and not any(text in name for text in place.only for name in key):
            continue
        for seed in range(seeds_of(table, place)):
            job = job_of(cell, place, seed)
            found[job.id] = job
    return list(found.values())


def listing(data_dir: str) -> str:
    """Every table and figure, with its runs and an estimate of their time at each scale."""
    places = {scale: Place(scale, seeds, 1, data_dir, "") for scale, seeds in SEEDS.items()}
    by_scale = {scale: all_tables(scale) for scale in SCALES}
    lines = [f"{'name':14}" + "".join(
        f"{scale + f', {seeds} seed' + 's' * (seeds > 1):>22}" for scale, seeds in SEEDS.items())]

    def add(name: str, title: str, tables_of: Mapping[str, Sequence[Table]]) -> None:
        said = []
        for scale, tables in tables_of.items():
            jobs = {job.id: job for table in tables for job in jobs_of(table, places[scale])}
            hours = sum(seconds(job.settings) for job in jobs.values()) / 3600
            said.append(f"{len(jobs)} runs, " + (
                f"{60 * hours:.0f} min" if hours < 1 else f"{hours:,.0f} h"))
        lines.extend([f"{name:14}" + "".join(f"{each:>22}" for each in said), f"    {title}"])

    for name, table in by_scale["paper"].items():
        add(name, table.title, {scale: [tables[name]] for scale, tables in by_scale.items()})
    add("all", "All of these, which share runs", {scale: list(tables.values())
                                                  for scale, tables in by_scale.items()})
    return "\n".join([*lines, "", "Times are estimates for one core, without the analyses. Figures "
                      "that look into networks take one seed.", "FedIN's Fig. 1 and 2 and AP-FL's "
                      "Fig. 1 to 3 are drawings."])


def raise_usage_error(message: str) -> NoReturn:
    """What argparse calls when the command line is wrong; main prints it as one line."""
    raise ValueError(f"{message} (python tables.py --help lists all flags)")


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was typed.  Raises ValueError if it is nothing that can be asked for."""
    parser = argparse.ArgumentParser(
        prog="python tables.py", allow_abbrev=False, description=(__doc__ or "").split("\n")[0],
        epilog="Tables and pictures go to results/SCALE, and so does runs.jsonl, a line for each "
        "run that is finished; runs lie in runs/tables/SCALE. At the scale of smoke digits and "
        "random images stand for data sets that are not in --data-dir, elsewhere they are "
        "downloaded.")
    parser.error = raise_usage_error
    parser.add_argument("names", nargs="*", metavar="NAME", help="fedin-1, apfl-fig4, ..., as "
                        "--list has them; fedin-2 is fedin-2a and fedin-2b; or all")
    parser.add_argument("--list", action="store_true", help="print all names and stop")
    parser.add_argument("--scale", choices=SCALES, default="smoke", help="rounds, clients, epochs "
                        "and images: smoke is to try it, paper the papers' own (smoke)")
    parser.add_argument("--seeds", type=int, metavar="N", help="of each run: 0 to N - 1 "
                        "(3; 1 at the scale of smoke and for figures that look into networks)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (as many as cores, "
                        "on a GPU 1); 0: none, tables of the runs that are finished (figures still "
                        "look into their networks)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="run those rows and "
                        "columns alone that have such a text in their names, as CIFAR-10")
    parser.add_argument("--data-dir", default="data", help="where downloads are kept, and where "
                        "you may put embeddings-clip-cifar10.npz (classes, embeddings) and its kin "
                        "for bert, word2vec and other data sets (data)")
    args = parser.parse_args(argv)
    if not args.list and not args.names:
        raise ValueError("nothing to make: name a table, or all, or give --list")
    for name, least in (("seeds", 1), ("jobs", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}")
    return args


def default_jobs() -> int:
    """Runs at a time: as many as cores, on a GPU one."""
    return 1 if torch.cuda.is_available() else run.num_cores()


def chosen(names: Sequence[str], tables: Mapping[str, Table]) -> dict[str, Table]:
    """The tables of these names, or of names that go on with letters: fedin-2 for fedin-2a."""
    found = {}
    for name in names:
        those = {key: table for key, table in tables.items()
                 if name == "all" or re.fullmatch(re.escape(name) + "[a-z]*", key)}
        if not those:
            raise ValueError(f"there is no {name}: choose among {', '.join(tables)}, or all")
        found |= those
    return found


def check_words(words: Sequence[str], tables: Mapping[str, Table]) -> None:
    """Raise ValueError if a word of --only is in the name of no row or column."""
    names = {name: None for table in tables.values() for key in table.cells for name in key}
    for word in words:
        if not any(word in name for name in names):
            raise ValueError(f"--only {word}: it is in none of {', '.join(names)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is asked for; 0, 1 if a run failed, 2 if nothing can be done, 130 if stopped."""
    try:
        args = read_arguments(argv)
        if args.list:
            print(listing(args.data_dir))
            return 0
        words = sys.argv[1:] if argv is None else argv
        place = Place(args.scale, args.seeds or SEEDS[args.scale],
                      default_jobs() if args.jobs is None else args.jobs, args.data_dir,
                      shlex.join(["python", "tables.py", *words]), tuple(args.only))
        tables = chosen(args.names, all_tables(args.scale))
        lines, failed = recorded(place), {}
        needed = {job.id: job for table in tables.values() for job in jobs_of(table, place)
                  if table.networks or job.id not in lines}
        check_words(args.only, tables)
        commit()  # now, for it may be another one when a run ends
        if place.jobs > 0 and needed:
            siblings = [job for table in all_tables(args.scale).values()
                        for job in jobs_of(table, place._replace(only=()))]
            failed = run_missing(list(needed.values()), siblings, place)
        for name, table in tables.items():
            try:
                print(f"\n{make(name, table, place, failed)}", flush=True)
            except Exception as error:  # whatever it is, the others can be made all the same
                failed[name] = files.first_line(error)
                print(f"\n{name}: {type(error).__name__}: {failed[name]}", flush=True)
        if place.results.exists():
            print(f"results are in {place.results}")
        return 1 if failed else 0
    except KeyboardInterrupt:
        print("error: stopped; the same command goes on", file=sys.stderr)
        return 130
    except BrokenExecutor:
        print("error: a process that makes runs was killed, perhaps since the memory was full: the "
              "same command goes on; fewer --jobs need less", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(files.one_line(f"error: {error}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout, sys.stderr = pictures.Display(sys.stdout), pictures.Display(sys.stderr)
    sys.exit(main())
