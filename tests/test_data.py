"""data.py: streams, loading, statistics, augmentation and batches.

Original files are written here, small, in their own formats; the network is switched off.
"""

import hashlib
import io
import pickle
import random
import shutil
import socket
import struct
from itertools import product
from pathlib import Path

import filelock
import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from sklearn.datasets import load_digits

import data

LEVELS = 256  # values of a uint8 pixel
SIZE = data.IMAGE_SIZE


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Switch the network off, and check that no test draws from a global generator."""
    monkeypatch.delattr(socket, "getaddrinfo")
    states = [(torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())]
    yield
    states += [(torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())]
    assert states[0] == states[1]


def complaint(call, *args) -> str:
    """Message, a single line, of the ValueError that the call must raise."""
    with pytest.raises(ValueError) as caught:
        call(*args)
    message = str(caught.value)
    assert message.strip() and len(message.splitlines()) == 1
    return message


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, LEVELS, shape, dtype=np.uint8)


def torch_rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(first: data.Dataset, second: data.Dataset) -> bool:
    tensors = zip(first[:4], second[:4])
    return all(torch.equal(a, b) for a, b in tensors) and first.classes == second.classes


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# ----------------------------------------------------------------------------------- random streams

def draw(stream) -> tuple:
    if isinstance(stream, torch.Generator):
        return tuple(torch.randint(2**31, (4,), generator=stream).tolist())
    return tuple(stream.integers(2**31, size=4).tolist())


def test_a_stream_is_seeded_by_seed_purpose_round_and_client_and_shared_by_no_other_key():
    keys = list(product(range(3), repeat=4))
    for stream in (data.numpy_stream, data.torch_stream):
        assert len({draw(stream(*key)) for key in keys}) == len(keys)
        assert draw(stream(3, 6)) == draw(stream(3, 6, round=0, client=0))
    key = np.random.SeedSequence([3, 6, 5, 7])
    assert draw(data.numpy_stream(3, 6, 5, 7)) == draw(np.random.default_rng(key))
    expected = draw(torch_rng(int(key.generate_state(1, np.uint64)[0])))
    assert draw(data.torch_stream(3, 6, 5, 7)) == draw(data.streams(3, 5, 7)(6)) == expected


def test_the_numbers_of_the_purposes_are_those_of_the_published_results():
    names = """SUBSET PARTITION TEST_SHARES INITIAL_WEIGHTS PARTICIPANTS SPEEDS BATCHES AUGMENTATION
        FEATURE_BATCH FEATURE_POOL NOISE FEATURE_NOISE GENERATOR_WEIGHTS GENERATOR_NOISE SYNTHETIC
        FRIEND_BATCHES RATE LATENT PROXY PROXY_BATCHES TEST_SUBSET VIRTUAL_FEATURES
        VIRTUAL_BATCHES""".split()
    assert [getattr(data, name) for name in names] == list(range(23))


# ------------------------------------------------------------------------------------------- digits

def test_digits_have_fixed_sizes_are_stratified_and_disjoint_and_belong_to_their_labels():
    digits = data.load("digits")
    for images, labels, size in ((digits.x_train, digits.y_train, 1437),
                                 (digits.x_test, digits.y_test, 360)):  # fixed by the design
        assert images.shape == (size, 1, SIZE, SIZE) and images.dtype == torch.uint8
        assert labels.shape == (size,) and labels.dtype == torch.int64
        assert images.is_contiguous() and images.min() == 0 and images.max() == LEVELS - 1
    assert digits.classes == [str(digit) for digit in range(10)]
    means = torch.stack([digits.x_train[digits.y_train == digit].float().mean(dim=0).flatten()
                         for digit in range(10)])
    nearest = torch.cdist(digits.x_test.float().flatten(1), means).argmin(dim=1)
    assert (nearest == digits.y_test).float().mean() > 0.8  # chance is 0.1

    expected = np.bincount(load_digits().target) * 360 / 1797
    assert (abs(digits.y_test.bincount().numpy() - expected) < 1).all()
    both = torch.cat([digits.x_train, digits.x_test]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


# --------------------------------------------------------------------- torchvision's original files

def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_svhn(folder, monkeypatch):
    """Write .mat files: X (32, 32, 3, N), y (N, 1) with 10 for the digit 0."""
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
    """Write pickled dicts: data (N, 3072), the red plane first, row by row, and labels."""
    def write(name, content):
        path = folder / kind.base_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return md5(path)

    expected, classes = [], [f"class-{label}" for label in range(num_classes)]
    for seed, part in enumerate(("train", "test")):
        labels = np.arange(2 * num_classes) * 7 % num_classes
        planes = pixels(len(labels), 3, SIZE, SIZE, seed=seed)
        content = {"data": planes.reshape(len(labels), -1), label_key: labels.tolist()}
        monkeypatch.setattr(kind, f"{part}_list", [[part, write(part, content)]])
        expected += [planes.transpose(0, 2, 3, 1), labels]
    meta = write(kind.meta["filename"], {kind.meta["key"]: classes})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta})
    return (*expected, classes)


def write_idx(folder, prefixes, images, labels):
    """Write idx files: two zero bytes, 8 for bytes, the dimensions, big-endian sizes, bytes."""
    folder.mkdir(parents=True)
    names = ("images-idx3-ubyte", "labels-idx1-ubyte")
    for prefix, (array, name) in product(prefixes, zip((images, labels), names)):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (folder / f"{prefix}-{name}").write_bytes(header + array.astype(np.uint8).tobytes())


def write_fashionmnist(folder, monkeypatch):
    images, labels = pixels(30, 28, 28), np.arange(30) % 10
    write_idx(folder / "FashionMNIST" / "raw", ("train", "t10k"), images, labels)
    return images, labels, images, labels, torchvision.datasets.FashionMNIST.classes


def write_emnist(folder, monkeypatch):
    """Write the letters' files, which count labels from 1 and store every image transposed."""
    images, labels = pixels(52, 28, 28), np.arange(52) % 26
    prefixes = ("emnist-letters-train", "emnist-letters-test")
    write_idx(folder / "EMNIST" / "raw", prefixes, images.transpose(0, 2, 1), labels + 1)
    return images, labels, images, labels, list("abcdefghijklmnopqrstuvwxyz")


