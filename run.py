"""Train one federated method on one data set and write its results.

    python run.py                                             FedIN on handwritten digits
    python run.py --method apfl --missing-classes 0.2         AP-FL, one client gone with two digits
    python run.py --resume --out runs/fedin-digits-0          resume a stopped run

Reads from top to bottom: settings; the command line; the settings of one run; set-up; one round;
the loop over rounds; stages after the last round; main.  A method's own functions and flags are in
baselines.py, widths.py, fedgen.py, ccvr.py, fedin.py and apfl.py.
"""

import argparse
import math
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

import apfl
import baselines
import ccvr
import data
import fedgen
import fedin
import files
import graphs
import models
import partitions
import pictures
import ranks
import widths
from evaluation import evaluate, final_metrics
from federation import (SPEED_SPREAD, Experiment, Method, Task, describe, draw_participants,
                        first_server, num_participants, prepare_experiment, traffic,
                        train_clients, train_server)
from files import Progress
from settings import (AFTER_ROUNDS, RECORDED, check_combination, command_line, implied_flags,
                      read_settings, typed_as)

# ---------------------------------------------------------------------------------------- settings

METHODS: dict[str, Method] = {**baselines.METHODS, **widths.METHODS, **fedgen.METHODS,
                              **fedin.METHODS, **apfl.METHODS, **ccvr.METHODS}

# Defaults by --setting: a run of a minute on digits, and the settings of the two papers
SETTINGS = {
    "quick": {
        "clients": 10, "participation": 0.5, "rounds": 10, "local_epochs": 1, "batch_size": 16,
        "lr": 4e-4, "model": "resnets", "alpha": 0.5, "eval_every": 1},
    "fedin": {  # Sec. 5.1
        "clients": 100, "participation": 0.1, "rounds": 500, "local_epochs": 5, "batch_size": 16,
        "lr": 1e-3, "model": "resnets", "alpha": 0.5, "eval_every": 5},
    "apfl": {  # Sec. 4.1
        "clients": 10, "participation": 1.0, "rounds": 50, "local_epochs": 20, "batch_size": 50,
        "lr": 2e-4, "model": "cnn", "alpha": 0.1, "eval_every": 1},
}
COMMON = {  # defaults in every setting
    "seed": 0, "optimizer": "adam", "momentum": 0.0, "weight_decay": 0.0, "mixing": apfl.MIXING,
    "staleness": "polynomial", "speed_spread": SPEED_SPREAD, "partition": "dirichlet",
    "classes_per_client": None, "missing_classes": None, "train_images": None,
    "test_images": None, "augment": False, "data_dir": "data", "device": None, "workers": None,
    "threads": 1, "amp": False, "checkpoint_every": 1}

# --------------------------------------------------------------------------------- the command line

LARGEST = 1e9  # bound of numbers on the command line that have no other


def read_command_line(argv: list[str] | None) -> dict:
    """Typed flags and their values.  Raises ValueError for an unknown flag or an invalid value."""
    return vars(parser().parse_args(argv))


def number(kind: type, low: float = -math.inf, high: float = math.inf, *,
           above: float | None = None) -> Callable[[str], float]:
    """Type of a flag that is a number (int or float) from low to high, and above a bound."""
    return partial(read_number, kind=kind, low=low, high=high, above=above)


