"""Networks, and the arithmetic of their weights.  Imports torch and the standard library alone.

In reading order: the CNN of AP-FL and the ResNets of FedIN; convolutions that skip padding, for
speed; building and loading networks; weights as state dicts; prediction.

Every network is classifier(intermediate(extractor(x))).  The three parts are submodules of these
names, so the first word of a weight's name tells its part.
"""

import ctypes
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]  # parameters and buffers of a network by name
Make = Callable[[], nn.Module]  # builds a network; weights are drawn from torch's global generator

RESNET_BLOCKS = {  # residual blocks in the four stages; each network contains the one before it
    "resnet10": (1, 1, 1, 1),
    "resnet14": (1, 1, 2, 2),
    "resnet18": (2, 2, 2, 2),
    "resnet22": (2, 2, 3, 3),
    "resnet26": (3, 3, 3, 3),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # names in batch normalisation
TEST_BATCH = 128  # images; fastest on a CPU between 128 and 256, twice as slow at 1,024
GPU_TEST_BATCH = 1024

# ----------------------------------------------------------------------------------------- networks

class CNN(nn.Module):
    """Two convolutions and two fully connected layers, for 32x32 images (AP-FL, Sec. 4.1).

    878,538 parameters for three channels and ten classes, no buffers.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.extractor = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(channels, 32, 5), relu=nn.ReLU(inplace=True),  # 32 -> 28
            maxpool=nn.MaxPool2d(2)))  # 28 -> 14
        self.intermediate = nn.Sequential(OrderedDict(
            conv2=nn.Conv2d(32, 64, 5), relu2=nn.ReLU(inplace=True),  # 14 -> 10
            maxpool=nn.MaxPool2d(2), flatten=nn.Flatten(),  # 10 -> 5, and 64 * 5 * 5 = 1600
            fc1=nn.Linear(1600, 512), relu3=nn.ReLU(inplace=True)))
        self.classifier = nn.Sequential(OrderedDict(fc=nn.Linear(512, num_classes)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.intermediate(self.extractor(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, downsample if size or width change (He et al., 2016)."""

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
    """A ResNet of BasicBlocks, in FedIN's three parts (FedIN, Fig. 2).

    blocks: number of BasicBlocks in each of the four stages
    Weights have torchvision's names behind the part's, so torchvision's ResNet18 can be loaded.
    """

    def __init__(self, blocks: Sequence[int], channels: int, num_classes: int):
        super().__init__()
        self.extractor = nn.Sequential(OrderedDict(
            conv1=Conv2d(channels, 64, 7, stride=2, padding=3),  # 32 -> 16
            bn1=nn.BatchNorm2d(64), relu=nn.ReLU(inplace=True),
            maxpool=nn.MaxPool2d(3, stride=2, padding=1)))  # 16 -> 8
        self.intermediate = nn.Sequential(OrderedDict(
            layer1=resnet_stage(64, 64, blocks[0], stride=1),  # 8 x 8
            layer2=resnet_stage(64, 128, blocks[1], stride=2),  # 4 x 4
            layer3=resnet_stage(128, 256, blocks[2], stride=2),  # 2 x 2
            layer4=resnet_stage(256, 512, blocks[3], stride=2)))  # 1 x 1
        self.classifier = nn.Sequential(OrderedDict(
            avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(512, num_classes)))

        # torchvision's initialisation of convolutions; all other layers keep torch's default.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.intermediate(self.extractor(x)))


def resnet_stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """One stage of a ResNet: BasicBlocks of one width; the first changes size and width."""
    shortcut = None
    if stride != 1 or width_in != width:
        shortcut = nn.Sequential(Conv2d(width_in, width, 1, stride=stride), nn.BatchNorm2d(width))
    first = BasicBlock(width_in, width, stride, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))


# Values of --model: architecture -> constructor(channels, num_classes), small to large.
RESNETS = {name: partial(ResNet, blocks) for name, blocks in RESNET_BLOCKS.items()}
MODELS = {"cnn": {"cnn": CNN}, "resnets": RESNETS, **{net: {net: RESNETS[net]} for net in RESNETS}}


def representation(model: nn.Module, x: Tensor) -> Tensor:
    """Input of the last layer of a CNN or ResNet for images x, (B, width)."""
    return model.classifier[:-1](model.intermediate(model.extractor(x)))


# -------------------------------------------------------------- speed: convolutions without padding

