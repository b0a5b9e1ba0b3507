"""Train one federated method on one data set and write what came of it.

    python run.py                                             FedIN on handwritten digits
    python run.py --method apfl --missing-classes 0.2         AP-FL, one client gone with two digits
    python run.py --resume --out runs/fedin-digits-0          go on where a run was stopped
    python run.py --methods                                   all methods, in a table

Reads from top to bottom: methods, settings and flags; the command line; what was asked for
(resolve); the set-up of a run; one round; evaluation; main() and the loop over rounds.  What a
method does is in baselines.py, fedin.py and apfl.py, each of which lists its methods at its end.
"""

import argparse
import math
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch

import apfl
import baselines
import data
import fedin
import files
import generator
import models
import pictures
import ranks
from baselines import (NOT_SAID, By, Client, Experiment, Flag, Method, Result, Task, default_of,
                       typed_as)
from files import METHODS, Progress

# --------------------------------------------------------------------- methods, settings and flags

TOTALS = {"upload_mb": 0.0, "download_mb": 0.0, "samples": 0, "clock": 0.0,
          "training_seconds": 0.0, "seconds": 0.0}  # over all rounds
SETTINGS = ("quick", "fedin", "apfl")  # a run of a minute on digits, and those of the two papers


def by_setting(*values: Any) -> By:
    """A default for each of SETTINGS."""
    return By("setting", dict(zip(SETTINGS, values)))


