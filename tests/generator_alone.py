"""Accuracy by the generator of a finished AP-FL run alone (not collected by pytest).

    python -m tests.generator_alone runs/apfl-digits-0

Trains a classifier from the initial weights on synthetic samples of all classes alike, as a friend
model is trained.  Prints its accuracy on test images, for participants' classes and for others.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from commands import config, experiment_of

import apfl
import data
import evaluation
import federation
import files
import generator
import models


def main(out: Path) -> None:
    """Train the classifier and print its accuracies."""
    settings = config(out)
    experiment = experiment_of(settings)
    weights = files.load_checkpoint(out, "cpu").stage_results["generator"]
    net = generator.load_generator(weights, experiment.data.x_train.shape[1], settings["noise_dim"])

    # A friend model that begins with the initial weights
    ((arch, initial),) = federation.first_server(experiment)["weights"].items()
    update = partial(apfl.apfl_friend_update, friend_labels="all", **{
        name: settings[name] for name in ("friend_epochs", "batch_size", "synthetic_per_class")})
    task = federation.Task(experiment.clients[-1], 0, (initial, net))
    model = experiment.network(arch, federation.train_client(experiment, update, task).kept)

    # Accuracy
    predicted = models.predict(model, experiment.data.x_test,
                               data.preparation(experiment.statistics))
    labels = experiment.data.y_test
    print(settings["semantics"], evaluation.zero_shot_accuracies(
        (predicted == labels)[None], labels, experiment.seen, experiment.unseen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