# At 32x32 the last stage of a ResNet works on 1x1 maps.  There a 3x3 kernel with padding 1 meets
# the image with its centre alone, and the convolution is a matrix product with that tap.  Two
# things follow, worth a factor of 1.5 to 1.7 in a training step on a CPU:
# - Conv2d multiplies only the taps that meet the image.
# - A scratch network for training is trimmed: its parameters hold these taps alone, so gradients,
#   optimisers, weight decay and proximal terms skip the others (more than half of ResNet18).  No
#   gradient ever reaches them.  state_dict() and load_state_dict() still speak of whole kernels.
# Parameters of a trimmed network are therefore smaller than the weights of the same name.
# learnt_part cuts weights to the size of the parameters; copy_parameters needs no cutting.

WHOLE = (slice(None),) * 4  # selects all of a convolution's weight (out, in, height, width)


class Conv2d(nn.Conv2d):
    """A convolution without bias that skips zero padding; its results differ by rounding alone."""

    def __init__(self, width_in: int, width: int, size: int, stride: int = 1, padding: int = 0):
        super().__init__(width_in, width, size, stride=stride, padding=padding, bias=False)
        self.trimmed_to = WHOLE  # taps that the parameter holds
        self.loaded = None  # the whole kernel last loaded into a trimmed convolution

    def taps(self, height: int, width: int) -> tuple[tuple[slice, ...], tuple[int, int]]:
        """Select the taps of a kernel that meet a map of this size, and give their padding."""
        (rows, above), (columns, left) = (live_taps(*along) for along in zip(
            (height, width), self.kernel_size, self.stride, self.padding))
        return (*WHOLE[:2], rows, columns), (above, left)

    def trim(self, height: int, width: int) -> None:
        """Keep only the taps that meet maps of this size, the only size that then fits."""
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
        # The whole kernel is kept for saving, the parameter holds its live taps.
        if self.trimmed_to != WHOLE:
            self.loaded = state_dict[prefix + "weight"]
            state_dict = state_dict | {prefix + "weight": self.loaded[self.trimmed_to]}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Taps without gradient are saved as they were loaded.
        if self.trimmed_to != WHOLE:
            whole = self.loaded.detach().clone()
            whole[self.trimmed_to] = self.weight.detach()
            destination[prefix + "weight"] = whole


@cache
def live_taps(size: int, kernel: int, stride: int, padding: int) -> tuple[slice, int]:
    """Select the taps of a kernel, along one side, that meet a map, and give their padding.

    size: pixels of the map; for pixel i of the output, tap j meets pixel i * stride + j - padding
    """
    outputs = (size + 2 * padding - kernel) // stride + 1
    met = {j for i in range(outputs) for j in range(kernel) if 0 <= i * stride + j - padding < size}
    first, last = min(met, default=0), max(met, default=0)
    before, after = padding - first, (outputs - 1) * stride + last - padding - (size - 1)

    # Padding as wide on both sides has to give an output of this size.
    if not met or len(met) == kernel or not 0 <= before - after < stride:
        return slice(None), padding
    return slice(first, last + 1), before


def trimmed(model: nn.Module, image: Sequence[int]) -> nn.Module:
    """Trim every Conv2d of a network to images of one shape (C, H, W), and return the network."""
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: layer.trim(*inputs[0].shape[2:]))
             for layer in model.modules() if isinstance(layer, Conv2d)]
    with torch.no_grad():
        model.eval()(next(model.parameters()).new_zeros(2, *image))
    for hook in hooks:
        hook.remove()
    return model.train()


def learnt_part(model: nn.Module, weights: State) -> State:
    """Cut weights to the size of a network's parameters: of a trimmed kernel, its taps."""
    return {name: weights[name][layer.trimmed_to].contiguous() if isinstance(layer, Conv2d)
            else weights[name]
            for part, layer in model.named_modules()
            for name, _ in layer.named_parameters(part, recurse=False)}


# ----------------------------------------------------------------------- building and loading

def empty_network(make: Make, device: torch.device | str) -> nn.Module:
    """Build a network whose weights are yet to be loaded: allocated, not initialised, not drawn."""
    with torch.device("meta"):
        model = make()
    return model.to_empty(device=device)


