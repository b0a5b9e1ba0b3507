"""FedAvg and the methods that are close to it, one section each.

A method is a few functions, in the order of a round, and one row of METHODS at the end.  A section
holds only what differs from FedAvg.  A step is one whole optimiser step on one batch, and the heart
of its method.  `model` and `optimizer` are scratch: any content is overwritten.  No other argument
is changed.  stream(purpose) is the random stream of this round and client, or of the server.

Methods with networks of their own are in widths.py (HeteroFL, FedRolex, ScaleFL) and fedgen.py.
Numbers are of arxiv.org.

FedAvg       Communication-Efficient Learning of Deep Networks from Decentralized Data, 1602.05629
FedProx      Federated Optimization in Heterogeneous Networks, MLSys 2020, 1812.06127
SCAFFOLD     Stochastic Controlled Averaging for Federated Learning, ICML 2020, 1910.06378
FedNova      Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization,
             NeurIPS 2020, 2007.07481
MOON         Model-Contrastive Federated Learning, CVPR 2021, 2103.16257
InCo         Internal Cross-layer Gradients for Extending Homogeneity to Heterogeneity in Federated
             Learning, ICLR 2024, 2308.11464; code: github.com/ChanYunHin/InCo-Aggregation
InclusiveFL  No One Left Behind: Inclusive FL over Heterogeneous Devices, KDD 2022, 2202.08036
FedDF        Ensemble Distillation for Robust Model Fusion in FL, NeurIPS 2020, 2006.07242
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from data import BATCHES, PROXY_BATCHES, ClientData, Stream, batches, num_steps
from federation import (Client, Ending, Experiment, LabelledUpdate, Method, Result, Task, Update,
                        reset, run_steps, train_clients)
from models import (MODELS, State, adam, all_finite, average, block_of, copy_parameters, copy_state,
                    is_parameter, layerwise_average, learnt_part, num_bytes,
                    per_architecture_average, predict, predict_logits, representation)
from partitions import PROXIES

FEDPROX_MU = 0.1  # mu; FedIN prints mu/2 = 0.05 for FedProx and for itself (Sec. 5.1)
FEDPROX_MU_APFL = 0.01  # mu in AP-FL's setting, not given in the paper
MOON_MU = 1.0  # mu; MOON's own for CIFAR-10 is 5
MOON_TEMPERATURE = 0.5  # tau
INCO_STEP_LIMIT = 5.0  # upper bound of theta in InCo's released code
INCO_UPDATE_LIMIT = 0.1  # bound of an entry of the combined update in InCo's released code
INCLUSIVE_MOMENTUM = 0.2  # beta of InclusiveFL's released code
DISTILLATION_STEPS = 500  # FedDF's released code has up to 10,000
DISTILLATION_BATCH = 64  # proxy images per step
DISTILLATION_LR = 1e-3  # Adam's learning rate in the first step
DISTILLATION_CHECK = 50  # steps between two tests of the student; as released: 100
DISTILLATION_CLIP = 5.0  # bound of the gradient's norm


# ------------------------------------------------------------------------------------------- FedAvg

# async (AP-FL, Sec. 3.2) mixes one upload at a time into one architecture; see apfl.py.
AGGREGATIONS = {"layerwise": layerwise_average, "per-architecture": per_architecture_average,
                "async": layerwise_average}
SYNCHRONOUS = ("layerwise", "per-architecture")


def fedavg_init(weights: dict[str, State]) -> dict:
    """Server state before round 1: the global weights by architecture."""
    return {"weights": weights}


def fedavg_download(server: dict, client: Client, stream: Stream) -> State:
    """Send the global weights of the client's architecture; nothing is drawn."""
    return server["weights"][client.arch]


def fedavg_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One step on the cross entropy of a batch; return the detached loss."""
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def fedavg_client_update(model: nn.Module, optimizer: Optimizer, received: State,
                         data: ClientData, stream: Stream, *, local_epochs: int,
                         batch_size: int) -> Result:
    """Train the received weights on the client's images for local_epochs epochs."""
    reset(model, optimizer, received)
    loss, samples = run_steps(fedavg_step, model, optimizer, data,
                              batches(data, batch_size, local_epochs, stream(BATCHES)))
    return Result(Update(copy_state(model), len(data.indices)), loss, samples)