def read_number(text: str, kind: type, low: float, high: float, above: float | None) -> float:
    """Read a number within bounds; see number."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    largest = LARGEST if high == math.inf else high
    if low <= value <= largest and (above is None or value > above):
        return value
    bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"above {above}"] * (above is not None)
    bounds += [f"at most {largest:.10g}"] * (high < math.inf or value > largest)
    noun = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"must be {noun} {' and '.join(bounds)}, not '{text}'")


def parser() -> argparse.ArgumentParser:
    """Build the command line.  Flags that are not typed are absent from its result; see resolve."""
    top = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], usage="python run.py [--FLAG VALUE ...]",
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=settings_table())
    top.error = raise_usage_error

    add = top.add_argument_group("run").add_argument
    add("--method", choices=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    add("--dataset", metavar="NAME|FILE.npz", help=f"{', '.join(data.DATASETS)}, or a file of your "
        "own (README, 'Your own data'; default: digits)")
    add("--setting", choices=list(SETTINGS), help="defaults of all other flags, see below "
        "(default: quick on digits, else the setting of the method's paper)")
    add("--seed", type=number(int, 0, 2**32 - 1), help="seed of every random draw (default: 0)")
    add("-h", "--help", action="help", help="print this and stop")

    add = top.add_argument_group("federation").add_argument
    add("--clients", type=number(int, 1), help="number of clients, K (AP-FL: also 5)")
    add("--participation", type=number(float, high=1, above=0), help="share of the clients drawn "
        "per round (FedIN: not given in the paper)")
    add("--rounds", type=number(int, 1), help="rounds (AP-FL: not given); may grow on --resume")
    add("--local-epochs", type=number(int, 1), help="local epochs per round")
    add("--batch-size", type=number(int, 2), help="training images per step")
    add("--lr", type=number(float, above=0), help="learning rate, constant")
    add("--optimizer", choices=["adam", "sgd"], help="client optimizer, reset every round "
        "(default: adam)")
    add("--momentum", type=number(float, 0, 0.999), help="SGD momentum (default: 0)")
    add("--weight-decay", type=number(float, 0), help="SGD weight decay (default: 0)")
    add("--model", choices=list(models.MODELS | widths.MODELS), metavar="NAME", help="cnn (AP-FL); "
        "resnets: ResNet10 to 26, evenly among the clients (FedIN); resnet10, 14, 18, 22 or 26; "
        "resnet18-widths, resnet152-widths: five widths (HeteroFL, FedRolex, ScaleFL)")
    add("--aggregation", choices=["layerwise", "per-architecture", "async"], help="average layers "
        "of one name across architectures (default; FedIN Sec. 4.4), or within each architecture "
        "(Table 3), or mix in each update as it arrives (AP-FL Sec. 3.2)")
    add("--eval-every", type=number(int, 1), help="rounds between evaluations, besides the last")

    add = top.add_argument_group("machine and files").add_argument
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--workers", type=number(int, 1, 1024), help="clients trained at a time (default: number "
        f"of cores, on a GPU {graphs.WORKERS}, at most the clients per round)")
    add("--threads", type=number(int, 1, 1024), help="intra-op threads per worker (default: 1)")
    add("--amp", action="store_true", help="train clients in bfloat16; weights stay float32")
    add("--no-graphs", action="store_true", help="on a GPU, run training steps kernel by kernel, "
        "not as CUDA graphs")
    add("--out", metavar="DIR", help="folder of the run (default: runs/METHOD-DATASET-SEED)")
    add("--resume", action="store_true", help="resume the run in --out; with other flags, begin it "
        "if there is none; of a finished run, print the result")
    add("--start-from", metavar="DIR", help="begin after the rounds of the finished run in DIR, "
        "which may differ in flags of the stages after them alone")
    add("--checkpoint-every", type=number(int, 1), help="rounds between checkpoints (default: 1)")

    for title, module in {"data": partitions, "FedIN": fedin, "AP-FL": apfl, "ScaleFL": widths,
                          "CCVR": ccvr, "other baselines": baselines}.items():
        module.add_arguments(top.add_argument_group(title).add_argument, number)
    return top


def settings_table() -> str:
    """SETTINGS as a table for --help."""
    rows = [("", *SETTINGS)]
    rows += [(typed_as(name), *(str(values[name]) for values in SETTINGS.values()))
             for name in SETTINGS["quick"]]
    quick = ", ".join(f"{typed_as(name)} {value}" for name, value in baselines.QUICK_APFL.items())
    names = [name for name, method in METHODS.items() if "setting" in method.defaults]
    notes = f"{', '.join(names)} have the setting apfl, and in quick {quick}."
    return "\n".join(["defaults by --setting:",
                      *("  " + "".join(f"{cell:18}" for cell in row).rstrip() for row in rows),
                      *textwrap.wrap(notes, 76), "A flag that a run does not read is an error."])


def raise_usage_error(message: str) -> NoReturn:
    """Raise argparse's message as a ValueError; main prints it as one line."""
    raise ValueError(f"{message.removeprefix('argument ')} (--help lists all flags)")


# ------------------------------------------------------------------------ the settings of one run

