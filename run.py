"""Train one federated method on one data set and write what came of it.

    python run.py                                             FedIN on handwritten digits, a minute
    python run.py --method fedavg --dataset cifar10 --setting quick --train-images 5000
    python run.py --resume --out runs/fedin-digits-0          go on where a run was stopped

Reads from top to bottom: the methods and their settings, the command line, the set-up of a run,
one round, evaluation, the files of a run, and at the end main().
"""

import argparse
import inspect
import json
import math
import os
import pickle
import platform
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torchvision
from matplotlib.figure import Figure
from tqdm import tqdm

import baselines
import data
import fedin
import models
from baselines import Client

# ----------------------------------------------------------------------------- methods and settings


class Method(NamedTuple):
    """The functions of a method, as the docstring of baselines.py describes them."""

    init: Callable
    download: Callable
    client_update: Callable
    server_update: Callable
    deploy: Callable
    initial_memory: Callable | None = None  # None: nothing stays on a device between rounds


FEDAVG = Method(baselines.fedavg_init, baselines.fedavg_download, baselines.fedavg_client_update,
                baselines.fedavg_server_update, baselines.fedavg_deploy)
METHODS = {
    "local": Method(baselines.fedavg_init, baselines.local_download, baselines.local_client_update,
                    baselines.local_server_update, baselines.local_deploy,
                    baselines.local_initial_memory),
    "fedavg": FEDAVG,
    "fedprox": FEDAVG._replace(client_update=baselines.fedprox_client_update),
    "fedin": FEDAVG._replace(init=fedin.fedin_init, download=fedin.fedin_download,
                             client_update=fedin.fedin_client_update,
                             server_update=fedin.fedin_server_update),
}
METHOD_DEFAULTS = {  # the flags that a method reads beside the common ones
    "local": {},
    "fedavg": {"aggregation": "layerwise"},
    "fedprox": {"aggregation": "layerwise", "mu": baselines.FEDPROX_MU},
    "fedin": {"aggregation": "layerwise", "mu": fedin.MU, "noise": 0.0, "projection": "simplified",
              "feature_batch_size": fedin.FEATURE_BATCH_SIZE,
              "feature_batches": fedin.FEATURE_BATCHES, "ablate": []},
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
APFL_METHODS = ("local",)  # methods of AP-FL's tables alone
QUICK_APFL = {"participation": 1.0, "local_epochs": 5, "batch_size": 50, "model": "cnn"}
MAY_CHANGE = ("rounds", "workers", "device", "data_dir")  # on --resume
SPEED_SPREAD = 4.0  # the fastest client over the slowest, in virtual time


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
        argument_default=argparse.SUPPRESS, epilog="Values not given come from --setting, then "
        "from the method. A flag that the run does not read is an error.")
    top.error = raise_usage_error
    count, size, few = number(int, 1), number(int, 2), number(int, 1, 1024)
    positive, weight = number(float, 0, open_low=True), number(float, 0)

    group = top.add_argument_group("what to run")
    group.add_argument("-h", "--help", action="help", help="print this and stop")
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
    group.add_argument("--optimizer", choices=("adam", "sgd"), help="adam | adam; new every round")
    group.add_argument("--lr", type=positive, metavar="X", help="learning rate: 0.001 | 0.0002")
    group.add_argument("--model", choices=models.MODELS,
                       help="resnets = ResNet10/14/18/22/26, evenly by client id: resnets | cnn")
    group.add_argument("--aggregation", choices=AGGREGATIONS,
                       help="average layers of the same name across architectures (FedIN "
                       "Sec. 4.4), or within each architecture alone (Table 3); default layerwise")
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

    group = top.add_argument_group("fedprox, fedin")
    group.add_argument("--mu", type=weight, metavar="X",
                       help="weight of the proximal term, FedIN Eq. 3 and Sec. 5.1: mu/2 = 0.05; "
                       f"default {fedin.MU}, for fedprox in the apfl setting "
                       f"{baselines.FEDPROX_MU_APFL}")
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
    return top