RUN, FEDERATION, DATA, MACHINE = "what to run", "federation", "data", "machine and files"  # --help
ASYNC, SGD = {"aggregation": ["async"]}, {"optimizer": ["sgd"]}
COMMON = [  # of every method, or of a kind of run; defaults of all may go by the first three
    Flag("method", str, "see --methods", RUN, "fedin", choices=METHODS),
    Flag("dataset", str, "a data set, or the path of your own (README, 'Your own data')", RUN,
         "digits", choices=data.DATASETS, file=".npz"),
    Flag("setting", str, "fills in what is not given: a run of a minute on digits, FedIN's (Sec. "
         "5.1) or AP-FL's (Sec. 4.1)", RUN, By("dataset", {"digits": "quick"}, "fedin"),
         choices=SETTINGS),
    Flag("seed", int, "seed of every random draw", RUN, 0, low=0, high=2**32 - 1),
    Flag("clients", int, "K (AP-FL: also 5)", FEDERATION, by_setting(10, 100, 10), low=1),
    Flag("participation", float, "share of the clients drawn each round (FedIN: not stated)",
         FEDERATION, by_setting(0.5, 0.1, 1.0), above=0, high=1, unless=ASYNC),
    Flag("rounds", int, "rounds (AP-FL: not stated); may grow on --resume", FEDERATION,
         by_setting(10, 500, 50), low=1, may_change=True),
    Flag("local_epochs", int, "of a client, a round", FEDERATION, by_setting(1, 5, 20), low=1),
    Flag("batch_size", int, "training images a step", FEDERATION, by_setting(16, 16, 50), low=2),
    Flag("lr", float, "learning rate, constant", FEDERATION, by_setting(4e-4, 1e-3, 2e-4), above=0),
    Flag("optimizer", str, "new for each update", FEDERATION, "adam", choices=("adam", "sgd")),
    Flag("momentum", float, "of sgd", FEDERATION, 0.0, low=0, high=0.999, when=SGD,
         unless={"method": ["scaffold"]}),
    Flag("weight_decay", float, "of sgd", FEDERATION, 0.0, low=0, when=SGD),
    Flag("model", str, "resnets: ResNet10 to 26, evenly among the clients (FedIN); cnn (AP-FL); "
         "-widths: five widths of one network", FEDERATION,
         by_setting("resnets", "resnets", "cnn"), choices=models.MODELS),
    Flag("aggregation", str, "average layers of one name across architectures (FedIN Sec. 4.4), "
         "or within each architecture alone (Table 3), or mix each update in as it arrives (AP-FL "
         "Sec. 3.2)", FEDERATION, choices=("layerwise", "per-architecture", "async")),
    Flag("mixing", float, "share of an update that is not stale (not stated)", FEDERATION,
         apfl.MIXING, low=0, high=1, when=ASYNC),
    Flag("staleness", str, "how that share falls with every update that came in between (not "
         "stated)", FEDERATION, "polynomial", choices=("constant", "polynomial", "hinge"),
         when=ASYNC),
    Flag("speed_spread", float, "the fastest client over the slowest (not stated)", FEDERATION,
         apfl.SPEED_SPREAD, low=1, when=ASYNC),
    Flag("eval_every", int, "rounds between evaluations; the last one always has one", FEDERATION,
         by_setting(1, 5, 1), low=1),
    Flag("train_images", int, "so many of them, class-balanced", DATA, None, low=1),
    Flag("test_images", int, "likewise; evaluation is faster then", DATA, None, low=1),
    Flag("partition", str, "how the training images are split among the clients; dirichlet gives "
         "each at least ten", DATA, "dirichlet", choices=("iid", "dirichlet", "pathological")),
    Flag("alpha", float, "of --partition dirichlet, smaller is more skewed (AP-FL: 0.01 to 0.1)",
         DATA, by_setting(0.5, 0.5, 0.1), above=0, when={"partition": ["dirichlet"]}),
    Flag("classes_per_client", int, "gamma of --partition pathological: 2; with "
         "--missing-classes at least a fifth of the classes", DATA, None, low=1,
         when={"partition": ["pathological"]}),
    Flag("missing_classes", float, "dropout setting of AP-FL (Sec. 4.1, Table 1): pathological, "
         "this share of the classes only with clients that never take part (0.1, 0.2)", DATA, None,
         above=0, high=1, decides={"": {"partition": "pathological"}}),
    Flag("augment", bool, "random crop, flip and Cutout; on digits, svhn, emnist Cutout alone",
         DATA, False),
    Flag("data_dir", str, "where downloads are kept", DATA, "data", may_change=True,
         when={"dataset": data.DOWNLOADED, "semantics": generator.ENCODERS}),
    Flag("device", str, "cpu, cuda, cuda:1, ...; cuda where there is one", MACHINE, None,
         may_change=True),
    Flag("workers", int, "clients trained at a time; on a CPU as many as it has cores, but no more "
         "than clients a round, on a GPU 1", MACHINE, None, low=1, high=1024, may_change=True),
    Flag("threads", int, "intra-op threads of each worker", MACHINE, 1, low=1, high=1024),
    Flag("amp", bool, "clients train in bfloat16; weights stay float32", MACHINE, False),
    Flag("out", str, "folder of the run: runs/METHOD-DATASET-SEED", MACHINE, None, kept=False),
    Flag("resume", bool, "go on with the run in --out", MACHINE, False, kept=False),
    Flag("checkpoint_every", int, "rounds between checkpoints", MACHINE, 1, low=1),
]
FLAGS = {flag.name: flag for flag in (*COMMON, *baselines.FLAGS, *fedin.FLAGS, *apfl.FLAGS)}

# --------------------------------------------------------------------------------- the command line

def read_command_line(argv: list[str] | None) -> dict:
    """What was typed: flag -> value.  Raises ValueError if it is nothing that can be asked for."""
    typed = vars(parser().parse_args(argv))
    return {name: baselines.read_value(FLAGS[name], value) for name, value in typed.items()}


def parser() -> argparse.ArgumentParser:
    """The command line.  What is not typed is not there: see resolve."""
    top = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], usage="python run.py [--FLAG VALUE ...]",
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="Defaults go by --setting, "
        "--dataset or --method.  A flag that a run does not read is an error.")
    top.error = raise_usage_error
    groups = {}
    for flag in FLAGS.values():
        title = flag.group or ", ".join(name for name, method in METHODS.items()
                                        if flag.name in method.defaults)
        if title not in groups:
            groups[title] = top.add_argument_group(title)
        choices = [*flag.choices, *([f"FILE{flag.file}"] if flag.file else [])]
        options = {"metavar": "|".join(choices) or {int: "N", float: "X"}.get(flag.kind, "NAME")}
        if flag.kind is bool:
            options = {"action": "store_true"}
        if flag.kind is list:
            options |= {"nargs": "+", "action": "extend"}
        groups[title].add_argument(typed_as(flag.name), dest=flag.name, **options,
                                   help=flag.help + baselines.default_text(flag, METHODS))
    groups[RUN].add_argument("-h", "--help", action="help", help="print this and stop")
    rows = pictures.table(baselines.methods_rows(METHODS, FLAGS), (11, 11, 12, 9, 8, 17, 21))
    notes = [name + said for name, method in METHODS.items() for said in method.instead.values()]
    groups[RUN].add_argument("--methods", action="version", version="\n".join([rows, *notes]),
                             help="print a table of all methods and stop")
    return top


