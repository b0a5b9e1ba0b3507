"""FedAvg and the methods that the two papers compare with, one section each.

In reading order: what passes around, what a method is, what a run is; the methods; what a flag is;
and at the end METHODS, a row a method, and FLAGS, a row for each flag that not every method reads.

Three values are kept apart: what crosses the network (received and Result.update; the bytes of
their tensors are the traffic), what stays on a device between rounds (kept), and what the server
keeps (server); the last two are dicts, lists, tensors and numbers, since they are saved.  `model`
and `optimizer` are scratch: any content is overwritten, and no other argument is changed.
stream(purpose) is the random stream of this round and client, or of this round and the server.  A
method's section holds only what differs from FedAvg.  Numbers are of arxiv.org; InCo's code is
github.com/ChanYunHin/InCo-Aggregation.

FedAvg       Communication-Efficient Learning of Deep Networks from Decentralized Data, 1602.05629
FedProx      Federated Optimization in Heterogeneous Networks, MLSys 2020, 1812.06127
SCAFFOLD     Stochastic Controlled Averaging for Federated Learning, ICML 2020, 1910.06378
FedNova      Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization,
             NeurIPS 2020, 2007.07481
MOON         Model-Contrastive Federated Learning, CVPR 2021, 2103.16257
InCo         Internal Cross-layer Gradients for Extending Homogeneity to Heterogeneity in Federated
             Learning, ICLR 2024, 2308.11464
InclusiveFL  No One Left Behind: Inclusive FL over Heterogeneous Devices, KDD 2022, 2202.08036
HeteroFL     Computation and Communication Efficient FL for Heterogeneous Clients, ICLR 2021,
             2010.01264
FedRolex     Model-Heterogeneous FL with Rolling Sub-Model Extraction, NeurIPS 2022, 2212.01548
ScaleFL      Resource-Adaptive Federated Learning with Heterogeneous Clients, CVPR 2023
FedGen       Data-Free Knowledge Distillation for Heterogeneous FL, ICML 2021, 2105.10056
FedDF        Ensemble Distillation for Robust Model Fusion in FL, NeurIPS 2020, 2006.07242
"""

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import ranks
from data import (BATCHES, GENERATOR_NOISE, GENERATOR_WEIGHTS, LATENT, PROXIES, PROXY_BATCHES,
                  RATE, ClientData, Dataset, batches, drawn, preparation, samples_per_epoch,
                  torch_stream)
from generator import (class_weights, initial_latent_generator, load_latent_generator,
                       sample_latents, train_latent_generator)
from models import (TEST_BATCH, State, all_finite, average, block_of, build_empty,
                    collect_statistics, copy_state, extract, index_sets, is_parameter,
                    layerwise_average, learnt_part, load_network, num_bytes,
                    per_architecture_average, predict, predict_logits, representation, server_step,
                    shapes, with_exits)

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
DISTILLATION_CHECK = 50  # steps from one look at the student to the next; as released: 100
DISTILLATION_CLIP = 5.0  # of the gradient's norm

Stream = Callable[[int], torch.Generator]


# ------------------------------------------------------------------------------ what passes around

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


class Task(NamedTuple):
    """A piece of work for a client."""

    client: Client
    number: int  # the round, or another number that its random streams go by
    received: Any
    kept: tuple = ()  # one value, where something stays on the device


# --------------------------------------------------------------------------------- what a method is

AGGREGATIONS = {"layerwise": layerwise_average, "per-architecture": per_architecture_average}


