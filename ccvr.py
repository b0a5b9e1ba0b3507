"""CCVR: the last layer calibrated on virtual features.  Neither FedIN nor AP-FL has it.

Luo et al., No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID
Data, arxiv.org/abs/2106.05001.  After FedAvg's last round every client but dropouts sends mean and
covariance of the features of each of its classes, which are the inputs of the global model's last
layer.  The server pools them, draws features of every class, and trains the last layer on these.
AP-FL can take the outcome for its friend model (--friend calibrated), in place of a model trained
on a generator's images.  Number of drawn features, epochs and optimiser are our choice.

A mean and a covariance tell much of few images: of one image they are its features themselves, from
which an attacker may reconstruct it (analysis.reconstruct).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines import APFL_SETTING, FEDAVG, QUICK_APFL, fedavg_client_update
from data import BATCHES, VIRTUAL_BATCHES, VIRTUAL_FEATURES, ClientData, Stream, streams
from federation import Ending, Experiment, Result, Task, train_clients, train_server
from models import (MODELS, TEST_BATCH, State, adam, empty_network, num_bytes,
                    representation)

VIRTUAL_PER_CLASS = 300  # drawn features per class
CALIBRATION_EPOCHS, BATCH, LR = 30, 64, 1e-3  # Adam trains on them
LAST = "classifier.fc."  # names of the last layer's weights begin with this


# ------------------------------------------------------------------------------ class statistics

class ClassStatistics(NamedTuple):
    """Features of the images of some classes: number, mean, covariance."""

    classes: Tensor  # (c,) int64, ascending, those that have images
    counts: Tensor  # (c,) int64
    means: Tensor  # (c, d)
    covariances: Tensor  # (c, d, d), divided by count - 1; zeros for one image


def class_statistics(features: Tensor, labels: Tensor) -> ClassStatistics:
    """Statistics of features (N, d) by label (N,), in double precision."""
    classes, counts = labels.unique(return_counts=True)
    means, covariances = [], []
    for label, count in zip(classes, counts):
        x = features[labels == label].double()
        means.append(x.mean(dim=0))
        centred = x - means[-1]
        covariances.append(centred.T @ centred / max(1, int(count) - 1))
    return ClassStatistics(classes, counts, torch.stack(means), torch.stack(covariances))


def pooled(parts: Sequence[ClassStatistics]) -> ClassStatistics:
    """Statistics of all clients' images together, from each client's, with no loss but rounding."""
    groups = []
    for label in torch.cat([part.classes for part in parts]).unique():
        # Rows of the clients that hold the class
        rows = [(part, int(index)) for part in parts
                for index in (part.classes == label).nonzero().flatten()]
        counts = torch.stack([part.counts[row] for part, row in rows])
        means = torch.stack([part.means[row] for part, row in rows]).double()
        within = sum((part.counts[row] - 1) * part.covariances[row].double() for part, row in rows)

        # Scatter within and between the clients
        total, shares = counts.sum(), counts.double() / counts.sum()
        mean = shares @ means
        between = (means - mean).T @ (counts[:, None] * (means - mean))
        groups.append((label, total, mean, (within + between) / max(1, int(total) - 1)))
    return ClassStatistics(*map(torch.stack, zip(*groups)))


@torch.no_grad()
def statistics_update(model: nn.Module, optimizer: Optimizer, received: State, data: ClientData,
                      stream: Stream) -> Result:
    """Send the class statistics of the client's images by the global model, in evaluation mode.

    With --augment they are of augmented images, with --amp of features in bfloat16.
    """
    model.load_state_dict(received)
    model.eval()
    features = torch.cat([representation(model, data.batch(rows)[0])
                          for rows in data.indices.split(TEST_BATCH)])
    sent = class_statistics(features, data.labels[data.indices])
    return Result(sent._replace(means=sent.means.float(), covariances=sent.covariances.float()),
                  0.0, 0)


# ------------------------------------------------------------------------------------ calibration

def virtual_features(statistics: ClassStatistics, per_class: int,
                     rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw features (c * per_class, d) from N(mean, covariance) of every class, with their labels.

    Draws are made on the CPU.
    """
    # Symmetric roots, which exist for singular covariances, and whose signs no library chooses
    values, vectors = torch.linalg.eigh(statistics.covariances)
    roots = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.transpose(1, 2)
    noise = torch.randn(len(roots), per_class, roots.shape[1], generator=rng, dtype=torch.float64)
    drawn = statistics.means[:, None] + noise.to(roots.device) @ roots
    return drawn.flatten(0, 1).float(), statistics.classes.repeat_interleave(per_class)


