"""data.py: streams, loading, partitions, statistics, augmentation and batches.

Every original file is written here, small, in its own format; the network is switched off.
"""

import hashlib
import inspect
import pickle
import random
import shutil
import socket
import struct
import zipfile
from fractions import Fraction
from functools import partial
from itertools import product

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from sklearn.datasets import load_digits

import data

TORCHVISION = [name for name in data.DATASETS if name != "digits"]
LEVELS = 256  # of a uint8 pixel
SIZE = data.IMAGE_SIZE


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may depend on the network; what wants to download finds none."""

    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def complaint(call, *args) -> str:
    """The message of the ValueError that the call must end in, which must be a single line."""
    with pytest.raises(ValueError) as caught:
        call(*args)
    message = str(caught.value)
    assert message.strip() and len(message.splitlines()) == 1
    return message


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, LEVELS, shape, dtype=np.uint8)


def same(first: data.Dataset, second: data.Dataset) -> bool:
    tensors = zip(first[:4], second[:4])
    return all(torch.equal(a, b) for a, b in tensors) and first.classes == second.classes


class Trap:
    """Unpickling it creates the file: a file that is there afterwards means that somebody did."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# ----------------------------------------------------------------------------------- random streams


def draw(stream) -> tuple:
    if isinstance(stream, torch.Generator):
        return tuple(torch.randint(2**31, (4,), generator=stream).tolist())
    return tuple(stream.integers(2**31, size=4).tolist())


STREAMS = pytest.mark.parametrize("stream", [data.numpy_stream, data.torch_stream])


@STREAMS
def test_the_same_arguments_give_the_same_draws(stream):
    assert draw(stream(3, data.BATCHES, 5, 7)) == draw(stream(3, data.BATCHES, 5, 7))
    assert draw(stream(3, data.BATCHES)) == draw(stream(3, data.BATCHES, round=0, client=0))


@STREAMS
def test_no_two_of_seed_purpose_round_client_share_a_stream(stream):
    keys = list(product(range(3), repeat=4))
    assert len({draw(stream(*key)) for key in keys}) == len(keys)


def test_numpy_streams_are_seeded_by_seed_purpose_round_client_in_this_order():
    numbers = [3, data.PARTITION, 5, 7]
    by_numpy = np.random.default_rng(np.random.SeedSequence(numbers))
    assert draw(data.numpy_stream(*numbers)) == draw(by_numpy)


def test_no_two_purposes_are_the_same_number():
    purposes = [data.SUBSET, data.PARTITION, data.TEST_SHARES, data.INITIAL_WEIGHTS,
                data.PARTICIPANTS, data.SPEEDS, data.BATCHES, data.AUGMENTATION,
                data.FEATURE_BATCH, data.FEATURE_POOL, data.NOISE, data.FEATURE_NOISE,
                data.GENERATOR_WEIGHTS, data.GENERATOR_NOISE, data.SYNTHETIC, data.FRIEND_BATCHES,
                data.RATE, data.LATENT, data.PROXY, data.PROXY_BATCHES]
    assert len(set(purposes)) == len(purposes)


LABELS = torch.arange(120) % 3
IMAGES = torch.from_numpy(pixels(120, 3, 8, 8))
HALVES = [torch.arange(60), torch.arange(60, 120)]


def numpy_rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def torch_rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CALLS = {
    "numpy_stream": lambda path: draw(data.numpy_stream(1, 2)),
    "torch_stream": lambda path: draw(data.torch_stream(1, 2)),
    "drawn": lambda path: data.drawn(torch.randn, 2, rng=torch_rng(), device=torch.device("cpu")),
    "load": lambda path: data.load("fashionmnist", path),
    "cache_path": lambda path: data.cache_path("cifar10", path),
    "read_digits": lambda path: data.read_digits(),
    "download": lambda path: data.download("fashionmnist", path),
    "read_npz": lambda path: data.read_npz(save(path / "a.npz")),
    "write_npz": lambda path: data.write_npz(path / "b.npz", data.read_npz(save(path / "a.npz"))),
    "from_arrays": lambda path: data.from_arrays(*arrays().values()),
    "check_images": lambda path: data.check_images("x", pixels(2, 4, 4)),
    "check_labels": lambda path: data.check_labels("y", np.arange(2), 2),
    "to_images": lambda path: data.to_images(pixels(2, 4, 4)),
    "damaged_originals": lambda path: data.damaged_originals("fashionmnist", path),
    "class_names": lambda path: data.class_names(np.arange(3)),
    "digest": lambda path: data.digest(np.arange(3), ["a"]),
    "described": lambda path: data.described(data.share_out(data.read_digits(), 3, 0)),
    "write_atomically": lambda path: data.write_atomically(path / "c", lambda file: None),
    "write_cache": lambda path: data.write_cache(path / "d", lambda path: None),
    "one_at_a_time": lambda path: data.one_at_a_time(path / "e").__enter__(),
    "first_line": lambda path: data.first_line(ValueError("a\nb")),
    "server_images": lambda path: data.server_images(data.share_out(data.read_digits(), 3, 0,
                                                                    proxy="noise")),
    "choose_images": lambda path: data.choose_images(LABELS, 0, train_images=90, proxy="holdout"),
    "proxy_images": lambda path: data.proxy_images("noise", data.read_npz(save(path / "a.npz")),
                                                   HALVES[0][:0], 0),
    "balanced_subset": lambda path: data.balanced_subset(LABELS, 30, numpy_rng()),
    "share_out": lambda path: data.share_out(data.read_digits(), 3, 0, proxy="holdout"),
    "on_device": lambda path: data.on_device([LABELS], "cpu"),
    "partition_iid": lambda path: data.partition_iid(LABELS, 4, numpy_rng()),
    "partition_dirichlet": lambda path: data.partition_dirichlet(LABELS, 4, 1, numpy_rng()),
    "partition_pathological": lambda path: data.partition_pathological(LABELS, 4, 2, numpy_rng()),
    "classes_each": lambda path: data.classes_each(10, 0.2),
    "partition_dropout": lambda path: data.partition_dropout(LABELS, 4, 0.3, 2, numpy_rng()),
    "assign_classes": lambda path: data.assign_classes(3, 4, 2, numpy_rng()),
    "deal_classes": lambda path: data.deal_classes(LABELS, [[0], [0, 1], []], 2, numpy_rng()),
    "share_test": lambda path: data.share_test(LABELS, LABELS, HALVES, numpy_rng()),
    "channel_statistics": lambda path: data.channel_statistics(IMAGES, HALVES[0]),
    "standardise": lambda path: data.standardise(IMAGES, torch.zeros(3, 1, 1), torch.tensor(2)),
    "preparation": lambda path: data.preparation((torch.zeros(3, 1, 1), torch.tensor(2)))(IMAGES),
    "augment": lambda path: data.augment(IMAGES, torch.zeros(3, 1, 1), torch.tensor(2),
                                         data.Augmentation(), torch_rng()),
    "samples_per_epoch": lambda path: data.samples_per_epoch(11, 5),
    "batches": lambda path: list(data.batches(client(HALVES[0]), 16, 2, torch_rng())),
}


def test_the_list_of_calls_names_every_function():
    functions = inspect.getmembers(data, inspect.isfunction)
    own = {name for name, function in functions if function.__module__ == data.__name__}
    assert own == set(CALLS)


def global_state() -> tuple:
    return (torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state()),
            random.getstate())


@pytest.mark.parametrize("name", CALLS)
def test_no_function_touches_the_global_generators(name, tmp_path, monkeypatch):
    write_fashionmnist(tmp_path, monkeypatch)
    before = global_state()
    CALLS[name](tmp_path)
    assert global_state() == before