class Method(NamedTuple):
    """A method's functions, what is said of it, and the flags that it reads.

    Keyword-only arguments of the functions are filled in from the flags of the same names, but
    aggregation is a function, balance is --lambda, proxy and validation are the server's images,
    owners the clients that take part, by id.
    Stages come after the last round, in order, "late" first, which gives each client's weights;
    after holds the outcomes of those before, by name.
    """

    paper: str
    sends: str  # a client, to the server
    keeps: str  # a client, between rounds
    init: Callable  # (weights) -> server: what the server keeps, before round 1
    download: Callable  # (server, client, stream) -> received
    client_update: Callable  # (model, optimizer, received, data, stream[, kept], *, ...) -> Result
    server_update: Callable  # (server, updates, *, ...) -> server
    deploy: Callable  # (server, client, kept) -> (key, weights); equal keys, equal models
    defaults: Mapping[str, Any]  # flag -> default: flags not read by all, defaults that differ
    networks: str  # a key of models.NETWORKS
    averages: tuple[str, ...]  # values of --aggregation; async only without the three that follow
    # and per-architecture only where uploads hold all weights.  Where a method has such a thing:
    initial_memory: Callable | None = None  # (server, client) -> kept, at first
    assign: Callable | None = None  # (client, architectures, stream) -> client, with a round's own
    distil: Callable | None = None  # (server, updates, build, stream, *, ...) -> server, trained
    stages: Mapping[str, Callable] = {}  # name -> (experiment, server, after, *, ...) -> outcome
    personalise: Callable | None = None  # (own, friend, *, ...) -> weights
    further_traffic: Callable | None = None  # (net, image, *, ...) -> tensors sent besides weights
    architectures: Callable = tuple  # what becomes of the networks of --model
    has_server: bool = True  # False: clients train alone, and cannot drop out of anything
    instead: Mapping[str, str] = {}  # flag that is not read -> what the method does in its place


def bind(method: Method, settings: Mapping[str, Any], **others: Any) -> Method:
    """The method with its functions' keyword-only arguments filled in from settings and others."""
    values = {**settings, **others}
    if "aggregation" in settings:
        values["aggregation"] = AGGREGATIONS.get(settings["aggregation"])
    if "lambda" in settings:  # which is a word of Python
        values["balance"] = settings["lambda"]
    bound = {name: filled(function, values) for name, function in method._asdict().items()
             if callable(function)}
    return method._replace(**bound, stages={name: filled(stage, values)
                                            for name, stage in method.stages.items()})


def filled(function: Callable, values: Mapping[str, Any]) -> Callable:
    """A function with those of its keyword-only arguments filled in that values has."""
    names = [name for name, parameter in inspect.signature(function).parameters.items()
             if parameter.kind is parameter.KEYWORD_ONLY]
    return partial(function, **{name: values[name] for name in names if name in values})


class Experiment(NamedTuple):
    """What stays the same through all rounds of a run."""

    settings: dict
    method: Method  # with its functions' keyword arguments filled in
    data: Dataset
    clients: list[Client]
    dropouts: list[int]  # ids of the clients that dropped out before the first round
    seen: list[int]  # classes that clients hold that take part
    unseen: list[int]  # classes that dropout clients alone hold
    test_shares: list[Tensor]  # client -> indices of its test images
    statistics: tuple[Tensor, Tensor]  # mean and deviation of the training images
    speeds: list[float]  # images a client trains on in a unit of virtual time
    idle: dict[str, list]  # architecture, small to large -> networks and optimisers not in use
    semantics: Tensor | None = None  # A(y), where a generator is yet to be trained
    train: Callable | None = None  # (update, tasks, what="") -> client id -> Result, in parallel
    watch: Callable | None = None  # (items, what, unit, ...) -> the same, with a progress bar

    @property
    def shape(self) -> tuple[int, int]:
        """What a network has to fit: channels of the images, number of classes."""
        return self.data.x_train.shape[1], len(self.data.classes)

    @property
    def architectures(self) -> list[str]:
        """Of the clients, small to large."""
        return list(self.idle)

    @property
    def available(self) -> list[int]:
        """The clients that take part in rounds."""
        gone = self.dropouts if self.method.has_server else ()
        return [client.id for client in self.clients if client.id not in gone]

    def stream(self, number: int, client: int) -> Stream:
        """The random streams of one client in one round, by purpose."""
        return partial(torch_stream, self.settings["seed"], round=number, client=client)

    def network(self, arch: str, weights: State) -> nn.Module:
        """A network of these weights for the data of the run, to predict with."""
        return load_network(arch, *self.shape, weights)


def predicted_right(experiment: Experiment, in_use: Iterable[tuple[object, str, object, State]],
                    ) -> dict[object, Tensor]:
    """By client, which test images (N,) its model gets right.

    in_use: client, architecture, key and weights of its model, one after the other, so that not all
        need be in memory; equal keys are equal models, and each distinct one predicts once
    """
    images, prepare = experiment.data.x_train, preparation(experiment.statistics)
    taking_part = torch.cat([experiment.clients[k].indices for k in experiment.available])
    owner, mine, key_of = {}, {}, {}  # the distinct models are dealt out to the processes
    for k, arch, key, weights in in_use:
        key_of[k] = key
        if key in owner:
            continue
        owner[key] = len(owner) % ranks.count()
        if owner[key] == ranks.number():
            model = experiment.network(arch, weights)
            collect_statistics(model, spread_batches(images, taking_part, prepare))
            mine[key] = predict(model, experiment.data.x_test, prepare) == experiment.data.y_test
    right = {key: ranks.done_by(rank, partial(mine.get, key), experiment.settings["device"])
             for key, rank in owner.items()}
    return {k: right[key] for k, key in key_of.items()}


