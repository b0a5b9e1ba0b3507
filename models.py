"""Networks and the arithmetic of their weights.  A leaf: knows nothing of rounds or data sets.

In reading order: the CNN of AP-FL and the ResNets of FedIN; ResNets of any width, with exits, for
HeteroFL, FedRolex and ScaleFL; which architecture a client has; weights as state dicts: copies,
sizes, averages, interpolation; sub-models as index sets into a larger network; prediction.

Every network is classifier(intermediate(extractor(x))).  The three parts are submodules of these
names, so the part that a weight belongs to is the first word of its name.  (Of a network with
several exits, intermediate is a sequence of sections, and classifier has a head for each.)
"""

import ctypes
import functools
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]  # the weights of a network: parameters and buffers by name

RESNET_BLOCKS = {  # residual blocks in the four stages; each net contains the one before it
    "resnet10": (1, 1, 1, 1),
    "resnet14": (1, 1, 2, 2),
    "resnet18": (2, 2, 2, 2),
    "resnet22": (2, 2, 3, 3),
    "resnet26": (3, 3, 3, 3),
}
WIDTH_RESNETS = {  # pre-activation nets that are cut by width; the options of WidthResNet
    # HeteroFL's nets begin with stride 1; 2 makes ResNet18 four times as fast, for use on a CPU.
    "resnet18": {"blocks": (2, 2, 2, 2), "bottleneck": False, "stem_stride": 2},
    "resnet152": {"blocks": (3, 8, 36, 3), "bottleneck": True, "stem_stride": 1},
}
RATES = ("1/16", "1/8", "1/4", "1/2", "1")  # widths e to a of HeteroFL's "a1-b1-c1-d1-e1"
EXITS = (1/2, 5/8, 3/4, 7/8, 1)  # share of the blocks before an exit of ScaleFL, for five levels
EXIT_RATES = {  # their widths: each level then has nearly as many parameters as HeteroFL's
    "resnet18": ("1/4", "1/3", "1/2", "2/3", "1"), "resnet152": ("1/9", "3/16", "1/3", "3/5", "1")}
MODELS = {  # what --model offers: the architectures of a federation, small to large
    "cnn": ("cnn",),
    "resnets": tuple(RESNET_BLOCKS),
    **{name: (name,) for name in RESNET_BLOCKS},
    **{f"{net}-widths": tuple(f"{net}-{rate}" for rate in RATES) for net in WIDTH_RESNETS},
}
NETWORKS = {  # which of these a method can work with
    "all but -widths": tuple(name for name in MODELS if not name.endswith("-widths")),
    "cnn, one ResNet": tuple(name for name in MODELS if len(MODELS[name]) == 1),
    "-widths": tuple(name for name in MODELS if name.endswith("-widths"))}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # of batch normalisation
TEST_BATCH = 128  # images; fastest on a CPU between 128 and 256, at 1,024 twice as slow

# ----------------------------------------------------------------------------------------- networks

class CNN(nn.Module):
    """Two convolutions and two fully connected layers, for 32x32 images (AP-FL, Sec. 4.1).

    The first convolution block is the extractor, the second with the 512-unit layer the
    intermediate layers.  878,538 parameters for three channels and ten classes, no buffers.
    projection: see classifier_layers
    """

    def __init__(self, channels: int, num_classes: int, *, projection: int | None = None):
        super().__init__()
        self.extractor = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(channels, 32, 5),  # 32 -> 28
            relu=nn.ReLU(inplace=True),
            maxpool=nn.MaxPool2d(2),  # 28 -> 14
        ))
        self.intermediate = nn.Sequential(OrderedDict(
            conv2=nn.Conv2d(32, 64, 5),  # 14 -> 10
            relu2=nn.ReLU(inplace=True),
            maxpool=nn.MaxPool2d(2),  # 10 -> 5
            flatten=nn.Flatten(),  # 64 * 5 * 5 = 1600
            fc1=nn.Linear(1600, 512),
            relu3=nn.ReLU(inplace=True),
        ))
        self.classifier = nn.Sequential(classifier_layers(512, num_classes, projection))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.intermediate(self.extractor(x)))