# ------------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def test_digits_have_the_fixed_sizes_and_types(digits):
    sizes = {"train": 1437, "test": 360}  # the split that the design fixes
    for images, labels, size in ((digits.x_train, digits.y_train, sizes["train"]),
                                 (digits.x_test, digits.y_test, sizes["test"])):
        assert images.shape == (size, 1, SIZE, SIZE) and images.dtype == torch.uint8
        assert labels.shape == (size,) and labels.dtype == torch.int64
        assert images.is_contiguous()
    assert digits.classes == [str(digit) for digit in range(10)]


def test_digits_are_stratified_and_no_image_is_in_both_parts(digits):
    counts = np.bincount(load_digits().target)
    train, test = digits.y_train.bincount().numpy(), digits.y_test.bincount().numpy()
    assert (train + test == counts).all()
    exact = counts * len(digits.y_test) / counts.sum()
    assert (abs(test - exact) < 1).all()
    both = torch.cat([digits.x_train, digits.x_test]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


def test_digits_depend_on_no_seed(digits):
    np.random.seed(5)
    torch.manual_seed(5)
    assert same(digits, data.load("digits"))


def test_digits_use_the_whole_range_of_pixels(digits):
    assert digits.x_train.min() == 0 and digits.x_train.max() == LEVELS - 1


def test_digits_images_belong_to_their_labels(digits):
    means = torch.stack([digits.x_train[digits.y_train == digit].float().mean(dim=0).flatten()
                         for digit in range(10)])
    nearest = torch.cdist(digits.x_test.float().flatten(1), means).argmin(dim=1)
    assert (nearest == digits.y_test).float().mean() > 0.8  # chance is 0.1


# --------------------------------------------------------------------- torchvision's original files


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_svhn(folder, monkeypatch):
    """.mat files: X (32, 32, 3, N), y (N, 1) with 10 for the digit 0."""
    table, expected = {}, []
    for seed, part in enumerate(("train", "test")):
        images, labels = pixels(20, SIZE, SIZE, 3, seed=seed), np.arange(20) % 10
        url, name, _ = torchvision.datasets.SVHN.split_list[part]
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(folder / name, {"X": images.transpose(1, 2, 3, 0), "y": stored})
        table[part] = [url, name, md5(folder / name)]
        expected += [images, labels]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", table)
    return (*expected, [str(digit) for digit in range(10)])


def write_cifar(folder, monkeypatch, kind, label_key, num_classes):
    """Pickled dicts of data (N, 3072), the red plane first, row by row, and a list of labels."""
    base = folder / kind.base_folder
    base.mkdir()

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
        return md5(base / name)

    expected = []
    for seed, part in enumerate(("train_list", "test_list")):
        names, count = [name for name, _ in getattr(kind, part)], num_classes + 1
        images = pixels(len(names), count, 3, SIZE, SIZE, seed=seed)
        labels = np.random.default_rng(seed).integers(0, num_classes, (len(names), count))
        rows = images.reshape(len(names), count, -1)
        monkeypatch.setattr(kind, part, [
            [name, write(name, {"data": row, label_key: label.tolist(),
                                "coarse_labels": [0] * count})]
            for name, row, label in zip(names, rows, labels)])
        expected += [images.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1), labels.flatten()]
    classes = [f"class-{label}" for label in range(num_classes)]
    meta = {kind.meta["key"]: classes, "coarse_label_names": ["all"]}
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": write(kind.meta["filename"], meta)})
    return (*expected, classes)


def write_cifar10(folder, monkeypatch):
    return write_cifar(folder, monkeypatch, torchvision.datasets.CIFAR10, "labels", 10)


def write_cifar100(folder, monkeypatch):
    return write_cifar(folder, monkeypatch, torchvision.datasets.CIFAR100, "fine_labels", 100)


def write_idx(folder, prefix, images, labels):
    """idx files: two zero bytes, 8 for unsigned bytes, the dimensions, big-endian sizes, bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for array, name in ((images, "images-idx3-ubyte"), (labels, "labels-idx1-ubyte")):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (folder / f"{prefix}-{name}").write_bytes(header + array.astype(np.uint8).tobytes())


def quadrants(count: int, size: int) -> np.ndarray:
    """Images that no transposition, flip or rotation leaves as they are: four gray quarters."""
    image = np.kron(QUARTERS, np.ones((size // 2, size // 2), dtype=np.uint8))
    return image[None].repeat(count, axis=0)


QUARTERS = np.array([[250, 170], [90, 10]], dtype=np.uint8)
FILE_SIZE = 28  # pixels of an image in the MNIST family's files


def write_fashionmnist(folder, monkeypatch):
    images, labels = quadrants(30, FILE_SIZE), np.arange(30) % 10
    for prefix in ("train", "t10k"):
        write_idx(folder / "FashionMNIST" / "raw", prefix, images, labels)
    return images, labels, images, labels, torchvision.datasets.FashionMNIST.classes


def write_emnist(folder, monkeypatch):
    """The letters' files count the labels from 1 and store every image transposed."""
    images, labels = quadrants(52, FILE_SIZE), np.arange(52) % 26
    for part in ("train", "test"):
        write_idx(folder / "EMNIST" / "raw", f"emnist-letters-{part}", images.transpose(0, 2, 1),
                  labels + 1)
    return images, labels, images, labels, list("abcdefghijklmnopqrstuvwxyz")


WRITERS = {"svhn": write_svhn, "cifar10": write_cifar10, "cifar100": write_cifar100,
           "emnist": write_emnist, "fashionmnist": write_fashionmnist}


def test_every_torchvision_data_set_is_written_here():
    assert set(WRITERS) == set(TORCHVISION)


@pytest.mark.parametrize("name", TORCHVISION)
def test_original_files_give_their_labels_classes_and_shapes(name, tmp_path, monkeypatch):
    x_train, y_train, x_test, y_test, classes = WRITERS[name](tmp_path, monkeypatch)
    loaded = data.load(name, tmp_path)
    assert loaded.classes == classes
    for images, labels, x, y in ((loaded.x_train, loaded.y_train, x_train, y_train),
                                 (loaded.x_test, loaded.y_test, x_test, y_test)):
        assert labels.dtype == torch.int64 and labels.tolist() == y.tolist()
        channels = 1 if x.ndim == 3 else 3
        assert images.shape == (len(x), channels, SIZE, SIZE) and images.dtype == torch.uint8


@pytest.mark.parametrize("name", ["svhn", "cifar10", "cifar100"])
def test_images_of_32_pixels_come_out_pixel_for_pixel(name, tmp_path, monkeypatch):
    x_train, _, x_test, _, _ = WRITERS[name](tmp_path, monkeypatch)
    loaded = data.load(name, tmp_path)
    assert np.array_equal(loaded.x_train.permute(0, 2, 3, 1), x_train)
    assert np.array_equal(loaded.x_test.permute(0, 2, 3, 1), x_test)


def corners_are_upright(images: torch.Tensor) -> bool:
    """Whether each quarter has its gray; near the seams resizing blends, so only corners count."""
    side = SIZE // 4
    found = [[images[:, 0, rows, columns] for columns in (slice(side), slice(-side, None))]
             for rows in (slice(side), slice(-side, None))]
    return all((found[i][j] == int(QUARTERS[i, j])).all() for i, j in product(range(2), repeat=2))


