"""FedGen: clients learn from latents that the server's generator makes.

Zhu et al., Data-Free Knowledge Distillation for Heterogeneous Federated Learning, ICML 2021,
arxiv.org/abs/2105.10056, as its released code has it.

In reading order: the generator, from noise and labels to inputs of a network's last layer
(latents); its training on the server; one round.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import graphs
from baselines import (APFL_SETTING, FEDAVG, QUICK_APFL, SYNCHRONOUS, distillation_loss,
                       fedavg_init, fedavg_step, with_class_counts)
from data import (BATCHES, GENERATOR_NOISE, GENERATOR_WEIGHTS, LATENT, ClientData, Stream, batches,
                  drawn)
from federation import Client, LabelledUpdate, Result, Update, reset, run_steps
from generator import class_weights, classification_loss
from models import State, adam, copy_state, drawing_from, load_network

NOISE_DIM, HIDDEN = 64, 512  # sizes of the generator; the paper has none for this CNN
LATENT_LR, LATENT_WEIGHT_DECAY = 3e-4, 1e-2  # Adam's, in the released code for MNIST
WEIGHT = 10.0  # weight of both client terms before any decay
MINIMUM_WEIGHT = 1e-4  # lower bound of these weights
DECAY = 0.98  # factor per round of these weights, and of the generator's learning rate
STEPS = 50  # steps of the generator per round
LATENT_BATCH = 32  # latents per step, on the server as on a client


# ---------------------------------------------------------------------------------- the generator

class LatentGenerator(nn.Module):
    """Noise (N, d_z) in [0, 1) and labels (N,) to inputs (N, width) of a network's last layer."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.network = nn.Sequential(nn.Linear(NOISE_DIM + num_classes, HIDDEN),
                                     nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.network(torch.cat([z, F.one_hot(y, self.num_classes)], dim=1))


def initial_latent_generator(num_classes: int, width: int, rng: torch.Generator) -> LatentGenerator:
    """Build a generator with weights drawn from a copy of rng; no random stream advances."""
    with drawing_from(rng):
        return LatentGenerator(num_classes, width)


def load_latent_generator(state: State) -> LatentGenerator:
    """Build the generator of a state dict, in evaluation mode; nothing is drawn."""
    inner, outer = state["network.0.weight"], state["network.3.weight"]
    make = partial(LatentGenerator, inner.shape[1] - NOISE_DIM, outer.shape[0])
    return load_network(make, state).eval()


def latent_noise(count: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """Draw uniform noise (count, d_z)."""
    return drawn(torch.rand, count, NOISE_DIM, rng=rng, device=device)


def latent_diversity_loss(z: Tensor, latents: Tensor) -> Tensor:
    """exp(-mean_ij |z_i - z_j|^2 |latent_i - latent_j|) for noise (N, d_z), latents (N, width).

    Both distances are means over coordinates.  Far noise has to make far latents.
    """
    noise_distance = (z[:, None] - z[None]).square().mean(dim=2)
    latent_distance = (latents[:, None] - latents[None]).abs().mean(dim=2)
    return (-noise_distance * latent_distance).mean().exp()


def latent_generator_step(generator: LatentGenerator, optimizer: Optimizer, z: Tensor, y: Tensor,
                          heads: Sequence[Callable], weights: Tensor) -> Tensor:
    """One step on sum_k w_k^y CE_k + L_diversity; return the detached loss.

    z, y: noise (N, d_z) and labels (N,);  heads: the clients' last layers
    weights: (heads, classes), w_k^y, from class_weights
    """
    # The paper's third term, against the global model, has weight 0 in the released code.
    every_row = [torch.arange(len(y), device=y.device)] * len(heads)
    latents = generator(z, y)
    loss = (classification_loss(latents, y, heads, weights, every_row)
            + latent_diversity_loss(z, latents))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_latent_generator(generator: LatentGenerator, optimizer_state: dict | None,
                           heads: Sequence[Callable], weights: Tensor, rng: torch.Generator, *,
                           lr: float, steps: int = STEPS) -> dict:
    """Train the generator in place, so that the clients' last layers recognise its latents.

    optimizer_state: returned after the round before, or None
    """
    # The optimiser resumes from a copy of its state, since it would change the given tensors.
    optimizer = adam(generator, lr, weight_decay=LATENT_WEIGHT_DECAY)
    if optimizer_state is not None:
        own = {name: optimizer.param_groups[0][name] for name in ("lr", "capturable")}
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        optimizer.param_groups[0].update(own)
    take = graphs.replayed(partial(latent_generator_step, generator, optimizer, heads=heads,
                            weights=weights), generator, optimizer, reads=(heads, weights),
                    key=(latent_generator_step,))

    # Labels, of classes that a client holds, are drawn before noise, both from one stream.
    generator.train()
    classes = weights.sum(dim=0).nonzero().flatten()
    for _ in range(steps):
        labels = drawn(partial(torch.randint, len(classes)), (LATENT_BATCH,), rng=rng,
                       device=classes.device)
        z = latent_noise(LATENT_BATCH, rng, classes.device)
        take(z, classes[labels])
    generator.eval()
    return optimizer.state_dict()


# ---------------------------------------------------------------------------------------- one round

class FedGenDownload(NamedTuple):
    """Download of a client."""

    weights: State
    generator: State | None  # None in the first round
    classes: Tensor | None  # classes that the generator knows, int64
    round: int  # finished rounds


def fedgen_init(weights: dict[str, State]) -> dict:
    """Global weights; the generator, its optimiser and its classes come with round 1."""
    return {**fedavg_init(weights), "generator": None, "optimizer": None, "classes": None,
            "round": 0}


def fedgen_download(server: dict, client: Client, stream: Stream) -> FedGenDownload:
    """Send the global weights and the latent generator."""
    return FedGenDownload(server["weights"][client.arch], server["generator"], server["classes"],
                          server["round"])


def fedgen_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, z: Tensor,
                random_y: Tensor, generator: LatentGenerator, weights: Tensor) -> Tensor:
    """One step on CE(x) + w_1 CE(latents) + w_2 KL(q || p); return detached CE(x).

    z: noise (L + B, d_z), for latents of L random labels, random_y (L,), and of y (B,)
    generator: frozen, in evaluation mode;  weights: (2,), w_1 and w_2
    CE(latents) is the last layer's on the latents of random labels, p the prediction for an image,
    and q, detached, that for a latent of the image's class.
    """
    # Latents
    with torch.no_grad():
        latents = generator(z, torch.cat([random_y, y]))

    # Cross entropy of the images
    logits = model(x)
    loss = F.cross_entropy(logits, y)

    # Terms by latents
    synthetic, like_y = model.classifier.fc(latents).split([len(random_y), len(y)])
    matching = distillation_loss(logits, like_y.detach())
    objective = (loss + weights[0] * F.cross_entropy(synthetic, random_y)
                 + weights[1] * matching)
    optimizer.zero_grad()
    objective.backward()
    optimizer.step()
    return loss.detach()