def resolve(typed: dict) -> dict:
    """Every setting of a run: SETTINGS, then the method's defaults, then the typed flags.

    beta, classes_per_client and finetune_epochs stay None until read_inputs sets them.
    Raises ValueError for a flag that the run would not read, or a combination that cannot run.
    """
    name, dataset = typed.get("method", "fedin"), typed.get("dataset", "digits")
    method = METHODS[name]
    paper = method.defaults.get("setting", "fedin")
    setting = typed.get("setting", "quick" if dataset == "digits" else paper)
    defaults = {"method": name, "dataset": dataset, **COMMON, **SETTINGS[setting],
                **method.defaults, **method.in_setting.get(setting, {}), "setting": setting}
    if "semantics" in defaults:
        defaults["semantics"] = "segments" if dataset in ("digits", "svhn") else "clip"
    settings = read_settings(defaults, typed)
    check_combination(settings, METHODS)
    settings["device"] = str(ranks.find_device(settings["device"]))
    if settings["workers"] is None:
        most = (ranks.share_of_cores() if settings["device"] == "cpu"
                else graphs.default_workers(settings["device"]))
        settings["workers"] = min(most, num_participants(settings))
    return settings


def settings_to_resume(out: Path, typed: dict) -> dict:
    """Settings of the run in a folder, updated by the typed flags.

    Raises ValueError if config.json is no run's, or if a typed flag differs from it and may not.
    """
    # Typing every stored setting has to give these very settings.
    settings = files.read_config(out)
    try:
        skipped = {"device", *RECORDED, *implied_flags(settings)}
        stored = {name: value for name, value in settings.items() if name not in skipped
                  and value is not None and value is not False and value != []}
        expected = resolve(read_command_line(command_line(stored)))
        records = [settings.get(name, {}) for name in RECORDED]
        sound = settings | expected | {"device": str(settings["device"])} == settings and all(
            isinstance(record, dict) for record in records)
    except (ValueError, KeyError, TypeError, SystemExit):  # the last by --help
        sound = False
    if not sound:
        raise ValueError(f"{out / 'config.json'} is damaged or of another version: start a new run "
                         "with another --out")

    files.check_agreement(out, settings, typed)
    settings |= typed
    settings["device"] = str(ranks.find_device(settings["device"]))
    return settings


# ------------------------------------------------------------------------------- set-up of a run

def set_up(argv: list[str] | None) -> tuple[Experiment, Progress, list[dict], Path] | None:
    """From the command line to an experiment, its progress and metrics so far, and its folder.

    None: the run is finished.  Raises ValueError or OSError if the user has to change something.
    """
    typed = read_command_line(argv)
    resume, out = typed.pop("resume", False), typed.pop("out", None)
    start_from = typed.pop("start_from", None)
    graphs.enabled = not typed.pop("no_graphs", False)
    if out is None:
        dataset = Path(typed.get("dataset", "digits")).stem
        out = f"runs/{typed.get('method', 'fedin')}-{dataset}-{typed.get('seed', 0)}"
    out = Path(out)

    # Rank 0 reads for all ranks.  Equal bits need equal thread counts in all ranks.
    torch.set_num_threads(ranks.num_cores())
    inputs = ranks.on_rank(0, partial(read_inputs, typed, out, resume, start_from))
    if inputs is None:
        return None
    *on_cpu, history = inputs
    experiment, progress = on_own_device(*on_cpu)
    settings = experiment.settings

    print(describe(experiment, progress.server))
    if settings["setting"] != "quick" and settings["device"] == "cpu":
        print("on a CPU the papers' full settings take many hours; --setting quick is a small one")
    begun = f"resuming after round {progress.round}\n" if progress.round else ""
    print(f"output: {out}\n{begun}", flush=True)
    return experiment, progress, history, out


def on_own_device(settings: dict, split: partitions.Split,
                  progress: Progress) -> tuple[Experiment, Progress]:
    """An experiment and its progress on this rank's device."""
    settings["device"] = ranks.own_device(settings["device"])
    if settings["device"].startswith("cuda"):
        graphs.make_deterministic()
    split, progress = models.on_device((split, progress), settings["device"])
    return prepare_experiment(METHODS[settings["method"]], settings, split), progress


def open_run(folder: str | Path, **moved: str | None) -> tuple[Experiment, Progress]:
    """Experiment and progress of a run, to look at: nothing in its folder or data changes.

    moved: dataset (a file), data_dir or device, where they are not those of the run; by default
        device is this machine's.  data_dir is left out if the run does not read it
    Raises ValueError if there is no run, or its data are not here.
    """
    typed = {name: str(value) for name, value in moved.items() if value is not None}
    if "data_dir" not in files.read_config(Path(folder)):
        typed.pop("data_dir", None)
    settings = settings_to_resume(Path(folder), {"device": None, **typed})
    settings, split = read_data(settings, download=False)
    saved = files.load_checkpoint(Path(folder), "cpu")
    if saved is None:
        raise ValueError(f"{folder} has no checkpoint: resume its run by --resume")
    # A(y) is in the checkpoint.
    experiment = prepare_experiment(METHODS[settings["method"]], settings | {"semantics": None},
                                    split)
    first = files.first_progress(first_server(experiment))
    progress = continue_from(Path(folder), saved, first, experiment, {})
    return on_own_device(settings, split, progress)