def expected_traffic(experiment: Experiment, server: dict) -> float:
    """Bytes that a round sends each way for an average client, once there are features too."""
    clients, method = experiment.clients, experiment.method
    first = method.init(server["weights"])  # which has nothing but weights to send yet
    total = sum(num_bytes(method.download(first, client, experiment.stream(0, client.id)))
                for client in clients) / len(clients)
    if method.further_traffic is not None:
        meta = torch.device("meta")
        net = build_empty(clients[0].arch, *experiment.shape, meta).eval()
        image = torch.empty(1, *experiment.data.x_train.shape[1:], device=meta)
        total += num_bytes(method.further_traffic(net, image))
    return total


def spread_batches(images: Tensor, indices: Tensor, prepare: Callable) -> Iterator[Tensor]:
    """Batches of all clients' images, each from everywhere among them.

    indices: of the images that clients have who take part.  Networks cut by width, which keep no
    statistics, get theirs from these; see models.collect_statistics.
    """
    count = math.ceil(len(indices) / TEST_BATCH)
    return (prepare(images[indices[batch::count]]) for batch in range(count))


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
    weights = aggregation(server["weights"], {k: update.weights for k, update in updates.items()},
                          {k: update.num_samples for k, update in updates.items()},
                          uniform=uniform, rule=rule)
    return {**server, "weights": weights}


def with_class_counts(result: Result, data: ClientData) -> Result:
    """The same result, whose update also carries the client's class counts."""
    num_classes = len(result.update.weights["classifier.fc.bias"])
    counts = data.labels[data.indices].bincount(minlength=num_classes)
    return result._replace(update=LabelledUpdate(*result.update, counts))


def figures(result: Result, received: object) -> Counter:
    """What a client update adds to the sums of its round: loss, bytes up and down, images."""
    return Counter(loss=result.loss, upload=num_bytes(result.update),
                   download=num_bytes(received), samples=result.samples)


def round_figures(total: Mapping[str, float]) -> dict[str, float]:
    """What the log says of a round whose sums of figures these are."""
    return {"loss": total["loss"] / max(1, total["samples"]), "upload_mb": total["upload"] / 1e6,
            "download_mb": total["download"] / 1e6, "samples": total["samples"]}


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
    start, loss_sum, samples = learnt_part(model, received), 0.0, 0
    for x, y in batches(data, batch_size, local_epochs, stream(BATCHES)):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        add_proximal_gradient(model, start, mu)
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


# ------------------------------------------------------------------------ FedAvg-FT (of AP-FL)

def train_late(experiment: Experiment, tasks: Sequence[Task], *, local_epochs: int,
               batch_size: int) -> dict[int, State]:
    """After the last round clients train as in one, but send nothing: their weights by client."""
    update = partial(fedavg_client_update, local_epochs=local_epochs, batch_size=batch_size)
    results = experiment.train(update, tasks, "late training")
    return {k: result.update.weights for k, result in results.items()}


