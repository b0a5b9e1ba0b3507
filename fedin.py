"""FedIN: federated intermediate-layers learning for heterogeneous architectures.

Anonymous authors, FedIN: Federated Intermediate Layers Learning for Model Heterogeneity (under
double-blind review).  Equation and section numbers below are this paper's.

In reading order: the two pieces of mathematics (gradient alleviation, Eq. 8-13; noise, Sec. 4.3),
then one round: what the server sends, what a client does with it, what the server keeps.

symbol            name                shape
x, y              x, y                (B, C, 32, 32), (B,)
s_in, s_out       s_in, s_out         (B, 64, 8, 8), (B, 512, 1, 1) for the ResNets
S                 features            rows of (s_in, s_out) from other clients
w_e, w_in, w_c    model.extractor, model.intermediate, model.classifier
G_local, G_IN, Z  local, inner, combined gradients, tensor by tensor as the parameters
mu                mu                  weight of the proximal term; the paper prints mu/2 = 0.05
lambda            multiplier          Lagrange multiplier; Eq. 13 weighs G_local by half of it

FedIN without IN training is FedProx under the same average (Table 2b and Table 1 agree on it).
"""

from collections.abc import Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines import (FEDAVG, IN_STEP, Client, Flag, Result, Stream, add_proximal_gradient,
                       fedavg_init, fedavg_server_update, reset)
from data import BATCHES, FEATURE_BATCH, FEATURE_NOISE, FEATURE_POOL, NOISE, ClientData, batches
from models import State, copy_state, layerwise_average, learnt_part

MU = 0.1  # mu, Sec. 5.1: "mu/2 ... is 0.05"
MULTIPLIER = 1.0  # lambda, Sec. 4.2
NOISE_LEVEL = 0.8  # of FedIN (+Noise), in standard deviations of the features, Sec. 4.3
NOISE_ON = "features"  # Sec. 4.3; see PAPERS.md
FEATURE_BATCH_SIZE = 16  # |S|, Sec. 5.4 and Fig. 6c
FEATURE_BATCHES = 1  # "sample number", Fig. 6d

Features = tuple[Tensor, Tensor]  # (s_in, s_out), one row a sample


class Received(NamedTuple):
    """What the server sends to a client."""

    weights: State
    features: Features | None  # S; None where there is none to be had, as in round 1


class Update(NamedTuple):
    """What a client sends to the server."""

    weights: State
    num_samples: int  # n_k
    features: Features | None  # its own, made after local training


# --------------------------------------------------------------- gradient alleviation (Section 4.2)

def project_gradient(inner: Tensor, local: Tensor) -> Tensor:
    """The point nearest to G_IN that does not oppose G_local (Eq. 12, the solution of Eq. 9).

    Z = G_IN                    if b >= 0
    Z = G_IN - (b/a) G_local    if b < 0,   with a = <G_local, G_local>, b = <G_local, G_IN>
    inner, local: G_IN and G_local of one weight tensor, of equal shape, as Z
    Note that G_local has no share in Z at all where the two agree (b >= 0).
    """
    # Of unit vectors, with a largest entry of 1, no square overflows or underflows; b/a is the same
    # but for that factor.  Clamped rather than branched on, so that nothing waits for the device;
    # the clamps keep out 0/0.
    tiny = torch.finfo(local.dtype).tiny
    largest_inner, largest_local = (tensor.abs().amax().clamp(min=tiny)
                                    for tensor in (inner, local))
    inner_unit, local_unit = inner / largest_inner, local / largest_local
    a = (local_unit * local_unit).sum()
    b = (local_unit * inner_unit).sum()
    step = b.clamp(max=0) / a.clamp(min=tiny)
    return inner - largest_inner * (step * local_unit)