def read_data(settings: dict, *, download: bool = True) -> tuple[dict, partitions.Split]:
    """Load and split a run's data; returns settings with those that depend on data or others."""
    loaded = data.load(settings["dataset"], settings.get("data_dir", "data"), download=download)
    depending = {"beta": apfl.BETA_COLOUR if loaded.x_train.shape[1] == 3 else apfl.BETA_GRAY,
                 "classes_per_client": partitions.classes_each(len(loaded.classes),
                                                               settings["missing_classes"]),
                 "finetune_epochs": settings["local_epochs"]}
    settings = settings | {name: value for name, value in depending.items()
                           if settings.get(name, value) is None}
    split = partitions.split_by_settings(loaded, settings)
    digests = {"dataset": loaded.digest}
    if files.is_input_file("proxy", settings.get("proxy")):
        digests["proxy"] = data.digest(split.proxy)
    return settings | {"input": partitions.network_input(split),
                       **files.check_same(settings, digests)}, split


def read_inputs(
        typed: dict, out: Path, resume: bool, start_from: str | None = None,
        ) -> tuple[dict, partitions.Split, Progress, list[dict]] | None:
    """Claim the folder of a run, and read its files and data.

    Returns settings, split data, progress and the lines of metrics.jsonl so far; None after the
    result of a finished run.
    """
    # Settings and folder.  A command that is typed in full begins the run that it would resume.
    if resume and typed and not files.has_run(out):
        resume = False
        print(f"there is no run in {out} yet: it begins")
    settings = {} if resume else resolve(typed)
    files.claim(out, resume)
    if resume:
        settings = settings_to_resume(out, typed)
        result = files.finished_result(out, settings)
        if result is not None:
            print(f"the run in {out} is finished\n{pictures.result_text(result)}")
            return None
    settings, split = read_data(settings | {"versions": files.versions()})

    # Progress
    experiment = prepare_experiment(METHODS[settings["method"]], settings, split)
    progress = files.first_progress(first_server(experiment))
    saved = files.load_checkpoint(out, "cpu")
    if saved is not None:
        progress = continue_from(out, saved, progress, experiment, typed)
    elif start_from is not None:
        progress = start_after(Path(start_from), out, progress, experiment, settings)
    files.write_json(out / "config.json", settings)
    return settings, split, progress, files.metrics_so_far(out, progress, settings)


def start_after(folder: Path, out: Path, first: Progress, experiment: Experiment,
                settings: dict) -> Progress:
    """Progress after the rounds of a finished run, written to out; see --start-from.

    Raises ValueError if that run is not finished, or differs in what its rounds depend on.
    """
    if not files.has_run(folder):
        raise ValueError(f"there is no run in {folder} to start from: check --start-from")
    other = files.read_config(folder)
    if files.finished_result(folder, other) is None:
        raise ValueError(f"the run in {folder} is not finished: finish it by python run.py "
                         f"--resume --out {files.quoted(folder)}, then repeat this command")
    may_differ = {*AFTER_ROUNDS, *RECORDED, *files.MAY_CHANGE, "threads", "checkpoint_every"}
    for name in sorted((settings.keys() | other.keys()) - (may_differ - {"rounds"})):
        if settings.get(name) != other.get(name):
            raise ValueError(f"{typed_as(name)} {settings.get(name)} differs from the "
                             f"{other.get(name)} of the run in {folder}: its rounds are others")
    if settings["digests"] != other.get("digests", {}):
        raise ValueError(f"--dataset {settings['dataset']} is not what the run in {folder} began "
                         "with: its rounds are others")

    # Its rounds, with the A(y) of this run, and without its stages
    saved = files.load_checkpoint(folder, "cpu")._replace(stage_results={})
    kept = {name: first.server[name] for name in ("semantics",) if name in first.server}
    saved = continue_from(folder, saved._replace(server=saved.server | kept), first, experiment, {})
    files.write_rounds(out, files.rounds_so_far(folder, saved, settings))
    files.save_checkpoint(out, saved)
    return saved


