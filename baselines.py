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
    <m>_assign(client, architectures, stream) -> client  only where a client has another
                                                     architecture in every round
    <m>_distil(server, updates, build, stream, *, ...) -> server  only where the server trains, after
                                                     its update of every round
    <m>_trains_late(server, client) -> bool          only where clients train on the final global
                                                     model: whether this one does

Three values are kept apart: what crosses the network (received and Result.update; the bytes of
their tensors are the traffic), what stays on a device between rounds (kept), and what the server
keeps (server, a dict of dicts, tensors and numbers).  `model` and `optimizer` are scratch: any
content is overwritten, and no other argument is changed.  stream(purpose) is the random stream of
this round and client, or of this round and the server.  A method's section holds only what differs
from FedAvg.  InCo's code is github.com/ChanYunHin/InCo-Aggregation.

FedAvg       McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
             Data, AISTATS 2017, arxiv.org/abs/1602.05629
FedProx      Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020,
             arxiv.org/abs/1812.06127
SCAFFOLD     Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning,
             ICML 2020, arxiv.org/abs/1910.06378
FedNova      Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated
             Optimization, NeurIPS 2020, arxiv.org/abs/2007.07481
MOON         Li et al., Model-Contrastive Federated Learning, CVPR 2021, arxiv.org/abs/2103.16257
InCo         Chan et al., Internal Cross-layer Gradients for Extending Homogeneity to Heterogeneity
             in Federated Learning, ICLR 2024, arxiv.org/abs/2308.11464
InclusiveFL  Liu et al., No One Left Behind: Inclusive Federated Learning over Heterogeneous
             Devices, KDD 2022, arxiv.org/abs/2202.08036
HeteroFL     Diao et al., HeteroFL: Computation and Communication Efficient Federated Learning for
             Heterogeneous Clients, ICLR 2021, arxiv.org/abs/2010.01264
FedRolex     Alam et al., FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model
             Extraction, NeurIPS 2022, arxiv.org/abs/2212.01548
ScaleFL      Ilhan et al., ScaleFL: Resource-Adaptive Federated Learning with Heterogeneous Clients,
             CVPR 2023
FedGen       Zhu et al., Data-Free Knowledge Distillation for Heterogeneous Federated Learning,
             ICML 2021, arxiv.org/abs/2105.10056
FedDF        Lin et al., Ensemble Distillation for Robust Model Fusion in Federated Learning,
             NeurIPS 2020, arxiv.org/abs/2006.07242
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from data import BATCHES, ClientData, batches, samples_per_epoch
from models import (State, architecture_of, average, block_of, copy_state, interpolate, is_parameter,
                    layerwise_average, per_architecture_average, representation)

FEDPROX_MU = 0.1  # mu; FedIN prints mu/2 = 0.05 for FedProx and for itself (Sec. 5.1)
FEDPROX_MU_APFL = 0.01  # mu in AP-FL's setting, where the paper gives none
MOON_MU = 1.0  # mu; MOON tunes it per data set: 5, 10 or 1
MOON_TEMPERATURE = 0.5  # tau
INCO_STEP_LIMIT = 5.0  # of theta, in the released code of InCo
INCO_UPDATE_LIMIT = 0.1  # of an entry of the combined update, likewise
INCLUSIVE_MOMENTUM = 0.2  # beta of InclusiveFL's released code

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
                         aggregation: Callable = layerwise_average, uniform: bool = False,
                         rule: Callable = average) -> dict:
    """Replace the global weights by the average of the uploads, weighted by n_k.

    aggregation: models.layerwise_average or models.per_architecture_average
    uniform: see models.average
    rule: what makes new weights of old ones and uploads, if not average itself
    """
    weights = aggregation(server["weights"],
                          {k: update.weights for k, update in updates.items()},
                          {k: update.num_samples for k, update in updates.items()},
                          uniform=uniform, rule=rule)
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


# ----------------------------------------------------------------------------------------- SCAFFOLD


