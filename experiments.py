"""Runs of the papers' tables and figures, as plain data to read and to change.

A table is a dict of rows and columns.  Each is a dict of run.py's flags, and a cell's run has the
flags of both: python run.py --setting SETTING, the scale's flags, the row's, the column's, a seed.
"value" is no flag but the result to show, by its name in result.json (default: accuracy).
"report" names the function of report.py that makes the numbers, and its options.

tables.py runs what is missing; report.py writes the tables.  In reading order: scales; FedIN's
tables and figures; AP-FL's; the run of a cell.
"""

import hashlib
import json
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path

import data
import run
import semantics
from settings import GENERATOR

# ------------------------------------------------------------------------------------------- scales

# Flags by --setting, on top of its own values, and by method; options of a "report".
SMOKE = {"rounds": 2, "local_epochs": 1, "test_images": 60, "eval_every": 2, "checkpoint_every": 2}
NARROW = {f"method {name}": {"model": "resnet18-widths"}  # in place of ResNet152
          for name in ("heterofl", "fedrolex", "scalefl")}
SCALES = {
    # a trial, on digits in place of every data set
    "smoke": {
        "fedin": SMOKE | {"clients": 8, "participation": 0.25, "train_images": 160},
        "apfl": SMOKE | {"train_images": 400},
        "method apfl": {"generator_steps": 3, "generator_batch": 2, "synthetic_per_class": 2,
                        "friend_epochs": 1},
        "method feddf": {"distillation_steps": 5}, "attacked": {"steps": 50}, **NARROW},
    "small": {
        "fedin": {"clients": 20, "participation": 0.25, "rounds": 20, "local_epochs": 1,
                  "train_images": 5000, "test_images": 1000, "eval_every": 4},
        "apfl": {"rounds": 10, "local_epochs": 2, "train_images": 5000, "test_images": 1000,
                 "eval_every": 2},
        "method apfl": {"generator_steps": 60, "generator_batch": 10, "synthetic_per_class": 100,
                        "friend_epochs": 3},
        "method feddf": {"distillation_steps": 100}, "attacked": {"steps": 5000}, **NARROW},
    # headline figures
    "medium": {
        "fedin": {"clients": 20, "participation": 0.25, "rounds": 20, "local_epochs": 2,
                  "train_images": 5000, "eval_every": 4},
        "apfl": {"rounds": 10, "local_epochs": 5, "train_images": 10_000},
        "method apfl": {"generator_steps": 120, "generator_batch": 10, "synthetic_per_class": 100,
                        "friend_epochs": 5},
        "method feddf": {"distillation_steps": 100}, "attacked": {"steps": 5000}, **NARROW},
    # FedIN's own setting, until FedIN, FedProx and FedAvg have the paper's 60 % on CIFAR-10
    "cut": {"fedin": {"rounds": 110}},
    "paper": {"fedin": {"eval_every": 1}, "apfl": {}}}
SEEDS = {"smoke": 1, "small": 3, "medium": 5, "cut": 1, "paper": 3}  # 0, 1, ...; by default

# Columns that differ by scale, by default the paper's: FedIN's Table 5, number of clients; AP-FL's
# Fig. 5, synthetic samples per class
CLIENTS = {"smoke": (5, 8), "small": (10, 20, 50), "medium": (10, 20, 50, 100)}
SAMPLES = {"smoke": (2, 4), "small": (10, 30, 100, 200), "medium": (10, 30, 100, 200)}

# -------------------------------------------------------------------------------------------- FedIN

FASHION, SVHN, CIFAR = {"dataset": "fashionmnist"}, {"dataset": "svhn"}, {"dataset": "cifar10"}
IID, NON_IID = {"partition": "iid"}, {"partition": "dirichlet", "alpha": 0.5}

FEDAVG, FEDPROX, INCLUSIVE = {"method": "fedavg"}, {"method": "fedprox"}, {"method": "inclusivefl"}
FEDIN, NOISY = {"method": "fedin"}, {"method": "fedin", "noise": 0.8}
TWELVE = {
    "FedAvg": FEDAVG, "FedProx": FEDPROX, "Scaffold": {"method": "scaffold"},
    "FedNova": {"method": "fednova"}, "MOON": {"method": "moon"},
    "HeteroFL": {"method": "heterofl"}, "InclusiveFL": INCLUSIVE,
    "FedRolex": {"method": "fedrolex"}, "ScaleFL": {"method": "scalefl"},
    "InCoAvg": {"method": "inco"}, "FedIN": FEDIN, "FedIN (+Noise)": NOISY}