WRITERS = {
    "svhn": write_svhn, "emnist": write_emnist, "fashionmnist": write_fashionmnist,
    "cifar10": lambda *to: write_cifar(*to, torchvision.datasets.CIFAR10, "labels", 10),
    "cifar100": lambda *to: write_cifar(*to, torchvision.datasets.CIFAR100, "fine_labels", 100)}


@pytest.mark.parametrize("name", data.DOWNLOADED)
def test_original_files_are_read_once_and_then_from_one_cache_file(name, tmp_path, monkeypatch):
    x_train, y_train, x_test, y_test, classes = WRITERS[name](tmp_path, monkeypatch)
    originals = list(tmp_path.iterdir())
    first = data.load(name, tmp_path)
    assert first.classes == classes
    assert torch.equal(first.x_train, data.to_images(x_train))
    assert torch.equal(first.x_test, data.to_images(x_test))
    assert first.y_train.tolist() == y_train.tolist() and first.y_test.tolist() == y_test.tolist()
    for path in originals:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert list(tmp_path.iterdir()) == [data.cache_path(name, tmp_path)]
    again = data.load(name, tmp_path)
    assert same(first, again) and first.digest == again.digest != ""


@pytest.mark.parametrize("error", [PermissionError(13, "another user's"), OSError(37, "no locks"),
                                   NotImplementedError("no locks")])
def test_a_data_set_loads_without_a_lock_where_there_is_none_and_needs_none_later(error, tmp_path,
                                                                                  monkeypatch):
    def acquire(lock):
        asked.append(lock)
        raise error

    asked, folder = [], tmp_path / "new"
    write_fashionmnist(folder, monkeypatch)
    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    first = data.load("fashionmnist", folder)
    assert len(asked) == 1 and same(data.load("fashionmnist", folder), first) and len(asked) == 1


