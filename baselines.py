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
    <m>_distil(server, updates, build, stream, *, ...) -> server  only where the server trains: what
                                                     it does after its update of every round
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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from data import (BATCHES, GENERATOR_NOISE, GENERATOR_WEIGHTS, LATENT, PROXY_BATCHES, RATE,
                  ClientData, batches, samples_per_epoch)
from generator import (class_weights, initial_latent_generator, load_latent_generator,
                       sample_latents, train_latent_generator)
from models import (State, average, block_of, copy_state, extract, index_sets,
                    interpolate, is_parameter, layerwise_average, per_architecture_average,
                    predict_logits, representation, shapes)

FEDPROX_MU = 0.1  # mu; FedIN prints mu/2 = 0.05 for FedProx and for itself (Sec. 5.1)
FEDPROX_MU_APFL = 0.01  # mu in AP-FL's setting, where the paper gives none
MOON_MU = 1.0  # mu; MOON's own for CIFAR-10 is 5
MOON_TEMPERATURE = 0.5  # tau
INCO_STEP_LIMIT = 5.0  # of theta, in the released code of InCo
INCO_UPDATE_LIMIT = 0.1  # of an entry of the combined update, likewise
INCLUSIVE_MOMENTUM = 0.2  # beta of InclusiveFL's released code
CLIP = 1.0  # of the gradient's norm, in the released code of HeteroFL and FedRolex (ScaleFL: none)
SELF_DISTILLATION = 0.0  # gamma of ScaleFL's released code; it trains BERT with 0.05
SCALEFL_TEMPERATURE = 3.0  # of self-distillation
SCALEFL_WARM_UP = 0.25  # share of the rounds before it begins
FEDGEN_WEIGHT = 10.0  # of FedGen's two terms, before any decay
FEDGEN_DECAY = 0.98  # of these weights and of the generator's learning rate, a round
FEDGEN_STEPS = 50  # of the generator, a round
FEDGEN_BATCH = 32  # latents a step, on the server as on a client
DISTILLATION_STEPS = 500  # FedDF's released code has up to 10,000
DISTILLATION_BATCH = 64  # proxy images a step
DISTILLATION_LR = 1e-3  # of Adam, in the first step
DISTILLATION_CLIP = 5.0  # of the gradient's norm

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


class LabelledUpdate(NamedTuple):
    """The same, where the server has to know besides which classes a client knows."""

    weights: State
    num_samples: int  # n_k
    class_counts: Tensor  # (C,) int64, n_k^y, its training images by class


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


def with_class_counts(result: Result, data: ClientData) -> Result:
    """The same result, whose update also carries the client's class counts."""
    num_classes = len(result.update.weights["classifier.fc.bias"])
    counts = data.labels[data.indices].bincount(minlength=num_classes)
    return result._replace(update=LabelledUpdate(*result.update, counts))


def senders(weights: Mapping[str, State], updates: Mapping[int, Any]) -> dict[int, str]:
    """Client -> its architecture, which is the one whose weights have the same names."""
    return {k: arch for k, update in updates.items() for arch, state in weights.items()
            if update.weights.keys() == state.keys()}


def fedavg_deploy(server: dict, client: Client, kept: Any) -> tuple[str, State]:
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
    """Before its first round a client's control variate c_k is zero, which takes no memory."""
    return {name: c.new_zeros(()).expand_as(c)
            for name, c in server["variates"][client.arch].items()}


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
    change = {}  # c_k+ - c_k, with c_k+ = c_k - c + (x - y) / (tau lr)
    for name, c in received.variate.items():
        moved = received.weights[name] - weights[name]
        change[name] = moved / (steps * lr) - c if steps else torch.zeros_like(c)
    return Result(ScaffoldUpdate(weights, len(data.indices), change), float(loss_sum), samples,
                  kept={name: kept[name] + change[name] for name in kept})


