"""How fast the code is (not collected by pytest).  Images are random: no time depends on them.

    python -m tests.benchmark [PART ...]     all parts take about an hour on two cores

starting   CPU seconds beside `import torch`, and peak memory
update     a client update against a bare PyTorch loop of the same steps on torchvision's layers
round      a round of both papers' workloads, divided into its parts; two workers against one
ranks      two processes under torchrun against one
clients    ten clients a round, of 10 to 60,000
methods    a round of every method in RESULTS.md's table of baselines, at its scale

Prints one table.  Where two things are compared, they are measured alternately, and the ratio is
the median of those of the pairs (ranks: one run each); above 1 the first is faster or smaller.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import baselines
import data
import files
import models
import run

REPEATS = 6
MEMORY = "print(__import__('resource').getrusage(0).ru_maxrss // 1024)"  # in MiB, of the process


def row(what: str, first: str, second: str = "", ratio: float | None = None) -> None:
    """A line of the table."""
    print(f"| {what} | {first} | {second} | {'' if ratio is None else f'{ratio:.2f}'} |", flush=True)


def compare(first, second, repeats: int = REPEATS,
            clock=time.perf_counter) -> tuple[float, float, float]:
    """Run both alternately, each in turn ahead: median times, median of time(second) / time(first).
    """
    first(), second()
    times = []
    for repeat in range(repeats):
        pair = {}
        for function in (first, second) if repeat % 2 == 0 else (second, first):
            start = clock()
            function()
            pair[function] = clock() - start
        times.append((pair[first], pair[second]))
    a, b = zip(*times)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in times)


# ----------------------------------------------------------------------------------------- starting

def children_cpu() -> float:
    """User and system time of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(*command: str) -> str:
    """The output of a Python command, however it ends."""
    return subprocess.run([sys.executable, *command], text=True, capture_output=True).stdout


def starting(folder: Path) -> None:
    for what, command in (("`import run`", ("-c", "import run")), ("--help", ("run.py", "--help")),
                          ("a flag that is not read", ("run.py", "--method", "local", "--mu", "1"))):
        torch_alone, ours, ratio = compare(partial(execute, "-c", "import torch"),
                                           partial(execute, *command), clock=children_cpu)
        row(f"{what}, `import torch`: CPU s", f"{ours:.2f}", f"{torch_alone:.2f}", 1 / ratio)
    save_images(folder / "15000.npz", 15_000, tests=10_000)
    for what, body in (("`import torch`", "import torch; "), ("`import run`", "import run; "),
                       ("--method fedavg --model cnn, digits, ten rounds",
                        f"import run; run.main('--method fedavg --model cnn --out {folder}/a'"
                        ".split()); "),
                       ("--method fedavg --model cnn, 15,000 colour images, two rounds",
                        "import run; run.main('--method fedavg --setting apfl --local-epochs 1 "
                        f"--rounds 2 --dataset {folder}/15000.npz --out {folder}/b'.split()); ")):
        row(f"{what}: peak memory, MiB", execute("-c", body + MEMORY).split()[-1])


# ------------------------------------------------------------------------------------ client updates