FOUR = {name: TWELVE[name] for name in ("FedAvg", "FedProx", "FedIN", "FedIN (+Noise)")}
THREE = {"FedAvg": FEDAVG, "InclusiveFL": INCLUSIVE, "FedIN": FEDIN}
ABLATIONS = {
    "FedAvg": FEDAVG, "FedIN w/o IN": FEDIN | {"ablate": ["in"]},
    "FedIN w/o Prox": FEDIN | {"ablate": ["prox"]}, "FedIN w/o Opt": FEDIN | {"ablate": ["opt"]},
    "FedIN": FEDIN}
WITH_NOISE = {"without noise": FEDIN, "with noise": NOISY}

CIFAR_SPLITS = {"CIFAR-10, IID": CIFAR | IID, "CIFAR-10, Non-IID": CIFAR | NON_IID}
SKEWED_CIFAR = {"CIFAR-10, Non-IID": CIFAR | NON_IID}
SKEWED = {"CIFAR-10, Non-IID": CIFAR | NON_IID, "Fashion-MNIST, Non-IID": FASHION | NON_IID}
SIX_COLUMNS = {
    "Fashion-MNIST, IID": FASHION | IID, "Fashion-MNIST, Non-IID": FASHION | NON_IID,
    "SVHN, IID": SVHN | IID, "SVHN, Non-IID": SVHN | NON_IID, **CIFAR_SPLITS}

FEDIN_TABLES = {
    "fedin": {"title": "headline: accuracy, %, non-IID", "papers": "fedin-1",
              "rows": FOUR, "columns": SKEWED},
    "fedin-1": {
        "title": "Table 1: accuracy, %; rounds to the target in non-IID, and how many times fewer "
                 "than FedAvg",
        "rows": TWELVE, "columns": SIX_COLUMNS, "report": ("with_rounds", {})},
    "fedin-2a": {"title": "Table 2a: accuracy, %, all clients with ResNet18",
                 "rows": {name: TWELVE[name] | {"model": "resnet18"}
                          for name in ("FedProx", "Scaffold", "FedNova", "MOON", "FedIN")},
                 "columns": CIFAR_SPLITS},
    "fedin-2b": {"title": "Table 2b: accuracy, %, without one part",
                 "rows": ABLATIONS, "columns": CIFAR_SPLITS},
    "fedin-3": {"title": "Table 3: accuracy, %, averages within each architecture alone",
                "rows": {name: TWELVE[name] | {"aggregation": "per-architecture"} for name in (
                    "FedAvg", "FedProx", "Scaffold", "FedNova", "MOON", "InclusiveFL", "FedIN")},
                "columns": {"Fashion-MNIST, IID": FASHION | IID,
                            "Fashion-MNIST, Non-IID": FASHION | NON_IID}},
    "fedin-4": {"title": "Table 4: cost of a method",
                "rows": {name: TWELVE[name] for name in (
                    "FedAvg", "Scaffold", "MOON", "HeteroFL", "FedRolex", "FedIN")},
                "columns": SKEWED_CIFAR, "report": ("overheads", {})},
    # its columns are in tables, below
    "fedin-5": {"title": "Table 5: accuracy, %, by the number of clients, CIFAR-10", "rows": THREE},
    "fedin-6": {"title": "Table 6: accuracy, %, by the noise on the features, non-IID",
                "rows": {f"noise {level:g}": FEDIN | {"noise": level}
                         for level in (0.0, 0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 3.0, 5.0)},
                "columns": {"Fashion-MNIST": FASHION | NON_IID, "SVHN": SVHN | NON_IID,
                            "CIFAR-10": CIFAR | NON_IID}},
    "fedin-noise-on": {"title": "place of the noise: accuracy, %, non-IID (not in the paper)",
                       "rows": {"no noise": FEDIN, "every forward pass": NOISY,
                                "upload alone": NOISY | {"noise_on": "upload"}}, "columns": SKEWED},
    "methods": {"title": "every method in its setting: accuracy, %, non-IID",
                "rows": {"Local": {"method": "local"}, **TWELVE,
                         **{f"{name}, CNN": {"method": method, "model": "cnn"} for name, method in (
                             ("FedAvg", "fedavg"), ("FedAvg-FT", "fedavg-ft"), ("FedGen", "fedgen"),
                             ("FedDF", "feddf"), ("AP-FL", "apfl"), ("CCVR", "ccvr"))}},
                "columns": SKEWED}}

