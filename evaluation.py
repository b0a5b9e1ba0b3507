"""Accuracies: which test images each client's model gets right, for every method.

In reading order: predictions of the distinct models; accuracies over clients, and of dropout
clients; the lines of the log, in the rounds and after the last one.

All accuracies are in percent.  Each client is tested on the whole test set (accuracy) and on its
own test share, whose labels follow its training labels (personal_accuracy).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

import pictures
import ranks
from federation import Ending, Experiment
from models import TEST_BATCH, State, collect_statistics, predict

# -------------------------------------------------------------------------------------- predictions

def predicted_right(experiment: Experiment, in_use: Iterable[tuple[object, str, object, State]],
                    ) -> dict[object, Tensor]:
    """Client -> test images (N,) that its model gets right, bool.

    in_use: client, architecture, key and weights of its model, one after the other, so that not
        all need be in memory.  Equal keys are equal models, and each distinct one predicts once
    """
    images, prepare = experiment.data.x_train, experiment.prepare
    participants = torch.cat([experiment.clients[k].indices for k in experiment.available])

    # The distinct models are dealt out to the processes of the run.
    rank_of, right_here, key_of = {}, {}, {}
    for k, arch, key, weights in in_use:
        key_of[k] = key
        if key in rank_of:
            continue
        rank_of[key] = len(rank_of) % ranks.count()
        if rank_of[key] == ranks.number():
            # Statistics have no effect unless the network was cut by width.
            model = experiment.network(arch, weights)
            collect_statistics(model, spread_batches(images, participants, prepare))
            predicted = predict(model, experiment.data.x_test, prepare)
            right_here[key] = predicted == experiment.data.y_test

    # Every process learns every outcome.
    right = {key: ranks.on_rank(rank, partial(right_here.get, key), experiment.settings["device"])
             for key, rank in rank_of.items()}
    return {k: right[key] for k, key in key_of.items()}


def spread_batches(images: Tensor, indices: Tensor, prepare: Callable) -> Iterator[Tensor]:
    """Batches of images, each spread over all of the indices (n,).

    Networks cut by width take their statistics from these; see models.collect_statistics.
    """
    count = math.ceil(len(indices) / TEST_BATCH)
    return (prepare(images[indices[batch::count]]) for batch in range(count))


# --------------------------------------------------------------------------------------- accuracies

def share_accuracies(right: Mapping[int, Tensor],
                     shares: Sequence[Tensor]) -> dict[str, float | None]:
    """Accuracies over some clients: on the whole test set, and on each client's test share.

    right: client -> which test images its model gets right, (N,) bool
    shares: client -> indices of its test images
    accuracy: mean over the clients;  personal_accuracy: weighted by share, None without shares
    """
    right_total = sum(int(vector.sum()) for vector in right.values())
    right_in_shares = sum(int(vector[shares[k]].sum()) for k, vector in right.items())
    share_total = sum(len(shares[k]) for k in right)
    return {"accuracy": 100 * right_total / sum(len(vector) for vector in right.values()),
            "personal_accuracy": 100 * right_in_shares / share_total if share_total else None}


def zero_shot_accuracies(right: Tensor, labels: Tensor, seen: Sequence[int],
                         unseen: Sequence[int]) -> dict[str, float]:
    """Accuracies as in generalised zero-shot learning; predictions are over all classes.

    right: (clients, N) bool, test images that a client's model gets right;  labels: (N,)
    Means over the seen classes and over the unseen classes, and the harmonic mean of the two.
    """
    def mean_of_classes(classes: Sequence[int]) -> float:
        per_class = [right[:, labels == label].double().mean() for label in classes
                     if (labels == label).any()]
        return 100 * float(sum(per_class) / max(1, len(per_class)))

    on_seen, on_unseen = mean_of_classes(seen), mean_of_classes(unseen)
    means = {"seen_accuracy": on_seen, "unseen_accuracy": on_unseen,
             "harmonic_accuracy": 2 * on_seen * on_unseen / max(1e-9, on_seen + on_unseen)}
    return {name: round(value, 9) for name, value in means.items()}  # 9 for 8.999999999999998


def accuracies(experiment: Experiment, right: Mapping[int, Tensor]) -> dict:
    """Accuracies over all clients, and in the dropout setting those of dropout clients."""
    entry = share_accuracies(right, experiment.test_shares)
    if experiment.dropouts:
        dropouts = {k: right[k] for k in experiment.dropouts}
        for name, value in share_accuracies(dropouts, experiment.test_shares).items():
            entry[f"dropout_{name}"] = value
        entry |= zero_shot_accuracies(torch.stack(list(dropouts.values())),
                                      experiment.data.y_test, experiment.seen, experiment.unseen)
    return entry


def group_accuracies(experiment: Experiment, right: Mapping[int, Tensor],
                     ) -> dict[tuple[str, str], float | None]:
    """(group, name) -> accuracy; group "" is the available clients, "dropout" the dropouts."""
    groups = {"": experiment.available, "dropout": experiment.dropouts}
    return {(group, name): value for group, ids in groups.items() if ids for name, value in
            share_accuracies({k: right[k] for k in ids}, experiment.test_shares).items()}


# --------------------------------------------------------------------------------- lines of the log

def evaluate(experiment: Experiment, server: dict, memory: dict) -> dict:
    """Accuracies of the models that the clients use in the rounds.

    Where clients' networks are cut out of a larger one, full_accuracy is the larger one's.
    """
    # Most methods deploy the global model of the client's architecture, the key.
    in_use = ((client.id, client.arch, *experiment.method.deploy(server, client,
                                                                 memory.get(client.id)))
              for client in experiment.clients)

    # Without a larger network that clients' ones are cut out of, that is all.
    if len(server["weights"]) == len(experiment.networks):
        return accuracies(experiment, predicted_right(experiment, in_use))
    ((arch, whole),) = server["weights"].items()
    right = predicted_right(experiment, chain(in_use, [("full", arch, arch, whole)]))
    full = round(100 * float(right.pop("full").double().mean()), 9)
    return accuracies(experiment, right) | {"full_accuracy": full}


def final_metrics(experiment: Experiment, line: dict, ending: Ending) -> dict:
    """Last line of the log, with the accuracies of the models that clients use in the end.

    line: the last line of the rounds; its accuracies become global_(personal_)accuracy
    With several kinds of models, as in AP-FL, accuracies of each kind are added.
    """
    entry = {**line, "download_mb": line["download_mb"] + ending.download / 1e6,
             "upload_mb": line["upload_mb"] + ending.upload / 1e6}
    for kind, weights in pictures.progress_bar(ending.models.items(), "evaluation", "kind"):
        in_use = ((k, client.arch, id(weights[k]), weights[k])  # equal ids, one network for all
                  for k, client in enumerate(experiment.clients))
        right = predicted_right(experiment, in_use)
        entry |= accuracies(experiment, right)  # clients use the last kind
        if len(ending.models) > 1:
            for (group, name), value in group_accuracies(experiment, right).items():
                entry["_".join(filter(None, (group, kind, name)))] = value
    return entry | {f"global_{name}": line[name] for name in ("accuracy", "personal_accuracy")}