def fedavg_server_update(server: dict, updates: Mapping[int, Update], *,
                         aggregation: str = "layerwise", rule: Callable = average) -> dict:
    """Replace the global weights by the average of the uploads, weighted by n_k.

    aggregation: a key of AGGREGATIONS;  rule: see models.layerwise_average
    """
    weights = AGGREGATIONS[aggregation](
        server["weights"], {k: update.weights for k, update in updates.items()},
        {k: update.num_samples for k, update in updates.items()}, rule=rule)
    return {**server, "weights": weights}


def fedavg_deploy(server: dict, client: Client, kept: Any) -> tuple[str, State]:
    """A client uses the global model of its architecture."""
    return client.arch, server["weights"][client.arch]


def with_class_counts(result: Result, data: ClientData) -> Result:
    """Add the client's class counts to its upload."""
    num_classes = len(result.update.weights["classifier.fc.bias"])
    counts = data.labels[data.indices].bincount(minlength=num_classes)
    return result._replace(update=LabelledUpdate(*result.update, counts))


def senders(weights: Mapping[str, State], updates: Mapping[int, Any]) -> dict[int, str]:
    """Client -> its architecture, the one whose weights have the names of its upload."""
    return {k: arch for k, update in updates.items() for arch, state in weights.items()
            if update.weights.keys() == state.keys()}


# ------------------------------------------------------------------------------------------ FedProx

def fedprox_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, start: State, *,
                 mu: float) -> Tensor:
    """One step on cross entropy + (mu/2) ||w - w_start||^2; return the detached cross entropy."""
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    add_proximal_gradient(model, start, mu)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def add_proximal_gradient(model: nn.Module, start: State, mu: float) -> None:
    """Add mu (w - w_start), the gradient of (mu/2) ||w - w_start||^2, to every gradient."""
    if mu == 0:
        return
    # Written out, since autograd would pass over all weights several times more.
    names, parameters = zip(*model.named_parameters())
    moved = torch._foreach_sub(parameters, [start[name] for name in names])
    torch._foreach_add_([parameter.grad for parameter in parameters], moved, alpha=mu)


def fedprox_client_update(model: nn.Module, optimizer: Optimizer, received: State,
                          data: ClientData, stream: Stream, *, local_epochs: int, batch_size: int,
                          mu: float = FEDPROX_MU) -> Result:
    """FedAvg's update with the proximal term."""
    reset(model, optimizer, received)
    loss, samples = run_steps(fedprox_step, model, optimizer, data,
                              batches(data, batch_size, local_epochs, stream(BATCHES)),
                              copy_parameters(model), mu=mu)
    return Result(Update(copy_state(model), len(data.indices)), loss, samples)


# ------------------------------------------------------------------- FedAvg-FT and Local (of AP-FL)

def train_late(experiment: Experiment, tasks: Sequence[Task], *, local_epochs: int,
               batch_size: int) -> dict[int, State]:
    """Train clients after the last round, without an upload: their weights by client."""
    update = partial(fedavg_client_update, local_epochs=local_epochs, batch_size=batch_size)
    results = train_clients(experiment, update, tasks, "late training")
    return {k: result.update.weights for k, result in results.items()}


def fedavg_ft_finish(experiment: Experiment, server: dict, done: dict, save: Callable, *,
                     finetune_epochs: int, batch_size: int) -> Ending:
    """Every client fine-tunes the final global model, once (AP-FL, Sec. 4.1).

    done: finished stage -> its outcome;  save(done): stores the outcomes and returns done
    """
    if "late" not in done:
        tasks = [Task(client, 0, server["weights"][client.arch]) for client in experiment.clients]
        done = save(done | {"late": train_late(experiment, tasks, local_epochs=finetune_epochs,
                                               batch_size=batch_size)})
    download = sum(num_bytes(server["weights"][client.arch]) for client in experiment.clients)
    return Ending({"client": done["late"]}, download, {})


def local_initial_memory(server: dict, client: Client) -> State:
    """Before its first round a client holds the initial weights."""
    return server["weights"][client.arch]


