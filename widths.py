"""Methods whose clients train sub-models cut out of one network: HeteroFL, FedRolex, ScaleFL.

In reading order: pre-activation ResNets of any width, with exits; sub-models as index sets into the
whole network; the three methods.  Numbers are of arxiv.org.

HeteroFL  Computation and Communication Efficient FL for Heterogeneous Clients, ICLR 2021,
          2010.01264
FedRolex  Model-Heterogeneous FL with Rolling Sub-Model Extraction, NeurIPS 2022, 2212.01548
ScaleFL   Resource-Adaptive Federated Learning with Heterogeneous Clients, CVPR 2023
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines import FEDAVG, distillation_loss, fedavg_init
from data import BATCHES, RATE, ClientData, Stream, batches
from federation import Client, Result, reset, run_steps
from models import Conv2d, State, copy_state, shapes

WIDTH_RESNETS = {  # options of WidthResNet
    # HeteroFL's networks begin with stride 1.  Stride 2 makes ResNet18 four times as fast.
    "resnet18": {"blocks": (2, 2, 2, 2), "bottleneck": False, "stem_stride": 2},
    "resnet152": {"blocks": (3, 8, 36, 3), "bottleneck": True, "stem_stride": 1},
}
RATES = ("1/16", "1/8", "1/4", "1/2", "1")  # widths e to a of HeteroFL's "a1-b1-c1-d1-e1"
EXITS = (1/2, 5/8, 3/4, 7/8, 1)  # share of the blocks before an exit of ScaleFL, for five levels
EXIT_RATES = {  # their widths; shallower levels are wider, for about HeteroFL's parameters
    "resnet18": ("1/4", "1/3", "1/2", "2/3", "1"), "resnet152": ("1/9", "3/16", "1/3", "3/5", "1")}
CLIP = 1.0  # bound of the gradient's norm as HeteroFL and FedRolex release it; ScaleFL: none
SELF_DISTILLATION = 0.0  # gamma of ScaleFL's released code, which trains BERT with 0.05
SCALEFL_TEMPERATURE = 3.0  # T of self-distillation
SCALEFL_WARM_UP = 0.25  # share of the rounds before self-distillation begins


# ------------------------------------------------------------------ networks of any width and depth

class Scaler(nn.Module):
    """Divide by the width rate in training (HeteroFL): sums over fewer channels are smaller."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return x / self.rate if self.training else x


def scaled_norm(width: int, rate: float) -> nn.Sequential:
    """Scaler, static batch normalisation, ReLU."""
    # Static (HeteroFL): by the batch's statistics, keeping none; see models.collect_statistics.
    return nn.Sequential(Scaler(rate), nn.BatchNorm2d(width, track_running_stats=False), nn.ReLU())


