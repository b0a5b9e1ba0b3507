"""Random streams, data sets, network input and batches.  Imports no other module of ours.

Images are uint8 tensors (N, C, 32, 32), labels are int64 tensors (N,).  A client is an index into
them: nothing is copied per client, and no loader stands between the tensors and the network.
"""

import hashlib
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

# Purposes of random streams.  No two share a stream, so a method that draws more than another still
# sees the same participants.  The numbers enter every seed: append new purposes, never renumber.
(SUBSET, PARTITION, TEST_SHARES, INITIAL_WEIGHTS, PARTICIPANTS, SPEEDS, BATCHES, AUGMENTATION,
 FEATURE_BATCH, FEATURE_POOL, NOISE, FEATURE_NOISE, GENERATOR_WEIGHTS, GENERATOR_NOISE, SYNTHETIC,
 FRIEND_BATCHES, RATE, LATENT, PROXY, PROXY_BATCHES, TEST_SUBSET, VIRTUAL_FEATURES,
 VIRTUAL_BATCHES) = range(23)

Stream = Callable[[int], torch.Generator]  # purpose -> generator, for one client in one round


class Dataset(NamedTuple):
    """Images uint8 (N, C, 32, 32), labels int64 (N,), class names in the order of the labels."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: list[str]
    digest: str = ""  # fingerprint of the source, see digest


ARRAYS = Dataset._fields[:5]  # their names in an .npz file


class ClientData(NamedTuple):
    """Training images of one client: an index into the images that all clients share."""

    images: Tensor  # (N, C, 32, 32) uint8, shared by all clients
    labels: Tensor  # (N,) int64, shared by all clients
    indices: Tensor  # (n_k,) int64, the client's rows
    prepare: Callable[[Tensor], Tensor]  # uint8 images -> network input
    augmented: bool = False  # whether prepare draws random numbers

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Network input x and labels y of a batch of rows (B,)."""
        return self.prepare(self.images[rows]), self.labels[rows]


# ----------------------------------------------------------------------------------- random streams

def numpy_stream(seed: int, purpose: int, round: int = 0, client: int = 0) -> np.random.Generator:
    """Make the numpy generator for one purpose, round and client."""
    return np.random.default_rng(np.random.SeedSequence([seed, purpose, round, client]))