def resolve(typed: dict) -> dict:
    """Every option of a run: those of its setting, then of its method, then what was typed.

    Raises ValueError if something was typed that the run would not read.
    """
    method, dataset = typed.get("method", "fedin"), typed.get("dataset", "digits")
    paper = "apfl" if method in APFL_METHODS else "fedin"
    setting = typed.get("setting", "quick" if dataset == "digits" else paper)
    settings = {"method": method, "dataset": dataset, "setting": setting, "seed": 0,
                "train_images": None, "augment": False, "checkpoint_every": 1,
                **SETTINGS[setting], **METHOD_DEFAULTS[method]}
    if setting == "quick" and method in APFL_METHODS:
        settings |= QUICK_APFL
    if setting == "apfl" and method == "fedprox":
        settings["mu"] = baselines.FEDPROX_MU_APFL
    if dataset in data.DATASETS and dataset != "digits":
        settings["data_dir"] = "data"
    settings["partition"] = typed.get("partition", settings["partition"])
    if settings["partition"] != "dirichlet":
        del settings["alpha"]
    if settings["partition"] == "pathological":
        settings["classes_per_client"] = 2
    fixed = {}
    for part in typed.get("ablate", ()):
        fixed |= ABLATIONS[part]
    settings |= fixed | {"device": default_device(), "workers": None, "threads": 1}

    reasons = {"alpha": f"with --partition {settings['partition']}",
               "classes_per_client": f"with --partition {settings['partition']}",
               "data_dir": f"with --dataset {dataset}",
               **{name: f"with --ablate {' '.join(typed['ablate'])}" for name in fixed}}
    for name in typed:
        if name in fixed or name not in settings:
            reason = reasons.get(name, f"by --method {method}")
            raise ValueError(f"--{name.replace('_', '-')} is not read {reason}: leave it out")
    settings |= typed
    settings["device"] = str(find_device(settings["device"]))
    if settings["workers"] is None:
        on_cpu = settings["device"] == "cpu"
        settings["workers"] = min(num_cores(), num_participants(settings)) if on_cpu else 1
    return settings


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
    """Clients drawn a round."""
    return max(1, round(settings["participation"] * settings["clients"]))


# ---------------------------------------------------------------------------------- set-up of a run


class Experiment(NamedTuple):
    """What stays the same through all rounds."""

    settings: dict
    method: Method
    data: data.Dataset  # on the device
    clients: list[Client]
    test_shares: list[torch.Tensor]  # client -> indices of its test images
    statistics: tuple[torch.Tensor, torch.Tensor]  # mean and deviation of the training images
    speeds: list[float]  # images a client trains on in a unit of virtual time
    free: dict[str, list]  # architecture -> networks and optimisers that wait for a client

    def stream(self, t: int, client: int) -> Callable[[int], torch.Generator]:
        """The random streams of one client in one round, by purpose."""
        return partial(data.torch_stream, self.settings["seed"], round=t, client=client)


def prepare_experiment(settings: dict) -> Experiment:
    """Load and partition the data, and bind the method's functions to the settings.

    Raises ValueError with one line that says what is wrong and what to do.
    """
    seed, num_clients = settings["seed"], settings["clients"]
    loaded = data.load(settings["dataset"], settings.get("data_dir", "data"))
    if settings["train_images"] is not None:
        if settings["train_images"] > len(loaded.y_train):
            raise ValueError(f"--train-images {settings['train_images']} is more than the "
                             f"{len(loaded.y_train)} training images of {settings['dataset']}")
        subset = data.balanced_subset(loaded.y_train, settings["train_images"],
                                      data.numpy_stream(seed, data.SUBSET))
        loaded = loaded._replace(x_train=loaded.x_train[subset], y_train=loaded.y_train[subset])

    if len(loaded.y_train) < 2 * num_clients:
        raise ValueError(f"{len(loaded.y_train)} training images cannot give each of {num_clients} "
                         "clients the two that it needs: use fewer --clients or more images")
    rng = data.numpy_stream(seed, data.PARTITION)
    if settings["partition"] == "iid":
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

    device = torch.device(settings["device"])
    on_device = loaded._replace(**{name: getattr(loaded, name).to(device)
                                   for name in ("x_train", "y_train", "x_test", "y_test")})
    mean, deviation = data.channel_statistics(loaded.x_train, torch.cat(parts))
    archs = models.MODELS[settings["model"]]
    clients = [Client(k, part.to(device), models.architecture_of(k, num_clients, archs))
               for k, part in enumerate(parts)]
    speeds = SPEED_SPREAD ** data.numpy_stream(seed, data.SPEEDS).uniform(size=num_clients)
    return Experiment(settings, bind(METHODS[settings["method"]], settings), on_device, clients,
                      [share.to(device) for share in shares],
                      (mean.to(device), deviation.to(device)), speeds.tolist(),
                      {arch: [] for arch in archs})