def load_network(make: Make, weights: State) -> nn.Module:
    """Build a network with these weights, on their device, to predict with."""
    device = next(iter(weights.values())).device
    # On a CPU, channels_last predicts 1.2 to 1.7 times as fast.
    model = empty_network(make, device).to(memory_format=torch.channels_last)
    model.load_state_dict(weights)
    return model


def scratch_network(make: Make, image: Sequence[int], device: torch.device, *, optimizer: str,
                    lr: float, momentum: float = 0.0, weight_decay: float = 0.0,
                    ) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a network without weights and its optimiser ("adam" or "sgd"), for client updates.

    image: shape (C, H, W), the only one that the network then fits (see trimmed)
    momentum, weight_decay: of SGD alone
    """
    with torch.device("meta"):
        model = trimmed(make(), image)
    model.to_empty(device=device)

    # On a CPU, channels_last trains the CNN 1.24 times as fast, ResNets at batch 16 0.77 times.
    if isinstance(model, CNN) or device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    if optimizer == "adam":
        return model, adam(model, lr, fused=True)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum,
                                  weight_decay=weight_decay, fused=True)


def adam(model: nn.Module, lr: float | Tensor, **options: Any) -> torch.optim.Adam:
    """Adam for a network, with its counter of steps on a GPU too, so that a graph can hold it."""
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.Adam(model.parameters(), lr=lr, capturable=on_gpu, **options)


@cache
def shapes(make: Make) -> State:
    """State dict of a network without content: names, shapes and types (meta tensors)."""
    return empty_network(make, torch.device("meta")).state_dict()


def architecture_of(client: int, num_clients: int, architectures: Sequence[str]) -> str:
    """Architecture of a client: even contiguous groups by id, small networks first."""
    return architectures[client * len(architectures) // num_clients]


@contextmanager
def drawing_from(rng: torch.Generator):
    """Let torch draw from rng in place of its global generator, which stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng.get_state())
        yield


def initial_weights(networks: Mapping[str, Make], rng: torch.Generator) -> dict[str, State]:
    """Draw initial weights by architecture; tensors of layers in common are shared.

    networks: architecture -> its builder, small to large; the last is drawn and contains the others
    """
    with drawing_from(rng):
        whole = networks[list(networks)[-1]]().state_dict()
    return {arch: {name: whole[name] for name in shapes(make)} for arch, make in networks.items()}


# ------------------------------------------------------------------------------------------ weights

def copy_state(model: nn.Module) -> State:
    """Copy a network's weights, parameters and buffers, in the default memory layout."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()}


def copy_parameters(model: nn.Module) -> State:
    """Copy a network's parameters as the network holds them; of a trimmed one, the taps alone."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_parameter(name: str) -> bool:
    """Whether a weight of this name is trained; the others are buffers of batch normalisation."""
    return name.split(".")[-1] not in BUFFERS


def block_of(name: str) -> tuple[str, int, str] | None:
    """Split a name: "x.layer3.1.bn1.bias" is ("x.layer3", 1, "bn1.bias"); None outside blocks."""
    match = re.fullmatch(r"(.+\.layer\d)\.(\d+)\.(.+)", name)
    return match and (match[1], int(match[2]), match[3])


def tensors_in(payload: object) -> Iterator[Tensor]:
    """All tensors in a nest of dicts, lists, tuples and networks."""
    if isinstance(payload, Tensor):
        yield payload
    elif isinstance(payload, nn.Module):
        yield from (*payload.parameters(), *payload.buffers())
    elif isinstance(payload, (dict, list, tuple)):
        for item in payload.values() if isinstance(payload, dict) else payload:
            yield from tensors_in(item)


def on_device(payload: object, device: str | torch.device) -> object:
    """A nest of dicts, lists and (named) tuples with its tensors on a device."""
    if isinstance(payload, Tensor):
        return payload.to(device)
    if isinstance(payload, dict):
        return {key: on_device(item, device) for key, item in payload.items()}
    if isinstance(payload, (list, tuple)):
        items = [on_device(item, device) for item in payload]
        return type(payload)(*items) if hasattr(payload, "_fields") else type(payload)(items)
    return payload


def all_finite(payload: object) -> bool:
    """Whether no tensor in a nest of dicts, lists and tuples holds an infinity or NaN."""
    finite = [tensor.isfinite().all() for tensor in tensors_in(payload)]
    # On one device, since an optimiser keeps some of its state on the CPU always.
    return not finite or bool(torch.stack([one.to(finite[0].device) for one in finite]).all())