def torch_stream(seed: int, purpose: int, round: int = 0, client: int = 0) -> torch.Generator:
    """Make the torch generator (CPU) for one purpose, round and client."""
    state = np.random.SeedSequence([seed, purpose, round, client]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def streams(seed: int, round: int, client: int) -> Stream:
    """Bind torch_stream to one client in one round, so that only the purpose is left to give."""
    return partial(torch_stream, seed, round=round, client=client)


def drawn(draw: Callable, *size: object, rng: torch.Generator, device: torch.device) -> Tensor:
    """Draw on the CPU with draw (torch.randn, ...) and move the result to a device."""
    # A GPU reads from page-locked memory, so that the CPU need not wait for the copy.
    return draw(*size, generator=rng, pin_memory=device.type == "cuda").to(device,
                                                                           non_blocking=True)


# ------------------------------------------------------------------------------------------ loading

def load(dataset: str | Path, data_dir: str | Path = "data", *, download: bool = True) -> Dataset:
    """Load a data set by its name, or a user's data set by the path of an .npz file.

    torchvision downloads all but "digits" into data_dir at first use, unless download is False.
    Raises ValueError with one line that says what is wrong and what to do.
    """
    dataset = str(dataset)
    if dataset == "digits":
        return read_digits()
    if dataset in DATASETS:
        return load_downloaded(dataset, data_dir, download)
    if dataset.lower().endswith(".npz"):
        return read_npz(dataset)
    raise ValueError(f"unknown dataset '{dataset}': choose one of {', '.join(DATASETS)}, or give "
                     "the path of an .npz file")


def read_digits() -> Dataset:
    """Split scikit-learn's 1,797 digits (8x8, 17 gray levels) into 1,437 and 360, always alike."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=360, random_state=0,
                                   stratify=digits.target)
    x, y = to_images(images), torch.from_numpy(digits.target.astype(np.int64))
    return Dataset(x[train], y[train], x[test], y[test], list("0123456789"), digest(images, y))


def cache_path(dataset: str, data_dir: str | Path) -> Path:
    """Path of the resized copy of a downloaded data set."""
    return Path(data_dir) / f"{dataset}-{IMAGE_SIZE}x{IMAGE_SIZE}.npz"


def load_downloaded(dataset: str, data_dir: str | Path, download: bool) -> Dataset:
    """Load one of torchvision's data sets from its resized copy, made at first use if possible."""
    cache = cache_path(dataset, data_dir)
    if not cache.exists() and not download:
        return from_originals(dataset, data_dir, download)
    if not cache.exists():
        with one_at_a_time(cache):  # another process may be making the same copy
            if not cache.exists():
                original = from_originals(dataset, data_dir, download)
                if not write_cache(cache, partial(write_npz, data=original)):
                    return original
    try:
        return read_npz(cache)
    except ValueError as error:
        raise ValueError(f"the copy {cache} is damaged: delete it to have it made anew") from error


def from_originals(dataset: str, data_dir: str | Path, download: bool) -> Dataset:
    """Read torchvision's original files, downloaded if missing and download is True.

    Raises ValueError on failure.
    """
    try:
        original = read_originals(dataset, str(data_dir), download)
        # The digest that its copy has
        stored = stored_arrays(original).values()
        return original._replace(digest=digest(*stored, original.classes))
    except Exception as error:  # torchvision raises a dozen kinds on a broken file
        remedy = (f"check the connection, or put sound original files into '{data_dir}' "
                  "(--data-dir) and delete damaged ones")
        raise ValueError(f"{dataset} cannot be loaded ({first_line(error)[:100]}): "
                         + (remedy if download else "pass data_dir=, their folder")) from error


def read_originals(dataset: str, root: str, download: bool) -> Dataset:
    """Read one of torchvision's data sets from the folder root, verified by its checksums.

    SVHN is its train split alone (73,257 images).  EMNIST is its letters split, turned upright.
    """
    from torchvision.datasets import CIFAR10, CIFAR100, EMNIST, SVHN, FashionMNIST

    # Train and test part, then the images (N, H, W) or (N, H, W, C) and labels of each
    if dataset == "svhn":
        parts = [SVHN(root, split, download=download) for split in ("train", "test")]
        arrays = [(part.data.transpose(0, 2, 3, 1), part.labels) for part in parts]
        return from_arrays(*arrays[0], *arrays[1], list("0123456789"))
    if dataset == "emnist":
        parts = [EMNIST(root, "letters", train=train, download=download)
                 for train in (True, False)]
        arrays = [(part.data.transpose(1, 2).numpy(), part.targets.numpy() - 1) for part in parts]
        return from_arrays(*arrays[0], *arrays[1], list("abcdefghijklmnopqrstuvwxyz"))
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100, "fashionmnist": FashionMNIST}[dataset]
    parts = [kind(root, train=train, download=download) for train in (True, False)]
    arrays = [(np.asarray(part.data), np.asarray(part.targets)) for part in parts]
    return from_arrays(*arrays[0], *arrays[1], parts[0].classes)


def read_npz(path: str | Path) -> Dataset:
    """Read and check an .npz with x_train, y_train, x_test, y_test and optionally classes.

    Images: N x H x W (gray) or N x H x W x C with C 1 or 3; integers in 0..255, or floats in 0..1.
    Labels: one integer per image, 0..C - 1 for C classes.  A ValueError names the file.
    """
    if not Path(path).exists():
        raise ValueError(f"there is no file {path}: check its path")

    # Raw arrays; pickled objects are refused, since unpickling can run any code
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files if name in ARRAYS}
    except Exception as error:  # numpy and zipfile raise a dozen kinds on a broken file
        raise ValueError(f"{path} cannot be read ({first_line(error)}): expected an .npz written "
                         "by numpy.savez with plain numeric arrays") from error

    # Names of the arrays, then their types and values
    missing = [name for name in ARRAYS[:4] if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it needs {', '.join(ARRAYS[:4])}")
    try:
        data = from_arrays(*(arrays.get(name) for name in ARRAYS))
        # The digest covers the file's arrays, since resizing may differ between machines.
        return data._replace(digest=digest(*arrays.values(), data.classes))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_npz(path: Path, data: Dataset) -> None:
    """Write a data set, completely or not at all, as an .npz that read_npz reads."""
    write_atomically(path, lambda file: np.savez(file, **stored_arrays(data)))


def stored_arrays(data: Dataset) -> dict[str, np.ndarray]:
    """Arrays of a data set as in a file, images N x H x W x C."""
    return {"classes": np.array(data.classes),
            "x_train": data.x_train.permute(0, 2, 3, 1).numpy(), "y_train": data.y_train.numpy(),
            "x_test": data.x_test.permute(0, 2, 3, 1).numpy(), "y_test": data.y_test.numpy()}


# ----------------------------------------------------------------- checks and conversion of arrays

def from_arrays(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray,
                classes: Sequence[str] | np.ndarray | None = None) -> Dataset:
    """Check arrays laid out as in read_npz, and make a Dataset.  A ValueError names the array."""
    for part, labels, images in (("train", y_train, x_train), ("test", y_test, x_test)):
        check_images(f"x_{part}", images)
        check_labels(f"y_{part}", labels, len(images))

    # Class names, and a training image for each
    present = np.unique(y_train)
    names = class_names(np.asarray(range(len(present)) if classes is None else classes))
    if len(names) < 2:
        raise ValueError(f"there must be at least two classes, not {len(names)}")
    empty = np.setdiff1d(np.arange(len(names)), present)
    if len(empty):
        raise ValueError(f"class {empty[0]} ({names[empty[0]]!r}) has no training image: number "
                         "the classes 0, 1, 2, ... without gaps")

    # Agreement between the arrays
    for part, labels in (("train", y_train), ("test", y_test)):
        unknown = np.setdiff1d(labels, np.arange(len(names)))
        if len(unknown):
            raise ValueError(f"y_{part} holds label {unknown[0]}, not in 0..{len(names) - 1}")
    train, test = to_images(x_train), to_images(x_test)
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"x_train has {train.shape[1]} channels, but x_test {test.shape[1]}")
    return Dataset(train, torch.from_numpy(y_train.astype(np.int64)),
                   test, torch.from_numpy(y_test.astype(np.int64)), names)


