"""Forgetting of classes whose only client drops out (not collected by pytest).

    python -m tests.forgetting [FLAG VALUE ...] > results/forgetting.csv

Two runs of FedAvg with --missing-classes 0.2 and these flags of run.py.  In both the dropout client
takes part like all others; in the first run it drops out after half of the rounds, rounded down,
and in the second it stays (AP-FL, Sec. 3.1).  Prints CSV: accuracy of the global model after each
round, on the classes that others hold and on those that this client alone holds.
"""

import shlex
import sys
from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import files
import run
from federation import Experiment, draw_participants
from tests.curves import lines_of, write_csv

FIXED = ["--method", "fedavg", "--setting", "apfl", "--missing-classes", "0.2",
         "--aggregation", "layerwise"]


def drawn(experiment: Experiment, t: int, stays: bool) -> list[int]:
    """Participants of round t, with the dropout client as long as it is there."""
    if stays or t <= experiment.settings["rounds"] // 2:
        everyone = [client.id for client in experiment.clients]
        experiment = experiment._replace(available=everyone)
    return draw_participants(experiment, t)


def rows(flags: list[str]) -> Iterator[list]:
    """Lines of the CSV."""
    command = shlex.join(["python", "-m", "tests.forgetting", *flags])
    for stays in (False, True):
        with patch.object(run, "draw_participants", partial(drawn, stays=stays)):
            for line in lines_of([*flags, *FIXED]):
                yield [command, files.commit(), files.machine(), "stays" if stays else "drops out",
                       line["round"], line["seen_accuracy"], line["unseen_accuracy"]]


if __name__ == "__main__":
    write_csv(["command", "commit", "machine", "client", "round", "other classes", "its classes"],
              rows(sys.argv[1:]))