@pytest.mark.parametrize("name", ["emnist", "fashionmnist"])
def test_images_of_28_pixels_come_out_upright(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    loaded = data.load(name, tmp_path)
    assert corners_are_upright(loaded.x_train) and corners_are_upright(loaded.x_test)


def test_a_constant_image_stays_constant_when_resized(tmp_path):
    levels = np.arange(LEVELS)
    images = np.broadcast_to(levels[:, None, None], (LEVELS, FILE_SIZE, FILE_SIZE))
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / "FashionMNIST" / "raw", prefix, images, levels % 10)
    loaded = data.load("fashionmnist", tmp_path)
    assert (loaded.x_train == torch.from_numpy(levels)[:, None, None, None]).all()


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_second_load_reads_only_the_one_cache_file(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    originals = list(tmp_path.iterdir())
    first = data.load(name, tmp_path)
    for path in originals:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    cache = tmp_path / f"{name}-{SIZE}x{SIZE}.npz"
    assert list(tmp_path.iterdir()) == [cache]
    with np.load(cache) as archive:
        assert archive["x_train"].dtype == archive["x_test"].dtype == np.uint8
    assert same(first, data.load(name, tmp_path))


def test_a_cache_half_written_never_gets_the_name(tmp_path):
    whole = data.read_npz(save(tmp_path / "user.npz"))
    path = tmp_path / "cache.npz"
    with pytest.raises(AttributeError):
        data.write_npz(path, whole._replace(y_test=None))
    assert not path.exists()
    data.write_npz(path, whole)
    with pytest.raises(AttributeError):
        data.write_npz(path, whole._replace(y_test=None))
    assert same(data.read_npz(path), whole)


def test_a_damaged_cache_is_an_error_that_says_to_delete_it(tmp_path, monkeypatch):
    write_fashionmnist(tmp_path, monkeypatch)
    first = data.load("fashionmnist", tmp_path)
    cache, = tmp_path.glob("*.npz")
    cache.write_bytes(cache.read_bytes()[:-1000])
    message = complaint(data.load, "fashionmnist", tmp_path)
    assert str(cache) in message and "delete" in message
    cache.unlink()
    assert same(first, data.load("fashionmnist", tmp_path))


@pytest.mark.parametrize("name", TORCHVISION)
def test_files_that_are_missing_and_cannot_be_downloaded_are_an_error(name, tmp_path):
    message = complaint(data.load, name, tmp_path)
    assert name in message and str(tmp_path) in message and "--data-dir" in message
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("name, file", [
    ("svhn", "train_32x32.mat"), ("svhn", "test_32x32.mat"),
    ("cifar10", "cifar-10-batches-py/data_batch_3"), ("cifar10", "cifar-10-batches-py/test_batch"),
    ("cifar10", "cifar-10-batches-py/batches.meta"),
    ("cifar100", "cifar-100-python/train"), ("cifar100", "cifar-100-python/meta")])
def test_a_file_of_the_wrong_checksum_is_an_error_and_is_not_unpickled(name, file, tmp_path,
                                                                       monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works
    sprung.unlink()
    (tmp_path / file).write_bytes(pickle.dumps(Trap(sprung)))
    assert name in complaint(data.load, name, tmp_path)
    assert not sprung.exists() and not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("name, file", [
    ("fashionmnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
    ("emnist", "EMNIST/raw/emnist-letters-train-images-idx3-ubyte")])
@pytest.mark.parametrize("content", [
    b"", struct.pack(">HBB3I", 0, 8, 3, 1, 1, 1), b"\x1f\x8b\x08\x08 still gzipped",
    struct.pack(">HBB3Ih", 0, 11, 3, 1, 1, 1, 7)], ids=["empty", "cut", "gzipped", "16-bit"])
def test_a_broken_idx_file_is_an_error(name, file, content, tmp_path, monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    (tmp_path / file).write_bytes(content)
    assert name in complaint(data.load, name, tmp_path)


# -------------------------------------------------------------------------------- a user's own .npz


def arrays(**changes) -> dict:
    """The arrays of a sound .npz of three classes, but for the changes; None leaves one out."""
    sound = {"x_train": pixels(12, SIZE, SIZE, seed=1), "y_train": np.arange(12) % 3,
             "x_test": pixels(6, SIZE, SIZE, seed=2), "y_test": np.arange(6) % 3}
    return {name: array for name, array in (sound | changes).items() if array is not None}


def save(path, **changes) -> str:
    np.savez(path, **arrays(**changes))
    return str(path)


def test_an_npz_without_classes_numbers_them(tmp_path):
    loaded = data.load(save(tmp_path / "a.npz"))
    original = arrays()
    assert loaded.classes == ["0", "1", "2"]
    assert np.array_equal(loaded.x_train[:, 0], original["x_train"])
    assert np.array_equal(loaded.x_test[:, 0], original["x_test"])
    assert loaded.y_train.tolist() == original["y_train"].tolist()
    assert loaded.y_test.tolist() == original["y_test"].tolist()
    assert loaded.y_train.dtype == loaded.y_test.dtype == torch.int64


def test_an_npz_with_classes_keeps_their_names(tmp_path):
    names = ["ant", "bee", "cat"]
    assert data.load(save(tmp_path / "a.npz", classes=np.array(names))).classes == names


@pytest.mark.parametrize("channels", [(), (1,), (3,)], ids=["N-H-W", "N-H-W-1", "N-H-W-3"])
def test_gray_and_colour_images_become_channels_first(channels, tmp_path):
    x_train, x_test = (pixels(n, SIZE, SIZE, *channels) for n in (12, 6))
    loaded = data.load(save(tmp_path / "a.npz", x_train=x_train, x_test=x_test))
    assert loaded.x_train.shape == (12, *(channels or (1,)), SIZE, SIZE)
    assert np.array_equal(loaded.x_train.permute(0, 2, 3, 1),
                          x_train.reshape(12, SIZE, SIZE, -1))
    assert loaded.x_train.is_contiguous() and loaded.x_test.is_contiguous()


@pytest.mark.parametrize("dtype", ["int16", "uint16", ">i4", "int64", "uint64"])
def test_integer_pixels_of_any_type_keep_their_value(dtype, tmp_path):
    images = arrays()["x_train"]
    loaded = data.load(save(tmp_path / "a.npz", x_train=images.astype(dtype)))
    assert loaded.x_train.dtype == torch.uint8
    assert np.array_equal(loaded.x_train[:, 0], images)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_in_0_to_1_become_the_nearest_of_256_levels(dtype, tmp_path):
    images = arrays()["x_train"]
    off = numpy_rng().uniform(-0.3, 0.3, images.shape)  # of a level; half would be another
    scaled = ((images + off) / (LEVELS - 1)).clip(0, 1).astype(dtype)
    loaded = data.load(save(tmp_path / "a.npz", x_train=scaled))
    assert loaded.x_train.dtype == torch.uint8
    assert np.array_equal(loaded.x_train[:, 0], images)


@pytest.mark.parametrize("dtype", ["uint8", "int8", ">i2", "uint64"])
def test_labels_may_be_integers_of_any_type(dtype, tmp_path):
    labels = arrays()["y_train"]
    loaded = data.load(save(tmp_path / "a.npz", y_train=labels.astype(dtype)))
    assert loaded.y_train.dtype == torch.int64 and loaded.y_train.tolist() == labels.tolist()


@pytest.mark.parametrize("shape", [(5, 8, 8), (4, 64, 50, 3), (4, 28, 28), (3, 20, 24, 3),
                                   (3, 31, 33)])
def test_images_are_resized_as_torchvision_does_it(shape):
    images = torch.from_numpy(pixels(*shape))
    channels_first = images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
    expected = torchvision.transforms.functional.resize(channels_first, [SIZE, SIZE],
                                                        antialias=True)
    assert torch.equal(data.to_images(images.numpy()), expected)


@pytest.mark.parametrize("size", [14, 28, 48, 64])
def test_images_of_other_sizes_are_resized_upright(size, tmp_path):
    path = save(tmp_path / "a.npz", x_train=quadrants(12, size), x_test=quadrants(6, size))
    loaded = data.load(path)
    assert loaded.x_train.shape == (12, 1, SIZE, SIZE) and loaded.x_train.dtype == torch.uint8
    assert corners_are_upright(loaded.x_train) and corners_are_upright(loaded.x_test)


def test_resizing_keeps_every_image_in_its_place_and_needs_no_square():
    gray = np.arange(2500) % LEVELS  # more images than are resized at a time
    resized = data.to_images(np.broadcast_to(gray[:, None, None], (2500, 4, 6)))
    assert resized.shape == (2500, 1, SIZE, SIZE)
    assert (resized == torch.from_numpy(gray)[:, None, None, None]).all()


WIDE = pixels(12, SIZE, SIZE).astype(float)
BAD_ARRAYS = {
    "label-out-of-range": ({"y_train": np.arange(12), "classes": np.array(["a", "b", "c"])},
                           "y_train"),
    "test-label-without-training": ({"y_test": np.array([0, 1, 2, 3, 0, 1])}, "y_test"),
    "absurd-label": ({"y_train": np.array([2**40] + [0, 1] * 5 + [2])}, "gaps"),
    "negative-label": ({"y_train": np.arange(12) % 3 - 1}, "-1"),
    "float-labels": ({"y_train": np.arange(12) % 3 / 1}, "float64"),
    "text-labels": ({"y_train": np.array(["a", "b", "c"] * 4)}, "integer"),
    "bool-labels": ({"y_train": np.arange(12) % 2 == 0}, "bool"),
    "one-hot-labels": ({"y_train": np.eye(3, dtype=int)[np.arange(12) % 3]}, "(12, 3)"),
    "column-of-labels": ({"y_test": np.arange(6)[:, None] % 3}, "(6, 1)"),
    "too-few-labels": ({"y_train": np.arange(11) % 3}, "11 labels for 12 images"),
    "too-many-labels": ({"y_test": np.arange(7) % 3}, "7 labels for 6 images"),
    "nan": ({"x_train": np.full((12, SIZE, SIZE), np.nan)}, "NaN"),
    "one-nan": ({"x_test": np.where(np.arange(6)[:, None, None] == 5, np.nan,
                                    np.zeros((6, SIZE, SIZE)))}, "NaN"),
    "inf": ({"x_train": np.full((12, SIZE, SIZE), np.inf, dtype=np.float32)}, "infinite"),
    "float-above-1": ({"x_train": WIDE}, "0..1"),
    "negative-float": ({"x_train": WIDE / 255 - 0.5}, "0..1"),
    "integer-above-255": ({"x_train": WIDE.astype(int) + 1}, "0..255"),
    "negative-integer": ({"x_train": WIDE.astype(int) - 1}, "0..255"),
    "complex-images": ({"x_train": WIDE.astype(complex)}, "complex128"),
    "bool-images": ({"x_train": WIDE > 0}, "bool"),
    "text-images": ({"x_train": WIDE.astype(str)}, "dtype"),
    "channels-first": ({"x_train": pixels(12, 3, SIZE, SIZE)}, "channels last"),
    "four-channels": ({"x_test": pixels(6, SIZE, SIZE, 4)}, "C 1 or 3"),
    "flat-images": ({"x_train": pixels(12, SIZE * SIZE)}, "N x H x W"),
    "scalar-images": ({"x_train": np.float32(0.5)}, "N x H x W"),
    "no-training-image": ({"x_train": pixels(0, SIZE, SIZE), "y_train": np.arange(0)}, "empty"),
    "no-test-image": ({"x_test": pixels(0, SIZE, SIZE), "y_test": np.arange(0)}, "empty"),
    "images-without-rows": ({"x_train": pixels(12, 0, SIZE)}, "empty"),
    "empty-class": ({"y_train": np.arange(12) % 2 * 2}, "class 1"),
    "empty-named-class": ({"classes": np.array(["a", "b", "c", "dodo"])}, "dodo"),
    "name-of-two-lines": ({"classes": np.array(["a", "b", "c", "do\ndo"])}, "class 3"),
    "no-x_train": ({"x_train": None}, "x_train"),
    "no-y_test": ({"y_test": None}, "y_test"),
    "nothing": ({name: None for name in ("x_train", "y_train", "x_test", "y_test")}, "y_train"),
    "gray-and-colour": ({"x_test": pixels(6, SIZE, SIZE, 3)}, "channels"),
    "one-class": ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "two classes"),
    "one-named-class": ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int),
                         "classes": np.array(["a"])}, "two classes"),
}


