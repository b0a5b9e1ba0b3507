"""Data sets, partitions, batches and random streams.  A leaf: knows nothing of models.

In reading order: random streams; loading (digits, torchvision's data sets, any .npz); writing
files; which images a run uses; how they are shared out (share_out, and each partition); what turns
uint8 images into network input, and the batches of one client.

Images are uint8 tensors (N, C, 32, 32), labels int64 (N,).  A client is an index into them: nothing
is ever copied per client, and there is no loader between the tensors and the network.
"""

import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 32  # pixels; both papers resize every image to 32x32
DOWNLOADED = ("svhn", "cifar10", "cifar100", "emnist", "fashionmnist")
DATASETS = ("digits", *DOWNLOADED)
OF_CHARACTERS = ("digits", "svhn", "emnist")  # a flip or a crop would make other characters
MIN_IMAGES = 10  # a client under the Dirichlet partition; the usual rule of the field
MAX_REDRAWS = 10_000  # of a Dirichlet partition, before giving up
PROXIES = ("holdout", "noise")  # unlabelled images of a server, besides those of an .npz
PROXY_IMAGES = 5000  # that it holds at most
VALIDATION_IMAGES = 1000  # labelled ones that it chooses a student by, at most
SERVER_SHARE = 0.1  # of the training images, for each of them where a subset leaves none over

# What a random stream is for.  The numbers enter every seed, so they are part of every result:
# append new ones, never renumber.
(SUBSET, PARTITION, TEST_SHARES, INITIAL_WEIGHTS, PARTICIPANTS, SPEEDS, BATCHES, AUGMENTATION,
 FEATURE_BATCH, FEATURE_POOL, NOISE, FEATURE_NOISE, GENERATOR_WEIGHTS, GENERATOR_NOISE, SYNTHETIC,
 FRIEND_BATCHES, RATE, LATENT, PROXY, PROXY_BATCHES, TEST_SUBSET) = range(21)