def local_download(server: dict, client: Client, stream: Stream) -> State:
    """Send nothing."""
    return {}


def local_client_update(model: nn.Module, optimizer: Optimizer, received: State,
                        data: ClientData, stream: Stream, kept: State, *, local_epochs: int,
                        batch_size: int) -> Result:
    """Train the client's own model further, keep it, and send nothing."""
    result = fedavg_client_update(model, optimizer, kept, data, stream,
                                  local_epochs=local_epochs, batch_size=batch_size)
    return result._replace(update=Update({}, len(data.indices)), kept=result.update.weights)


def local_deploy(server: dict, client: Client, kept: State | None) -> tuple[str | int, State]:
    """A client uses its own model, or the initial weights before its first round."""
    if kept is None:
        return client.arch, server["weights"][client.arch]
    return client.id, kept


# ----------------------------------------------------------------------------------------- SCAFFOLD

class ScaffoldDownload(NamedTuple):
    """Download of a client."""

    weights: State  # x
    variate: State  # c, per parameter


class ScaffoldUpdate(NamedTuple):
    """Upload of a client."""

    weights: State  # y_k
    num_samples: int  # n_k
    change: State  # c_k+ - c_k


def scaffold_init(weights: dict[str, State]) -> dict:
    """Global weights, and the server's control variate c of every parameter, zero at first."""
    # Architectures share the variates of layers in common.
    zeros = {name: torch.zeros_like(tensor) for state in weights.values()
             for name, tensor in state.items() if is_parameter(name)}
    variates = {arch: {name: zeros[name] for name in state if name in zeros}
                for arch, state in weights.items()}
    return {**fedavg_init(weights), "variates": variates}


def scaffold_initial_memory(server: dict, client: Client) -> State:
    """Before its first round a client's control variate c_k is zero, which takes no memory."""
    return {name: c.new_zeros(()).expand_as(c)
            for name, c in server["variates"][client.arch].items()}


def scaffold_download(server: dict, client: Client, stream: Stream) -> ScaffoldDownload:
    """Send the global weights x and the control variate c."""
    return ScaffoldDownload(server["weights"][client.arch], server["variates"][client.arch])


def scaffold_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor,
                  correction: State, *, lr: float) -> Tensor:
    """One step of FedAvg, then y <- y - lr (c - c_k); return the detached loss.

    correction: c - c_k per parameter;  lr: the optimiser's learning rate
    With SGD this is the paper's y <- y - lr (g + c - c_k).  Adam's variates are mean steps over lr.
    """
    loss = fedavg_step(model, optimizer, x, y)
    with torch.no_grad():
        names, parameters = zip(*model.named_parameters())
        torch._foreach_sub_(parameters, [correction[name] for name in names], alpha=lr)
    return loss


def scaffold_client_update(model: nn.Module, optimizer: Optimizer, received: ScaffoldDownload,
                           data: ClientData, stream: Stream, kept: State, *, local_epochs: int,
                           batch_size: int, lr: float) -> Result:
    """Train with steps corrected by c - c_k (Algorithm 1, lines 7-14, option II).

    kept: c_k;  lr: the optimiser's constant learning rate
    """
    reset(model, optimizer, received.weights)
    correction = learnt_part(model, {name: c - kept[name] for name, c in received.variate.items()})
    loss, samples = run_steps(scaffold_step, model, optimizer, data,
                              batches(data, batch_size, local_epochs, stream(BATCHES)), correction,
                              lr=lr)
    weights, steps = copy_state(model), num_steps(len(data.indices), batch_size, local_epochs)

    # c_k+ = c_k - c + (x - y) / (tau lr), whose last term is the mean step only without momentum.
    change = {}
    for name, c in received.variate.items():
        moved = received.weights[name] - weights[name]
        change[name] = moved / (steps * lr) - c if steps else torch.zeros_like(c)
    return Result(ScaffoldUpdate(weights, len(data.indices), change), loss, samples,
                  kept={name: kept[name] + change[name] for name in kept})


