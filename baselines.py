"""FedAvg and the methods that the two papers compare with, one section each.

A method is a few functions.  Each takes and returns plain values:

    <m>_init(weights) -> server                      what the server keeps, before round 1
    <m>_download(server, client, stream) -> received what a client receives
    <m>_client_update(model, optimizer, received, data, stream[, kept], *, ...) -> Result
    <m>_server_update(server, updates, *, ...) -> server
    <m>_deploy(server, client, kept) -> (key, weights)  the model a client uses; equal keys, equal
                                                     models
    <m>_initial_memory(server, client) -> kept       only where something stays on the device: what
                                                     it holds before its first round
    <m>_trains_late(server, client) -> bool          only where clients train on the final global
                                                     model: whether this one does

Three values are kept apart: what crosses the network (received and Result.update; the bytes of
their tensors are the traffic), what stays on a device between rounds (kept), and what the server
keeps (server, a dict of dicts, tensors and numbers).  `model` and `optimizer` are scratch: any
content is overwritten, and no other argument is changed.  stream(purpose) is the random stream of
this round and client.  A method's section holds only what differs from FedAvg.

FedAvg   McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data,
         AISTATS 2017, arxiv.org/abs/1602.05629
FedProx  Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020,
         arxiv.org/abs/1812.06127
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from data import BATCHES, ClientData, batches
from models import State, copy_state, layerwise_average

FEDPROX_MU = 0.1  # mu; FedIN prints mu/2 = 0.05 for FedProx and for itself (Sec. 5.1)
FEDPROX_MU_APFL = 0.01  # mu in AP-FL's setting, where the paper gives none

Stream = Callable[[int], torch.Generator]


class Client(NamedTuple):
    """A client is its id, its training images and its architecture."""

    id: int
    indices: Tensor  # (n_k,) int64, into the training images
    arch: str


class Update(NamedTuple):
    """What a client sends to the server."""

    weights: State
    num_samples: int  # n_k, its number of training images


class Result(NamedTuple):
    """What a client update returns: what is sent, what stays, and figures for the log."""

    update: Any
    loss: float  # training cross entropy, summed over samples
    samples: int  # training images processed
    kept: Any = None  # a stateful method's memory of this client


# ------------------------------------------------------------------------------------------- FedAvg


def reset(model: nn.Module, optimizer: Optimizer, weights: State) -> None:
    """Load weights into the scratch model, in training mode, and make the optimiser as if new.

    Zeroing the optimiser's state is the same as a new one, for Adam as for SGD, and saves the
    allocation of twice the model's size for every client.
    """
    model.load_state_dict(weights)
    model.train()
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def fedavg_init(weights: dict[str, State]) -> dict:
    """The server's state: the global weights by architecture."""
    return {"weights": weights}


def fedavg_download(server: dict, client: Client, stream: Stream) -> State:
    """The global weights of the client's architecture (nothing is drawn)."""
    return server["weights"][client.arch]


def fedavg_client_update(model: nn.Module, optimizer: Optimizer, received: State,
                         data: ClientData, stream: Stream, *, local_epochs: int,
                         batch_size: int) -> Result:
    """Train the received weights on the client's images for local_epochs epochs."""
    reset(model, optimizer, received)
    loss_sum, samples = 0.0, 0
    for x, y in batches(data, batch_size, local_epochs, stream(BATCHES)):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum, samples = loss_sum + loss.detach() * len(y), samples + len(y)
    update = Update(copy_state(model), len(data.indices))
    return Result(update, float(loss_sum), samples)


def fedavg_server_update(server: dict, updates: Mapping[int, Update], *,
                         aggregation: Callable = layerwise_average, uniform: bool = False) -> dict:
    """Replace the global weights by the average of the uploads, weighted by n_k.

    aggregation: models.layerwise_average or models.per_architecture_average
    """
    weights = aggregation(server["weights"],
                          {k: update.weights for k, update in updates.items()},
                          {k: update.num_samples for k, update in updates.items()}, uniform=uniform)
    return {**server, "weights": weights}


def fedavg_deploy(server: dict, client: Client, kept: None) -> tuple[str, State]:
    """A client uses the global model of its architecture."""
    return client.arch, server["weights"][client.arch]


# ------------------------------------------------------------------------------------------ FedProx


def fedprox_client_update(model: nn.Module, optimizer: Optimizer, received: State,
                          data: ClientData, stream: Stream, *, local_epochs: int, batch_size: int,
                          mu: float = FEDPROX_MU) -> Result:
    """FedAvg's update with the proximal term (mu/2) ||w - w_received||^2 added to the loss."""
    reset(model, optimizer, received)
    loss_sum, samples = 0.0, 0
    for x, y in batches(data, batch_size, local_epochs, stream(BATCHES)):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        add_proximal_gradient(model, received, mu)
        optimizer.step()
        loss_sum, samples = loss_sum + loss.detach() * len(y), samples + len(y)
    update = Update(copy_state(model), len(data.indices))
    return Result(update, float(loss_sum), samples)


@torch.no_grad()
def add_proximal_gradient(model: nn.Module, reference: State, mu: float) -> None:
    """Add mu (w - w_reference), the gradient of (mu/2) ||w - w_reference||^2, to every gradient.

    Over the parameters alone: buffers of batch normalisation are not part of the term.
    Written out because autograd would pass over all weights several times more.
    """
    if mu == 0:
        return
    for name, parameter in model.named_parameters():
        parameter.grad.add_(parameter - reference[name], alpha=mu)


# --------------------------------------------------------------------------------------- FedAvg-FT


def fedavg_ft_trains_late(server: dict, client: Client) -> bool:
    """Every client fine-tunes the final global model once (AP-FL, Sec. 4.1, for dropout clients).

    It does so by FedAvg's update, for as many epochs as in a round, and keeps what comes out.
    """
    return True


# -------------------------------------------------------------------------------------------- Local


def local_initial_memory(server: dict, client: Client) -> State:
    """Before its first round a client holds the initial weights."""
    return server["weights"][client.arch]


def local_download(server: dict, client: Client, stream: Stream) -> State:
    """Nothing is sent."""
    return {}


def local_client_update(model: nn.Module, optimizer: Optimizer, received: State,
                        data: ClientData, stream: Stream, kept: State, *, local_epochs: int,
                        batch_size: int) -> Result:
    """Go on training the client's own model, and keep it; nothing is sent."""
    result = fedavg_client_update(model, optimizer, kept, data, stream,
                                  local_epochs=local_epochs, batch_size=batch_size)
    nothing = Update({}, len(data.indices))
    return result._replace(update=nothing, kept=result.update.weights)


def local_server_update(server: dict, updates: Mapping[int, Update]) -> dict:
    """The server learns nothing."""
    return server


def local_deploy(server: dict, client: Client, kept: State | None) -> tuple[str | int, State]:
    """A client uses its own model, or the initial weights as long as it has not trained."""
    if kept is None:
        return client.arch, server["weights"][client.arch]
    return client.id, kept