class Dataset(NamedTuple):
    """Images uint8 (N, C, 32, 32), labels int64 (N,), class names in the order of the labels."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: list[str]
    digest: str = ""  # of what they were made of, see digest


ARRAYS = Dataset._fields[:5]  # as they are named in an .npz


class ClientData(NamedTuple):
    """The training images of one client: an index into the images that all clients share."""

    images: Tensor  # (N, C, 32, 32) uint8, everybody's
    labels: Tensor  # (N,) int64, everybody's
    indices: Tensor  # (n_k,) int64, this client's
    prepare: Callable[[Tensor], Tensor]  # uint8 images to network input


class Shared(NamedTuple):
    """A data set shared out among clients."""

    data: Dataset
    parts: list[Tensor]  # client -> indices (n_k,) of its training images, ascending
    test_shares: list[Tensor]  # client -> indices of its test images
    dropouts: list[int]  # clients that dropped out before the first round
    seen: list[int]  # classes that clients hold that take part
    unseen: list[int]  # classes that dropout clients alone hold
    statistics: tuple[Tensor, Tensor]  # mean and deviation of a channel, of clients that take part
    proxy: Tensor | None  # unlabelled images that the server holds, uint8,
    validation: tuple[Tensor, Tensor] | None  # and labelled ones, with their labels


# ----------------------------------------------------------------------------------- random streams

def numpy_stream(seed: int, purpose: int, round: int = 0, client: int = 0) -> np.random.Generator:
    """A numpy generator of its own for one purpose, round and client."""
    return np.random.default_rng(np.random.SeedSequence([seed, purpose, round, client]))


def torch_stream(seed: int, purpose: int, round: int = 0, client: int = 0) -> torch.Generator:
    """A torch generator (CPU) of its own for one purpose, round and client.

    Because no two purposes share a stream, a method that draws more than another still sees the
    same participants, batches and initial weights.
    """
    state = np.random.SeedSequence([seed, purpose, round, client]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def drawn(draw: Callable, *size: object, rng: torch.Generator, device: torch.device) -> Tensor:
    """What draw (torch.randn, ...) makes of rng on the CPU, on a device.

    To a GPU it goes from page-locked memory, so that it waits for nothing that the GPU has to do.
    """
    return draw(*size, generator=rng, pin_memory=device.type == "cuda").to(device,
                                                                           non_blocking=True)


# ------------------------------------------------------------------------------------------ loading

def cache_path(dataset: str, data_dir: str | Path) -> Path:
    """Where a downloaded data set is kept once it has the size that is used here."""
    return Path(data_dir) / f"{dataset}-{IMAGE_SIZE}x{IMAGE_SIZE}.npz"


def load(dataset: str | Path, data_dir: str | Path = "data") -> Dataset:
    """Load a data set by name, or a user's own from the path of an .npz file.

    digits needs no download.  The others come through torchvision into data_dir at first use, where
    its checksums are verified, and are then kept there as one uint8 .npz, so that a second start
    reads a single file, unless nothing can be written there.
    Raises ValueError with one line that says what is wrong and what to do.
    """
    dataset = str(dataset)
    if dataset == "digits":
        return read_digits()
    if dataset in DATASETS:
        cache = cache_path(dataset, data_dir)
        with one_at_a_time(cache):  # others may need it too and not have it yet
            found = None if cache.exists() else download(dataset, data_dir)
            if found is not None and not write_cache(cache, partial(write_npz, data=found)):
                return found
        try:
            return read_npz(cache)
        except ValueError as error:
            raise ValueError(f"the cached copy {cache} is damaged: delete it to have it made again"
                             ) from error
    if not dataset.lower().endswith(".npz"):
        raise ValueError(f"unknown dataset '{dataset}': choose one of {', '.join(DATASETS)}, "
                         "or give the path of an .npz file")
    data = read_npz(dataset)
    for label, count in enumerate(data.y_train.bincount(minlength=len(data.classes)).tolist()):
        if count == 0:
            raise ValueError(f"{dataset}: class {label} ({data.classes[label]!r}) has no training "
                             "image; number the classes 0, 1, 2, ... without gaps")
    return data


def read_digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8, 17 gray levels), always split 1,437 / 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=360, random_state=0,
                                   stratify=digits.target)
    x, y = to_images(images), torch.from_numpy(digits.target.astype(np.int64))
    names = [str(name) for name in digits.target_names]
    return Dataset(x[train], y[train], x[test], y[test], names, digest(images, y))


def download(dataset: str, data_dir: str | Path) -> Dataset:
    """Fetch one of torchvision's data sets into data_dir, or find it there, and verify it.

    SVHN is its train split alone (73,257 images).  EMNIST is the letters split: labels 0..25, the
    images turned upright (the files store them transposed).
    Raises ValueError if it can be neither downloaded nor verified.
    """
    from torchvision import datasets as sets

    root = str(data_dir)
    try:
        if dataset == "svhn":
            train, test = (sets.SVHN(root, split, download=True) for split in ("train", "test"))
            return from_arrays(train.data.transpose(0, 2, 3, 1), train.labels,
                               test.data.transpose(0, 2, 3, 1), test.labels,
                               [str(digit) for digit in range(10)])
        if dataset == "emnist":
            train, test = (sets.EMNIST(root, "letters", train=part, download=True)
                           for part in (True, False))
            return from_arrays(train.data.transpose(1, 2).numpy(), train.targets.numpy() - 1,
                               test.data.transpose(1, 2).numpy(), test.targets.numpy() - 1,
                               [chr(ord("a") + letter) for letter in range(26)])
        kind = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100,
                "fashionmnist": sets.FashionMNIST}[dataset]
        train, test = (kind(root, train=part, download=True) for part in (True, False))
        return from_arrays(np.asarray(train.data), np.asarray(train.targets),
                           np.asarray(test.data), np.asarray(test.targets), train.classes)
    except Exception as error:  # torchvision raises a dozen kinds on a broken file
        damaged = ", ".join(str(path) for path in damaged_originals(dataset, data_dir))
        remedy = "check the connection, or put the original files there (--data-dir)"
        if damaged:
            remedy = f"delete {damaged}, which is damaged, or put a sound copy in its place"
        raise ValueError(f"{dataset} could not be loaded into '{root}' "
                         f"({first_line(error)[:100]}): {remedy}") from error


def damaged_originals(dataset: str, data_dir: str | Path) -> list[Path]:
    """Those of torchvision's files that are in data_dir but not as they should be."""
    from torchvision import datasets as sets
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor as read_idx
    from torchvision.datasets.utils import check_integrity

    kind = {"svhn": sets.SVHN, "cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100,
            "emnist": sets.EMNIST, "fashionmnist": sets.FashionMNIST}[dataset]
    folder = Path(data_dir)
    if dataset == "svhn":
        sums = {name: md5 for _, name, md5 in kind.split_list.values()}
    elif dataset.startswith("cifar"):
        sums = {f"{kind.base_folder}/{name}": md5 for name, md5 in kind.train_list + kind.test_list}
        sums |= {f"{kind.base_folder}/{kind.meta['filename']}": kind.meta["md5"],
                 kind.filename: kind.tgz_md5}
    else:
        folder = folder / kind.__name__ / "raw"
        sums = {"gzip.zip": kind.md5} if dataset == "emnist" else dict(kind.resources)
    found = [folder / name for name, md5 in sums.items()
             if (folder / name).exists() and not check_integrity(str(folder / name), md5)]
    used = "emnist-letters-*-ubyte" if dataset == "emnist" else "*-ubyte"
    for unpacked in sorted(folder.glob(used)):  # for these there are no checksums
        try:
            read_idx(str(unpacked))
        except Exception:  # by what is wrong, a dozen kinds
            found.append(unpacked)
    return found