def scaffold_variate(c: State, changes: Mapping[int, State], counts: Mapping[int, int],
                     totals: Mapping[str, int]) -> State:
    """c + sum_k n_k (c_k+ - c_k) / N, for each name (Algorithm 1, line 17).

    changes: client -> c_k+ - c_k;  counts: client -> n_k
    totals: name -> N, the sum of n_k over all clients that hold it, drawn or not; absent: 0
    """
    new = {}
    for name, old in c.items():
        total = torch.zeros_like(old, dtype=torch.float64)
        for k in sorted(changes):
            if name in changes[k]:
                total.add_(changes[k][name], alpha=counts[k])
        owned = totals.get(name, 0)
        new[name] = old + (total / owned).to(old.dtype) if owned else old
    return new


def scaffold_server_update(server: dict, updates: Mapping[int, ScaffoldUpdate], *,
                           owners: Mapping[int, Client], aggregation: str = "layerwise") -> dict:
    """x <- mean y;  c <- c + (sum of changes) / N (Algorithm 1, lines 16-17, global step size 1).

    owners: every client that takes part, drawn or not, by id
    Clients count by n_k, with N its sum over a layer's owners: c stays the weighted mean of c_k.
    """
    server = fedavg_server_update(server, updates, aggregation=aggregation)
    counts = {k: update.num_samples for k, update in updates.items()}

    # Architectures in one group share their variates.
    variates, new = server["variates"], {}
    groups = [list(variates)] if aggregation == "layerwise" else [[arch] for arch in variates]
    for group in groups:
        # N per name, over the group's clients
        totals = Counter()
        for owner in owners.values():
            if owner.arch in group:
                totals.update(dict.fromkeys(variates[owner.arch], len(owner.indices)))

        # The new variates
        changes = {k: update.change for k, update in updates.items() if owners[k].arch in group}
        whole = {name: c for arch in group for name, c in variates[arch].items()}
        merged = scaffold_variate(whole, changes, counts, totals)
        new |= {arch: {name: merged[name] for name in variates[arch]} for arch in group}
    return {**server, "variates": new}


# ------------------------------------------------------------------------------------------ FedNova

class NovaUpdate(NamedTuple):
    """Upload of a client."""

    weights: State
    num_samples: int  # n_k
    norm: float  # a_k


def accumulated_norm(steps: int, momentum: float = 0.0) -> float:
    """a_k = ||a||_1: the number of gradients whose movement a client's local steps add up to.

    Plain SGD: steps.  With momentum rho a gradient acts in later steps too:
    (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho).  Adam has no such closed form; steps serve.
    """
    echo = momentum * (1 - momentum**steps) / (1 - momentum)
    return (steps - echo) / (1 - momentum)


def fednova_client_update(model: nn.Module, optimizer: Optimizer, received: State,
                          data: ClientData, stream: Stream, *, local_epochs: int,
                          batch_size: int, momentum: float = 0.0) -> Result:
    """FedAvg's update, sent with a_k;  momentum: the optimiser's own, 0 with Adam."""
    result = fedavg_client_update(model, optimizer, received, data, stream,
                                  local_epochs=local_epochs, batch_size=batch_size)
    steps = num_steps(len(data.indices), batch_size, local_epochs)
    return result._replace(update=NovaUpdate(*result.update, accumulated_norm(steps, momentum)))


def normalised_average(old: State, uploads: Mapping[int, State], counts: Mapping[int, int], *,
                       norms: Mapping[int, float]) -> State:
    """x - tau_eff sum_k p_k d_k,  d_k = (x - y_k) / a_k,  tau_eff = sum_k p_k a_k.

    p_k = n_k / sum n_k, over the clients that hold the layer
    norms: client -> a_k, 0 for one without steps
    Computed as the mean of x + (tau_eff / a_k) (y_k - x), so equal whole a_k are FedAvg bit for
    bit.  Buffers are averaged as they are.
    """
    # tau_eff, per name
    one = torch.ones((), dtype=torch.float64)
    effective = average(dict.fromkeys(old, one), {k: dict.fromkeys(sent, norms[k] * one)
                                                  for k, sent in uploads.items()}, counts)

    # Uploads as if all clients had gone equally far; in float64 they would take twice the memory.
    rescaled = {k: {name: torch.lerp(old[name].double(), y.double(),
                                     float(effective[name]) / (norms[k] or 1.0)).to(y.dtype)
                    if is_parameter(name) else y for name, y in sent.items()}
                for k, sent in uploads.items()}
    return average(old, rescaled, counts)


