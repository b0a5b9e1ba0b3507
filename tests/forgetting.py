"""Forgetting of classes whose only client drops out (not collected by pytest).

    python -m tests.forgetting [FLAG VALUE ...] > results/forgetting.csv

FedAvg with --missing-classes 0.2 and these flags of run.py, but the dropout client takes part in
the first half of the rounds (AP-FL, Sec. 3.1).  Prints CSV: accuracy of the global model on the
classes that others hold, and on those that this client alone holds, in every round.
"""

import csv
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import files
import run
from federation import Experiment, draw_participants


def drawn(experiment: Experiment, t: int) -> list[int]:
    """Every client up to half of the rounds, and then those that have not dropped out."""
    if t <= experiment.settings["rounds"] // 2:
        return [client.id for client in experiment.clients]
    return draw_participants(experiment, t)


def main(flags: list[str]) -> None:
    """Make the run, and print a line for each round."""
    with (TemporaryDirectory() as folder, patch("sys.stdout", sys.stderr),
          patch.object(run, "draw_participants", drawn)):
        status = run.main(["--method", "fedavg", "--setting", "apfl", "--missing-classes", "0.2",
                           *flags, "--out", folder + "/run"])
        if status != 0:
            sys.exit(status)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["command", "commit", "machine", "round", "other classes", "its classes"])
    command = " ".join(["python -m tests.forgetting", *flags])
    for line in map(json.loads, lines):
        writer.writerow([command, files.commit(), files.machine(), line["round"],
                         line["seen_accuracy"], line["unseen_accuracy"]])


if __name__ == "__main__":
    main(sys.argv[1:])