def project_gradients(inner: Mapping[str, Tensor], local: Mapping[str, Tensor], *,
                      whole: bool = False) -> dict[str, Tensor]:
    """Eq. 12 for the intermediate layers: tensor by tensor, or for all of them as one vector.

    inner: name -> G_IN;  local: name -> G_local, with at least the names of inner
    """
    if not whole:
        return {name: project_gradient(inner[name], local[name]) for name in inner}
    combined = project_gradient(torch.cat([inner[name].flatten() for name in inner]),
                                torch.cat([local[name].flatten() for name in inner]))
    pieces = combined.split([gradient.numel() for gradient in inner.values()])
    return {name: piece.view_as(inner[name]) for name, piece in zip(inner, pieces)}


# ------------------------------------------------------------------------------ noise (Section 4.3)

def add_noise(s: Tensor, level: float, rng: torch.Generator, *,
              per_channel: bool = False) -> Tensor:
    """s + level sigma z with z ~ N(0, 1), where sigma is the standard deviation of s itself.

    sigma is taken over the whole tensor, or over each channel, and carries no gradient.
    level: 0.8 in the paper (Sec. 4.3); at 0 nothing is drawn and s itself is returned
    """
    if level == 0:
        return s
    over = [dim for dim in range(s.ndim) if dim != 1] if per_channel else None
    sigma = s.detach().std(dim=over, keepdim=True)
    # From page-locked memory, so that the draw waits for nothing that a GPU has to do.
    z = torch.randn(s.shape, generator=rng, pin_memory=s.is_cuda).to(s.device, non_blocking=True)
    return s + level * sigma * z


# ---------------------------------------------------------------------------------------- one round

def fedin_init(weights: dict[str, State]) -> dict:
    """The server's state: global weights, and a pool of features that is empty before round 1.

    Later the pool holds owner (P,), the client of each row, s_in (P, 64, 8, 8) and
    s_out (P, 512, 1, 1) for the ResNets.
    """
    return {**fedavg_init(weights), "pool": {}}


def fedin_download(server: dict, client: Client, stream: Stream, *,
                   feature_batch_size: int = FEATURE_BATCH_SIZE,
                   feature_batches: int = FEATURE_BATCHES, one_owner: bool = False) -> Received:
    """Global weights, and batches of features of other clients, never its own (Sec. 4.1).

    The rows are drawn without replacement from all that the others sent in the round before, which
    mixes owners and architectures, or with one_owner from those of a single other client.
    """
    weights, pool = server["weights"][client.arch], server["pool"]
    if not pool:
        return Received(weights, None)
    rng = stream(FEATURE_POOL)
    others = pool["owner"] != client.id
    if one_owner and others.any():
        owners = pool["owner"][others].unique()
        others = pool["owner"] == owners[torch.randint(len(owners), (), generator=rng)]
    rows = others.nonzero().flatten()
    if len(rows) == 0:
        return Received(weights, None)
    rows = rows[torch.randperm(len(rows), generator=rng)[: feature_batch_size * feature_batches]]
    return Received(weights, (pool["s_in"][rows], pool["s_out"][rows]))


