"""Partitions: training and test images per client, and the images of the server.

Partitions return the indices (n_k,) of each client's images, ascending.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import (IMAGE_SIZE, PARTITION, PROXY, SUBSET, TEST_SHARES, TEST_SUBSET, ClientData,
                  Dataset, channel_statistics, load, numpy_stream, preparation)

MIN_IMAGES = 10  # per client under the Dirichlet partition, the usual rule of the field
MAX_REDRAWS = 10_000  # Dirichlet partitions drawn before giving up
PROXIES = ("holdout", "noise")  # unlabelled images for a server, besides those of an .npz file
PROXY_IMAGES = 5000  # largest number of unlabelled images at the server
VALIDATION_IMAGES = 1000  # largest number of labelled images at the server
SERVER_SHARE = 0.1  # size of each part at the server, per image of the clients, if few are left


class Split(NamedTuple):
    """A data set split among clients."""

    data: Dataset
    parts: list[Tensor]  # client -> indices (n_k,) of its training images, ascending
    test_shares: list[Tensor]  # client -> indices of its test images, ascending
    dropouts: list[int]  # ids of clients that drop out before the first round
    seen: list[int]  # classes of participants, the clients that do not drop out
    unseen: list[int]  # classes that dropout clients alone hold
    statistics: tuple[Tensor, Tensor]  # mean, standard deviation per channel, of participants
    proxy: Tensor | None  # unlabelled images of the server, uint8 (N, C, 32, 32)
    validation: tuple[Tensor, Tensor] | None  # labelled images of the server, and their labels


# ----------------------------------------------------------------- a data set split among clients

def split_data(whole: Dataset, num_clients: int, seed: int, *, train_images: int | None = None,
               test_images: int | None = None, partition: str = "dirichlet",
               alpha: float | None = 0.5, classes_per_client: int | None = 2,
               missing_classes: float | None = None, proxy: str | None = None) -> Split:
    """Split a data set among clients, with images for the server if proxy is given.

    train_images, proxy: see choose_images and proxy_images
    test_images: size of a class-balanced subset of the test images; None: all
    partition: "iid"; "dirichlet", which reads alpha; "pathological", which reads classes_per_client
    missing_classes: None, or AP-FL's dropout setting in place of a partition, see
        partition_dropout.  Images of dropout clients are not used, not even for the statistics
    Raises ValueError if no such split exists, or if a client gets fewer than two images.
    """
    # Images in use
    rows, *server_rows = choose_images(whole.y_train, seed, train_images=train_images, proxy=proxy)
    data = whole
    if len(rows) < len(whole.y_train):
        data = data._replace(x_train=whole.x_train[rows], y_train=whole.y_train[rows])
    if test_images is not None:
        rows = balanced_subset(whole.y_test, test_images, numpy_stream(seed, TEST_SUBSET), "test")
        data = data._replace(x_test=whole.x_test[rows], y_test=whole.y_test[rows])

    # Images per client
    parts, dropouts = draw_parts(data.y_train, num_clients, numpy_stream(seed, PARTITION),
                                 partition, alpha, classes_per_client, missing_classes)
    test_shares = share_test(data.y_test, data.y_train, parts, numpy_stream(seed, TEST_SHARES))

    # Classes of participants, and classes that dropout clients alone hold
    participating = torch.cat([part for k, part in enumerate(parts) if k not in dropouts])
    seen = data.y_train[participating].unique().tolist()
    held = data.y_train[torch.cat(parts)].unique().tolist()
    unseen = [label for label in held if label not in seen]

    # Statistics, and images of the server
    return Split(data, parts, test_shares, dropouts, seen, unseen,
                 channel_statistics(data.x_train, participating),
                 *draw_server_images(whole, server_rows, seen, proxy, seed))


def draw_parts(labels: Tensor, num_clients: int, rng: np.random.Generator, partition: str,
               alpha: float | None, classes_per_client: int | None,
               missing_classes: float | None) -> tuple[list[Tensor], list[int]]:
    """Draw the training images per client and the clients that drop out, see split_data."""
    if len(labels) < 2 * num_clients:
        raise ValueError(f"{len(labels)} training images cannot give each of {num_clients} clients "
                         "the two that it needs: use fewer --clients or more images")

    # Partition
    dropouts = []
    if missing_classes is not None:
        parts, dropouts = partition_dropout(labels, num_clients, missing_classes,
                                            classes_per_client, rng)
    elif partition == "iid":
        parts = partition_iid(labels, num_clients, rng)
    elif partition == "dirichlet":
        parts = partition_dirichlet(labels, num_clients, alpha, rng)
    else:
        parts = partition_pathological(labels, num_clients, classes_per_client, rng)

    # Batch normalisation cannot train on a single image.
    if min(len(part) for part in parts) < 2:
        raise ValueError("this partition leaves a client with fewer than two images: use fewer "
                         "--clients or more images")
    return parts, dropouts


def draw_server_images(whole: Dataset, server_rows: list[Tensor], seen: list[int],
                       proxy: str | None, seed: int) -> tuple:
    """Proxy and validation images of Split, or None each, from the server_rows of choose_images."""
    if proxy is None:
        return None, None

    # No image of a class that participants lack may reach the server.
    held_out, validation = (rows[torch.isin(whole.y_train[rows], torch.tensor(seen))]
                            for rows in server_rows)
    return (proxy_images(proxy, whole, held_out, seed),
            (whole.x_train[validation], whole.y_train[validation]))


def server_images(split: Split) -> dict[str, ClientData]:
    """Images of the server as clients have theirs: "proxy", labelled zero, and "validation"."""
    if split.proxy is None:
        return {}
    prepare = preparation(split.statistics)
    zeros = torch.zeros(len(split.proxy), dtype=torch.int64, device=split.proxy.device)
    parts = {"proxy": (split.proxy, zeros), "validation": split.validation}
    return {name: ClientData(images, labels, torch.arange(len(images), device=images.device),
                             prepare) for name, (images, labels) in parts.items()}


def network_input(split: Split) -> dict:
    """Input and output of a network for this data, as numbers and words for a JSON file."""
    mean, deviation = (value.flatten().tolist() for value in split.statistics)
    return {"channels": len(mean), "size": IMAGE_SIZE, "mean": mean, "deviation": deviation,
            "classes": split.data.classes}


# ----------------------------------------------------------------------------------- images in use

def choose_images(labels: Tensor, seed: int, *, train_images: int | None = None,
                  proxy: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the images of the clients, and those of the server to distil on and validate with.

    train_images: size of a class-balanced subset for the clients; None: all images
    proxy: None: no images for the server, "holdout": both parts, else no images to distil on.  Both
        come from the images that the subset leaves over.  If these are too few, the clients give up
        images until each part is SERVER_SHARE of theirs
    """
    chosen = torch.arange(len(labels))
    if train_images is not None:
        chosen = balanced_subset(labels, train_images, numpy_stream(seed, SUBSET), "train")
    if proxy is None:
        return chosen, chosen[:0], chosen[:0]

    # Sizes of the server's parts
    order = torch.from_numpy(numpy_stream(seed, PROXY).permutation(len(labels)))
    is_chosen = torch.isin(order, chosen)
    share, left_over = round(SERVER_SHARE * len(chosen)), int((~is_chosen).sum())
    num_validation = min(VALIDATION_IMAGES, share)
    largest = PROXY_IMAGES if proxy == "holdout" else 0
    num_held_out = min(largest, max(left_over - num_validation, share))

    # Images left over first, then images of the clients
    order = torch.cat([order[~is_chosen], order[is_chosen]])[:num_held_out + num_validation]
    return chosen[~torch.isin(chosen, order)], order[:num_held_out], order[num_held_out:]