def fedgen_client_update(model: nn.Module, optimizer: Optimizer, received: FedGenDownload,
                         data: ClientData, stream: Stream, *, local_epochs: int,
                         batch_size: int) -> Result:
    """FedAvg's update with terms by generated latents (Algorithm 1); in round 1 it is FedAvg's."""
    reset(model, optimizer, received.weights)
    rows = batches(data, batch_size, local_epochs, stream(BATCHES))
    if received.generator is None:
        loss, samples = run_steps(fedavg_step, model, optimizer, data, rows)
    else:
        # The first weight's factor is from the released code.
        weight = max(MINIMUM_WEIGHT, WEIGHT * DECAY**received.round)
        weights = torch.tensor([LATENT_BATCH / batch_size * weight, weight])
        loss, samples = run_steps(
            fedgen_step, model, optimizer, data,
            with_noise(rows, received.classes, stream(LATENT)),
            load_latent_generator(received.generator), weights.to(data.images.device))
    result = Result(Update(copy_state(model), len(data.indices)), loss, samples)
    return with_class_counts(result, data)


def with_noise(batches: Iterator, classes: Tensor, rng: torch.Generator) -> Iterator[tuple]:
    """Batches (rows, z, random_y): noise and random labels for latents; see fedgen_step."""
    for (rows,) in batches:
        labels = drawn(partial(torch.randint, len(classes)), (LATENT_BATCH,), rng=rng,
                       device=rows.device)
        yield rows, latent_noise(LATENT_BATCH + len(rows), rng, rows.device), classes[labels]


def fedgen_distil(server: dict, updates: Mapping[int, LabelledUpdate], network: Callable,
                  stream: Stream) -> dict:
    """Train the generator so that the clients' last layers recognise its latents (Algorithm 1)."""
    # Teachers: the clients' last layers, weighted per class by w_k^y = n_k^y / sum_k n_k^y
    uploads = [updates[k] for k in sorted(updates)]
    heads = [partial(F.linear, weight=upload.weights["classifier.fc.weight"],
                     bias=upload.weights["classifier.fc.bias"]) for upload in uploads]
    counts = torch.stack([upload.class_counts for upload in uploads])

    # The generator of the round before, or a new one
    if server["generator"] is None:
        shape = uploads[0].weights["classifier.fc.weight"].shape
        generator = initial_latent_generator(*shape, stream(GENERATOR_WEIGHTS)).to(counts.device)
    else:
        generator = load_latent_generator(server["generator"])

    # Training
    optimizer = train_latent_generator(
        generator, server["optimizer"], heads, class_weights(counts), stream(GENERATOR_NOISE),
        lr=LATENT_LR * DECAY**server["round"])
    return {**server, "generator": copy_state(generator), "optimizer": optimizer,
            "classes": counts.sum(dim=0).nonzero().flatten(), "round": server["round"] + 1}


# --------------------------------------------------------------------------------------- the method

# Zhu et al. 2021.  A client sends weights and class counts, and receives the generator.
METHODS = {"fedgen": FEDAVG._replace(
    init=fedgen_init, download=fedgen_download, client_update=fedgen_client_update,
    distil=fedgen_distil, averages=SYNCHRONOUS, defaults=FEDAVG.defaults | APFL_SETTING,
    in_setting={"quick": QUICK_APFL})}