def read_npz(path: str | Path) -> Dataset:
    """Read and check an .npz with x_train, y_train, x_test, y_test and optionally classes.

    Images: N x H x W (gray) or N x H x W x C with C 1 or 3; integers in 0..255, or floats in 0..1.
    Labels: integers, one an image, 0 to the number of classes less one.  Nothing is unpickled.
    Raises ValueError with one line that names the file and what is wrong with it.
    """
    if not Path(path).exists():
        raise ValueError(f"there is no file {path}: check its path")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is one array and no archive")
        with archive:
            arrays = {name: archive[name] for name in archive.files if name in ARRAYS}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds a file that is no array")
    except Exception as error:  # numpy and zipfile raise a dozen kinds on a broken file
        raise ValueError(f"{path} cannot be read ({first_line(error)}): expected an .npz written "
                         "by numpy.savez with plain numeric arrays") from error
    missing = [name for name in ARRAYS[:4] if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it must hold x_train, y_train, "
                         "x_test and y_test, and may hold classes")
    try:
        loaded = from_arrays(*(arrays.get(name) for name in ARRAYS))
        # Of the file's own arrays, since another machine may resize them a little differently.
        return loaded._replace(digest=digest(*arrays.values(), loaded.classes))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_npz(path: Path, data: Dataset) -> None:
    """Write a data set as the .npz that read_npz reads; a file half written never gets the name."""
    write_atomically(path, lambda file: np.savez(
        file, classes=np.array(data.classes),
        x_train=data.x_train.permute(0, 2, 3, 1).numpy(), y_train=data.y_train.numpy(),
        x_test=data.x_test.permute(0, 2, 3, 1).numpy(), y_test=data.y_test.numpy()))


def from_arrays(x_train, y_train, x_test, y_test, classes=None) -> Dataset:
    """Check arrays of the layout that read_npz describes, and make a Dataset of 32x32 images.

    Raises ValueError that names the array and what is wrong with it.
    """
    for part, labels, images in (("train", y_train, x_train), ("test", y_test, x_test)):
        check_images(f"x_{part}", images)
        check_labels(f"y_{part}", labels, len(images))
    if classes is None:
        if y_train.max() >= len(y_train):
            raise ValueError(f"y_train holds label {y_train.max()} in {len(y_train)} labels: "
                             "number the classes 0, 1, 2, ... without gaps")
        classes = range(int(y_train.max()) + 1)
    names = class_names(np.asarray(classes))
    if len(names) < 2:
        raise ValueError(f"there must be at least two classes, not {len(names)}")
    for part, labels in (("train", y_train), ("test", y_test)):
        if labels.max() >= len(names):
            raise ValueError(f"y_{part} holds label {labels.max()}, but there are {len(names)} "
                             f"classes, so labels must lie in 0..{len(names) - 1}")
    tensors = [to_images(x_train), torch.from_numpy(y_train.astype(np.int64)),
               to_images(x_test), torch.from_numpy(y_test.astype(np.int64))]
    if tensors[0].shape[1] != tensors[2].shape[1]:
        raise ValueError("x_train and x_test must have the same number of channels, not "
                         f"{tensors[0].shape[1]} and {tensors[2].shape[1]}")
    return Dataset(*tensors, names)