def fednova_server_update(server: dict, updates: Mapping[int, NovaUpdate], *,
                          aggregation: str = "layerwise") -> dict:
    """FedAvg's average of directions that do not depend on a client's number of steps."""
    norms = {k: update.norm for k, update in updates.items()}
    return fedavg_server_update(server, updates, aggregation=aggregation,
                                rule=partial(normalised_average, norms=norms))


# --------------------------------------------------------------------------------------------- MOON

def frozen_copy(model: nn.Module, weights: State) -> nn.Module:
    """Copy a network with other weights, in evaluation mode, without gradients."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    frozen.load_state_dict(weights)
    return frozen


def contrastive_loss(z: Tensor, z_global: Tensor, z_previous: Tensor, temperature: float) -> Tensor:
    """-log(e^(s_g / tau) / (e^(s_g / tau) + e^(s_p / tau))), mean over samples (MOON's l_con).

    z, z_global, z_previous: (B, width) representations
    s_g, s_p: (B,) cosine similarities of z to z_global (attracting) and z_previous (repelling)
    """
    similarities = [F.cosine_similarity(z, other) for other in (z_global, z_previous)]
    return -F.log_softmax(torch.stack(similarities) / temperature, dim=0)[0].mean()


def moon_initial_memory(server: dict, client: Client) -> State:
    """Before its first round a client has the global model: l_con is log 2, without gradient."""
    return server["weights"][client.arch]


def moon_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor,
              global_model: nn.Module, previous_model: nn.Module, *, mu: float,
              temperature: float = MOON_TEMPERATURE) -> Tensor:
    """One step on cross entropy + mu contrastive_loss; return the detached cross entropy."""
    z = representation(model, x)
    with torch.no_grad():
        z_global, z_previous = representation(global_model, x), representation(previous_model, x)
    loss = F.cross_entropy(model.classifier[-1](z), y)
    optimizer.zero_grad()
    (loss + mu * contrastive_loss(z, z_global, z_previous, temperature)).backward()
    optimizer.step()
    return loss.detach()


def moon_client_update(model: nn.Module, optimizer: Optimizer, received: State, data: ClientData,
                       stream: Stream, kept: State, *, local_epochs: int, batch_size: int,
                       mu: float = MOON_MU) -> Result:
    """Minimise cross entropy + mu l_con (Algorithm 1); kept: the client's last trained model."""
    reset(model, optimizer, received)
    loss, samples = run_steps(moon_step, model, optimizer, data,
                              batches(data, batch_size, local_epochs, stream(BATCHES)),
                              frozen_copy(model, received), frozen_copy(model, kept), mu=mu)
    weights = copy_state(model)
    return Result(Update(weights, len(data.indices)), loss, samples, kept=weights)


# --------------------------------------------------------------------------------------------- InCo

def cross_layer_update(update: Tensor, reference: Tensor) -> Tensor:
    """Combine a layer's aggregated update, kernel by kernel, with that of an earlier layer.

    g' = (g / |g| + theta g0 / |g0|) (|g| + |g0|) / 2, cut off at +-INCO_UPDATE_LIMIT, with
    theta = |<g, g0>| / <g0, g0>, at most INCO_STEP_LIMIT
    update, reference: g and g0, both (out, in, 3, 3); norms and products are of a 3x3 kernel
    """
    # The absolute value is from InCo's code.  InCo's convex problem has a projection here.
    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(2, 3), keepdim=True)

    norm, reference_norm = product(update, update).sqrt(), product(reference, reference).sqrt()
    theta = product(update, reference).abs() / (product(reference, reference) + 1e-7)
    direction = (update / (norm + 1e-7)
                 + theta.clamp(max=INCO_STEP_LIMIT) * reference / (reference_norm + 1e-7))
    return (direction * (norm + reference_norm) / 2).clamp(-INCO_UPDATE_LIMIT, INCO_UPDATE_LIMIT)