def raise_usage_error(message: str) -> NoReturn:
    """What argparse calls when the command line is wrong; main prints it as one line."""
    raise ValueError(f"{message} (python run.py --help lists all flags)")


# ------------------------------------------------------------------------------ what was asked for

def resolve(typed: dict) -> dict:
    """Every setting of a run: those of --setting, then of its method, then what was typed.

    What depends on others or the data (beta, ...) stays None; prepare_experiment fills it in.
    Raises ValueError if something was typed that the run would not read, or if it cannot run.
    """
    method = METHODS[typed.get("method", FLAGS["method"].default)]
    settings, fixed = {}, {}  # fixed: by another flag, such as mu by "--ablate prox", and that
    for name, flag in FLAGS.items():
        default = default_of(flag, method, settings)
        if flag.kept and default is not NOT_SAID:
            settings[name] = typed.get(name, default)
    for name in typed.keys() & settings.keys():
        value = typed[name] if isinstance(typed[name], list) else []
        for choice in ("", *value):
            decided = FLAGS[name].decides.get(choice, {})
            settings |= decided
            fixed |= dict.fromkeys(decided, " ".join([typed_as(name), *value]))
    for name, flag in FLAGS.items():
        reason = baselines.why_unread(flag, method, settings, fixed)
        if reason and name in typed:
            raise ValueError(f"{typed_as(name)} is not read {reason}: leave it out")
        if reason and name not in fixed:
            settings.pop(name, None)
    check_combination(settings)
    settings["device"] = str(ranks.find_device(settings["device"]))
    if settings["workers"] is None:
        cores = ranks.share_of_cores(num_cores()) if settings["device"] == "cpu" else 1
        settings["workers"] = min(cores, num_participants(settings))
    return settings


def check_combination(settings: dict) -> None:
    """Raise ValueError if method, model and aggregation do not go together."""
    def works_with(name: str, method: Method) -> Sequence[str]:
        return models.NETWORKS[method.networks] if name == "model" else method.averages

    for name in ("model", "aggregation"):
        value, good = settings.get(name), works_with(name, METHODS[settings["method"]])
        if name in settings and value not in good:
            others = [key for key, method in METHODS.items() if value in works_with(name, method)]
            other = f"--method {' or '.join(others)}" if len(others) < 6 else "another --method"
            raise ValueError(f"{typed_as(name)} {value} does not go with --method "
                             f"{settings['method']}: give {typed_as(name)} {' or '.join(good)}, or "
                             f"{other} (see --methods)")
    if settings.get("aggregation") == "async" and len(models.MODELS[settings["model"]]) > 1:
        raise ValueError(f"--aggregation async needs one architecture, not --model "
                         f"{settings['model']}: give --model cnn, or one ResNet")


def num_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def num_participants(settings: dict) -> int:
    """Clients drawn a round; in asynchronous runs arrivals a round, which are all of them."""
    return max(1, round(settings.get("participation", 1.0) * settings["clients"]))