def check_images(name: str, images: np.ndarray) -> None:
    """Raise ValueError unless the array is a non-empty batch of gray or colour images."""
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise ValueError(f"{name} has shape {images.shape}; expected N x H x W or N x H x W x C "
                         "with C 1 or 3 (channels last)")
    if images.size == 0:
        raise ValueError(f"{name} is empty")
    if images.dtype.kind not in "uif":
        raise ValueError(f"{name} has dtype {images.dtype}; expected uint8, or floats in 0..1")
    top = 1 if images.dtype.kind == "f" else 255
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise ValueError(f"{name} holds NaN or infinite pixels")
    if images.min() < 0 or images.max() > top:
        raise ValueError(f"{name} holds pixels from {images.min()} to {images.max()}; "
                         f"{images.dtype} images must lie in 0..{top}")
    if images.dtype.kind != "f" and images.max() == 1:
        print(f"warning: {name} holds integers that are 0 and 1 alone: masks, or images in 0..1 "
              "that were cut to integers?", flush=True)


def check_labels(name: str, labels: np.ndarray, count: int) -> None:
    """Raise ValueError unless the array is one non-negative integer for each of count images."""
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise ValueError(f"{name} must be one integer an image, not {labels.dtype} of shape "
                         f"{labels.shape}")
    if len(labels) != count:
        raise ValueError(f"{name} has {len(labels)} labels for {count} images")
    if len(labels) == 0:
        raise ValueError(f"{name} is empty")
    if labels.min() < 0:
        raise ValueError(f"{name} holds label {labels.min()}; labels start at 0")


def class_names(names: np.ndarray) -> list[str]:
    """Names of any type, bytes too, as text of one line each.

    Raises ValueError (of Unicode) for bytes that are none.
    """
    def text(name: object) -> str:
        name = name.decode() if isinstance(name, bytes) else str(name)
        return " ".join(name.encode("utf-8", "replace").decode().split())

    return [text(name) for name in names.reshape(-1).tolist()]


def digest(*arrays: Tensor | np.ndarray | Sequence[str]) -> str:
    """A fingerprint of images, labels, names, ...: of their types, shapes and values."""
    found = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        found.update(f"{array.dtype.str} {array.shape} ".encode())
        found.update(array.data if array.size else b"")
    return found.hexdigest()[:16]


def to_images(array: np.ndarray) -> Tensor:
    """Images (N, H, W) or (N, H, W, C), 0..255 or floats in 0..1, as uint8 (N, C, 32, 32).

    Resized by bilinear interpolation with antialiasing, as torchvision does it.
    """
    channels, size = array.shape[3] if array.ndim == 4 else 1, [IMAGE_SIZE, IMAGE_SIZE]
    images = torch.empty(len(array), channels, *size, dtype=torch.uint8)
    for start in range(0, len(array), 1000):  # floats take several times the memory
        chunk = array[start:start + 1000]
        chunk = np.rint(chunk * 255) if chunk.dtype.kind == "f" else chunk
        part = torch.from_numpy(chunk.astype(np.uint8))
        part = part.permute(0, 3, 1, 2) if part.ndim == 4 else part[:, None]
        if list(part.shape[2:]) != size:
            part = F.interpolate(part.float(), size, mode="bilinear", antialias=True).round()
        images[start:start + 1000] = part
    return images


# ---------------------------------------------------------------------------------- writing files

def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a file that gets its name only once it is safely on the disk.

    Until then it lies beside it, under a name that no other process uses.  Raises OSError.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch.save's, after a full disk, a Ctrl-C, ...
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise OSError(f"cannot write {path}: {first_line(error)}") from error
        raise


