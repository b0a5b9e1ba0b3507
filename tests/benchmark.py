"""How fast the code is, as ratios measured alternately in one run (not collected by pytest).

    python -m tests.benchmark

1. FedAvg's client update against a bare PyTorch loop that does the same steps, images a second.
2. A FedIN round with two workers against one.
3. What a round spends outside training and evaluation.
4. Seconds of a round of every method, on colour images at the scale of the README's tables.
Images are random: no time depends on their content.
"""

import statistics
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


def experiment_on(folder: Path, images: int, **typed) -> tuple[run.Experiment, dict]:
    """An experiment on random colour images, and the first state of its server."""
    rng = np.random.default_rng(0)
    path = folder / f"{images}.npz"
    np.savez(path, x_train=rng.integers(256, size=(images, 32, 32, 3), dtype=np.uint8),
             y_train=np.arange(images) % 10, y_test=np.arange(10),
             x_test=rng.integers(256, size=(10, 32, 32, 3), dtype=np.uint8))
    experiment = run.prepare_experiment(run.resolve(
        {"dataset": str(path), "setting": "fedin", "method": "fedin"} | typed))
    archs = experiment.architectures
    if run.is_cut_by_width(experiment.settings):
        archs = archs[-1:]
    weights = models.initial_weights(archs, 3, 10, torch.Generator(), torch.device("cpu"))
    return experiment, experiment.method.init(weights)


def fedin_round_by_workers(folder: Path) -> None:
    experiment, server = experiment_on(folder, 4500, partition="iid", clients=10, participation=1.0,
                                       local_epochs=1)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        server, _, _ = run.train_round(experiment, pool, 1, server, {})  # so that features travel

    def one_round(pool, free):
        run.train_round(experiment._replace(free=free), pool, 2, server, {})

    def rounds(workers, threads):
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))
        return partial(one_round, pool, {arch: [] for arch in models.RESNET_BLOCKS})

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
    pool = ThreadPoolExecutor(experiment.settings["workers"], initializer=torch.set_num_threads,
                              initargs=(1,))
    shares = []
    for t in range(1, 6):
        spent.clear()
        start = time.perf_counter()
        server, memory, figures = run.train_round(experiment, pool, t, server, {})
        timed(run.save_checkpoint, folder, run.Progress(t, server, memory, figures, {}, {}))
        timed(run.append_metrics, folder / "metrics.jsonl", {"round": t, **figures})
        whole = time.perf_counter() - start
        shares.append(sum(spent) / whole)
    print(f"FedIN round, 5 of 20 clients, 5,000 images: {whole:.1f} s; sending, aggregation, log "
          f"and checkpoint take {100 * statistics.median(shares[1:]):.1f} %")


def seconds_a_round(folder: Path) -> None:
    """The second and third round of every method: 5 of 20 clients, 5,000 images, 2 epochs."""
    choices = {"resnets": ("local", "fedavg", "fedprox", "scaffold", "fednova", "moon",
                           "inclusivefl", "inco", "fedin"),
               "resnet18-widths": run.WIDTH_METHODS, "cnn": ("fedavg", "fedgen", "feddf")}
    for model, methods in choices.items():
        for method in methods:
            # As many again are for the server of FedDF to hold.
            experiment, server = experiment_on(
                folder, 10_000, train_images=5000, alpha=0.5, clients=20, participation=0.25,
                local_epochs=2, method=method, model=model)
            pool = ThreadPoolExecutor(experiment.settings["workers"],
                                      initializer=torch.set_num_threads, initargs=(1,))
            memory, seconds = {}, []
            for t in (1, 2, 3):
                start = time.perf_counter()
                server, memory, figures = run.train_round(experiment, pool, t, server, memory)
                seconds.append(time.perf_counter() - start)
            print(f"{method} on {model}: {statistics.mean(seconds[1:]):.1f} s a round")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {run.num_cores()} cores")
    torch.set_num_threads(run.num_cores())
    client_update_against_bare_loop("cnn", 50, 2e-4, 1000)
    client_update_against_bare_loop("resnet18", 16, 1e-3, 320)
    with tempfile.TemporaryDirectory() as name:
        share_outside_training(Path(name))
        seconds_a_round(Path(name))
        fedin_round_by_workers(Path(name))