def settings_to_resume(out: Path, typed: dict) -> dict:
    """The settings of the run in a folder, with what was typed besides.

    Raises ValueError if there is none, or if something typed differs from it and may not.
    """
    # What the versions before did not have was off.
    settings = {name: False for name, flag in FLAGS.items() if flag.kind is bool and flag.kept}
    settings |= {"test_images": None} | files.read_config(out)
    decisive = {"method", "model", "missing_classes"}  # of which other settings there are
    decisive |= {name for flag in FLAGS.values() for name in (*flag.when, *flag.unless)}
    if settings.get("missing_classes"):
        decisive -= {"partition"}
    try:
        needed = resolve({name: settings[name] for name in decisive
                          if settings.get(name) is not None})
        fixed = [pair for flag in FLAGS.values() for decided in flag.decides.values()
                 for pair in decided.items()]  # which may be none that can be typed
        sound = all(default is None if settings[name] is None else (name, settings[name]) in fixed
                    or baselines.is_stored_value(FLAGS[name], settings[name])
                    for name, default in needed.items())
    except (ValueError, KeyError, TypeError, OverflowError):
        sound = False
    if not sound:
        raise ValueError(f"{out / 'config.json'} is damaged or lacks settings: start anew with "
                         "another --out")
    may_change = [name for name, flag in FLAGS.items() if flag.may_change or all(
        baselines.is_file(flag, one.get(name)) for one in (settings, typed))]  # if it was moved
    files.check_agreement(out, settings, typed, may_change)
    settings |= typed
    for name in ("dataset", "proxy"):
        file = settings.get(name)
        if baselines.is_file(FLAGS[name], file) and not Path(file).exists():
            raise ValueError(f"the run in {out} reads {file}, and there is no such file here: say "
                             f"by {typed_as(name)} where it is")
    settings["device"] = str(ranks.find_device(settings["device"]))
    return settings


# ---------------------------------------------------------------------------------- set-up of a run

def set_up(argv: list[str] | None) -> tuple[Experiment, Progress, list[dict], Path]:
    """From the command line to an experiment, its progress and metrics so far, and its folder.

    Raises ValueError or OSError if the user has to change something.
    """
    typed = read_command_line(argv)
    resume, out = typed.pop("resume", False), typed.pop("out", None)
    if out is None:
        method, dataset, seed = (typed.get(name, FLAGS[name].default)
                                 for name in ("method", "dataset", "seed"))
        out = f"runs/{method}-{Path(dataset).stem}-{seed}"
    out = Path(out)
    settings = ranks.done_by(0, partial(settings_of_run, typed, out, resume))
    device = settings["device"] = ranks.own_device(settings["device"])
    torch.set_num_threads(num_cores())  # of this thread, on any number of ranks, for equal bits
    saved = ranks.done_by(0, partial(files.load_checkpoint, out, device), device)
    experiment = prepare_experiment(settings)
    if saved is not None:
        files.check_fits(out, saved, settings["rounds"], pattern_of_progress(experiment))
    progress = saved or first_progress(experiment)
    if progress.round < settings["rounds"]:
        progress = progress._replace(after={})  # of stages after a round that is not the last now
    renamed = typed.keys() & {"semantics", "word_vectors"}
    if "semantics" in settings and (renamed or "generator" not in progress.after):
        load_semantics = baselines.filled(generator.load_semantics, settings)
        semantics = ranks.done_by(0, partial(load_semantics, experiment.data.classes))
        experiment = experiment._replace(semantics=semantics.to(device))
        name = "word_vectors" if settings["semantics"] == "word2vec" else "semantics"
        if settings["semantics"] not in generator.ENCODERS:  # whose last bits go by the machine
            found = files.check_same(experiment.settings, {name: data.digest(semantics)})
            experiment = experiment._replace(settings=experiment.settings | found)
    files.write_json(out / "config.json", experiment.settings)
    history = ranks.done_by(0, partial(files.metrics_so_far, out, progress, settings))
    describe(experiment, progress.server, out)
    if resume:
        print(f"going on after round {progress.round}\n", flush=True)
    return experiment, progress, history, out


def settings_of_run(typed: dict, out: Path, resume: bool) -> dict:
    """Take the folder of a run; its settings, or those of a new one.

    Raises ValueError if there is nothing to be had.
    """
    settings = resolve(typed) if not resume else {}
    files.take(out, resume)
    if resume:
        settings = settings_to_resume(out, typed)
    return settings | {"versions": files.versions()}