def fedavg_ft_late(experiment: Experiment, server: dict, after: Mapping, *, finetune_epochs: int,
                   batch_size: int) -> dict[int, State]:
    """Every client fine-tunes the final global model, once (AP-FL, Sec. 4.1)."""
    tasks = [Task(client, 0, server["weights"][client.arch]) for client in experiment.clients]
    return train_late(experiment, tasks, local_epochs=finetune_epochs, batch_size=batch_size)


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
    (With momentum it would not be: tau steps then go further than tau gradients.)
    """
    reset(model, optimizer, received.weights)
    lr = optimizer.param_groups[0]["lr"]
    correction = learnt_part(model, {name: c - kept[name] for name, c in received.variate.items()})
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
                           owners: Mapping[int, Client], aggregation: Callable = layerwise_average,
                           uniform: bool = False, server_lr: float = 1.0) -> dict:
    """x <- x + server_lr mean(y - x);  c <- c + (sum of changes) / N (Algorithm 1, lines 16-17).

    owners: every client that takes part, drawn or not, by id
    Clients count by their n_k in both lines, and N is the sum of n_k over the owners of a layer, so
    that c stays the weighted mean of the c_k over them.  uniform counts all alike, as Algorithm 1
    does.  (Weights by n_k with variates alike would find the optimum of clients that count alike.)
    """
    def step(old: State, uploads: Mapping, counts: Mapping, *, uniform: bool) -> State:
        return server_step(old, average(old, uploads, counts, uniform=uniform), server_lr)

    def add_mean(old: State, changes: Mapping, counts: Mapping, *, uniform: bool) -> State:
        zeros = {name: torch.zeros_like(c) for name, c in old.items()}
        change = average(zeros, changes, counts, uniform=uniform)
        return {name: c + change[name] for name, c in old.items()}

    changes = {k: update.change for k, update in updates.items()}
    counts = {k: 1 if uniform else update.num_samples for k, update in updates.items()}
    not_drawn = Counter()
    for k, owner in owners.items():
        if k not in updates:
            not_drawn[owner.arch] += 1 if uniform else len(owner.indices)
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


def own_part(state: State) -> tuple[str, ...]:
    """How the names of those weights begin that InclusiveFL's architectures do not share.

    The classifier, and of a ResNet the last block, its top block.
    """
    depths = stage_depths(state)
    top = [f"{stage}.{depths[stage] - 1}." for stage in list(depths)[-1:]]
    return ("classifier.", *top)


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
    """Shared layers are averaged; a network's classifier and top block are its own.

    The top block learns from larger networks by momentum.  For the last block, d_a - 1, of
    architecture a, where the next larger one, b, has d_b blocks in that last stage:
    x <- x - (momentum m + (1 - momentum) G_a),  where G_a = x - mean y over the clients of a, and
    m = the mean of G_b over b's blocks d_a - 1 to d_b - 1.  (The released code overwrites m where
    it should add.)  Where there is no m, as without clients of b, x becomes the mean of y; without
    clients of a it stays.  Buffers of batch normalisation have no gradient, so no m.
    """
    weights, sender = server["weights"], senders(server["weights"], updates)
    own = {arch: own_part(state) for arch, state in weights.items()}

    def own_name(arch: str, name: str) -> str:  # which is no other architecture's
        return f"{name} of {arch}" if name.startswith(own[arch]) else name

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
    for arch, larger in pairwise(weights):
        if not {arch, larger} <= set(sender.values()):
            continue
        depths, of_larger = stage_depths(weights[arch]), stage_depths(weights[larger])
        top = list(depths)[-1]
        gradients = {name: x - apart[larger][name] for name, x in weights[larger].items()
                     if is_parameter(name)}  # G_b
        m = momentum_from(gradients, top, range(depths[top] - 1, of_larger[top]))
        for name, mean_gradient in m.items():  # new holds x - G_a as yet
            new[arch][name] = torch.lerp(new[arch][name], weights[arch][name] - mean_gradient,
                                         momentum)
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

    Self-distillation begins once more than a share warm_up of all rounds is finished; when --rounds
    grow, later.
    """
    return Scaled(submodel(server, client.arch), server["round"] > warm_up * rounds)


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
            draw = partial(torch.randint, len(received.classes))
            random_y = received.classes[drawn(draw, (generated,), rng=rng, device=y.device)]
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
                 proxy: ClientData | None = None, validation: ClientData | None = None,
                 distillation_steps: int = DISTILLATION_STEPS, temperature: float = 1.0,
                 batch: int = DISTILLATION_BATCH, step_size: float = DISTILLATION_LR,
                 clip: float | None = DISTILLATION_CLIP, check: int = DISTILLATION_CHECK) -> dict:
    """Distil the clients' mean logits on proxy images into the averaged models (Algorithms 1, 3).

    build: (architecture, weights) -> a network
    proxy: unlabelled images; its labels are not read
    validation: labelled images.  Of the average, and the student after every check steps and the
        last, the one counts that is best on them, as released; None: the last
    batch: proxy images a step;  step_size: Adam's learning rate, which falls along a cosine to 0
    Every architecture has a student, which begins with the average of its own clients, and they all
    have all clients for teachers, and the same batches.  Raises FloatingPointError if a student is
    no longer finite.
    """
    if distillation_steps == 0:
        return server
    # Logits stand where labels do, so that a batch comes with its teacher.
    labelled = proxy._replace(labels=mean_logits(build, server["weights"], updates, proxy))
    new = {}
    for arch, weights in server["weights"].items():
        student = build(arch, weights)
        best, new[arch] = num_right(student, validation), weights
        optimizer = torch.optim.Adam(student.parameters(), lr=step_size, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, distillation_steps)
        enough = batches(labelled, batch, distillation_steps, stream(PROXY_BATCHES))
        for step, (x, teacher) in enumerate(islice(enough, distillation_steps), start=1):
            loss = distillation_loss(student.train()(x), teacher, temperature)
            optimizer.zero_grad()
            loss.backward()
            clip_gradient(student, clip)
            optimizer.step()
            schedule.step()
            if step % check == 0 or step == distillation_steps:
                if not all_finite(student.state_dict()):
                    raise FloatingPointError("distillation: a weight is not finite any more")
                right = num_right(student, validation)
                if right >= best:
                    best, new[arch] = right, copy_state(student)
    return {**server, "weights": new}