# Figures with "networks" need the checkpoints of their runs, and take one seed.
FEDIN_FIGURES = {
    "fedin-fig3": {"title": "Fig. 3: features s_out of five architectures, t-SNE",
                   "rows": {"FedAvg": FEDAVG}, "columns": SKEWED_CIFAR, "networks": True,
                   "report": ("scattered", {"count": 100, "label": None, "archs": (
                       "resnet10", "resnet14", "resnet18", "resnet22", "resnet26")})},
    "fedin-fig4": {"title": "Fig. 4: images reconstructed from features",
                   "rows": WITH_NOISE, "columns": SKEWED_CIFAR, "networks": True,
                   "report": ("attacked", {"with_losses": False})},
    "fedin-fig5": {"title": "Fig. 5: smoothed accuracy, non-IID CIFAR-10",
                   "rows": TWELVE, "columns": SKEWED_CIFAR,
                   "report": ("curves", {"goal": "CIFAR-10"})},
    "fedin-fig6ab": {"title": "Fig. 6a and 6b: mean CKA between clients, by stage (FedProx: ours)",
                     "rows": {**THREE, "FedProx": FEDPROX}, "columns": CIFAR_SPLITS,
                     "networks": True, "report": ("similarity", {"shown": "stages"})},
    "fedin-fig6c": {"title": "Fig. 6c: accuracy, %, by |S|, non-IID CIFAR-10",
                    "rows": {"FedIN": FEDIN | CIFAR | NON_IID},
                    "columns": {str(size): {"feature_batch_size": size}
                                for size in (8, 16, 32, 64, 128)},
                    "report": ("swept", {"label": "features in a batch, |S|"})},
    # the paper's axis is not readable in our copy
    "fedin-fig6d": {"title": "Fig. 6d: accuracy, %, by the number of batches, non-IID CIFAR-10",
                    "rows": {"FedIN": FEDIN | CIFAR | NON_IID},
                    "columns": {str(count): {"feature_batches": count} for count in range(1, 6)},
                    "report": ("swept", {"label": "batches of features"})},
    "fedin-fig7": {"title": "Fig. 7: CKA between clients, stages 2 and 3, non-IID CIFAR-10",
                   "rows": THREE, "columns": SKEWED_CIFAR, "networks": True,
                   "report": ("similarity", {"shown": "maps"})},
    "fedin-fig8": {"title": "Fig. 8: stage 3 features of one class, t-SNE, non-IID CIFAR-10",
                   "rows": THREE, "columns": SKEWED_CIFAR, "networks": True,
                   "report": ("scattered", {"count": 200, "label": 0, "archs": (
                       "resnet10", "resnet14", "resnet26")})},
    "fedin-fig9": {"title": "Fig. 9: smoothed accuracy, ablations, non-IID CIFAR-10",
                   "rows": ABLATIONS, "columns": SKEWED_CIFAR, "report": ("curves", {})},
    "fedin-fig10": {"title": "Fig. 10: reconstruction from features, with and without noise",
                    "rows": WITH_NOISE, "columns": SKEWED_CIFAR, "networks": True,
                    "report": ("attacked", {"with_losses": True})}}

# -------------------------------------------------------------------------------------------- AP-FL

SETS = {"CIFAR-10": CIFAR, "CIFAR-100": {"dataset": "cifar100"}, "EMNIST": {"dataset": "emnist"},
        "Fashion-MNIST": FASHION}
APFL, DROPOUT = {"method": "apfl"}, {"method": "apfl", "missing_classes": 0.2}
CALIBRATED = APFL | {"friend": "calibrated"}
# FedAvg needs no run of its own: AP-FL's rounds are FedAvg's to the last bit.  Nor does CCVR.
SEVEN = {
    "Local": {"method": "local"}, "FedAvg": APFL | {"value": "global_accuracy"}, "FedProx": FEDPROX,
    "SCAFFOLD": {"method": "scaffold"}, "FedGen": {"method": "fedgen"},
    "FedDF": {"method": "feddf"}, "AP-FL": APFL}
