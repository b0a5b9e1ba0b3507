"""Conflicts of FedIN's two gradients (b < 0 in Eq. 12), and the accuracy of exact projection.

    python -m tests.conflicts [FLAG VALUE ...]     not collected by pytest

Two runs with these flags of run.py: Eq. 13 with its constant, and --projection exact, Eq. 12 at
every step.  Each tensor of the middle layers has its own b.  They are counted in both runs, in the
first of them on a copy that takes no step; 50 % is chance.  Prints CSV.
"""

import copy
import shlex
import sys
from collections.abc import Iterator
from unittest.mock import patch

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import fedin
import files
from tests.curves import lines_of, write_csv


class Counter:
    """Counts of tensors, all and those with b < 0, and of steps whose sum of all b is below 0."""

    def __init__(self):
        self.tensors = self.against = self.steps = self.steps_against = 0
        self.sum = 0.0

    def project(self, inner: Tensor, local: Tensor, project=fedin.project_gradient) -> Tensor:
        """Count one tensor, and project."""
        b = float((inner.double() * local.double()).sum())
        self.tensors, self.against = self.tensors + 1, self.against + (b < 0)
        self.sum += b
        return project(inner, local)

    def step(self, model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor,
             features: fedin.Features | None, *others: object, projection: str,
             step=fedin.fedin_step, **numbers: float) -> Tensor:
        """Count one step, on a copy of the network, and make it."""
        if features is not None:
            self.sum, twin = 0.0, copy.deepcopy(model)
            with patch.object(fedin, "project_gradient", self.project):
                step(twin, SGD(twin.parameters(), lr=0.0), x, y, features, *others,
                     projection="exact", **numbers)
            self.steps, self.steps_against = self.steps + 1, self.steps_against + (self.sum < 0)
        return step(model, optimizer, x, y, features, *others, projection=projection, **numbers)


def rows(flags: list[str]) -> Iterator[list]:
    """Lines of the CSV."""
    command = shlex.join(["python", "-m", "tests.conflicts", *flags])
    for projection in ("simplified", "exact"):
        counter = Counter()
        with patch.object(fedin, "fedin_step", counter.step):
            lines = lines_of([*flags, "--method", "fedin", "--projection", projection,
                              "--workers", "1"])  # for the counts
        shares = [f"{100 * part / max(1, whole):.1f}" for part, whole in (
            (counter.against, counter.tensors), (counter.steps_against, counter.steps))]
        yield [command, files.commit(), files.machine(), projection, lines[-1]["accuracy"], *shares]


if __name__ == "__main__":
    write_csv(["command", "commit", "machine", "projection", "accuracy", "tensors with b < 0, %",
               "steps with sum of b < 0, %"], rows(sys.argv[1:]))