def continue_from(out: Path, saved: Progress, first: Progress, experiment: Experiment,
                  typed: dict) -> Progress:
    """Progress from a checkpoint, after a check that it is the run's.

    first: progress before round 1
    """
    # A(y) of AP-FL is no part of the rounds.
    if "semantics" in first.server:
        own = saved.server.get("semantics", first.server["semantics"])
        saved = saved._replace(server={**saved.server, "semantics": own})
    memory = experiment.method.initial_memory
    pattern = first._replace(memory={} if memory is None else {
        client.id: memory(first.server, client) for client in experiment.clients})
    files.check_fits(out, saved, experiment.settings["rounds"], pattern)

    # Stages after a round that is no longer the last are void.
    if saved.round < experiment.settings["rounds"]:
        saved = saved._replace(stage_results={})

    # A(y) comes from the checkpoint.  A file that the command line names has to equal it.
    for name in sorted(typed.keys() & {"semantics", "word_vectors"}):
        if not torch.equal(saved.server["semantics"], first.server["semantics"]):
            raise ValueError(f"{typed_as(name)} {typed[name]} is not what this run began with: "
                             "pass its location, or start a new run with another --out")
    return saved


# ---------------------------------------------------------------------------------------- one round

def make_tasks(experiment: Experiment, t: int, server: dict, memory: dict,
               ids: Sequence[int]) -> list[Task]:
    """Prepare the client updates of round t: what each client receives, and its memory."""
    method, tasks = experiment.method, []
    for k in ids:
        client, kept = experiment.clients[k], ()
        stream = data.streams(experiment.settings["seed"], t, k)
        if method.assign is not None:
            client = method.assign(client, list(experiment.networks), stream)
        if method.initial_memory is not None:
            kept = (memory[k] if k in memory else method.initial_memory(server, client),)
        tasks.append(Task(client, t, method.download(server, client, stream), kept))
    return tasks


def train_round(experiment: Experiment, t: int, server: dict,
                memory: dict) -> tuple[dict, dict, dict]:
    """One round: downloads of the participants, their updates, the server's update.

    memory: client id -> what stays on its device, for clients that have taken part
    Returns the new server state, the new memory and the round's figures for the log.
    """
    # Clients
    method = experiment.method
    tasks = make_tasks(experiment, t, server, memory, draw_participants(experiment, t))
    results = train_clients(experiment, method.client_update, tasks)
    if method.initial_memory is not None:
        memory = memory | {k: result.kept for k, result in results.items()}

    # Server
    updates = {k: result.update for k, result in results.items()}
    if method.server_update is not None:
        server = method.server_update(server, updates)
    figures = {}
    if method.distil is not None:
        stream, averaged = data.streams(experiment.settings["seed"], t, 0), server
        server = train_server(experiment, partial(method.distil, server, updates,
                                                  experiment.network, stream))
    if experiment.settings["method"] == "feddf":  # whether a student was better than its average
        pairs = zip(*(models.tensors_in(state["weights"]) for state in (averaged, server)))
        figures["distilled"] = not all(torch.equal(before, after) for before, after in pairs)

    # Log
    figures |= traffic((task.received, results[task.client.id]) for task in tasks)
    clock = max(result.samples / experiment.speeds[k] for k, result in results.items())
    return server, memory, {**figures, "clock": clock}


# ----------------------------------------------------------------------------- the loop over rounds

