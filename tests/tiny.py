"""A network, a client and random streams small enough to check a whole client update by hand.

And, for runs through the command line, a data set so small that they take a second.
"""

import atexit
from functools import cache, partial
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

import data


class TinyNet(nn.Module):
    """The three parts, with batch normalisation and a few hundred weights, for 1 x 8 x 8 images."""

    def __init__(self):
        super().__init__()
        self.extractor = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.intermediate = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6),
                                          nn.ReLU())
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))

    def forward(self, x):
        return self.classifier(self.intermediate(self.extractor(x)))


def tiny_net(seed: int = 0) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet()


def tiny_data(count: int = 20, seed: int = 0) -> data.ClientData:
    """A client that holds every other one of 2 * count images in three classes."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (2 * count, 1, 8, 8), dtype=torch.uint8, generator=rng)
    labels = torch.randint(3, (2 * count,), generator=rng)
    return data.ClientData(images, labels, torch.arange(0, 2 * count, 2), lambda x: x / 255 - 0.5)


def stream(purpose: int, seed: int = 0, client: int = 0) -> torch.Generator:
    return data.torch_stream(seed, purpose, round=1, client=client)


def fresh(kind, lr: float, seed: int = 99):
    """A scratch network of other weights than those in use, and its optimiser."""
    model = tiny_net(seed)
    return model, kind(model.parameters(), lr=lr)


adam = partial(fresh, torch.optim.Adam, lr=1e-2)
sgd = partial(fresh, torch.optim.SGD, lr=0.1)


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@cache
def few_digits() -> str:
    """The path of an .npz of 400 training and 40 test digits, on which evaluation takes no time."""
    digits, folder = data.read_digits(), TemporaryDirectory()
    atexit.register(folder.cleanup)
    parts = {}
    for part, images, labels, count in (("train", digits.x_train, digits.y_train, 400),
                                        ("test", digits.x_test, digits.y_test, 40)):
        rows = data.balanced_subset(labels, count, np.random.default_rng(0))
        parts |= {f"x_{part}": images[rows, 0].numpy(), f"y_{part}": labels[rows].numpy()}
    path = f"{folder.name}/few-digits.npz"
    np.savez(path, classes=digits.classes, **parts)
    return path