def num_bytes(payload: object) -> int:
    """Bytes of all tensors in a nest of dicts, lists and tuples: the cost of sending it."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(payload))


def average(old: State, uploads: Mapping[int, State], counts: Mapping[int, int]) -> State:
    """Average each weight over the clients that hold it: sum_k n_k y_k / sum_k n_k.

    old: current weights; one that no upload holds stays
    uploads: client id -> the weights it sent, any subset of old's names
    counts: client id -> n_k, its number of training images (FedAvg; FedIN, Eq. 2)
    The float64 sum in ascending client id is cast back once; integers are truncated.  With integer
    n_k it is exact for equal uploads, and no order of arrival matters, bit for bit.
    """
    new = dict(old)
    for name, tensor in old.items():
        holders = [k for k in sorted(uploads) if name in uploads[k]]
        if holders:
            total = torch.zeros_like(tensor, dtype=torch.float64)
            for k in holders:
                total.add_(uploads[k][name], alpha=counts[k])
            total /= sum(counts[k] for k in holders)
            new[name] = total.to(tensor.dtype)
    return new


def layerwise_average(weights: Mapping[str, State], uploads: Mapping[int, State],
                      counts: Mapping[int, int], *, rule: Callable = average) -> dict[str, State]:
    """Average layers of the same name across architectures (FedIN, Sec. 4.4).

    weights: architecture -> its weights; tensors of one name are equal in all, before and after
    rule: makes new weights from (old, uploads, counts), as average does
    """
    whole = {name: tensor for state in weights.values() for name, tensor in state.items()}
    new = rule(whole, uploads, counts)
    return {arch: {name: new[name] for name in state} for arch, state in weights.items()}


def per_architecture_average(weights: Mapping[str, State], uploads: Mapping[int, State],
                             counts: Mapping[int, int], *,
                             rule: Callable = average) -> dict[str, State]:
    """Average within each architecture, the one whose names an upload has (FedIN, Table 3)."""
    new = {}
    for arch, state in weights.items():
        sent = {k: upload for k, upload in uploads.items() if upload.keys() == state.keys()}
        new[arch] = rule(state, sent, counts)
    return new


@torch.no_grad()
def interpolate(start: State, end: State, weight: float) -> State:
    """(1 - weight) start + weight end by name, exact at 0, 1, for equal ends; integers truncate."""
    return {name: torch.lerp(tensor.double(), end[name].double(), weight).to(tensor.dtype)
            for name, tensor in start.items()}


def release_freed_memory() -> None:
    """Have the C library return freed memory to the system."""
    # Kept tensors lie scattered among freed ones.  With SCAFFOLD's variates of 65 clients and the
    # five ResNets, 2.4 of 8.5 GB were of no use.
    with suppress(OSError, TypeError, AttributeError):  # a C library other than glibc's
        ctypes.CDLL(None).malloc_trim(0)


# --------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict_logits(model: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits (N, classes) of a network in evaluation mode for uint8 images (N, C, H, W)."""
    model.eval()
    # All logits in one tensor: kept apart, those of each batch would lie among the large freed
    # tensors, and the C library could not reuse that memory (up to 0.4 GB).
    logits, size = None, GPU_TEST_BATCH if images.is_cuda else TEST_BATCH
    for start in range(0, len(images), size):
        batch_logits = model(prepare(images[start:start + size]))
        if logits is None:
            logits = batch_logits.new_empty(len(images), batch_logits.shape[1])
        logits[start:start + size] = batch_logits
    return logits


def predict(model: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Predicted class (N,) of uint8 images (N, C, H, W), by a network in evaluation mode."""
    return predict_logits(model, images, prepare).argmax(dim=1)


@torch.no_grad()
def collect_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give static batch normalisation the statistics to predict with, in place (HeteroFL).

    They are means over batches of inputs (B, C, H, W).  All other layers stay as they are.
    """
    layers = [layer for layer in model.modules()
              if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is None]
    if not layers:
        return

    # Static layers learn plain means over batches, as in training; all other layers predict.
    model.eval()
    for layer in layers:
        layer.track_running_stats, layer.momentum = True, None  # None: a plain mean
        layer.running_mean = torch.zeros_like(layer.weight)
        layer.running_var = torch.ones_like(layer.weight)
        layer.num_batches_tracked = torch.zeros((), dtype=torch.int64)
        layer.train()
    for x in batches:
        model(x)
    model.eval()