@pytest.mark.parametrize("changes, word", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_an_npz_that_cannot_be_used_says_why(changes, word, tmp_path):
    path = save(tmp_path / "own.npz", **changes)
    message = complaint(data.load, path)
    assert path in message and word in message.replace(path, "")


def trap_in_pickle(path, trap):
    path.write_bytes(pickle.dumps(trap))


def trap_in_npy(path, trap):
    with open(path, "wb") as file:
        np.save(file, np.array([trap], dtype=object), allow_pickle=True)


def trap_in_images(path, trap):
    np.savez(path, **arrays(x_train=np.array([trap] * 12, dtype=object)))


def trap_in_labels(path, trap):
    np.savez(path, **arrays(y_test=np.array([trap] * 6, dtype=object)))


def trap_in_classes(path, trap):
    np.savez(path, **arrays(classes=np.array([trap] * 3, dtype=object)))


def trap_in_bare_member(path, trap):
    with zipfile.ZipFile(path, "w") as archive:
        for name in arrays():
            archive.writestr(f"{name}.npy", pickle.dumps(trap))


def trap_before_an_archive(path, trap):
    save(path)  # a reader that looks for a zip finds one at the end of the file
    path.write_bytes(pickle.dumps(trap) + path.read_bytes())


@pytest.mark.parametrize("write", [trap_in_pickle, trap_in_npy, trap_in_images, trap_in_labels,
                                   trap_in_classes, trap_in_bare_member, trap_before_an_archive])
def test_nothing_that_a_user_supplies_is_unpickled(write, tmp_path):
    path, sprung = tmp_path / "own.npz", tmp_path / "sprung"
    write(path, Trap(sprung))
    message = complaint(data.load, str(path))
    assert str(path) in message and "numpy.savez" in message
    assert not sprung.exists()


@pytest.mark.parametrize("archive_follows", [False, True])
def test_a_plain_npy_posing_as_npz_is_an_error(archive_follows, tmp_path):
    path = tmp_path / "own.npz"
    save(path)
    behind = path.read_bytes() if archive_follows else b""
    with open(path, "wb") as file:
        np.save(file, pixels(12, SIZE, SIZE))
        file.write(behind)
    assert "cannot be read" in complaint(data.load, str(path))


@pytest.mark.parametrize("compress", [False, True])
def test_a_truncated_npz_is_an_error_wherever_it_is_cut(compress, tmp_path):
    path = tmp_path / "own.npz"
    (np.savez_compressed if compress else np.savez)(path, **arrays())
    whole = path.read_bytes()
    assert data.load(str(path)).x_train.shape[0] == 12
    for length in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:length])
        assert "cannot be read" in complaint(data.load, str(path))


def test_a_damaged_npz_is_an_error(tmp_path):
    path = save(tmp_path / "own.npz")
    content = bytearray((tmp_path / "own.npz").read_bytes())
    content[content.index(arrays()["x_train"].tobytes())] ^= LEVELS - 1  # one pixel: fails the CRC
    (tmp_path / "own.npz").write_bytes(content)
    assert "cannot be read" in complaint(data.load, path)


def test_a_missing_file_is_an_error(tmp_path):
    path = str(tmp_path / "nowhere.npz")
    message = complaint(data.load, path)
    assert path in message and "check its path" in message


def test_a_folder_of_that_name_is_an_error(tmp_path):
    (tmp_path / "own.npz").mkdir()
    assert "cannot be read" in complaint(data.load, str(tmp_path / "own.npz"))