def scaffold_server_update(server: dict, updates: Mapping[int, ScaffoldUpdate], *,
                           owners: Mapping[int, str], aggregation: Callable = layerwise_average,
                           uniform: bool = False, server_lr: float = 1.0) -> dict:
    """x <- x + server_lr mean(y - x);  c <- c + (sum of changes) / N (Algorithm 1, lines 16-17).

    owners: every client that takes part, drawn or not -> its architecture
    N counts the owners of a layer.  So c stays the mean of the c_k over them; with all clients for
    N it would not, for layers that only some own.
    """
    def step(old: State, uploads: Mapping, counts: Mapping, *, uniform: bool) -> State:
        mean = average(old, uploads, counts, uniform=uniform)
        return mean if server_lr == 1 else interpolate(old, mean, server_lr)

    def add_mean(old: State, changes: Mapping, counts: Mapping, *, uniform: bool) -> State:
        zeros = {name: torch.zeros_like(c) for name, c in old.items()}
        change = average(zeros, changes, counts, uniform=uniform)
        return {name: c + change[name] for name, c in old.items()}

    changes = {k: update.change for k, update in updates.items()}
    counts = dict.fromkeys(changes, 1)
    not_drawn = Counter(arch for k, arch in owners.items() if k not in updates)
    for number, (arch, count) in enumerate(not_drawn.items(), start=1):
        # One of them, counted so many times, stands for all: their variates change by nothing.
        changes[-number] = dict.fromkeys(server["variates"][arch], torch.zeros(()))
        counts[-number] = count
    server = fedavg_server_update(server, updates, aggregation=aggregation, uniform=uniform,
                                  rule=step)
    return {**server, "variates": aggregation(server["variates"], changes, counts, rule=add_mean)}


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
    """FedAvg's update; the client also sends a_k, how far its steps go."""
    result = fedavg_client_update(model, optimizer, received, data, stream,
                                  local_epochs=local_epochs, batch_size=batch_size)
    steps = local_epochs * math.ceil(samples_per_epoch(len(data.indices), batch_size) / batch_size)
    norm = accumulated_norm(steps, optimizer.defaults.get("momentum", 0.0))
    return result._replace(update=NovaUpdate(*result.update, norm))