def check_images(name: str, images: np.ndarray) -> None:
    """Raise ValueError unless the array is a non-empty batch of gray or colour images."""
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise ValueError(f"{name} has shape {images.shape}; expected N x H x W or N x H x W x C "
                         "with C 1 or 3 (channels last)")
    if images.size == 0:
        raise ValueError(f"{name} is empty")
    if images.dtype.kind not in "uif":
        raise ValueError(f"{name} has dtype {images.dtype}; expected uint8, or floats in 0..1")

    # Range of the pixels
    highest = 1 if images.dtype.kind == "f" else 255
    if not np.isfinite(images).all():
        raise ValueError(f"{name} holds NaN or infinite pixels")
    if images.min() < 0 or images.max() > highest:
        raise ValueError(f"{name} holds pixels from {images.min()} to {images.max()}; "
                         f"{images.dtype} images must lie in 0..{highest}")
    if highest == 255 and images.max() == 1:
        print(f"warning: {name} holds only 0 and 1: masks, or images cut to integers?", flush=True)


def check_labels(name: str, labels: np.ndarray, count: int) -> None:
    """Raise ValueError unless the array holds one integer for each of count images."""
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise ValueError(f"{name} is {labels.dtype} {labels.shape}; expected one integer per image")
    if len(labels) != count:
        raise ValueError(f"{name} has {len(labels)} labels for {count} images")


def class_names(names: np.ndarray) -> list[str]:
    """Convert names to text of one line each.  Raises ValueError for bytes that are not UTF-8."""
    # Lone surrogates, which no file or terminal accepts, become question marks.
    decoded = (name.decode() if isinstance(name, bytes) else str(name)
               for name in names.reshape(-1).tolist())
    return [" ".join(name.encode("utf-8", "replace").decode().split()) for name in decoded]


def digest(*arrays: Tensor | np.ndarray | Sequence[str]) -> str:
    """Fingerprint of the types, shapes and values of images, labels or names."""
    fingerprint = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        fingerprint.update(f"{array.dtype.str} {array.shape} ".encode())
        fingerprint.update(array.data if array.size else b"")
    return fingerprint.hexdigest()[:16]


def to_images(array: np.ndarray) -> Tensor:
    """Convert images (N, H, W[, C]), 0..255 or floats in 0..1, to uint8 (N, C, 32, 32)."""
    channels, size = array.shape[3] if array.ndim == 4 else 1, [IMAGE_SIZE, IMAGE_SIZE]
    images = torch.empty(len(array), channels, *size, dtype=torch.uint8)

    # Resized as in torchvision, and in parts, since floats take four times the memory
    for start in range(0, len(array), 1000):
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
    """First line of an exception's message, or its type if the message is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a file, named path only once safely on the disk.  Raises OSError."""
    # Until then it lies beside path under a name that no other process uses.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save turns a full disk or a Ctrl-C into a RuntimeError with the cause as context.
        if isinstance(error, RuntimeError):
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise OSError(f"cannot write {path}: {first_line(error)}") from error
        raise