def num_right(model: nn.Module, data: ClientData | None) -> int:
    """How many of some images a network recognises, in evaluation mode; of no images none."""
    if data is None:
        return 0
    predicted = predict(model, data.images[data.indices], data.prepare)
    return int((predicted == data.labels[data.indices]).sum())


# ----------------------------------------------------------------------------------- what a flag is

NOT_SAID = "not said here"  # in place of a default


class By(NamedTuple):
    """A default that goes by the method, the data set or the setting of a run."""

    setting: str  # "method", "dataset" or "setting"
    values: Mapping[str, Any]
    otherwise: Any = NOT_SAID  # of a method's default: the flag's own then counts

    def __str__(self) -> str:
        cases = [f"{value} ({name})" for name, value in self.values.items()]
        return ", ".join(cases + [f"else {self.otherwise}"] * (self.otherwise is not NOT_SAID))


class Flag(NamedTuple):
    """A flag of the command line: --name, with hyphens for underscores."""

    name: str
    kind: type  # int, float or str; bool: typed or not; list: one or more of the choices
    help: str  # what it is, with the paper's value, symbol and section
    group: str = ""  # where --help has it; "": under the methods that read it
    default: Any = NOT_SAID  # a value or By; NOT_SAID: only methods read it that have a default
    low: float = -1e9  # the smallest number allowed,
    above: float | None = None  # or the largest that is too small
    high: float = 1e9  # the largest number allowed
    choices: Collection[str] = ()
    file: str = ""  # of the name of a file that may be given, instead of a choice: how it ends
    when: Mapping[str, Collection[str]] = {}  # read if one of these flags has one of these values,
    unless: Mapping[str, Collection[str]] = {}  # and not if one has one of these
    decides: Mapping[str, Mapping[str, Any]] = {}  # "" or a list's choice -> flags that it fixes
    may_change: bool = False  # on --resume
    kept: bool = True  # in config.json


def typed_as(name: str) -> str:
    """How a flag is typed."""
    return f"--{name.replace('_', '-')}"


def read_value(flag: Flag, text: str | list | bool) -> Any:
    """The value of a flag, or those of a list.  Raises ValueError if it cannot have this one."""
    if isinstance(text, list):
        return [read_value(flag, item) for item in text]
    if flag.kind is bool:
        return text
    name, file = typed_as(flag.name), f", or give the path of an {flag.file} file" * bool(flag.file)
    if flag.kind in (str, list):
        if not flag.choices or text in flag.choices or (file and text.lower().endswith(flag.file)):
            return text
        raise ValueError(f"unknown {name} '{text}': choose one of {', '.join(flag.choices)}{file}")
    try:
        value = flag.kind(text)
    except ValueError:
        value = math.nan
    if value > flag.high:
        raise ValueError(f"{name} must be at most {flag.high:g}, not '{text}'")
    if not (value >= flag.low if flag.above is None else value > flag.above):
        noun = "a whole number" if flag.kind is int else "a number"
        bound = f"at least {flag.low:g}" if flag.above is None else f"above {flag.above:g}"
        raise ValueError(f"{name} must be {noun} {bound}, not '{text}'")
    return value


