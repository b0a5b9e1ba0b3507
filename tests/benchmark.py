"""Speed and memory (not collected by pytest).  Images are random: no time depends on them.

    python -m tests.benchmark [PART ...]     all parts, see PARTS, take about an hour on two cores

Two things that are compared run alternately.  Their ratio is the median over the pairs (ranks: one
run each); above 1 the first is faster.
"""

import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

from commands import experiment_of

import baselines
import data
import evaluation
import files
import graphs
import models
import ranks
import run
from federation import Experiment, first_server, train_client, train_clients


def row(title: str, *values: float | str) -> None:
    """Print a line of the table: one or two measurements, and their ratio."""
    cells = [value if isinstance(value, str) else f"{value:,.4g}" for value in values]
    print("| " + " | ".join([title, *cells]) + " |", flush=True)


def compare(first, second, repeats=6, clock=time.perf_counter) -> tuple[float, float, float]:
    """Median times of two functions, and the median of time(second) / time(first)."""
    first(), second()
    times = []
    for repeat in range(repeats):
        pair = {}
        for function in (first, second) if repeat % 2 == 0 else (second, first):
            start = clock()
            function()
            pair[function] = clock() - start
        times.append((pair[first], pair[second]))
    return *map(statistics.median, zip(*times)), statistics.median(y / x for x, y in times)


# ----------------------------------------------------------------------------------------- starting

def execute(*command: str) -> str:
    """Output of a Python command, however it ends."""
    return subprocess.run([sys.executable, *command], text=True, capture_output=True).stdout


def memory_of(flags: str) -> str:
    """Peak memory in MiB of a run."""
    return execute("-c", f"import resource, run; run.main({flags.split()}); "
                   "print(resource.getrusage(0).ru_maxrss // 1024)").split()[-1]


def starting(folder: Path) -> None:
    """CPU seconds before the first round beside `import torch`, and peak memory."""
    for command in ("-c 'import run'", "run.py --help", "run.py --method local --mu 1"):
        row(f"{command}; import torch: CPU s", *compare(
            partial(execute, *shlex.split(command)), partial(execute, "-c", "import torch"),
            clock=lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])))  # user and system
    images = save_images(folder, 15_000, tests=10_000)
    for title, flags in (("import run", "--resume"), ("digits, ten rounds", "--model cnn"), (
            "15,000 colour images, two rounds", "--setting apfl --local-epochs 1 --rounds 2 "
            f"--dataset {images}")):
        row(f"{title}: MiB", memory_of(f"--method fedavg {flags} --out {folder}/{title[0]}"))


# ----------------------------------------------------------------------------------- client updates

