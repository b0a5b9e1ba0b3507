"""Partitions: training and test images per client, and the images of the server.

In reading order: a data set split among clients (split_data); the images in use; the partitions;
the test shares.  Partitions return the indices (n_k,) of each client's images, ascending.
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
    missing_classes: None, or AP-FL's dropout setting in place of a partition, which reads
        classes_per_client, see partition_dropout.  Images of dropout clients are not used at all,
        not even for the statistics
    Raises ValueError if no such split exists, or if a client gets fewer than two images.
    """
    # Images in use
    chosen, *server_rows = choose_images(whole.y_train, seed, train_images=train_images,
                                         proxy=proxy)
    data = whole
    if len(chosen) < len(whole.y_train):
        data = data._replace(x_train=whole.x_train[chosen], y_train=whole.y_train[chosen])
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

    # Images of the server
    proxy_part, validation = draw_server_images(whole, server_rows, seen, proxy, seed)

    return Split(data=data, parts=parts, test_shares=test_shares, dropouts=dropouts, seen=seen,
                 unseen=[label for label in held if label not in seen],
                 statistics=channel_statistics(data.x_train, participating),
                 proxy=proxy_part, validation=validation)


def draw_parts(labels: Tensor, num_clients: int, rng: np.random.Generator, partition: str,
               alpha: float | None, classes_per_client: int | None,
               missing_classes: float | None) -> tuple[list[Tensor], list[int]]:
    """Draw the training images of each client and the clients that drop out, as in split_data."""
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
    for client, part in enumerate(parts):
        if len(part) < 2:
            raise ValueError(f"this partition leaves client {client} with {len(part)} images, and "
                             "each needs two: use fewer --clients or more images")
    return parts, dropouts


def draw_server_images(whole: Dataset, server_rows: list[Tensor], seen: list[int],
                       proxy: str | None, seed: int) -> tuple:
    """Images of the server: unlabelled ones, and (images, labels) to validate with, or None each.

    server_rows: indices of held-out and of validation images, from choose_images
    seen: classes that participants hold; no image of another class may reach the server
    """
    if proxy is None:
        return None, None
    held_out, validation = (rows[torch.isin(whole.y_train[rows], torch.tensor(seen))]
                            for rows in server_rows)
    return (proxy_images(proxy, whole, held_out, seed),
            (whole.x_train[validation], whole.y_train[validation]))


def server_images(split: Split) -> dict[str, ClientData]:
    """Images of the server in the form that clients' images have: "proxy" and "validation".

    Empty for a server without images.  The labels of "proxy" are zeros without a meaning.
    """
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
    """Choose the training images of the clients, and two parts for the server.

    train_images: size of a class-balanced subset for the clients; None: all images
    proxy: None: no images for the server.  Else it gets validation images, and for "holdout" also
        images to distil on.  Both come from the images that the subset leaves over.  If these are
        too few, the clients give up images until each part is SERVER_SHARE of theirs
    Returns indices: the clients' images, those to distil on, and those to validate with.
    Raises ValueError if there are fewer images than train_images.
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

    part: "train" or "test", for the error message
    Raises ValueError if there are fewer labels than count.
    """
    if count > len(labels):
        raise ValueError(f"--{part}-images {count} is more than the {len(labels)} "
                         f"{'training' if part == 'train' else part} images there are")

    # Rank of each image among the shuffled images of its class
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    shuffled = labels.numpy()[order]
    for label in np.unique(shuffled):
        members = order[shuffled == label]
        rank[members] = np.arange(len(members))

    # The first images of all classes, then the second ones, ...
    by_rank = order[np.argsort(rank[order], kind="stable")]
    return torch.from_numpy(np.sort(by_rank[:count]))


# --------------------------------------------------------------------------------------- partitions

def partition_iid(labels: Tensor, num_clients: int, rng: np.random.Generator) -> list[Tensor]:
    """Split the images at random into num_clients parts whose sizes differ by one at most."""
    return [torch.from_numpy(np.sort(part))
            for part in np.array_split(rng.permutation(len(labels)), num_clients)]


def partition_dirichlet(labels: Tensor, num_clients: int, alpha: float, rng: np.random.Generator,
                        *, minimum: int = MIN_IMAGES, redraws: int = MAX_REDRAWS) -> list[Tensor]:
    """Split each class among the clients in proportions drawn from a symmetric Dirichlet(alpha).

    A smaller alpha is a stronger skew.  The usual non-IID split (Lin et al., FedDF, NeurIPS 2020;
    FedIN Sec. 5.1).  The whole split is redrawn until every client has at least minimum images.
    Raises ValueError if that takes more than redraws draws.
    """
    # Ends of the clients' ranges within each class, (classes, clients)
    counts = labels.bincount().numpy()
    is_possible = len(labels) >= minimum * num_clients
    for _ in range(redraws if is_possible else 0):
        shares = rng.dirichlet(np.full(num_clients, alpha), size=len(counts))
        ends = np.rint(shares.cumsum(axis=1) * counts[:, None]).astype(np.int64)
        ends[:, -1] = counts  # exact, whatever the rounding in the cumulative sum
        if np.diff(ends, axis=1, prepend=0).sum(axis=0).min() >= minimum:
            break
    else:
        raise ValueError(f"no Dirichlet({alpha:g}) split of {len(labels)} images gives each of "
                         f"{num_clients} clients at least {minimum}: use fewer clients, more "
                         "images or a larger --alpha")

    # Images of each class, shuffled and cut there
    parts = [[] for _ in range(num_clients)]
    for label, cuts in enumerate(ends):
        members = rng.permutation(np.flatnonzero(labels.numpy() == label))
        for part, piece in zip(parts, np.split(members, cuts[:-1])):
            part.append(piece)
    return [torch.from_numpy(np.sort(np.concatenate(part))) for part in parts]