def cross_layer_average(old: State, uploads: Mapping[int, State],
                        counts: Mapping[int, int]) -> State:
    """FedAvg's average, with changes of later blocks' convolutions combined with block 0's."""
    mean = average(old, uploads, counts)
    new = dict(mean)
    # Block 0's second convolution has the shape of both convolutions of every later block.
    for name in old:
        stage, block, rest = block_of(name) or ("", 0, "")
        if block > 0 and rest in ("conv1.weight", "conv2.weight"):
            first = f"{stage}.0.conv2.weight"
            new[name] = old[name] + cross_layer_update(mean[name] - old[name],
                                                       mean[first] - old[first])
    return new


def inco_server_update(server: dict, updates: Mapping[int, Update], *,
                       aggregation: str = "layerwise") -> dict:
    """FedAvg's update with cross-layer gradients."""
    return fedavg_server_update(server, updates, aggregation=aggregation, rule=cross_layer_average)


# -------------------------------------------------------------------------------------- InclusiveFL

def stage_depths(state: State) -> dict[str, int]:
    """Stage of a ResNet -> number of its blocks; nothing for other networks."""
    # Blocks ascend in a state dict, so the last one of a stage counts.
    return {stage: block + 1 for stage, block, _ in filter(None, map(block_of, state))}


def private_prefixes(state: State) -> tuple[str, ...]:
    """Prefixes of weights that are not shared: the classifier, and the last block of a ResNet."""
    depths = stage_depths(state)
    top = [f"{stage}.{depths[stage] - 1}." for stage in list(depths)[-1:]]
    return ("classifier.", *top)


def momentum_from(gradients: State, stage: str, blocks: range) -> State:
    """m: the mean over a larger network's blocks of its gradients, named like the first of them."""
    # In block 0 the shortcut and the convolution that changes the width have no counterpart.
    means, first = {}, f"{stage}.{blocks[0]}."
    for name, gradient in gradients.items():
        if name.startswith(first):
            others = [f"{stage}.{block}.{name.removeprefix(first)}" for block in blocks]
            if all(other in gradients and gradients[other].shape == gradient.shape
                   for other in others):
                means[name] = sum(gradients[other] for other in others) / len(others)
    return means


def inclusivefl_server_update(server: dict, updates: Mapping[int, Update], *,
                              aggregation: str = "layerwise") -> dict:
    """Average shared layers, and each architecture's classifier and top block apart.

    The top block, d_a - 1 of the last stage in architecture a, learns from the next larger one, b:
    x <- x - (beta m + (1 - beta) G_a), where beta is INCLUSIVE_MOMENTUM, G_a = x - mean y over the
    clients of a, and m = the mean of G_b over b's blocks d_a - 1 to d_b - 1.
    Without clients of b, x becomes the mean of y.  Without clients of a, x stays.
    """
    new = private_average(server, updates, aggregation)
    weights, present = server["weights"], set(senders(server["weights"], updates).values())
    apart = fedavg_server_update(server, updates, aggregation="per-architecture")["weights"]
    for arch, larger in pairwise(weights):
        if not {arch, larger} <= present:
            continue

        # m, from G_b; buffers have none.  The released code overwrites m where it should add.
        depths, larger_depths = stage_depths(weights[arch]), stage_depths(weights[larger])
        top = list(depths)[-1]
        gradients = {name: x - apart[larger][name] for name, x in weights[larger].items()
                     if is_parameter(name)}
        m = momentum_from(gradients, top, range(depths[top] - 1, larger_depths[top]))

        # new holds x - G_a so far.
        for name, mean_gradient in m.items():
            new[arch][name] = torch.lerp(new[arch][name], weights[arch][name] - mean_gradient,
                                         INCLUSIVE_MOMENTUM)
    return {**server, "weights": new}


def private_average(server: dict, updates: Mapping[int, Update],
                    aggregation: str) -> dict[str, State]:
    """FedAvg's average, in which no architecture shares its private weights with another."""
    weights, sender = server["weights"], senders(server["weights"], updates)
    private = {arch: private_prefixes(state) for arch, state in weights.items()}

    # Names that no other architecture has keep weights private.
    def renamed(arch: str, state: State) -> State:
        return {f"{name} of {arch}" if name.startswith(private[arch]) else name: tensor
                for name, tensor in state.items()}

    means = fedavg_server_update(
        {"weights": {arch: renamed(arch, state) for arch, state in weights.items()}},
        {k: update._replace(weights=renamed(sender[k], update.weights))
         for k, update in updates.items()}, aggregation=aggregation)["weights"]
    return {arch: dict(zip(state, means[arch].values())) for arch, state in weights.items()}


