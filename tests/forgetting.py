"""Loss of accuracy after a client drops out for good (not collected by pytest).

    python -m tests.forgetting [FLAG VALUE ...] > results/forgetting.csv

Two runs of FedAvg with these flags of run.py.  In the first a client drops out after half of the
rounds, rounded down, and in the second it stays (AP-FL, Sec. 3.1).  It is the dropout client of
--missing-classes 0.2, who alone holds two classes, or with --partition iid the last client.  Prints
CSV: accuracy of the global model after each round, on the classes that others hold and on those
that this client alone holds.
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

FIXED = ["--method", "fedavg", "--setting", "apfl", "--aggregation", "layerwise"]


def drawn(experiment: Experiment, t: int, stays: bool) -> list[int]:
    """Participants of round t, with the dropout client as long as it is there."""
    everyone = [client.id for client in experiment.clients]
    if stays or t <= experiment.settings["rounds"] // 2:
        gone = []
    else:
        gone = experiment.dropouts or everyone[-1:]
    available = [k for k in everyone if k not in gone]
    return draw_participants(experiment._replace(available=available), t)


def rows(flags: list[str]) -> Iterator[list]:
    """Lines of the CSV."""
    command = shlex.join(["python", "-m", "tests.forgetting", *flags])
    skew = [] if "iid" in flags else ["--missing-classes", "0.2"]
    for stays in (False, True):
        with patch.object(run, "draw_participants", partial(drawn, stays=stays)):
            for line in lines_of([*flags, *skew, *FIXED]):
                yield [command, files.commit(), files.machine(), "stays" if stays else "drops out",
                       line["round"], line.get("seen_accuracy", line["accuracy"]),
                       line.get("unseen_accuracy")]


if __name__ == "__main__":
    write_csv(["command", "commit", "machine", "client", "round", "other classes", "its classes"],
              rows(sys.argv[1:]))