def is_stored_value(flag: Flag, value: Any) -> bool:
    """Whether a value from a file could be one of the flag's, or one that is merely too large."""
    if flag.kind is list:
        return isinstance(value, list) and set(value) <= set(flag.choices)
    if type(value) is not flag.kind and not (flag.kind is float and type(value) is int):
        return False
    try:
        return read_value(flag._replace(high=math.inf), value) == value
    except ValueError:
        return False


def is_file(flag: Flag, value: Any) -> bool:
    """Whether a value of the flag is the name of a file."""
    return isinstance(value, str) and bool(flag.file) and value not in flag.choices


def default_of(flag: Flag, method: Method, settings: Mapping[str, Any]) -> Any:
    """A flag's default in a run of these settings: the method's, or else the flag's own."""
    for default in (method.defaults.get(flag.name, NOT_SAID), flag.default):
        if isinstance(default, By):
            default = default.values.get(settings[default.setting], default.otherwise)
        if default is not NOT_SAID:
            return default
    return NOT_SAID


def why_unread(flag: Flag, method: Method, settings: Mapping[str, Any],
               fixed: Mapping[str, str]) -> str | None:
    """The reason why a run does not read a flag, or None: it does.

    settings: of the run, as far as its method reads them
    fixed: settings that another flag has decided -> that flag, as it was typed
    """
    by_method = f"by --method {settings['method']}"
    if flag.name in fixed:
        return f"with {fixed[flag.name]}"
    if flag.kept and flag.name not in settings:
        return by_method + method.instead.get(flag.name, "")
    for other, values in flag.unless.items():
        if settings.get(other) in values:
            return f"with {fixed.get(other, f'{typed_as(other)} {settings[other]}')}"
    if flag.when and not any(settings.get(other) in values for other, values in flag.when.items()):
        other = next(iter(flag.when))
        if other not in settings:
            return by_method
        return f"with {fixed.get(other, f'{typed_as(other)} {settings[other]}')}"
    return None


def default_text(flag: Flag, methods: Mapping[str, Method]) -> str:
    """A flag's default in words, and those of methods that have another."""
    by_text = {} if flag.default is NOT_SAID else {str(flag.default): []}
    for name, method in methods.items():
        if flag.name in method.defaults:
            by_text.setdefault(str(method.defaults[flag.name]), []).append(name)
    said = [f"{', '.join(names)}: {text}" if names and len(by_text) > 1 else text
            for text, names in by_text.items() if text not in ("None", "False", "[]")]
    return f"; default {'; '.join(said)}" if said else ""


def methods_rows(methods: Mapping[str, Method], flags: Mapping[str, Flag]) -> list[tuple]:
    """The table that --methods prints, its head first."""
    rows = [("method", "paper", "a client sends", "it keeps", "--model", "--aggregation",
             "flags of its own")]
    for name, method in methods.items():
        own = [typed_as(flag) for flag in method.defaults
               if flags[flag].default is NOT_SAID and flag != "aggregation"]
        averages = ", ".join(method.averages) or ("its own" if method.instead else "-")
        rows.append((name, method.paper, method.sends, method.keeps, method.networks, averages,
                     " ".join(own) or "-"))
    return rows


# ------------------------------------------------------------------------------ methods and flags

IN_STEP = ("layerwise", "per-architecture")  # averages of all updates of a round at once
FEDAVG = Method(
    paper="McMahan et al. 2017", sends="weights", keeps="-", init=fedavg_init,
    download=fedavg_download, client_update=fedavg_client_update,
    server_update=fedavg_server_update, deploy=fedavg_deploy, networks="all but -widths",
    averages=(*IN_STEP, "async"), defaults={"aggregation": "layerwise"})
APFL_SETTINGS = {  # defaults of methods that are in AP-FL's tables alone
    "setting": By("dataset", {"digits": "quick"}, "apfl"),
    **{name: By("setting", {"quick": value}) for name, value in (
        ("participation", 1.0), ("local_epochs", 5), ("batch_size", 50), ("model", "cnn"))}}
HETEROFL = FEDAVG._replace(
    paper="Diao et al. 2021", sends="sub-model", init=heterofl_init, download=heterofl_download,
    client_update=heterofl_client_update, server_update=heterofl_server_update,
    deploy=heterofl_deploy, assign=heterofl_assign, networks="-widths", averages=(),
    instead={"aggregation": ", which averages each coordinate over the sub-models that hold it"},
    defaults={"model": By("setting", {"fedin": "resnet152-widths"}, "resnet18-widths")})