class Scaffolded(NamedTuple):
    """What the server sends to a client."""

    weights: State
    variate: State  # c, of the parameters


class ScaffoldUpdate(NamedTuple):
    """What a client sends to the server."""

    weights: State
    num_samples: int  # n_k
    change: State  # c_k+ - c_k


def scaffold_init(weights: dict[str, State]) -> dict:
    """Global weights, and the server's control variate c of every parameter, zero at first."""
    zeros = {name: torch.zeros_like(tensor) for state in weights.values()
             for name, tensor in state.items() if is_parameter(name)}
    return {**fedavg_init(weights), "variates": {
        arch: {name: zeros[name] for name in state if name in zeros}
        for arch, state in weights.items()}}


def scaffold_initial_memory(server: dict, client: Client) -> State:
    """Before its first round a client's control variate c_k is zero."""
    return {name: torch.zeros_like(c) for name, c in server["variates"][client.arch].items()}


def scaffold_download(server: dict, client: Client, stream: Stream) -> Scaffolded:
    """Global weights x and control variate c."""
    return Scaffolded(server["weights"][client.arch], server["variates"][client.arch])


def scaffold_client_update(model: nn.Module, optimizer: Optimizer, received: Scaffolded,
                           data: ClientData, stream: Stream, kept: State, *, local_epochs: int,
                           batch_size: int) -> Result:
    """Training with every step corrected by c - c_k (Algorithm 1, lines 7-14, option II).

    kept: c_k.  The correction is a step of its own, lr (c - c_k), after the optimiser's.  With SGD
    that is the paper's y <- y - lr (g + c - c_k).  With Adam, whose steps do not have the scale of
    the gradient, variates are in units of its steps: (x - y) / (tau lr) is their mean direction.
    """
    reset(model, optimizer, received.weights)
    lr = optimizer.param_groups[0]["lr"]
    correction = {name: c - kept[name] for name, c in received.variate.items()}
    loss_sum, samples, steps = 0.0, 0, 0
    for x, y in batches(data, batch_size, local_epochs, stream(BATCHES)):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(correction[name], alpha=lr)
        loss_sum, samples, steps = loss_sum + loss.detach() * len(y), samples + len(y), steps + 1
    weights = copy_state(model)
    change = {name: (received.weights[name] - weights[name]) / (max(steps, 1) * lr) - c
              for name, c in received.variate.items()}  # c_k+ = c_k - c + (x - y) / (tau lr)
    if steps == 0:
        change = {name: torch.zeros_like(c) for name, c in kept.items()}
    return Result(ScaffoldUpdate(weights, len(data.indices), change), float(loss_sum), samples,
                  kept={name: kept[name] + change[name] for name in kept})


def scaffold_server_update(server: dict, updates: Mapping[int, ScaffoldUpdate], *,
                           num_clients: int, aggregation: Callable = layerwise_average,
                           uniform: bool = False, server_lr: float = 1.0) -> dict:
    """x <- x + server_lr mean(y - x);  c <- c + (sum of changes) / N (Algorithm 1, lines 16-17).

    N is the number of clients that own the layer, drawn or not.  So c stays the mean of the c_k
    over its owners, which with all clients for N would fail for layers that not all have.
    """
    def step(old: State, uploads: Mapping, counts: Mapping, *, uniform: bool) -> State:
        mean = average(old, uploads, counts, uniform=uniform)
        return mean if server_lr == 1 else interpolate(old, mean, server_lr)

    def add_mean(old: State, changes: Mapping, counts: Mapping, *, uniform: bool) -> State:
        zeros = {name: torch.zeros_like(c) for name, c in old.items()}
        change = average(zeros, changes, counts, uniform=uniform)
        return {name: c + change[name] for name, c in old.items()}

    zero = torch.zeros(())  # what every variate of a client that was not drawn changes by
    architectures = list(server["variates"])
    changes = {k: updates[k].change if k in updates else dict.fromkeys(
        server["variates"][architecture_of(k, num_clients, architectures)], zero)
        for k in range(num_clients)}
    server = fedavg_server_update(server, updates, aggregation=aggregation, uniform=uniform,
                                  rule=step)
    return {**server, "variates": aggregation(server["variates"], changes, {}, uniform=True,
                                              rule=add_mean)}