WHOLE = (slice(None),) * 4  # of a convolution's weight (out, in, height, width)


class Conv2d(nn.Conv2d):
    """A convolution without bias that does not multiply zero padding.

    Where a ResNet's last stage works on 1x1 maps, a 3x3 kernel with padding 1 meets the image with
    its centre alone, and the convolution is a matrix product with that tap; see live_taps.
    Weights, names and results are those of torch's convolution, but for rounding.

    The other taps have no gradient, ever.  trim() leaves them out of the parameter, so that
    gradients, optimisers and proximal terms need not walk over them (more than half of ResNet18),
    nor does weight decay shrink them.  state_dict() has whole kernels all the same, those taps as
    they were loaded.
    """

    def __init__(self, width_in: int, width: int, size: int, stride: int = 1, padding: int = 0):
        super().__init__(width_in, width, size, stride=stride, padding=padding, bias=False)
        self.trimmed_to, self.loaded = WHOLE, None  # taps in the parameter, and the whole kernel

    def taps(self, height: int, width: int) -> tuple[tuple[slice, ...], tuple[int, int]]:
        """Where in a kernel the taps are that meet a map of this size, and their padding."""
        (rows, above), (columns, left) = (live_taps(*along) for along in zip(
            (height, width), self.kernel_size, self.stride, self.padding))
        return (*WHOLE[:2], rows, columns), (above, left)

    def trim(self, height: int, width: int) -> None:
        """Keep of the parameter the taps that meet maps of this size, the only one it then fits."""
        self.trimmed_to, _ = self.taps(height, width)
        self.weight = nn.Parameter(self.weight.detach()[self.trimmed_to].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        weight, size = self.weight, x.shape[2:]
        live, padding = self.taps(*size)
        if self.trimmed_to == WHOLE and live != WHOLE:
            weight = weight[live]
        elif live != self.trimmed_to:
            raise ValueError(f"the network was trimmed to images of another size (a map is {size})")
        if padding == (0, 0) and size == weight.shape[2:]:  # the kernel has one place on the map
            return F.linear(x.flatten(1), weight.flatten(1))[..., None, None]
        return F.conv2d(x, weight, None, self.stride, padding)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        if self.trimmed_to != WHOLE:
            self.loaded = state_dict[prefix + "weight"]
            state_dict = state_dict | {prefix + "weight": self.loaded[self.trimmed_to]}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.trimmed_to != WHOLE:
            whole = self.loaded.detach().clone()
            whole[self.trimmed_to] = self.weight.detach()
            destination[prefix + "weight"] = whole


@functools.cache
def live_taps(size: int, kernel: int, stride: int, padding: int) -> tuple[slice, int]:
    """The taps of a kernel, along one side, that meet a map of this size, and their padding.

    The map has size pixels and padding zeros on either side.  Tap j of the output's pixel i is
    multiplied with pixel i * stride + j - padding.
    """
    outputs = (size + 2 * padding - kernel) // stride + 1
    met = {j for i in range(outputs) for j in range(kernel) if 0 <= i * stride + j - padding < size}
    if not met or len(met) == kernel:
        return slice(None), padding
    first, last = min(met), max(met)
    before = padding - first
    after = (outputs - 1) * stride + last - padding - (size - 1)
    if not 0 <= before - after < stride:  # as much padding on both sides would give another size
        return slice(None), padding
    return slice(first, last + 1), before


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them (He et al., 2016); torchvision's names.

    downsample: the shortcut where size or width change, else None
    """

    def __init__(self, width_in: int, width: int, stride: int = 1,
                 downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = Conv2d(width_in, width, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out.add_(shortcut))


class ResNet(nn.Module):
    """A ResNet of BasicBlocks with any depth, in FedIN's three parts (FedIN, Fig. 2).

    Weights have torchvision's names behind those of the parts, so its ResNet18 can be loaded.
    blocks: residual blocks in each of the four stages
    cut: the last layer of the extractor, "stem" or "layer1" (PAPERS.md)
    projection: see classifier_layers
    """

    def __init__(self, blocks: Sequence[int], channels: int, num_classes: int, *,
                 cut: str = "stem", projection: int | None = None):
        super().__init__()
        stem = OrderedDict(
            conv1=Conv2d(channels, 64, 7, stride=2, padding=3),  # 32 -> 16
            bn1=nn.BatchNorm2d(64),
            relu=nn.ReLU(inplace=True),
            maxpool=nn.MaxPool2d(3, stride=2, padding=1),  # 16 -> 8
        )
        stages = OrderedDict(
            layer1=resnet_stage(64, 64, blocks[0], stride=1),  # 8 x 8
            layer2=resnet_stage(64, 128, blocks[1], stride=2),  # 4 x 4
            layer3=resnet_stage(128, 256, blocks[2], stride=2),  # 2 x 2
            layer4=resnet_stage(256, 512, blocks[3], stride=2),  # 1 x 1
        )
        if cut == "layer1":
            stem["layer1"] = stages.pop("layer1")
        self.extractor = nn.Sequential(stem)
        self.intermediate = nn.Sequential(stages)
        self.classifier = nn.Sequential(OrderedDict(
            avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
            **classifier_layers(512, num_classes, projection)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.intermediate(self.extractor(x)))


def resnet_stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """One stage of a ResNet: BasicBlocks of one width; the first changes size and width."""
    shortcut = None
    if stride != 1 or width_in != width:
        shortcut = nn.Sequential(Conv2d(width_in, width, 1, stride=stride),
                                 nn.BatchNorm2d(width))
    first = BasicBlock(width_in, width, stride, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))


def classifier_layers(width: int, num_classes: int,
                      projection: int | None) -> OrderedDict[str, nn.Module]:
    """The last layer, fc, and before it, where not None, MOON's projection head of that width."""
    layers = OrderedDict()
    if projection is not None:
        layers["projection"] = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True),
                                             nn.Linear(width, projection))
    layers["fc"] = nn.Linear(projection or width, num_classes)
    return layers


