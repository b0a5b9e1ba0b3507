"""What the generator of a finished AP-FL run carries alone (not collected by pytest).

    python -m tests.generator_alone runs/apfl-digits-0

Trains a classifier from the initial weights, not the global model's, on synthetic samples of all
classes alike, as a friend model is trained, and prints its accuracy on real test images: of the
classes that clients held who took part, and of the others.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

import apfl
import data
import files
import generator
import models
import run
from baselines import Task


def main(out: Path) -> None:
    settings = json.loads((out / "config.json").read_text())
    torch.set_num_threads(run.num_cores())
    experiment = run.prepare_experiment(settings)
    progress = files.load_checkpoint(out, settings["device"])
    channels, names = experiment.data.x_train.shape[1], experiment.data.classes
    net = generator.load_generator(progress.after["generator"], channels, settings["noise_dim"])
    (arch,) = models.MODELS[settings["model"]]
    start = models.initial_weights([arch], channels, len(names), data.torch_stream(
        settings["seed"], data.INITIAL_WEIGHTS), experiment.data.x_train.device)[arch]
    befriend = partial(apfl.apfl_friend_update, friend_labels="all", **{
        name: settings[name] for name in ("friend_epochs", "batch_size", "synthetic_per_class")})
    task = Task(experiment.clients[-1], 0, (start, net))
    model = experiment.network(arch, run.train_client(experiment, befriend, task).kept)
    predicted = models.predict(model, experiment.data.x_test,
                               data.preparation(experiment.statistics))
    labels = experiment.data.y_test
    print(f"{settings['semantics']}, {len(names)} classes, chance {100 / len(names):.1f} %")
    for what, classes in (("seen", experiment.seen), ("unseen", experiment.unseen)):
        each = [100 * (predicted[labels == label] == label).double().mean().item()
                for label in classes]
        if each:
            print(f"{what:7} {sum(each) / len(each):5.1f} %   " + ", ".join(
                f"{names[label]} {value:.1f}" for label, value in zip(classes, each)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