def normalised_average(old: State, uploads: Mapping[int, State], counts: Mapping[int, int], *,
                       norms: Mapping[int, float], uniform: bool = False) -> State:
    """x - tau_eff sum_k p_k d_k,  d_k = (x - y_k) / a_k,  tau_eff = sum_k p_k a_k.

    p_k = n_k / sum n_k, over the clients that hold the layer; a_k is norms[k], 0 for one that made
    no step.  Computed as the mean of x + (tau_eff / a_k) (y_k - x), where clients would be had all
    gone equally far: the same, and with equal a_k FedAvg bit for bit.  These are rounded to the
    weights' own type, so as not to hold all uploads in float64.  Buffers are averaged as they are.
    """
    one = torch.ones((), dtype=torch.float64)
    effective = average(dict.fromkeys(old, one), {k: dict.fromkeys(sent, norms[k] * one)
                                                  for k, sent in uploads.items()},
                        counts, uniform=uniform)
    rescaled = {k: {name: torch.lerp(old[name].double(), y.double(),
                                     float(effective[name]) / (norms[k] or 1.0)).to(y.dtype)
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
    similarities = [F.cosine_similarity(z, other) for other in (z_global, z_previous)]
    return -F.log_softmax(torch.stack(similarities) / temperature, dim=0)[0].mean()


def moon_initial_memory(server: dict, client: Client) -> State:
    """Before its first round a client has the global model: l_con is log 2, without gradient."""
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
            z_global = representation(global_model, x)
            z_previous = representation(previous_model, x)
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
                        uniform: bool = False, step_limit: float = INCO_STEP_LIMIT,
                        limit: float = INCO_UPDATE_LIMIT) -> State:
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
            new[name] = old[name] + cross_layer_update(
                mean[name] - old[name], mean[first] - old[first], step_limit=step_limit,
                limit=limit)
    return new


def inco_server_update(server: dict, updates: Mapping[int, Update], *,
                       aggregation: Callable = layerwise_average, uniform: bool = False,
                       cross_layer: bool = True, step_limit: float = INCO_STEP_LIMIT,
                       limit: float = INCO_UPDATE_LIMIT) -> dict:
    """FedAvg's update with cross-layer gradients; cross_layer=False leaves FedAvg."""
    rule = partial(cross_layer_average, step_limit=step_limit, limit=limit)
    return fedavg_server_update(server, updates, aggregation=aggregation, uniform=uniform,
                                rule=rule if cross_layer else average)


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


def momentum_from(gradients: State, stage: str, blocks: range) -> State:
    """m: the mean over a larger network's blocks of its gradients, named like the first of them.

    gradients: of the larger network's parameters
    What not all these blocks have, in one shape, is left out: in block 0 the shortcut and the
    convolution that changes the width.
    """
    means, first = {}, f"{stage}.{blocks[0]}."
    for name, gradient in gradients.items():
        if name.startswith(first):
            others = [f"{stage}.{block}.{name.removeprefix(first)}" for block in blocks]
            if all(other in gradients and gradients[other].shape == gradient.shape
                   for other in others):
                means[name] = sum(gradients[other] for other in others) / len(others)
    return means


def inclusivefl_server_update(server: dict, updates: Mapping[int, Update], *,
                              aggregation: Callable = layerwise_average, uniform: bool = False,
                              momentum: float = INCLUSIVE_MOMENTUM) -> dict:
    """Shared layers are averaged; top blocks of smaller networks are their own, learn by momentum.

    For the last block d_a - 1 of architecture a in a stage where the next larger one, b, has more:
    x <- x - (momentum m + (1 - momentum) G_a), where G_a = x - mean y over the clients of a, and
    m = the mean of G_b over b's blocks d_a - 1 to d_b - 1.  (The released code overwrites m where
    it should add.)  Where there is no m, as without clients of b, x becomes the mean of y; without
    clients of a it stays.  Buffers of batch normalisation have no gradient, so no m.
    """
    weights, tops = server["weights"], top_blocks(server["weights"])
    sender = senders(weights, updates)

    def own_name(arch: str, name: str) -> str:  # under which a top block is shared with no other
        own = tuple(f"{stage}.{blocks[0]}." for stage, (blocks, _) in tops.get(arch, {}).items())
        return f"{name} of {arch}" if name.startswith(own) else name

    def renamed(arch: str, state: State) -> State:
        return {own_name(arch, name): tensor for name, tensor in state.items()}

    means = fedavg_server_update(
        {"weights": {arch: renamed(arch, state) for arch, state in weights.items()}},
        {k: update._replace(weights=renamed(sender[k], update.weights))
         for k, update in updates.items()}, aggregation=aggregation, uniform=uniform)["weights"]
    new = {arch: {name: means[arch][own_name(arch, name)] for name in state}
           for arch, state in weights.items()}
    apart = fedavg_server_update(server, updates, aggregation=per_architecture_average,
                                 uniform=uniform)["weights"]
    for arch, stages in tops.items():
        for stage, (blocks, larger) in stages.items():
            if not {arch, larger} <= set(sender.values()):
                continue
            gradients = {name: x - apart[larger][name] for name, x in weights[larger].items()
                         if is_parameter(name)}  # G_b
            for name, m in momentum_from(gradients, stage, blocks).items():
                # new holds x - G_a as yet
                new[arch][name] = torch.lerp(new[arch][name], weights[arch][name] - m, momentum)
    return {**server, "weights": new}


# ----------------------------------------------------------------------------------------- HeteroFL


class WidthUpdate(NamedTuple):
    """What a client sends to the server."""

    weights: State  # of its sub-model; of the last layer only the rows of its own classes
    num_samples: int  # n_k
    classes: Tensor | None  # these classes, int64, ascending; None: all


def heterofl_init(weights: dict[str, State]) -> dict:
    """The weights of the whole network, and the first channel of sub-models (FedRolex moves it)."""
    return {**fedavg_init(weights), "start": 0}


def heterofl_assign(client: Client, architectures: Sequence[str], stream: Stream) -> Client:
    """A client has another rate in every round, each with the same probability ("dynamic")."""
    drawn = torch.randint(len(architectures), (), generator=stream(RATE))
    return client._replace(arch=architectures[drawn])


def submodel(server: dict, arch: str) -> State:
    """The weights of an architecture cut out of the whole network's."""
    (whole,) = server["weights"].values()
    part = shapes(arch, channels=whole["extractor.conv1.weight"].shape[1],
                  num_classes=len(whole["classifier.0.fc.bias"]))
    return extract(whole, index_sets(whole, part, start=server["start"]))


def heterofl_download(server: dict, client: Client, stream: Stream) -> State:
    """The sub-model of the client's rate (Algorithm 1)."""
    return submodel(server, client.arch)


def mask_absent(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits (B, C) with 0 for all but these classes, for HeteroFL's masked cross entropy.

    Absent classes get no gradient.  0, as in the released code, not minus infinity, which would
    leave a client of a single class with nothing to learn.
    """
    absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    absent[classes] = False
    return logits.masked_fill(absent, 0)


def clip_gradient(model: nn.Module, clip: float | None) -> None:
    """Shorten the gradient over all parameters to this norm, if it is longer; None: leave it."""
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)


def heterofl_client_update(model: nn.Module, optimizer: Optimizer, received: State,
                           data: ClientData, stream: Stream, *, local_epochs: int, batch_size: int,
                           masked: bool = True, clip: float | None = CLIP) -> Result:
    """Train the sub-model by masked cross entropy; of the last layer send only own classes' rows.

    masked=False: plain cross entropy, and all rows are sent.  clip: see clip_gradient
    """
    reset(model, optimizer, received)
    classes = data.labels[data.indices].unique() if masked else None
    loss_sum, samples = 0.0, 0
    for x, y in batches(data, batch_size, local_epochs, stream(BATCHES)):
        logits = mask_absent(model(x), classes) if masked else model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        clip_gradient(model, clip)
        optimizer.step()
        loss_sum, samples = loss_sum + loss.detach() * len(y), samples + len(y)
    weights = copy_state(model)
    if masked:
        weights = {name: tensor[classes] if name.split(".")[-2] == "fc" else tensor
                   for name, tensor in weights.items()}
    return Result(WidthUpdate(weights, len(data.indices), classes), float(loss_sum), samples)


def heterofl_server_update(server: dict, updates: Mapping[int, WidthUpdate], *,
                           uniform: bool = False) -> dict:
    """Average every coordinate over the clients that hold it; without one it keeps its value."""
    ((arch, whole),) = server["weights"].items()
    held = {k: index_sets(whole, update.weights, start=server["start"], classes=update.classes)
            for k, update in updates.items()}
    new = average(whole, {k: update.weights for k, update in updates.items()},
                  {k: update.num_samples for k, update in updates.items()},
                  uniform=uniform, held=held)
    return {**server, "weights": {arch: new}}


def heterofl_deploy(server: dict, client: Client, kept: None) -> tuple[str, State]:
    """A client uses the sub-model of its architecture (by its id, not the one drawn in a round)."""
    return client.arch, submodel(server, client.arch)


# ----------------------------------------------------------------------------------------- FedRolex


def fedrolex_server_update(server: dict, updates: Mapping[int, WidthUpdate], *,
                           uniform: bool = False) -> dict:
    """HeteroFL's average; in the next round all sub-models begin one channel further (Algorithm 1).

    So a window rolls over the channels, which the smallest sub-models then train in turn.  (In the
    released code it rolls the other way, which covers the same.)
    """
    server = heterofl_server_update(server, updates, uniform=uniform)
    return {**server, "start": server["start"] + 1}


# ------------------------------------------------------------------------------------------ ScaleFL


class Scaled(NamedTuple):
    """What the server sends to a client."""

    weights: State
    distils: bool  # whether self-distillation has begun


def scalefl_init(weights: dict[str, State]) -> dict:
    """The weights of the whole network with all its exits, and the number of finished rounds."""
    return {**heterofl_init(weights), "round": 0}


def scalefl_download(server: dict, client: Client, stream: Stream, *, rounds: int,
                     warm_up: float = SCALEFL_WARM_UP) -> Scaled:
    """The sub-model of the client's level: narrower, and ending at an earlier exit.

    Self-distillation begins after a share warm_up of all rounds; when --rounds grow, later.
    """
    return Scaled(submodel(server, client.arch), server["round"] >= warm_up * rounds)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) of logits (B, C), mean over samples."""
    return F.kl_div((student / temperature).log_softmax(dim=1),
                    (teacher / temperature).softmax(dim=1), reduction="batchmean")


def exits_loss(logits: Sequence[Tensor], y: Tensor, gamma: float, temperature: float) -> Tensor:
    """sum_j j l_j / (m (m + 1) / 2) over exits 1..m, where l_j is the cross entropy of exit j.

    With gamma, all but the last exit learn from the last too: l_j + gamma T^2 KL(last || j) of
    distributions softened by the temperature T, mean over samples; the teacher is detached.  (The
    released code divides by the number of classes besides, and lets the teacher learn.)
    logits: of each exit, (B, C)
    """
    m, total = len(logits), 0.0
    for j, student in enumerate(logits, start=1):
        loss = F.cross_entropy(student, y)
        if gamma > 0 and j < m:
            loss = loss + gamma * temperature**2 * distillation_loss(student, logits[-1].detach(),
                                                                     temperature)
        total = total + j * loss
    return total / (m * (m + 1) / 2)


def scalefl_client_update(model: nn.Module, optimizer: Optimizer, received: Scaled,
                          data: ClientData, stream: Stream, *, local_epochs: int, batch_size: int,
                          self_distillation: float = SELF_DISTILLATION,
                          temperature: float = SCALEFL_TEMPERATURE,
                          clip: float | None = CLIP) -> Result:
    """Train all exits of the sub-model together; the loss in the log is the last exit's.

    self_distillation, temperature: gamma and T of exits_loss
    """
    reset(model, optimizer, received.weights)
    gamma = self_distillation if received.distils else 0.0
    loss_sum, samples = 0.0, 0
    for x, y in batches(data, batch_size, local_epochs, stream(BATCHES)):
        logits = model.exit_logits(x)
        optimizer.zero_grad()
        exits_loss(logits, y, gamma, temperature).backward()
        clip_gradient(model, clip)
        optimizer.step()
        loss = F.cross_entropy(logits[-1].detach(), y)
        loss_sum, samples = loss_sum + loss * len(y), samples + len(y)
    return Result(WidthUpdate(copy_state(model), len(data.indices), None), float(loss_sum), samples)


def scalefl_server_update(server: dict, updates: Mapping[int, WidthUpdate], *,
                          uniform: bool = False) -> dict:
    """HeteroFL's average; that of a block or exit goes over clients alone whose level has it."""
    server = heterofl_server_update(server, updates, uniform=uniform)
    return {**server, "round": server["round"] + 1}


# ------------------------------------------------------------------------------------------- FedGen


class Generated(NamedTuple):
    """What the server sends to a client."""

    weights: State
    generator: State | None  # None in the first round
    classes: Tensor | None  # that the generator knows, int64
    round: int  # finished rounds


def fedgen_init(weights: dict[str, State]) -> dict:
    """Global weights; the generator, its optimiser and the classes it knows come with round 1."""
    return {**fedavg_init(weights), "generator": None, "optimizer": None, "classes": None,
            "round": 0}


def fedgen_download(server: dict, client: Client, stream: Stream) -> Generated:
    """Global weights and the latent generator."""
    return Generated(server["weights"][client.arch], server["generator"], server["classes"],
                     server["round"])


def fedgen_client_update(model: nn.Module, optimizer: Optimizer, received: Generated,
                         data: ClientData, stream: Stream, *, local_epochs: int, batch_size: int,
                         synthetic_weight: float = FEDGEN_WEIGHT,
                         matching_weight: float = FEDGEN_WEIGHT, decay: float = FEDGEN_DECAY,
                         generated: int = FEDGEN_BATCH) -> Result:
    """FedAvg's update with two terms by generated inputs of the last layer (Algorithm 1).

    synthetic_weight: of the last layer's cross entropy on so many generated latents of random
        classes; it counts generated / batch_size times as much, as in the released code
    matching_weight: of KL(q || p), where p is the prediction for an image, and q, detached, that
        for a latent of the image's class
    decay: factor of both weights every round, down to 1e-4
    In round 1 there is no generator and this is FedAvg.
    """
    reset(model, optimizer, received.weights)
    alpha, beta = (weight and max(1e-4, weight * decay**received.round)
                   for weight in (synthetic_weight, matching_weight))
    generator, rng = None, stream(LATENT)
    if received.generator is not None and (alpha or beta):
        generator = load_latent_generator(received.generator)
    loss_sum, samples = 0.0, 0
    for x, y in batches(data, batch_size, local_epochs, stream(BATCHES)):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        objective = loss
        if generator is not None:
            drawn = torch.randint(len(received.classes), (generated,), generator=rng)
            random_y = received.classes[drawn.to(y.device)]
            latents = sample_latents(generator, torch.cat([random_y, y]), rng)
            synthetic, like_y = model.classifier.fc(latents).split([generated, len(y)])
            matching = distillation_loss(logits, like_y.detach())
            objective = (loss + generated / batch_size * alpha
                         * F.cross_entropy(synthetic, random_y) + beta * matching)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        loss_sum, samples = loss_sum + loss.detach() * len(y), samples + len(y)
    result = Result(Update(copy_state(model), len(data.indices)), float(loss_sum), samples)
    return with_class_counts(result, data)


def fedgen_distil(server: dict, updates: Mapping[int, LabelledUpdate], build: Callable,
                  stream: Stream, *, steps: int = FEDGEN_STEPS, generated: int = FEDGEN_BATCH,
                  decay: float = FEDGEN_DECAY, diversity_weight: float = 1.0) -> dict:
    """Train the generator so that the clients' last layers recognise its latents (Algorithm 1).

    Every client counts for a class by its share n_k^y / sum n^y of the images in this round.
    steps, generated: how many, and latents in each;  decay: of the learning rate, every round
    diversity_weight: see generator.train_latent_generator
    """
    uploads = [updates[k] for k in sorted(updates)]
    heads = [partial(F.linear, weight=upload.weights["classifier.fc.weight"],
                     bias=upload.weights["classifier.fc.bias"]) for upload in uploads]
    counts = torch.stack([upload.class_counts for upload in uploads])
    if server["generator"] is None:
        num_classes, width = uploads[0].weights["classifier.fc.weight"].shape
        generator = initial_latent_generator(num_classes, width, stream(GENERATOR_WEIGHTS)).to(
            counts.device)
    else:
        generator = load_latent_generator(server["generator"])
    optimizer = train_latent_generator(
        generator, server["optimizer"], heads, class_weights(counts), stream(GENERATOR_NOISE),
        steps=steps, batch=generated, lr_factor=decay**server["round"],
        diversity_weight=diversity_weight)
    return {**server, "generator": copy_state(generator), "optimizer": optimizer,
            "classes": counts.sum(dim=0).nonzero().flatten(), "round": server["round"] + 1}


# -------------------------------------------------------------------------------------------- FedDF


def mean_logits(build: Callable, weights: Mapping[str, State], updates: Mapping[int, Update],
                proxy: ClientData) -> Tensor:
    """The logits (N, C) for the proxy images, mean over the clients' models."""
    arch_of, total = senders(weights, updates), 0.0
    for k in sorted(updates):
        total = total + predict_logits(build(arch_of[k], updates[k].weights), proxy.images,
                                       proxy.prepare)
    return total / len(updates)


def feddf_server_update(server: dict, updates: Mapping[int, Update], *,
                        uniform: bool = False) -> dict:
    """FedAvg's average within each architecture, which the server goes on training by itself."""
    return fedavg_server_update(server, updates, aggregation=per_architecture_average,
                                uniform=uniform)


def feddf_distil(server: dict, updates: Mapping[int, Update], build: Callable, stream: Stream, *,
                 proxy: ClientData | None, distillation_steps: int = DISTILLATION_STEPS,
                 temperature: float = 1.0, batch: int = DISTILLATION_BATCH,
                 step_size: float = DISTILLATION_LR,
                 clip: float | None = DISTILLATION_CLIP) -> dict:
    """Distil the clients' mean logits on proxy images into the averaged models (Algorithms 1, 3).

    build: (architecture, weights) -> a network
    proxy: unlabelled images; its labels are not read
    batch: proxy images a step;  step_size: Adam's learning rate, which falls along a cosine to 0
    Every architecture has a student, which begins with the average of its own clients, and they all
    have all clients for teachers, and the same batches.  (The released code stops early, by a
    validation set.)
    """
    if distillation_steps == 0:
        return server
    # Logits stand where labels do, so that a batch comes with its teacher.
    labelled = proxy._replace(labels=mean_logits(build, server["weights"], updates, proxy))
    new = {}
    for arch, weights in server["weights"].items():
        student = build(arch, weights).train()
        optimizer = torch.optim.Adam(student.parameters(), lr=step_size, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, distillation_steps)
        enough = batches(labelled, batch, distillation_steps, stream(PROXY_BATCHES))
        for x, teacher in islice(enough, distillation_steps):
            loss = distillation_loss(student(x), teacher, temperature)
            optimizer.zero_grad()
            loss.backward()
            clip_gradient(student, clip)
            optimizer.step()
            schedule.step()
        new[arch] = copy_state(student)
    return {**server, "weights": new}