def representation(model: nn.Module, x: Tensor) -> Tensor:
    """What the last layer of a CNN or ResNet receives, (B, width)."""
    return model.classifier[:-1](model.intermediate(model.extractor(x)))


# ------------------------------------------------------------------ networks of any width and depth

class Scaler(nn.Module):
    """Divide by the width rate in training (HeteroFL): sums over fewer channels are smaller."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return x / self.rate if self.training else x


def scaled_norm(width: int, rate: float) -> nn.Sequential:
    """Scaler, static batch normalisation, ReLU.

    Static (HeteroFL): by the statistics of the batch, keeping none; see collect_statistics.
    """
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
                Conv2d(width, width, 3, stride=stride, padding=1),
                scaled_norm(width, rate),
                Conv2d(width, self.width_out, 1))
        else:
            self.body = nn.Sequential(
                Conv2d(width_in, width, 3, stride=stride, padding=1),
                scaled_norm(width, rate),
                Conv2d(width, width, 3, padding=1))
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
    exits: after how many blocks there is a head (normalisation, pooling, fc); the network ends with
        the last of them.  None: one head, after all blocks
    Without exits and at rate 1, ResNet152 has 58,148,938 parameters (three channels, ten classes).
    """

    def __init__(self, blocks: Sequence[int], channels: int, num_classes: int, *, bottleneck: bool,
                 stem_stride: int, rate: float = 1.0, exits: Sequence[int] | None = None):
        super().__init__()
        widths = [math.ceil(rate * full) for full in (64, 128, 256, 512)]
        self.extractor = nn.Sequential(OrderedDict(conv1=Conv2d(
            channels, widths[0], 3, stride=stem_stride, padding=1)))
        body, width_in = [], widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths)):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                body.append(PreActivationBlock(width_in, width, stride, rate, bottleneck))
                width_in = body[-1].width_out
        ends = exits or (len(body),)
        self.intermediate = nn.Sequential(*(nn.Sequential(*body[start:end])
                                            for start, end in pairwise((0, *ends))))
        self.classifier = nn.ModuleList(nn.Sequential(OrderedDict(
            norm=scaled_norm(body[end - 1].width_out, rate), avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(), fc=nn.Linear(body[end - 1].width_out, num_classes)))
            for end in ends)
        for head in self.classifier:
            nn.init.zeros_(head.fc.bias)  # as in HeteroFL's code

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[-1](self.intermediate(self.extractor(x)))

    def exit_logits(self, x: Tensor) -> list[Tensor]:
        """The logits (B, classes) of every exit, first to last."""
        x, logits = self.extractor(x), []
        for section, head in zip(self.intermediate, self.classifier):
            x = section(x)
            logits.append(head(x))
        return logits


