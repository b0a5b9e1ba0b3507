"""A network, a client and random streams small enough to check a whole client update by hand.

For runs through the command line there is a data set so small that they take a second.
"""

import atexit
import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

import baselines
import data
import federation
import models
import partitions

EPOCHS = {"local_epochs": 2, "batch_size": 8}
LR = 0.1  # learning rate of SGD


class TinyNet(nn.Module):
    """The three parts, with batch normalisation and a few hundred weights, for 1 x 8 x 8 images.

    A trimmed one holds 4 of the 9 taps of its second convolution.
    """

    def __init__(self):
        super().__init__()
        self.extractor = nn.Sequential(models.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4),
                                       nn.ReLU())
        self.intermediate = nn.Sequential(models.Conv2d(4, 6, 3, stride=3, padding=1),
                                          nn.BatchNorm2d(6), nn.ReLU())
        self.classifier = nn.Sequential(OrderedDict(flatten=nn.Flatten(), fc=nn.Linear(6, 3)))

    def forward(self, x):
        return self.classifier(self.intermediate(self.extractor(x)))


def tiny_net(seed: int = 0, make: Callable = TinyNet) -> nn.Module:
    with models.drawing_from(torch.Generator().manual_seed(seed)):
        return make()


def weights(seed: int = 5, make: Callable = TinyNet) -> models.State:
    return models.copy_state(tiny_net(seed, make))


def tiny_data(count: int = 20, seed: int = 0) -> data.ClientData:
    """A client that holds every other one of 2 * count images in three classes."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (2 * count, 1, 8, 8), dtype=torch.uint8, generator=rng)
    labels = torch.randint(3, (2 * count,), generator=rng)
    return data.ClientData(images, labels, torch.arange(0, 2 * count, 2), lambda x: x / 255 - 0.5)


def stream(purpose: int, seed: int = 0, client: int = 0) -> torch.Generator:
    return data.torch_stream(seed, purpose, round=1, client=client)


def fresh(kind: type, lr: float, make: Callable = TinyNet, **options):
    """A scratch network of other weights than those in use, and its optimiser."""
    model = tiny_net(99, make)
    return model, kind(model.parameters(), lr=lr, **options)


adam = partial(fresh, torch.optim.Adam, lr=1e-2)
sgd = partial(fresh, torch.optim.SGD, lr=LR)
trimmed_adam = partial(models.scratch_network, TinyNet, (1, 8, 8), torch.device("cpu"),
                       optimizer="adam", lr=1e-2)


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def all_same(a: dict, b: dict) -> bool:
    """Whether the state dicts of all architectures are equal bit for bit."""
    return a.keys() == b.keys() and all(same(a[arch], b[arch]) for arch in a)


def alike(nest: object, other: object) -> bool:
    """Whether two nests hold equal tensors, bit for bit."""
    pairs = zip(models.tensors_in(nest), models.tensors_in(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def check_purity(update: Callable, received: object, *kept: object, scratch: Callable = adam,
                 **options) -> None:
    """Check that a client update changes no argument and hands out no tensor of the network."""
    (model, optimizer), images = scratch(), tiny_data()
    arguments = received, tuple(images), kept
    before = copy.deepcopy(arguments)
    result = update(model, optimizer, received, images, stream, *kept, **EPOCHS | options)
    after = copy.deepcopy((result.update, result.kept))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert alike(arguments, before) and alike((result.update, result.kept), after)
    assert any(tensor.any() for tensor in models.tensors_in(after))


def check_loop(result: federation.Result, step: Callable, tensors: Callable, start: models.State,
               scratch: Callable = adam) -> None:
    """Check that the result of a client update is that of the loop over batches written out.

    step: (model, optimizer, x, y, *tensors(x, y)) -> loss;  start: weights before the first step
    """
    (model, optimizer), total = scratch(), 0.0
    model.load_state_dict(start)
    images = tiny_data()
    for (rows,) in data.batches(images, 8, 2, stream(data.BATCHES)):
        x, y = images.batch(rows)
        total += step(model, optimizer, x, y, *tensors(x, y)).item() * len(y)
    assert same(result.update.weights, model.state_dict()) and result.update.num_samples == 20
    assert abs(result.loss - total) < 1e-5 * total and result.samples == 40


def double_batch(count: int = 8, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Network input (count, 1, 8, 8) and labels (count,), for networks in double precision."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=rng, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=rng)


def check_step(step: Callable, model: nn.Module, objective: Callable, *tensors: object,
               clip: float = float("inf")) -> None:
    """Check one step of plain SGD: w - LR gradient of the objective, worked out by autograd.

    step: (model, optimizer, *tensors) -> the loss that it reports
    objective: model -> the objective, and the loss to be reported unless it is the objective
    clip: bound of the gradient's norm
    """
    twin, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=LR)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # left over from the last step
    whole = loss = objective(twin)
    if isinstance(whole, tuple):
        whole, loss = whole
    gradients = torch.autograd.grad(whole, list(twin.parameters()))
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt().item()

    reported = step(model, optimizer, *tensors)
    assert not reported.requires_grad
    torch.testing.assert_close(reported, loss.detach())
    for parameter, old, gradient in zip(model.parameters(), twin.parameters(), gradients):
        torch.testing.assert_close(parameter, old - LR * min(1, clip / (norm + 1e-6)) * gradient)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross entropy, mean over samples, written out."""
    return -logits.log_softmax(dim=1)[range(len(y)), y].mean()