def calibrated(weights: State, features: Tensor, labels: Tensor, stream: Stream, *,
               calibration_epochs: int) -> State:
    """Train a network's last layer on features (N, d) and labels (N,); return all its weights."""
    layer = {name.removeprefix(LAST): tensor for name, tensor in weights.items()
             if name.startswith(LAST)}
    model = empty_network(partial(nn.Linear, *reversed(layer["weight"].shape)), features.device)
    data = ClientData(features, labels, torch.arange(len(labels), device=labels.device),
                      prepare=lambda x: x)
    renamed = {BATCHES: VIRTUAL_BATCHES}
    result = fedavg_client_update(model, adam(model, LR, fused=True), layer, data,
                                  lambda purpose: stream(renamed[purpose]),
                                  local_epochs=calibration_epochs, batch_size=BATCH)
    return weights | {LAST + name: tensor for name, tensor in result.update.weights.items()}


def calibrate(experiment: Experiment, server: dict, *, virtual_per_class: int,
              calibration_epochs: int) -> tuple[State, int]:
    """Calibrate the global model's last layer; return its weights, and the bytes that clients sent.

    Clients that dropped out send nothing, so that what they alone know stays unknown.
    """
    ((arch, weights),) = server["weights"].items()
    tasks = [Task(experiment.clients[k], 0, weights) for k in experiment.available]
    results = train_clients(experiment, statistics_update, tasks, "class statistics")
    sent = [results[k].update for k in sorted(results)]

    def train() -> State:
        stream = streams(experiment.settings["seed"], 0, 0)
        drawn = virtual_features(pooled(sent), virtual_per_class, stream(VIRTUAL_FEATURES))
        return calibrated(weights, *drawn, stream, calibration_epochs=calibration_epochs)

    return train_server(experiment, train), num_bytes(sent)


def ccvr_finish(experiment: Experiment, server: dict, done: dict, save: Callable, *,
                virtual_per_class: int, calibration_epochs: int) -> Ending:
    """Calibrate the last layer of FedAvg's global model once, for all clients.

    done: finished stage -> its outcome;  save(done): stores the outcomes and returns done
    """
    if "calibrated" not in done:
        outcome = calibrate(experiment, server, virtual_per_class=virtual_per_class,
                            calibration_epochs=calibration_epochs)
        done = save(done | {"calibrated": outcome})
    weights, upload = done["calibrated"]
    clients = [client.id for client in experiment.clients]
    return Ending({"client": dict.fromkeys(clients, weights)},
                  len(clients) * calibration_bytes(weights), {}, upload)


def calibration_bytes(weights: State) -> int:
    """Bytes of the global weights and of the calibrated last layer, which a client receives."""
    return num_bytes([weights, {name: tensor for name, tensor in weights.items()
                                if name.startswith(LAST)}])


# ------------------------------------------------------------------------------- method and flags

# A client sends weights, and in the end class statistics.
METHODS = {"ccvr": FEDAVG._replace(
    finish=ccvr_finish, networks={name: net for name, net in MODELS.items() if len(net) == 1},
    defaults=FEDAVG.defaults | APFL_SETTING | {"virtual_per_class": VIRTUAL_PER_CLASS,
                                               "calibration_epochs": CALIBRATION_EPOCHS},
    in_setting={"quick": QUICK_APFL})}


def add_arguments(add: Callable, number: Callable) -> None:
    """Add CCVR's own flags; see run.parser for add and number."""
    add("--virtual-per-class", type=number(int, 1), help="ccvr, apfl with --friend calibrated: "
        f"features drawn per class (default: {VIRTUAL_PER_CLASS}; not in FedIN or AP-FL)")
    add("--calibration-epochs", type=number(int, 1), help="epochs on these features (default: "
        f"{CALIBRATION_EPOCHS}; not in FedIN or AP-FL)")