def prepare_experiment(settings: dict) -> Experiment:
    """Load and share out the data, and bind the method's functions to the settings.

    Raises ValueError with one line that says what is wrong and what to do.
    """
    seed, num_clients, method = settings["seed"], settings["clients"], METHODS[settings["method"]]
    found, shared = ranks.done_by(0, partial(shared_data, settings), settings["device"])
    settings, shared = settings | found, data.on_device(shared, settings["device"])
    archs = method.architectures(models.MODELS[settings["model"]])
    clients = [Client(k, part, models.architecture_of(k, num_clients, archs))
               for k, part in enumerate(shared.parts)]
    owners = {client.id: client for client in clients if client.id not in shared.dropouts}
    spread = settings.get("speed_spread", apfl.SPEED_SPREAD)
    speeds = spread ** data.numpy_stream(seed, data.SPEEDS).uniform(size=num_clients)
    return Experiment(
        settings, baselines.bind(method, settings, owners=owners, **data.server_images(shared)),
        shared.data, clients, dropouts=shared.dropouts, seen=shared.seen, unseen=shared.unseen,
        test_shares=shared.test_shares, statistics=shared.statistics, speeds=speeds.tolist(),
        idle={arch: [] for arch in archs})


def shared_data(settings: dict) -> tuple[dict, data.Shared]:
    """Settings that depend on others or the data, if not typed, and the data, shared out.

    Among them what the networks take in, and digests of what was loaded.
    """
    loaded = data.load(settings["dataset"], settings.get("data_dir", "data"))
    found = {"finetune_epochs": settings["local_epochs"], "classes_per_client": data.classes_each(
                 len(loaded.classes), settings["missing_classes"]),
             "beta": apfl.BETA_COLOUR if loaded.x_train.shape[1] == 3 else apfl.BETA_GRAY}
    found = {name: value for name, value in found.items() if settings.get(name, value) is None}
    proxy = settings.get("proxy") if settings.get("distillation_steps") else None
    share_out = baselines.filled(data.share_out, settings | found | {"proxy": proxy})
    shared = share_out(loaded, settings["clients"], settings["seed"])
    found["input"] = data.described(shared)
    digests = {"dataset": loaded.digest}
    if baselines.is_file(FLAGS["proxy"], proxy):
        digests["proxy"] = data.digest(shared.proxy)
    return found | files.check_same(settings, digests), shared


def server_architectures(experiment: Experiment) -> list[str]:
    """Those whose weights the server has: all, or the whole one that the others are cut out of."""
    archs = experiment.architectures
    return archs[-1:] if experiment.method.networks == "-widths" else archs


def first_progress(experiment: Experiment) -> Progress:
    """The state before round 1: initial weights, nothing done."""
    settings, archs = experiment.settings, server_architectures(experiment)
    rng = data.torch_stream(settings["seed"], data.INITIAL_WEIGHTS)
    weights = models.initial_weights(archs, *experiment.shape, rng,
                                     torch.device(settings["device"]))
    return Progress(0, experiment.method.init(weights), {}, dict(TOTALS), {}, {})


def pattern_of_progress(experiment: Experiment) -> Progress:
    """What progress is like, whatever its round, its tensors without values; see check_fits."""
    method = experiment.method
    server = method.init({arch: models.shapes(arch, *experiment.shape)
                          for arch in server_architectures(experiment)})
    memory = {}
    if method.initial_memory is not None:
        memory = {client.id: method.initial_memory(server, client) for client in experiment.clients}
    return Progress(0, server, memory, TOTALS, {}, dict.fromkeys(method.stages))


def describe(experiment: Experiment, server: dict, out: Path) -> None:
    """Print what is about to run."""
    settings, dataset, method = experiment.settings, experiment.data, experiment.method
    channels, height, width = dataset.x_train.shape[1:]
    print(f"{settings['method']} on {settings['dataset']}: {len(dataset.y_train):,} training and "
          f"{len(dataset.y_test):,} test images of {height}x{width}x{channels}, "
          f"{len(dataset.classes)} classes")
    print(f"{settings['rounds']} rounds with {len(draw_participants(experiment, 1))} of "
          f"{settings['clients']} clients, {settings['workers']} workers on {settings['device']}"
          + (f" in each of {ranks.count()} processes" if ranks.count() > 1 else ""))
    print(textwrap.fill(", ".join(f"{name} {settings[name]}" for name in FLAGS if settings.get(name)
                                  is not None), 100, break_on_hyphens=False))
    print(pictures.partition_table(
        [dataset.y_train[client.indices].bincount(minlength=len(dataset.classes)).tolist()
         for client in experiment.clients], [client.arch for client in experiment.clients],
        dataset.classes, [dataset.classes[label] for label in experiment.unseen],
        experiment.dropouts))
    held = method.distil.keywords if settings.get("proxy") else {}
    if held:
        print(f"the server holds {len(held['proxy'].images):,} unlabelled images "
              f"({settings['proxy']}) and {len(held['validation'].images):,} labelled ones")
    for arch in experiment.architectures:
        state = models.shapes(arch, *experiment.shape)
        size = sum(tensor.numel() for name, tensor in state.items() if models.is_parameter(name))
        print(f"{arch}: {size:,} parameters, {models.num_bytes(state) / 1e6:.2f} MB with buffers")
    traffic = baselines.expected_traffic(experiment, server) * len(draw_participants(experiment, 1))
    print(f"traffic: about {traffic / 1e6:.0f} MB each way a round ({method.sends})")
    if settings["setting"] != "quick" and settings["device"] == "cpu":
        print("on a CPU the papers' full settings take many hours; --setting quick is a small one")
    print(f"output: {out}\n", flush=True)