def bind(method: Method, settings: dict) -> Method:
    """The method with every keyword argument of its functions that is also a setting filled in."""
    values = settings | {"aggregation": AGGREGATIONS.get(settings.get("aggregation"))}

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


def draw_participants(settings: dict, t: int) -> list[int]:
    """The clients of round t, ascending; the same for every method."""
    rng = data.numpy_stream(settings["seed"], data.PARTICIPANTS, t)
    chosen = rng.choice(settings["clients"], num_participants(settings), replace=False)
    return sorted(chosen.tolist())


def train_client(experiment: Experiment, t: int, k: int, received: object,
                 *kept: object) -> baselines.Result:
    """Run the method's client update; called in a worker thread.

    kept: what stays on the device, for a method that has such a thing
    Raises FloatingPointError if the loss or a weight is no longer finite.
    """
    settings, client = experiment.settings, experiment.clients[k]
    stream = experiment.stream(t, k)
    mean, deviation = experiment.statistics
    prepare = partial(data.standardise, mean=mean, deviation=deviation)
    if settings["augment"]:
        characters = settings["dataset"] in ("digits", "svhn", "emnist")
        prepare = partial(data.augment, mean=mean, deviation=deviation,
                          kind=data.CHARACTERS if characters else data.Augmentation(),
                          rng=stream(data.AUGMENTATION))
    own = data.ClientData(experiment.data.x_train, experiment.data.y_train, client.indices, prepare)
    model, optimizer = scratch(experiment, client.arch)
    result = experiment.method.client_update(model, optimizer, received, own, stream, *kept)
    optimizer.zero_grad()  # frees the gradients while the network waits for its next client
    experiment.free[client.arch].append((model, optimizer))
    finite = [tensor.isfinite().all() for tensor in models.tensors_in((result.update, result.kept))]
    if not (math.isfinite(result.loss) and torch.stack(finite).all()):
        raise FloatingPointError(f"round {t}, client {k}: the loss or a weight is not finite any "
                                 "more; a smaller --lr may help")
    return result


def train_round(experiment: Experiment, pool: ThreadPoolExecutor, t: int, server: dict,
                memory: dict) -> tuple[dict, dict, dict]:
    """One round: what the chosen clients receive, their updates, the server's update.

    memory: client id -> what stays on its device, for those that have taken part
    Returns the new server state, the new memory and the round's figures for the log.
    """
    method, clients = experiment.method, experiment.clients
    chosen = draw_participants(experiment.settings, t)
    received = {k: method.download(server, clients[k], experiment.stream(t, k)) for k in chosen}
    kept = {k: [] for k in chosen}
    if method.initial_memory is not None:
        kept = {k: [memory[k] if k in memory else method.initial_memory(server, clients[k])]
                for k in chosen}

    def cost(k: int) -> int:
        return len(clients[k].indices) * models.num_bytes(server["weights"][clients[k].arch])

    # The largest first, so that no worker ends up alone with one.
    futures = {k: pool.submit(train_client, experiment, t, k, received[k], *kept[k])
               for k in sorted(chosen, key=cost, reverse=True)}
    results = {k: futures[k].result() for k in chosen}
    server = method.server_update(server, {k: result.update for k, result in results.items()})
    if method.initial_memory is not None:
        memory = memory | {k: result.kept for k, result in results.items()}
    samples = sum(result.samples for result in results.values())
    figures = {"loss": sum(result.loss for result in results.values()) / max(1, samples),
               "upload_mb": models.num_bytes([result.update for result in results.values()]) / 1e6,
               "download_mb": models.num_bytes(received) / 1e6,
               "samples": samples,
               "clock": max(result.samples / experiment.speeds[k] for k, result in results.items())}
    return server, memory, figures


# --------------------------------------------------------------------------------------- evaluation