def with_exits(architectures: Sequence[str]) -> tuple[str, ...]:
    """ScaleFL's levels in the place of as many width-scaled architectures of one network.

    They end at earlier exits, so they are wider, for the same number of parameters.
    """
    net = architectures[-1].split("-")[0]
    return tuple(f"{net}-{rate}-exit{level}" for level, rate in enumerate(
        EXIT_RATES[net][-len(architectures):], start=1))


def build(arch: str, channels: int, num_classes: int) -> nn.Module:
    """A new network of an architecture; its weights are drawn from torch's global generator.

    Names of architectures are those of MODELS, and of with_exits: "cnn", "resnet10",
    "resnet18-1/4" (ResNet18 at a quarter of its width), "resnet18-1/4-exit3" (up to its exit 3).
    """
    if arch == "cnn":
        return CNN(channels, num_classes)
    if arch in RESNET_BLOCKS:
        return ResNet(RESNET_BLOCKS[arch], channels, num_classes)
    net, rate, *level = arch.split("-")
    options, exits = WIDTH_RESNETS[net], None
    if level:
        shares = EXITS[: int(level[0].removeprefix("exit"))]
        exits = [math.ceil(share * sum(options["blocks"])) for share in shares]
    return WidthResNet(channels=channels, num_classes=num_classes, rate=float(Fraction(rate)),
                       exits=exits, **options)


def build_empty(arch: str, channels: int, num_classes: int, device: torch.device) -> nn.Module:
    """A network whose weights are yet to be loaded: allocated, not initialised, nothing drawn."""
    with torch.device("meta"):
        model = build(arch, channels, num_classes)
    return model.to_empty(device=device)


def load_network(arch: str, channels: int, num_classes: int, weights: State) -> nn.Module:
    """A network of these weights, on their device, in the layout that predicts fastest.

    channels_last was measured to predict 1.2 to 1.7 x faster on a CPU.
    """
    device = next(iter(weights.values())).device
    model = build_empty(arch, channels, num_classes, device).to(memory_format=torch.channels_last)
    model.load_state_dict(weights)
    return model