class PreActivationBlock(nn.Module):
    """A residual block that normalises before each convolution; a bottleneck has three of them."""

    def __init__(self, width_in: int, width: int, stride: int, rate: float, bottleneck: bool):
        super().__init__()
        self.norm = scaled_norm(width_in, rate)
        self.width_out = 4 * width if bottleneck else width
        if bottleneck:
            self.body = nn.Sequential(
                Conv2d(width_in, width, 1), scaled_norm(width, rate),
                Conv2d(width, width, 3, stride=stride, padding=1), scaled_norm(width, rate),
                Conv2d(width, self.width_out, 1))
        else:
            self.body = nn.Sequential(
                Conv2d(width_in, width, 3, stride=stride, padding=1), scaled_norm(width, rate),
                Conv2d(width, width, 3, padding=1))

        # The shortcut, of blocks that change size or width
        self.shortcut = None
        if stride != 1 or width_in != self.width_out:
            self.shortcut = Conv2d(width_in, self.width_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(x)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.body(out) + shortcut


class WidthResNet(nn.Module):
    """HeteroFL's pre-activation ResNet at a rate of its width, with one exit or with ScaleFL's.

    blocks: residual blocks in each of the four stages, of 64, 128, 256 and 512 channels x rate
    exits: number of blocks before each head (normalisation, pooling, fc), ascending; None: one head
    intermediate is a sequence of sections, and classifier has a head for each of them.
    Without exits and at rate 1, ResNet152 has 58,148,938 parameters (three channels, ten classes).
    """

    def __init__(self, channels: int, num_classes: int, *, blocks: Sequence[int], bottleneck: bool,
                 stem_stride: int, rate: float = 1.0, exits: Sequence[int] | None = None):
        super().__init__()
        widths = [math.ceil(rate * full) for full in (64, 128, 256, 512)]
        self.extractor = nn.Sequential(OrderedDict(conv1=Conv2d(
            channels, widths[0], 3, stride=stem_stride, padding=1)))

        # All blocks in a row, then cut into sections at the exits
        body, width_in = [], widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths)):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                body.append(PreActivationBlock(width_in, width, stride, rate, bottleneck))
                width_in = body[-1].width_out
        ends = exits or (len(body),)
        self.intermediate = nn.Sequential(*(nn.Sequential(*body[start:end])
                                            for start, end in pairwise((0, *ends))))

        # A head per section
        self.classifier = nn.ModuleList(nn.Sequential(OrderedDict(
            norm=scaled_norm(body[end - 1].width_out, rate), avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(), fc=nn.Linear(body[end - 1].width_out, num_classes)))
            for end in ends)
        # As in HeteroFL's released code
        for head in self.classifier:
            nn.init.zeros_(head.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[-1](self.intermediate(self.extractor(x)))

    def exit_logits(self, x: Tensor) -> list[Tensor]:
        """Logits (B, classes) of every exit, first to last."""
        x, logits = self.extractor(x), []
        for section, head in zip(self.intermediate, self.classifier):
            x = section(x)
            logits.append(head(x))
        return logits


def width_networks(net: str) -> dict[str, Callable]:
    """Architecture -> constructor(channels, num_classes) of HeteroFL's widths, small to large."""
    return {f"{net}-{rate}": partial(WidthResNet, rate=float(Fraction(rate)), **WIDTH_RESNETS[net])
            for rate in RATES}


def exit_networks(net: str) -> dict[str, Callable]:
    """Architecture -> constructor(channels, num_classes) of ScaleFL's levels, small to large."""
    num_blocks = sum(WIDTH_RESNETS[net]["blocks"])
    ends = [math.ceil(share * num_blocks) for share in EXITS]
    return {f"{net}-{rate}-exit{level}": partial(WidthResNet, rate=float(Fraction(rate)),
                                                 exits=ends[:level], **WIDTH_RESNETS[net])
            for level, rate in enumerate(EXIT_RATES[net], start=1)}


# Values of --model -> architecture -> constructor
MODELS = {f"{net}-widths": width_networks(net) for net in WIDTH_RESNETS}
EXIT_MODELS = {f"{net}-widths": exit_networks(net) for net in WIDTH_RESNETS}
CONSTRUCTORS = {arch: constructor for models in (MODELS, EXIT_MODELS)
                for networks in models.values() for arch, constructor in networks.items()}


# --------------------------------------------------------------------------------------- sub-models

IndexSets = dict[str, tuple[Tensor, ...]]  # name -> indices along the first one or two dimensions


def index_sets(whole: State, part: State, *, start: int = 0,
               classes: Tensor | None = None) -> IndexSets:
    """Find the place of a narrower network's weights in those of the whole one.

    A sub-model has n consecutive channels of a layer's C: (start + i) mod C for i < n.  Tensors to
    be added, or fed on, have equal C and n, so their channels agree.
    part: weights of the sub-model; only names, a subset of whole's, and shapes (n) are read
    start: 0 in HeteroFL (Algorithm 1), the number of finished rounds in FedRolex (Algorithm 1)
    classes: the rows of fc that part holds, if not all
    """
    sets = {}
    for name, tensor in part.items():
        # (start + i) mod C, of outputs and, where the weight has a second dimension, of inputs
        device = whole[name].device
        indices = [(torch.arange(n, device=device) + start) % size
                   for n, size in zip(tensor.shape[:2], whole[name].shape)]

        # Image channels and classes are never cut.
        if name.startswith("extractor."):
            indices[1] = torch.arange(tensor.shape[1], device=device)
        if name.split(".")[-2] == "fc":
            indices[0] = (torch.arange(len(whole[name]), device=device) if classes is None
                          else classes)
        sets[name] = tuple(indices)
    return sets


def grid(indices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One or two index sets in the form that selects every combination of their elements."""
    return indices if len(indices) == 1 else (indices[0][:, None], indices[1])


def extract(whole: State, sets: IndexSets) -> State:
    """Copy a sub-model's weights out of the whole network's."""
    return {name: whole[name][grid(indices)] for name, indices in sets.items()}


@cache
def submodel_shapes(arch: str, channels: int, num_classes: int) -> State:
    """State dict of a sub-model without content (meta tensors)."""
    return shapes(partial(CONSTRUCTORS[arch], channels, num_classes))


def submodel(server: dict, arch: str) -> State:
    """Cut the weights of an architecture out of the whole network's."""
    (whole,) = server["weights"].values()
    part = submodel_shapes(arch, whole["extractor.conv1.weight"].shape[1],
                           len(whole["classifier.0.fc.bias"]))
    return extract(whole, index_sets(whole, part, start=server["start"]))


def average_coordinates(old: State, uploads: Mapping[int, State], counts: Mapping[int, int],
                        sets: Mapping[int, IndexSets]) -> State:
    """Average each coordinate over the clients that hold it, in the places of sets (HeteroFL)."""
    new = {}
    for name, tensor in old.items():
        total = torch.zeros_like(tensor, dtype=torch.float64)
        count = torch.zeros_like(total)
        for k in sorted(uploads):
            if name in uploads[k]:
                place = grid(sets[k][name])
                total[place] += counts[k] * uploads[k][name].double()
                count[place] += counts[k]

        # Coordinates that no client holds keep their old value.
        new[name] = torch.where(count > 0, total / count, tensor).to(tensor.dtype)
    return new


# ----------------------------------------------------------------------------------------- HeteroFL

class WidthUpdate(NamedTuple):
    """Upload of a client."""

    weights: State  # its sub-model's; in the last layer only the rows of its own classes
    num_samples: int  # n_k
    classes: Tensor | None  # classes of the rows of fc, int64, ascending; None: all


def heterofl_init(weights: dict[str, State]) -> dict:
    """Weights of the whole network, and the first channel of sub-models, which FedRolex moves."""
    arch, whole = list(weights.items())[-1]
    return {**fedavg_init({arch: whole}), "start": 0}


def heterofl_assign(client: Client, architectures: Sequence[str], stream: Stream) -> Client:
    """Draw another rate for the client in every round, uniformly ("dynamic")."""
    drawn = torch.randint(len(architectures), (), generator=stream(RATE))
    return client._replace(arch=architectures[drawn])


def heterofl_download(server: dict, client: Client, stream: Stream) -> State:
    """Send the sub-model of the client's rate (Algorithm 1)."""
    return submodel(server, client.arch)


def heterofl_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, absent: Tensor, *,
                  clip: float = 1.0) -> Tensor:
    """One step on the masked cross entropy; return the detached loss.

    absent: (C,) bool, classes that the client does not hold;  clip: bound of the gradient's norm
    """
    # 0 as in the released code: -inf would leave a client of one class with nothing to learn.
    loss = F.cross_entropy(model(x).masked_fill(absent, 0), y)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach()


def heterofl_client_update(model: nn.Module, optimizer: Optimizer, received: State,
                           data: ClientData, stream: Stream, *, local_epochs: int,
                           batch_size: int) -> Result:
    """Train the sub-model; send it, in the last layer only the rows of the client's own classes."""
    # The mask of absent classes
    reset(model, optimizer, received)
    classes = data.labels[data.indices].unique()
    num_classes = len(received["classifier.0.fc.bias"])
    absent = torch.ones(num_classes, dtype=torch.bool, device=classes.device)
    absent[classes] = False

    # Training
    loss, samples = run_steps(heterofl_step, model, optimizer, data,
                              batches(data, batch_size, local_epochs, stream(BATCHES)), absent,
                              clip=CLIP)
    weights = {name: tensor[classes] if name.split(".")[-2] == "fc" else tensor
               for name, tensor in copy_state(model).items()}
    return Result(WidthUpdate(weights, len(data.indices), classes), loss, samples)


def heterofl_server_update(server: dict, updates: Mapping[int, WidthUpdate]) -> dict:
    """Average every coordinate over the clients that hold it."""
    ((arch, whole),) = server["weights"].items()
    sets = {k: index_sets(whole, update.weights, start=server["start"], classes=update.classes)
            for k, update in updates.items()}
    new = average_coordinates(whole, {k: update.weights for k, update in updates.items()},
                              {k: update.num_samples for k, update in updates.items()}, sets)
    return {**server, "weights": {arch: new}}


def heterofl_deploy(server: dict, client: Client, kept: None) -> tuple[str, State]:
    """A client uses the sub-model of its fixed architecture, not of the rate drawn in a round."""
    return client.arch, submodel(server, client.arch)


# ----------------------------------------------------------------------------------------- FedRolex

def fedrolex_server_update(server: dict, updates: Mapping[int, WidthUpdate]) -> dict:
    """HeteroFL's average; sub-models then begin one channel further (Algorithm 1)."""
    # Even the smallest sub-models train all channels in turn.  The released code rolls backwards.
    server = heterofl_server_update(server, updates)
    return {**server, "start": server["start"] + 1}


# ------------------------------------------------------------------------------------------ ScaleFL

class ScaledDownload(NamedTuple):
    """Download of a client."""

    weights: State
    distils: bool  # whether self-distillation has begun


def scalefl_init(weights: dict[str, State]) -> dict:
    """Weights of the whole network with all its exits, and the number of finished rounds."""
    return {**heterofl_init(weights), "round": 0}


def scalefl_download(server: dict, client: Client, stream: Stream, *,
                     rounds: int) -> ScaledDownload:
    """Send the sub-model of the client's level: narrower, and ending at an earlier exit."""
    # With more --rounds, self-distillation begins later.
    return ScaledDownload(submodel(server, client.arch), server["round"] > SCALEFL_WARM_UP * rounds)


def exits_loss(logits: Sequence[Tensor], y: Tensor, gamma: float, temperature: float) -> Tensor:
    """sum_j j l_j / (m (m + 1) / 2) over exits 1..m, l_j the cross entropy of logits j, (B, C).

    With gamma, all but the last exit learn from the last too: l_j + gamma T^2 KL(last || j) of
    distributions softened by the temperature T, mean over samples.
    """
    # The released code also divides KL by the number of classes, and lets the teacher learn.
    m, total = len(logits), 0.0
    for j, student in enumerate(logits, start=1):
        loss = F.cross_entropy(student, y)
        if gamma > 0 and j < m:
            loss = loss + gamma * temperature**2 * distillation_loss(student, logits[-1].detach(),
                                                                     temperature)
        total = total + j * loss
    return total / (m * (m + 1) / 2)


def scalefl_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, *, gamma: float,
                 temperature: float = SCALEFL_TEMPERATURE, clip: float = CLIP) -> Tensor:
    """One step of all exits on exits_loss; return the last exit's detached cross entropy."""
    logits = model.exit_logits(x)
    optimizer.zero_grad()
    exits_loss(logits, y, gamma, temperature).backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return F.cross_entropy(logits[-1].detach(), y)


