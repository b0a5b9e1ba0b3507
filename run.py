"""Train one federated method on one data set and write what came of it.

    python run.py                                             FedIN on handwritten digits, a minute
    python run.py --method apfl --missing-classes 0.2         AP-FL, one client gone with two digits
    python run.py --resume --out runs/fedin-digits-0          go on where a run was stopped
    python run.py --methods                                   all methods, in a table

Reads from top to bottom: the methods and their settings, the command line, the set-up of a run,
one round, the stages after the last round, evaluation, the files of a run, pictures, the terminal,
and at the end main().
"""

import argparse
import ctypes
import inspect
import json
import math
import os
import pickle
import platform
import struct
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from tqdm import tqdm

import apfl
import baselines
import data
import fedin
import generator
import models
from baselines import Client, Result
from models import State

# ----------------------------------------------------------------------------- methods and settings


class Method(NamedTuple):
    """The functions of a method, as the docstring of baselines.py describes them.

    Those of the stages after the last round, in their order, stand last.
    """

    init: Callable
    download: Callable
    client_update: Callable
    server_update: Callable
    deploy: Callable
    initial_memory: Callable | None = None  # None: nothing stays on a device between rounds
    assign: Callable | None = None  # a client's architecture in a round, where that varies
    distil: Callable | None = None  # the server trains, after its update of every round
    trains_late: Callable | None = None  # whether a client trains on the final global model
    memorise: Callable | None = None  # the server trains a generator
    befriend: Callable | None = None  # every client trains on what the generator makes
    personalise: Callable | None = None  # and combines the outcome with a model of its own


FEDAVG = Method(baselines.fedavg_init, baselines.fedavg_download, baselines.fedavg_client_update,
                baselines.fedavg_server_update, baselines.fedavg_deploy)
HETEROFL = Method(baselines.heterofl_init, baselines.heterofl_download,
                  baselines.heterofl_client_update, baselines.heterofl_server_update,
                  baselines.heterofl_deploy, assign=baselines.heterofl_assign)
METHODS = {
    "local": Method(baselines.fedavg_init, baselines.local_download, baselines.local_client_update,
                    baselines.local_server_update, baselines.local_deploy,
                    baselines.local_initial_memory),
    "fedavg": FEDAVG,
    "fedavg-ft": FEDAVG._replace(trains_late=baselines.fedavg_ft_trains_late),
    "fedprox": FEDAVG._replace(client_update=baselines.fedprox_client_update),
    "scaffold": FEDAVG._replace(init=baselines.scaffold_init,
                                download=baselines.scaffold_download,
                                client_update=baselines.scaffold_client_update,
                                server_update=baselines.scaffold_server_update,
                                initial_memory=baselines.scaffold_initial_memory),
    "fednova": FEDAVG._replace(client_update=baselines.fednova_client_update,
                               server_update=baselines.fednova_server_update),
    "moon": FEDAVG._replace(client_update=baselines.moon_client_update,
                            initial_memory=baselines.moon_initial_memory),
    "fedgen": FEDAVG._replace(init=baselines.fedgen_init, download=baselines.fedgen_download,
                              client_update=baselines.fedgen_client_update,
                              distil=baselines.fedgen_distil),
    "feddf": FEDAVG._replace(server_update=baselines.feddf_server_update,
                             distil=baselines.feddf_distil),
    "heterofl": HETEROFL,
    "inclusivefl": FEDAVG._replace(server_update=baselines.inclusivefl_server_update),
    "fedrolex": HETEROFL._replace(server_update=baselines.fedrolex_server_update),
    "scalefl": HETEROFL._replace(init=baselines.scalefl_init, download=baselines.scalefl_download,
                                 client_update=baselines.scalefl_client_update,
                                 server_update=baselines.scalefl_server_update, assign=None),
    "inco": FEDAVG._replace(server_update=baselines.inco_server_update),
    "fedin": FEDAVG._replace(init=fedin.fedin_init, download=fedin.fedin_download,
                             client_update=fedin.fedin_client_update,
                             server_update=fedin.fedin_server_update),
    "apfl": FEDAVG._replace(init=apfl.apfl_init, client_update=apfl.apfl_client_update,
                            server_update=apfl.apfl_server_update,
                            trains_late=apfl.apfl_trains_late, memorise=apfl.apfl_memorise,
                            befriend=apfl.apfl_friend_update, personalise=apfl.personalise),
}
METHOD_DEFAULTS = {  # the flags that a method reads beside the common ones
    "local": {},
    "fedavg": {"aggregation": "layerwise"},
    "fedavg-ft": {"aggregation": "layerwise"},
    "fedprox": {"aggregation": "layerwise", "mu": baselines.FEDPROX_MU},
    "scaffold": {"aggregation": "layerwise"},
    "fednova": {"aggregation": "layerwise"},
    "moon": {"aggregation": "layerwise", "mu": baselines.MOON_MU},
    "fedgen": {"aggregation": "layerwise"},
    "feddf": {"proxy": "holdout", "distillation_steps": baselines.DISTILLATION_STEPS},
    "heterofl": {},
    "inclusivefl": {"aggregation": "layerwise"},
    "fedrolex": {},
    "scalefl": {"self_distillation": baselines.SELF_DISTILLATION},
    "inco": {"aggregation": "layerwise"},
    "fedin": {"aggregation": "layerwise", "mu": fedin.MU, "noise": 0.0, "projection": "simplified",
              "feature_batch_size": fedin.FEATURE_BATCH_SIZE,
              "feature_batches": fedin.FEATURE_BATCHES, "ablate": []},
    "apfl": {"aggregation": "layerwise", "beta": None, "beta_on": "client",
             "lambda": generator.BALANCE, "semantics": "clip", "friend_labels": "local",
             "synthetic_per_class": apfl.SYNTHETIC_PER_CLASS, "noise_dim": generator.NOISE_DIM,
             "generator_steps": apfl.GENERATOR_STEPS, "generator_batch": apfl.GENERATOR_BATCH,
             "friend_epochs": apfl.FRIEND_EPOCHS},
}
ABOUT = {  # for --methods: paper, what a client sends, what it keeps between rounds
    "local": ("-", "nothing", "its model"),
    "fedavg": ("McMahan et al. 2017", "weights", "-"),
    "fedavg-ft": ("AP-FL, Sec. 4.1", "weights", "its model, at the end"),
    "fedprox": ("Li et al. 2020", "weights", "-"),
    "scaffold": ("Karimireddy et al. 2020", "weights, change of its variate", "control variate"),
    "fednova": ("Wang et al. 2020", "weights, a number", "-"),
    "moon": ("Li et al. 2021", "weights", "its last model"),
    "fedgen": ("Zhu et al. 2021", "weights, class counts", "-"),
    "feddf": ("Lin et al. 2020", "weights", "-"),
    "heterofl": ("Diao et al. 2021", "sub-model", "-"),
    "inclusivefl": ("Liu et al. 2022", "weights", "-"),
    "fedrolex": ("Alam et al. 2022", "sub-model", "-"),
    "scalefl": ("Ilhan et al. 2023", "sub-model with exits", "-"),
    "inco": ("Chan et al. 2024", "weights", "-"),
    "fedin": ("FedIN", "weights, features", "-"),
    "apfl": ("AP-FL", "weights, class counts", "its models, at the end"),
}
AGGREGATIONS = {"layerwise": models.layerwise_average,
                "per-architecture": models.per_architecture_average}
ABLATIONS = {  # what each part of FedIN is set to when it is left out
    "in": {"feature_batches": 0, "feature_batch_size": 0, "projection": "sum"},
    "prox": {"mu": 0.0},
    "opt": {"projection": "sum"},
}

SETTINGS = {
    "fedin": {"clients": 100, "participation": 0.1, "rounds": 500, "local_epochs": 5,
              "batch_size": 16, "optimizer": "adam", "lr": 1e-3, "partition": "dirichlet",
              "alpha": 0.5, "model": "resnets", "eval_every": 5},
    "apfl": {"clients": 10, "participation": 1.0, "rounds": 50, "local_epochs": 20,
             "batch_size": 50, "optimizer": "adam", "lr": 2e-4, "partition": "dirichlet",
             "alpha": 0.1, "model": "cnn", "eval_every": 1},
    "quick": {"clients": 10, "participation": 0.5, "rounds": 10, "local_epochs": 2,
              "batch_size": 16, "optimizer": "adam", "lr": 1e-3, "partition": "dirichlet",
              "alpha": 0.5, "model": "resnets", "eval_every": 1},
}
APFL_METHODS = ("local", "fedavg-ft", "fedgen", "feddf", "apfl")  # of AP-FL's tables alone
WIDTH_METHODS = ("heterofl", "fedrolex", "scalefl")  # they cut one network by width
QUICK_APFL = {"participation": 1.0, "local_epochs": 5, "batch_size": 50, "model": "cnn"}
QUICK_GENERATOR = {"generator_steps": 150, "generator_batch": 10, "synthetic_per_class": 100,
                   "friend_epochs": 5}  # of apfl, in the quick setting
OWN_AVERAGES = {  # of methods without --aggregation that have a server
    **dict.fromkeys(WIDTH_METHODS, "averages each coordinate over the sub-models that hold it"),
    "feddf": "averages within each architecture, since its server trains them apart",
}
QUICK_DISTILLATION_STEPS = 50  # of feddf, in the quick setting
PROXY_IMAGES = 5000  # unlabelled images that feddf's server holds at most
PROXY_SHARE = 0.1  # of the training images, set aside for it where --train-images leaves none over
SPEED_SPREAD = 4.0  # the fastest client over the slowest, in virtual time
ASYNC = {"mixing": apfl.MIXING, "staleness": "polynomial", "speed_spread": SPEED_SPREAD}
ASYNC_METHODS = ("fedavg", "fedavg-ft", "fedprox", "apfl")
BETA_TEST_IMAGES = 2000  # test images that the curve over beta is drawn from
MAY_CHANGE = ("rounds", "workers", "device", "data_dir")  # on --resume