def proxy_images(proxy: str, whole: Dataset, held_out: Tensor, seed: int) -> Tensor:
    """Unlabelled images that a server distils on, uint8 (N, C, 32, 32).

    proxy: "holdout" for training images that no client has, "noise", or the path of an .npz file
    held_out: indices of the images for "holdout", from choose_images
    Raises ValueError if there are fewer than two images, or images with other channels.
    """
    channels, rng = whole.x_train.shape[1], numpy_stream(seed, PROXY)
    if proxy == "holdout":
        images = whole.x_train[held_out]
    elif proxy == "noise":
        shape = (min(PROXY_IMAGES, len(whole.y_train)), channels, IMAGE_SIZE, IMAGE_SIZE)
        images = torch.from_numpy(rng.integers(256, size=shape, dtype=np.uint8))
    elif not proxy.lower().endswith(".npz"):
        raise ValueError(f"unknown --proxy '{proxy}': choose one of {', '.join(PROXIES)}, or give "
                         "the path of an .npz file")
    else:
        images = load(proxy).x_train
        images = images[torch.from_numpy(rng.permutation(len(images))[:PROXY_IMAGES])]
    if images.shape[1] != channels or len(images) < 2:
        raise ValueError(f"--proxy {proxy} has {len(images)} images of {images.shape[1]} channels, "
                         f"and at least 2 of {channels} are needed: give another --proxy")
    return images