def scalefl_client_update(model: nn.Module, optimizer: Optimizer, received: ScaledDownload,
                          data: ClientData, stream: Stream, *, local_epochs: int, batch_size: int,
                          self_distillation: float = SELF_DISTILLATION) -> Result:
    """Train all exits of the sub-model together; self_distillation: gamma, once it has begun."""
    reset(model, optimizer, received.weights)
    gamma = self_distillation if received.distils else 0.0
    loss, samples = run_steps(scalefl_step, model, optimizer, data,
                              batches(data, batch_size, local_epochs, stream(BATCHES)),
                              gamma=gamma)
    return Result(WidthUpdate(copy_state(model), len(data.indices), None), loss, samples)


def scalefl_server_update(server: dict, updates: Mapping[int, WidthUpdate]) -> dict:
    """HeteroFL's average; blocks and exits are averaged over the clients whose level has them."""
    server = heterofl_server_update(server, updates)
    return {**server, "round": server["round"] + 1}


# ------------------------------------------------------------------------------- methods and flags

HETEROFL = FEDAVG._replace(
    init=heterofl_init, download=heterofl_download, client_update=heterofl_client_update,
    server_update=heterofl_server_update, deploy=heterofl_deploy, networks=MODELS, averages=(),
    assign=heterofl_assign, defaults={"model": "resnet18-widths"},
    in_setting={"fedin": {"model": "resnet152-widths"}})

METHODS = {
    # Diao et al. 2021, Alam et al. 2022.  A client sends a sub-model.
    "heterofl": HETEROFL,
    "fedrolex": HETEROFL._replace(server_update=fedrolex_server_update),
    # Ilhan et al. 2023.  A client sends a sub-model with its exits.
    "scalefl": HETEROFL._replace(
        init=scalefl_init, download=scalefl_download, client_update=scalefl_client_update,
        server_update=scalefl_server_update, assign=None, networks=EXIT_MODELS,
        defaults=HETEROFL.defaults | {"self_distillation": SELF_DISTILLATION}),
}


def add_arguments(add: Callable, number: Callable) -> None:
    """Add ScaleFL's own flag; see run.parser for add and number."""
    add("--self-distillation", type=number(float, 0), help="scalefl: gamma, weight of what earlier "
        "exits learn from the last, once more than a quarter of the rounds is finished (default: "
        f"{SELF_DISTILLATION:g}, as released)")