def scratch_network(arch: str, channels: int, num_classes: int, device: torch.device, *,
                    optimizer: str, lr: float, momentum: float = 0.0, weight_decay: float = 0.0,
                    size: int = 32) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network without weights and its optimiser ("adam" or "sgd"), for client updates.

    momentum, weight_decay: of "sgd"
    size: pixels along a side of the images, the only size that the network then fits; see trimmed
    Memory is laid out channels_last for the CNN alone: that was measured to be worth 1.24 x in its
    training on a CPU, where the ResNets at batch 16 would lose (0.77 x).
    """
    with torch.device("meta"):
        model = trimmed(build(arch, channels, num_classes), channels, size)
    model.to_empty(device=device)
    if arch == "cnn":
        model = model.to(memory_format=torch.channels_last)
    if optimizer == "adam":
        return model, torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum,
                                  weight_decay=weight_decay, fused=True)


def trimmed(model: nn.Module, channels: int, size: int) -> nn.Module:
    """The network without the taps that never meet an image of this size; see Conv2d."""
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: layer.trim(*inputs[0].shape[2:]))
             for layer in model.modules() if isinstance(layer, Conv2d)]
    with torch.no_grad():
        model.eval()(next(model.parameters()).new_zeros(2, channels, size, size))
    for hook in hooks:
        hook.remove()
    return model.train()


def learnt_part(model: nn.Module, weights: State) -> State:
    """Of weights by name, what the network's parameters hold: of a trimmed kernel, its taps."""
    return {name: weights[name][layer.trimmed_to].contiguous() if isinstance(layer, Conv2d)
            else weights[name]
            for part, layer in model.named_modules()
            for name, _ in layer.named_parameters(part, recurse=False)}


@functools.cache
def shapes(arch: str, channels: int, num_classes: int) -> State:
    """The state dict of an architecture without content: names, shapes and types (meta tensors)."""
    return build_empty(arch, channels, num_classes, torch.device("meta")).state_dict()


def architecture_of(client: int, num_clients: int, architectures: Sequence[str]) -> str:
    """The architecture of a client: even contiguous groups by id, small nets first."""
    return architectures[client * len(architectures) // num_clients]


# ------------------------------------------------------------------------------------------ weights

def copy_state(model: nn.Module) -> State:
    """A copy of a network's weights, parameters and buffers, in the default memory layout."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()}


@contextmanager
def drawing_from(rng: torch.Generator):
    """What torch draws from its global generator comes from rng; the global one stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng.get_state())
        yield


def initial_weights(architectures: Sequence[str], channels: int, num_classes: int,
                    rng: torch.Generator, device: torch.device) -> dict[str, State]:
    """Initial weights by architecture.  What two architectures share is the same tensor in both.

    The last, largest network is drawn and the others, which it contains, are cut out of it.
    The global generator is left as it was.
    """
    with drawing_from(rng):
        whole = build(architectures[-1], channels, num_classes).to(device).state_dict()
    return {arch: {name: whole[name] for name in shapes(arch, channels, num_classes)}
            for arch in architectures}


def is_parameter(name: str) -> bool:
    """Whether a weight of this name is trained; the others are buffers of batch normalisation."""
    return name.split(".")[-1] not in BUFFERS


def block_of(name: str) -> tuple[str, int, str] | None:
    """(stage, block, rest) of a weight in a residual block of a ResNet, else None.

    "intermediate.layer3.1.conv2.weight" is ("intermediate.layer3", 1, "conv2.weight").
    """
    match = re.fullmatch(r"(.+\.layer\d)\.(\d+)\.(.+)", name)
    return match and (match[1], int(match[2]), match[3])


def tensors_in(payload: object) -> Iterator[Tensor]:
    """All tensors in a nest of dicts, lists and tuples."""
    if isinstance(payload, Tensor):
        yield payload
    elif isinstance(payload, (dict, list, tuple)):
        for item in payload.values() if isinstance(payload, dict) else payload:
            yield from tensors_in(item)


def all_finite(payload: object) -> bool:
    """Whether no tensor in a nest of dicts, lists and tuples holds an infinity or NaN."""
    finite = [tensor.isfinite().all() for tensor in tensors_in(payload)]
    # On one device, since an optimiser keeps some of its state on the CPU always.
    return not finite or bool(torch.stack([one.to(finite[0].device) for one in finite]).all())