# ---------------------------------------------------------------------------------------- one round

def train_round(experiment: Experiment, t: int, server: dict,
                memory: dict) -> tuple[dict, dict, dict]:
    """One round: what the chosen clients receive, their updates, the server's update.

    memory: client id -> what stays on its device, for those that have taken part
    Returns the new server state, the new memory and the round's figures for the log.
    """
    method, tasks = experiment.method, []
    for k in draw_participants(experiment, t):
        client, stream, kept = experiment.clients[k], experiment.stream(t, k), ()
        if method.assign is not None:
            client = method.assign(client, experiment.architectures, stream)
        if method.initial_memory is not None:
            kept = (memory[k] if k in memory else method.initial_memory(server, client),)
        tasks.append(Task(client, t, method.download(server, client, stream), kept))
    results = experiment.train(method.client_update, tasks)  # train_clients
    updates = {k: result.update for k, result in results.items()}
    server = method.server_update(server, updates)
    if method.distil is not None:
        server = ranks.done_by(0, partial(method.distil, server, updates, experiment.network,
                                          experiment.stream(t, 0)), experiment.settings["device"])
        if not models.all_finite(server):
            raise FloatingPointError("the server's training: a weight is not finite any more")
    if method.initial_memory is not None:
        memory = memory | {k: result.kept for k, result in results.items()}
    total = Counter()
    for task in tasks:
        total.update(baselines.figures(results[task.client.id], task.received))
    clock = max(result.samples / experiment.speeds[k] for k, result in results.items())
    return server, memory, {**baselines.round_figures(total), "clock": clock}


def draw_participants(experiment: Experiment, t: int) -> list[int]:
    """The clients of round t, ascending; the same for every method."""
    rng = data.numpy_stream(experiment.settings["seed"], data.PARTICIPANTS, t)
    count = min(num_participants(experiment.settings), len(experiment.available))
    return sorted(rng.choice(experiment.available, count, replace=False).tolist())


def train_clients(experiment: Experiment, pool: ThreadPoolExecutor, update: Callable,
                  tasks: Sequence[Task], what: str = "") -> dict[int, Result]:
    """Run update, what a method does on a client, for each task, in parallel: client id -> result.

    The tasks are dealt out to the processes of the run, and in each to its worker threads.
    what: the name of a progress bar, if there is to be one
    """
    # The largest first, so that no worker ends up alone with one.  (Local receives nothing.)
    cost = {task.client.id: len(task.client.indices) * models.num_bytes(task.received or task.kept)
            for task in tasks}
    owner, ids = ranks.share_out(cost), [task.client.id for task in tasks]
    futures = {task.client.id: pool.submit(train_client, experiment, update, task)
               for task in sorted(tasks, key=lambda task: cost[task.client.id], reverse=True)
               if owner[task.client.id] == ranks.number()}
    results = {}
    for k in (pictures.watch(ids, what, "client") if what and ids else ids):
        with files.noted(what), files.noted(f"client {k}"):
            results[k] = ranks.done_by(owner[k], futures[k].result if k in futures else None,
                                       experiment.settings["device"])
    return results