FIVE_CLIENTS = {f"{name}, alpha {alpha:g}": SETS[name] | {"clients": 5, "alpha": alpha}
                for name in ("CIFAR-10", "Fashion-MNIST") for alpha in (0.01, 0.1)}

APFL_TABLES = {
    "apfl": {"title": "headline: whole test set, %, five clients (CCVR: not in the paper)",
             "columns": FIVE_CLIENTS, "rows": {"FedAvg": SEVEN["FedAvg"], **{
                 f"AP-FL, {kind} models": APFL | {"value": f"{kind}_accuracy"}
                 for kind in ("client", "friend", "personalised")},
                 "CCVR": CALIBRATED | {"value": "friend_accuracy"}, "AP-FL with CCVR": CALIBRATED}},
    "apfl-1": {"title": "Table 1: classes of each client in the dropout setting",
               "rows": {}, "columns": {}, "report": ("dealt_classes", {})},
    "apfl-2": {"title": "Table 2: accuracy on the whole test set, %", "rows": SEVEN,
               "columns": {f"{name}, {clients} clients, alpha {alpha:g}":
                           SETS[name] | {"clients": clients, "alpha": alpha}
                           for name in SETS for clients in (5, 10) for alpha in (0.01, 0.05, 0.1)
                           if alpha == 0.1 or name != "Fashion-MNIST"}},
    # AP-FL's client models are FedAvg-FT's
    "apfl-3": {"title": "Table 3: accuracy of the dropout client on the whole test set, %",
               "rows": {"Local": {"method": "local", "value": "dropout_accuracy"},
                        "FedAvg-FT": APFL | {"value": "dropout_client_accuracy"},
                        "AP-FL": APFL | {"value": "dropout_personalised_accuracy"}},
               "columns": {f"{name}, {percent} % missing": SETS[name] | {
                   "missing_classes": percent / 100} for name in SETS for percent in (10, 20)}},
    "apfl-4": {
        "title": "Table 4: accuracy of friend models on clients' own shares of the test set, %; "
                 "A_n: participants, A_d: the dropout client",
        "rows": {name: DROPOUT | {"semantics": name.lower()}
                 for name in ("word2vec", "BERT", "CLIP")},
        "columns": {f"{name}, {mean}": SETS[name] | {"value": value} for mean, value in (
            ("A_n", "friend_personal_accuracy"), ("A_d", "dropout_friend_personal_accuracy"))
            for name in SETS}},
    "apfl-fig4": {
        "title": "Fig. 4: accuracy over rounds, five clients; star: AP-FL's personalised models",
        "rows": SEVEN, "report": ("curves", {"weight": 0.0}),
        "columns": {name: SETS[name] | {"clients": 5, "alpha": alpha}
                    for name, alpha in zip(SETS, (0.01, 0.05, 0.1, 0.1))}},
    "apfl-fig5a": {"title": "Fig. 5: friend models' accuracy, %, by the length of the noise",
                   "rows": {name: APFL | SETS[name.split(" ")[0]] | {
                       "clients": 10, "alpha": 0.1, "value": "friend_accuracy"}
                       for name in ("CIFAR-10", "EMNIST", "Fashion-MNIST (not in the paper)")},
                   "columns": {str(size): {"noise_dim": size} for size in (20, 100, 400, 512)},
                   "report": ("swept", {"label": "length of z"})},
    # its rows and columns are in tables, below
    "apfl-fig5b": {"title": "Fig. 5: friend models' accuracy, %, by the number of samples",
                   "report": ("swept", {"label": "synthetic samples per class"})},
    "apfl-readings": {
        "title": "teacher and distance of the generator: personalised models' accuracy, %, five "
                 "clients (not in the paper)",
        "rows": {f"{teacher}, {distance}": APFL | {"teacher": teacher, "distance": distance}
                 for teacher in ("global", "clients") for distance in ("rms", "l2")},
        "columns": FIVE_CLIENTS}}


