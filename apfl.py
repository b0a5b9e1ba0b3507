"""AP-FL: asynchronous personalised federated learning through global memorisation.

Wan et al., Asynchronous Personalized Federated Learning through Global Memorization.  Equation and
section numbers below are this paper's.  What others call APFL (Deng et al., Adaptive Personalized
Federated Learning, arxiv.org/abs/2003.13461) is another method.

In reading order, as it happens: federated training of the global model, in rounds or with updates
that are mixed in as they arrive; after the last round memorisation (the server trains the generator
of generator.py under the clients' models), friend models (each client trains one on synthetic
samples), and decoupled interpolation of the two.

symbol       name                  what it is
theta*       server["weights"]     the global model
theta_k      server["teachers"]    client k's last upload; its owner has it too
theta_k^l    own                   of clients that never took part: the localised global model
theta_k^f    friend                its friend model
theta_k^p    personalise(...)      its personalised model
S_n, S_d                           clients that take part, and those that dropped out before round 1
"""

import heapq
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines import (Client, LabelledUpdate, Result, Stream, Update, fedavg_client_update,
                       fedavg_init, fedavg_server_update, with_class_counts)
from data import BATCHES, FRIEND_BATCHES, SYNTHETIC, ClientData
from generator import BALANCE, SemanticGenerator, class_weights, sample, train_generator
from models import State, interpolate, layerwise_average

SYNTHETIC_PER_CLASS = 600  # AP-FL Sec. 4.1
GENERATOR_STEPS = 1000  # not stated
GENERATOR_BATCH = 16  # n_s, samples a class in a step; 600 are fed in Sec. 4.1
FRIEND_EPOCHS = 20  # Sec. 4.1, "20 local training epochs"
BETA_COLOUR, BETA_GRAY = 0.01, 0.1  # beta, Sec. 4.1: CIFAR, and EMNIST and Fashion-MNIST
MIXING = 0.6  # alpha of Xie et al., Asynchronous Federated Optimization, arxiv.org/abs/1903.03934


# ------------------------------------------------------ federated training of the global model


def apfl_init(weights: dict[str, State]) -> dict:
    """The server's state: global weights, and of each client its last upload, a teacher later."""
    return {**fedavg_init(weights), "teachers": {}}


def apfl_client_update(model: nn.Module, optimizer: Optimizer, received: State, data: ClientData,
                       stream: Stream, *, local_epochs: int, batch_size: int) -> Result:
    """FedAvg's update; what is sent tells besides how many images of each class the client has."""
    result = fedavg_client_update(model, optimizer, received, data, stream,
                                  local_epochs=local_epochs, batch_size=batch_size)
    return with_class_counts(result, data)


def apfl_server_update(server: dict, updates: Mapping[int, LabelledUpdate], *,
                       aggregation=layerwise_average) -> dict:
    """FedAvg's average; each upload is kept until the client's next one."""
    server = fedavg_server_update(server, updates, aggregation=aggregation)
    uploads = {k: {"weights": update.weights, "class_counts": update.class_counts}
               for k, update in updates.items()}
    return {**server, "teachers": server["teachers"] | uploads}


def apfl_trains_late(server: dict, client: Client) -> bool:
    """A client that never took part localises the global model once, after the last round (Eq. 12).

    It does so by FedAvg's update, for as many epochs as in a round, and sends nothing.
    """
    return client.id not in server["teachers"]


# -------------------------------------------------------------------- asynchronous aggregation


def staleness_weight(staleness: int, kind: str, *, exponent: float = 0.5, slope: float = 10.0,
                     patience: int = 4) -> float:
    """s(d), what an update counts for that is d updates of the server behind; s(0) = 1.

    constant: 1;  polynomial: (d + 1)^-exponent;  hinge: 1 up to patience, then
    1 / (slope (d - patience) + 1).  Source: Xie et al., Asynchronous Federated Optimization,
    arxiv.org/abs/1903.03934, Sec. 5.2 (AP-FL gives no rule).
    """
    if kind == "polynomial":
        return (staleness + 1) ** -exponent
    if kind == "hinge" and staleness > patience:
        return 1 / (slope * (staleness - patience) + 1)
    return 1.0


def mix(weights: Mapping[str, State], uploads: Mapping[int, State],
        share: float) -> dict[str, State]:
    """(1 - share) x + share x_k: one arriving upload mixed into the global model.

    weights: the one architecture and its weights x;  uploads: the client and its weights x_k
    share: mixing x s(staleness); the client's number of images has no part in it
    """
    (arch, old), = weights.items()
    (upload,) = uploads.values()
    return {arch: interpolate(old, upload, share)}


