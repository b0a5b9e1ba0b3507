"""Networks and the arithmetic of their weights.  A leaf: knows nothing of rounds or data sets.

In reading order: the CNN of AP-FL and the ResNets of FedIN; which architecture a client has;
weights as state dicts: copies, sizes, averages, interpolation; prediction.

Every network is classifier(intermediate(extractor(x))).  The three parts are submodules of these
names, so the part that a weight belongs to is the first word of its name.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

State = dict[str, Tensor]  # the weights of a network: parameters and buffers by name

RESNET_BLOCKS = {  # residual blocks in the four stages; each net contains the one before it
    "resnet10": (1, 1, 1, 1),
    "resnet14": (1, 1, 2, 2),
    "resnet18": (2, 2, 2, 2),
    "resnet22": (2, 2, 3, 3),
    "resnet26": (3, 3, 3, 3),
}
MODELS = {  # what --model offers: the architectures of a federation, small to large
    "cnn": ("cnn",),
    "resnets": tuple(RESNET_BLOCKS),
    **{name: (name,) for name in RESNET_BLOCKS},
}
TEST_BATCH = 250  # images; fastest on a CPU between 128 and 256, at 1,024 twice as slow

# ----------------------------------------------------------------------------------------- networks


class CNN(nn.Module):
    """Two convolutions and two fully connected layers, for 32x32 images (AP-FL, Sec. 4.1).

    The first convolution block is the extractor, the second with the 512-unit layer the
    intermediate layers.  878,538 parameters for three channels and ten classes, no buffers.
    """

    def __init__(self, channels: int, num_classes: int):
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
        self.classifier = nn.Sequential(OrderedDict(fc=nn.Linear(512, num_classes)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.intermediate(self.extractor(x)))


class ResNet(nn.Module):
    """torchvision's ResNet of BasicBlocks with any depth, in FedIN's three parts (FedIN, Fig. 2).

    blocks: residual blocks in each of the four stages
    cut: the last layer of the extractor, "stem" or "layer1" (README, "Where the papers are silent")
    """

    def __init__(self, blocks: Sequence[int], channels: int, num_classes: int, *,
                 cut: str = "stem"):
        super().__init__()
        stem = OrderedDict(
            conv1=nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False),  # 32 -> 16
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
            avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(512, num_classes)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.intermediate(self.extractor(x)))


def resnet_stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """One stage of a ResNet: BasicBlocks of one width; the first changes size and width."""
    shortcut = None
    if stride != 1 or width_in != width:
        shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride=stride, bias=False),
                                 nn.BatchNorm2d(width))
    first = BasicBlock(width_in, width, stride, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))


def build(arch: str, channels: int, num_classes: int) -> nn.Module:
    """A new network of an architecture; its weights are drawn from torch's global generator."""
    if arch == "cnn":
        return CNN(channels, num_classes)
    return ResNet(RESNET_BLOCKS[arch], channels, num_classes)


def build_empty(arch: str, channels: int, num_classes: int, device: torch.device) -> nn.Module:
    """A network whose weights are yet to be loaded: allocated, not initialised, nothing drawn."""
    with torch.device("meta"):
        model = build(arch, channels, num_classes)
    return model.to_empty(device=device)


def architecture_of(client: int, num_clients: int, architectures: Sequence[str]) -> str:
    """The architecture of a client: even contiguous groups by id, small nets first."""
    return architectures[client * len(architectures) // num_clients]


# ------------------------------------------------------------------------------------------ weights


def copy_state(model: nn.Module) -> State:
    """A copy of a network's weights, parameters and buffers, in the default memory layout."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()}


def initial_weights(architectures: Sequence[str], channels: int, num_classes: int,
                    rng: torch.Generator, device: torch.device) -> dict[str, State]:
    """Initial weights by architecture.  What two architectures share is the same tensor in both.

    The last, largest network is drawn and the others, which it contains, are cut out of it.
    The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng.get_state())
        whole = build(architectures[-1], channels, num_classes).to(device).state_dict()
    names = {arch: build_empty(arch, channels, num_classes, torch.device("meta")).state_dict()
             for arch in architectures}
    return {arch: {name: whole[name] for name in names[arch]} for arch in architectures}


def tensors_in(payload: object) -> Iterator[Tensor]:
    """All tensors in a nest of dicts, lists and tuples."""
    if isinstance(payload, Tensor):
        yield payload
    elif isinstance(payload, (dict, list, tuple)):
        for item in payload.values() if isinstance(payload, dict) else payload:
            yield from tensors_in(item)


def num_bytes(payload: object) -> int:
    """Bytes of all tensors in a nest of dicts, lists and tuples: what sending it costs."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(payload))


def average(old: State, uploads: Mapping[int, State], counts: Mapping[int, int], *,
            uniform: bool = False) -> State:
    """Average each weight over the clients that hold it: sum_k n_k y_k / sum_k n_k.

    old: the weights to average into; one that no upload holds keeps its old value
    uploads: client id -> the weights it sent, any subset of old's names
    counts: client id -> n_k, its number of training images (FedAvg; FedIN Eq. 2)
    uniform: count every client once, as released code of the field does
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
        for k in holders:
            total.add_(uploads[k][name], alpha=1 if uniform else counts[k])
        total /= len(holders) if uniform else sum(counts[k] for k in holders)
        new[name] = total.to(tensor.dtype)
    return new


def layerwise_average(weights: Mapping[str, State], uploads: Mapping[int, State],
                      counts: Mapping[int, int], *,
                      uniform: bool = False) -> dict[str, State]:
    """Layer-wise heterogeneous average: layers of the same name are averaged across architectures.

    weights: architecture -> its current weights; tensors of one name are equal in all of them,
        before and after
    Source: FedIN, Sec. 4.4.  For a single architecture it is FedAvg's average.
    """
    whole = {name: tensor for state in weights.values() for name, tensor in state.items()}
    new = average(whole, uploads, counts, uniform=uniform)
    return {arch: {name: new[name] for name in state} for arch, state in weights.items()}


def per_architecture_average(weights: Mapping[str, State], uploads: Mapping[int, State],
                             counts: Mapping[int, int], *,
                             uniform: bool = False) -> dict[str, State]:
    """FedAvg's average within each architecture, nothing shared between them (FedIN, Table 3).

    An upload belongs to the architecture whose weights have the same names.
    """
    new = {}
    for arch, state in weights.items():
        own = {k: sent for k, sent in uploads.items() if sent.keys() == state.keys()}
        new[arch] = average(state, own, counts, uniform=uniform)
    return new


@torch.no_grad()
def interpolate(start: State, end: State, weight: float) -> State:
    """(1 - weight) start + weight end, for each weight by name; integers are truncated.

    At 0 and 1, and where both agree, it is exact.
    """
    return {name: torch.lerp(tensor.double(), end[name].double(), weight).to(tensor.dtype)
            for name, tensor in start.items()}


# --------------------------------------------------------------------------------------- prediction


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """The class (N,) that a network in evaluation mode predicts for uint8 images (N, C, H, W)."""
    model.eval()
    return torch.cat([model(prepare(batch)).argmax(dim=1) for batch in images.split(TEST_BATCH)])