def write_cache(path: Path, write: Callable[[Path], object]) -> bool:
    """Have write(path) keep something for the next run, or do without; returns whether it could."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        print(f"{path} could not be written ({first_line(error)}), so the next start makes it anew",
              flush=True)
        return False
    return True


@contextmanager
def one_at_a_time(path: Path):
    """Keep other processes of this machine waiting that make the same file."""
    from filelock import FileLock

    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with FileLock(f"{tempfile.gettempdir()}/{path.stem}-{name}.lock"):
        yield


# ------------------------------------------------------------------------- which images a run uses

def choose_images(labels: Tensor, seed: int, *, train_images: int | None = None,
                  proxy: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the training images that the clients share, and of two parts that the server has.

    train_images: how many the clients get, a class-balanced subset; None: all
    proxy: None: the server has none.  Else it has some to validate with, and if this is "holdout"
        also to distil on.  Both are among those that the subset leaves over; where these do not
        make SERVER_SHARE of the clients' images for each, the clients give up some of theirs
    Returns the clients' images, those to distil on, and those to validate with.
    Raises ValueError if there are fewer images than asked for.
    """
    chosen = torch.arange(len(labels))
    if train_images is not None:
        chosen = balanced_subset(labels, train_images, numpy_stream(seed, SUBSET), "train")
    if proxy is None:
        return chosen, chosen[:0], chosen[:0]
    order = torch.from_numpy(numpy_stream(seed, PROXY).permutation(len(labels)))
    is_chosen = torch.isin(order, chosen)
    share, left_over = round(SERVER_SHARE * len(chosen)), int((~is_chosen).sum())
    validation = min(VALIDATION_IMAGES, share)
    distilled = min(PROXY_IMAGES, max(left_over - validation, share)) if proxy == "holdout" else 0
    order = torch.cat([order[~is_chosen], order[is_chosen]])[:distilled + validation]
    return chosen[~torch.isin(chosen, order)], order[:distilled], order[distilled:]


def proxy_images(proxy: str, loaded: Dataset, held_out: Tensor, seed: int) -> Tensor:
    """The unlabelled images that a server distils on, uint8 (N, C, 32, 32).

    proxy: "holdout", training images that no client has; "noise"; or the path of an .npz
    held_out: their indices, from choose_images, for "holdout"
    Raises ValueError if there are none that fit.
    """
    channels, rng = loaded.x_train.shape[1], numpy_stream(seed, PROXY)
    if proxy == "holdout":
        images = loaded.x_train[held_out]
    elif proxy == "noise":
        shape = (min(PROXY_IMAGES, len(loaded.y_train)), channels, IMAGE_SIZE, IMAGE_SIZE)
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
    """Indices (count,) of a random subset with as equal class counts as the labels allow.

    part: of the data set, "train" or "test".  Raises ValueError if it has fewer images.
    """
    if count > len(labels):
        raise ValueError(f"--{part}-images {count} is more than the {len(labels)} "
                         f"{'training' if part == 'train' else part} images there are")
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)  # of an image among those of its class
    shuffled = labels.numpy()[order]
    for label in np.unique(shuffled):
        members = order[shuffled == label]
        rank[members] = np.arange(len(members))
    by_rank = order[np.argsort(rank[order], kind="stable")]
    return torch.from_numpy(np.sort(by_rank[:count]))


# --------------------------------------------------------------------------------------- partitions

def share_out(whole: Dataset, num_clients: int, seed: int, *, train_images: int | None = None,
              test_images: int | None = None, partition: str = "dirichlet", alpha: float = 0.5,
              classes_per_client: int = 2, missing_classes: float | None = None,
              proxy: str | None = None) -> Shared:
    """Share a data set out among clients, and with proxy images of its own to the server.

    train_images, proxy: see choose_images and proxy_images.  The server's images are of classes
        that clients have who take part: nothing of dropout clients' classes may reach it
    test_images: how many of the test images are used, a class-balanced subset; None: all
    partition: "iid", "dirichlet" (with alpha) or "pathological"
    classes_per_client: of "pathological" and the dropout setting, see classes_each
    missing_classes: AP-FL's dropout setting instead, see partition_dropout; in all others nobody
        drops out.  Of dropout clients' images nothing is used, not even for the statistics
    Raises ValueError if the images cannot be shared out so, or a client gets fewer than two.
    """
    chosen, *held_out = choose_images(whole.y_train, seed, train_images=train_images, proxy=proxy)
    data = whole
    if len(chosen) < len(whole.y_train):
        data = whole._replace(x_train=whole.x_train[chosen], y_train=whole.y_train[chosen])
    if test_images is not None:
        rows = balanced_subset(whole.y_test, test_images, numpy_stream(seed, TEST_SUBSET), "test")
        data = data._replace(x_test=whole.x_test[rows], y_test=whole.y_test[rows])
    labels = data.y_train
    if len(labels) < 2 * num_clients:
        raise ValueError(f"{len(labels)} training images cannot give each of {num_clients} clients "
                         "the two that it needs: use fewer --clients or more images")
    rng, dropouts = numpy_stream(seed, PARTITION), []
    if missing_classes is not None:
        parts, dropouts = partition_dropout(labels, num_clients, missing_classes,
                                            classes_per_client, rng)
    elif partition == "iid":
        parts = partition_iid(labels, num_clients, rng)
    elif partition == "dirichlet":
        parts = partition_dirichlet(labels, num_clients, alpha, rng)
    else:
        parts = partition_pathological(labels, num_clients, classes_per_client, rng)
    for k, part in enumerate(parts):
        if len(part) < 2:
            raise ValueError(f"this partition leaves client {k} with {len(part)} images, and each "
                             "needs two: use fewer --clients or more images")
    taking_part = torch.cat([part for k, part in enumerate(parts) if k not in dropouts])
    seen, held = (labels[rows].unique().tolist() for rows in (taking_part, torch.cat(parts)))
    unseen = [label for label in held if label not in seen]
    distilled, validation = (rows[torch.isin(whole.y_train[rows], torch.tensor(seen))]
                             for rows in held_out)
    return Shared(data, parts, share_test(data.y_test, labels, parts,
                                          numpy_stream(seed, TEST_SHARES)),
                  dropouts, seen, unseen, channel_statistics(data.x_train, taking_part),
                  None if proxy is None else proxy_images(proxy, whole, distilled, seed),
                  None if proxy is None else (whole.x_train[validation], whole.y_train[validation]))