def evaluate(experiment: Experiment, server: dict, memory: dict) -> dict:
    """Accuracies in percent of the models that the clients use.

    accuracy: on the whole test set, mean over clients; personal_accuracy: on each client's own
    share of the test set, weighted by share.  Each distinct model predicts the test set once.
    """
    test, shares = experiment.data, experiment.test_shares
    mean, deviation = experiment.statistics
    prepare = partial(data.standardise, mean=mean, deviation=deviation)
    in_use, users = {}, {}
    for client in experiment.clients:
        key, weights = experiment.method.deploy(server, client, memory.get(client.id))
        in_use[key] = client.arch, weights
        users.setdefault(key, []).append(client.id)
    right_of_all = right_of_own = 0
    for key, (arch, weights) in in_use.items():
        # channels_last was measured to predict 1.2 to 1.7 x faster on a CPU.
        model = empty_network(experiment, arch).to(memory_format=torch.channels_last)
        model.load_state_dict(weights)
        right = models.predict(model, test.x_test, prepare) == test.y_test
        right_of_all += len(users[key]) * int(right.sum())
        right_of_own += sum(int(right[shares[k]].sum()) for k in users[key])
    shared = sum(len(share) for share in shares)
    return {"accuracy": 100 * right_of_all / (len(experiment.clients) * len(test.y_test)),
            "personal_accuracy": 100 * right_of_own / shared if shared else None}


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
        like = {name: settings[name] for name in ("method", "dataset", "partition")}
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


class Progress(NamedTuple):
    """Everything that the next round needs."""

    round: int  # the last one that is finished
    server: dict
    memory: dict  # client id -> what stays on its device, for those that have taken part
    totals: dict  # sums over all rounds so far


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


def is_evaluated(t: int, settings: dict) -> bool:
    """Whether round t is one of those after which the models are evaluated."""
    return t % settings["eval_every"] == 0 or t == settings["rounds"]


def append_metrics(path: Path, entry: dict) -> None:
    """Add a line to metrics.jsonl, on the disk when this returns."""
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def summarise(history: list[dict], totals: dict) -> dict:
    """What result.json holds: the last evaluation, the best, the mean of the last ten, totals."""
    last, best = history[-1], max(history, key=lambda entry: entry["accuracy"])
    recent = [entry["accuracy"] for entry in history[-10:]]
    return {"rounds": last["round"], "accuracy": last["accuracy"],
            "personal_accuracy": last["personal_accuracy"], "loss": last["loss"],
            "best_accuracy": best["accuracy"], "best_round": best["round"],
            "last10_accuracy": sum(recent) / len(recent),
            **{name: totals[name] for name in ("upload_mb", "download_mb", "samples", "clock")},
            "seconds": round(totals["seconds"], 3),
            "images_per_second": round(totals["samples"] / totals["training_seconds"], 1)}