METHODS = {
    "local": FEDAVG._replace(
        paper="-", sends="nothing", keeps="its model", initial_memory=local_initial_memory,
        download=local_download, client_update=local_client_update, deploy=local_deploy,
        server_update=local_server_update, has_server=False, averages=(), defaults=APFL_SETTINGS),
    "fedavg": FEDAVG,
    "fedavg-ft": FEDAVG._replace(
        paper="AP-FL, Sec. 4.1", keeps="its model, at the end", stages={"late": fedavg_ft_late},
        defaults=FEDAVG.defaults | APFL_SETTINGS | {"finetune_epochs": None}),
    "fedprox": FEDAVG._replace(
        paper="Li et al. 2020", client_update=fedprox_client_update,
        defaults=FEDAVG.defaults | {"mu": By("setting", {"apfl": FEDPROX_MU_APFL}, FEDPROX_MU)}),
    "scaffold": FEDAVG._replace(
        paper="Karimireddy et al. 2020", sends="weights, change of its variate",
        keeps="control variate", init=scaffold_init, initial_memory=scaffold_initial_memory,
        download=scaffold_download, client_update=scaffold_client_update,
        server_update=scaffold_server_update, averages=IN_STEP),
    "fednova": FEDAVG._replace(
        paper="Wang et al. 2020", sends="weights, a number", client_update=fednova_client_update,
        server_update=fednova_server_update, averages=IN_STEP),
    "moon": FEDAVG._replace(
        paper="Li et al. 2021", keeps="its last model", initial_memory=moon_initial_memory,
        client_update=moon_client_update, averages=IN_STEP,
        defaults=FEDAVG.defaults | {"mu": MOON_MU}),
    "fedgen": FEDAVG._replace(
        paper="Zhu et al. 2021", sends="weights, class counts; gets a generator", init=fedgen_init,
        download=fedgen_download, client_update=fedgen_client_update, distil=fedgen_distil,
        averages=IN_STEP, defaults=FEDAVG.defaults | APFL_SETTINGS),
    "feddf": FEDAVG._replace(
        paper="Lin et al. 2020", server_update=feddf_server_update, distil=feddf_distil,
        averages=(), instead={"aggregation": ", which averages within each architecture, since its "
                              "server trains them apart"},
        defaults=APFL_SETTINGS | {"proxy": "holdout", "distillation_steps": By(
            "setting", {"quick": 50}, DISTILLATION_STEPS)}),
    "heterofl": HETEROFL,
    "inclusivefl": FEDAVG._replace(
        paper="Liu et al. 2022", server_update=inclusivefl_server_update, averages=IN_STEP),
    "fedrolex": HETEROFL._replace(paper="Alam et al. 2022", server_update=fedrolex_server_update),
    "scalefl": HETEROFL._replace(
        paper="Ilhan et al. 2023", sends="sub-model with exits", architectures=with_exits,
        init=scalefl_init, download=scalefl_download, client_update=scalefl_client_update,
        server_update=scalefl_server_update, assign=None,
        defaults=HETEROFL.defaults | {"self_distillation": SELF_DISTILLATION}),
    "inco": FEDAVG._replace(
        paper="Chan et al. 2024", server_update=inco_server_update, averages=IN_STEP),
}
FLAGS = [
    Flag("finetune_epochs", int, "epochs of a client's one-off fine-tuning after the last round "
         "(AP-FL Sec. 4.1: not stated); as many as --local-epochs", low=0),
    Flag("mu", float, "fedprox, fedin: weight of the proximal term (FedIN Eq. 3 and Sec. 5.1: mu/2 "
         "= 0.05; AP-FL: not stated); moon: of the contrastive loss (its own: 5)", low=0),
    Flag("proxy", str, "the server's unlabelled images: ones that no client has, noise, or yours",
         choices=PROXIES, file=".npz", unless={"distillation_steps": [0]}),
    Flag("distillation_steps", int, "steps a round on the server; 0: none", low=0),
    Flag("self_distillation", float, "gamma: how much earlier exits learn from the last, once "
         "more than a quarter of the rounds is finished (0: as released)", low=0),
]