def balanced_subset(labels: Tensor, count: int, rng: np.random.Generator,
                    part: str = "train") -> Tensor:
    """Draw indices (count,) of a subset with class counts as equal as the labels allow.

    Raises ValueError if there are fewer labels than count; part: "train" or "test", named there.
    """
    if count > len(labels):
        raise ValueError(f"--{part}-images {count} is more than the {len(labels)} "
                         f"{'training' if part == 'train' else part} images there are")

    # Rank of each image among the shuffled images of its class
    order = rng.permutation(len(labels))
    shuffled = labels.numpy()[order]
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(shuffled):
        rank[shuffled == label] = np.arange((shuffled == label).sum())

    # The first images of all classes, then the second ones, ...
    by_rank = order[np.argsort(rank, kind="stable")]
    return torch.from_numpy(np.sort(by_rank[:count]))


# --------------------------------------------------------------------------------------- partitions

def partition_iid(labels: Tensor, num_clients: int, rng: np.random.Generator) -> list[Tensor]:
    """Split the images at random into num_clients parts whose sizes differ by one at most."""
    return [torch.from_numpy(np.sort(part))
            for part in np.array_split(rng.permutation(len(labels)), num_clients)]


def partition_dirichlet(labels: Tensor, num_clients: int, alpha: float, rng: np.random.Generator,
                        *, minimum: int = MIN_IMAGES, redraws: int = MAX_REDRAWS) -> list[Tensor]:
    """Split each class among the clients in proportions drawn from a symmetric Dirichlet(alpha).

    The usual non-IID split (Lin et al., FedDF, NeurIPS 2020; FedIN Sec. 5.1); a smaller alpha is a
    stronger skew.  Redrawn until each client has minimum images; ValueError after redraws draws.
    """
    sizes = labels.bincount().numpy()
    for _ in range(redraws if len(labels) >= minimum * num_clients else 0):
        # Ends of the clients' ranges within each class, (classes, clients)
        shares = rng.dirichlet(np.full(num_clients, alpha), size=len(sizes))
        ends = np.rint(shares.cumsum(axis=1) * sizes[:, None]).astype(np.int64)
        ends[:, -1] = sizes  # exact, whatever the rounding in the cumulative sum
        counts = np.diff(ends, axis=1, prepend=0)
        if counts.sum(axis=0).min() >= minimum:
            return cut_classes(labels, counts, rng)

    raise ValueError(f"no Dirichlet({alpha:g}) split of {len(labels)} images gives {num_clients} "
                     f"clients {minimum} each: use fewer clients, more images or a larger --alpha")


def partition_pathological(labels: Tensor, num_clients: int, classes_per_client: int,
                           rng: np.random.Generator) -> list[Tensor]:
    """Give each client classes_per_client classes; the holders of a class share it equally.

    Images of a class without a holder are left out.  Raises ValueError if there are fewer classes.
    """
    num_classes = int(labels.max()) + 1
    if classes_per_client > num_classes:
        raise ValueError(f"--classes-per-client must not be more than the {num_classes} classes")
    holders = assign_classes(num_classes, num_clients, classes_per_client, rng)
    return deal_classes(labels, holders, num_clients, rng)