def num_bytes(payload: object) -> int:
    """Bytes of all tensors in a nest of dicts, lists and tuples: what sending it costs."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(payload))


def average(old: State, uploads: Mapping[int, State], counts: Mapping[int, int], *,
            uniform: bool = False, held: Mapping[int, "IndexSets"] | None = None) -> State:
    """Average each weight over the clients that hold it: sum_k n_k y_k / sum_k n_k.

    old: the weights to average into; one that no upload holds keeps its old value
    uploads: client id -> the weights it sent, any subset of old's names
    counts: client id -> n_k, its number of training images (FedAvg; FedIN Eq. 2)
    uniform: count every client once, as released code of the field does
    held: client id -> where its weights, which may be narrower than old's, belong in them; the
        average is then taken coordinate by coordinate (HeteroFL)
    The sum runs in float64 in ascending client id and is cast back once; integers are truncated.
    With integer n_k it is exact where all uploads agree, so unchanged weights stay unchanged, a
    single holder's weights pass through, and the order of arrival does not matter, bit for bit.
    """
    new = {}
    for name, tensor in old.items():
        holders = [k for k in sorted(uploads) if name in uploads[k]]
        if not holders:
            new[name] = tensor
            continue
        total = torch.zeros_like(tensor, dtype=torch.float64)
        if held is None:
            for k in holders:
                total.add_(uploads[k][name], alpha=1 if uniform else counts[k])
            total /= len(holders) if uniform else sum(counts[k] for k in holders)
        else:
            count = torch.zeros_like(total)
            for k in holders:
                place, n = grid(held[k][name]), 1 if uniform else counts[k]
                total[place] += n * uploads[k][name].double()
                count[place] += n
            total = torch.where(count > 0, total / count, tensor)
        new[name] = total.to(tensor.dtype)
    return new


def layerwise_average(weights: Mapping[str, State], uploads: Mapping[int, State],
                      counts: Mapping[int, int], *, uniform: bool = False,
                      rule: Callable = average) -> dict[str, State]:
    """Layer-wise heterogeneous average: layers of the same name are averaged across architectures.

    weights: architecture -> its current weights; tensors of one name are equal in all of them,
        before and after
    rule: what makes new weights of old ones and uploads, if not average itself
    Source: FedIN, Sec. 4.4.  For a single architecture it is FedAvg's average.
    """
    whole = {name: tensor for state in weights.values() for name, tensor in state.items()}
    new = rule(whole, uploads, counts, uniform=uniform)
    return {arch: {name: new[name] for name in state} for arch, state in weights.items()}


def per_architecture_average(weights: Mapping[str, State], uploads: Mapping[int, State],
                             counts: Mapping[int, int], *, uniform: bool = False,
                             rule: Callable = average) -> dict[str, State]:
    """FedAvg's average within each architecture, nothing shared between them (FedIN, Table 3).

    An upload belongs to the architecture whose weights have the same names.
    rule: as of layerwise_average
    """
    new = {}
    for arch, state in weights.items():
        own = {k: sent for k, sent in uploads.items() if sent.keys() == state.keys()}
        new[arch] = rule(state, own, counts, uniform=uniform)
    return new


@torch.no_grad()
def interpolate(start: State, end: State, weight: float) -> State:
    """(1 - weight) start + weight end, for each weight by name; integers are truncated.

    At 0 and 1, and where both agree, it is exact.
    """
    return {name: torch.lerp(tensor.double(), end[name].double(), weight).to(tensor.dtype)
            for name, tensor in start.items()}


def server_step(old: State, mean: State, step: float) -> State:
    """x + step (mean y - x) for the parameters; buffers are averaged, whatever the step.

    Beyond 1 a step extrapolates, and a variance of batch normalisation would end below zero.
    """
    if step == 1:
        return mean
    return {**mean, **interpolate({name: x for name, x in old.items() if is_parameter(name)}, mean,
                                  step)}


def release_freed_memory() -> None:
    """Have the C library give back to the system what has been freed.

    What is kept lies among what was freed: with SCAFFOLD's variates of 65 clients and the five
    ResNets 2.4 of 8.5 GB were of no use.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):  # a C library other than glibc's
        pass


# --------------------------------------------------------------------------------------- sub-models

IndexSets = dict[str, tuple[Tensor, ...]]  # name -> of its first two dimensions, which indices