def next_arrivals(arrivals: Mapping[int, float], durations: Mapping[int, float],
                  count: int) -> list[tuple[float, int]]:
    """The next count events (time, client) if each client starts anew as soon as it has arrived.

    arrivals: client -> the virtual time at which the work that it has begun arrives
    durations: client -> the virtual time that a piece of its work takes
    At equal times the lower id arrives first.
    """
    queue = [(time, k) for k, time in arrivals.items()]
    heapq.heapify(queue)
    events = []
    for _ in range(count):
        time, k = queue[0]
        events.append((time, k))
        heapq.heapreplace(queue, (time + durations[k], k))
    return events


# ---------------------------------------------------------------------------------- memorisation


def apfl_memorise(server: dict, generator: SemanticGenerator, build: Callable[[State], nn.Module],
                  rng: torch.Generator, *, generator_steps: int, generator_batch: int,
                  balance: float = BALANCE, teacher: str = "clients", of_all: bool = False,
                  per_pixel: bool = False) -> Iterator[tuple[float, float]]:
    """Train the generator under the clients' models (Eq. 6-9); yields its two losses by step.

    build: makes a network of weights
    teacher: "clients", the last uploads of those that took part (S_n, Eq. 6 and 7), or "global",
        the global model (Abstract), for every class that one of them holds
    of_all, per_pixel: see generator.class_weights and generator.diversity_loss
    """
    uploads = [server["teachers"][k] for k in sorted(server["teachers"])]
    states = [upload["weights"] for upload in uploads]
    counts = torch.stack([upload["class_counts"] for upload in uploads])
    if teacher == "global":
        states, counts = list(server["weights"].values()), counts.sum(dim=0, keepdim=True)
    return train_generator(generator, [build(state) for state in states],
                           class_weights(counts, of_all=of_all), rng,
                           generator_steps=generator_steps, generator_batch=generator_batch,
                           balance=balance, per_pixel=per_pixel)


# --------------------------------------------------------------------------------- friend models


def friend_label_shares(labels: Tensor, num_classes: int, friend_labels: str) -> Tensor:
    """What share of the synthetic samples each class gets, (classes,).

    labels: the client's own training labels
    friend_labels: "local", the client's distribution P_k (Sec. 3.2), or "all", every class alike
    """
    if friend_labels == "all":
        return torch.full((num_classes,), 1 / num_classes)
    return labels.bincount(minlength=num_classes) / len(labels)


def apfl_friend_update(model: nn.Module, optimizer: Optimizer,
                       received: tuple[State, SemanticGenerator], data: ClientData, stream: Stream,
                       *, friend_epochs: int, batch_size: int,
                       synthetic_per_class: int = SYNTHETIC_PER_CLASS,
                       friend_labels: str = "local") -> Result:
    """Train the global model on synthetic samples alone: the friend model, which stays here.

    received: global weights and the generator
    synthetic_per_class: on average over all classes; how they are divided among the classes,
        friend_labels says
    Of the client's own data only the labels are read.
    """
    weights, generator = received
    num_classes = len(generator.semantics)
    own_labels = data.labels[data.indices]
    shares = friend_label_shares(own_labels, num_classes, friend_labels)
    rng = stream(SYNTHETIC)
    y = torch.multinomial(shares.cpu(), synthetic_per_class * num_classes, replacement=True,
                          generator=rng).to(own_labels.device)
    synthetic = ClientData(sample(generator, y, rng), y, torch.arange(len(y), device=y.device),
                           prepare=lambda x: x)
    streams = {BATCHES: FRIEND_BATCHES}
    result = fedavg_client_update(model, optimizer, weights, synthetic,
                                  lambda purpose: stream(streams[purpose]),
                                  local_epochs=friend_epochs, batch_size=batch_size)
    return result._replace(update=Update({}, 0), kept=result.update.weights)


# ----------------------------------------------------------------------- decoupled interpolation


def personalise(own: State, friend: State, *, beta: float, beta_on: str = "client") -> State:
    """theta_k^p = beta theta_k + (1 - beta) theta_k^f, Eq. 10 and 12.

    own: theta_k, or for a client that never took part theta_k^l
    beta_on: "client", the equation as printed, or "friend", as the sentence below it has it: beta
        is the weight of the friend model
    """
    start, end = (friend, own) if beta_on == "client" else (own, friend)
    return interpolate(start, end, beta)