def fedin_client_update(model: nn.Module, optimizer: Optimizer, received: Received,
                        data: ClientData, stream: Stream, *, local_epochs: int, batch_size: int,
                        mu: float = MU, noise: float = 0.0, projection: str = "simplified",
                        feature_batch_size: int = FEATURE_BATCH_SIZE,
                        feature_batches: int = FEATURE_BATCHES, multiplier: float = MULTIPLIER,
                        noise_on: str = NOISE_ON, in_statistics: str = "batch and running",
                        whole: bool = False) -> Result:
    """Local training and IN training together, then one upload of features (Sec. 4.1 and 4.2).

    projection: how G_IN and G_local become Z: "simplified" (Eq. 13), "exact" (Eq. 12 on the
        intermediate layers, G_local elsewhere) or "sum" (G_IN + G_local, "w/o Opt" in Table 2b)
    multiplier: lambda of Eq. 13
    noise: level in standard deviations of the features (Sec. 4.3)
    feature_batch_size, feature_batches: rows of a batch of features, and how many batches it sends;
        those received take turns, one a step
    noise_on: "features", in every forward pass and so on what is sent, or on the "upload" alone
    in_statistics: what batch normalisation does with other clients' features in IN training:
        "batch and running" (plain training mode), "batch" (running statistics unmoved) or "running"
    whole: True: Eq. 12 on all intermediate layers as one vector; False: tensor by tensor
    Without features to learn from, as in round 1, the loss is l_local with coefficient 1; without
    noise that is FedProx.
    """
    reset(model, optimizer, received.weights)
    rng = stream(NOISE)
    level = {"features": noise, "upload": 0.0}[noise_on]
    pairs = feature_pairs(received.features, feature_batch_size)
    local_share = {"simplified": multiplier / 2, "exact": 1.0, "sum": 1.0}[projection]
    start, loss_sum, samples = learnt_part(model, received.weights), 0.0, 0
    for step, (x, y) in enumerate(batches(data, batch_size, local_epochs, stream(BATCHES))):
        s_in = add_noise(model.extractor(x), level, rng)  # Eq. 4
        s_out = add_noise(model.intermediate(s_in), level, rng)  # Eq. 5
        l_ce = F.cross_entropy(model.classifier(s_out), y)  # Eq. 6; first term of Eq. 3
        optimizer.zero_grad()
        if not pairs:
            l_ce.backward()
            add_proximal_gradient(model, start, mu)  # second term of Eq. 3
        else:
            theirs_in, theirs_out = pairs[step % len(pairs)]
            with batch_norm_mode(model.intermediate, in_statistics):
                l_in = F.mse_loss(model.intermediate(theirs_in), theirs_out)  # Eq. 7
            if projection == "exact":
                l_ce.backward()
                add_proximal_gradient(model, start, mu)
                set_projected_gradients(model.intermediate, l_in, whole)  # Eq. 12
            else:  # G_IN is zero outside the intermediate layers, so Eq. 13 is one backward pass
                (l_in + local_share * l_ce).backward()
                add_proximal_gradient(model, start, local_share * mu)
        optimizer.step()
        loss_sum, samples = loss_sum + l_ce.detach() * len(y), samples + len(y)

    weights = copy_state(model)
    features = None
    if feature_batches > 0:
        features = own_features(model, data, feature_batch_size * feature_batches, stream, noise,
                                noise_on=noise_on)
    return Result(Update(weights, len(data.indices), features), float(loss_sum), samples)


def feature_pairs(features: Features | None, batch_size: int) -> list[Features]:
    """Features as batches; a last one of a single row is left out (for its reason see batches)."""
    if features is None:
        return []
    pairs = zip(*(tensor.split(batch_size) for tensor in features))
    return [pair for pair in pairs if len(pair[0]) > 1]