def bare_loop(model, weights, images, labels, mean, deviation, batch_size, epochs, lr):
    """Train as one does without a framework: equal batches, settings and optimiser."""
    model.train().load_state_dict(weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):
            x = (images[rows].float() - mean) / deviation
            loss = F.cross_entropy(model(x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def update(folder: Path) -> None:
    """Images per second of a client update and of a bare loop, on one thread each."""
    for arch, batch_size, lr, count in (("cnn", 50, 2e-4, 1000), *(
            (f"resnet{depth}", 16, 1e-3, 160) for depth in (10, 18, 26))):
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        labels, make = torch.randint(10, (count,)), partial(models.MODELS[arch][arch], 3, 10)
        mean, deviation = data.channel_statistics(images, torch.arange(count))

        # The bare network has torch's own convolutions, and the layout that suits it best.
        net = make().to(memory_format=torch.channels_last if arch == "cnn"
                        else torch.contiguous_format)
        for layer in net.modules():
            if isinstance(layer, models.Conv2d):
                layer.__class__ = torch.nn.Conv2d
        weights = models.copy_state(net)
        bare = partial(bare_loop, net, weights, images, labels, mean, deviation, batch_size, 2, lr)
        scratch = models.scratch_network(make, images.shape[1:], images.device, optimizer="adam",
                                         lr=lr)
        client = data.ClientData(images, labels, torch.arange(count), partial(
            data.standardise, mean=mean, deviation=deviation))
        ours = partial(baselines.fedavg_client_update, *scratch, weights, client,
                       data.streams(0, 1, 0), local_epochs=2, batch_size=batch_size)
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            mine, theirs, ratio = compare(lambda: pool.submit(ours).result(),
                                          lambda: pool.submit(bare).result())
        row(f"client update, {arch}, batch {batch_size}; bare loop: images/s", 2 * count / mine,
            2 * count / theirs, ratio)


# ------------------------------------------------------------------------------------------- rounds

def save_images(folder: Path, images: int, tests: int = 10) -> Path:
    """Path of a data set of random colour images."""
    rng, arrays = np.random.default_rng(0), {}
    for part, count in (("train", images), ("test", tests)):
        arrays[f"x_{part}"] = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % 10
    np.savez(folder / f"{images}.npz", **arrays)
    return folder / f"{images}.npz"


def experiment_on(path: Path, **typed) -> tuple[Experiment, dict]:
    """An experiment on a data set, and the first state of its server."""
    experiment = experiment_of(run.resolve({"dataset": str(path), "setting": "fedin", **typed}))
    return experiment, first_server(experiment)


def parts_of_a_round(folder: Path, title: str, images: int, **typed) -> None:
    """Seconds per part of a round, and images per second in training."""
    experiment, server = experiment_on(save_images(folder, images, tests=2000), **typed)
    spent, memory, samples, method = {}, {}, 0, experiment.method

    def timed(part, function, *arguments, **options):
        start = time.perf_counter()
        value = function(*arguments, **options)
        spent[part] = spent.get(part, 0) + time.perf_counter() - start
        return value

    experiment = experiment._replace(method=method._replace(
        download=partial(timed, "sending", method.download),
        server_update=partial(timed, "aggregation", method.server_update)))
    with patch.object(run, "train_clients", partial(timed, "training", train_clients)):
        for t in (1, 2, 3):
            if t == 2:  # features travel from round 2 on
                spent.clear()
            server, memory, figures = run.train_round(experiment, t, server, memory)
            samples = samples + figures["samples"] if t > 1 else 0
            timed("evaluation", evaluation.evaluate, experiment, server, memory)
            timed("checkpoint", files.save_checkpoint, folder,
                  files.Progress(t, server, memory, figures, {}, {}))
    row(f"{title}: images/s in training", samples / spent["training"])
    for part, seconds in spent.items():
        row(f"{title}: {part}, s per round", seconds / 2)


def rounds(folder: Path) -> None:
    """Parts of a round, and numbers of workers and threads."""
    parts_of_a_round(folder, "AP-FL's clients: 10 of 10, CNN, 5,000 images, one epoch", 5000,
                     method="apfl", semantics="onehot", setting="apfl", local_epochs=1)
    parts_of_a_round(folder, "FedIN: 10 of 100, five ResNets, 10,000 images, one epoch", 10_000,
                     local_epochs=1)
    experiment, server = experiment_on(save_images(folder, 2000), partition="iid", clients=10,
                                       participation=1.0, local_epochs=1)
    server, _, _ = run.train_round(experiment, 1, server, {})  # features travel from round 2 on

    def one_round(workers: int, threads: int) -> partial:
        settings = experiment.settings | {"workers": workers, "threads": threads}
        return partial(run.train_round, experiment._replace(settings=settings), 2, server, {})

    for threads in (1, 2):
        row(f"FedIN, 2 workers; 1, {threads} threads: s per round",
            *compare(one_round(2, 1), one_round(1, threads), repeats=2))


def projections(folder: Path) -> None:
    """A round of FedIN by Eq. 13, and by Eq. 12 at every step, in CPU seconds."""
    images, rounds = save_images(folder, 1000), []
    for projection in ("simplified", "exact"):
        experiment, server = experiment_on(images, projection=projection, partition="iid",
                                           clients=5, participation=1.0, local_epochs=1, workers=1)
        server, _, _ = run.train_round(experiment, 1, server, {})  # features travel from round 2 on
        rounds.append(partial(run.train_round, experiment, 2, server, {}))
    row("FedIN, Eq. 13; --projection exact: CPU s per round",
        *compare(*rounds, repeats=4, clock=time.process_time))


def seconds_of_last_round(out: Path) -> float:
    """Time of the last round in metrics.jsonl."""
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]


def process_counts(folder: Path) -> None:
    """A round of FedIN on two processes and on one."""
    images, seconds = save_images(folder, 4000, tests=500), []
    for processes in "21":
        execute("-m", "torch.distributed.run", "--nproc-per-node", processes, "run.py", *(
            f"--setting fedin --dataset {images} --partition iid --clients 10 --participation 1 "
            f"--local-epochs 1 --rounds 4 --workers 1 --out {folder}/{processes}").split())
        seconds.append(seconds_of_last_round(folder / processes))
    row("FedIN, 10 clients, 2 processes; 1: s per round", *seconds, seconds[1] / seconds[0])


def client_counts(folder: Path) -> None:
    """Ten clients per round with two to ten images each: costs that grow with the clients."""
    for clients in (10, 1000, 6000, 60_000):
        images, out = min(10 * clients, 120_000), folder / str(clients)
        memory = memory_of(f"--method fedavg --model cnn --setting fedin --clients {clients} "
                           f"--dataset {save_images(folder, images)} --partition iid --rounds 6 "
                           f"--participation {10 / clients} --local-epochs 1 --eval-every 6 "
                           f"--out {out}")
        row(f"ten of {clients:,} clients, {images:,} images: s per round, MiB",
            seconds_of_last_round(out), memory)


def costs_of_methods(folder: Path) -> None:
    """Round 3 of every method, peak memory of three rounds, and what a client sends.

    Five of 20 clients per round, 5,000 images, two local epochs.
    """
    methods = {"resnets": "local fedavg fedprox scaffold fednova moon inclusivefl inco fedin",
               "resnet18-widths": "heterofl fedrolex scalefl", "cnn": "fedavg fedgen feddf"}
    images = save_images(folder, 10_000)  # half of them for the server of FedDF to hold
    for model in methods:
        for method in methods[model].split():
            out = folder / f"{method}-{model}"
            execute("run.py", *(
                f"--method {method} --model {model} --setting fedin --dataset {images} --rounds 3 "
                "--train-images 5000 --alpha 0.5 --clients 20 --participation 0.25 "
                f"--local-epochs 2 --eval-every 3 --out {out}").split())
            result = json.loads((out / "result.json").read_text())
            row(f"{method}, {model}", seconds_of_last_round(out), result["memory_mb"],
                result["upload_mb"] / (3 * 5))


# ----------------------------------------------------------------------------------------- on a GPU

def on_gpu(folder: Path) -> None:
    """Training steps as CUDA graphs against steps without, and deterministic against free ones."""
    if not torch.cuda.is_available():
        row("graphs", "there is no GPU here")
        return
    graphs.make_deterministic()
    images = save_images(folder, 4000)
    for arch, batch_size in (("cnn", 50), *((net, 16) for net in models.RESNET_BLOCKS)):
        for method in ("fedavg", "fedin"):
            steps_on_gpu(f"{method}, {arch}, batch {batch_size}", images, model=arch,
                         method=method, batch_size=batch_size)

    # Whole rounds, against one client at a time without graphs
    images = save_images(folder, 50_000)
    rounds_on_gpu("FedIN, paper's setting", images)
    rounds_on_gpu("FedAvg, CNN, AP-FL's setting, one epoch", images, method="fedavg",
                  setting="apfl", local_epochs=1)


def switched(captured: bool, work, *arguments) -> None:
    """Do work on the GPU with graphs or without, to its end."""
    with patch.object(graphs, "enabled", captured):
        work(*arguments)
    torch.cuda.synchronize()


def steps_on_gpu(title: str, images: Path, **typed) -> None:
    """Milliseconds per step, of 125 or more steps of a client."""
    epochs = 8 if typed["batch_size"] == 50 else 2
    experiment, server = experiment_on(images, clients=4, participation=1.0, partition="iid",
                                       local_epochs=epochs, device="cuda", **typed)
    server = models.on_device(server, "cuda")
    server, memory, _ = run.train_round(experiment, 1, server, {})
    (task,) = run.make_tasks(experiment, 2, server, memory, [0])
    steps = data.num_steps(len(task.client.indices), typed["batch_size"], epochs)

    def train(places: list) -> None:
        train_client(experiment._replace(places=places), experiment.method.client_update, task)

    ours, plain, ratio = compare(partial(switched, True, train, []),
                                 partial(switched, False, train, []), repeats=2)
    row(f"{title}; without graphs: ms per step", 1e3 * ours / steps, 1e3 * plain / steps, ratio)
    any_algorithm = partial(switched, True, train, [])

    def undetermined() -> None:
        torch.use_deterministic_algorithms(False)
        any_algorithm()
        torch.use_deterministic_algorithms(True, warn_only=True)

    faster, ours, ratio = compare(undetermined, partial(switched, True, train, []), repeats=4)
    row(f"{title}, any algorithm; deterministic: ms per step", 1e3 * faster / steps,
        1e3 * ours / steps, ratio)


def rounds_on_gpu(title: str, images: Path, **typed) -> None:
    """Seconds per round with the default flags, and with one worker without graphs; memory."""
    experiment, server = experiment_on(images, device="cuda", **typed)
    server, memory, _ = run.train_round(experiment, 1, models.on_device(server, "cuda"), {})
    alone = experiment._replace(places=[], settings=experiment.settings | {"workers": 1})
    torch.cuda.reset_peak_memory_stats()
    ours = partial(switched, True, run.train_round, experiment, 2, server, memory)
    ours()
    row(f"{title}: MB on the GPU", torch.cuda.max_memory_reserved() / 1e6)
    row(f"{title}; one worker without graphs: s per round", *compare(
        ours, partial(switched, False, run.train_round, alone, 2, server, memory), repeats=2))


PARTS = {"starting": starting, "update": update, "round": rounds, "ranks": process_counts,
         "projection": projections, "clients": client_counts, "methods": costs_of_methods,
         "gpu": on_gpu}
HEADS = {"methods": "method, networks | s per round | peak of the process, MB | MB sent per client "
                    "and round"}  # others: measured | first | second | ratio

if __name__ == "__main__":
    print(f"`python -m tests.benchmark {' '.join(sys.argv[1:])}`, commit {files.commit()}, torch "
          f"{torch.__version__}, {files.machine()}")
    torch.set_num_threads(ranks.num_cores())
    for name in sys.argv[1:] or PARTS:
        head = HEADS.get(name, "measured | first | second | ratio")
        print(f"\n| {head} |\n|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder))
