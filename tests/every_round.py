"""AP-FL read otherwise: synthetic images in every round, beside FedAvg (not collected by pytest).

    python -m tests.every_round --semantics FILE [FLAG VALUE ...] > results/every_round.csv

AP-FL's Sec. 2 has synthetic samples "aid in the continuous training of client models".  Here the
server trains the generator further after every round, and from the second round on each client
trains on its own images and on as many synthetic ones of every class.  The flags are run.py's.
Prints CSV: accuracy of the global model in each round, FedAvg's and this reading's.
"""

import csv
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import nn
from torch.optim import Optimizer

import apfl
import files
import run
from baselines import fedavg_client_update, with_class_counts
from data import GENERATOR_NOISE, GENERATOR_WEIGHTS, SYNTHETIC, ClientData, Stream
from federation import Client, Result, Update
from generator import NOISE_DIM, initial_generator, load_generator, sample, train_generator
from models import State, copy_state

STEPS, BATCH = 30, 10  # the generator's steps per round, and samples per class in a step
PER_CLASS = 100  # synthetic images of each class that a client trains on


def download(server: dict, client: Client, stream: Stream) -> tuple[State, State]:
    """Send the global weights and the generator, which is empty before round 2."""
    return server["weights"][client.arch], server.get("generator", {})


def client_update(model: nn.Module, optimizer: Optimizer, received: tuple[State, State],
                  data: ClientData, stream: Stream, *, local_epochs: int,
                  batch_size: int) -> Result:
    """FedAvg's update on the client's own images and on synthetic ones."""
    weights, memory = received
    x, y = data.prepare(data.images[data.indices]), data.labels[data.indices]
    if memory:
        net = load_generator(memory, x.shape[1], NOISE_DIM)
        labels = torch.arange(len(net.semantics), device=y.device).repeat_interleave(PER_CLASS)
        x, y = torch.cat([x, sample(net, labels, stream(SYNTHETIC))]), torch.cat([y, labels])
    both = ClientData(x, y, torch.arange(len(y), device=y.device), prepare=lambda part: part)
    result = fedavg_client_update(model, optimizer, weights, both, stream,
                                  local_epochs=local_epochs, batch_size=batch_size)
    update = result.update._replace(num_samples=len(data.indices))  # own images count alone
    return with_class_counts(result._replace(update=update), data)


def train_further(server: dict, updates: Mapping[int, Update], network: Callable,
                  stream: Stream) -> dict:
    """Train the generator under the new global model's supervision (Eq. 6-9)."""
    ((arch, weights),), (_, alpha) = server["weights"].items(), apfl.teachers_of(server, "global")
    channels = next(iter(weights.values())).shape[1]  # colours
    net = (load_generator(server["generator"], channels, NOISE_DIM) if "generator" in server else
           initial_generator(server["semantics"], channels, NOISE_DIM, stream(GENERATOR_WEIGHTS)))
    train_generator(net, [network(arch, weights)], alpha, stream(GENERATOR_NOISE),
                    generator_steps=STEPS, generator_batch=BATCH)
    return {**server, "generator": copy_state(net)}


def main(flags: list[str]) -> None:
    """Run both, and print a line for each round of each."""
    apfls = run.METHODS["apfl"]
    row = apfls._replace(download=download, client_update=client_update, distil=train_further,
                         finish=None, averages=run.METHODS["fedprox"].averages,
                         defaults={name: apfls.defaults[name] for name in (
                             "aggregation", "setting", "semantics", "word_vectors")})
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["command", "commit", "machine", "method", "round", "accuracy"])
    command = " ".join(["python -m tests.every_round", *flags])
    at = flags.index("--semantics")
    for method, words in (("fedavg", [*flags[:at], *flags[at + 2:]]),
                          ("synthetic in every round", flags)):
        with (TemporaryDirectory() as folder, patch("sys.stdout", sys.stderr),
              patch.dict(run.METHODS, {"synthetic in every round": row})):
            status = run.main(["--method", method, "--setting", "apfl", *words,
                               "--out", folder + "/run"])
            if status != 0:
                sys.exit(status)
            lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        for line in map(json.loads, lines):
            writer.writerow([command, files.commit(), files.machine(), method, line["round"],
                             line["accuracy"]])
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