def train_client(experiment: Experiment, update: Callable, task: Task) -> Result:
    """Run update for a task; called in a worker thread.

    Raises FloatingPointError if the loss or a weight is no longer finite.
    """
    settings, client, images = experiment.settings, task.client, experiment.data.x_train
    stream = experiment.stream(task.number, client.id)
    prepare = data.preparation(experiment.statistics, settings["dataset"],
                               stream(data.AUGMENTATION) if settings["augment"] else None)
    own = data.ClientData(images, experiment.data.y_train, client.indices, prepare)
    try:
        model, optimizer = experiment.idle[client.arch].pop()
    except IndexError:  # more clients of this architecture train at this moment than ever before
        model, optimizer = baselines.filled(models.scratch_network, settings)(
            client.arch, *experiment.shape, images.device)
    # Without its cache, which would keep the weights of the first step for all others.
    with torch.autocast(images.device.type, torch.bfloat16, settings["amp"], cache_enabled=False):
        result = update(model, optimizer, task.received, own, stream, *task.kept)
    optimizer.zero_grad()  # frees the gradients while the network waits for its next client
    experiment.idle[client.arch].append((model, optimizer))
    if not (math.isfinite(result.loss) and models.all_finite((result.update, result.kept))):
        raise FloatingPointError(f"client {client.id}: the loss or a weight is not finite any "
                                 "more; a smaller --lr may help")
    return result


# --------------------------------------------------------------------------------------- evaluation

def evaluate(experiment: Experiment, server: dict, memory: dict) -> dict:
    """The accuracies of the models that the clients use in the rounds; see apfl.accuracies.

    Of a network that is cut by width, full_accuracy besides: that of the whole one.
    """
    in_use = ((client.id, client.arch, *experiment.method.deploy(server, client,
                                                                 memory.get(client.id)))
              for client in experiment.clients)
    if experiment.method.networks != "-widths":
        return apfl.accuracies(experiment, baselines.predicted_right(experiment, in_use))
    ((arch, whole),) = server["weights"].items()
    right = baselines.predicted_right(experiment, chain(in_use, [("full", arch, arch, whole)]))
    full = 100 * float(right.pop("full").double().mean())
    return apfl.accuracies(experiment, right) | {"full_accuracy": full}


# --------------------------------------------------------------------------------------------- main