# ------------------------------------------------------------------------------------------ FedNova


class NovaUpdate(NamedTuple):
    """What a client sends to the server."""

    weights: State
    num_samples: int  # n_k
    norm: float  # a_k


def accumulated_norm(steps: int, momentum: float = 0.0) -> float:
    """a_k = ||a||_1: how many gradients' worth of movement so many local steps add up to.

    Plain SGD: steps.  With momentum rho a gradient goes on acting in later steps:
    (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho).  Adam has no such closed form; steps serve.
    """
    echo = momentum * (1 - momentum**steps) / (1 - momentum)
    return (steps - echo) / (1 - momentum)


def fednova_client_update(model: nn.Module, optimizer: Optimizer, received: State,
                          data: ClientData, stream: Stream, *, local_epochs: int,
                          batch_size: int) -> Result:
    """FedAvg's update; what is sent tells besides how far so many steps go."""
    result = fedavg_client_update(model, optimizer, received, data, stream,
                                  local_epochs=local_epochs, batch_size=batch_size)
    steps = local_epochs * math.ceil(samples_per_epoch(len(data.indices), batch_size) / batch_size)
    norm = accumulated_norm(steps, optimizer.defaults.get("momentum", 0.0))
    return result._replace(update=NovaUpdate(*result.update, norm))


def normalised_average(old: State, uploads: Mapping[int, State], counts: Mapping[int, int], *,
                       norms: Mapping[int, float], uniform: bool = False) -> State:
    """x - tau_eff sum_k p_k d_k,  d_k = (x - y_k) / a_k,  tau_eff = sum_k p_k a_k.

    p_k = n_k / sum n_k, over the clients that hold the layer; a_k is norms[k], above 0.  Computed
    as the mean of x + (tau_eff / a_k) (y_k - x), where clients would be had all gone equally far:
    the same, and with equal a_k FedAvg bit for bit.  Buffers are averaged as they are.
    """
    one = torch.ones((), dtype=torch.float64)
    effective = average(dict.fromkeys(old, one), {k: dict.fromkeys(sent, norms[k] * one)
                                                  for k, sent in uploads.items()},
                        counts, uniform=uniform)
    rescaled = {k: {name: torch.lerp(old[name].double(), y.double(),
                                     float(effective[name]) / norms[k]).to(y.dtype)
                    if is_parameter(name) else y for name, y in sent.items()}
                for k, sent in uploads.items()}
    return average(old, rescaled, counts, uniform=uniform)


def fednova_server_update(server: dict, updates: Mapping[int, NovaUpdate], *,
                          aggregation: Callable = layerwise_average,
                          uniform: bool = False) -> dict:
    """FedAvg's average of directions that no longer depend on how many steps a client made."""
    norms = {k: update.norm for k, update in updates.items()}
    return fedavg_server_update(server, updates, aggregation=aggregation, uniform=uniform,
                                rule=partial(normalised_average, norms=norms))


# --------------------------------------------------------------------------------------------- MOON


