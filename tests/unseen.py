"""Knowledge of unseen classes in models of dropout clients (not collected by pytest).

    python -m tests.unseen FOLDER ... > results/unseen.csv

FOLDER: a finished run of AP-FL with --missing-classes and synthetic friend models.  Accuracy on
unseen classes alone does not tell knowledge from a habit: a model that calls every image unseen has
it too.  So there are lines for the shares of unseen and of seen test images that are called unseen,
and for the accuracy between the unseen labels alone.  Friend models have no other source than the
generator.  Personalised models have a share of the client's own, which learnt from real images of
these classes.  The last lines tell whether the generator has collapsed: the distance of two
synthetic images of a class, in percent of two training images'.
"""

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import apfl
import generator
from federation import Experiment
from files import Progress
from models import predict_logits
from tests.calibration import balanced, write

PER_CLASS = 100  # images per class behind a distance


def measured(experiment: Experiment, progress: Progress) -> Iterator[tuple[str, float]]:
    """Name of a measure, and its outcome in percent, the mean over dropout clients."""
    settings, images, stages = experiment.settings, experiment.data, progress.stage_results
    unseen = torch.tensor(experiment.unseen)
    kinds = apfl.final_models(progress.server, stages, beta=settings["beta"],
                              beta_on=settings["beta_on"])
    for kind in ("friend", "personalised"):
        nets = (experiment.network(experiment.clients[k].arch, kinds[kind][k])
                for k in experiment.dropouts)
        means = 100 * torch.stack([shares(predict_logits(
            net, images.x_test, experiment.prepare), images.y_test, unseen)
            for net in nets]).mean(dim=0)
        for what, value in zip(("unseen images that it gets right", "unseen images called unseen",
                                "seen images called unseen",
                                "right between the unseen labels alone, by chance "
                                f"{100 / len(unseen):.0f}"), means.tolist()):
            yield f"{kind} models: {what}", value

    # Distances within a class
    maker = generator.load_generator(stages["generator"], images.x_train.shape[1],
                                     settings["noise_dim"])
    y = torch.arange(len(images.classes)).repeat_interleave(PER_CLASS)
    synthetic = generator.sample(maker, y, torch.Generator().manual_seed(0))
    rows = balanced(images.y_train, PER_CLASS)
    real = experiment.prepare(images.x_train[rows])
    for kind, classes in (("a seen", experiment.seen), ("an unseen", experiment.unseen)):
        yield f"distance of two images of {kind} class, synthetic in % of real", (
            100 * spread(synthetic, y, classes) / spread(real, images.y_train[rows], classes))


def shares(logits: Tensor, labels: Tensor, unseen: Tensor) -> Tensor:
    """Four shares (4,) from logits (N, C) of images with labels (N,), for unseen classes (U,).

    Of unseen images those predicted rightly and those called unseen; of seen images those called
    unseen; and of unseen images those right if only the logits of unseen classes count.
    """
    is_unseen, predicted = torch.isin(labels, unseen), logits.argmax(dim=1)
    called = torch.isin(predicted, unseen)
    between = unseen[logits[:, unseen].argmax(dim=1)]
    return torch.stack([part.double().mean() for part in (
        (predicted == labels)[is_unseen], called[is_unseen], called[~is_unseen],
        (between == labels)[is_unseen])])


def spread(x: Tensor, y: Tensor, classes: Sequence[int]) -> float:
    """Mean over classes of the distance between two images of a class (root mean square)."""
    by_class = [generator.diversity_loss(x[y == label][None], distance="rms") for label in classes]
    return -float(torch.stack(by_class).mean())


if __name__ == "__main__":
    write(sys.argv[1:], measured, "missing_classes", "semantics", "lambda", "distance")