def test_originals_whose_copy_cannot_be_kept_have_its_digest(tmp_path, monkeypatch, capsys):
    def refuse(path, fill):
        raise OSError("read-only")

    write_fashionmnist(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_atomically", refuse)
        kept_nowhere = data.load("fashionmnist", tmp_path)
    assert "makes it anew" in capsys.readouterr().out
    kept = data.load("fashionmnist", tmp_path)
    assert same(kept, kept_nowhere) and kept.digest == kept_nowhere.digest != ""


def test_nothing_is_downloaded_or_made_for_those_who_only_read(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "gone"):
        with monkeypatch.context() as patch:
            patch.setattr(torchvision.datasets.FashionMNIST, "download", None)
            with pytest.raises(ValueError, match="not found.*pass data_dir=, their folder"):
                data.load("fashionmnist", folder, download=False)
    assert not list(tmp_path.iterdir())
    write_fashionmnist(tmp_path, monkeypatch)
    read = data.load("fashionmnist", tmp_path, download=False)
    assert not data.cache_path("fashionmnist", tmp_path).exists()
    assert same(read, kept := data.load("fashionmnist", tmp_path)) and read.digest == kept.digest


def test_a_damaged_cache_is_an_error_that_says_to_delete_it(tmp_path, monkeypatch):
    write_fashionmnist(tmp_path, monkeypatch)
    data.load("fashionmnist", tmp_path)
    cache = data.cache_path("fashionmnist", tmp_path)
    cache.write_bytes(cache.read_bytes()[:-1000])
    message = complaint(data.load, "fashionmnist", tmp_path)
    assert str(cache) in message and "delete" in message


def test_a_cache_half_written_never_gets_the_name(tmp_path):
    whole, path = data.from_arrays(**arrays()), tmp_path / "cache.npz"
    for written_before in (False, True):
        with pytest.raises(AttributeError):
            data.write_npz(path, whole._replace(y_test=None))
        assert list(tmp_path.iterdir()) == [path] * written_before
        data.write_npz(path, whole)
    assert same(data.read_npz(path), whole)


SHORT = struct.pack(">HBB3Ih", 0, 11, 3, 1, 1, 1, 7)  # an idx file of 16-bit pixels


@pytest.mark.parametrize("name, file, content", [
    ("cifar100", None, b""), ("svhn", "test_32x32.mat", None),
    ("emnist", "EMNIST/raw/emnist-letters-train-images-idx3-ubyte", SHORT)])
def test_no_damaged_original_is_unpickled(name, file, content, tmp_path, monkeypatch):
    sprung = tmp_path / "sprung"
    if file:
        WRITERS[name](tmp_path, monkeypatch)
        (tmp_path / file).write_bytes(pickle.dumps(Trap(sprung)) if content is None else content)
    message = complaint(data.load, name, tmp_path)
    assert message.startswith(f"{name} cannot be loaded (") and "check the connection" in message
    assert f"put sound original files into '{tmp_path}' (--data-dir)" in message
    assert not sprung.exists() and not list(tmp_path.glob("*.npz"))


# ------------------------------------------------------------------------------- a user's .npz file

def arrays(**changes) -> dict:
    """Arrays of a sound .npz of three classes, but for the changes; None leaves one out."""
    sound = {"x_train": pixels(12, SIZE, SIZE, seed=1), "y_train": np.arange(12) % 3,
             "x_test": pixels(6, SIZE, SIZE, seed=2), "y_test": np.arange(6) % 3}
    return {name: array for name, array in (sound | changes).items() if array is not None}


def save(path, **changes) -> str:
    np.savez(path, **arrays(**changes))
    return str(path)


@pytest.mark.parametrize("pixel_type, label_type", [
    (">i4", "int8"), ("uint64", ">i2"), ("float16", "uint64"), ("float64", "int64")])
def test_numbers_of_any_type_become_the_nearest_level_and_an_int64_label(pixel_type, label_type):
    x, y = arrays()["x_train"], arrays()["y_train"]
    stored = x
    if pixel_type.startswith("float"):  # in 0..1, and off by less than half a level
        off = np.random.default_rng(0).uniform(-0.3, 0.3, x.shape)
        stored = ((x + off) / (LEVELS - 1)).clip(0, 1)
    loaded = data.from_arrays(**arrays(x_train=stored.astype(pixel_type),
                                       y_train=y.astype(label_type)))
    assert np.array_equal(loaded.x_train[:, 0], x) and loaded.x_train.dtype == torch.uint8
    assert loaded.y_train.tolist() == y.tolist() and loaded.y_train.dtype == torch.int64
    assert loaded.classes == ["0", "1", "2"]


@pytest.mark.parametrize("shape", [(5, SIZE, SIZE, 1), (4, 64, 50, 3), (1100, 4, 6)])
def test_images_are_resized_as_torchvision_does_it(shape):  # the last in two parts
    images = torch.from_numpy(pixels(*shape))
    planes = images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
    expected = torchvision.transforms.functional.resize(planes, [SIZE, SIZE], antialias=True)
    assert torch.equal(data.to_images(images.numpy()), expected)


def test_names_of_classes_may_be_bytes_and_integers_0_and_1_alone_are_warned_of(tmp_path, capsys):
    names, masks = np.array(["Möwe".encode(), b"two\n lines", b"c"]), arrays()["x_train"] // 128
    path = save(tmp_path / "a.npz", classes=names, x_train=masks.astype(np.float32))
    assert data.load(path).classes == ["Möwe", "two lines", "c"]
    assert capsys.readouterr().out == ""
    data.from_arrays(**arrays(x_train=masks))
    assert "x_train holds only 0 and 1" in capsys.readouterr().out


def test_a_digest_is_of_values_types_and_shapes():
    x = torch.arange(6)
    prints = [data.digest(x), data.digest(x + 1), data.digest(x.view(2, 3)), data.digest(x.int()),
              data.digest(x, ["a"]), data.digest(x, ["b"]), data.digest(x[:0])]
    assert len(set(prints)) == len(prints) and data.digest(x.numpy()) == prints[0]


WIDE = pixels(12, SIZE, SIZE).astype(float)
BAD_ARRAYS = [
    ({"y_test": np.arange(6) % 3 - 1}, "y_test holds label -1, not in 0..2"),
    ({"classes": np.array(["a", "b", "c", "do\ndo"])}, "class 3 ('do do')"),
    ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "two classes"),
    ({"y_test": np.arange(6)[:, None] % 3}, "y_test is int64 (6, 1)"),
    ({"x_test": np.where(np.arange(6 * SIZE**2) == 9, np.nan, 0.0).reshape(6, SIZE, SIZE)}, "NaN"),
    ({"x_train": WIDE}, "0..1"),
    ({"x_train": WIDE.astype(int) - 1}, "0..255"),
    ({"x_train": WIDE.astype(complex)}, "complex128"),
    ({"x_train": pixels(12, 3, SIZE, SIZE)}, "channels last"),
    ({"x_test": pixels(0, SIZE, SIZE), "y_test": np.arange(0)}, "empty"),
    ({"x_test": pixels(6, SIZE, SIZE, 3)}, "x_train has 1 channels, but x_test 3")]


