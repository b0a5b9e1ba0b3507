"""A global model's last layer under skew, and what could mend it (not collected by pytest).

    python -m tests.calibration FOLDER ... > results/calibration.csv
    python -m tests.calibration --draw results/calibration.csv

FOLDER: a finished run of AP-FL, or of FedAvg on one network.  Its global model keeps all layers but
the last, which is trained further on features of real training images, on features that ccvr.py
draws, and on features of the generator's images; or its bias alone is.  A line for each gives the
accuracy in percent on the whole test set.  The last lines are of a linear probe: how many of the
features that it was not trained on it assigns rightly to training images or to the generator's, 50
if they cannot be told apart; and, to compare, to training or to test images.
"""

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import analysis
import ccvr
import data
import files
import generator
import pictures
import run
from baselines import fedavg_client_update
from federation import Experiment
from files import Progress
from models import TEST_BATCH, State, adam, predict, representation

REAL, SYNTHETIC = (50, 500), 300  # images per class
EPOCHS = ccvr.CALIBRATION_EPOCHS


class Bias(nn.Module):
    """Add a trained bias to logits."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.bias


@torch.no_grad()
def features_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Features (N, d) of standardised images, in evaluation mode."""
    model.eval()
    return torch.cat([representation(model, part) for part in inputs.split(TEST_BATCH)])


def train(model: nn.Module, state: State, x: Tensor, y: Tensor) -> State:
    """Train a small model on features or logits, as ccvr.calibrated does."""
    images = data.ClientData(x, y, torch.arange(len(y)), prepare=lambda part: part)
    result = fedavg_client_update(model, adam(model, ccvr.LR, fused=True), state, images,
                                  data.streams(0, 0, 0), local_epochs=EPOCHS, batch_size=ccvr.BATCH)
    return result.update.weights


def balanced(labels: Tensor, per_class: int) -> Tensor:
    """Evenly spaced rows of images of every class; fewer where a class has fewer."""
    chosen = []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        count = min(per_class, len(rows))
        chosen.append(rows[torch.linspace(0, len(rows) - 1, count).long()])
    return torch.cat(chosen)


def measured(experiment: Experiment, progress: Progress) -> Iterator[tuple[str, float]]:
    """Name of a measure, and its outcome in percent."""
    if experiment.dropouts:
        sys.exit("error: a run with --missing-classes, whose features lack classes of the test set")

    # Global model, and its features
    ((arch, weights),) = progress.server["weights"].items()
    net, images, prepare = experiment.network(arch, weights), experiment.data, experiment.prepare
    rows = torch.cat([experiment.clients[k].indices for k in experiment.available])
    features, labels = features_of(net, prepare(images.x_train[rows])), images.y_train[rows]
    tests = features_of(net, prepare(images.x_test))
    layer = {"weight": weights[ccvr.LAST + "weight"], "bias": weights[ccvr.LAST + "bias"]}

    def accuracy(state: State) -> float:
        logits = tests @ state["weight"].T + state["bias"]
        return 100 * float((logits.argmax(dim=1) == images.y_test).double().mean())

    def retrained(what: str, x: Tensor, y: Tensor) -> Iterator[tuple[str, float]]:
        new = train(nn.Linear(x.shape[1], len(layer["bias"])), layer, x, y)
        yield f"last layer, {what}", accuracy(new)
        new = train(Bias(len(layer["bias"])), {"bias": layer["bias"]}, x @ layer["weight"].T, y)
        yield f"bias, {what}", accuracy(layer | new)

    yield "global model", accuracy(layer)
    predicted = predict(net, images.x_test, prepare).bincount(minlength=len(images.classes))
    yield "classes that it predicts for one test image in a hundred or more", (
        100 * float((predicted >= 0.01 * len(images.y_test)).double().mean()))

    # Real images, and features drawn by the statistics of the clients
    for per_class in REAL:
        chosen = balanced(labels, per_class)
        yield from retrained(f"{per_class} real images per class", features[chosen], labels[chosen])
    drawn = ccvr.virtual_features(ccvr.class_statistics(features, labels),
                                  ccvr.VIRTUAL_PER_CLASS, torch.Generator().manual_seed(0))
    yield from retrained("features drawn from class statistics", *drawn)

    # Images of the generator
    if "generator" not in progress.stage_results:
        return
    maker = generator.load_generator(progress.stage_results["generator"], images.x_train.shape[1],
                                     experiment.settings["noise_dim"])
    y = labels.unique().repeat_interleave(SYNTHETIC)
    synthetic = features_of(net, generator.sample(maker, y, torch.Generator().manual_seed(0)))
    yield from retrained("the generator's images", synthetic, y)
    real = features[balanced(labels, SYNTHETIC)]
    yield "linear probe, training or synthetic", probe(real, synthetic)
    yield "linear probe, training or test", probe(real, tests[balanced(images.y_test, SYNTHETIC)])


def probe(one: Tensor, other: Tensor) -> float:
    """Percent of features that logistic regression assigns rightly, trained on the other half."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = min(len(one), len(other))
    chosen = [part[torch.linspace(0, len(part) - 1, count).long()] for part in (one, other)]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    is_one = torch.arange(2 * count) < count
    halves = StratifiedKFold(2, shuffle=True, random_state=0)
    return 100 * float(cross_val_score(model, torch.cat(chosen).numpy(), is_one.numpy(),
                                       cv=halves).mean())


def draw(path: Path) -> None:
    """Draw a CSV of several runs: a panel per data set and alpha."""
    panels: dict[str, dict] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["measure"].startswith(("global", "last")):
                panel = panels.setdefault(f"{line['dataset']}, {line['clients']} clients\n"
                                          f"alpha {line['alpha']}", {})
                panel.setdefault(line["measure"], []).append(float(line["percent"]))
    numbers = {title: {measure: (None, *analysis.mean_and_spread(values))
                       for measure, values in panel.items()} for title, panel in panels.items()}
    pictures.draw_numbers(path.with_suffix(".png"), numbers, dict.fromkeys(numbers, "accuracy, %"),
                          "Global model, its last layer trained further (bars: standard deviation)")


def write(folders: list[str], measured: Callable, *settings: str) -> None:
    """Print what measured(experiment, progress) gives for each run as CSV, with some settings."""
    columns = ["dataset", "alpha", "clients", "seed", *settings]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*columns, "commit of the run", "commit", "machine", "measure", "percent"])
    for folder in folders:
        experiment, progress = run.open_run(folder, device="cpu")
        config = files.read_config(Path(folder))
        known = [Path(value).stem if isinstance(value, str) else value
                 for value in map(config.get, columns)]
        for name, value in measured(experiment, progress):
            writer.writerow([*known, config["versions"]["commit"], files.commit(), files.machine(),
                             name, f"{value:.2f}"])
            sys.stdout.flush()


def main(words: list[str]) -> None:
    """Measure runs and print their lines, or draw them."""
    if words[:1] == ["--draw"]:
        return draw(Path(words[1]))
    write(words, measured)


if __name__ == "__main__":
    main(sys.argv[1:])