# ------------------------------------------------------------------------------------- command line


def number(kind: type, low: float, high: float = 1e9, *, open_low: bool = False) -> Callable:
    """An argparse type: a number of a kind, from low (or above it) to high."""
    noun = "a whole number" if kind is int else "a number"

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high:g}, not '{text}'")
        if not value >= low or (open_low and value == low):
            bound = f"{'above' if open_low else 'at least'} {low:g}"
            raise argparse.ArgumentTypeError(f"must be {noun} {bound}, not '{text}'")
        return value

    return convert


def raise_usage_error(message: str) -> NoReturn:
    """What argparse calls when the command line is wrong; main prints it as one line."""
    raise ValueError(f"{message} (python run.py --help lists all flags)")


def parser() -> argparse.ArgumentParser:
    """The command line.  No flag has a default here: see resolve."""
    top = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, add_help=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Values not given come from --setting, then from the method.\n"
        "A flag that the run does not read is an error.")
    top.error = raise_usage_error
    count, size, few = number(int, 1), number(int, 2), number(int, 1, 1024)
    positive, weight = number(float, 0, open_low=True), number(float, 0)

    group = top.add_argument_group("what to run")
    group.add_argument("-h", "--help", action="help", help="print this and stop")
    group.add_argument("--methods", action="version", version=methods_table(),
                       help="print a table of all methods and stop")
    group.add_argument("--method", choices=METHODS, help="default fedin")
    group.add_argument("--dataset", metavar="NAME|FILE.npz", help=f"{', '.join(data.DATASETS)}, "
                       "or your own .npz (see README); default digits")
    group.add_argument("--setting", choices=SETTINGS,
                       help="fills in what is not given: quick takes a minute on digits; fedin and "
                       "apfl are the papers' (FedIN Sec. 5.1, AP-FL Sec. 4.1). Default quick on "
                       "digits, else the setting of the method's paper")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), metavar="N",
                       help="seed of every random draw; default 0")

    group = top.add_argument_group("federation (values of the papers: FedIN | AP-FL)")
    group.add_argument("--clients", type=count, metavar="N", help="K: 100 | 5, 10")
    group.add_argument("--participation", type=number(float, 0, 1, open_low=True), metavar="X",
                       help="share of the clients drawn each round: 0.1 (not stated) | 1")
    group.add_argument("--rounds", type=count, metavar="N",
                       help="communication rounds: 500 | 50 (not stated)")
    group.add_argument("--local-epochs", type=count, metavar="N",
                       help="epochs a client and round: 5 | 20")
    group.add_argument("--batch-size", type=size, metavar="N", help="images a batch: 16 | 50")
    group.add_argument("--optimizer", choices=("adam", "sgd"),
                       help="adam | adam; new every round; sgd has no momentum")
    group.add_argument("--lr", type=positive, metavar="X", help="learning rate: 0.001 | 0.0002")
    group.add_argument("--model", choices=models.MODELS,
                       help="resnets: ResNet10/14/18/22/26, evenly by client id. NET-widths: "
                       "sub-models of 1/16 to 1 of its width, for heterofl, fedrolex and scalefl "
                       "alone. Papers: resnets (those three: resnet152-widths) | cnn")
    group.add_argument("--aggregation", choices=(*AGGREGATIONS, "async"),
                       help="average layers of the same name across architectures (FedIN "
                       "Sec. 4.4), or within each architecture alone (Table 3), or mix each update "
                       "in as it arrives (AP-FL Sec. 3.2); default layerwise")
    group.add_argument("--mixing", type=number(float, 0, 1), metavar="X",
                       help="of --aggregation async: share of an update that is not stale; "
                       f"default {apfl.MIXING} (not stated)")
    group.add_argument("--staleness", choices=("constant", "polynomial", "hinge"),
                       help="of --aggregation async: how that share falls with every update that "
                       "came in between; default polynomial (not stated)")
    group.add_argument("--speed-spread", type=number(float, 1), metavar="X",
                       help="of --aggregation async: the fastest client over the slowest; "
                       f"default {SPEED_SPREAD:g} (not stated)")
    group.add_argument("--eval-every", type=count, metavar="N",
                       help="rounds between evaluations: 5 | 1; the last round always has one")

    group = top.add_argument_group("data")
    group.add_argument("--train-images", type=count, metavar="N",
                       help="a class-balanced subset of the training images; default all")
    group.add_argument("--partition", choices=("iid", "dirichlet", "pathological"),
                       help="how the training images are split among the clients; dirichlet "
                       "gives each at least ten; default dirichlet")
    group.add_argument("--alpha", type=positive, metavar="X",
                       help="of --partition dirichlet; smaller is more skewed: 0.5 | 0.01 to 0.1")
    group.add_argument("--classes-per-client", type=count, metavar="N",
                       help="gamma of --partition pathological; default 2")
    group.add_argument("--missing-classes", type=number(float, 0, 1, open_low=True), metavar="X",
                       help="dropout setting of AP-FL (Sec. 4.1, Table 1): two classes a client, "
                       "and this share of the classes only with clients that never take part: "
                       "- | 0.1, 0.2")
    group.add_argument("--augment", action="store_true",
                       help="random crop, flip and Cutout; on digits, svhn, emnist Cutout alone")
    group.add_argument("--data-dir", metavar="DIR", help="where downloads are kept; default data")

    group = top.add_argument_group("machine and files")
    group.add_argument("--device", metavar="NAME",
                       help="cpu, cuda, cuda:1, ...; default cuda where there is one")
    group.add_argument("--workers", type=few, metavar="N",
                       help="clients trained at a time; default on a CPU the cores, but no more "
                       "than clients a round; on a GPU 1")
    group.add_argument("--threads", type=few, metavar="N",
                       help="intra-op threads of each worker; default 1")
    group.add_argument("--out", metavar="DIR", help="default runs/METHOD-DATASET-SEED")
    group.add_argument("--resume", action="store_true",
                       help="go on with the run in --out; --rounds may grow")
    group.add_argument("--checkpoint-every", type=count, metavar="N",
                       help="rounds between checkpoints; default 1")

    group = top.add_argument_group("fedprox, fedin, moon")
    group.add_argument("--mu", type=weight, metavar="X",
                       help="fedprox, fedin: weight of the proximal term, FedIN Eq. 3 and Sec. "
                       f"5.1: mu/2 = 0.05; default {fedin.MU}, for fedprox in the apfl setting "
                       f"{baselines.FEDPROX_MU_APFL}. moon: weight of the contrastive loss; "
                       f"default {baselines.MOON_MU:g}")
    group = top.add_argument_group("feddf")
    group.add_argument("--proxy", metavar="NAME|FILE.npz",
                       help="unlabelled images of the server: holdout (training images that no "
                       "client has), noise, or the training images of an .npz; at most "
                       f"{PROXY_IMAGES}; default holdout")
    group.add_argument("--distillation-steps", type=number(int, 0), metavar="N",
                       help="steps a round on the server, 0: none; default "
                       f"{baselines.DISTILLATION_STEPS}, in the quick setting "
                       f"{QUICK_DISTILLATION_STEPS}")
    group = top.add_argument_group("scalefl")
    group.add_argument("--self-distillation", type=weight, metavar="X",
                       help="gamma: how much earlier exits learn from the last, after a quarter "
                       f"of the rounds; default {baselines.SELF_DISTILLATION:g}, as released")
    group = top.add_argument_group("fedin")
    group.add_argument("--noise", type=weight, metavar="LEVEL",
                       help="noise on the features, as a multiple of their standard deviation; "
                       f"FedIN (+Noise), Sec. 4.3: {fedin.NOISE_LEVEL}; default 0")
    group.add_argument("--projection", choices=("simplified", "exact", "sum"),
                       help="gradient alleviation: Eq. 13, Eq. 12, or none; default simplified")
    group.add_argument("--ablate", choices=ABLATIONS, nargs="+", action="extend",
                       help="leave out IN training, the proximal term, the alleviation (Table 2b)")
    group.add_argument("--feature-batch-size", type=size, metavar="N",
                       help="features in a batch, |S|, Fig. 6c; default "
                       f"{fedin.FEATURE_BATCH_SIZE}")
    group.add_argument("--feature-batches", type=count, metavar="N",
                       help="batches of features that a client sends and receives, Fig. 6d; "
                       f"default {fedin.FEATURE_BATCHES}")
    group = top.add_argument_group("apfl")
    group.add_argument("--beta", type=number(float, 0, 1), metavar="X",
                       help="of the interpolation, Eq. 10 and 12: weight of the client's model; "
                       f"default {apfl.BETA_COLOUR} for colour images, else {apfl.BETA_GRAY}")
    group.add_argument("--beta-on", choices=("client", "friend"),
                       help="whose weight beta is: as Eq. 10 is printed, or as the sentence below "
                       "it says; default client")
    group.add_argument("--lambda", type=number(float, 0, 1), metavar="X",
                       help="weight of L_cls against L_diversity, Eq. 9; default "
                       f"{generator.BALANCE}")
    group.add_argument("--semantics", metavar="NAME|FILE.npz",
                       help=f"A(y), Eq. 11: {', '.join(generator.SEMANTICS)}, or an .npz with "
                       "classes and embeddings; default segments (of a digit display) for digits "
                       "and svhn, else clip")
    group.add_argument("--word-vectors", metavar="FILE",
                       help="of --semantics word2vec: a text file, a word and its numbers a line")
    group.add_argument("--friend-labels", choices=("local", "all"),
                       help="labels of a friend model's synthetic samples: the client's own "
                       "distribution (Sec. 3.2), or every class alike; default local")
    group.add_argument("--synthetic-per-class", type=count, metavar="N",
                       help="synthetic samples of a friend model, a class on average, Fig. 5; "
                       f"default {apfl.SYNTHETIC_PER_CLASS}")
    group.add_argument("--noise-dim", type=count, metavar="N",
                       help=f"length of z, Fig. 5; default {generator.NOISE_DIM}")
    group.add_argument("--generator-steps", type=count, metavar="N",
                       help="steps of generator training (not stated); default "
                       f"{apfl.GENERATOR_STEPS}")
    group.add_argument("--generator-batch", type=size, metavar="N",
                       help="n_s, samples of each class in such a step: 600; default "
                       f"{apfl.GENERATOR_BATCH}")
    group.add_argument("--friend-epochs", type=count, metavar="N",
                       help=f"epochs of a friend model; default {apfl.FRIEND_EPOCHS}")
    return top