def divergence(teacher: torch.Tensor, student: torch.Tensor, t: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) of logits softened by the temperature t, mean over samples."""
    q, p = (teacher / t).softmax(dim=1), (student / t).softmax(dim=1)
    return (q * (q / p).log()).sum(dim=1).mean()


def tiny_experiment(**settings) -> federation.Experiment:
    """A run of FedAvg with TinyNet: three clients of noise in three classes, the last dropped out.

    The clients hold 12, 6 and 8 training images; there are 6 test images, two per class.
    """
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8, generator=rng)
    labels = torch.randint(3, (26,), generator=rng)
    split = partitions.Split(
        data.Dataset(images[:26], labels, images[26:], torch.arange(6) // 2, ["a", "b", "c"]),
        parts=list(torch.randperm(26, generator=rng).split([12, 6, 8])),
        test_shares=[torch.tensor([0, 2]), torch.tensor([1, 2, 3]), torch.tensor([4, 5])],
        dropouts=[2], seen=[0, 1], unseen=[2], proxy=None, validation=None,
        statistics=(torch.full((1, 1, 1), 120.0), torch.full((1, 1, 1), 70.0)))
    method = baselines.FEDAVG._replace(
        networks={"tiny": {"tiny": lambda channels, num_classes: TinyNet()}})
    return federation.prepare_experiment(method, {
        "model": "tiny", "clients": 3, "seed": 4, "workers": 2, "threads": 1, "device": "cpu",
        "dataset": "", "augment": False, "optimizer": "sgd", "lr": LR, "amp": False,
        "aggregation": "layerwise", **EPOCHS, **settings}, split)


@cache
def few_digits() -> str:
    """Path of an .npz of 400 training and 40 test digits, on which evaluation takes no time."""
    digits, folder = data.read_digits(), TemporaryDirectory()
    atexit.register(folder.cleanup)
    arrays = {}
    for part, images, labels, count in (("train", digits.x_train, digits.y_train, 400),
                                        ("test", digits.x_test, digits.y_test, 40)):
        rows = partitions.balanced_subset(labels, count, np.random.default_rng(0))
        arrays |= {f"x_{part}": images[rows, 0].numpy(), f"y_{part}": labels[rows].numpy()}
    path = f"{folder.name}/few-digits.npz"
    np.savez(path, classes=digits.classes, **arrays)
    return path