def partition_pathological(labels: Tensor, num_clients: int, classes_per_client: int,
                           rng: np.random.Generator) -> list[Tensor]:
    """Give each client classes_per_client classes; the holders of a class share it equally.

    Images of a class without a holder are left out, see assign_classes.
    Raises ValueError if classes_per_client exceeds the number of classes.
    """
    num_classes = int(labels.max()) + 1
    if classes_per_client > num_classes:
        raise ValueError(f"--classes-per-client {classes_per_client} is more than the "
                         f"{num_classes} classes there are")
    holders = assign_classes(num_classes, num_clients, classes_per_client, rng)
    return deal_classes(labels, holders, num_clients, rng)


def partition_dropout(labels: Tensor, num_clients: int, missing: float, classes_per_client: int,
                      rng: np.random.Generator) -> tuple[list[Tensor], list[int]]:
    """Split for AP-FL's dropout setting: gamma classes per client, and the last clients drop out.

    missing: share of the C classes that participants lack (MC in the paper's Table 3).  The last
        round(missing C) classes are missing, at least one
    classes_per_client: gamma
    As few clients drop out as can hold the missing classes, the last ones by id.  Their other
    places go to the classes before.  Participants share all classes but the missing ones, as in
    partition_pathological.
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
        raise ValueError(f"a client cannot hold {classes_per_client} of the {num_seen} classes "
                         f"that --missing-classes {missing:g} leaves to those who take part: give "
                         f"--classes-per-client {num_seen} or less")

    # Holders of each class: participants, then dropout clients from the last class downwards
    holders = assign_classes(num_seen, num_participants, classes_per_client, rng)
    holders += [[] for _ in range(num_missing)]
    dropouts = list(range(num_participants, num_clients))
    for place, client in enumerate(reversed(dropouts)):
        end = num_classes - place * classes_per_client
        for label in range(end - classes_per_client, end):
            holders[label].append(client)
    return deal_classes(labels, holders, num_clients, rng), dropouts


def classes_each(num_classes: int, missing: float | None) -> int:
    """Default of gamma, the number of classes per client: 2, in the dropout setting ceil(C / 5).

    missing: see partition_dropout; None outside the dropout setting
    Ten clients of two classes each (the paper's Table 1) could not hold a hundred classes.
    """
    return 2 if missing is None else max(2, -(-num_classes // 5))


def assign_classes(num_classes: int, num_clients: int, classes_per_client: int,
                   rng: np.random.Generator) -> list[list[int]]:
    """Draw the clients that hold each class: class -> client ids.

    Each client in turn takes the classes with the fewest holders so far, ties at random.  Every
    class therefore has a holder if there are enough places.
    """
    holders = [[] for _ in range(num_classes)]
    for client in range(num_clients):
        # lexsort sorts by its last key, and breaks ties by the random first key.
        fewest_first = np.lexsort((rng.random(num_classes), [len(clients) for clients in holders]))
        for label in fewest_first[:classes_per_client]:
            holders[label].append(client)
    return holders


def deal_classes(labels: Tensor, holders: list[list[int]], num_clients: int,
                 rng: np.random.Generator) -> list[Tensor]:
    """Share the images of each class equally among the clients that hold it."""
    parts = [[np.empty(0, dtype=np.int64)] for _ in range(num_clients)]
    for label, clients in enumerate(holders):
        members = rng.permutation(np.flatnonzero(labels.numpy() == label))
        for client, piece in zip(clients, np.array_split(members, max(1, len(clients)))):
            parts[client].append(piece)
    return [torch.from_numpy(np.sort(np.concatenate(part))) for part in parts]


def share_test(test_labels: Tensor, train_labels: Tensor, parts: list[Tensor],
               rng: np.random.Generator) -> list[Tensor]:
    """Share the test images in proportion to the clients' training images of each class.

    Rounded by largest remainders, ties to the lower id.  Test images of a class that no client
    holds are left out.
    Returns the indices of each client's test images, ascending, possibly none.
    """
    # Training images per client and class
    num_classes = int(max(test_labels.max(), train_labels.max())) + 1
    held = np.stack([train_labels[part].bincount(minlength=num_classes).numpy() for part in parts])

    # Test images of each class, shuffled and cut
    shares = [[np.empty(0, dtype=np.int64)] for _ in parts]
    for label in range(num_classes):
        members = rng.permutation(np.flatnonzero(test_labels.numpy() == label))
        total = held[:, label].sum()
        if total == 0:
            continue

        # Rounded down first, then one more image for the largest remainders
        counts, remainder = np.divmod(held[:, label] * len(members), total)
        counts[np.argsort(-remainder, kind="stable")[:len(members) - counts.sum()]] += 1
        for share, piece in zip(shares, np.split(members, counts.cumsum()[:-1])):
            share.append(piece)
    return [torch.from_numpy(np.sort(np.concatenate(share))) for share in shares]


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
    add("--test-images", type=number(int, 1), help="use only N test images (class-balanced), for "
        "faster evaluation")
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