# -------------------------------------------------------------------------------------------- FedDF

def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) of logits (B, C), mean over samples."""
    return F.kl_div((student / temperature).log_softmax(dim=1),
                    (teacher / temperature).softmax(dim=1), reduction="batchmean")


def mean_logits(network: Callable, weights: Mapping[str, State], updates: Mapping[int, Update],
                proxy: ClientData) -> Tensor:
    """Logits (N, C) for the proxy images, mean over the clients' models."""
    arch_of, total = senders(weights, updates), 0.0
    for k in sorted(updates):
        total = total + predict_logits(network(arch_of[k], updates[k].weights), proxy.images,
                                       proxy.prepare)
    return total / len(updates)


def num_right(model: nn.Module, data: ClientData | None) -> int:
    """Number of images that a network classifies rightly, in evaluation mode; None: 0."""
    if data is None:
        return 0
    predicted = predict(model, data.images[data.indices], data.prepare)
    return int((predicted == data.labels[data.indices]).sum())


def feddf_server_update(server: dict, updates: Mapping[int, Update]) -> dict:
    """FedAvg's average within each architecture, which distillation then trains further."""
    return fedavg_server_update(server, updates, aggregation="per-architecture")


def distillation_step(student: nn.Module, optimizer: Optimizer, x: Tensor, teacher: Tensor, *,
                      temperature: float = 1.0, clip: float = DISTILLATION_CLIP) -> Tensor:
    """One clipped step on KL to the teacher's logits (B, C); return the detached loss."""
    loss = distillation_loss(student(x), teacher, temperature)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), clip)
    optimizer.step()
    return loss.detach()


def feddf_distil(server: dict, updates: Mapping[int, Update], network: Callable, stream: Stream, *,
                 proxy: ClientData | None = None, validation: ClientData | None = None,
                 distillation_steps: int = DISTILLATION_STEPS) -> dict:
    """Distil the clients' mean logits on proxy images into the averaged models (Algorithms 1, 3).

    network: (architecture, weights) -> a network
    proxy: two or more images, whose labels are not read; None only without steps
    validation: labelled images, on which the best of the average and of the students after every
        DISTILLATION_CHECK steps is chosen, the first of equals; None: the last student
    Every architecture's student begins with the average of its clients, or its old weights without
    any, and learns from all clients.
    Raises FloatingPointError if a student is no longer finite.
    """
    if distillation_steps == 0:
        return server

    # Teachers' logits stand in the place of labels, so that a batch comes with its teacher.
    labelled = proxy._replace(labels=mean_logits(network, server["weights"], updates, proxy))
    new = {}
    for arch, weights in server["weights"].items():
        student = network(arch, weights)
        best, new[arch] = num_right(student, validation), weights

        # Batches without end, equal for all, and a learning rate that falls to 0
        lr = DISTILLATION_LR
        optimizer = adam(student, labelled.labels.new_tensor(lr) if labelled.labels.is_cuda else lr,
                         fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, distillation_steps)
        endless = batches(labelled, DISTILLATION_BATCH, distillation_steps, stream(PROXY_BATCHES))
        endless = with_schedule(endless, schedule)

        # Training with early stopping
        for done in range(0, distillation_steps, DISTILLATION_CHECK):
            count = min(DISTILLATION_CHECK, distillation_steps - done)
            run_steps(distillation_step, student.train(), optimizer, labelled,
                      islice(endless, count))
            if not all_finite(student.state_dict()):
                raise FloatingPointError("distillation: a weight is no longer finite")
            right = num_right(student, validation)
            if right > best or validation is None:
                best, new[arch] = right, copy_state(student)
    return {**server, "weights": new}


def with_schedule(batches: Iterator, schedule: Any) -> Iterator:
    """Batches, with a step of the schedule of the learning rate after each."""
    for batch in batches:
        yield batch
        schedule.step()


# ------------------------------------------------------------------------------ methods and flags

