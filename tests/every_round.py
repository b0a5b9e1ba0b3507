"""A reading of AP-FL: synthetic images in every round (not collected by pytest).

    python -m tests.every_round [FLAG VALUE ...] > results/every_round.csv

AP-FL's synthetic samples "aid in the continuous training of client models even when clients are
temporarily offline" (Sec. 2).  In this reading the server trains the generator further after every
round, and from round 2 on each client trains on its own images and on PER_CLASS synthetic ones of
every class, and so makes more steps than FedAvg's.  A control makes as many: it draws as many of
the client's own images again in place of synthetic ones.  Sec. 3.2 itself mixes no real images with
synthetic ones.  The flags are run.py's for AP-FL.  Prints CSV: accuracy of the global model after
each round, of FedAvg, the control and the reading; there are no friend models.
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import apfl
import files
import run
from baselines import SYNCHRONOUS, fedavg_client_update, with_class_counts
from data import GENERATOR_NOISE, GENERATOR_WEIGHTS, SYNTHETIC, ClientData, Stream
from federation import Client, Result, Update
from generator import NOISE_DIM, initial_generator, load_generator, sample, train_generator
from models import State, copy_state
from tests.curves import lines_of, write_csv

STEPS, BATCH = 30, 10  # the generator's steps per round, and samples per class in a step
PER_CLASS = 100
CONTROL, READING = "own images again in every round", "synthetic in every round"


def download(server: dict, client: Client, stream: Stream) -> tuple[State, State]:
    """Send the global weights and the generator, which is empty before round 2."""
    return server["weights"][client.arch], server.get("generator", {})


def synthetic(x: Tensor, y: Tensor, memory: State, stream: Stream) -> tuple[Tensor, Tensor]:
    """PER_CLASS images of every class from the generator, with their labels."""
    net = load_generator(memory, x.shape[1], NOISE_DIM)
    labels = torch.arange(len(net.semantics), device=y.device).repeat_interleave(PER_CLASS)
    return sample(net, labels, stream(SYNTHETIC)), labels


def own_again(x: Tensor, y: Tensor, memory: State, stream: Stream) -> tuple[Tensor, Tensor]:
    """As many of the client's own images, drawn with replacement."""
    count = len(memory["semantics"]) * PER_CLASS
    rows = torch.randint(len(y), (count,), generator=stream(SYNTHETIC)).to(y.device)
    return x[rows], y[rows]


def client_update(model: nn.Module, optimizer: Optimizer, received: tuple[State, State],
                  data: ClientData, stream: Stream, *, local_epochs: int, batch_size: int,
                  more: Callable = synthetic) -> Result:
    """FedAvg's update on the client's own images and on those that more() gives."""
    weights, memory = received
    x, y = data.prepare(data.images[data.indices]), data.labels[data.indices]
    if memory:
        x, y = map(torch.cat, zip((x, y), more(x, y, memory, stream)))
    both = ClientData(x, y, torch.arange(len(y), device=y.device), prepare=lambda part: part)
    result = fedavg_client_update(model, optimizer, weights, both, stream,
                                  local_epochs=local_epochs, batch_size=batch_size)
    update = result.update._replace(num_samples=len(data.indices))  # own images count alone
    return with_class_counts(result._replace(update=update), data)


def train_further(server: dict, updates: Mapping[int, Update], network: Callable,
                  stream: Stream) -> dict:
    """Train the generator, with a new optimiser, under the new global model (Eq. 6-9)."""
    ((arch, weights),), (_, alpha) = server["weights"].items(), apfl.teachers_of(server, "global")
    channels = next(iter(weights.values())).shape[1]  # colours
    if "generator" in server:
        net = load_generator(server["generator"], channels, NOISE_DIM)
    else:
        net = initial_generator(server["semantics"].cpu(), channels, NOISE_DIM,
                                stream(GENERATOR_WEIGHTS)).to(alpha.device)
    train_generator(net, [network(arch, weights)], alpha, stream(GENERATOR_NOISE),
                    generator_steps=STEPS, generator_batch=BATCH)
    return {**server, "generator": copy_state(net)}


def rows(flags: list[str]) -> Iterator[list]:
    """Lines of the CSV."""
    if "--augment" in flags:
        sys.exit("error: --augment is not for this check, whose images are prepared once")
    apfls, typed = run.METHODS["apfl"], run.read_command_line(flags)
    of_both = {name: value for name, value in typed.items()
               if name not in ("semantics", "word_vectors")}
    row = apfls._replace(
        download=download, client_update=client_update, distil=train_further, finish=None,
        averages=SYNCHRONOUS, defaults={name: apfls.defaults[name] for name in (
            "aggregation", "setting", "semantics", "word_vectors")})
    methods = {READING: row, CONTROL: row._replace(
        client_update=partial(client_update, more=own_again))}
    command = shlex.join(["python", "-m", "tests.every_round", *flags])
    for method, settings in (("fedavg", of_both), (CONTROL, typed), (READING, typed)):
        words = run.command_line(settings | {"method": method, "setting": "apfl"})
        with patch.dict(run.METHODS, methods):
            for line in lines_of(words):
                yield [command, files.commit(), files.machine(), method, STEPS, PER_CLASS,
                       line["round"], line["accuracy"]]


if __name__ == "__main__":
    write_csv(["command", "commit", "machine", "method", "generator's steps per round",
               "synthetic images per class", "round", "accuracy"], rows(sys.argv[1:]))