def tables(scale: str) -> dict[str, dict]:
    """All tables and figures at a scale.  The papers' other figures are drawings."""
    # Columns that differ by scale; ten participants per round (not given in the paper)
    clients = {f"{split}, {number} clients": CIFAR | flags | {
        "clients": number, "participation": min(1.0, 10 / number)}
        for split, flags in (("IID", IID), ("Non-IID", NON_IID))
        for number in CLIENTS.get(scale, (10, 20, 50, 100, 200))}
    samples = {str(number): {"synthetic_per_class": number}
               for number in SAMPLES.get(scale, (50, 200, 400, 600, 800, 1000))}
    here = {"fedin-5": {"columns": clients},
            "apfl-fig5b": {"columns": samples, "rows": APFL_TABLES["apfl-fig5a"]["rows"]}}

    # Settings that the scale has
    groups = {"fedin": ("FedIN", FEDIN_TABLES | FEDIN_FIGURES), "apfl": ("AP-FL", APFL_TABLES)}
    return {name: {**table, **here.get(name, {}), "setting": setting,
                   "title": f"{paper}, {table['title']}"}
            for setting, (paper, group) in groups.items() if setting in SCALES[scale]
            for name, table in group.items()}


# ------------------------------------------------------------------------------------ run of a cell

Key = tuple[str, str]  # row and column of a table
MACHINE = ("device", "workers", "threads", "data_dir", "checkpoint_every")  # change no number


def cells(table: Mapping) -> dict[Key, dict]:
    """Row and column -> flags of the cell, and "value"."""
    return {(row, column): {"value": "accuracy", **flags, **more}
            for row, flags in table["rows"].items() for column, more in table["columns"].items()}


def runs_of(table: Mapping, args: Namespace) -> dict[Key, dict[str, dict]]:
    """Row and column -> its runs for seeds 0, 1, ...: id -> flags of run.py."""
    seeds = range(1 if table.get("networks") else args.seeds)
    return {key: {run_id(flags): flags for flags in (
        flags_of(table, cell, args, seed) for seed in seeds)} for key, cell in cells(table).items()}


def flags_of(table: Mapping, cell: Mapping, args: Namespace, seed: int) -> dict:
    """Flags of a cell's run: the scale's, the method's at this scale, the cell's, a seed."""
    scale, method = SCALES[args.scale], cell["method"]
    flags = {**scale[table["setting"]], **scale.get(f"method {method}", {}),
             "setting": table["setting"], **cell}
    flags.pop("value", None)
    if method == "apfl":
        flags["semantics"] = embeddings_of(cell, args.data_dir)
    if args.scale == "smoke":
        flags |= {"dataset": "digits"} | ({"semantics": "onehot"} if method == "apfl" else {})
    if flags.get("friend") == "calibrated":
        flags = {name: value for name, value in flags.items() if name not in GENERATOR}
    if flags["dataset"] in data.DOWNLOADED or flags.get("semantics") in semantics.ENCODERS:
        flags["data_dir"] = args.data_dir
    return flags | {"seed": seed}


def embeddings_of(cell: Mapping, data_dir: str) -> str:
    """Value of --semantics: embeddings-ENCODER-DATASET.npz in --data-dir, or else the encoder."""
    # A cell without an encoder takes CLIP, or word vectors if their file alone is there.
    choices = [cell["semantics"]] if "semantics" in cell else ["clip", "word2vec"]
    paths = (Path(data_dir) / f"embeddings-{name}-{cell['dataset']}.npz" for name in choices)
    return next((str(path) for path in paths if path.exists()), choices[0])


def run_id(flags: Mapping) -> str:
    """Name of a run: method, data set, seed, and ten digits that stand for all settings."""
    return f"{flags['method']}-{Path(flags['dataset']).stem}-{flags['seed']}-{digits_of(flags)}"


def digits_of(flags: Mapping, but: Collection[str] = ()) -> str:
    """Ten digits that stand for all settings of a run that change a number, but for some names."""
    # Flags that are off do not count (as --friend synthetic), so that a new one changes no digit.
    decisive = {name: Path(value).name if isinstance(value, str) else value
                for name, value in run.resolve(dict(flags)).items()
                if name not in (*MACHINE, *but)
                and value is not None and value is not False and value not in ([], "synthetic")}

    # Embeddings from a file count as their encoder.
    if decisive.get("semantics", "").startswith("embeddings-"):
        decisive["semantics"] = decisive["semantics"].split("-")[1]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