FEDAVG = Method(
    init=fedavg_init, download=fedavg_download, client_update=fedavg_client_update,
    server_update=fedavg_server_update, deploy=fedavg_deploy, networks=MODELS,
    averages=(*SYNCHRONOUS, "async"), defaults={"aggregation": "layerwise"})
# Methods in AP-FL's tables alone have its setting, and in `quick` its clients' work.
APFL_SETTING = {"setting": "apfl"}
QUICK_APFL = {"participation": 1.0, "local_epochs": 5, "batch_size": 50, "model": "cnn"}

METHODS = {
    # A client sends nothing and keeps its model.
    "local": FEDAVG._replace(
        download=local_download, client_update=local_client_update, server_update=None,
        deploy=local_deploy, initial_memory=local_initial_memory, averages=(),
        defaults=APFL_SETTING, in_setting={"quick": QUICK_APFL}),
    # McMahan et al. 2017.  A client sends weights.
    "fedavg": FEDAVG,
    # AP-FL, Sec. 4.1.  A client sends weights and keeps its model in the end.
    "fedavg-ft": FEDAVG._replace(
        finish=fedavg_ft_finish, in_setting={"quick": QUICK_APFL},
        defaults=FEDAVG.defaults | APFL_SETTING | {"finetune_epochs": None}),
    # Li et al. 2020.  A client sends weights.
    "fedprox": FEDAVG._replace(
        client_update=fedprox_client_update, defaults=FEDAVG.defaults | {"mu": FEDPROX_MU},
        in_setting={"apfl": {"mu": FEDPROX_MU_APFL}}),
    # Karimireddy et al. 2020.  A client sends weights and its variate's change, keeps its variate.
    "scaffold": FEDAVG._replace(
        init=scaffold_init, download=scaffold_download, client_update=scaffold_client_update,
        server_update=scaffold_server_update, initial_memory=scaffold_initial_memory,
        averages=SYNCHRONOUS),
    # Wang et al. 2020.  A client sends weights and a number.
    "fednova": FEDAVG._replace(client_update=fednova_client_update, averages=SYNCHRONOUS,
                               server_update=fednova_server_update),
    # Li et al. 2021.  A client sends weights and keeps its last model.
    "moon": FEDAVG._replace(
        client_update=moon_client_update, initial_memory=moon_initial_memory,
        averages=SYNCHRONOUS, defaults=FEDAVG.defaults | {"mu": MOON_MU}),
    # Chan et al. 2024, Liu et al. 2022.  A client sends weights.
    "inco": FEDAVG._replace(server_update=inco_server_update, averages=SYNCHRONOUS),
    "inclusivefl": FEDAVG._replace(server_update=inclusivefl_server_update, averages=SYNCHRONOUS),
    # Lin et al. 2020.  A client sends weights; the server has images.
    "feddf": FEDAVG._replace(
        server_update=feddf_server_update, distil=feddf_distil, averages=(),
        defaults=APFL_SETTING | {"proxy": "holdout", "distillation_steps": DISTILLATION_STEPS},
        in_setting={"quick": QUICK_APFL | {"distillation_steps": 50}}),
}


def add_arguments(add: Callable, number: Callable) -> None:
    """Add the flags that not every method reads; see run.parser for add and number."""
    add("--mu", type=number(float, 0), help=f"fedprox ({FEDPROX_MU}; {FEDPROX_MU_APFL} in setting "
        "apfl), fedin (0.1): weight of the proximal term (FedIN Eq. 3, Sec. 5.1: mu/2 = 0.05); "
        f"moon ({MOON_MU:g}): weight of the contrastive loss (MOON for CIFAR-10: 5)")
    add("--finetune-epochs", type=number(int, 0), help="fedavg-ft: epochs of a client's one-off "
        "fine-tuning after the last round (AP-FL Sec. 4.1: not given; default: --local-epochs)")
    add("--proxy", metavar=f"{{{','.join(PROXIES)}}}|FILE.npz", help="feddf: the server's "
        "unlabelled images, held-out training images, noise or a file (default: holdout)")
    add("--distillation-steps", type=number(int, 0), help="feddf: steps per round on the server, "
        f"0 for none (default: {DISTILLATION_STEPS}; quick: 50)")