@pytest.mark.parametrize("changes, words", BAD_ARRAYS)
def test_arrays_that_cannot_be_used_are_an_error_that_says_why(changes, words):
    assert words in complaint(lambda: data.from_arrays(**arrays(**changes)))


def test_an_error_in_an_npz_names_the_file(tmp_path):
    path = save(tmp_path / "mine.npz", y_test=None, x_test=None)
    assert complaint(data.load, path).startswith(f"{path} has no x_test, y_test:")
    save(path, y_test=np.arange(7) % 3)
    assert complaint(data.load, path) == f"{path}: y_test has 7 labels for 6 images"


TRAPS = {
    "pickle": lambda path, trap: path.write_bytes(pickle.dumps(trap)),
    "labels": lambda path, trap: save(path, y_test=np.array([trap] * 6, dtype=object))}


@pytest.mark.parametrize("write", TRAPS.values(), ids=TRAPS)
def test_nothing_that_a_user_supplies_is_unpickled(write, tmp_path):
    path, sprung = tmp_path / "mine.npz", tmp_path / "sprung"
    write(path, Trap(sprung))
    assert complaint(data.load, str(path)).startswith(str(path))
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works


def test_a_truncated_or_damaged_archive_and_a_single_array_are_errors(tmp_path):
    path = Path(save(tmp_path / "mine.npz"))
    whole, single = path.read_bytes(), io.BytesIO()
    np.save(single, pixels(12, SIZE, SIZE))
    damaged = bytearray(whole)
    damaged[200] ^= LEVELS - 1  # one pixel, which fails the checksum
    for content in (damaged, b"", whole[:-1000], single.getvalue()):
        path.write_bytes(content)
        assert "expected an .npz written by numpy.savez" in complaint(data.load, str(path))