def bare_loop(model, weights, images, labels, mean, deviation, batch_size, epochs, lr):
    """What one writes without a framework: the same batches, settings and optimiser."""
    model.load_state_dict(weights)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):
            x = (images[rows].float() - mean) / deviation
            loss = F.cross_entropy(model(x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def plain(model: nn.Module) -> nn.Module:
    """The network with torch's own convolutions, as torchvision has it."""
    for layer in model.modules():
        if isinstance(layer, models.Conv2d):
            layer.__class__ = nn.Conv2d
    return model


def update(folder: Path) -> None:
    for arch, batch_size, lr, count in (("cnn", 50, 2e-4, 1000), ("resnet10", 16, 1e-3, 160),
                                        ("resnet18", 16, 1e-3, 160), ("resnet26", 16, 1e-3, 160)):
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        labels = torch.randint(10, (count,))
        mean, deviation = data.channel_statistics(images, torch.arange(count))
        net, optimizer = models.scratch_network(arch, 3, 10, images.device, optimizer="adam", lr=lr)
        layout = torch.channels_last if arch == "cnn" else torch.contiguous_format  # its best
        bare_net = plain(models.build(arch, 3, 10)).to(memory_format=layout)
        weights = models.copy_state(bare_net)
        own = data.ClientData(images, labels, torch.arange(count),
                              partial(data.standardise, mean=mean, deviation=deviation))
        stream = partial(data.torch_stream, 0, round=1, client=0)
        ours = partial(baselines.fedavg_client_update, net, optimizer, weights, own, stream,
                       local_epochs=2, batch_size=batch_size)
        bare = partial(bare_loop, bare_net, weights, images, labels, mean, deviation, batch_size, 2,
                       lr)
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            mine, theirs, ratio = compare(lambda: pool.submit(ours).result(),
                                          lambda: pool.submit(bare).result())
        row(f"client update, {arch}, batch {batch_size}; bare loop: images/s",
            f"{2 * count / mine:.0f}", f"{2 * count / theirs:.0f}", ratio)


# -------------------------------------------------------------------------------------------- rounds

def save_images(path: Path, images: int, tests: int = 10) -> None:
    rng = np.random.default_rng(0)
    np.savez(path, x_train=rng.integers(256, size=(images, 32, 32, 3), dtype=np.uint8),
             y_train=np.arange(images) % 10, y_test=np.arange(tests) % 10,
             x_test=rng.integers(256, size=(tests, 32, 32, 3), dtype=np.uint8))


def experiment_on(folder: Path, images: int, **typed) -> tuple[baselines.Experiment, dict]:
    """An experiment on random colour images, and the first state of its server."""
    path = folder / f"{images}.npz"
    save_images(path, images, tests=typed.pop("tests", 10))
    experiment = run.prepare_experiment(run.resolve(
        {"dataset": str(path), "setting": "fedin", "method": "fedin"} | typed))
    return experiment, run.first_progress(experiment).server


def with_workers(experiment: baselines.Experiment, workers: int,
                 threads: int = 1) -> baselines.Experiment:
    """The experiment, whose clients train so many at a time, on networks of their own."""
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))
    experiment = experiment._replace(idle={arch: [] for arch in experiment.idle})
    return experiment._replace(train=partial(run.train_clients, experiment, pool))


def parts_of_a_round(folder: Path, what: str, images: int, **typed) -> None:
    experiment, server = experiment_on(folder, images, tests=2000, **typed)
    spent = {}

    def timed(part, function, *arguments, **options):
        start = time.perf_counter()
        value = function(*arguments, **options)
        spent[part] = spent.get(part, 0) + time.perf_counter() - start
        return value

    experiment = with_workers(experiment, experiment.settings["workers"])
    method = experiment.method
    experiment = experiment._replace(
        train=partial(timed, "training", experiment.train),
        method=method._replace(download=partial(timed, "sending", method.download),
                               server_update=partial(timed, "aggregation", method.server_update)))
    memory, samples = {}, 0
    for t in (1, 2, 3):
        if t == 2:  # since features travel from then on
            spent.clear()
            samples = 0
        server, memory, figures = run.train_round(experiment, t, server, memory)
        samples += figures["samples"]
        timed("evaluation", run.evaluate, experiment, server, memory)
        timed("checkpoint", files.save_checkpoint, folder,
              files.Progress(t, server, memory, figures, {}, {}))
    row(f"{what}: images/s in training", f"{samples / spent['training']:.0f}")
    for part, seconds in spent.items():
        row(f"{what}: {part}, s a round", f"{seconds / 2:.3f}")