def train_rounds(experiment: Experiment, progress: Progress, history: list[dict],
                 out: Path) -> Progress:
    """Train all rounds that are left; append to history and metrics.jsonl alike."""
    settings, totals, start = experiment.settings, progress.totals, progress.round
    saved, started = start, time.perf_counter() - totals["seconds"]  # as if it had never stopped
    bar = pictures.progress_bar(None, None, "round", settings["rounds"], initial=start)
    try:
        for t in range(start + 1, settings["rounds"] + 1):
            round_start = time.perf_counter()
            server, memory, line = progress.server, progress.memory, progress.last_metrics

            # Training
            with files.error_context(f"round {t}"):
                if settings.get("aggregation") == "async":
                    server, figures = apfl.asynchronous_round(
                        experiment, server, local_epochs=settings["local_epochs"],
                        batch_size=settings["batch_size"], mixing=settings["mixing"],
                        staleness=settings["staleness"])
                else:
                    server, memory, figures = train_round(experiment, t, server, memory)
            seconds = time.perf_counter() - round_start
            models.release_freed_memory()
            totals = {name: value + figures.get(name, 0) for name, value in totals.items()}
            totals["training_seconds"] += seconds

            # Evaluation
            if files.is_evaluated(t, settings):
                with files.error_context(f"round {t}, evaluation"):
                    line = {"round": t, **evaluate(experiment, server, memory), **figures,
                            "clock": totals["clock"], "seconds": round(seconds, 3)}
                files.append_metrics(out / "metrics.jsonl", line)
                history.append(line)
                bar.set_postfix_str(f"accuracy {line['accuracy']:.1f} %, loss {line['loss']:.3f}")
                if files.loss_is_absurd(history):
                    bar.write(f"warning: round {t}: the loss is {line['loss']:.1e}; a smaller --lr "
                              "may help", file=sys.stdout)

            # Checkpoint
            totals["seconds"] = time.perf_counter() - started
            progress = Progress(t, server, memory, totals, line, {})
            if t % settings["checkpoint_every"] == 0 or t == settings["rounds"]:
                files.save_checkpoint(out, progress)
                saved = t
            bar.update()
            if t == start + 1 < settings["rounds"]:
                took = time.perf_counter() - round_start
                what = "" if files.is_evaluated(t, settings) else ", without evaluation"
                bar.write(f"round {t} took {took:.1f} s{what}; at this pace the others take "
                          f"{bar.format_interval(took * (settings['rounds'] - t))}",
                          file=sys.stdout)
    except (KeyboardInterrupt, ConnectionError):
        if progress.round > saved:
            files.save_checkpoint(out, progress)
        raise
    finally:
        bar.close()
    return progress


# ------------------------------------------------------------------ after the last round, and main

def save_stages(out: Path, progress: Progress, done: dict) -> dict:
    """Save the outcomes of finished stages, without their time, and return them."""
    files.save_checkpoint(out, progress._replace(stage_results=done))
    return done


def train(experiment: Experiment, progress: Progress, history: list[dict], out: Path) -> None:
    """Train all rounds and stages that are left, and write the results.

    history: the lines of metrics.jsonl so far
    """
    started = time.perf_counter() - progress.totals["seconds"]
    title = f"{experiment.settings['method']} on {Path(experiment.settings['dataset']).stem}"
    progress = train_rounds(experiment, progress, history, out)
    totals, drawings = dict(progress.totals), {}

    # Stages after the last round
    if experiment.method.finish is not None:
        ending = experiment.method.finish(experiment, progress.server, progress.stage_results,
                                          partial(save_stages, out, progress))
        history[-1] = final_metrics(experiment, progress.last_metrics, ending)
        files.replace_last_line(out / "metrics.jsonl", history[-1])
        totals["download_mb"] += ending.download / 1e6
        totals["upload_mb"] += ending.upload / 1e6
        drawings |= ending.pictures

    # Results
    if not any(line.get("distilled", True) for line in history) and len(history) == progress.round:
        print("in no round was a student better than its clients' average: these are the numbers "
              "of averages alone")
    drawings["curves.png"] = partial(pictures.draw_curves, history=history, title=title)
    result = files.summarise(history, totals | {"seconds": time.perf_counter() - started})
    result |= files.peak_memory(experiment.settings["device"])
    for name, draw in drawings.items():
        try:
            files.write(out / name, draw)
        except ConnectionError:  # by another rank's end
            raise
        except Exception as error:  # matplotlib raises any kind; no picture is worth a run
            print(f"warning: {name} could not be drawn ({files.first_line(error)})")
    files.write_json(out / "result.json", result)  # last, since it tells that the run is finished
    if ranks.is_first():
        print(f"\n{pictures.result_text(result)}\nwritten to {out}: "
              + ", ".join(sorted({path.name for path in out.iterdir()} - {files.LOCK})))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status (README, "When something goes wrong")."""
    out = None  # until the run has begun
    try:
        ranks.join()
        begun = set_up(argv)
        if begun is not None:
            *_, out = begun
            train(*begun)
        ranks.leave()
    except (Exception, KeyboardInterrupt) as error:
        speaks = ranks.is_speaker()
        message, status = files.describe_ending(out, error, speaks)
        if speaks:
            print(files.one_line(f"error: {message}"), file=sys.stderr, flush=True)
        return status
    finally:
        files.release()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, ranks.end)
    sys.stdout, sys.stderr = pictures.Display(sys.stdout), pictures.Display(sys.stderr)
    exit_status = main()
    sys.stdout.flush()
    os._exit(exit_status)  # at once: a client that still trains after Ctrl-C has nothing to save