def described(shared: Shared) -> dict:
    """What a network of this data takes in and puts out, in numbers and words for a JSON file."""
    mean, deviation = (value.flatten().tolist() for value in shared.statistics)
    return {"channels": len(mean), "size": IMAGE_SIZE, "mean": mean, "deviation": deviation,
            "classes": shared.data.classes}


def server_images(shared: Shared) -> dict[str, ClientData]:
    """What the server has of its own, as clients have theirs: "proxy", "validation", or nothing.

    The labels of "proxy" mean nothing.
    """
    if shared.proxy is None:
        return {}
    prepare = preparation(shared.statistics)
    nothing = torch.zeros(len(shared.proxy), dtype=torch.int64, device=shared.proxy.device)
    parts = {"proxy": (shared.proxy, nothing), "validation": shared.validation}
    return {name: ClientData(images, labels, torch.arange(len(images), device=images.device),
                             prepare) for name, (images, labels) in parts.items()}


def on_device(value: object, device: str | torch.device) -> object:
    """The same nest of dicts, lists and named tuples with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [on_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def partition_iid(labels: Tensor, num_clients: int, rng: np.random.Generator) -> list[Tensor]:
    """Split the images at random into num_clients parts whose sizes differ by one at most.

    Returns the sorted indices (n_k,) of each client's images, as all partitions here do.
    """
    return [torch.from_numpy(np.sort(part))
            for part in np.array_split(rng.permutation(len(labels)), num_clients)]


def partition_dirichlet(labels: Tensor, num_clients: int, alpha: float, rng: np.random.Generator,
                        *, minimum: int = MIN_IMAGES, redraws: int = MAX_REDRAWS) -> list[Tensor]:
    """Split each class among the clients in proportions drawn from a symmetric Dirichlet(alpha).

    The usual non-IID split of the field (Lin et al., FedDF, NeurIPS 2020; FedIN Sec. 5.1).
    The whole split is redrawn until every client has at least minimum images.  A smaller alpha is
    a stronger skew.  Raises ValueError if that takes more than redraws draws.
    """
    counts = labels.bincount().numpy()
    for _ in range(redraws if len(labels) >= minimum * num_clients else 0):
        shares = rng.dirichlet(np.full(num_clients, alpha), size=len(counts))
        ends = np.rint(shares.cumsum(axis=1) * counts[:, None]).astype(np.int64)
        ends[:, -1] = counts  # against rounding in the cumulative sum
        if np.diff(ends, axis=1, prepend=0).sum(axis=0).min() >= minimum:
            break
    else:
        raise ValueError(f"no Dirichlet({alpha:g}) split of {len(labels)} images gives each of "
                         f"{num_clients} clients at least {minimum}: use fewer clients, more "
                         "images or a larger --alpha")
    parts = [[] for _ in range(num_clients)]
    for label, cuts in enumerate(ends):
        members = rng.permutation(np.flatnonzero(labels.numpy() == label))
        for part, piece in zip(parts, np.split(members, cuts[:-1])):
            part.append(piece)
    return [torch.from_numpy(np.sort(np.concatenate(part))) for part in parts]


def partition_pathological(labels: Tensor, num_clients: int, classes_per_client: int,
                           rng: np.random.Generator) -> list[Tensor]:
    """Give every client classes_per_client classes; the holders of a class share it equally.

    Each client takes the classes with the fewest holders so far, ties at random, so that every
    class has a holder if there are enough places; images of a class without one are left out.
    Raises ValueError if a client would hold more classes than there are.
    """
    num_classes = int(labels.max()) + 1
    if classes_per_client > num_classes:
        raise ValueError(f"--classes-per-client {classes_per_client} is more than the "
                         f"{num_classes} classes there are")
    holders = assign_classes(num_classes, num_clients, classes_per_client, rng)
    return deal_classes(labels, holders, num_clients, rng)


def classes_each(num_classes: int, missing: float | None) -> int:
    """gamma where it is not given: 2, but in the dropout setting at least a fifth of the classes.

    missing: see partition_dropout, None: another setting
    Ten clients of two classes each, as in the paper's Table 1, could not hold a hundred classes.
    """
    return 2 if missing is None else max(2, -(-num_classes // 5))


def partition_dropout(labels: Tensor, num_clients: int, missing: float, classes_per_client: int,
                      rng: np.random.Generator) -> tuple[list[Tensor], list[int]]:
    """AP-FL's dropout setting: every client holds gamma classes; the last ones drop out.

    missing: the share of the C classes that clients who take part lack (MC in the paper's Table 3);
        the round(missing C) last classes, at least one, are those
    classes_per_client: gamma
    The missing classes sit with as few dropout clients, the last ones by id, as can hold them.  If
    these have places left, the classes before sit with them too.  Clients that take part share all
    classes but the missing ones, as in partition_pathological: each has a holder among them as long
    as there are places.
    Returns the parts, as partition_pathological does, and the ids of the dropout clients.  Ten
    clients, ten classes, gamma 2 and a share of 0.2 are the paper's Table 1: one of them alone
    holds 8 and 9.  Raises ValueError if too few classes or clients are left.
    """
    num_classes = int(labels.max()) + 1
    num_missing = max(1, round(missing * num_classes))
    num_dropouts = -(-num_missing // classes_per_client)
    num_seen, num_others = num_classes - num_missing, num_clients - num_dropouts
    if num_seen < 2 or num_others < 1:
        raise ValueError(f"--missing-classes {missing:g} leaves {num_seen} of {num_classes} "
                         f"classes to {max(0, num_others)} of {num_clients} clients: at least two "
                         "classes and one client must take part")
    if classes_per_client > num_seen:
        raise ValueError(f"a client cannot hold {classes_per_client} of the {num_seen} classes "
                         f"that --missing-classes {missing:g} leaves to those who take part: give "
                         f"--classes-per-client {num_seen} or less")
    holders = assign_classes(num_seen, num_others, classes_per_client, rng)
    holders += [[] for _ in range(num_missing)]
    dropouts = list(range(num_others, num_clients))
    for place, client in enumerate(reversed(dropouts)):
        end = num_classes - place * classes_per_client
        for label in range(end - classes_per_client, end):
            holders[label].append(client)
    return deal_classes(labels, holders, num_clients, rng), dropouts


def assign_classes(num_classes: int, num_clients: int, classes_per_client: int,
                   rng: np.random.Generator) -> list[list[int]]:
    """The clients that hold each class; see partition_pathological."""
    holders = [[] for _ in range(num_classes)]
    for client in range(num_clients):
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
    """Share the test images out so that each client's test labels follow its training labels.

    Returns the sorted indices of each client's test images, which may be none.
    In each class the clients get test images in the proportions of their training images, by
    largest remainders, ties to the lower id; those of a class that nobody holds go to nobody.
    """
    num_classes = int(max(test_labels.max(), train_labels.max())) + 1
    held = np.stack([train_labels[part].bincount(minlength=num_classes).numpy() for part in parts])
    shares = [[np.empty(0, dtype=np.int64)] for _ in parts]
    for label in range(num_classes):
        members = rng.permutation(np.flatnonzero(test_labels.numpy() == label))
        total = held[:, label].sum()
        if total == 0:
            continue
        whole, remainder = np.divmod(held[:, label] * len(members), total)
        favoured = np.argsort(-remainder, kind="stable")[: len(members) - whole.sum()]
        whole[favoured] += 1
        for share, piece in zip(shares, np.split(members, whole.cumsum()[:-1])):
            share.append(piece)
    return [torch.from_numpy(np.sort(np.concatenate(share))) for share in shares]


# ------------------------------------------------------------------------------------------ batches

def channel_statistics(images: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the indexed images, each (C, 1, 1), in 0..255.

    Counted from a histogram in integers, so that neither the order of the images nor the number of
    threads shows in the last bit.  A channel that never varies gets the deviation 1.
    """
    histogram = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chosen in indices.split(2000):  # a part at a time, to hold no second copy of the images
        for count, channel in zip(histogram, images[chosen].unbind(dim=1)):
            count += channel.flatten().bincount(minlength=256)
    share = histogram.double() / histogram.sum(dim=1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64)
    mean = share @ levels
    deviation = (share * (levels - mean[:, None]) ** 2).sum(dim=1).sqrt()
    deviation[deviation == 0] = 1
    return mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)


