"""FedIN: federated intermediate-layers learning for heterogeneous architectures.

Anonymous authors, FedIN: Federated Intermediate Layers Learning for Model Heterogeneity (under
double-blind review).  Equation and section numbers below are this paper's.

In reading order: gradient alleviation (Eq. 12; Eq. 13 is in fedin_step); noise (Sec. 4.3); one
step; then one round: the download, the client's update, the server's update.

symbol            name                shape
x, y              x, y                (B, C, 32, 32), (B,)
s_in, s_out       s_in, s_out         (B, 64, 8, 8), (B, 512, 1, 1) for the ResNets
S                 features            rows of (s_in, s_out) from other clients
w_e, w_in, w_c    model.extractor, model.intermediate, model.classifier
G_local, G_IN     local, inner        gradients, tensor by tensor as the parameters
Z                 project_gradient    combined gradient
mu                mu                  weight of the proximal term; the paper prints mu/2 = 0.05
lambda                                Lagrange multiplier, 1; Eq. 13 weighs G_local by half of it

FedIN without IN training is FedProx under the same average (Table 2b and Table 1 agree on it).
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines import (SYNCHRONOUS, add_proximal_gradient, fedavg_deploy, fedavg_init,
                       fedavg_server_update, fedprox_step)
from data import (BATCHES, FEATURE_BATCH, FEATURE_NOISE, FEATURE_POOL, NOISE, ClientData, Stream,
                  batches, drawn)
from federation import Client, Method, Result, reset, run_steps
from models import MODELS, State, copy_parameters, copy_state

MU = 0.1  # mu, Sec. 5.1: "mu/2 ... is 0.05"
NOISE_LEVEL = 0.8  # FedIN (+Noise), in standard deviations of the features, Sec. 4.3
FEATURE_BATCH_SIZE = 16  # |S|, Sec. 5.4 and Fig. 6c
FEATURE_BATCHES = 1  # "sample number", Fig. 6d
# --projection -> weight of G_local in its sum with G_IN: lambda / 2 (Eq. 13), 1 ("w/o Opt", Table
# 2b); Eq. 12 has no sum.
LOCAL_SHARE = {"simplified": 0.5, "sum": 1.0, "exact": None}

Features = tuple[Tensor, Tensor]  # (s_in, s_out), one row per sample


class Download(NamedTuple):
    """Download of a client."""

    weights: State
    features: Features | None  # S; None if other clients have sent none, as in round 1


class Upload(NamedTuple):
    """Upload of a client."""

    weights: State
    num_samples: int  # n_k
    features: Features | None  # made of the client's images after local training


# --------------------------------------------------------------- gradient alleviation (Section 4.2)

def project_gradient(inner: Tensor, local: Tensor) -> Tensor:
    """Nearest point to G_IN that does not oppose G_local (Eq. 12, the solution of Eq. 9).

    Z = G_IN                    if b >= 0: G_local has no share in Z if the two agree
    Z = G_IN - (b/a) G_local    if b < 0,   with a = <G_local, G_local>, b = <G_local, G_IN>
    inner, local: G_IN and G_local of one weight tensor, of equal shape, as Z
    """
    # Scaled to a largest entry of 1, no square overflows or underflows; b/a differs by that factor.
    # Clamps take the place of branches, so that nothing waits for the device, and keep out 0/0.
    tiny = torch.finfo(local.dtype).tiny
    largest_inner, largest_local = (tensor.abs().amax().clamp(min=tiny)
                                    for tensor in (inner, local))
    inner_unit, local_unit = inner / largest_inner, local / largest_local
    a = (local_unit * local_unit).sum()
    b = (local_unit * inner_unit).sum()
    step = b.clamp(max=0) / a.clamp(min=tiny)
    return inner - largest_inner * (step * local_unit)


def set_projected_gradients(intermediate: nn.Module, l_in: Tensor) -> None:
    """Replace the gradients G_local that the intermediate layers hold by Z of Eq. 12."""
    parameters = list(intermediate.parameters())
    for parameter, inner in zip(parameters, torch.autograd.grad(l_in, parameters)):
        # Copied into the old gradient's memory layout, which fused Adam relies on.
        parameter.grad.copy_(project_gradient(inner, parameter.grad))


# ------------------------------------------------------------------------------ noise (Section 4.3)

def add_noise(s: Tensor, level: float, z: Tensor) -> Tensor:
    """s + level sigma z, with sigma the standard deviation of s over the whole tensor, detached.

    s: at least two elements;  z: standard normal noise, shaped like s
    level: 0.8 in the paper (Sec. 4.3)
    """
    return s + level * s.detach().std() * z


# ----------------------------------------------------------------------------------------- one step

def fedin_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor,
               features: Features | None, z: Features | None, start: State, *, mu: float,
               noise: float, projection: str) -> Tensor:
    """One step of local training and IN training together; return the detached cross entropy.

    features: (s_in, s_out) of other clients; None: local training alone, with coefficient 1
    z: standard normal noise shaped like (s_in, s_out) of the batch; None: no noise
    start: name -> the parameters that local training began with
    noise: level in standard deviations of the features
    projection: a key of LOCAL_SHARE
    """
    # Forward pass, Eq. 4 to 6; the cross entropy is the first term of Eq. 3.
    s_in = model.extractor(x)
    s_in = s_in if z is None else add_noise(s_in, noise, z[0])
    s_out = model.intermediate(s_in)
    s_out = s_out if z is None else add_noise(s_out, noise, z[1])
    l_ce = F.cross_entropy(model.classifier(s_out), y)

    # IN training on others' features, Eq. 7
    l_in = None
    if features is not None:
        l_in = F.mse_loss(model.intermediate(features[0]), features[1])

    # Gradients; the proximal term is the second term of Eq. 3.
    optimizer.zero_grad()
    if l_in is None or projection == "exact":
        l_ce.backward()
        add_proximal_gradient(model, start, mu)
        if l_in is not None:
            set_projected_gradients(model.intermediate, l_in)  # Eq. 12
    else:
        # G_IN is zero outside the intermediate layers, so Eq. 13 is one backward pass.
        share = LOCAL_SHARE[projection]
        (l_in + share * l_ce).backward()
        add_proximal_gradient(model, start, share * mu)
    optimizer.step()
    return l_ce.detach()


# ---------------------------------------------------------------------------------------- one round

def fedin_init(weights: dict[str, State]) -> dict:
    """Server state before round 1: global weights, and an empty pool of features."""
    # Later the pool holds owner (P,), the client of each row, and the rows of s_in and s_out.
    return {**fedavg_init(weights), "pool": {}}


def fedin_download(server: dict, client: Client, stream: Stream, *,
                   feature_batch_size: int = FEATURE_BATCH_SIZE,
                   feature_batches: int = FEATURE_BATCHES) -> Download:
    """Send global weights, and batches of features of other clients, never its own (Sec. 4.1)."""
    weights, pool = server["weights"][client.arch], server["pool"]
    rows = (pool["owner"] != client.id).nonzero().flatten() if pool else ()
    if len(rows) == 0:
        return Download(weights, None)

    # Rows of the last round, drawn without replacement, mix owners and architectures.
    order = torch.randperm(len(rows), generator=stream(FEATURE_POOL))
    rows = rows[order[: feature_batch_size * feature_batches]]
    return Download(weights, (pool["s_in"][rows], pool["s_out"][rows]))


def fedin_client_update(model: nn.Module, optimizer: Optimizer, received: Download,
                        data: ClientData, stream: Stream, *, local_epochs: int, batch_size: int,
                        mu: float = MU, noise: float = 0.0, noise_on: str = "features",
                        projection: str = "simplified",
                        feature_batch_size: int = FEATURE_BATCH_SIZE,
                        feature_batches: int = FEATURE_BATCHES) -> Result:
    """Local training and IN training together, then one upload of features (Sec. 4.1 and 4.2).

    noise, projection: see fedin_step
    noise_on: "features", in every forward pass and so on the upload, or on the "upload" alone
    feature_batch_size, feature_batches: rows of a batch of features, and batches that are sent
    Without noise, and without features to learn from as in round 1, this is FedProx.
    """
    # A step, its numbers, and batches with what it needs besides (x, y)
    reset(model, optimizer, received.weights)
    rows = batches(data, batch_size, local_epochs, stream(BATCHES))
    level = {"features": noise, "upload": 0.0}[noise_on]
    pairs = feature_pairs(received.features, feature_batch_size)
    if pairs or level:
        step, numbers = fedin_step, {"mu": mu, "noise": level, "projection": projection}
        shapes = feature_shapes(model, data.images) if level else None
        rows = with_features(rows, pairs, shapes, stream(NOISE))
    else:
        step, numbers = fedprox_step, {"mu": mu}
    loss, samples = run_steps(step, model, optimizer, data, rows, copy_parameters(model), **numbers)

    # The upload
    weights, features = copy_state(model), None
    if feature_batches > 0:
        features = own_features(model, data, feature_batch_size * feature_batches, stream,
                                noise=noise, noise_on=noise_on)
    return Result(Upload(weights, len(data.indices), features), loss, samples)


def feature_pairs(features: Features | None, batch_size: int) -> list[Features]:
    """Split features into batches, without a last batch of one row; see data.batches."""
    if features is None:
        return []
    pairs = zip(*(tensor.split(batch_size) for tensor in features))
    return [pair for pair in pairs if len(pair[0]) > 1]


@torch.no_grad()
def feature_shapes(model: nn.Module, images: Tensor) -> Features:
    """Features (s_in, s_out) of zeros, for their shapes; the model ends in training mode."""
    model.eval()
    dtype = next(model.parameters()).dtype
    s_in = model.extractor(torch.zeros_like(images[:1], dtype=dtype))
    shapes = s_in, model.intermediate(s_in)
    model.train()
    return shapes


def with_features(batches: Iterator, pairs: list[Features], shapes: Features | None,
                  rng: torch.Generator) -> Iterator[tuple]:
    """Batches (rows, features, z): a batch of pairs in turn, and noise unless shapes is None."""
    turns = cycle(pairs or [None])
    for (rows,) in batches:
        z = None
        if shapes is not None:
            z = tuple(drawn(torch.randn, len(rows), *s.shape[1:], rng=rng, device=rows.device)
                      for s in shapes)
        yield rows, next(turns), z


@torch.no_grad()
def own_features(model: nn.Module, data: ClientData, count: int, stream: Stream, *,
                 noise: float = 0.0, noise_on: str = "features") -> Features:
    """Features (s_in, s_out) of at most count of the client's training images (Eq. 4 and 5).

    The images are prepared as for training, so --augment changes them too.
    noise: the upload carries it; with noise_on "features" s_out is computed from the noisy s_in
    """
    # Images, and noise as the upload carries it
    model.eval()
    order = torch.randperm(len(data.indices), generator=stream(FEATURE_BATCH))[:count]
    x = data.prepare(data.images[data.indices[order.to(data.indices.device)]])
    rng = stream(FEATURE_NOISE)

    def noisy(s: Tensor) -> Tensor:
        if noise == 0:
            return s
        return add_noise(s, noise, drawn(torch.randn, *s.shape, rng=rng, device=s.device))

    # Features, in float32 also with --amp
    s_in = model.extractor(x)
    noisy_in = noisy(s_in)
    s_out = model.intermediate(noisy_in if noise_on == "features" else s_in)
    return noisy_in.float(), noisy(s_out).float()


def fedin_server_update(server: dict, updates: Mapping[int, Upload], *,
                        aggregation: str = "layerwise") -> dict:
    """Average the weights as FedAvg does (Sec. 4.4), and pool the features for the next round."""
    server = fedavg_server_update(server, updates, aggregation=aggregation)
    sent = {k: updates[k].features for k in sorted(updates) if updates[k].features is not None}
    if not sent:
        return {**server, "pool": {}}
    owner = torch.cat([torch.full((len(s_in),), k, device=s_in.device)
                       for k, (s_in, _) in sent.items()])
    return {**server, "pool": {"owner": owner,
                               "s_in": torch.cat([s_in for s_in, _ in sent.values()]),
                               "s_out": torch.cat([s_out for _, s_out in sent.values()])}}


# ------------------------------------------------------------------------------- method and flags

ABLATIONS = {  # value of --ablate -> flags that it sets (Table 2b)
    "in": {"feature_batches": 0, "feature_batch_size": 0, "projection": "sum"},
    "prox": {"mu": 0.0}, "opt": {"projection": "sum"}}

# A client sends weights and features.
METHODS = {"fedin": Method(
    init=fedin_init, download=fedin_download, client_update=fedin_client_update,
    server_update=fedin_server_update, deploy=fedavg_deploy, networks=MODELS,
    averages=SYNCHRONOUS, defaults={
        "aggregation": "layerwise", "mu": MU, "noise": 0.0, "noise_on": "features",
        "projection": "simplified", "ablate": [], "feature_batch_size": FEATURE_BATCH_SIZE,
        "feature_batches": FEATURE_BATCHES})}


def add_arguments(add: Callable, number: Callable) -> None:
    """Add FedIN's own flags; see run.parser for add and number."""
    add("--noise", type=number(float, 0), help="noise on the features, as a multiple of their "
        f"standard deviation (default: 0; FedIN (+Noise), Sec. 4.3: {NOISE_LEVEL})")
    add("--noise-on", choices=["features", "upload"], help="place of the noise: in every forward "
        "pass (default; Sec. 4.3 of Eq. 5 and 6), or on the upload alone")
    add("--projection", choices=list(LOCAL_SHARE), help="gradient alleviation: Eq. 13 (default: "
        "simplified), Eq. 12 (exact), or none (sum)")
    add("--ablate", nargs="+", action="extend", choices=list(ABLATIONS), help="leave out IN "
        "training, the proximal term, the alleviation (Table 2b); one or more")
    add("--feature-batch-size", type=number(int, 2), help="features per batch, |S|, Fig. 6c "
        f"(default: {FEATURE_BATCH_SIZE})")
    add("--feature-batches", type=number(int, 1), help="batches of features sent and received, "
        f"Fig. 6d (default: {FEATURE_BATCHES})")