def partition_dropout(labels: Tensor, num_clients: int, missing: float, classes_per_client: int,
                      rng: np.random.Generator) -> tuple[list[Tensor], list[int]]:
    """Split for AP-FL's dropout setting: gamma classes per client, and the last clients drop out.

    missing: share of the C classes that participants lack (MC in the paper's Table 3): the last
        round(missing C) ones, at least one
    As few clients drop out as can hold the missing classes, the last ones by id.  Their other
    places go to the classes before.  Participants share the rest as in partition_pathological.
    Returns the parts and the ids of the dropout clients.  Ten clients, ten classes, gamma 2 and a
    share of 0.2 give the paper's Table 1: client 9 alone holds classes 8 and 9.
    Raises ValueError if too few classes or clients are left.
    """
    # Classes and clients on each side
    num_classes = int(labels.max()) + 1
    num_missing = max(1, round(missing * num_classes))
    num_dropouts = -(-num_missing // classes_per_client)
    num_seen, num_participants = num_classes - num_missing, num_clients - num_dropouts
    if num_seen < 2 or num_participants < 1:
        raise ValueError(f"--missing-classes {missing:g} leaves {num_seen} of {num_classes} "
                         f"classes to {max(0, num_participants)} of {num_clients} clients: at "
                         "least two classes and one client must take part")
    if classes_per_client > num_seen:
        raise ValueError(f"with --missing-classes give --classes-per-client {num_seen} or less")

    # Holders of each class: participants, then dropout clients from the last class downwards
    holders = assign_classes(num_seen, num_participants, classes_per_client, rng)
    holders += [[] for _ in range(num_missing)]
    for place in range(num_dropouts * classes_per_client):
        holders[num_classes - 1 - place].append(num_clients - 1 - place // classes_per_client)
    return deal_classes(labels, holders, num_clients, rng), [*range(num_participants, num_clients)]


def classes_each(num_classes: int, missing: float | None) -> int:
    """Default of gamma, classes per client: 2, or in the dropout setting max(2, ceil(C / 5))."""
    # Ten clients of two classes each (the paper's Table 1) could not hold a hundred classes.
    return 2 if missing is None else max(2, -(-num_classes // 5))


def assign_classes(num_classes: int, num_clients: int, classes_per_client: int,
                   rng: np.random.Generator) -> list[list[int]]:
    """Draw the client ids that hold each class, at least one if there are enough places."""
    holders = [[] for _ in range(num_classes)]
    for client in range(num_clients):
        # Classes with the fewest holders, the last key, come first; the random key breaks ties.
        fewest_first = np.lexsort((rng.random(num_classes), [len(clients) for clients in holders]))
        for label in fewest_first[:classes_per_client]:
            holders[label].append(client)
    return holders


def deal_classes(labels: Tensor, holders: list[list[int]], num_clients: int,
                 rng: np.random.Generator) -> list[Tensor]:
    """Share the images of each class equally among the clients that hold it."""
    counts = np.zeros((len(holders), num_clients), dtype=np.int64)
    for row, clients, size in zip(counts, holders, labels.bincount().tolist()):
        each, rest = divmod(size, max(1, len(clients)))
        row[clients] = each
        row[clients[:rest]] += 1
    return cut_classes(labels, counts, rng)


def cut_classes(labels: Tensor, counts: np.ndarray, rng: np.random.Generator) -> list[Tensor]:
    """Draw the images of each client, given their counts (classes, clients)."""
    parts = [[] for _ in counts.T]
    for label, ends in enumerate(counts.cumsum(axis=1)):
        members = rng.permutation(np.flatnonzero(labels.numpy() == label))
        for part, piece in zip(parts, np.split(members, ends)):
            part.append(piece)
    return [torch.from_numpy(np.sort(np.concatenate(part))) for part in parts]


def share_test(test_labels: Tensor, train_labels: Tensor, parts: list[Tensor],
               rng: np.random.Generator) -> list[Tensor]:
    """Share the test images in proportion to the clients' training images of each class.

    Rounded by largest remainders, ties to the lower id.  Shares may be empty, and test images of a
    class that no client holds are left out.
    """
    # Training images per class and client
    num_classes = int(max(test_labels.max(), train_labels.max())) + 1
    held = np.stack([train_labels[part].bincount(minlength=num_classes) for part in parts], axis=1)

    # Test images, rounded down first, then one more for the largest remainders
    counts = np.zeros_like(held)
    sizes = test_labels.bincount(minlength=num_classes).tolist()
    for row, weights, size in zip(counts, held, sizes):
        if weights.any():
            row[:], remainder = np.divmod(weights * size, weights.sum())
            row[np.argsort(-remainder, kind="stable")[:size - row.sum()]] += 1
    return cut_classes(test_labels, counts, rng)


# ---------------------------------------------------------------------------------- settings, flags

def split_by_settings(whole: Dataset, settings: Mapping[str, Any]) -> Split:
    """Split a data set as the settings of a run say; see split_data."""
    proxy = settings.get("proxy") if settings.get("distillation_steps") else None
    return split_data(
        whole, settings["clients"], settings["seed"], train_images=settings["train_images"],
        test_images=settings["test_images"], partition=settings["partition"],
        alpha=settings.get("alpha"), classes_per_client=settings.get("classes_per_client"),
        missing_classes=settings["missing_classes"], proxy=proxy)


def add_arguments(add: Callable, number: Callable) -> None:
    """Add the flags on data; see run.parser for add and number."""
    add("--train-images", type=number(int, 1), help="use only N training images (class-balanced)")
    add("--test-images", type=number(int, 1), help="use only N test images (class-balanced)")
    add("--partition", choices=["iid", "dirichlet", "pathological"], help="split of the training "
        f"images among clients (default: dirichlet, at least {MIN_IMAGES} images per client)")
    add("--alpha", type=number(float, above=0), help="dirichlet: smaller is more skewed (AP-FL: "
        "0.01 to 0.1)")
    add("--classes-per-client", type=number(int, 1), help="pathological: gamma (default: 2; with "
        "--missing-classes at least a fifth of the classes)")
    add("--missing-classes", type=number(float, high=1, above=0), help="AP-FL's dropout setting "
        "(Sec. 4.1, Table 1): pathological, with this share of the classes only at clients that "
        "never take part (0.1, 0.2)")
    add("--augment", action="store_true", help="random crop, flip and Cutout; on digits, svhn and "
        "emnist Cutout alone")
    add("--data-dir", metavar="DIR", help="folder of downloads (default: data)")