def index_sets(whole: State, part: State, *, start: int = 0,
               classes: Tensor | None = None) -> IndexSets:
    """Where the weights of a narrower network lie in those of the whole one.

    A sub-model has n consecutive channels of a layer's C, counted modulo C:
    start, start + 1, ..., start + n - 1.  Layers of equal C have the same ones, so that what one
    puts out is what the next takes in, and the two sides of a residual sum agree.  Image channels
    and classes are never cut.

    part: its weights; only names, which may be some of whole's, and shapes (n) are read
    start: 0 in HeteroFL (Algorithm 1), the number of the round in FedRolex (Algorithm 1)
    classes: the rows of fc that part holds, if not all
    """
    sets = {}
    for name, tensor in part.items():
        device = whole[name].device
        sets[name] = tuple((torch.arange(n, device=device) + start) % size
                           for n, size in zip(tensor.shape[:2], whole[name].shape))
        if name.startswith("extractor."):
            sets[name] = (sets[name][0], torch.arange(tensor.shape[1], device=device))
        if name.split(".")[-2] == "fc":
            rows = torch.arange(len(whole[name]), device=device) if classes is None else classes
            sets[name] = (rows, *sets[name][1:])
    return sets


def grid(indices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One or two index sets in the form that picks every combination of their elements."""
    return tuple(index.unflatten(0, (-1, *[1] * (len(indices) - 1 - dim)))
                 for dim, index in enumerate(indices))


def extract(whole: State, sets: IndexSets) -> State:
    """The sub-model's weights, a copy."""
    return {name: whole[name][grid(indices)] for name, indices in sets.items()}


@torch.no_grad()
def collect_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give static batch normalisation the statistics to predict with, in place (HeteroFL).

    They are the means over batches of the network's inputs (B, C, H, W), as if in training but for
    the scalers, which rest in evaluation too.  A network that keeps statistics is left as it is.
    """
    layers = [layer for layer in model.modules()
              if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is None]
    if not layers:
        return
    model.eval()
    for layer in layers:
        layer.track_running_stats, layer.momentum = True, None  # None: the plain mean over batches
        layer.running_mean = torch.zeros_like(layer.weight)
        layer.running_var = torch.ones_like(layer.weight)
        layer.num_batches_tracked = torch.zeros((), dtype=torch.int64)
        layer.train()
    for x in batches:
        model(x)
    model.eval()


# --------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict_logits(model: nn.Module, images: Tensor,
                   prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits (N, classes) of a network in evaluation mode for uint8 images (N, C, H, W)."""
    model.eval()
    # All logits in one tensor: those of each batch, kept apart, would lie among the large tensors
    # that are freed, and the C library could not use that memory again (up to 0.4 GB).
    logits = None
    for start in range(0, len(images), TEST_BATCH):
        of_batch = model(prepare(images[start:start + TEST_BATCH]))
        if logits is None:
            logits = of_batch.new_empty(len(images), of_batch.shape[1])
        logits[start:start + TEST_BATCH] = of_batch
    return logits


def predict(model: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """The class (N,) that a network in evaluation mode predicts for uint8 images (N, C, H, W)."""
    return predict_logits(model, images, prepare).argmax(dim=1)


def share_accuracies(right: Mapping[int, Tensor], shares: Sequence[Tensor]) -> dict:
    """Accuracies in percent over some clients.

    right: client -> which test images its model gets right, (N,) bool
    shares: client -> indices of its own test images
    accuracy: of the whole test set, mean over clients; personal_accuracy: of each client's own
    share, weighted by share (None if they have none)
    """
    of_all = sum(int(vector.sum()) for vector in right.values())
    of_own = sum(int(vector[shares[k]].sum()) for k, vector in right.items())
    shared = sum(len(shares[k]) for k in right)
    return {"accuracy": 100 * of_all / sum(len(vector) for vector in right.values()),
            "personal_accuracy": 100 * of_own / shared if shared else None}