def test_an_unknown_name_or_path_is_an_error(tmp_path):
    for name in ("mnist", "SVHN", "mine.npy", ""):
        message = complaint(data.load, name)
        assert f"'{name}'" in message and all(known in message for known in data.DATASETS)
    path = str(tmp_path / "nowhere.npz")
    assert f"there is no file {path}: check its path" == complaint(data.load, path)


# ---------------------------------------------------------------------- statistics and augmentation

def test_statistics_agree_with_numpy_whatever_the_order_of_the_images():
    images = torch.from_numpy(pixels(5000, 3, 3, 4))
    images[:, 1], images[:, 2] = 77, images[:, 2] // 3
    rows = torch.randperm(5000, generator=torch_rng())[:2507]  # more than are counted at a time
    mean, deviation = data.channel_statistics(images, rows)
    chosen = images.numpy()[rows].astype(np.float64)
    expected = chosen.mean(axis=(0, 2, 3)), chosen.std(axis=(0, 2, 3))
    expected[1][1] = 1  # the constant channel
    assert mean.shape == deviation.shape == (3, 1, 1)
    np.testing.assert_allclose(mean.flatten(), expected[0], rtol=1e-6)
    np.testing.assert_allclose(deviation.flatten(), expected[1], rtol=1e-6)
    backwards = data.channel_statistics(images, rows.flip(0))
    assert torch.equal(mean, backwards[0]) and torch.equal(deviation, backwards[1])  # every bit
    x = data.standardise(images[rows], mean, deviation)
    expected = (chosen - mean.numpy()) / deviation.numpy()
    np.testing.assert_allclose(x, expected, atol=1e-5)


# No pixel equals the means, so a standardised pixel is 0 only where Cutout put it.
MEAN, DEVIATION = torch.tensor([100.5, 50.5, 7.5]).view(3, 1, 1), torch.tensor(2.0)


def augmented(images: torch.Tensor, seed: int = 0, **options) -> torch.Tensor:
    return data.augment(images, MEAN, DEVIATION, torch_rng(seed), **options)


def test_characters_get_cutout_alone_and_other_images_all_changes():
    images = torch.from_numpy(pixels(8, 3, SIZE, SIZE))
    for dataset in (*data.DATASETS, "mine.npz"):
        is_character = dataset in ("digits", "svhn", "emnist")
        options = {"padding": 0, "flip": False} if is_character else {"padding": 4, "flip": True}
        prepare = data.preparation((MEAN, DEVIATION), dataset, torch_rng())
        assert torch.equal(prepare(images), augmented(images, **options, hole=16))
    assert torch.equal(data.preparation((MEAN, DEVIATION), "svhn")(images),
                       data.standardise(images, MEAN, DEVIATION))


def test_cutout_blanks_one_square_centred_anywhere_and_cut_off_at_the_border():
    images = torch.from_numpy(pixels(300, 3, SIZE, SIZE))
    x = augmented(images, padding=0, flip=False)
    blank = x == 0
    assert torch.equal(x, data.standardise(images, MEAN, DEVIATION).masked_fill(blank, 0))
    assert (blank == blank[:, :1]).all()  # alike in all channels
    rows, columns = blank[:, 0].any(dim=2), blank[:, 0].any(dim=1)
    assert torch.equal(blank[:, 0], rows[:, :, None] & columns[:, None, :])  # a rectangle
    expected = {(max(0, c - 8), min(SIZE - 1, c + 7)) for c in range(SIZE)}  # 16 pixels
    for lines in (rows, columns):  # the draws meet all 32 centres
        ends = [mask.nonzero().flatten() for mask in lines]
        assert {(line[0].item(), line[-1].item()) for line in ends} == expected
        assert all(len(line) == line[-1] - line[0] + 1 for line in ends)


