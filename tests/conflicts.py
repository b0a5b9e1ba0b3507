"""Conflicts of FedIN's two gradients (b < 0 in Eq. 12), and the accuracy of exact projection.

    python -m tests.conflicts [FLAG VALUE ...]     not collected by pytest

Two runs with these flags of run.py: Eq. 13 with its constant, and --projection exact, Eq. 12
at every step.  In the second each tensor of the middle layers has its own b; they are counted.
Prints CSV.
"""

import csv
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

import fedin
import files
import run


class Counter:
    """Counts of steps and tensors, all and those with b < 0."""

    def __init__(self):
        self.tensors = self.against = self.steps = self.steps_with = 0

    def project(self, inner: Tensor, local: Tensor, project=fedin.project_gradient) -> Tensor:
        """Count one tensor, and project."""
        self.tensors += 1
        self.against += bool((inner.double() * local.double()).sum() < 0)
        return project(inner, local)

    def step(self, *arguments: object, step=fedin.set_projected_gradients) -> None:
        """Count one step, and make it."""
        before = self.against
        step(*arguments)
        self.steps += 1
        self.steps_with += self.against > before


def main(flags: list[str]) -> None:
    """Run both, and print a line for each."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["command", "commit", "machine", "projection", "accuracy",
                     "tensors with b < 0, %", "steps with such a tensor, %"])
    command = " ".join(["python -m tests.conflicts", *flags])
    for projection in ("simplified", "exact"):
        with tempfile.TemporaryDirectory() as folder, patch("sys.stdout", sys.stderr):
            counter = Counter()
            with (patch.object(fedin, "project_gradient", counter.project),
                  patch.object(fedin, "set_projected_gradients", counter.step)):
                status = run.main(["--method", "fedin", *flags, "--projection", projection,
                                   "--workers", "1", "--out", folder + "/run"])  # for the counts
            if status != 0:
                sys.exit(status)
            result = json.loads(Path(folder, "run", "result.json").read_text())
        shares = [f"{100 * part / whole:.1f}" if whole else "" for part, whole in (
            (counter.against, counter.tensors), (counter.steps_with, counter.steps))]
        writer.writerow([command, files.commit(), files.machine(), projection, result["accuracy"],
                         *shares])
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
