"""How fast the code is, as ratios measured alternately in one run (not collected by pytest).

    python -m tests.benchmark

1. What starting costs beside `import torch`: CPU seconds and peak memory.
2. FedAvg's client update against a bare PyTorch loop that does the same steps, images a second.
3. What a round spends outside training and evaluation.
4. Seconds of a round of every method, on colour images at the scale of the tables in RESULTS.md.
5. A FedIN round with two workers against one.
Images are random: no time depends on their content.
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

import baselines
import data
import files
import models
import run

REPEATS = 10


def median_of_ratios(first, second, repeats: int = REPEATS) -> tuple[float, float, float]:
    """Run both alternately, each in turn ahead: median times, median of time(second) / time(first).
    """
    first(), second()
    times = []
    for repeat in range(repeats):
        pair = {}
        for function in (first, second) if repeat % 2 == 0 else (second, first):
            start = time.perf_counter()
            function()
            pair[function] = time.perf_counter() - start
        times.append((pair[first], pair[second]))
    a, b = zip(*times)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in times)


def cpu_seconds(*command: str) -> float:
    """User and system time of a process, however it ends."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def starting(folder: Path) -> None:
    """Ratios to `import torch`, alternated, and the peak memory of a small run."""
    torch_alone = ("-c", "import torch")
    for what, command in (("import run", ("-c", "import run")), ("--help", ("run.py", "--help")),
                          ("a flag that is not read", ("run.py", "--method", "local", "--mu", "1")),
                          ("an unknown method", ("run.py", "--method", "fedsgd"))):
        cpu_seconds(*torch_alone), cpu_seconds(*command)
        pairs = [(cpu_seconds(*command), cpu_seconds(*torch_alone)) for _ in range(REPEATS)]
        print(f"{what}: {statistics.median(a for a, _ in pairs):.2f} s, import torch "
              f"{statistics.median(b for _, b in pairs):.2f} s, ratio "
              f"{statistics.median(a / b for a, b in pairs):.2f} (CPU)")
    program = ("import sys, resource; {}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss "
               "// 1024)")
    for what, body in (("import torch", "import torch"), ("import run", "import run"),
                       ("fedavg, cnn, digits", "import run; run.main(['--method', 'fedavg', "
                        f"'--model', 'cnn', '--out', {str(folder / 'run')!r}])")):
        done = subprocess.run([sys.executable, "-c", program.format(body)], text=True,
                              capture_output=True)
        print(f"peak memory of {what}: {done.stdout.split()[-1]} MiB")


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


def client_update_against_bare_loop(arch: str, batch_size: int, lr: float, count: int) -> None:
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (count,))
    mean, deviation = data.channel_statistics(images, torch.arange(count))
    layout = torch.channels_last if arch == "cnn" else torch.contiguous_format
    nets = [models.build(arch, 3, 10).to(memory_format=layout) for _ in range(2)]
    weights = models.copy_state(nets[0])
    own = data.ClientData(images, labels, torch.arange(count),
                          partial(data.standardise, mean=mean, deviation=deviation))
    optimizer = torch.optim.Adam(nets[0].parameters(), lr=lr, fused=True)
    stream = partial(data.torch_stream, 0, round=1, client=0)
    ours = partial(baselines.fedavg_client_update, nets[0], optimizer, weights, own, stream,
                   local_epochs=2, batch_size=batch_size)
    bare = partial(bare_loop, nets[1], weights, images, labels, mean, deviation, batch_size, 2, lr)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        mine, theirs, ratio = median_of_ratios(lambda: pool.submit(ours).result(),
                                               lambda: pool.submit(bare).result())
    print(f"{arch}, batch {batch_size}: client update {2 * count / mine:.0f} images/s, bare loop "
          f"{2 * count / theirs:.0f} images/s, ratio {ratio:.3f}")


def experiment_on(folder: Path, images: int, **typed) -> tuple[baselines.Experiment, dict]:
    """An experiment on random colour images, and the first state of its server."""
    rng = np.random.default_rng(0)
    path = folder / f"{images}.npz"
    np.savez(path, x_train=rng.integers(256, size=(images, 32, 32, 3), dtype=np.uint8),
             y_train=np.arange(images) % 10, y_test=np.arange(10),
             x_test=rng.integers(256, size=(10, 32, 32, 3), dtype=np.uint8))
    experiment = run.prepare_experiment(run.resolve(
        {"dataset": str(path), "setting": "fedin", "method": "fedin"} | typed))
    return experiment, run.first_progress(experiment).server


def with_workers(experiment: baselines.Experiment, workers: int,
                 threads: int = 1) -> baselines.Experiment:
    """The experiment, whose clients train so many at a time, on networks of their own."""
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))
    experiment = experiment._replace(idle={arch: [] for arch in experiment.idle})
    return experiment._replace(train=partial(run.train_clients, experiment, pool))


def fedin_round_by_workers(folder: Path) -> None:
    experiment, server = experiment_on(folder, 4500, partition="iid", clients=10, participation=1.0,
                                       local_epochs=1)
    # One round before, so that features travel.
    server, _, _ = run.train_round(with_workers(experiment, 2), 1, server, {})

    def rounds(workers, threads):
        return partial(run.train_round, with_workers(experiment, workers, threads), 2, server, {})

    two = rounds(2, 1)
    for workers, threads in ((1, 1), (1, 2)):
        mine, other, ratio = median_of_ratios(two, rounds(workers, threads), repeats=2)
        print(f"FedIN round, 10 clients: 2 workers x 1 thread {mine:.1f} s, {workers} x {threads} "
              f"{other:.1f} s, speed-up {ratio:.2f}")


def share_outside_training(folder: Path) -> None:
    experiment, server = experiment_on(folder, 5000, alpha=0.5, clients=20, participation=0.25,
                                       local_epochs=2)
    spent = []

    def timed(function, *arguments):
        start = time.perf_counter()
        value = function(*arguments)
        spent.append(time.perf_counter() - start)
        return value

    method = experiment.method
    experiment = experiment._replace(method=method._replace(
        download=partial(timed, method.download),
        server_update=partial(timed, method.server_update)))
    experiment = with_workers(experiment, experiment.settings["workers"])
    shares = []
    for t in range(1, 6):
        spent.clear()
        start = time.perf_counter()
        server, memory, figures = run.train_round(experiment, t, server, {})
        timed(files.save_checkpoint, folder, files.Progress(t, server, memory, figures, {}, {}))
        timed(files.append_metrics, folder / "metrics.jsonl", {"round": t, **figures})
        whole = time.perf_counter() - start
        shares.append(sum(spent) / whole)
    print(f"FedIN round, 5 of 20 clients, 5,000 images: {whole:.1f} s; sending, aggregation, log "
          f"and checkpoint take {100 * statistics.median(shares[1:]):.1f} %")


def seconds_a_round(folder: Path) -> None:
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
            print(f"{method} on {model}: {statistics.mean(seconds[1:]):.1f} s a round")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {run.num_cores()} cores")
    torch.set_num_threads(run.num_cores())
    with tempfile.TemporaryDirectory() as name:
        starting(Path(name))
    client_update_against_bare_loop("cnn", 50, 2e-4, 1000)
    client_update_against_bare_loop("resnet18", 16, 1e-3, 320)
    with tempfile.TemporaryDirectory() as name:
        share_outside_training(Path(name))
        seconds_a_round(Path(name))
        fedin_round_by_workers(Path(name))