def frozen_copy(model: nn.Module, weights: State) -> nn.Module:
    """A network like model, in evaluation mode, with other weights that do not learn."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    frozen.load_state_dict(weights)
    return frozen


def contrastive_loss(z: Tensor, z_global: Tensor, z_previous: Tensor, temperature: float) -> Tensor:
    """-log(e^(s_g / tau) / (e^(s_g / tau) + e^(s_p / tau))), mean over samples (MOON's l_con).

    s_g, s_p: cosine similarity of z to z_global and z_previous, all (B, width); tau: temperature
    Near to the global model's representation is good, near to that of the client's own last is bad.
    """
    similarities = torch.stack([F.cosine_similarity(z, z_global), F.cosine_similarity(z, z_previous)])
    return -F.log_softmax(similarities / temperature, dim=0)[0].mean()


def moon_initial_memory(server: dict, client: Client) -> State:
    """Before its first round the global model is a client's last: l_con is log 2, without gradient.
    """
    return server["weights"][client.arch]


def moon_client_update(model: nn.Module, optimizer: Optimizer, received: State, data: ClientData,
                       stream: Stream, kept: State, *, local_epochs: int, batch_size: int,
                       mu: float = MOON_MU, temperature: float = MOON_TEMPERATURE) -> Result:
    """Minimise cross entropy + mu l_con (Algorithm 1); keep the model that comes out.

    kept: the client's model after its last round
    A representation is what the last layer receives, or that of a projection head before it, if the
    network has one (models.classifier_layers).
    """
    reset(model, optimizer, received)
    global_model, previous_model = frozen_copy(model, received), frozen_copy(model, kept)
    loss_sum, samples = 0.0, 0
    for x, y in batches(data, batch_size, local_epochs, stream(BATCHES)):
        z = representation(model, x)
        with torch.no_grad():
            z_global, z_previous = representation(global_model, x), representation(previous_model, x)
        loss = F.cross_entropy(model.classifier[-1](z), y)
        optimizer.zero_grad()
        (loss + mu * contrastive_loss(z, z_global, z_previous, temperature)).backward()
        optimizer.step()
        loss_sum, samples = loss_sum + loss.detach() * len(y), samples + len(y)
    weights = copy_state(model)
    return Result(Update(weights, len(data.indices)), float(loss_sum), samples, kept=weights)


# --------------------------------------------------------------------------------------------- InCo


def cross_layer_update(update: Tensor, reference: Tensor, *, step_limit: float = INCO_STEP_LIMIT,
                       limit: float = INCO_UPDATE_LIMIT) -> Tensor:
    """A layer's aggregated update combined, kernel by kernel, with that of an earlier layer.

    g' = (g / |g| + theta g0 / |g0|) (|g| + |g0|) / 2, cut off at +-limit, with
    theta = |<g, g0>| / <g0, g0>, at most step_limit
    update, reference: g and g0, both (out, in, 3, 3); norms and products are of a 3x3 kernel
    As in InCo's code, which takes the absolute value where its convex problem would project.
    """
    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(2, 3), keepdim=True)

    norm, reference_norm = product(update, update).sqrt(), product(reference, reference).sqrt()
    theta = product(update, reference).abs() / (product(reference, reference) + 1e-7)
    direction = (update / (norm + 1e-7)
                 + theta.clamp(max=step_limit) * reference / (reference_norm + 1e-7))
    return (direction * (norm + reference_norm) / 2).clamp(-limit, limit)


def cross_layer_average(old: State, uploads: Mapping[int, State], counts: Mapping[int, int], *,
                        uniform: bool = False) -> State:
    """FedAvg's average, whose change of deeper convolutions is combined with that of a first one.

    In every stage of a ResNet the second convolution of block 0 is the reference of both
    convolutions of all later blocks, which have its shape.  All other weights are FedAvg's.
    """
    mean = average(old, uploads, counts, uniform=uniform)
    new = dict(mean)
    for name in old:
        stage, block, rest = block_of(name) or ("", 0, "")
        if block > 0 and rest in ("conv1.weight", "conv2.weight"):
            first = f"{stage}.0.conv2.weight"
            new[name] = old[name] + cross_layer_update(mean[name] - old[name],
                                                       mean[first] - old[first])
    return new


def inco_server_update(server: dict, updates: Mapping[int, Update], *,
                       aggregation: Callable = layerwise_average, uniform: bool = False,
                       cross_layer: bool = True) -> dict:
    """FedAvg's update with cross-layer gradients; cross_layer=False leaves FedAvg."""
    return fedavg_server_update(server, updates, aggregation=aggregation, uniform=uniform,
                                rule=cross_layer_average if cross_layer else average)


# -------------------------------------------------------------------------------------- InclusiveFL


def stage_depths(state: State) -> dict[str, int]:
    """Stage of a ResNet -> number of its blocks; nothing for other networks."""
    places = [place for place in map(block_of, state) if place]
    return {stage: 1 + max(block for other, block, _ in places if other == stage)
            for stage in dict.fromkeys(stage for stage, _, _ in places)}


def top_blocks(weights: Mapping[str, State]) -> dict[str, dict[str, tuple[range, str]]]:
    """What learns from what: architecture -> stage -> (blocks, the next larger architecture).

    In a stage in which the next larger architecture has more blocks, the first of `blocks` is the
    smaller one's last, its top block; it learns from all of them in the larger one.
    weights: by architecture, small to large
    """
    depths = {arch: stage_depths(state) for arch, state in weights.items()}
    return {arch: {stage: (range(depth - 1, depths[larger][stage]), larger)
                   for stage, depth in depths[arch].items() if depths[larger][stage] > depth}
            for arch, larger in pairwise(depths)}


def momentum_from(gradients: State, stage: str, blocks: range, like: State) -> State:
    """m: the mean over a larger network's blocks of its gradients, named like the first of them.

    gradients: of the larger network;  like: the smaller network's weights
    A block that has a weight in another shape, or lacks it, has no part in this weight's mean.
    """
    means = {}
    for name, tensor in like.items():
        if not name.startswith(f"{stage}.{blocks[0]}.") or not is_parameter(name):
            continue
        rest = name.removeprefix(f"{stage}.{blocks[0]}.")
        found = [gradients[f"{stage}.{block}.{rest}"] for block in blocks
                 if f"{stage}.{block}.{rest}" in gradients]
        found = [gradient for gradient in found if gradient.shape == tensor.shape]
        if found:
            means[name] = sum(found) / len(found)
    return means


def inclusivefl_server_update(server: dict, updates: Mapping[int, Update], *,
                              aggregation: Callable = layerwise_average, uniform: bool = False,
                              momentum: float = INCLUSIVE_MOMENTUM) -> dict:
    """Shared layers are averaged; top blocks of smaller networks are their own and learn by momentum.

    For the last block d_a - 1 of architecture a in a stage where the next larger one, b, has more:
    x <- x - (momentum m + (1 - momentum) G_a), where G_a = x - mean y over the clients of a, and
    m = the mean of G_b over b's blocks d_a - 1 to d_b - 1.  (The released code overwrites m where
    it should add.)  Without clients of b there is no momentum, without clients of a no change.
    Buffers of batch normalisation have no gradient: they are averaged alone.
    """
    weights, tops = server["weights"], top_blocks(server["weights"])
    sender = {k: arch for k, update in updates.items() for arch, state in weights.items()
              if update.weights.keys() == state.keys()}

    def with_own_tops(arch: str, state: State) -> State:
        own = tuple(f"{stage}.{blocks[0]}." for stage, (blocks, _) in tops.get(arch, {}).items())
        return {f"{name} of {arch}" if name.startswith(own) else name: tensor
                for name, tensor in state.items()}

    means = fedavg_server_update(
        {"weights": {arch: with_own_tops(arch, state) for arch, state in weights.items()}},
        {k: update._replace(weights=with_own_tops(sender[k], update.weights))
         for k, update in updates.items()}, aggregation=aggregation, uniform=uniform)["weights"]
    new = {arch: dict(zip(state, means[arch].values())) for arch, state in weights.items()}
    apart = fedavg_server_update(server, updates, aggregation=per_architecture_average,
                                 uniform=uniform)["weights"]
    for arch, stages in tops.items():
        for stage, (blocks, larger) in stages.items():
            if not {arch, larger} <= set(sender.values()):
                continue
            gradients = {name: x - apart[larger][name] for name, x in weights[larger].items()}
            for name, m in momentum_from(gradients, stage, blocks, weights[arch]).items():
                new[arch][name] = torch.lerp(apart[arch][name], weights[arch][name] - m, momentum)
    return {**server, "weights": new}