def write_cache(path: Path, write: Callable[[Path], object]) -> bool:
    """Let write(path) store a file for later runs.  Returns False, after a warning, on failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        print(f"warning: {path} could not be written ({first_line(error)}), so the next start "
              "makes it anew", flush=True)
        return False
    return True


@contextmanager
def one_at_a_time(path: Path):
    """Have other processes that enter with the same path wait, if its folder can hold a lock."""
    from filelock import FileLock

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    # A folder that cannot be written, another user's lock, a file system without locks
    with suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


# ----------------------------------------------------------------------------------- network input

def channel_statistics(images: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel over the indexed images, each (C, 1, 1), in 0..255.

    A constant channel gets the standard deviation 1.
    """
    # Integer histogram (C, 256), exact in any order; in parts, so that no second copy is held
    histogram = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for rows in indices.split(2000):
        for counts, channel in zip(histogram, images[rows].unbind(dim=1)):
            counts += channel.flatten().bincount(minlength=256)

    # Moments of the histogram
    share = histogram.double() / histogram.sum(dim=1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64)
    mean = share @ levels
    deviation = (share * (levels - mean[:, None]) ** 2).sum(dim=1).sqrt()
    deviation[deviation == 0] = 1
    return mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)


def standardise(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Scale uint8 images (B, C, H, W) to zero mean and unit standard deviation per channel."""
    return (images.float() - mean) / deviation


def preparation(statistics: tuple[Tensor, Tensor], dataset: str = "",
                rng: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
    """Choose the function from uint8 images to network input: standardise, or with rng augment."""
    mean, deviation = statistics
    if rng is None:
        return partial(standardise, mean=mean, deviation=deviation)

    # A crop or a flip can make another character, so characters get Cutout alone.
    options = {"padding": 0, "flip": False} if dataset in ("digits", "svhn", "emnist") else {}
    return partial(augment, mean=mean, deviation=deviation, rng=rng, **options)


def augment(images: Tensor, mean: Tensor, deviation: Tensor, rng: torch.Generator, *,
            padding: int = 4, flip: bool = True, hole: int = 16) -> Tensor:
    """Standardise images after a random crop, a random flip and Cutout (DeVries and Taylor, 2017).

    images: (B, C, H, W) uint8
    padding: pixels of black border before a crop back to the old size
    flip: mirror half of the images left to right
    hole: side in pixels of Cutout's square of zeros, centred anywhere, cut off at the border
    """
    batch, _, height, width = images.shape

    def draw(high: int) -> Tensor:
        """Draw an integer in 0..high - 1 per image, (B, 1)."""
        return drawn(partial(torch.randint, high), (batch, 1), rng=rng, device=images.device)

    # Row and column that each pixel comes from, after crop and flip
    rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
    source_rows, source_columns = rows.expand(batch, -1), columns.expand(batch, -1)
    if padding:
        source_rows, source_columns = (line + draw(2 * padding + 1) for line in (rows, columns))
    if flip:
        source_columns = torch.where(draw(2).bool(), source_columns.flip(1), source_columns)

    # Pixels from there
    padded = F.pad(images, [padding] * 4).transpose(0, 1)  # (C, B, H + 2p, W + 2p)
    image = torch.arange(batch, device=images.device).view(-1, 1, 1)
    changed = padded[:, image, source_rows[:, :, None], source_columns[:, None, :]].transpose(0, 1)
    x = standardise(changed, mean, deviation)

    # Cutout
    top, left = draw(height) - hole // 2, draw(width) - hole // 2
    in_rows = (rows >= top) & (rows < top + hole)  # (B, H)
    in_columns = (columns >= left) & (columns < left + hole)  # (B, W)
    return x.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


# ------------------------------------------------------------------------------ batches of a client

def samples_per_epoch(count: int, batch_size: int) -> int:
    """Number of images among count that one epoch of batches visits."""
    return count - (count % batch_size == 1)


def num_steps(count: int, batch_size: int, epochs: int) -> int:
    """Number of batches over all epochs, for a client with count images."""
    return epochs * math.ceil(samples_per_epoch(count, batch_size) / batch_size)


def batches(data: ClientData, batch_size: int, epochs: int,
            rng: torch.Generator) -> Iterator[tuple[Tensor]]:
    """Yield batches (rows,), shuffled anew each epoch, without a last batch of a single image.

    rows: (B,) int64, into the images; data.batch(rows) is (x, y)
    """
    # Batch normalisation in training mode needs more than one value per channel, and at 32x32 the
    # last stage of the ResNets is 1x1.
    for _ in range(epochs):
        order = drawn(torch.randperm, len(data.indices), rng=rng, device=data.indices.device)
        for rows in data.indices[order].split(batch_size):
            if len(rows) > 1:
                yield (rows,)
