"""partitions.py: who gets which images, checked on labels alone and on a data set of noise."""

import inspect
import json
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

import data
import partitions


def numpy_rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def complaint(call, *args, **options) -> str:
    """Message, a single line, of the ValueError that the call must raise."""
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def labels_of(*counts: int) -> torch.Tensor:
    """Labels with these counts per class, shuffled."""
    ordered = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ordered[torch.randperm(len(ordered), generator=torch.Generator().manual_seed(0))]


def counts_of(labels: torch.Tensor, parts: list) -> np.ndarray:
    """Images per client and class, (clients, classes)."""
    classes = int(labels.max()) + 1
    return np.stack([labels[part].bincount(minlength=classes).numpy() for part in parts])


def equal(first: list, second: list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_partition(parts: list, rows: torch.Tensor):
    """Check that the ascending parts hold each of these indices once and nothing else."""
    assert all(part.dtype == torch.int64 and equal([part], [part.sort().values]) for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, rows)


DIRICHLET, PATHOLOGICAL = partitions.partition_dirichlet, partitions.partition_pathological
DROPOUT, SPLIT = partitions.partition_dropout, partitions.split_data
UNEVEN = labels_of(90, 10, 55, 200, 31, 70, 64, 120, 18, 42)
ALL = torch.arange(len(UNEVEN))


@pytest.fixture(scope="module")
def noise() -> data.Dataset:
    """A data set of 700 and 180 images of noise, which all differ."""
    x = torch.from_numpy(numpy_rng().integers(256, size=(880, 1, 32, 32), dtype=np.uint8))
    return data.Dataset(x[:700], UNEVEN, x[700:], labels_of(*[18] * 10), list("abcdefghij"))


# --------------------------------------------------------------------------------------- partitions

PARTITIONS = {
    "subset": lambda rng: [partitions.balanced_subset(UNEVEN, 100, rng)],
    "iid": lambda rng: partitions.partition_iid(UNEVEN, 7, rng),
    "dirichlet": lambda rng: DIRICHLET(UNEVEN, 7, 0.5, rng),
    "pathological": lambda rng: PATHOLOGICAL(UNEVEN, 7, 3, rng),
    "dropout": lambda rng: DROPOUT(UNEVEN, 7, 0.2, 2, rng)[0],
    "counts-alike": lambda rng: DIRICHLET(UNEVEN, 7, 1e9, rng, minimum=1),
    "test-shares": lambda rng: partitions.share_test(
        UNEVEN, UNEVEN, partitions.partition_iid(UNEVEN, 7, numpy_rng()), rng)}


@pytest.mark.parametrize("draw_parts", PARTITIONS.values(), ids=PARTITIONS)
def test_a_partition_is_repeatable_and_another_seed_gives_another(draw_parts):
    first, again, other = (draw_parts(numpy_rng(seed)) for seed in (0, 0, 1))
    assert equal(first, again) and not equal(first, other)


def test_a_partition_runs_when_copied_into_a_file_of_its_own():
    copied = {"np": np, "torch": torch, "Tensor": torch.Tensor, "MIN_IMAGES": 10, "MAX_REDRAWS": 9}
    for name in ("partition_iid", "partition_dirichlet", "assign_classes", "deal_classes",
                 "cut_classes", "partition_pathological", "partition_dropout"):
        exec(inspect.getsource(getattr(partitions, name)), copied)
    parts = copied["partition_dirichlet"](UNEVEN, 7, 0.5, numpy_rng())
    assert equal(parts, PARTITIONS["dirichlet"](numpy_rng()))
    parts, _ = copied["partition_dropout"](UNEVEN, 7, 0.2, 2, numpy_rng())
    assert equal(parts, PARTITIONS["dropout"](numpy_rng()))


@pytest.mark.parametrize("count", [1, 180, 700])
def test_a_subset_is_as_balanced_as_the_classes_allow(count):
    subset = partitions.balanced_subset(UNEVEN, count, numpy_rng())
    assert len(subset) == count == len(subset.unique())
    have, got = UNEVEN.bincount(), UNEVEN[subset].bincount(minlength=10)
    assert (got[got < have] >= got.max() - 1).all()  # a used-up class lags behind


@pytest.mark.parametrize("num_clients", [1, 3, 7, 700])
def test_iid_is_a_partition_into_parts_of_equal_size(num_clients):
    parts = partitions.partition_iid(UNEVEN, num_clients, numpy_rng())
    sizes = [len(part) for part in parts]
    assert len(parts) == num_clients and max(sizes) - min(sizes) <= 1
    assert_partition(parts, ALL)


@pytest.mark.parametrize("num_clients, alpha", [(1, 0.5), (10, 0.1), (20, 0.5), (35, 100.0)])
def test_dirichlet_is_a_partition_with_ten_images_per_client(num_clients, alpha):
    for seed in range(2):
        parts = DIRICHLET(UNEVEN, num_clients, alpha, numpy_rng(seed))
        assert len(parts) == num_clients and min(len(part) for part in parts) >= 10
        assert_partition(parts, ALL)


def test_dirichlet_keeps_the_first_draw_with_the_minimum_and_draws_no_more_than_allowed():
    verdicts, draw_once = set(), partial(DIRICHLET, UNEVEN, 20, 0.5, redraws=1)
    for seed in range(20):
        first = draw_once(numpy_rng(seed), minimum=0)
        verdicts.add(min(len(part) for part in first) >= partitions.MIN_IMAGES)
        if min(len(part) for part in first) >= partitions.MIN_IMAGES:
            assert equal(first, draw_once(numpy_rng(seed)))
        else:
            complaint(draw_once, numpy_rng(seed))
    assert verdicts == {False, True}


def test_dirichlet_shares_have_the_mean_and_variance_of_that_distribution():
    num_clients, alpha, size = 4, 0.5, 100
    labels, mean = torch.arange(400).repeat(size), 1 / num_clients
    counts = counts_of(labels, DIRICHLET(labels, num_clients, alpha, numpy_rng()))
    variance = mean * (1 - mean) / (num_clients * alpha + 1)
    # 1,600 shares estimate it to some 5 %
    assert ((counts / size - mean) ** 2).mean() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("num_clients, gamma", [(10, 2), (3, 2), (20, 3), (4, 10), (7, 1)])
def test_pathological_gives_each_client_its_classes_and_each_class_its_holders(num_clients, gamma):
    parts = PATHOLOGICAL(UNEVEN, num_clients, gamma, numpy_rng())
    counts = counts_of(UNEVEN, parts)
    holders = (counts > 0).sum(axis=0)
    assert ((counts > 0).sum(axis=1) == gamma).all() and holders.sum() == num_clients * gamma
    assert holders.max() - holders.min() <= 1
    for column in counts.T[holders > 0]:
        assert np.ptp(column[column > 0]) <= 1
    assert_partition(parts, ALL[np.isin(UNEVEN, np.flatnonzero(holders))])


# -------------------------------------------------------------------------- AP-FL's dropout setting

@pytest.mark.parametrize("num_classes, num_clients, missing, each, alone, shared, dropouts", [
    (10, 10, 0.2, 2, [8, 9], [], [9]),  # Table 1 of the paper
    (10, 10, 0.04, 2, [9], [8], [9]), (10, 5, 0.4, 2, [6, 7, 8, 9], [], [3, 4]),
    (26, 20, 0.2, 2, [21, 22, 23, 24, 25], [20], [17, 18, 19]),
    (100, 10, 0.3, 20, list(range(70, 100)), list(range(60, 70)), [8, 9])])
def test_missing_classes_sit_with_the_last_clients_alone(num_classes, num_clients, missing, each,
                                                         alone, shared, dropouts):
    labels = labels_of(*[40] * num_classes)
    parts, gone = DROPOUT(labels, num_clients, missing, each, numpy_rng())
    held = counts_of(labels, parts) > 0
    others = [k for k in range(num_clients) if k not in gone]
    assert gone == dropouts and (held.sum(axis=1) == each).all()
    assert not held[np.ix_(others, alone)].any()
    assert (held[np.ix_(gone, alone)].sum(axis=0) == 1).all() and held[-1, -each:].all()
    assert sorted(np.flatnonzero(held[gone].any(axis=0))) == sorted(alone + shared)
    places, seen = len(others) * each, num_classes - len(alone)
    holders = held[others, :seen].sum(axis=0)
    assert holders.sum() == places and np.ptp(holders) <= 1
    if places >= seen:
        assert_partition(parts, torch.arange(len(labels)))


def test_in_the_dropout_setting_a_client_holds_a_fifth_of_the_classes():
    for num_classes, each in ((2, 2), (10, 2), (11, 3), (26, 6), (100, 20)):
        assert partitions.classes_each(num_classes, 0.1) == each
        assert partitions.classes_each(num_classes, None) == 2


# -------------------------------------------------------------------------------------- test shares

def largest_remainders(seats: int, weights: list[int]) -> list[int]:
    """Whole seats in proportion to the weights; the rest by largest remainder, then lower id."""
    quotas = [Fraction(seats * weight, max(1, sum(weights))) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda k: (int(quotas[k]) - quotas[k], k))
    extra = by_remainder[:seats - sum(map(int, quotas))] if any(weights) else []
    return [int(quota) + (k in extra) for k, quota in enumerate(quotas)]


def assert_shares(test: torch.Tensor, train: torch.Tensor, parts: list):
    """Check the shares against the rule alone."""
    shares = partitions.share_test(test, train, parts, numpy_rng())
    expected = np.array([largest_remainders(int((test == label).sum()),
                                            [int((train[part] == label).sum()) for part in parts])
                         for label in range(int(max(test.max(), train.max())) + 1)]).T
    together = torch.cat(shares)
    assert len(together) == len(together.unique()) == expected.sum()
    got = [test[share].bincount(minlength=expected.shape[1]).tolist() for share in shares]
    assert got == expected.tolist()


@pytest.mark.parametrize("num_clients, alpha", [(2, 0.1), (7, 0.3), (13, 1.0), (30, 100.0)])
def test_test_images_are_shared_by_largest_remainders(num_clients, alpha):
    parts = DIRICHLET(UNEVEN, num_clients, alpha, numpy_rng(), minimum=1)
    assert_shares(labels_of(*range(17, 37, 2)), UNEVEN, parts)


def test_equal_remainders_go_to_the_lower_ids_and_classes_without_holders_to_nobody():
    train = labels_of(9, 9)
    parts = [torch.cat([(train == label).nonzero()[3 * k:3 * k + 3, 0] for label in range(2)])
             for k in range(3)]
    assert_shares(labels_of(5, 1), train, parts)
    nobody = torch.empty(0, dtype=torch.int64)
    assert_shares(labels_of(5, 0, 7), labels_of(6, 4), [torch.arange(7), nobody])


# ----------------------------------------------------------------- a data set split among clients

@pytest.mark.parametrize("options, draw_parts", [
    ({"partition": "iid", "alpha": None, "classes_per_client": None}, partitions.partition_iid),
    ({"alpha": 0.3, "classes_per_client": None}, partial(DIRICHLET, alpha=0.3)),
    ({"train_images": 300}, partial(DIRICHLET, alpha=0.5)),
    ({"partition": "pathological", "alpha": None, "classes_per_client": 3},
     partial(PATHOLOGICAL, classes_per_client=3)),
    ({"partition": None, "alpha": None, "missing_classes": 0.2},
     partial(DROPOUT, missing=0.2, classes_per_client=2))])
def test_a_split_is_its_partition_with_the_streams_of_the_seed(noise, options, draw_parts):
    split, stream = SPLIT(noise, 10, 5, **options), partial(data.numpy_stream, 5)
    rows = partitions.choose_images(UNEVEN, 5, train_images=options.get("train_images"))[0]
    parts, dropouts = draw_parts(UNEVEN[rows], 10, rng=stream(data.PARTITION)), []
    if "missing_classes" in options:
        parts, dropouts = parts
    assert equal(split.parts, parts) and split.dropouts == dropouts
    assert torch.equal(split.data.x_train, noise.x_train[rows])
    assert split.unseen == ([8, 9] if dropouts else []) and split.proxy is split.validation is None
    assert split.seen == [label for label in range(10) if label not in split.unseen]
    participating = torch.cat([part for k, part in enumerate(parts) if k not in dropouts])
    assert equal(split.statistics, data.channel_statistics(split.data.x_train, participating))
    assert equal(split.test_shares, partitions.share_test(noise.y_test, UNEVEN[rows], parts,
                                                          stream(data.TEST_SHARES)))
    assert partitions.server_images(split) == {}


def test_fewer_test_images_are_class_balanced_and_change_nothing_else(noise):
    whole, few = (SPLIT(noise, 5, 3, test_images=count) for count in (None, 100))
    assert len(whole.data.y_test) == 180 and few.data.y_test.bincount().tolist() == [10] * 10
    assert equal(whole.parts, few.parts) and equal(whole.statistics, few.statistics)
    assert sorted(torch.cat(few.test_shares).tolist()) == list(range(100))
    rows = (noise.x_test[:, None] == few.data.x_test).flatten(2).all(dim=2).int().argmax(dim=0)
    assert len(set(rows.tolist())) == 100 and torch.equal(noise.y_test[rows], few.data.y_test)


@pytest.mark.parametrize("train_images, held_out, given_up", [
    (None, 70, 140), (500, 150, 0), (600, 60, 120 - 100)])
def test_images_held_out_for_the_server_are_no_clients(train_images, held_out, given_up):
    count = train_images or 700
    parts = partitions.choose_images(UNEVEN, 0, train_images=train_images, proxy="holdout")
    assert [len(part) for part in parts] == [count - given_up, held_out, count // 10]
    assert torch.cat(parts).unique().numel() == sum(map(len, parts))
    clients, none, validation = partitions.choose_images(UNEVEN, 0, train_images=train_images,
                                                         proxy="noise")
    assert len(none) == 0 and len(validation) == count // 10
    assert len(clients) == count - max(0, count // 10 - (700 - count))
    assert not torch.isin(validation, clients).any()


@pytest.mark.parametrize("proxy", partitions.PROXIES)
def test_the_server_has_images_as_clients_have_them_but_of_seen_classes_alone(proxy, noise,
                                                                               monkeypatch):
    monkeypatch.setattr(partitions, "PROXY_IMAGES", 400)
    monkeypatch.setattr(partitions, "VALIDATION_IMAGES", 12)
    split = SPLIT(noise, 10, 0, proxy=proxy, train_images=150, missing_classes=0.4)
    chosen = partitions.choose_images(UNEVEN, 0, train_images=150, proxy=proxy)[1:]
    assert [len(rows) for rows in chosen] == [400 * (proxy == "holdout"), 12]
    held_out, validation = (rows[UNEVEN[rows] < 6] for rows in chosen)
    assert len(validation) < 12 and equal(split.validation, [noise.x_train[validation],
                                                             UNEVEN[validation]])
    if proxy == "holdout":
        assert len(held_out) < 400 and torch.equal(split.proxy, noise.x_train[held_out])
    assert split.proxy.dtype == torch.uint8
    assert split.proxy.shape == (len(held_out) or 400, 1, 32, 32)

    none = complaint(partitions.proxy_images, "holdout", noise, ALL[:0], 0)
    assert "0 images of 1 channels" in none
    images = partitions.server_images(split)
    assert equal(split.validation, [images["validation"].images, images["validation"].labels])
    for part, x in ((images["proxy"], split.proxy), (images["validation"], split.validation[0])):
        assert torch.equal(part.images[part.indices], x) and len(part.labels) == len(x)
        assert torch.equal(part.prepare(x), data.standardise(x, *split.statistics))


def test_the_input_of_a_network_is_told_in_numbers_for_json(noise):
    split = SPLIT(noise, 3, 0)
    told = json.loads(json.dumps(partitions.network_input(split)))
    mean, deviation = (value.item() for value in split.statistics)
    assert told == {"channels": 1, "size": 32, "mean": [mean], "deviation": [deviation],
                    "classes": noise.classes}


# -------------------------------------------------------------------------------- impossible splits

@pytest.mark.parametrize("call, arguments, words", [
    (partial(partitions.balanced_subset, part="test"), (UNEVEN, 701), "the 700 test images"),
    (partial(DIRICHLET, redraws=3), (UNEVEN, 40, 0.001), "larger --alpha"),
    (DROPOUT, (UNEVEN, 2, 0.4, 2), "0 of 2 clients: at least two classes and one client must"),
    (DROPOUT, (UNEVEN, 10, 0.2, 9), "give --classes-per-client 8 or less"),
    (partial(partitions.draw_parts, partition="pathological", alpha=None, classes_per_client=1,
             missing_classes=None), (labels_of(1, 30), 2), "a client with fewer than two")])
def test_a_partition_that_cannot_be_is_an_error(call, arguments, words):
    assert words in complaint(call, *arguments, rng=numpy_rng())