@pytest.mark.parametrize("name", ["mnist", "SVHN", "own.npy", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    message = complaint(data.load, name)
    assert f"'{name}'" in message and all(known in message for known in data.DATASETS)


# ------------------------------------------------------------------------- which images a run uses


def test_images_held_out_for_the_server_are_no_clients():
    labels = data.load("digits").y_train
    for train_images, held_out, given_up in ((None, 144, 288), (1400, 140, 280 - 37),
                                             (1000, 337, 0), (1200, 120, 240 - 237)):
        parts = data.choose_images(labels, 0, train_images=train_images, proxy="holdout")
        count = train_images or 1437
        assert [len(part) for part in parts] == [count - given_up, held_out, round(count / 10)]
        assert torch.cat(parts).unique().numel() == sum(map(len, parts))
    chosen, none, validation = data.choose_images(labels, 0, train_images=1400, proxy="noise")
    assert [len(part) for part in (chosen, none, validation)] == [1400 - (140 - 37), 0, 140]
    assert not set(chosen.tolist()) & set(validation.tolist())
    assert [len(part) for part in data.choose_images(labels, 0, train_images=1400)] == [1400, 0, 0]
    assert "1438 is more than the 1437" in complaint(
        lambda: data.choose_images(labels, 0, train_images=1438))


def test_fewer_test_images_are_class_balanced_and_change_nothing_else():
    digits = data.load("digits")
    whole, few = (data.share_out(digits, 5, 3, test_images=count) for count in (None, 100))
    assert len(whole.data.y_test) == 360 and few.data.y_test.bincount().tolist() == [10] * 10
    assert all(map(torch.equal, whole.parts, few.parts))
    assert torch.equal(whole.statistics[0], few.statistics[0])
    assert sorted(torch.cat(few.test_shares).tolist()) == list(range(100))
    same = [int((digits.x_test == image).flatten(1).all(dim=1).sum()) for image in few.data.x_test]
    assert min(same) > 0
    assert "--test-images 361 is more than the 360 test images" in complaint(
        lambda: data.share_out(digits, 5, 3, test_images=361))


@pytest.mark.parametrize("options", [
    {"partition": "iid"}, {"alpha": 0.3}, {"partition": "pathological", "classes_per_client": 3},
    {"missing_classes": 0.2}, {"train_images": 300}])
def test_sharing_out_is_its_partition_with_the_streams_of_the_seed(options):
    digits, seed = data.load("digits"), 5
    shared = data.share_out(digits, 10, seed, **options)
    rows = data.choose_images(digits.y_train, seed, train_images=options.get("train_images"))[0]
    labels, rng = digits.y_train[rows], data.numpy_stream(seed, data.PARTITION)
    assert torch.equal(shared.data.x_train, digits.x_train[rows])
    gone = []
    if "missing_classes" in options:
        parts, gone = data.partition_dropout(labels, 10, 0.2, 2, rng)
    elif options.get("partition") == "iid":
        parts = data.partition_iid(labels, 10, rng)
    elif options.get("partition") == "pathological":
        parts = data.partition_pathological(labels, 10, 3, rng)
    else:
        parts = data.partition_dirichlet(labels, 10, options.get("alpha", 0.5), rng)
    assert all(map(torch.equal, shared.parts, parts)) and shared.dropouts == gone
    assert shared.unseen == ([8, 9] if gone else []) and shared.proxy is None
    assert shared.seen == [label for label in range(10) if label not in shared.unseen]
    there = torch.cat([part for k, part in enumerate(parts) if k not in gone])
    assert all(map(torch.equal, shared.statistics,
                   data.channel_statistics(shared.data.x_train, there)))
    tested = data.share_test(digits.y_test, labels, parts, data.numpy_stream(seed,
                                                                             data.TEST_SHARES))
    assert all(map(torch.equal, shared.test_shares, tested))


def test_a_proxy_is_as_large_as_it_may_be_and_of_the_images_channels(monkeypatch):
    digits = data.load("digits")
    monkeypatch.setattr(data, "PROXY_IMAGES", 50)
    monkeypatch.setattr(data, "VALIDATION_IMAGES", 20)
    for proxy in data.PROXIES:
        shared = data.share_out(digits, 3, 0, proxy=proxy, train_images=300)
        images, labels = shared.validation
        assert shared.proxy.shape == (50, 1, SIZE, SIZE) and shared.proxy.dtype == torch.uint8
        assert images.shape == (20, 1, SIZE, SIZE) and labels.shape == (20,)
        which = data.choose_images(digits.y_train, 0, train_images=300, proxy=proxy)[2]
        assert torch.equal(images, digits.x_train[which])
        assert torch.equal(labels, digits.y_train[which])


def test_moving_keeps_the_nest_and_reaches_every_tensor():
    shared = data.share_out(data.load("digits"), 3, 0)
    moved = data.on_device(shared, "meta")
    assert type(moved) is data.Shared and type(moved.data) is data.Dataset
    assert moved.data.classes == shared.data.classes and moved.seen == shared.seen
    assert all(tensor.is_meta for tensor in (*moved.parts, *moved.test_shares, *moved.statistics,
                                             *moved.data[:4]))


# --------------------------------------------------------------------------------------- partitions


def labels_of(*counts: int) -> torch.Tensor:
    """Labels with this many of each class, in no order."""
    ordered = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ordered[torch.randperm(len(ordered), generator=torch_rng())]


UNEVEN = labels_of(90, 10, 55, 200, 31, 70, 64, 120, 18, 42)


def counts_of(labels: torch.Tensor, parts: list) -> np.ndarray:
    """(clients, classes) images."""
    classes = int(labels.max()) + 1
    return np.stack([labels[part].bincount(minlength=classes).numpy() for part in parts])


def assert_partition(parts: list, of: torch.Tensor):
    """The parts are disjoint and together hold each of these indices, and nothing else."""
    assert all(part.dtype == torch.int64 for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, of)


@pytest.mark.parametrize("count", [1, 9, 10, 47, 100, 180])
def test_a_subset_is_as_balanced_as_the_classes_allow(count):
    subset = data.balanced_subset(UNEVEN, count, numpy_rng())
    assert len(subset) == count == len(subset.unique())
    have, got = UNEVEN.bincount(), UNEVEN[subset].bincount(minlength=10)
    short = got == have  # a class with no image left to take
    assert got[~short].max() - got[~short].min() <= 1
    assert (got[short] <= got[~short].max()).all()


def test_a_subset_takes_all_of_a_short_class_and_fills_up_from_the_others():
    labels = labels_of(2, 50, 50)
    assert labels[data.balanced_subset(labels, 42, numpy_rng())].bincount().tolist() == [2, 20, 20]


def test_a_subset_of_everything_is_everything():
    assert_partition([data.balanced_subset(UNEVEN, len(UNEVEN), numpy_rng())],
                     torch.arange(len(UNEVEN)))


PARTITIONS = {
    "subset": lambda rng: [data.balanced_subset(UNEVEN, 100, rng)],
    "iid": lambda rng: data.partition_iid(UNEVEN, 7, rng),
    "dirichlet": lambda rng: data.partition_dirichlet(UNEVEN, 7, 0.5, rng),
    "pathological": lambda rng: data.partition_pathological(UNEVEN, 7, 3, rng),
    "dropout": lambda rng: data.partition_dropout(UNEVEN, 7, 0.2, 2, rng)[0],
    # Here the counts are the same for every seed, so that the images themselves must differ.
    "dirichlet-even": lambda rng: data.partition_dirichlet(UNEVEN, 7, 1e9, rng, minimum=1),
    "pathological-even": lambda rng: data.partition_pathological(UNEVEN, 7, 10, rng),
    "test-shares": lambda rng: data.share_test(
        UNEVEN, UNEVEN, data.partition_iid(UNEVEN, 7, numpy_rng()), rng),
}


@pytest.mark.parametrize("draw_parts", PARTITIONS.values(), ids=PARTITIONS)
def test_a_partition_is_repeatable_and_another_seed_gives_another(draw_parts):
    first, again, other = (draw_parts(numpy_rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("num_clients", [1, 3, 7, 700])
def test_iid_is_a_partition_into_parts_of_equal_size(num_clients):
    parts = data.partition_iid(UNEVEN, num_clients, numpy_rng())
    sizes = [len(part) for part in parts]
    assert len(parts) == num_clients and max(sizes) - min(sizes) <= 1
    assert_partition(parts, torch.arange(len(UNEVEN)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_clients, alpha", [(1, 0.5), (10, 0.1), (20, 0.5), (35, 100.0)])
def test_dirichlet_is_a_partition_with_ten_images_a_client(num_clients, alpha, seed):
    parts = data.partition_dirichlet(UNEVEN, num_clients, alpha, numpy_rng(seed))
    assert len(parts) == num_clients
    assert min(len(part) for part in parts) >= 10  # the design's minimum
    assert_partition(parts, torch.arange(len(UNEVEN)))


def test_dirichlet_keeps_the_first_draw_that_has_the_minimum_and_draws_no_more_than_allowed():
    outcomes_seen = set()
    for seed in range(20):
        draw_once = partial(data.partition_dirichlet, UNEVEN, 20, 0.5, redraws=1)
        first = draw_once(numpy_rng(seed), minimum=0)
        enough = min(len(part) for part in first) >= data.MIN_IMAGES
        outcomes_seen.add(enough)
        if enough:
            kept = draw_once(numpy_rng(seed))
            assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
        else:
            complaint(draw_once, numpy_rng(seed))
    assert outcomes_seen == {False, True}


def test_a_smaller_alpha_is_a_stronger_skew():
    labels = labels_of(*[300] * 10)

    def skew(alpha: float) -> float:
        """Mean distance (total variation) of a client's distribution of labels from everybody's."""
        distances = []
        for seed in range(5):
            counts = counts_of(labels, data.partition_dirichlet(labels, 10, alpha, numpy_rng(seed)))
            distances.append(abs(counts / counts.sum(axis=1, keepdims=True) - 0.1).sum(axis=1) / 2)
        return float(np.mean(distances))

    skews = [skew(alpha) for alpha in (0.1, 0.5, 2.0, 10.0, 1000.0)]
    assert all(stronger > weaker for stronger, weaker in zip(skews, skews[1:]))


def test_a_huge_alpha_gives_every_client_its_proportion_of_each_class():
    labels = labels_of(50, 100, 10)
    counts = counts_of(labels, data.partition_dirichlet(labels, 5, 1e9, numpy_rng()))
    assert counts.tolist() == [[10, 20, 2]] * 5


def test_dirichlet_shares_have_the_variance_of_that_distribution():
    num_clients, alpha, num_classes, size = 4, 0.5, 400, 100
    labels = torch.arange(num_classes).repeat(size)
    counts = counts_of(labels, data.partition_dirichlet(labels, num_clients, alpha, numpy_rng()))
    mean = 1 / num_clients
    variance = mean * (1 - mean) / (num_clients * alpha + 1)
    # 1,600 shares estimate it to some 5 %
    assert ((counts / size - mean) ** 2).mean() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("labels, num_clients, alpha, redraws", [
    (labels_of(3, 2), 10, 0.5, data.MAX_REDRAWS), (labels_of(50, 49), 10, 100.0, data.MAX_REDRAWS),
    (UNEVEN, 40, 0.001, 3)], ids=["5-images", "one-too-few", "tiny-alpha"])
def test_a_dirichlet_split_that_cannot_be_is_an_error(labels, num_clients, alpha, redraws):
    split = partial(data.partition_dirichlet, redraws=redraws)
    message = complaint(split, labels, num_clients, alpha, numpy_rng())
    assert f"{num_clients} clients" in message and "--alpha" in message
    assert f"{len(labels)} images" in message


@pytest.mark.parametrize("num_clients, gamma", [(10, 2), (5, 2), (3, 2), (20, 3), (4, 10), (7, 1),
                                                (6, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_pathological_gives_each_client_its_classes_and_each_class_its_holders(num_clients, gamma,
                                                                               seed):
    parts = data.partition_pathological(UNEVEN, num_clients, gamma, numpy_rng(seed))
    counts = counts_of(UNEVEN, parts)
    num_classes = counts.shape[1]
    assert ((counts > 0).sum(axis=1) == gamma).all()
    holders = (counts > 0).sum(axis=0)
    assert holders.sum() == num_clients * gamma
    assert holders.max() - holders.min() <= 1
    assert (holders > 0).sum() == min(num_classes, num_clients * gamma)
    for column in counts.T[holders > 0]:
        shares = column[column > 0]
        assert shares.max() - shares.min() <= 1
    held = np.isin(UNEVEN, np.flatnonzero(holders))
    assert_partition(parts, torch.from_numpy(np.flatnonzero(held)))


def test_more_classes_a_client_than_there_are_is_an_error():
    assert "--classes-per-client 11" in complaint(
        data.partition_pathological, UNEVEN, 4, 11, numpy_rng())


def test_the_dropout_setting_of_the_paper_is_its_table_1():
    parts, dropouts = data.partition_dropout(UNEVEN, 10, 0.2, 2, numpy_rng())
    held = counts_of(UNEVEN, parts) > 0
    assert dropouts == [9] and held[9].nonzero()[0].tolist() == [8, 9]
    assert not held[:9, 8:].any() and (held[:9].sum(axis=1) == 2).all()
    assert set(held[:9, :8].sum(axis=0)) == {2, 3}  # holders of a class that is seen
    assert_partition(parts, torch.arange(len(UNEVEN)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_classes, num_clients, missing, each, alone, shared, dropouts", [
    (10, 10, 0.1, 2, [9], [8], [9]), (10, 10, 0.04, 2, [9], [8], [9]),
    (10, 5, 0.4, 2, [6, 7, 8, 9], [], [3, 4]), (10, 10, 0.2, 1, [8, 9], [], [8, 9]),
    (10, 4, 0.2, 5, [8, 9], [5, 6, 7], [3]),
    (26, 10, 0.1, 6, [23, 24, 25], [20, 21, 22], [9]),
    (26, 10, 0.2, 6, [21, 22, 23, 24, 25], [20], [9]),
    (26, 20, 0.2, 2, [21, 22, 23, 24, 25], [20], [17, 18, 19]),
    (100, 10, 0.1, 20, list(range(90, 100)), list(range(80, 90)), [9]),
    (100, 10, 0.2, 20, list(range(80, 100)), [], [9]),
    (100, 10, 0.3, 20, list(range(70, 100)), list(range(60, 70)), [8, 9])])
def test_missing_classes_sit_with_the_last_clients_alone(num_classes, num_clients, missing, each,
                                                         alone, shared, dropouts, seed):
    labels = labels_of(*[40] * num_classes)
    parts, gone = data.partition_dropout(labels, num_clients, missing, each, numpy_rng(seed))
    held = counts_of(labels, parts) > 0
    assert gone == dropouts and (held.sum(axis=1) == each).all()
    others = [k for k in range(num_clients) if k not in gone]
    assert not held[np.ix_(others, alone)].any()
    assert (held[np.ix_(gone, alone)].sum(axis=0) == 1).all()
    assert sorted(np.flatnonzero(held[gone].any(axis=0))) == sorted(alone + shared)
    places, seen = len(others) * each, num_classes - len(alone)
    assert held[others].any(axis=0).sum() == min(places, seen)
    if places >= seen:
        assert_partition(parts, torch.arange(len(labels)))


@pytest.mark.parametrize("missing, last", [(0.2, [[9], [9]]), (0.1, [[9]])])
def test_ten_classes_and_ten_clients_are_dealt_as_in_the_papers_table(missing, last):
    rng, again = numpy_rng(3), numpy_rng(3)
    parts, _ = data.partition_dropout(UNEVEN, 10, missing, 2, rng)
    holders = data.assign_classes(10 - len(last), 9, 2, again) + last
    if missing == 0.1:
        holders[8].append(9)
    assert all(map(torch.equal, parts, data.deal_classes(UNEVEN, holders, 10, again)))


@pytest.mark.parametrize("num_classes, each", [(2, 2), (10, 2), (11, 3), (26, 6), (100, 20)])
def test_in_the_dropout_setting_a_client_holds_a_fifth_of_the_classes(num_classes, each):
    assert data.classes_each(num_classes, 0.1) == data.classes_each(num_classes, 0.2) == each
    assert data.classes_each(num_classes, None) == 2


@pytest.mark.parametrize("num_clients, missing, each, complaint_of", [
    (10, 0.9, 2, "at least two"), (10, 1.0, 2, "at least two"), (1, 0.1, 2, "0 of 1 clients"),
    (2, 0.4, 2, "0 of 2 clients"), (10, 0.2, 9, "give --classes-per-client 8 or less")])
def test_a_dropout_setting_that_leaves_too_little_is_an_error(num_clients, missing, each,
                                                              complaint_of):
    message = complaint(data.partition_dropout, UNEVEN, num_clients, missing, each, numpy_rng())
    assert f"--missing-classes {missing:g}" in message and complaint_of in message


def test_the_server_has_its_images_as_clients_have_theirs():
    shared = data.share_out(data.load("digits"), 3, 0, proxy="noise")
    own = data.server_images(shared)
    for name, images in (("proxy", shared.proxy), ("validation", shared.validation[0])):
        assert torch.equal(own[name].images[own[name].indices], images)
        assert torch.equal(own[name].prepare(images), data.standardise(images, *shared.statistics))
    assert torch.equal(own["validation"].labels, shared.validation[1])
    assert data.server_images(data.share_out(data.load("digits"), 3, 0)) == {}


def test_an_epoch_visits_as_many_samples_as_it_says():
    for count in range(2, 30):
        for batch_size in range(2, 9):
            own = client(torch.arange(count))
            visited = sum(len(y) for _, y in data.batches(own, batch_size, 1, torch_rng()))
            assert visited == data.samples_per_epoch(count, batch_size)


def largest_remainders(seats: int, weights: list[int]) -> list[int]:
    """Whole seats in proportion to the weights; the rest by largest remainder, then lower id."""
    if sum(weights) == 0:
        return [0] * len(weights)
    quotas = [Fraction(seats * weight, sum(weights)) for weight in weights]
    given = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda k: (int(quotas[k]) - quotas[k], k))
    for k in by_remainder[:seats - sum(given)]:
        given[k] += 1
    return given


def as_expected(test: torch.Tensor, train: torch.Tensor, parts: list) -> np.ndarray:
    """(clients, classes) test images, from the rule alone."""
    classes = range(int(max(test.max(), train.max())) + 1)
    return np.array([largest_remainders(int((test == label).sum()),
                                        [int((train[part] == label).sum()) for part in parts])
                     for label in classes]).T


def assert_shares(test: torch.Tensor, train: torch.Tensor, parts: list, seed: int = 0):
    shares = data.share_test(test, train, parts, numpy_rng(seed))
    expected = as_expected(test, train, parts)
    together = torch.cat(shares)
    assert len(together) == len(together.unique()) == expected.sum()
    got = [test[share].bincount(minlength=expected.shape[1]).tolist() for share in shares]
    assert got == expected.tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_clients, alpha", [(2, 0.1), (7, 0.3), (13, 1.0), (30, 100.0)])
def test_test_images_are_shared_by_largest_remainders(num_clients, alpha, seed):
    parts = data.partition_dirichlet(UNEVEN, num_clients, alpha, numpy_rng(seed), minimum=1)
    assert_shares(labels_of(*range(17, 37, 2)), UNEVEN, parts, seed)


def test_equal_remainders_go_to_the_lower_ids():
    train, test = labels_of(9, 9), labels_of(5, 1)
    parts = [torch.cat([(train == label).nonzero()[3 * k:3 * k + 3, 0] for label in range(2)])
             for k in range(3)]
    shares = data.share_test(test, train, parts, numpy_rng())
    assert counts_of(test, shares).tolist() == [[2, 1], [2, 0], [1, 0]]


def test_test_images_of_a_class_that_nobody_holds_go_to_nobody():
    parts = data.partition_pathological(UNEVEN, 3, 2, numpy_rng())
    test = labels_of(*[10] * 10)
    assert_shares(test, UNEVEN, parts)
    shares = data.share_test(test, UNEVEN, parts, numpy_rng())
    held = UNEVEN[torch.cat(parts)].unique()
    assert torch.equal(test[torch.cat(shares)].unique(), held) and len(held) < 10


def test_a_client_of_no_images_and_a_class_of_one_part_only_are_no_trouble():
    train = labels_of(6, 4)
    nobody = torch.empty(0, dtype=torch.int64)
    assert_shares(labels_of(5, 0, 7), train, [torch.arange(7), nobody, torch.arange(7, 10)])
    assert_shares(labels_of(5), train, [nobody, torch.arange(10)])


# ------------------------------------------------------------------------ statistics, standardising


@pytest.mark.parametrize("count, channels", [(50, 1), (50, 3), (25_000, 2)])
def test_statistics_are_those_of_the_indexed_images(count, channels):
    images = torch.from_numpy(pixels(count, channels, 3, 4))
    images[:, -1] //= 3  # channels that differ
    indices = torch.randperm(count, generator=torch_rng())[: count // 2 + 7]
    mean, deviation = data.channel_statistics(images, indices)
    chosen = images.numpy()[indices].astype(np.float64)
    assert mean.shape == deviation.shape == (channels, 1, 1)
    assert mean.dtype == deviation.dtype == torch.float32
    np.testing.assert_allclose(mean.flatten(), chosen.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(deviation.flatten(), chosen.std(axis=(0, 2, 3)), rtol=1e-6)


def test_a_constant_channel_has_the_deviation_1():
    images = torch.from_numpy(pixels(20, 3, 4, 4))
    images[:, 1] = 77
    mean, deviation = data.channel_statistics(images, torch.arange(20))
    assert mean[1] == 77 and deviation[1] == 1
    assert (deviation[[0, 2]] > 1).all()


def test_the_order_of_the_images_leaves_the_statistics_bit_for_bit():
    images = torch.from_numpy(pixels(25_000, 3, 2, 2))
    orders = [torch.arange(25_000), torch.arange(25_000).flip(0),
              torch.randperm(25_000, generator=torch_rng())]
    (mean, deviation), *others = [data.channel_statistics(images, order) for order in orders]
    for other_mean, other_deviation in others:
        assert torch.equal(mean, other_mean) and torch.equal(deviation, other_deviation)


def test_standardised_images_have_zero_mean_and_unit_deviation():
    images = torch.from_numpy(pixels(40, 3, 5, 5))
    everything = torch.arange(40)
    x = data.standardise(images, *data.channel_statistics(images, everything))
    by_hand = images.numpy().astype(np.float64)
    by_hand = ((by_hand - by_hand.mean(axis=(0, 2, 3), keepdims=True))
               / by_hand.std(axis=(0, 2, 3), keepdims=True))
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x, by_hand, atol=1e-5)


# ------------------------------------------------------------------------------------- augmentation

# No pixel equals the means, so a standardised pixel is 0 only where Cutout put it.
MEAN, DEVIATION = torch.tensor([100.5, 50.5, 7.5]).view(3, 1, 1), torch.tensor(2.0)


def test_characters_keep_every_pixel_but_those_of_one_square():
    images = torch.from_numpy(pixels(1000, 3, SIZE, SIZE))
    x = data.augment(images, MEAN, DEVIATION, data.CHARACTERS, torch_rng())
    assert x.shape == images.shape and x.dtype == torch.float32
    blank = x == 0
    assert torch.equal(x, data.standardise(images, MEAN, DEVIATION).masked_fill(blank, 0))
    assert (blank == blank[:, :1]).all()  # the same pixels in all channels
    rows, columns = blank[:, 0].any(dim=2), blank[:, 0].any(dim=1)
    assert torch.equal(blank[:, 0], rows[:, :, None] & columns[:, None, :])  # a rectangle
    half = 16 // 2  # the square that InCo cuts out, centred anywhere, cut off at the border
    expected = {(max(0, c - half), min(SIZE - 1, c + half - 1)) for c in range(SIZE)}
    for lines in (rows, columns):  # 1,000 draws meet all 32 centres
        ends = [(line[0].item(), line[-1].item(), len(line))
                for line in (mask.nonzero().flatten() for mask in lines)]
        assert {(first, last) for first, last, _ in ends} == expected
        assert all(length == last - first + 1 for first, last, length in ends)


def crops_and_flips(image: np.ndarray, padding: int) -> dict:
    """Every outcome of crop and flip, by its bytes: (top, left, flipped)."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    found = {}
    for top, left in product(range(2 * padding + 1), repeat=2):
        crop = padded[:, top:top + height, left:left + width]
        found[crop.tobytes()] = (top, left, False)
        found[crop[:, :, ::-1].tobytes()] = (top, left, True)
    return found


def outcomes(images: torch.Tensor, kind: data.Augmentation, seed: int = 0) -> list:
    """What crop and flip were drawn for each image: KeyError if none explains the result."""
    x = data.augment(images, MEAN, DEVIATION, kind, torch_rng(seed))
    changed = (x * DEVIATION + MEAN).round().byte().numpy()
    return [crops_and_flips(before, kind.padding)[after.tobytes()]
            for before, after in zip(images.numpy(), changed)]


def test_each_image_becomes_a_crop_of_itself_padded_or_the_mirror_image_of_one():
    images = torch.from_numpy(pixels(30, 3, 5, 7))
    assert len(outcomes(images, data.Augmentation(hole=0))) == len(images)


def test_all_crops_and_flips_are_drawn_and_half_are_flipped():
    count, padding = 3000, 4
    image = pixels(3, 5, 7)
    table = crops_and_flips(image, padding)
    assert len(table) == 2 * (2 * padding + 1) ** 2  # no two look the same
    images = torch.from_numpy(image).expand(count, -1, -1, -1)
    x = data.augment(images, MEAN, DEVIATION, data.Augmentation(hole=0), torch_rng())
    changed = (x * DEVIATION + MEAN).round().byte().numpy()
    drawn = [table[after.tobytes()] for after in changed]
    assert set(drawn) == set(table.values())
    flipped = sum(flip for _, _, flip in drawn) / count
    assert abs(flipped - 0.5) < 4 * 0.5 / count**0.5  # four standard errors


@pytest.mark.parametrize("kind, allowed", [
    (data.Augmentation(padding=0, flip=False, hole=0), {(0, 0, False)}),
    (data.Augmentation(padding=0, flip=True, hole=0), {(0, 0, False), (0, 0, True)}),
    (data.Augmentation(padding=1, flip=False, hole=0),
     {(top, left, False) for top, left in product(range(3), repeat=2)})])
def test_what_is_switched_off_is_not_done(kind, allowed):
    assert set(outcomes(torch.from_numpy(pixels(200, 3, 5, 7)), kind)) == allowed


def test_the_hole_is_zero_and_the_rest_is_a_crop_or_flip():
    image = pixels(3, SIZE, SIZE)
    padding = data.Augmentation().padding
    candidates = np.stack([np.frombuffer(content, np.uint8).reshape(image.shape)
                           for content in crops_and_flips(image, padding)])
    images = torch.from_numpy(image).expand(20, -1, -1, -1)
    x = data.augment(images, MEAN, DEVIATION, data.Augmentation(), torch_rng())
    expected = data.standardise(torch.from_numpy(candidates), MEAN, DEVIATION)
    for result in x:
        hole = result == 0
        assert 8 * 8 * 3 <= hole.sum() <= 16 * 16 * 3  # at least its quarter lies in the image
        assert any(torch.equal(result, whole.masked_fill(hole, 0)) for whole in expected)


def test_augmenting_is_repeatable_and_leaves_its_input():
    images = torch.from_numpy(pixels(16, 3, SIZE, SIZE))
    before = images.clone()
    first, again, other = (
        data.augment(images, MEAN, DEVIATION, data.Augmentation(), torch_rng(seed))
        for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(images, before)


# ------------------------------------------------------------------------------------------ batches


def client(indices: torch.Tensor) -> data.ClientData:
    """A client of 120 images that each show their own number, labelled with it times 3."""
    numbers = torch.arange(120)
    images = numbers.byte()[:, None, None, None].expand(-1, 1, 2, 2)
    return data.ClientData(images, 3 * numbers, indices, prepare=lambda x: x.float() / 2)


def shown(x: torch.Tensor) -> list[int]:
    return (2 * x[:, 0, 0, 0]).long().tolist()


def epochs_of(indices: torch.Tensor, batch_size: int, epochs: int, seed: int = 0) -> list:
    """The images of each epoch, batch by batch."""
    found = list(data.batches(client(indices), batch_size, epochs, torch_rng(seed)))
    assert len(found) % epochs == 0
    each = len(found) // epochs
    return [[shown(x) for x, _ in found[k * each:(k + 1) * each]] for k in range(epochs)]


OWN = torch.tensor([5, 9, 2, 100, 41, 7, 30, 77, 64, 11, 3, 118])


@pytest.mark.parametrize("size, batch_size, expected", [
    (12, 4, [4, 4, 4]), (12, 5, [5, 5, 2]), (10, 4, [4, 4, 2]), (3, 8, [3]), (2, 2, [2])])
def test_each_epoch_is_a_permutation_of_the_clients_images(size, batch_size, expected):
    for epoch in epochs_of(OWN[:size], batch_size, epochs=3):
        assert [len(batch) for batch in epoch] == expected
        assert sorted(sum(epoch, [])) == sorted(OWN[:size].tolist())


@pytest.mark.parametrize("size, batch_size, expected", [(9, 4, [4, 4]), (11, 5, [5, 5]),
                                                        (1, 4, [])])
def test_a_lone_last_image_is_left_out(size, batch_size, expected):
    for epoch in epochs_of(OWN[:size], batch_size, epochs=3):
        assert [len(batch) for batch in epoch] == expected
        seen = sum(epoch, [])
        assert len(set(seen)) == len(seen) and set(seen) <= set(OWN[:size].tolist())


def test_the_order_differs_between_epochs_and_seeds_and_is_repeatable():
    first, second = epochs_of(OWN, 4, epochs=2)
    assert first != second
    assert epochs_of(OWN, 4, epochs=2) == [first, second]
    assert epochs_of(OWN, 4, epochs=2, seed=1) != [first, second]


def test_labels_belong_to_their_images_which_are_prepared():
    found = list(data.batches(client(OWN), 5, 2, torch_rng()))
    assert found
    for x, y in found:
        assert x.dtype == torch.float32 and x.shape == (len(y), 1, 2, 2)
        assert y.tolist() == [3 * number for number in shown(x)]