@contextmanager
def batch_norm_mode(intermediate: nn.Module, statistics: str):
    """Batch normalisation for IN training; see in_statistics of fedin_client_update."""
    by_batch, track = {"batch and running": (True, True), "batch": (True, False),
                       "running": (False, True)}[statistics]
    layers = [layer for layer in intermediate.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.train(by_batch)
        layer.track_running_stats = track
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
            layer.track_running_stats = True


def set_projected_gradients(intermediate: nn.Module, l_in: Tensor, whole: bool) -> None:
    """Replace the gradients G_local that the intermediate layers hold by Z of Eq. 12."""
    parameters = dict(intermediate.named_parameters())
    inner = dict(zip(parameters, torch.autograd.grad(l_in, list(parameters.values()))))
    local = {name: parameter.grad for name, parameter in parameters.items()}
    for name, gradient in project_gradients(inner, local, whole=whole).items():
        # Copied into the old gradient's memory layout, on which fused Adam relies.
        parameters[name].grad.copy_(gradient)


@torch.no_grad()
def own_features(model: nn.Module, data: ClientData, count: int, stream: Stream, noise: float, *,
                 noise_on: str = NOISE_ON, training: bool = False) -> Features:
    """The features (s_in, s_out) of count of the client's own training images (Eq. 4 and 5).

    Made after local training, in evaluation mode, or with training in training mode (the model's
    running statistics are then moved; it is scratch).  A client with fewer images sends them all.
    The images are prepared as for training, so --augment changes them too.
    noise: what is sent carries it; with noise_on "features" s_out is computed from the noisy s_in
    """
    model.train(training)
    order = torch.randperm(len(data.indices), generator=stream(FEATURE_BATCH))[:count]
    x = data.prepare(data.images[data.indices[order.to(data.indices.device)]])
    rng = stream(FEATURE_NOISE)
    s_in = model.extractor(x)
    noisy_in = add_noise(s_in, noise, rng)
    s_out = model.intermediate(noisy_in if noise_on == "features" else s_in)
    return noisy_in.float(), add_noise(s_out, noise, rng).float()  # of bfloat16 with --amp


def fedin_server_update(server: dict, updates: Mapping[int, Update], *,
                        aggregation=layerwise_average, uniform: bool = False) -> dict:
    """Average the weights as FedAvg does (Sec. 4.4), and pool the features for the next round."""
    server = fedavg_server_update(server, updates, aggregation=aggregation, uniform=uniform)
    sent = {k: updates[k].features for k in sorted(updates) if updates[k].features is not None}
    if not sent:
        return {**server, "pool": {}}
    owner = torch.cat([torch.full((len(s_in),), k, device=s_in.device)
                       for k, (s_in, _) in sent.items()])
    return {**server, "pool": {"owner": owner,
                               "s_in": torch.cat([s_in for s_in, _ in sent.values()]),
                               "s_out": torch.cat([s_out for _, s_out in sent.values()])}}


def fedin_further_traffic(net: nn.Module, image: Tensor, *, feature_batch_size: int,
                          feature_batches: int) -> list[Tensor]:
    """Features as a client sends them; net and one image (1, C, H, W) are on the meta device."""
    s_in = net.extractor(image)
    return [s.expand(feature_batch_size * feature_batches, *s.shape[1:])
            for s in (s_in, net.intermediate(s_in))]


# ------------------------------------------------------------------------------- method and flags

ABLATIONS = {  # what leaving a part out sets
    "in": {"feature_batches": 0, "feature_batch_size": 0, "projection": "sum"},
    "prox": {"mu": 0.0}, "opt": {"projection": "sum"}}

METHODS = {"fedin": FEDAVG._replace(
    paper="FedIN", sends="weights, features", init=fedin_init, download=fedin_download,
    client_update=fedin_client_update, server_update=fedin_server_update, averages=IN_STEP,
    further_traffic=fedin_further_traffic, defaults=FEDAVG.defaults | {
        "mu": MU, "noise": 0.0, "noise_on": NOISE_ON, "projection": "simplified", "ablate": [],
        "feature_batch_size": FEATURE_BATCH_SIZE, "feature_batches": FEATURE_BATCHES})}

FLAGS = [
    Flag("noise", float, "noise on the features, as a multiple of their standard deviation; FedIN "
         f"(+Noise), Sec. 4.3: {NOISE_LEVEL}", low=0),
    Flag("noise_on", str, "noise in every forward pass (Sec. 4.3 of Eq. 5 and 6), or on what is "
         "sent alone", choices=("features", "upload"), unless={"noise": [0],
                                                                          "feature_batches": [0]}),
    Flag("projection", str, "gradient alleviation: Eq. 13, Eq. 12, or none",
         choices=("simplified", "exact", "sum")),
    Flag("ablate", list, "leave out IN training, the proximal term, the alleviation (Table 2b)",
         choices=ABLATIONS, decides=ABLATIONS),
    Flag("feature_batch_size", int, "features in a batch, |S|, Fig. 6c", low=2),
    Flag("feature_batches", int, "batches of features sent and received, Fig. 6d", low=1),
]
