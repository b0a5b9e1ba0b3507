"""AP-FL's semantic generator: the network, its losses, one training step, training and sampling.

Wan et al., Asynchronous Personalized Federated Learning through Global Memorization (AP-FL).
Equation numbers below are this paper's.  The embeddings A(y) of the classes are in semantics.py.

symbol      name             shape
z, y        z, y             (N, d_z) standard normal noise, (N,) labels
A(y)        semantics[y]     (N, d_A) embeddings of the labels' class names
x_hat       x                (N, C, 32, 32) synthetic samples, standardised like training images
alpha_k^y   weights          (teachers, classes)
n_s         generator_batch  samples per class and training step
lambda      balance          factor of L_cls in Eq. 9
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import graphs
from data import drawn
from models import adam, drawing_from

NOISE_DIM = 20  # d_z, the best value in the paper's Fig. 5
WIDTHS = (128, 64)  # channels of the convolutions, as in Fang et al.
BALANCE = 0.5  # lambda, AP-FL Sec. 4.1
DISTANCE = "rms"  # distance in Eq. 8; not as printed, see PAPERS.md
GENERATOR_LR = 1e-3  # learning rate of Adam, as in Fang et al. (not given in the paper)
SLICE = 450  # samples held in memory at a time in a training step, some 3 MB each
SAMPLE_BATCH = 250  # synthetic images made at a time
LAYOUT = torch.channels_last  # on a CPU, training is 1.2 and sampling 2.6 times as fast in it

# ------------------------------------------------------------------------------------------ network

class SemanticGenerator(nn.Module):
    """x_hat = G(z, A(y); omega), Eq. 11: noise and the label's embedding to a 32x32 image.

    semantics: (classes, d_A), kept as a buffer, so that the weights and A(y) travel together
    The last batch normalisation gives each channel mean 0 and standard deviation 1, as
    standardised training images have.  4,590,083 parameters for d_z = 20, d_A = 512, C = 3.
    Source: Fang et al., Data-Free Adversarial Distillation, arxiv.org/abs/1912.11006, with
    [z ; A(y)] in place of z as the input.
    """

    def __init__(self, semantics: Tensor, channels: int, noise_dim: int = NOISE_DIM):
        super().__init__()
        self.noise_dim, (wide, narrow) = noise_dim, WIDTHS
        self.register_buffer("semantics", semantics)
        self.network = nn.Sequential(
            # [z ; A(y)] to an image of 8 x 8
            nn.Linear(noise_dim + semantics.shape[1], wide * 8 * 8),
            nn.Unflatten(1, (wide, 8, 8)), nn.BatchNorm2d(wide),
            # 8 x 8 to 16 x 16
            nn.Upsample(scale_factor=2), nn.Conv2d(wide, wide, 3, padding=1),
            nn.BatchNorm2d(wide), nn.LeakyReLU(0.2, inplace=True),
            # 16 x 16 to 32 x 32
            nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, padding=1),
            nn.BatchNorm2d(narrow), nn.LeakyReLU(0.2, inplace=True),
            # Channels of the image, standardised
            nn.Conv2d(narrow, channels, 3, padding=1), nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.network(torch.cat([z, self.semantics[y]], dim=1))


def initial_generator(semantics: Tensor, channels: int, noise_dim: int,
                      rng: torch.Generator) -> SemanticGenerator:
    """A new generator with weights drawn from a copy of rng; no random stream advances."""
    with drawing_from(rng):
        return SemanticGenerator(semantics, channels, noise_dim).to(memory_format=LAYOUT)


def load_generator(state: dict[str, Tensor], channels: int, noise_dim: int) -> SemanticGenerator:
    """The generator, in evaluation mode, of a state dict; nothing is drawn."""
    semantics = state["semantics"]
    with torch.device("meta"):
        generator = SemanticGenerator(semantics, channels, noise_dim)
    generator = generator.to_empty(device=semantics.device).to(memory_format=LAYOUT)
    generator.load_state_dict(state)
    return generator.eval()


# ------------------------------------------------------------------------------------------- losses

def class_weights(counts: Tensor) -> Tensor:
    """alpha_k^y of Eq. 7, (clients, classes): client k's share of the images of class y.

    counts: (clients, classes) number of training images;  a class that nobody holds gets zeros
    """
    counts = counts.double()
    return (counts / counts.sum(dim=0).clamp(min=1)).float()


def counting_rows(y: Tensor, weights: Tensor) -> list[Tensor]:
    """Per teacher, the indices of the samples with alpha > 0 among the labels y (N,).

    A GPU is synchronised, since the number of indices depends on the labels: call it outside steps.
    """
    return [weight.nonzero().flatten() for weight in weights[:, y]]


def classification_loss(x: Tensor, y: Tensor, teachers: Sequence[Callable[[Tensor], Tensor]],
                        weights: Tensor, rows: Sequence[Tensor] | None = None) -> Tensor:
    """L_cls, Eq. 6 and 7: sum over teachers of alpha_k^y times cross entropy, mean over samples.

    x, y: (N, C, H, W) samples and (N,) labels
    weights: (teachers, classes) alpha
    rows: indices of the samples per teacher; None: counting_rows, which leaves out only zeros
    """
    if rows is None:
        rows = counting_rows(y, weights)
    total = x.new_zeros(())
    for teacher, weight, judged in zip(teachers, weights[:, y], rows):
        if len(judged):
            losses = F.cross_entropy(teacher(x[judged]), y[judged], reduction="none")
            total = total + (weight[judged] * losses).sum()
    return total / len(y)


def diversity_loss(x: Tensor, *, distance: str) -> Tensor:
    """L_diversity, Eq. 8: minus the mean distance between two samples of one class.

    x: (classes, n_s, ...) samples by class, n_s at least 2; Eq. 8 is averaged over the classes
    distance: "l2", as printed, or "rms", the root mean square, which is smaller by sqrt(C H W)
    The subgradient between two equal samples is 0, not NaN.
    """
    flat = x.flatten(2)
    unit = {"l2": 1.0, "rms": flat.shape[2] ** 0.5}[distance]
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / unit
    classes, n_s = flat.shape[:2]
    return -distances.sum() / (classes * n_s * (n_s - 1))


# -------------------------------------------------------------------------------- one training step

class Slice(NamedTuple):
    """Inputs of a training step, or of a part of it that fits into memory."""

    z: Tensor  # (classes * n_s, d_z) noise
    y: Tensor  # (classes, n_s) labels, one class per row
    rows: Sequence[Tensor]  # per teacher, the samples that count for it, see counting_rows


def generator_step(generator: nn.Module, optimizer: Optimizer,
                   teachers: Sequence[Callable[[Tensor], Tensor]], weights: Tensor,
                   slices: Sequence[Slice], *, balance: float, distance: str) -> Tensor:
    """Take one step on L_G = balance L_cls + (1 - balance) L_diversity, Eq. 9, without any data.

    generator: a network of (z, y), in training mode
    teachers: frozen networks in evaluation mode
    weights: (teachers, classes) alpha
    slices: the samples of the step, whose gradients add up, each slice by its share of samples
    Returns the detached losses (L_cls, L_diversity), (2,).
    Batch normalisation and the pairs of Eq. 8 see one slice at a time; the expected distance of a
    pair is the same.
    """
    total = sum(piece.y.numel() for piece in slices)
    losses = weights.new_zeros(2)
    optimizer.zero_grad()
    for piece in slices:
        # Samples of the slice and their losses
        y, share = piece.y.flatten(), piece.y.numel() / total
        x = generator(piece.z, y)
        l_cls = classification_loss(x, y, teachers, weights, piece.rows)
        l_diversity = diversity_loss(x.unflatten(0, piece.y.shape), distance=distance)

        # Gradient of Eq. 9, added to those of the slices before
        (share * (balance * l_cls + (1 - balance) * l_diversity)).backward()
        losses += share * torch.stack([l_cls, l_diversity]).detach()
    optimizer.step()
    return losses


# ---------------------------------------------------------------------------- training and sampling

def train_generator(generator: SemanticGenerator, teachers: Sequence[nn.Module], weights: Tensor,
                    rng: torch.Generator, *, generator_steps: int, generator_batch: int,
                    balance: float = BALANCE, distance: str = DISTANCE, lr: float = GENERATOR_LR,
                    report: Callable[[Tensor], object] | None = None) -> None:
    """Train the generator in place without any data (Eq. 9), and end in evaluation mode.

    teachers: clients' models (Eq. 6), or the global model alone; frozen in place
    weights: (teachers, classes) alpha with a positive entry; classes of sum 0 are skipped
    generator_batch: n_s, at least 2, samples per class and step (600 in Sec. 4.1)
    report: called after every step with its losses (L_cls, L_diversity), (2,)
    """
    # Networks and optimizer
    for teacher in teachers:
        teacher.eval().requires_grad_(False)
    generator.train()
    optimizer = adam(generator, lr, fused=True)

    # Labels of the slices, and the samples that count per teacher
    judged = weights.sum(dim=0).nonzero().flatten()
    sizes = slice_sizes(generator_batch, len(judged))
    labels = {size: judged[:, None].repeat(1, size) for size in sizes}
    rows = {size: counting_rows(y.flatten(), weights) for size, y in labels.items()}

    # Steps, each with noise of its own
    def step(*noise: Tensor) -> Tensor:
        slices = [Slice(z, labels[size], rows[size]) for z, size in zip(noise, sizes)]
        return generator_step(generator, optimizer, teachers, weights, slices, balance=balance,
                              distance=distance)

    take = graphs.replayed(step, generator, optimizer, reads=(teachers, weights, labels, rows),
                    key=(generator_step, balance, distance))
    for _ in range(generator_steps):
        losses = take(*(drawn(torch.randn, labels[size].numel(), generator.noise_dim, rng=rng,
                              device=weights.device) for size in sizes))
        if report is not None:
            report(losses)
    generator.eval()


def slice_sizes(n_s: int, classes: int) -> list[int]:
    """Divide n_s evenly, for at most SLICE samples per slice where 2 per class allow it."""
    count = max(1, min(math.ceil(n_s / max(2, SLICE // classes)), n_s // 2))
    return [n_s // count + (number < n_s % count) for number in range(count)]


@torch.no_grad()
def sample(generator: SemanticGenerator, y: Tensor, rng: torch.Generator) -> Tensor:
    """Synthetic images (N, C, 32, 32) of labels (N,), by the generator in evaluation mode.

    In training mode an image would depend on the other labels of its batch.
    """
    generator.eval()
    images = None  # all in one tensor from the start: joining parts would hold each image twice
    for start in range(0, len(y), SAMPLE_BATCH):
        labels = y[start:start + SAMPLE_BATCH]
        z = drawn(torch.randn, len(labels), generator.noise_dim, rng=rng, device=y.device)
        batch = generator(z, labels)
        if images is None:
            images = batch.new_empty(len(y), *batch.shape[1:])
        images[start:start + SAMPLE_BATCH] = batch
    return images