def draw_curves(path: Path, history: list[dict], title: str) -> None:
    """A picture of accuracy and loss against rounds."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rounds = [entry["round"] for entry in history]
    marker = "o" if len(rounds) <= 30 else None
    for axes, name, label, colour in ((left, "accuracy", "whole test set", "C0"),
                                      (left, "personal_accuracy", "own share of it", "C1"),
                                      (right, "loss", "training images", "C3")):
        axes.plot(rounds, [entry[name] for entry in history], marker=marker, markersize=3,
                  label=label, color=colour)
    left.set(xlabel="round", ylabel="accuracy, %")
    right.set(xlabel="round", ylabel="cross entropy")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------- terminal


def describe(experiment: Experiment, server: dict, out: Path) -> None:
    """Print what is about to run."""
    settings, dataset = experiment.settings, experiment.data
    channels, height, width = dataset.x_train.shape[1:]
    print(f"{settings['method']} on {settings['dataset']}: {len(dataset.y_train):,} training and "
          f"{len(dataset.y_test):,} test images of {height}x{width}x{channels}, "
          f"{len(dataset.classes)} classes")
    print(f"{settings['rounds']} rounds with {num_participants(settings)} of {settings['clients']} "
          f"clients, {settings['local_epochs']} local epochs, batch {settings['batch_size']}, "
          f"{settings['optimizer']} at {settings['lr']:g}, seed {settings['seed']}; "
          f"{settings['workers']} workers on {settings['device']}")
    skew = {"dirichlet": "alpha", "pathological": "classes_per_client"}.get(settings["partition"])
    print(f"partition: {settings['partition']}" + (f", {skew} {settings[skew]:g}" if skew else ""))
    print_partition(experiment)
    for arch, state in server["weights"].items():
        size = sum(tensor.numel() for tensor in models.build_empty(
            arch, channels, len(dataset.classes), torch.device("meta")).parameters())
        print(f"{arch}: {size:,} parameters, {models.num_bytes(state) / 1e6:.2f} MB with buffers")
    print(f"traffic: about {expected_traffic(experiment, server):.0f} MB each way a round")
    own = [f"{name} {settings[name]}" for name in METHOD_DEFAULTS[settings["method"]]]
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
    return total * num_participants(settings) / 1e6


def print_partition(experiment: Experiment) -> None:
    """Print client x class counts as a table where it fits on a screen, else the range of sizes."""
    counts = [experiment.data.y_train[client.indices].bincount(
        minlength=len(experiment.data.classes)).tolist() for client in experiment.clients]
    sizes = [sum(row) for row in counts]
    if len(counts) > 20 or len(counts[0]) > 12:
        print(f"images a client: {min(sizes)} to {max(sizes)}, mean {sum(sizes) / len(sizes):.0f}")
        return
    print("client  " + f"{'network':10}{'images':>7}" + "".join(
        f"{name[:6]:>7}" for name in experiment.data.classes))
    for client, row, total in zip(experiment.clients, counts, sizes):
        cells = "".join(f"{n or '.':>7}" for n in row)
        print(f"{client.id:>6}  {client.arch:10}{total:>7}{cells}")


def report(out: Path, result: dict) -> None:
    """Print the result and where it lies."""
    print(f"\naccuracy {result['accuracy']:.2f} % after {result['rounds']} rounds (best "
          f"{result['best_accuracy']:.2f} % in round {result['best_round']}, mean of the last ten "
          f"evaluations {result['last10_accuracy']:.2f} %)")
    print(f"{result['seconds']:.0f} s, {result['images_per_second']:.0f} training images a second, "
          f"{result['upload_mb']:.1f} MB sent up and {result['download_mb']:.1f} MB down")
    print(f"written to {out}: metrics.jsonl, result.json, curves.png, config.json, checkpoint.pt")


# --------------------------------------------------------------------------------------------- main


def train(experiment: Experiment, progress: Progress, history: list[dict], out: Path) -> None:
    """All rounds that are left to do, and the files that they leave in out.

    history: the lines of metrics.jsonl so far
    """
    settings = experiment.settings
    start, server, memory, totals = progress
    saved = start
    before = time.perf_counter() - totals["seconds"]
    pool = ThreadPoolExecutor(settings["workers"], initializer=torch.set_num_threads,
                              initargs=(settings["threads"],))
    # On standard output, so that standard error holds errors alone.
    bar = tqdm(total=settings["rounds"], initial=start, unit=" round", file=sys.stdout)
    try:
        for t in range(start + 1, settings["rounds"] + 1):
            round_start = time.perf_counter()
            server, memory, figures = train_round(experiment, pool, t, server, memory)
            seconds = time.perf_counter() - round_start
            totals = {name: value + figures.get(name, 0) for name, value in totals.items()}
            totals["training_seconds"] += seconds
            if is_evaluated(t, settings):
                entry = {"round": t, **evaluate(experiment, server, memory), **figures,
                         "clock": totals["clock"], "seconds": round(seconds, 3)}
                append_metrics(out / "metrics.jsonl", entry)
                history.append(entry)
                bar.set_postfix_str(f"accuracy {entry['accuracy']:.1f} %, loss {entry['loss']:.3f}")
            totals["seconds"] = time.perf_counter() - before
            progress = Progress(t, server, memory, totals)
            if t % settings["checkpoint_every"] == 0 or t == settings["rounds"]:
                save_checkpoint(out, progress)
                saved = t
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
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
    result = summarise(history, totals)
    write_json(out / "result.json", result)
    draw_curves(out / "curves.png", history,
                f"{settings['method']} on {Path(settings['dataset']).stem}")
    report(out, result)


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
    weights = models.initial_weights(
        models.MODELS[settings["model"]], experiment.data.x_train.shape[1],
        len(experiment.data.classes), data.torch_stream(settings["seed"], data.INITIAL_WEIGHTS),
        torch.device(settings["device"]))
    totals = {"upload_mb": 0.0, "download_mb": 0.0, "samples": 0, "clock": 0.0,
              "training_seconds": 0.0, "seconds": 0.0}
    progress = saved or Progress(0, experiment.method.init(weights), {}, totals)
    out.mkdir(parents=True, exist_ok=True)
    history = trim_metrics(out / "metrics.jsonl", progress.round, settings)
    write_json(out / "config.json", settings)
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