def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status (README, "When something goes wrong")."""
    out = None  # until the run has begun
    try:
        ranks.join()
        experiment, progress, history, out = set_up(argv)
        train(experiment, progress, history, out)
        ranks.leave()
    except (Exception, KeyboardInterrupt) as error:
        speaks = ranks.is_speaker()
        line, status = files.ending(out, error, speaks)
        if speaks:
            print(files.one_line(f"error: {line}"), file=sys.stderr, flush=True)
        return status
    finally:
        files.leave()
    return 0


def train(experiment: Experiment, progress: Progress, history: list[dict], out: Path) -> None:
    """All rounds and stages that are left; history: the lines of metrics.jsonl so far."""
    settings, started = experiment.settings, time.perf_counter() - progress.totals["seconds"]
    title = f"{settings['method']} on {Path(settings['dataset']).stem}"
    pool = ThreadPoolExecutor(settings["workers"], initializer=torch.set_num_threads,
                              initargs=(settings["threads"],))
    experiment = experiment._replace(train=partial(train_clients, experiment, pool),
                                     watch=pictures.watch)
    try:
        progress = train_rounds(experiment, progress, history, out)
        progress = train_stages(experiment, progress, out)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    totals = dict(progress.totals)
    if progress.after:
        history[-1] = apfl.final_line(experiment, progress.line, progress.server, progress.after)
        totals["download_mb"] += apfl.stage_traffic(experiment, progress.server, progress.after)
        files.replace_last_line(out / "metrics.jsonl", history[-1])
    betas, curves = [step / 10 for step in range(11)], {}
    if "friends" in progress.after:
        curves = apfl.beta_curves(experiment, progress.server, progress.after, betas)
    if not ranks.is_first():
        return
    if curves:
        used = settings["beta"] if settings["beta_on"] == "client" else 1 - settings["beta"]
        files.write(out / "beta.png", partial(pictures.draw_beta, betas=betas, curves=curves,
                                              used=used, title=title))
    result = files.summarise(history, totals | {"seconds": time.perf_counter() - started})
    files.write_json(out / "result.json", result)
    files.write(out / "curves.png", partial(pictures.draw_curves, history=history, title=title))
    print(f"\n{pictures.result_text(result)}\nwritten to {out}: "
          + ", ".join(sorted({path.name for path in out.iterdir()} - {files.LOCK})))


def train_rounds(experiment: Experiment, progress: Progress, history: list[dict],
                 out: Path) -> Progress:
    """All rounds that are left to do; appends to history what it appends to metrics.jsonl."""
    settings, totals, one_round = experiment.settings, progress.totals, train_round
    if settings.get("aggregation") == "async":
        one_round = baselines.filled(apfl.asynchronous_round, settings)
    start = saved = progress.round
    started = time.perf_counter() - totals["seconds"]  # as if it had never stopped
    bar = pictures.watch(None, None, "round", settings["rounds"], initial=start)
    try:
        for t in range(start + 1, settings["rounds"] + 1):
            round_start = time.perf_counter()
            with files.noted(f"round {t}"):
                server, memory, figures = one_round(experiment, t, progress.server, progress.memory)
            seconds = time.perf_counter() - round_start
            models.release_freed_memory()
            totals = {name: value + figures.get(name, 0) for name, value in totals.items()}
            totals["training_seconds"] += seconds
            line = progress.line
            if files.is_evaluated(t, settings):
                with files.noted(f"round {t}, evaluation"):
                    line = {"round": t, **evaluate(experiment, server, memory), **figures,
                            "clock": totals["clock"], "seconds": round(seconds, 3)}
                files.append_metrics(out / "metrics.jsonl", line)
                history.append(line)
                bar.set_postfix_str(f"accuracy {line['accuracy']:.1f} %, loss {line['loss']:.3f}")
                if files.has_become_absurd(history):
                    bar.write(f"warning: round {t}: the loss is {line['loss']:.1e}; a smaller --lr "
                              "may help", file=sys.stdout)
            totals["seconds"] = time.perf_counter() - started
            progress = Progress(t, server, memory, totals, line, {})
            if t % settings["checkpoint_every"] == 0 or t == settings["rounds"]:
                files.save_checkpoint(out, progress)
                saved = t
            bar.update()
            if t == start + 1 < settings["rounds"]:
                left = (time.perf_counter() - round_start) * (settings["rounds"] - t)
                bar.write(f"round {t} took {seconds:.1f} s; at this pace the others take "
                          f"{bar.format_interval(left)}", file=sys.stdout)
    except (KeyboardInterrupt, ConnectionError):
        if progress.round > saved:
            files.save_checkpoint(out, progress)
        raise
    finally:
        bar.close()
    return progress


def train_stages(experiment: Experiment, progress: Progress, out: Path) -> Progress:
    """The stages of the method after the last round; each is saved when it is finished."""
    for name, stage in experiment.method.stages.items():
        is_new, start = name not in progress.after, time.perf_counter()
        if is_new:
            work = partial(stage, experiment, progress.server, progress.after)
            if name == "generator":  # which all cores train already
                work = partial(ranks.done_by, 0, work, experiment.settings["device"])
            after = progress.after | {name: work()}
            seconds = {f"{name}_seconds": round(time.perf_counter() - start, 3)}
            progress = progress._replace(after=after, totals=progress.totals | seconds)
            files.save_checkpoint(out, progress)
        missing = name == "generator" and (is_new or not (out / "samples.png").exists())
        if missing and ranks.is_first():
            taught = sum(one["class_counts"] for one in progress.server["teachers"].values()) > 0
            files.write(out / "samples.png", partial(
                pictures.draw_samples, images=apfl.sample_sheet(experiment, progress.after).cpu(),
                names=experiment.data.classes, seen=taught.tolist(),
                title=f"synthetic samples, {Path(experiment.settings['dataset']).stem}"))
    return progress


if __name__ == "__main__":
    sys.stdout, sys.stderr = pictures.Display(sys.stdout), pictures.Display(sys.stderr)
    exit_status = main()
    sys.stdout.flush()
    os._exit(exit_status)  # at once: a client that still trains after Ctrl-C has nothing to save