def standardise(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) as floats of zero mean and unit deviation per channel."""
    return (images.float() - mean) / deviation


class Augmentation(NamedTuple):
    """Which random changes a training image undergoes."""

    padding: int = 4  # pixels of black border before a random crop back to the old size
    flip: bool = True  # left to right, for half of the images
    hole: int = 16  # side of the square that Cutout blanks, pixels


CHARACTERS = Augmentation(padding=0, flip=False)  # for SVHN, digits and letters: Cutout alone


def preparation(statistics: tuple[Tensor, Tensor], dataset: str = "",
                rng: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
    """What makes network input of uint8 images: standardise, or with rng augment."""
    mean, deviation = statistics
    if rng is None:
        return partial(standardise, mean=mean, deviation=deviation)
    kind = CHARACTERS if dataset in OF_CHARACTERS else Augmentation()
    return partial(augment, mean=mean, deviation=deviation, kind=kind, rng=rng)


def augment(images: Tensor, mean: Tensor, deviation: Tensor, kind: Augmentation,
            rng: torch.Generator) -> Tensor:
    """Standardised images after a random crop, a random flip and Cutout (DeVries and Taylor, 2017).

    images: (B, C, H, W) uint8.  Cutout's square, zero after standardisation, is centred anywhere in
    the image and cut off at its border.
    """
    batch, _, height, width = images.shape

    def draw(high: int) -> Tensor:
        return drawn(partial(torch.randint, high), (batch, 1), rng=rng, device=images.device)

    rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
    source_rows = rows + (draw(2 * kind.padding + 1) if kind.padding else 0)
    source_columns = columns + (draw(2 * kind.padding + 1) if kind.padding else 0)
    source_rows, source_columns = source_rows.expand(batch, -1), source_columns.expand(batch, -1)
    if kind.flip:
        source_columns = torch.where(draw(2).bool(), source_columns.flip(1), source_columns)
    padded = F.pad(images, [kind.padding] * 4).transpose(0, 1)  # (C, B, H + 2p, W + 2p)
    which = torch.arange(batch, device=images.device).view(-1, 1, 1)
    changed = padded[:, which, source_rows[:, :, None], source_columns[:, None, :]].transpose(0, 1)
    x = standardise(changed, mean, deviation)
    if not kind.hole:
        return x

    top, left = draw(height) - kind.hole // 2, draw(width) - kind.hole // 2
    in_rows = (rows >= top) & (rows < top + kind.hole)  # (B, H)
    in_columns = (columns >= left) & (columns < left + kind.hole)  # (B, W)
    return x.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


def samples_per_epoch(count: int, batch_size: int) -> int:
    """How many of a client's count images an epoch of batches visits."""
    return count - (count % batch_size == 1)


def batches(data: ClientData, batch_size: int, epochs: int,
            rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (x, y) of a client's images, shuffled anew each epoch.

    A last batch of a single image is left out: batch normalisation in training mode cannot work on
    one value a channel, and at 32x32 the last stage of the ResNets is 1x1.
    """
    for _ in range(epochs):
        order = drawn(torch.randperm, len(data.indices), rng=rng, device=data.indices.device)
        for chosen in data.indices[order].split(batch_size):
            if len(chosen) > 1:
                yield data.prepare(data.images[chosen]), data.labels[chosen]