def methods_table() -> str:
    """What --methods prints: a row for every method, of as many lines as its cells need."""
    rows = [("method", "paper", "a client sends", "it keeps", "--model", "--aggregation",
             "flags of its own")]
    for method, about in ABOUT.items():
        defaults = METHOD_DEFAULTS[method]
        networks = ("-widths" if method in WIDTH_METHODS else
                    "cnn, one ResNet" if method == "apfl" else "all but -widths")
        averages = list(AGGREGATIONS) if "aggregation" in defaults else []
        averages += ["async"] if method in ASYNC_METHODS else []
        averages += ["its own"] if method in OWN_AVERAGES else []
        own = [f"--{name.replace('_', '-')}" for name in defaults if name != "aggregation"]
        rows.append((method, *about, networks, ", ".join(averages) or "-", " ".join(own) or "-"))
    widths, lines = (11, 11, 12, 9, 8, 17, 21), []
    for row in rows:
        cells = [textwrap.wrap(cell, width, break_on_hyphens=False)
                 for cell, width in zip(row, widths)]
        lines += ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip()
                  for line in zip_longest(*cells, fillvalue="")] + [""]
    return "\n".join([*lines, "its own: by coordinate over sub-models; of feddf, within each "
                      "architecture"])


def resolve(typed: dict) -> dict:
    """Every option of a run: those of its setting, then of its method, then what was typed.

    beta stays None where it depends on the images; prepare_experiment fills it in.
    Raises ValueError if something was typed that the run would not read, or if it cannot run.
    """
    method, dataset = typed.get("method", "fedin"), typed.get("dataset", "digits")
    paper = "apfl" if method in APFL_METHODS else "fedin"
    setting = typed.get("setting", "quick" if dataset == "digits" else paper)
    settings = {"method": method, "dataset": dataset, "setting": setting, "seed": 0,
                "train_images": None, "missing_classes": None, "augment": False,
                "checkpoint_every": 1, **SETTINGS[setting], **METHOD_DEFAULTS[method]}
    if setting == "quick" and method in APFL_METHODS:
        settings |= QUICK_APFL
    if setting == "quick" and method == "apfl":
        settings |= QUICK_GENERATOR
    if setting == "quick" and method == "feddf":
        settings["distillation_steps"] = QUICK_DISTILLATION_STEPS
    if method in WIDTH_METHODS:
        settings["model"] = "resnet152-widths" if setting == "fedin" else "resnet18-widths"
    if setting == "apfl" and method == "fedprox":
        settings["mu"] = baselines.FEDPROX_MU_APFL
    if dataset in data.DATASETS and dataset != "digits":
        settings["data_dir"] = "data"
    if method == "apfl":
        if dataset in ("digits", "svhn"):
            settings["semantics"] = "segments"
        settings["semantics"] = typed.get("semantics", settings["semantics"])
        if settings["semantics"] in ("clip", "bert"):
            settings["data_dir"] = "data"
        if settings["semantics"] == "word2vec":
            settings["word_vectors"] = None

    fixed = {}  # what a flag decides for others, and that flag
    settings["partition"] = typed.get("partition", settings["partition"])
    if "missing_classes" in typed:
        settings["partition"] = "pathological"
        fixed |= dict.fromkeys(("partition", "alpha", "classes_per_client"), "--missing-classes")
    if settings["partition"] != "dirichlet":
        del settings["alpha"]
    if settings["partition"] == "pathological":
        settings["classes_per_client"] = 2
    if typed.get("aggregation") == "async":
        settings |= ASYNC
        del settings["participation"]
        fixed["participation"] = "--aggregation async"
    for part in typed.get("ablate", ()):
        settings |= ABLATIONS[part]
        fixed |= dict.fromkeys(ABLATIONS[part], f"--ablate {' '.join(typed['ablate'])}")
    settings |= {"device": default_device(), "workers": None, "threads": 1}

    partition = f"--partition {settings['partition']}"
    causes = {"alpha": partition, "classes_per_client": partition,
              "data_dir": f"--dataset {dataset}", **fixed}
    if method in OWN_AVERAGES:
        causes["aggregation"] = f"--method {method}, which {OWN_AVERAGES[method]}"
    if "aggregation" in settings:
        causes |= dict.fromkeys(ASYNC, "this --aggregation")
    if "semantics" in settings:
        causes["word_vectors"] = "this --semantics"
    for name in typed:
        if name in fixed or name not in settings:
            reason = f"with {causes[name]}" if name in causes else f"by --method {method}"
            raise ValueError(f"--{name.replace('_', '-')} is not read {reason}: leave it out")
    settings |= typed
    check_combination(settings)
    settings["device"] = str(find_device(settings["device"]))
    if settings["workers"] is None:
        on_cpu = settings["device"] == "cpu"
        settings["workers"] = min(num_cores(), num_participants(settings)) if on_cpu else 1
    return settings


def check_combination(settings: dict) -> None:
    """Raise ValueError if method, model and aggregation do not go together."""
    method, model = settings["method"], settings["model"]
    if settings.get("aggregation") == "async" and method not in ASYNC_METHODS:
        raise ValueError(f"--aggregation async works with {', '.join(ASYNC_METHODS)}, not with "
                         f"--method {method}")
    proxy = settings.get("proxy", "holdout")
    if proxy not in ("holdout", "noise") and not proxy.endswith(".npz"):
        raise ValueError(f"unknown --proxy '{proxy}': give holdout, noise, or the path of an .npz")
    if (method in WIDTH_METHODS) != is_cut_by_width(settings):
        widths = " or ".join(name for name in models.MODELS if name.endswith("-widths"))
        if method in WIDTH_METHODS:
            raise ValueError(f"--method {method} cuts one network into sub-models, which --model "
                             f"{model} cannot be: give --model {widths}")
        raise ValueError(f"--model {model} is cut into sub-models, which only --method "
                         f"{', '.join(WIDTH_METHODS)} can do: give another --model")
    for needs, name in ((method == "apfl", "--method apfl"),
                        (settings.get("aggregation") == "async", "--aggregation async")):
        if needs and len(models.MODELS[model]) > 1:
            raise ValueError(f"{name} needs one architecture, not --model {model}: give --model "
                             "cnn, or one ResNet")


def is_cut_by_width(settings: dict) -> bool:
    """Whether the clients have sub-models of one network."""
    return settings["model"].endswith("-widths")


def architectures_of(settings: dict) -> tuple[str, ...]:
    """The architectures of the clients, small to large."""
    architectures = models.MODELS[settings["model"]]
    return models.with_exits(architectures) if settings["method"] == "scalefl" else architectures


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_device(name: str) -> torch.device:
    """The device of a name.  Raises ValueError if there is none of that name on this machine."""
    try:
        device = torch.device(name)
        torch.ones(1, dtype=torch.float64, device=device).cpu()  # what averaging needs
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises each, by device
        raise ValueError(f"--device {name} cannot be used ({data.first_line(error)}): "
                         f"try --device {default_device()}") from error
    return device


def num_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def num_participants(settings: dict) -> int:
    """Clients drawn a round; in asynchronous runs arrivals a round, which are all of them."""
    return max(1, round(settings.get("participation", 1.0) * settings["clients"]))


# ---------------------------------------------------------------------------------- set-up of a run


class Experiment(NamedTuple):
    """What stays the same through all rounds."""

    settings: dict
    method: Method
    data: data.Dataset  # on the device
    clients: list[Client]
    dropouts: list[int]  # ids of the clients that dropped out before the first round
    seen: list[int]  # classes that clients hold that take part
    unseen: list[int]  # classes that dropout clients alone hold
    test_shares: list[torch.Tensor]  # client -> indices of its test images
    statistics: tuple[torch.Tensor, torch.Tensor]  # mean and deviation of the training images
    speeds: list[float]  # images a client trains on in a unit of virtual time
    free: dict[str, list]  # architecture -> networks and optimisers that wait for a client
    semantics: torch.Tensor | None = None  # A(y), where a generator is yet to be trained

    @property
    def architectures(self) -> list[str]:
        """The architectures of the clients, small to large."""
        return list(self.free)

    @property
    def available(self) -> list[int]:
        """The clients that take part in rounds."""
        return [client.id for client in self.clients if client.id not in self.dropouts]

    def stream(self, t: int, client: int) -> Callable[[int], torch.Generator]:
        """The random streams of one client in one round, by purpose."""
        return partial(data.torch_stream, self.settings["seed"], round=t, client=client)