def crops_and_flips(image: np.ndarray, padding: int) -> dict:
    """Every outcome of crop and flip, by its bytes: (top, left, flipped)."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    outcomes = {}
    for top, left in product(range(2 * padding + 1), repeat=2):
        crop = padded[:, top:top + height, left:left + width]
        outcomes[crop.tobytes()] = (top, left, False)
        outcomes[crop[:, :, ::-1].tobytes()] = (top, left, True)
    return outcomes


@pytest.mark.parametrize("padding, flip, outcomes", [
    (0, True, {(0, 0, False), (0, 0, True)}),
    (1, True, set(product(range(3), range(3), [False, True]))),
    (2, False, set(product(range(5), range(5), [False])))])
def test_all_crops_and_mirror_images_are_equally_frequent(padding, flip, outcomes):
    images = torch.from_numpy(pixels(300, 3, 5, 7))
    x = augmented(images, padding=padding, flip=flip, hole=0)
    drawn = [crops_and_flips(before, padding)[after.tobytes()] for before, after in
             zip(images.numpy(), (x * DEVIATION + MEAN).round().byte().numpy())]
    assert set(drawn) == outcomes
    share = 1 / len(outcomes)
    limit = 4 * (share * (1 - share) / len(images)) ** 0.5  # four standard errors
    assert all(abs(drawn.count(each) / len(images) - share) <= limit for each in outcomes)


# ------------------------------------------------------------------------------------------ batches

ROWS = torch.tensor([5, 9, 2, 100, 41, 7, 30, 77, 64, 11, 3, 118])


def client(rows: torch.Tensor) -> data.ClientData:
    """A client of 120 images that each show their number, labelled with it times 3."""
    numbers = torch.arange(120)
    images = numbers.byte()[:, None, None, None].expand(-1, 1, 2, 2)
    return data.ClientData(images, 3 * numbers, rows, prepare=lambda x: x.float() / 2)


def epochs_of(rows: torch.Tensor, batch_size: int, epochs: int, seed: int = 0) -> list:
    """Images of each epoch, batch by batch, after a check of their preparation and labels."""
    images = client(rows)
    drawn = [images.batch(chosen) for (chosen,) in data.batches(images, batch_size, epochs,
                                                                 torch_rng(seed))]
    assert len(drawn) == data.num_steps(len(rows), batch_size, epochs)
    shown = [(2 * x[:, 0, 0, 0]).long().tolist() for x, _ in drawn]
    assert [y.tolist() for _, y in drawn] == [[3 * number for number in batch] for batch in shown]
    each = len(shown) // epochs
    return [shown[k * each:(k + 1) * each] for k in range(epochs)]


@pytest.mark.parametrize("size, batch_size, expected", [
    (12, 4, [4, 4, 4]), (12, 5, [5, 5, 2]), (3, 8, [3]),
    (9, 4, [4, 4]), (1, 4, [])])  # a lone last image is left out
def test_an_epoch_visits_each_image_once_in_batches_of_two_or_more(size, batch_size, expected):
    for epoch in epochs_of(ROWS[:size], batch_size, epochs=3):
        assert [len(batch) for batch in epoch] == expected
        visited = sum(epoch, [])
        assert len(set(visited)) == len(visited) == data.samples_per_epoch(size, batch_size)
        assert set(visited) <= set(ROWS[:size].tolist())


def test_the_order_differs_between_epochs_and_seeds_and_is_repeatable():
    first, second = epochs_of(ROWS, 4, epochs=2)
    assert [first, second] == epochs_of(ROWS, 4, epochs=2) != epochs_of(ROWS, 4, epochs=2, seed=1)
    assert first != second