def rounds(folder: Path) -> None:
    parts_of_a_round(folder, "AP-FL's clients: 10 of 10, CNN, 5,000 images, one epoch", 5000,
                     method="apfl", setting="apfl", local_epochs=1)
    parts_of_a_round(folder, "FedIN: 10 of 100, five ResNets, 10,000 images, one epoch", 10_000,
                     local_epochs=1)
    experiment, server = experiment_on(folder, 2000, partition="iid", clients=10,
                                       participation=1.0, local_epochs=1)
    # One round before, so that features travel.
    server, _, _ = run.train_round(with_workers(experiment, 2), 1, server, {})

    def one_round(workers, threads):
        return partial(run.train_round, with_workers(experiment, workers, threads), 2, server, {})

    for workers, threads in ((1, 1), (1, 2)):
        mine, other, ratio = compare(one_round(2, 1), one_round(workers, threads), repeats=2)
        row(f"FedIN, 2 workers x 1 thread; {workers} x {threads}: s a round", f"{mine:.1f}",
            f"{other:.1f}", ratio)


def process_counts(folder: Path) -> None:
    save_images(folder / "ranks.npz", 4000, tests=500)
    seconds = {}
    for processes in (1, 2):
        out = folder / str(processes)
        several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        execute(*(several if processes > 1 else []), "run.py", "--setting", "fedin", "--dataset",
                str(folder / "ranks.npz"), "--partition", "iid", "--clients", "10",
                "--participation", "1", "--local-epochs", "1", "--rounds", "4", "--workers", "1",
                "--out", str(out))
        lines = (out / "metrics.jsonl").read_text().splitlines()
        seconds[processes] = float(lines[-1].split('"seconds": ')[1].strip("}"))
    row("FedIN, 10 clients, one worker each: 2 processes; 1: s a round", f"{seconds[2]:.1f}",
        f"{seconds[1]:.1f}", seconds[1] / seconds[2])


def client_counts(folder: Path) -> None:
    """Ten clients of two to ten images a round, so that what grows with the clients shows."""
    for clients in (10, 1000, 6000, 60_000):
        path, images = folder / "clients.npz", min(10 * clients, 120_000)
        save_images(path, images)
        body = (f"import run; run.main('--method fedavg --model cnn --setting fedin --dataset {path}"
                f" --clients {clients} --partition iid --participation {10 / clients} --rounds 6 "
                f"--local-epochs 1 --eval-every 6 --out {folder}/{clients}'.split()); ")
        start = time.perf_counter()
        memory = execute("-c", body + MEMORY).split()[-1]
        whole = time.perf_counter() - start
        line = (folder / str(clients) / "metrics.jsonl").read_text()
        row(f"ten of {clients:,} clients, {images:,} images: s a round, s in all, MiB",
            line.split('"seconds": ')[1].strip("}\n"), f"{whole:.1f}, {memory}")


def seconds_of_methods(folder: Path) -> None:
    """The second and third round of every method: 5 of 20 clients, 5,000 images, 2 epochs."""
    choices = {"resnets": ("local", "fedavg", "fedprox", "scaffold", "fednova", "moon",
                           "inclusivefl", "inco", "fedin"),
               "resnet18-widths": ("heterofl", "fedrolex", "scalefl"),
               "cnn": ("fedavg", "fedgen", "feddf")}
    for model, methods in choices.items():
        for method in methods:
            # As many again are for the server of FedDF to hold.
            experiment, server = experiment_on(
                folder, 10_000, train_images=5000, alpha=0.5, clients=20, participation=0.25,
                local_epochs=2, method=method, model=model)
            experiment = with_workers(experiment, experiment.settings["workers"])
            memory, seconds = {}, []
            for t in (1, 2, 3):
                start = time.perf_counter()
                server, memory, figures = run.train_round(experiment, t, server, memory)
                seconds.append(time.perf_counter() - start)
            row(f"{method} on {model}: s a round", f"{statistics.mean(seconds[1:]):.1f}")


PARTS = {"starting": starting, "update": update, "round": rounds, "ranks": process_counts,
         "clients": client_counts, "methods": seconds_of_methods}

if __name__ == "__main__":
    print(f"torch {torch.__version__}, {run.num_cores()} cores\n\n| what | first | second | ratio |"
          "\n|---|---|---|---|")
    torch.set_num_threads(run.num_cores())
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder))