def choose_images(settings: dict, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the clients' training images and, for --proxy holdout, of the server's.

    The server's are among those that --train-images leaves over; where these are fewer than
    PROXY_SHARE of the clients' images, the clients give up some of theirs.
    Raises ValueError if there are fewer images than asked for.
    """
    seed, count = settings["seed"], settings["train_images"]
    chosen = torch.arange(len(labels))
    if count is not None:
        if count > len(labels):
            raise ValueError(f"--train-images {count} is more than the {len(labels)} training "
                             f"images of {settings['dataset']}")
        chosen = data.balanced_subset(labels, count, data.numpy_stream(seed, data.SUBSET))
    if settings.get("proxy") != "holdout" or settings["distillation_steps"] == 0:
        return chosen, chosen[:0]
    order = torch.from_numpy(data.numpy_stream(seed, data.PROXY).permutation(len(labels)))
    is_chosen = torch.isin(order, chosen)
    left_over = order[~is_chosen]
    size = min(PROXY_IMAGES, max(len(left_over), round(PROXY_SHARE * len(chosen))))
    held_out = torch.cat([left_over, order[is_chosen]])[:size]
    return chosen[~torch.isin(chosen, held_out)], held_out


def proxy_images(settings: dict, loaded: data.Dataset, held_out: torch.Tensor,
                 unseen: list[int]) -> torch.Tensor:
    """The unlabelled images of feddf's server, uint8 (N, C, 32, 32).

    held_out: indices of training images for --proxy holdout; those of unseen classes are left out,
        since nothing of dropout clients' classes may reach the server
    Raises ValueError if there are none that fit.
    """
    channels, name = loaded.x_train.shape[1], settings["proxy"]
    rng = data.numpy_stream(settings["seed"], data.PROXY)
    if name == "holdout":
        images = loaded.x_train[held_out[~torch.isin(loaded.y_train[held_out],
                                                     torch.tensor(unseen, dtype=torch.int64))]]
    elif name == "noise":
        shape = (min(PROXY_IMAGES, len(loaded.y_train)), channels, data.IMAGE_SIZE, data.IMAGE_SIZE)
        images = torch.from_numpy(rng.integers(256, size=shape, dtype=np.uint8))
    else:
        images = data.load(name).x_train
        images = images[torch.from_numpy(rng.permutation(len(images))[:PROXY_IMAGES])]
    if images.shape[1] != channels or len(images) < 2:
        raise ValueError(f"--proxy {name} has {len(images)} images of {images.shape[1]} channels, "
                         f"and at least 2 of {channels} are needed: give another --proxy")
    return images


def prepare_experiment(settings: dict) -> Experiment:
    """Load and partition the data, and bind the method's functions to the settings.

    Raises ValueError with one line that says what is wrong and what to do.
    """
    seed, num_clients = settings["seed"], settings["clients"]
    loaded = data.load(settings["dataset"], settings.get("data_dir", "data"))
    chosen, held_out = choose_images(settings, loaded.y_train)
    whole = loaded
    if len(chosen) < len(whole.y_train):
        loaded = whole._replace(x_train=whole.x_train[chosen], y_train=whole.y_train[chosen])
    if len(loaded.y_train) < 2 * num_clients:
        raise ValueError(f"{len(loaded.y_train)} training images cannot give each of {num_clients} "
                         "clients the two that it needs: use fewer --clients or more images")
    rng, dropouts = data.numpy_stream(seed, data.PARTITION), []
    if settings["missing_classes"] is not None:
        parts, dropouts = data.partition_dropout(loaded.y_train, num_clients,
                                                 settings["missing_classes"], rng)
    elif settings["partition"] == "iid":
        parts = data.partition_iid(loaded.y_train, num_clients, rng)
    elif settings["partition"] == "dirichlet":
        parts = data.partition_dirichlet(loaded.y_train, num_clients, settings["alpha"], rng)
    else:
        parts = data.partition_pathological(loaded.y_train, num_clients,
                                            settings["classes_per_client"], rng)
    for k, part in enumerate(parts):
        if len(part) < 2:
            raise ValueError(f"this partition leaves client {k} with {len(part)} images, and each "
                             "needs two: use fewer --clients or more images")
    shares = data.share_test(loaded.y_test, loaded.y_train, parts,
                             data.numpy_stream(seed, data.TEST_SHARES))

    taking_part = torch.cat([part for k, part in enumerate(parts) if k not in dropouts])
    held = [set(loaded.y_train[part].tolist()) for part in parts]
    seen = set().union(*(held[k] for k in range(num_clients) if k not in dropouts))
    unseen = sorted(set().union(*(held[k] for k in dropouts)) - seen)
    if "beta" in settings and settings["beta"] is None:
        colour = loaded.x_train.shape[1] == 3
        settings = settings | {"beta": apfl.BETA_COLOUR if colour else apfl.BETA_GRAY}

    device = torch.device(settings["device"])
    on_device = loaded._replace(**{name: getattr(loaded, name).to(device)
                                   for name in ("x_train", "y_train", "x_test", "y_test")})
    mean, deviation = data.channel_statistics(loaded.x_train, taking_part)
    proxy = None
    if settings.get("distillation_steps"):
        images = proxy_images(settings, whole, held_out, unseen).to(device)
        proxy = data.ClientData(images, torch.zeros(len(images), device=device), torch.arange(
            len(images), device=device), partial(data.standardise, mean=mean.to(device),
                                                 deviation=deviation.to(device)))
    archs = architectures_of(settings)
    clients = [Client(k, part.to(device), models.architecture_of(k, num_clients, archs))
               for k, part in enumerate(parts)]
    spread = settings.get("speed_spread", SPEED_SPREAD)
    speeds = spread ** data.numpy_stream(seed, data.SPEEDS).uniform(size=num_clients)
    method = bind(METHODS[settings["method"]], settings, proxy=proxy, owners={
        client.id: client.arch for client in clients if client.id not in dropouts})
    return Experiment(settings, method, on_device, clients, dropouts, sorted(seen), unseen,
                      [share.to(device) for share in shares],
                      (mean.to(device), deviation.to(device)), speeds.tolist(),
                      {arch: [] for arch in archs})


def read_semantics(settings: dict, classes: list[str]) -> torch.Tensor:
    """The embeddings A(y) of the classes; what a text encoder gives is kept beside the data."""
    cache = None
    if settings["semantics"] in ("clip", "bert"):
        name = f"{settings['semantics']}-{Path(settings['dataset']).stem}.npz"
        cache = Path(settings["data_dir"]) / name
        if not cache.exists():
            print(f"encoding the class names with {settings['semantics']}, whose weights are "
                  "downloaded at first use", flush=True)
    return generator.load_semantics(settings["semantics"], classes, cache=cache,
                                    word_vectors=settings.get("word_vectors"))


def bind(method: Method, settings: dict, **others: object) -> Method:
    """The method with its functions' keyword arguments filled in from the settings and others."""
    values = {**settings, "aggregation": AGGREGATIONS.get(settings.get("aggregation")),
              "balance": settings.get("lambda"), **others}

    def fill(function):
        if function is None:
            return None
        keywords = [name for name, parameter in inspect.signature(function).parameters.items()
                    if parameter.kind is parameter.KEYWORD_ONLY]
        return partial(function, **{name: values[name] for name in keywords if name in values})

    return Method(*map(fill, method))


def empty_network(experiment: Experiment, arch: str) -> torch.nn.Module:
    """A network for the data of an experiment, whose weights are yet to be loaded."""
    images = experiment.data.x_train
    return models.build_empty(arch, images.shape[1], len(experiment.data.classes), images.device)


def network(experiment: Experiment, arch: str, weights: State) -> torch.nn.Module:
    """A network of these weights, in the layout that predicts fastest.

    channels_last was measured to predict 1.2 to 1.7 x faster on a CPU.
    """
    model = empty_network(experiment, arch).to(memory_format=torch.channels_last)
    model.load_state_dict(weights)
    return model


def scratch(experiment: Experiment, arch: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A network and optimiser to be overwritten: ones used before that are free, or new ones.

    Memory is laid out channels_last for the CNN alone: that was measured to be worth 1.24 x in its
    training on a CPU, where the ResNets at batch 16 would lose (0.77 x).
    """
    try:
        return experiment.free[arch].pop()
    except IndexError:  # more clients of this architecture train at this moment than ever before
        model, settings = empty_network(experiment, arch), experiment.settings
        if arch == "cnn":
            model = model.to(memory_format=torch.channels_last)
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[settings["optimizer"]]
        return model, kind(model.parameters(), lr=settings["lr"], fused=True)


# ---------------------------------------------------------------------------------------- one round


def draw_participants(settings: dict, t: int, dropouts: Iterable[int] = ()) -> list[int]:
    """The clients of round t, ascending; the same for every method."""
    rng = data.numpy_stream(settings["seed"], data.PARTICIPANTS, t)
    available = [k for k in range(settings["clients"]) if k not in dropouts]
    count = min(num_participants(settings), len(available))
    return sorted(rng.choice(available, count, replace=False).tolist())


def participants(experiment: Experiment, t: int) -> list[int]:
    """The clients of round t in an experiment; who trains alone cannot drop out from a server."""
    alone = experiment.settings["method"] == "local"
    return draw_participants(experiment.settings, t, () if alone else experiment.dropouts)


def train_client(experiment: Experiment, update: Callable, t: int, client: Client,
                 received: object, *kept: object) -> Result:
    """Run update, what a method does on a client; called in a worker thread.

    t: the round, or another number that the random streams of this piece of work go by
    kept: what stays on the device, for a method that has such a thing
    Raises FloatingPointError if the loss or a weight is no longer finite.
    """
    settings, stream = experiment.settings, experiment.stream(t, client.id)
    mean, deviation = experiment.statistics
    prepare = partial(data.standardise, mean=mean, deviation=deviation)
    if settings["augment"]:
        characters = settings["dataset"] in ("digits", "svhn", "emnist")
        prepare = partial(data.augment, mean=mean, deviation=deviation,
                          kind=data.CHARACTERS if characters else data.Augmentation(),
                          rng=stream(data.AUGMENTATION))
    own = data.ClientData(experiment.data.x_train, experiment.data.y_train, client.indices, prepare)
    model, optimizer = scratch(experiment, client.arch)
    result = update(model, optimizer, received, own, stream, *kept)
    optimizer.zero_grad()  # frees the gradients while the network waits for its next client
    experiment.free[client.arch].append((model, optimizer))
    finite = [tensor.isfinite().all() for tensor in models.tensors_in((result.update, result.kept))]
    if not (math.isfinite(result.loss) and torch.stack(finite).all()):
        raise FloatingPointError(f"client {client.id}: the loss or a weight is not finite any "
                                 "more; a smaller --lr may help")
    return result


def train_round(experiment: Experiment, pool: ThreadPoolExecutor, t: int, server: dict,
                memory: dict) -> tuple[dict, dict, dict]:
    """One round: what the chosen clients receive, their updates, the server's update.

    memory: client id -> what stays on its device, for those that have taken part
    Returns the new server state, the new memory and the round's figures for the log.
    """
    method, chosen = experiment.method, participants(experiment, t)
    clients = {k: experiment.clients[k] for k in chosen}
    if method.assign is not None:
        clients = {k: method.assign(client, experiment.architectures, experiment.stream(t, k))
                   for k, client in clients.items()}
    received = {k: method.download(server, clients[k], experiment.stream(t, k)) for k in chosen}
    kept = {k: [] for k in chosen}
    if method.initial_memory is not None:
        kept = {k: [memory[k] if k in memory else method.initial_memory(server, clients[k])]
                for k in chosen}

    def cost(k: int) -> int:
        return len(clients[k].indices) * models.num_bytes(received[k] or kept[k])

    # The largest first, so that no worker ends up alone with one.
    futures = {k: pool.submit(train_client, experiment, method.client_update, t, clients[k],
                              received[k], *kept[k])
               for k in sorted(chosen, key=cost, reverse=True)}
    results = {k: futures[k].result() for k in chosen}
    updates = {k: result.update for k, result in results.items()}
    server = method.server_update(server, updates)
    if method.distil is not None:
        server = method.distil(server, updates, partial(network, experiment),
                               experiment.stream(t, 0))
        if not all(tensor.isfinite().all() for tensor in models.tensors_in(server)):
            raise FloatingPointError("the server's training: a weight is not finite any more")
    if method.initial_memory is not None:
        memory = memory | {k: result.kept for k, result in results.items()}
    total = Counter()
    for k, result in results.items():
        total.update(sums(result, received[k]))
    clock = max(result.samples / experiment.speeds[k] for k, result in results.items())
    return server, memory, {**round_figures(total), "clock": clock}


def train_arrivals(experiment: Experiment, pool: ThreadPoolExecutor, t: int, server: dict,
                   memory: dict) -> tuple[dict, dict, dict]:
    """One asynchronous round: as many arrivals as clients that take part (AP-FL, Sec. 3.2).

    Every client always works on the model that it received when its last update arrived.
    server["flights"] holds that work: client -> the weights received, the server's version at that
    time, the how many-th work of the client it is, the virtual time at which it arrives.
    Takes and returns what train_round does.  Since work takes a time that is known, the order of
    arrivals is known before, and what arrives in this round is trained in parallel.
    """
    settings, method, clients = experiment.settings, experiment.method, experiment.clients
    durations = {k: settings["local_epochs"] / experiment.speeds[k] * data.samples_per_epoch(
        len(clients[k].indices), settings["batch_size"]) for k in experiment.available}

    def depart(k: int, work: int, now: float) -> dict:
        return {"received": method.download(server, clients[k], experiment.stream(work, k)),
                "version": version, "work": work, "arrival": now + durations[k]}

    def submit(k: int):
        return pool.submit(train_client, experiment, method.client_update, flights[k]["work"],
                           clients[k], flights[k]["received"])

    version, started = server.get("version", 0), server.get("time", 0.0)
    flights = dict(server.get("flights") or {k: depart(k, 1, 0.0) for k in durations})
    events = apfl.next_arrivals({k: flight["arrival"] for k, flight in flights.items()}, durations,
                                len(durations))
    due = Counter(k for _, k in events)
    futures = {k: submit(k) for k in due}
    total, staleness = Counter(), []
    for now, k in events:
        result, flight = futures.pop(k).result(), flights[k]
        total.update(sums(result, flight["received"]))
        staleness.append(version - flight["version"])
        share = settings["mixing"] * apfl.staleness_weight(staleness[-1], settings["staleness"])
        server = method.server_update(
            server, {k: result.update},
            aggregation=lambda weights, uploads, counts, **_: apfl.mix(weights, uploads, share))
        version += 1
        flights[k] = depart(k, flight["work"] + 1, now)
        due[k] -= 1
        if due[k]:
            futures[k] = submit(k)
    server = {**server, "version": version, "flights": flights, "time": now}
    return server, memory, {**round_figures(total), "clock": now - started,
                            "staleness_mean": sum(staleness) / len(staleness)}


def sums(result: Result, received: object) -> dict:
    """What a client update adds to the figures of its round."""
    return {"loss": result.loss, "upload": models.num_bytes(result.update),
            "download": models.num_bytes(received), "samples": result.samples}


def round_figures(total: dict) -> dict:
    """What the log says of a round, from the sums over its client updates."""
    return {"loss": total["loss"] / max(1, total["samples"]), "upload_mb": total["upload"] / 1e6,
            "download_mb": total["download"] / 1e6, "samples": total["samples"]}


# ---------------------------------------------------------------------- stages after the last round


class Progress(NamedTuple):
    """Everything that the next round or stage needs."""

    round: int  # the last one that is finished
    server: dict
    memory: dict  # client id -> what stays on its device, for those that have taken part
    totals: dict  # sums over all rounds so far
    line: dict  # of metrics.jsonl, the last one
    after: dict  # stage after the last round -> what came of it, for those that are finished


def finish(experiment: Experiment, pool: ThreadPoolExecutor, progress: Progress,
           out: Path) -> Progress:
    """The stages of the method after the last round, those that are finished apart.

    Each is saved when it is done, under its name in progress.after:
    late: client -> weights, of clients that train on the final global model
    generator: its weights, with the semantics in them
    friends: client -> weights of its friend model
    """
    method, clients, server = experiment.method, experiment.clients, progress.server

    def train_late() -> dict[int, State]:
        received = {client.id: method.download(server, client, experiment.stream(0, client.id))
                    for client in clients if method.trains_late(server, client)}
        return {k: result.update.weights for k, result in train_all(
            experiment, pool, "late training", method.client_update, received).items()}

    def memorise() -> State:
        net = train_generator(experiment, server)
        draw_samples(out / "samples.png", experiment, server, net)
        return models.copy_state(net)

    def befriend() -> dict[int, State]:
        net = generator.load_generator(progress.after["generator"],
                                       experiment.data.x_train.shape[1],
                                       experiment.settings["noise_dim"])
        received = {client.id: (server["weights"][client.arch], net) for client in clients}
        return {k: result.kept for k, result in train_all(
            experiment, pool, "friend models", method.befriend, received).items()}

    for name, function, stage in (("late", method.trains_late, train_late),
                                  ("generator", method.memorise, memorise),
                                  ("friends", method.befriend, befriend)):
        if function is None or name in progress.after:
            continue
        start = time.perf_counter()
        outcome = stage()
        seconds = round(time.perf_counter() - start, 3)
        progress = progress._replace(after=progress.after | {name: outcome},
                                     totals=progress.totals | {f"{name}_seconds": seconds})
        save_checkpoint(out, progress)
    return progress


def train_all(experiment: Experiment, pool: ThreadPoolExecutor, what: str, update: Callable,
              received: dict[int, object]) -> dict[int, Result]:
    """Run update once on each client that receives something, with a progress bar.

    The random streams go by the number 0, which no round has.
    """
    if not received:
        return {}
    futures = {k: pool.submit(train_client, experiment, update, 0, experiment.clients[k],
                              received[k]) for k in received}
    try:
        return {k: futures[k].result() for k in tqdm(futures, what, unit=" client",
                                                     file=sys.stdout)}
    except FloatingPointError as error:
        raise FloatingPointError(f"{what}, {error}") from error


def train_generator(experiment: Experiment, server: dict) -> generator.SemanticGenerator:
    """The server's stage of AP-FL: a generator trained under the clients' models.

    Raises FloatingPointError if a weight is no longer finite at the end.
    """
    settings, images = experiment.settings, experiment.data.x_train
    seed, arch = settings["seed"], experiment.clients[0].arch
    net = generator.initial_generator(
        experiment.semantics, images.shape[1], settings["noise_dim"],
        data.torch_stream(seed, data.GENERATOR_WEIGHTS)).to(images.device)

    steps = experiment.method.memorise(server, net, partial(network, experiment, arch),
                                       data.torch_stream(seed, data.GENERATOR_NOISE))
    bar = tqdm(steps, "generator", settings["generator_steps"], unit=" step", file=sys.stdout)
    for l_cls, l_diversity in bar:
        bar.set_postfix_str(f"L_cls {l_cls:.3f}, L_diversity {l_diversity:.1f}", refresh=False)
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise FloatingPointError("generator: a weight is not finite any more")
    return net


def final_models(experiment: Experiment, progress: Progress) -> dict[str, dict[int, State]]:
    """After the stages, by client: its own model and, of AP-FL, its friend and personalised one.

    The last of them is the one that it uses.  Its own is its last upload, or what it trained late.
    """
    after, method = progress.after, experiment.method
    own = {k: teacher["weights"] for k, teacher in progress.server.get("teachers", {}).items()}
    kinds = {"client": dict(sorted((own | after["late"]).items()))}
    if method.personalise is not None:
        friends = after["friends"]
        kinds |= {"friend": friends,
                  "personalised": {k: method.personalise(weights, friends[k])
                                   for k, weights in kinds["client"].items()}}
    return kinds


def stage_download(experiment: Experiment, progress: Progress) -> float:
    """Megabytes that the stages send: to a client the global weights, and the generator."""
    after, weights = progress.after, progress.server["weights"]
    friends = after.get("friends", {})
    total = sum(models.num_bytes(weights[experiment.clients[k].arch])
                for k in after.get("late", {}).keys() | friends.keys())
    return (total + len(friends) * models.num_bytes(after.get("generator", {}))) / 1e6


# --------------------------------------------------------------------------------------- evaluation


def evaluate(experiment: Experiment, server: dict, memory: dict) -> dict:
    """The accuracies of the models that the clients use in the rounds; see accuracies.

    Of a network that is cut by width, full_accuracy besides: that of the whole one.
    """
    in_use = ((client.id, client.arch, *experiment.method.deploy(server, client,
                                                                 memory.get(client.id)))
              for client in experiment.clients)
    if not is_cut_by_width(experiment.settings):
        return accuracies(experiment, predicted_right(experiment, in_use))
    ((arch, whole),) = server["weights"].items()
    right = predicted_right(experiment, chain(in_use, [("full", arch, arch, whole)]))
    full = 100 * float(right.pop("full").double().mean())
    return accuracies(experiment, right) | {"full_accuracy": full}


def evaluate_finally(experiment: Experiment, progress: Progress) -> dict:
    """What the stages after the last round change in the last line of metrics.jsonl.

    accuracy is that of the models that clients use now, and global_accuracy that of the global
    model.  AP-FL adds the accuracies of all kinds of models, those of dropout clients apart.
    """
    line, prefixes = progress.line, {"": experiment.available}
    if experiment.dropouts:
        prefixes["dropout_"] = experiment.dropouts
    entry = {"download_mb": line["download_mb"] + stage_download(experiment, progress)}
    kinds = final_models(experiment, progress)
    for kind, by_client in tqdm(kinds.items(), "evaluation", unit=" kind", file=sys.stdout):
        right = predicted_right(experiment, (
            (client.id, client.arch, client.id, by_client[client.id])
            for client in experiment.clients))
        entry |= accuracies(experiment, right)  # the last kind is the one in use
        if len(kinds) > 1:
            for prefix, ids in prefixes.items():
                own = share_accuracies(experiment, {k: right[k] for k in ids})
                entry |= {f"{prefix}{kind}_{name}": value for name, value in own.items()}
    return {**line, **entry, "global_accuracy": line["accuracy"],
            "global_personal_accuracy": line["personal_accuracy"]}


def predicted_right(experiment: Experiment, in_use: Iterable[tuple[object, str, object, State]],
                    ) -> dict[object, torch.Tensor]:
    """By client, which test images (N,) its model gets right.

    in_use: client, architecture, key and weights of its model, one after the other, so that they
        need not all be in memory; equal keys are equal models, and each distinct one predicts the
        test set once
    """
    mean, deviation = experiment.statistics
    prepare = partial(data.standardise, mean=mean, deviation=deviation)
    images, taking_part = experiment.data.x_train, torch.cat(
        [experiment.clients[k].indices for k in experiment.available])
    # Every batch has images of all clients: the variance between clients belongs to the statistics.
    count = math.ceil(len(taking_part) / models.TEST_BATCH)
    by_key, right = {}, {}
    for k, arch, key, weights in in_use:
        if key not in by_key:
            model = network(experiment, arch, weights)
            models.collect_statistics(model, (prepare(images[taking_part[batch::count]])
                                              for batch in range(count)))
            predicted = models.predict(model, experiment.data.x_test, prepare)
            by_key[key] = predicted == experiment.data.y_test
        right[k] = by_key[key]
    return right


def share_accuracies(experiment: Experiment, right: dict[int, torch.Tensor]) -> dict:
    """Accuracies in percent over some clients.

    accuracy: on the whole test set, mean over clients; personal_accuracy: on each client's own
    share of the test set, weighted by share (None if they have none)
    """
    shares = {k: experiment.test_shares[k] for k in right}
    of_all = sum(int(vector.sum()) for vector in right.values())
    of_own = sum(int(vector[shares[k]].sum()) for k, vector in right.items())
    shared = sum(len(share) for share in shares.values())
    return {"accuracy": 100 * of_all / (len(right) * len(experiment.data.y_test)),
            "personal_accuracy": 100 * of_own / shared if shared else None}


def accuracies(experiment: Experiment, right: dict[int, torch.Tensor]) -> dict:
    """Accuracies in percent over all clients, and in the dropout setting of dropout clients.

    Theirs are split as in generalised zero-shot learning: mean accuracy of a class over the classes
    that rounds have seen, over those that dropout clients alone hold (predictions are among all
    classes), and the harmonic mean of the two.
    """
    figures = share_accuracies(experiment, right)
    if not experiment.dropouts:
        return figures
    of_dropouts = {k: right[k] for k in experiment.dropouts}
    for name, value in share_accuracies(experiment, of_dropouts).items():
        figures[f"dropout_{name}"] = value
    vectors, labels = torch.stack(list(of_dropouts.values())), experiment.data.y_test

    def mean_of_classes(classes: list[int]) -> float:
        each = [vectors[:, labels == label].double().mean() for label in classes
                if (labels == label).any()]
        return 100 * float(sum(each) / max(1, len(each)))

    seen, unseen = mean_of_classes(experiment.seen), mean_of_classes(experiment.unseen)
    return figures | {"seen_accuracy": seen, "unseen_accuracy": unseen,
                      "harmonic_accuracy": 2 * seen * unseen / max(1e-9, seen + unseen)}


# ------------------------------------------------------------------------------- the files of a run


def write_atomically(path: Path, write: Callable) -> None:
    """Let write(file) fill a file that gets its name only once it is safely on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch.save's own, after any other: a full disk, a Ctrl-C
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise OSError(f"cannot write {temporary}: {data.first_line(error)}") from error
    os.replace(temporary, path)


def write_json(path: Path, value: dict) -> None:
    """Write a dict as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def check_free(out: Path) -> None:
    """Raise ValueError if the folder of a new run holds a run, or anything else, already."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if held - {"config.json.tmp"}:  # which a run leaves that is killed in its first instant
        raise ValueError(f"{out} is not empty: go on with its run by --resume --out {out}, or "
                         "choose another --out")


def read_config(out: Path, typed: dict) -> dict:
    """The settings of the run in a folder, with what was typed besides.

    Raises ValueError if there is no run, or if something typed differs from it and may not.
    """
    try:
        settings = json.loads((out / "config.json").read_text())
        like = {name: settings[name] for name in ("method", "dataset", "model", "partition")}
        like |= {name: settings[name] for name in ("aggregation", "missing_classes", "semantics")
                 if settings.get(name) is not None}
        if "missing_classes" in like:
            del like["partition"]  # which it decides
        complete = resolve(like).keys() <= settings.keys() and isinstance(settings["rounds"], int)
    except FileNotFoundError as error:
        raise ValueError(f"there is no run in {out} to resume: check --out, or leave out --resume "
                         "to start one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out / 'config.json'} is damaged: start anew with another --out"
                         ) from error
    if not complete:
        raise ValueError(f"{out / 'config.json'} lacks settings: start anew with another --out")
    for name, value in typed.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in settings:
            raise ValueError(f"{flag} is not read by the run in {out}: leave it out")
        if settings[name] != value and name not in MAY_CHANGE:
            raise ValueError(f"{flag} {value} differs from the {settings[name]} of the run in "
                             f"{out}: leave it out, or start a new run with another --out")
    if typed.get("rounds", settings["rounds"]) < settings["rounds"]:
        raise ValueError(f"--rounds {typed['rounds']} is less than the {settings['rounds']} of "
                         f"the run in {out}: it may only grow")
    settings |= typed
    find_device(settings["device"])
    return settings


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


def replace_last_line(path: Path, entry: dict) -> None:
    """Put another line in the place of the last one of metrics.jsonl, atomically."""
    before = path.read_bytes().splitlines(keepends=True)[:-1]
    write_atomically(path, lambda file: file.writelines([*before, to_line(entry)]))


def to_line(entry: dict) -> bytes:
    """A line of metrics.jsonl."""
    return (json.dumps(entry) + "\n").encode()


def is_evaluated(t: int, settings: dict) -> bool:
    """Whether round t is one of those after which the models are evaluated."""
    return t % settings["eval_every"] == 0 or t == settings["rounds"]


def append_metrics(path: Path, entry: dict) -> None:
    """Add a line to metrics.jsonl, on the disk when this returns."""
    with open(path, "ab") as file:
        file.write(to_line(entry))
        file.flush()
        os.fsync(file.fileno())


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


# ----------------------------------------------------------------------------------------- pictures


def draw_curves(path: Path, history: list[dict], title: str) -> None:
    """A picture of accuracy and loss against rounds, of asynchronous runs against the clock too.

    Accuracies after the stages that follow the last round are marks of their own.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rounds, last = [entry["round"] for entry in history], history[-1]
    marker = "o" if len(rounds) <= 30 else None
    shown = [("accuracy", "whole test set", "C0"), ("personal_accuracy", "own share of it", "C1")]
    if "full_accuracy" in last:
        shown.append(("full_accuracy", "whole test set, whole network", "C2"))
    for name, label, colour in shown:
        left.plot(rounds, [in_round(entry, name) for entry in history], marker=marker,
                  markersize=3, label=label, color=colour)
        if "global_accuracy" in last:
            left.plot(rounds[-1], last[name], "*", markersize=10, color=colour, clip_on=False,
                      label=f"{label}, at the end")
    right.plot(rounds, [entry["loss"] for entry in history], marker=marker, markersize=3,
               label="training images", color="C3")
    left.set(xlabel="round", ylabel="accuracy, %")
    right.set(xlabel="round", ylabel="cross entropy")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if "staleness_mean" in last:
            axes.set_xlim(0, rounds[-1])  # where the two scales can be told apart from margins
            clock = [0.0, *(entry["clock"] for entry in history)]
            above = axes.secondary_xaxis("top", functions=(
                partial(np.interp, xp=[0, *rounds], fp=clock),
                partial(np.interp, xp=clock, fp=[0, *rounds])))
            above.set_xlabel("virtual clock")
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=120)


def draw_samples(path: Path, experiment: Experiment, server: dict,
                 net: generator.SemanticGenerator) -> None:
    """A sheet of synthetic images, ten a class; classes that no teacher has seen are marked.

    The classes stand in columns of 26.
    """
    names = experiment.data.classes
    seen = sum(teacher["class_counts"] for teacher in server["teachers"].values()) > 0
    mean, deviation = experiment.statistics
    labels = torch.arange(len(names), device=mean.device).repeat_interleave(10)
    images = generator.sample(net, labels, data.torch_stream(
        experiment.settings["seed"], data.GENERATOR_NOISE, round=1))
    images = (images * deviation + mean).clamp(0, 255).byte().cpu()
    size = images.shape[2]
    strips = images.unflatten(0, (len(names), 10)).permute(0, 3, 1, 4, 2).reshape(
        len(names), size, 10 * size, -1)
    starts = range(0, len(names), 26)
    figure = Figure(figsize=(5.5 * len(starts), 0.8 + 0.45 * min(26, len(names))),
                    layout="constrained")
    for axes, start in zip(figure.subplots(1, len(starts), squeeze=False)[0], starts):
        block = strips[start:start + 26]
        axes.imshow(block.flatten(0, 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_xticks([])
        shown = range(start, start + len(block))
        axes.set_yticks([(row + 0.5) * size for row in range(len(block))], [
            names[label] + ("" if seen[label] else " (unseen)") for label in shown],
            parse_math=False)
        for label, tick in zip(shown, axes.get_yticklabels()):
            tick.set_color("black" if seen[label] else "C3")
    figure.suptitle(f"synthetic samples, {Path(experiment.settings['dataset']).stem}",
                    parse_math=False)
    figure.savefig(path, dpi=120)


def draw_beta(path: Path, experiment: Experiment, progress: Progress, title: str) -> None:
    """Accuracy of the interpolated models against beta of Eq. 10 as printed, 0 to 1."""
    settings, kinds = experiment.settings, final_models(experiment, progress)
    few = with_fewer_test_images(experiment, BETA_TEST_IMAGES)
    betas = [step / 10 for step in range(11)]
    groups = {"clients" if experiment.dropouts else "": experiment.available}
    if experiment.dropouts:
        groups["dropouts"] = experiment.dropouts
    curves = {}
    for beta in tqdm(betas, "beta curve", unit=" beta", file=sys.stdout):
        right = predicted_right(few, ((k, few.clients[k].arch, k, apfl.personalise(
            own, kinds["friend"][k], beta=beta)) for k, own in kinds["client"].items()))
        for group, ids in groups.items():
            for name, value in share_accuracies(few, {k: right[k] for k in ids}).items():
                curves.setdefault((group, name), []).append(value)
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for (group, name), values in curves.items():
        axes.plot(betas, values, marker="o", markersize=3,
                  linestyle="--" if group == "dropouts" else "-",
                  color="C0" if name == "accuracy" else "C1",
                  label=("whole test set" if name == "accuracy" else "own share of it")
                  + (f", {group}" if group else ""))
    used = settings["beta"] if settings["beta_on"] == "client" else 1 - settings["beta"]
    axes.axvline(used, color="gray", linewidth=1, linestyle=":", label=f"this run, {used:g}")
    axes.set(xlabel="beta, the weight of the client's model (0: friend model)",
             ylabel="accuracy, %")
    axes.set_title(title, parse_math=False)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def with_fewer_test_images(experiment: Experiment, count: int) -> Experiment:
    """The same experiment with count evenly spaced test images, or all where there are no more."""
    dataset = experiment.data
    rows = torch.linspace(0, len(dataset.y_test) - 1, min(count, len(dataset.y_test))).long()
    rows = rows.to(dataset.y_test.device)
    shares = [torch.isin(rows, share).nonzero().flatten() for share in experiment.test_shares]
    return experiment._replace(test_shares=shares, data=dataset._replace(
        x_test=dataset.x_test[rows], y_test=dataset.y_test[rows]))


# ----------------------------------------------------------------------------------------- terminal


def describe(experiment: Experiment, server: dict, out: Path) -> None:
    """Print what is about to run."""
    settings, dataset = experiment.settings, experiment.data
    channels, height, width = dataset.x_train.shape[1:]
    print(f"{settings['method']} on {settings['dataset']}: {len(dataset.y_train):,} training and "
          f"{len(dataset.y_test):,} test images of {height}x{width}x{channels}, "
          f"{len(dataset.classes)} classes")
    print(f"{settings['rounds']} rounds with {len(participants(experiment, 1))} of "
          f"{settings['clients']} clients, {settings['local_epochs']} local epochs, "
          f"batch {settings['batch_size']}, "
          f"{settings['optimizer']} at {settings['lr']:g}, seed {settings['seed']}; "
          f"{settings['workers']} workers on {settings['device']}")
    skew = {"dirichlet": "alpha", "pathological": "classes_per_client"}.get(settings["partition"])
    print(f"partition: {settings['partition']}" + (f", {skew} {settings[skew]:g}" if skew else ""))
    print_partition(experiment)
    if experiment.dropouts:
        print(f"dropout clients: {', '.join(map(str, experiment.dropouts))}, which alone hold "
              + ", ".join(dataset.classes[label] for label in experiment.unseen))
    held = len(experiment.seen) + len(experiment.unseen)
    if held < len(dataset.classes):
        print(f"{len(dataset.classes) - held} of {len(dataset.classes)} classes are with no client "
              "(more --clients hold more), and their images are left out")
    if settings.get("distillation_steps"):
        proxy = experiment.method.distil.keywords["proxy"]
        print(f"the server holds {len(proxy.images):,} unlabelled images ({settings['proxy']}), "
              "which no client has")
    for arch in experiment.architectures:
        state = models.shapes(arch, channels, len(dataset.classes))
        size = sum(tensor.numel() for name, tensor in state.items() if models.is_parameter(name))
        print(f"{arch}: {size:,} parameters, {models.num_bytes(state) / 1e6:.2f} MB with buffers")
    print(f"traffic: about {expected_traffic(experiment, server):.0f} MB each way a round"
          + (", and the generator down" if settings["method"] == "fedgen" else ""))
    own = [f"{name} {settings[name]}" for name in (*METHOD_DEFAULTS[settings["method"]], *ASYNC)
           if name in settings]
    print(f"options of {settings['method']}: {', '.join(own) or 'none'}")
    if settings["setting"] != "quick" and settings["device"] == "cpu":
        print("on a CPU the papers' full settings take many hours; --setting quick is a small one")
    print(f"output: {out}\n", flush=True)


def expected_traffic(experiment: Experiment, server: dict) -> float:
    """Megabytes that an average round sends down, and up again, after the first."""
    settings, clients, method = experiment.settings, experiment.clients, experiment.method
    first = method.init(server["weights"])  # which has no features to send yet
    total = sum(models.num_bytes(method.download(first, client, experiment.stream(0, client.id)))
                for client in clients) / len(clients)
    if settings.get("feature_batches"):
        images = torch.empty(1, *experiment.data.x_train.shape[1:], device="meta")
        net = models.build_empty(clients[0].arch, images.shape[1], len(experiment.data.classes),
                                 torch.device("meta")).eval()
        s_in = net.extractor(images)
        total += (models.num_bytes([s_in, net.intermediate(s_in)])
                  * settings["feature_batch_size"] * settings["feature_batches"])
    return total * len(participants(experiment, 1)) / 1e6


def print_partition(experiment: Experiment) -> None:
    """Print client x class counts as a table where it fits on a screen, else the range of sizes."""
    counts = [experiment.data.y_train[client.indices].bincount(
        minlength=len(experiment.data.classes)).tolist() for client in experiment.clients]
    sizes = [sum(row) for row in counts]
    if len(counts) > 20 or len(counts[0]) > 12:
        print(f"images a client: {min(sizes)} to {max(sizes)}, mean {sum(sizes) / len(sizes):.0f}")
        return
    width = max(10, 1 + max(len(client.arch) for client in experiment.clients))
    print("client  " + f"{'network':{width}}{'images':>7}" + "".join(
        f"{name[:6]:>7}" for name in experiment.data.classes))
    for client, row, total in zip(experiment.clients, counts, sizes):
        cells = "".join(f"{n or '.':>7}" for n in row)
        print(f"{client.id:>6}  {client.arch:{width}}{total:>7}{cells}")


def report(out: Path, result: dict) -> None:
    """Print the result and where it lies."""
    print()
    for prefix, whose in (("", ""), ("dropout_", "dropout clients' ")):
        for kind in ("client", "friend", "personalised"):
            name = f"{prefix}{kind}"
            if f"{name}_accuracy" in result:
                print(f"{whose}{kind} models: {result[f'{name}_accuracy']:.2f} % of the whole test "
                      f"set, {show(result[f'{name}_personal_accuracy'])} of their own share of it")
    if "harmonic_accuracy" in result:
        print(f"dropout clients: {result['seen_accuracy']:.2f} % of the seen classes, "
              f"{result['unseen_accuracy']:.2f} % of the unseen ones, harmonic mean "
              f"{result['harmonic_accuracy']:.2f} %")
    rounds = (f"{in_round(result):.2f} % after {result['rounds']} rounds (best "
              f"{result['best_accuracy']:.2f} % in round {result['best_round']}, mean of the last "
              f"ten evaluations {result['last10_accuracy']:.2f} %)")
    if "global_accuracy" in result:
        print(f"accuracy {result['accuracy']:.2f} %; of the global model {rounds}")
    else:
        print(f"accuracy {rounds}")
    if "full_accuracy" in result:
        print(f"of the whole network: {result['full_accuracy']:.2f} %")
    print(f"{result['seconds']:.0f} s, {result['images_per_second']:.0f} training images a second, "
          f"{result['upload_mb']:.1f} MB sent up and {result['download_mb']:.1f} MB down")
    stages = [f"{name} {result[f'{name}_seconds']:.0f} s"
              for name in ("late", "generator", "friends") if f"{name}_seconds" in result]
    if stages:
        print(f"stages after the last round: {', '.join(stages)}")
    print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def show(accuracy: float | None) -> str:
    """An accuracy in percent, which there may be none of."""
    return "-" if accuracy is None else f"{accuracy:.2f} %"


# --------------------------------------------------------------------------------------------- main


def train(experiment: Experiment, progress: Progress, history: list[dict], out: Path) -> None:
    """All rounds and stages that are left to do, and the files that they leave in out.

    history: the lines of metrics.jsonl so far
    """
    settings = experiment.settings
    pool = ThreadPoolExecutor(settings["workers"], initializer=torch.set_num_threads,
                              initargs=(settings["threads"],))
    title = f"{settings['method']} on {Path(settings['dataset']).stem}"
    before = time.perf_counter() - progress.totals["seconds"]
    try:
        progress = train_rounds(experiment, pool, progress, history, out)
        progress = finish(experiment, pool, progress, out)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if progress.after:
        history[-1] = evaluate_finally(experiment, progress)
        replace_last_line(out / "metrics.jsonl", history[-1])
    if "friends" in progress.after:
        draw_beta(out / "beta.png", experiment, progress, title)
    result = summarise(history, progress.totals | {
        "download_mb": progress.totals["download_mb"] + stage_download(experiment, progress),
        "seconds": time.perf_counter() - before})
    write_json(out / "result.json", result)
    draw_curves(out / "curves.png", history, title)
    report(out, result)


def train_rounds(experiment: Experiment, pool: ThreadPoolExecutor, progress: Progress,
                 history: list[dict], out: Path) -> Progress:
    """All rounds that are left to do; appends to history what it appends to metrics.jsonl."""
    settings, totals = experiment.settings, progress.totals
    one_round = train_arrivals if settings.get("aggregation") == "async" else train_round
    start = saved = progress.round
    before = time.perf_counter() - totals["seconds"]
    # On standard output, so that standard error holds errors alone.
    bar = tqdm(total=settings["rounds"], initial=start, unit=" round", file=sys.stdout)
    try:
        for t in range(start + 1, settings["rounds"] + 1):
            round_start = time.perf_counter()
            try:
                server, memory, figures = one_round(experiment, pool, t, progress.server,
                                                    progress.memory)
            except FloatingPointError as error:
                raise FloatingPointError(f"round {t}, {error}") from error
            seconds = time.perf_counter() - round_start
            totals = {name: value + figures.get(name, 0) for name, value in totals.items()}
            totals["training_seconds"] += seconds
            line = progress.line
            if is_evaluated(t, settings):
                line = {"round": t, **evaluate(experiment, server, memory), **figures,
                        "clock": totals["clock"], "seconds": round(seconds, 3)}
                append_metrics(out / "metrics.jsonl", line)
                history.append(line)
                bar.set_postfix_str(f"accuracy {line['accuracy']:.1f} %, loss {line['loss']:.3f}")
            totals["seconds"] = time.perf_counter() - before
            progress = Progress(t, server, memory, totals, line, {})
            if t % settings["checkpoint_every"] == 0 or t == settings["rounds"]:
                save_checkpoint(out, progress)
                saved = t
            if memory:
                release_freed_memory()
            bar.update()
            if t == start + 1 < settings["rounds"]:
                left = (time.perf_counter() - round_start) * (settings["rounds"] - t)
                bar.write(f"round {t} took {seconds:.1f} s; at this pace {duration(left)} to go",
                          file=sys.stdout)
    except KeyboardInterrupt:
        if progress.round > saved:
            save_checkpoint(out, progress)
        raise
    finally:
        bar.close()
    return progress


def release_freed_memory() -> None:
    """Have the C library give back to the system what has been freed.

    What clients keep lies among what a round frees: with SCAFFOLD's variates of 65 clients and the
    five ResNets 2.4 of 8.5 GB were of no use.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):  # a C library other than glibc's
        pass


def duration(seconds: float) -> str:
    """A time to read: seconds, minutes or hours."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def set_up(argv: list[str] | None) -> tuple[Experiment, Progress, list[dict], Path]:
    """From the command line to an experiment, its progress and metrics so far, and its folder.

    Raises ValueError or OSError if the user has to change something.
    """
    typed = vars(parser().parse_args(argv))
    resume, out = typed.pop("resume", False), typed.pop("out", None)
    if out is None:
        name = Path(typed.get("dataset", "digits")).stem
        out = f"runs/{typed.get('method', 'fedin')}-{name}-{typed.get('seed', 0)}"
    out = Path(out)
    if resume:
        settings = read_config(out, typed)
        saved = load_checkpoint(out, settings["device"])
    else:
        check_free(out)
        settings, saved = resolve(typed), None
    settings["versions"] = {"python": platform.python_version(), "torch": torch.__version__,
                            "torchvision": torchvision.__version__}
    torch.set_num_threads(num_cores())  # of this thread; each worker sets its own
    experiment = prepare_experiment(settings)
    archs = architectures_of(settings)
    weights = models.initial_weights(
        archs[-1:] if is_cut_by_width(settings) else archs, experiment.data.x_train.shape[1],
        len(experiment.data.classes), data.torch_stream(settings["seed"], data.INITIAL_WEIGHTS),
        torch.device(settings["device"]))
    totals = {"upload_mb": 0.0, "download_mb": 0.0, "samples": 0, "clock": 0.0,
              "training_seconds": 0.0, "seconds": 0.0}
    progress = saved or Progress(0, experiment.method.init(weights), {}, totals, {}, {})
    if progress.round < settings["rounds"]:
        progress = progress._replace(after={})  # of stages after a round that is not the last now
    if "semantics" in settings and "generator" not in progress.after:
        experiment = experiment._replace(semantics=read_semantics(
            experiment.settings, experiment.data.classes).to(experiment.data.x_train.device))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", experiment.settings)
    history = trim_metrics(out / "metrics.jsonl", progress.round, settings)
    if history and history[-1]["round"] == progress.line["round"] and history[-1] != progress.line:
        history[-1] = progress.line  # which stages after the round have written over
        replace_last_line(out / "metrics.jsonl", progress.line)
    describe(experiment, progress.server, out)
    if resume:
        print(f"going on after round {progress.round}\n", flush=True)
    return experiment, progress, history, out


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status (README, "When something goes wrong")."""
    try:
        experiment, progress, history, out = set_up(argv)
    except (ValueError, OSError) as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain("stopped before the first round", 130)
    go_on = f"go on with: python run.py --resume --out {out}"
    try:
        train(experiment, progress, history, out)
    except FloatingPointError as error:
        return complain(f"{error}; {out} keeps its last checkpoint", 1)
    except OSError as error:
        return complain(f"{error}; mend that, then {go_on} (from the last checkpoint)", 2)
    except KeyboardInterrupt:
        return complain(f"stopped; {go_on}", 130)
    return 0


def complain(error: object, status: int) -> int:
    """Print an error as one line on standard error; returns the exit status."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    exit_status = main()
    sys.stdout.flush()
    os._exit(exit_status)  # at once: a client that still trains after Ctrl-C has nothing to save
