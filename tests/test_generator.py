"""AP-FL's generator: equations against plain loops, unseen classes, sources of embeddings."""

import copy
import json
import logging
import socket
import sys
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import same
from torch import nn

import generator
import models

META = torch.device("meta")
# Of five classes nobody holds 1 and 4, and the first client alone lacks class 2.
COUNTS = torch.tensor([[3, 0, 0, 6, 0], [1, 0, 4, 2, 0]])
WEIGHTS = torch.tensor([[3 / 4, 0, 0, 6 / 8, 0], [1 / 4, 0, 1, 2 / 8, 0]])
Y = torch.tensor([0, 0, 0, 2, 2, 2, 3, 3, 3])  # three samples of each class that somebody holds


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_generator(seed: int = 0, channels: int = 1, noise_dim: int = 4):
    """A generator of five classes whose running statistics are no longer the initial ones."""
    rng = random(seed)
    net = generator.initial_generator(torch.randn(5, 3, generator=rng), channels, noise_dim, rng)
    for _ in range(3):
        net(*inputs(net, rng))
    return net


def inputs(net, rng: torch.Generator, count: int = 12):
    z = torch.randn(count, net.noise_dim, generator=rng)
    return z, torch.randint(len(net.semantics), (count,), generator=rng)


def small_teacher(seed: int, channels: int = 1) -> nn.Module:
    """A sharp classifier into five classes, in which the mode shows: evaluation or training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16 * channels, 8),
                            nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))
        for layer in (net[2], net[5]):
            nn.init.normal_(layer.weight, std=2)
        for _ in range(3):
            net(torch.randn(12, channels, 32, 32))
    return net


def l_cls_by_hand(x, y, teachers, weights):
    total = 0
    for n, label in enumerate(y.tolist()):
        for teacher, weight in zip(teachers, weights):
            total = total - weight[label] * F.log_softmax(teacher(x[n:n + 1])[0], 0)[label]
    return total / len(y)


def l_diversity_by_hand(x):
    total = 0
    for samples in x:
        n_s = len(samples)
        for i, j in product(range(n_s), range(n_s)):
            if i != j:
                total = total - ((samples[i] - samples[j]) ** 2).sum().sqrt() / (n_s - 1) / n_s
    return total / len(x)


def load(semantics: str, classes, **options) -> torch.Tensor:
    return generator.load_semantics(classes, semantics=semantics, **options)


def complaint(call, *args, **options) -> str:
    """The message of the ValueError that the call must end in, which must be a single line."""
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message.strip() and len(message.splitlines()) == 1
    return message


# -------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("noise_dim, parameters", [(20, 4_590_083), (100, 5_245_443),
                                                   (256, 6_523_395), (512, 8_620_547)])
def test_generator_has_the_size_counted_from_its_layers(noise_dim, parameters):
    with META:
        net = generator.SemanticGenerator(torch.empty(10, 512), 3, noise_dim)
        plain = generator.SemanticGenerator(torch.empty(10, 512), 3)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert plain.noise_dim == 20


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_what_the_layers_written_out_give(channels):
    net = small_generator(channels=channels)
    z, y = inputs(net, random(1))
    state = net.state_dict()

    def layer(index):
        return state[f"network.{index}.weight"], state[f"network.{index}.bias"]

    def normalised(x, scale=None, shift=None):
        x = x - x.mean(dim=(0, 2, 3), keepdim=True)
        x = x / (x.pow(2).mean(dim=(0, 2, 3), keepdim=True) + 1e-5).sqrt()
        return x if scale is None else x * scale[:, None, None] + shift[:, None, None]

    def doubled(x):
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    x = F.linear(torch.cat([z, net.semantics[y]], dim=1), *layer(0)).view(-1, 128, 8, 8)
    x = F.conv2d(doubled(normalised(x, *layer(2))), *layer(4), padding=1)
    x = F.conv2d(doubled(leaky(normalised(x, *layer(5)))), *layer(8), padding=1)
    x = F.conv2d(leaky(normalised(x, *layer(9))), *layer(11), padding=1)
    images = net(z, y)
    assert images.shape == (12, channels, 32, 32)
    torch.testing.assert_close(images, normalised(x.tanh()), rtol=1e-4, atol=1e-4)


def test_channels_of_a_training_batch_have_zero_mean_and_unit_deviation():
    net = small_generator(channels=3)
    x = net(*inputs(net, random(1)))
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.var(dim=(0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=0.01)


def test_a_label_counts_by_its_embedding_alone():
    rng = random(1)
    semantics = torch.randn(5, 3, generator=rng)
    semantics[4] = semantics[1]
    net = generator.initial_generator(semantics, 1, 4, rng).eval()
    z = torch.randn(1, 4, generator=rng).expand(5, 4)
    x = net(z, torch.arange(5))
    torch.testing.assert_close(x[1], x[4], rtol=1e-4, atol=1e-5)
    assert all(not torch.allclose(x[a], x[b], atol=1e-3) for a in range(4) for b in range(a))
    order = torch.randperm(5, generator=rng)  # class order[i] is renamed i
    renamed = copy.deepcopy(net)
    renamed.semantics = semantics[order]
    assert torch.equal(renamed(z, torch.arange(5)), net(z, order))


def test_noise_makes_the_difference_between_two_samples_of_a_class():
    net = small_generator().eval()
    z = torch.randn(2, 4, generator=random(1))
    first, second = net(z, torch.tensor([3, 3]))
    assert not torch.allclose(first, second, atol=1e-3)


def test_initial_weights_are_drawn_from_the_stream_given():
    before = torch.get_rng_state()
    semantics = torch.eye(5)
    first, again, other = (generator.initial_generator(semantics, 3, 4, random(seed))
                           for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first.state_dict(), again.state_dict())
    for name, parameter in first.named_parameters():
        constant = name in ("network.2.weight", "network.2.bias", "network.5.weight",
                            "network.5.bias", "network.9.weight", "network.9.bias")
        assert torch.equal(parameter, other.get_parameter(name)) == constant
    assert torch.equal(first.semantics, semantics)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_generator_is_restored_from_its_state_dict_and_nothing_is_drawn(channels):
    net, rng = small_generator(channels=channels, noise_dim=6), random(1)
    state, before = models.copy_state(net), torch.get_rng_state()
    given = copy.deepcopy(state)
    loaded = generator.load_generator(given, channels, 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(models.copy_state(loaded), state) and loaded.noise_dim == 6
    assert not any(module.training for module in loaded.modules())
    z, y = inputs(net, rng)
    torch.testing.assert_close(loaded(z, y), net.eval()(z, y), rtol=1e-4, atol=1e-5)
    train(loaded, [small_teacher(0, channels)], WEIGHTS[1:])
    assert same(given, state)


# --------------------------------------------------------------------------------------- losses


def test_a_weight_is_the_share_of_the_images_of_the_class():
    weights = generator.class_weights(COUNTS)
    assert weights.dtype == torch.float32 and torch.equal(weights, WEIGHTS)
    assert weights.sum(dim=0).tolist() == [1, 0, 1, 1, 0]


def test_a_weight_can_be_the_share_of_all_images():
    of_all = generator.class_weights(COUNTS, of_all=True)
    torch.testing.assert_close(of_all, COUNTS / 16)
    held = [0, 2, 3]
    per_class = of_all[:, held] * 16 / torch.tensor([4, 4, 8])
    torch.testing.assert_close(per_class, generator.class_weights(COUNTS)[:, held])


@pytest.mark.parametrize("of_all", [False, True])
def test_without_images_there_are_no_weights(of_all):
    assert not generator.class_weights(torch.zeros(2, 3).long(), of_all=of_all).any()


def teachers_and_samples():
    """Three teachers, of whom the last counts for no class, and samples of all five classes."""
    teachers = [small_teacher(seed).eval().double() for seed in range(3)]
    x = torch.randn(11, 1, 32, 32, generator=random(), dtype=torch.float64)
    y = torch.tensor([4, 0, 3, 2, 1, 0, 3, 3, 2, 1, 0])
    return teachers, torch.cat([WEIGHTS, torch.zeros(1, 5)]), x, y


def test_classification_loss_and_its_gradient_are_those_of_the_double_sum():
    teachers, weights, x, y = teachers_and_samples()
    gradients = []
    for function in (generator.classification_loss, l_cls_by_hand):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, y, teachers, weights)
        gradients.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    nobodys = (y == 1) | (y == 4)
    moved = gradients[0][1].flatten(1).any(dim=1)
    assert torch.equal(moved, ~nobodys)


def test_a_teacher_sees_only_the_samples_that_count_for_it():
    teachers, weights, x, y = teachers_and_samples()
    seen = [[] for _ in teachers]

    def watched(k):
        def teacher(rows):
            seen[k].append(rows)
            return teachers[k](rows)
        return teacher

    generator.classification_loss(x, y, [watched(k) for k in range(3)], weights)
    assert [len(calls) for calls in seen] == [1, 1, 0]
    assert torch.equal(seen[0][0], x[(y == 0) | (y == 3)])
    assert torch.equal(seen[1][0], x[(y == 0) | (y == 2) | (y == 3)])


def test_classification_loss_under_one_teacher_with_all_data_is_cross_entropy():
    (teacher, *_), _, x, y = teachers_and_samples()
    loss = generator.classification_loss(x, y, [teacher], torch.ones(1, 5))
    torch.testing.assert_close(loss, F.cross_entropy(teacher(x), y))


def test_classification_loss_of_classes_that_nobody_holds_is_zero():
    teachers, weights, x, _ = teachers_and_samples()
    loss = generator.classification_loss(x, torch.tensor([1, 4] * 5 + [1]), teachers, weights)
    assert loss.item() == 0


def test_diversity_loss_is_minus_the_mean_distance_within_a_class():
    x = torch.randn(3, 4, 2, 3, 5, generator=random(), dtype=torch.float64)
    expected = l_diversity_by_hand(x)
    torch.testing.assert_close(generator.diversity_loss(x), expected)
    torch.testing.assert_close(generator.diversity_loss(x, distance="rms"), expected / 30 ** 0.5)
    pair = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    assert generator.diversity_loss(pair).item() == -5


def test_root_mean_square_is_a_fixed_fraction_of_the_distance():
    x = torch.randn(3, 4, 1, 8, 8, generator=random())
    assert generator.diversity_loss(x, distance="rms") == generator.diversity_loss(x) / 8


def test_diversity_loss_has_the_gradient_of_the_double_sum():
    x = torch.randn(2, 3, 1, 4, 4, generator=random(), dtype=torch.float64, requires_grad=True)
    ours, = torch.autograd.grad(generator.diversity_loss(x), x)
    expected, = torch.autograd.grad(l_diversity_by_hand(x), x)
    torch.testing.assert_close(ours, expected)


def test_equal_samples_have_a_gradient():
    x = torch.randn(2, 3, 1, 4, 4, generator=random())
    x[0, 1] = x[0, 0]
    leaf = x.clone().requires_grad_()
    generator.diversity_loss(leaf).backward()
    # The equal pair adds nothing, so each of the two is pushed away from the third alone.
    from_third = (x[0, 0] - x[0, 2]) / (x[0, 0] - x[0, 2]).norm() * 2 / (2 * 3 * 2)
    torch.testing.assert_close(leaf.grad[0, 0], -from_third)
    torch.testing.assert_close(leaf.grad[0, 1], -from_third)
    assert leaf.grad.isfinite().all() and leaf.grad[1].any()
    collapsed = x[:, :1].repeat(1, 3, 1, 1, 1).requires_grad_()
    loss = generator.diversity_loss(collapsed)
    loss.backward()
    assert loss.item() == 0 and not collapsed.grad.any()


def test_descent_drives_samples_of_a_class_apart_and_leaves_other_classes_alone():
    x = torch.randn(2, 3, 1, 4, 4, generator=random(), requires_grad=True)
    generator.diversity_loss(x[:1]).backward()
    moved = x.detach() - x.grad
    assert torch.pdist(moved[0].flatten(1)).mean() > torch.pdist(x[0].flatten(1)).mean()
    assert torch.equal(moved[1], x[1])
    far = x.detach() + torch.tensor([0.0, 1000.0]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(generator.diversity_loss(far), generator.diversity_loss(x))


# ------------------------------------------------------------------------------------- training


def train(net, teachers, weights=WEIGHTS, seed: int = 7, steps: int = 2, **options):
    return list(generator.train_generator(net, teachers, weights, random(seed),
                                          generator_steps=steps, generator_batch=3, **options))


@pytest.fixture
def narrow(monkeypatch):
    """The same code on a generator of few channels."""
    monkeypatch.setattr(generator, "WIDTHS", (16, 8))


@pytest.mark.parametrize("options", [
    {}, {"balance": 0.0}, {"balance": 1.0}, {"balance": 0.2, "lr": 0.01},
    {"balance": 0.8, "distance": "rms"}])
def test_training_is_adam_on_equation_9_written_out(options, narrow):
    net, teachers = small_generator(), [small_teacher(seed).eval() for seed in range(2)]
    by_hand = copy.deepcopy(net).train()
    balance, lr = options.get("balance", 0.5), options.get("lr", 0.001)
    pixels = 32 * 32 if options.get("distance", "rms") == "rms" else 1
    optimizer, rng = torch.optim.Adam(by_hand.parameters(), lr=lr), random(7)
    steps = train(net.eval(), teachers, steps=4, **options)
    assert len(steps) == 4
    for losses in steps:
        x = by_hand(torch.randn(9, 4, generator=rng), Y)
        l_cls = l_cls_by_hand(x, Y, teachers, WEIGHTS)
        l_diversity = l_diversity_by_hand(x.unflatten(0, (3, 3))) / pixels ** 0.5
        assert losses.tolist() == pytest.approx((l_cls.item(), l_diversity.item()), rel=1e-4)
        optimizer.zero_grad()
        (balance * l_cls + (1 - balance) * l_diversity).backward()
        optimizer.step()


@pytest.mark.parametrize("n_s, classes, limit, sizes", [
    (16, 10, 1000, [16]), (600, 10, 1000, [100] * 6), (600, 100, 1000, [10] * 60),
    (7, 3, 12, [4, 3]), (7, 3, 11, [3, 2, 2]), (3, 1000, 10, [3]), (5, 1000, 10, [3, 2])])
def test_steps_are_divided_evenly_into_slices_of_pairs(n_s, classes, limit, sizes, monkeypatch):
    monkeypatch.setattr(generator, "SLICE", limit)
    assert generator.slice_sizes(n_s, classes) == sizes


def test_gradients_of_slices_add_up_to_a_step(narrow, monkeypatch):
    net, teachers = small_generator(), [small_teacher(seed).eval() for seed in range(2)]
    by_hand, rng = copy.deepcopy(net).train(), random(7)
    monkeypatch.setattr(generator, "SLICE", 8)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.001)
    steps = list(generator.train_generator(net, teachers, WEIGHTS, random(7), generator_steps=3,
                                           generator_batch=5, balance=0.3, distance="l2"))
    for losses in steps:
        optimizer.zero_grad()
        sums = torch.zeros(2)
        for size in (3, 2):
            y = torch.tensor([0, 2, 3]).repeat_interleave(size)
            x = by_hand(torch.randn(3 * size, 4, generator=rng), y)
            both = [l_cls_by_hand(x, y, teachers, WEIGHTS),
                    l_diversity_by_hand(x.unflatten(0, (3, size)))]
            (size / 5 * (0.3 * both[0] + 0.7 * both[1])).backward()
            sums += size / 5 * torch.stack(both).detach()
        optimizer.step()
        assert losses.tolist() == pytest.approx(sums.tolist(), rel=1e-4)


def test_training_generates_only_classes_that_a_teacher_can_judge(narrow):
    net, teachers = small_generator(), [small_teacher(seed) for seed in range(3)]
    labels, rows = [], [[] for _ in teachers]
    net.register_forward_pre_hook(lambda module, args: labels.append(args[1]))
    for k, teacher in enumerate(teachers):
        teacher.register_forward_pre_hook(lambda module, args, k=k: rows[k].append(len(args[0])))
    train(net, teachers, torch.cat([WEIGHTS, torch.zeros(1, 5)]))
    assert len(labels) == 2 and all(torch.equal(y, Y) for y in labels)
    assert rows == [[6, 6], [9, 9], []]


def test_training_leaves_teachers_as_they_are_but_frozen(narrow):
    teachers = [small_teacher(seed).train() for seed in range(2)]
    before = [models.copy_state(teacher) for teacher in teachers]
    train(small_generator(), teachers)
    for teacher, state in zip(teachers, before):
        assert same(models.copy_state(teacher), state)
        assert not any(module.training for module in teacher.modules())
        assert all(not parameter.requires_grad and parameter.grad is None
                   for parameter in teacher.parameters())


def test_training_repeats_itself_and_leaves_the_global_generator_alone(narrow):
    teachers, before = [small_teacher(seed) for seed in range(2)], torch.get_rng_state()
    nets = [small_generator() for _ in range(3)]
    first, again, other = (train(net, teachers, seed=seed) for net, seed in zip(nets, (1, 1, 2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(torch.stack(first), torch.stack(other))
    assert same(nets[0].state_dict(), nets[1].state_dict())
    assert not same(nets[0].state_dict(), nets[2].state_dict())


def test_training_teaches_the_teachers_classes_and_ends_in_evaluation_mode(narrow):
    net, teachers = small_generator(), [small_teacher(seed) for seed in range(2)]
    semantics = net.semantics.clone()
    losses = [l_cls for l_cls, _ in train(net, teachers, steps=30, distance="rms")]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert not any(module.training for module in net.modules())
    assert torch.equal(net.semantics, semantics)  # A(y) is given, not learnt


# ------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("chunk", [1, 4, 7, 250])
def test_samples_are_the_images_of_one_stream_of_noise_however_many_at_a_time(chunk, monkeypatch):
    # 16, because torch.randn draws pieces of other lengths differently than the whole.
    net, y = small_generator(noise_dim=16), torch.tensor([4, 0, 0, 3, 1, 1, 0, 2, 4, 0, 3])
    assert net.training  # which is not the mode that it samples in
    state, before = models.copy_state(net), torch.get_rng_state()
    monkeypatch.setattr(generator, "SAMPLE_BATCH", chunk)
    images = generator.sample(net, y, random(3))
    assert images.shape == (11, 1, 32, 32) and not images.requires_grad
    expected = net.eval()(torch.randn(11, 16, generator=random(3)), y)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert same(models.copy_state(net), state) and torch.equal(torch.get_rng_state(), before)


def test_a_sample_does_not_show_which_other_labels_were_asked_for():
    net = small_generator()
    mixed, alike = (generator.sample(net, torch.tensor(y), random(3))
                    for y in ([2, 0, 1, 3, 4, 1], [2, 2, 2, 2, 2, 1]))
    for n in (0, 5):
        torch.testing.assert_close(mixed[n], alike[n], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], alike[1], atol=1e-3)


# ----------------------------------------------------------------------------- semantics: tables

DIGITS = [str(digit) for digit in range(10)]
LIT = """1111110 0110000 1101101 1111001 0110011
         1011011 1011111 1110000 1111111 1111011"""  # segments abcdefg of 0 to 9


def test_standardised_embeddings_keep_their_geometry():
    embeddings = np.random.default_rng(0).normal(0.3, [0.01, 0.04, 0.02, 0.1], (6, 4))
    table = generator.standardise_embeddings(embeddings)
    assert table.dtype == torch.float32 and table.shape == (6, 4)
    torch.testing.assert_close(table.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-6)
    assert table.pow(2).mean().item() == pytest.approx(1)
    ratio = torch.pdist(table.double()) / torch.pdist(torch.from_numpy(embeddings))
    torch.testing.assert_close(ratio, ratio[:1].expand(15), rtol=1e-5, atol=0)


def test_equal_embeddings_are_an_error():
    equal = np.full((10, 3), 0.1)
    assert (equal != equal.mean(axis=0)).all()  # the mean is rounded: deviations are not quite zero
    assert "same embedding" in complaint(generator.standardise_embeddings, equal)


def test_segments_are_those_of_a_seven_segment_display():
    expected = np.array([[int(bit) for bit in digit] for digit in LIT.split()])
    np.testing.assert_array_equal(generator.segment_table(DIGITS), expected)
    np.testing.assert_array_equal(generator.segment_table(["7", "0"]), expected[[7, 0]])
    message = complaint(load, "segments", ["0", "ship"])
    assert "'ship'" in message and "--semantics" in message


def write_vectors(path, vectors: dict, header: str = ""):
    lines = [" ".join([word, *map(str, vector)]) for word, vector in vectors.items()]
    path.write_text("".join(line + "\n" for line in [header, *lines] if line), encoding="utf-8")
    return str(path)


def test_every_table_becomes_standardised_embeddings_of_the_classes(tmp_path):
    animals, rng = ["cat", "dog", "frog"], np.random.default_rng(0)
    numbers = rng.normal(size=(3, 4))
    vectors = write_vectors(tmp_path / "v.txt", dict(zip(animals, numbers)))
    np.savez(tmp_path / "own.npz", classes=animals, embeddings=numbers)
    for name in ("clip-zoo", "bert-zoo"):  # what they gave before
        np.savez(tmp_path / f"{name}.npz", embeddings=numbers,
                 classes=[f"a photo of a {animal}." for animal in animals])
    for table, embeddings in [
            (load("onehot", animals), np.eye(3)),
            (load("segments", DIGITS), generator.segment_table(DIGITS)),
            (load("word2vec", animals, word_vectors=vectors), numbers),
            (load(str(tmp_path / "own.npz"), animals), numbers),
            (load("clip", animals, dataset="zoo.npz", data_dir=tmp_path), numbers),
            (load("bert", animals, dataset="a/zoo.npz", data_dir=tmp_path), numbers)]:
        assert table.dtype == torch.float32 and table.shape == embeddings.shape
        torch.testing.assert_close(table, generator.standardise_embeddings(embeddings))


# ------------------------------------------------------------------- semantics: files of embeddings

ANIMALS = ["cat", "dog", "frog"]
NUMBERS = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


class Trap:
    """Unpickling it creates the file: a file that is there afterwards means that somebody did."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_embeddings_are_matched_by_name(tmp_path):
    path, order = tmp_path / "embeddings.npz", [3, 1, 0, 2]
    names, rows = [*ANIMALS, "ship"], np.concatenate([NUMBERS, np.ones((1, 4), np.float32)])
    np.savez(path, classes=np.array(names)[order], embeddings=rows[order])
    np.testing.assert_array_equal(generator.read_embeddings(path, ANIMALS), NUMBERS)
    np.testing.assert_array_equal(generator.read_embeddings(str(path), ["frog", "cat"]),
                                  NUMBERS[[2, 0]])
    np.savez(path, classes=np.array(["a", "b"], dtype="S"), embeddings=np.array([[1, 2], [3, 5]]))
    assert generator.read_embeddings(path, ["b", "a"]).tolist() == [[3, 5], [1, 2]]


@pytest.mark.parametrize("kind", ["u1", "i8", "f2", "f4"])
def test_embeddings_of_any_number_type_are_standardised_in_double_precision(kind, tmp_path):
    path, whole = tmp_path / "embeddings.npz", np.random.default_rng(0).integers(100, 120, (3, 4))
    expected = generator.standardise_embeddings(whole.astype(np.float64))
    np.savez(path, classes=ANIMALS, embeddings=whole.astype(kind))
    assert torch.equal(load(str(path), ANIMALS), expected)


def spoilt(number: float) -> np.ndarray:
    embeddings = NUMBERS.astype(np.float64)
    embeddings[1, 2] = number
    return embeddings


@pytest.mark.parametrize("arrays, words", [
    ({"classes": ["cat", "dog", "ship"], "embeddings": NUMBERS}, "'frog'"),
    ({"classes": ANIMALS, "embeddings": NUMBERS[0]}, "shape (4,)"),
    ({"classes": ANIMALS, "embeddings": NUMBERS[None]}, "shape (1, 3, 4)"),
    ({"classes": ANIMALS, "embeddings": NUMBERS.astype(str)}, "must be numbers"),
    ({"classes": ANIMALS, "embeddings": NUMBERS[:, :0]}, "shape (3, 0)"),
    ({"classes": ANIMALS, "embeddings": spoilt(np.nan)}, "NaN"),
    ({"classes": ANIMALS, "embeddings": spoilt(-np.inf)}, "infinite"),
    ({"classes": ANIMALS, "embeddings": spoilt(-1e200)}, "huge"),
    ({"classes": ANIMALS, "embeddings": NUMBERS[:2]}, "3 names (3 different ones) for 2"),
    ({"classes": [*ANIMALS, "cat"], "embeddings": NUMBERS[[0, 1, 2, 2]]},
     "4 names (3 different ones) for 4"),
    ({"classes": np.array([b"cat", b"dog", b"\xff"]), "embeddings": NUMBERS}, "cannot be read"),
    ({"names": ANIMALS, "embeddings": NUMBERS}, "must hold classes"),
    ({"classes": ANIMALS, "vectors": NUMBERS}, "must hold classes"),
])
def test_wrong_embeddings_are_an_error_that_names_the_file(arrays, words, tmp_path):
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    message = complaint(load, str(path), ANIMALS)
    assert words in message and str(path) in message


def test_broken_files_are_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "broken.npz"
    assert "no file" in complaint(load, str(path), ANIMALS)
    np.savez(path, classes=ANIMALS, embeddings=NUMBERS)
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", NUMBERS)
    for content in (whole[:len(whole) // 2], whole[:-1], b"", b"cat 0.1 0.2\n",
                    (tmp_path / "array.npy").read_bytes()):
        path.write_bytes(content)
        message = complaint(load, str(path), ANIMALS)
        assert str(path) in message and "numpy.savez" in message
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    assert str(folder) in complaint(load, str(folder), ANIMALS)


@pytest.mark.parametrize("name", ["classes", "embeddings"])
def test_embeddings_are_never_unpickled(name, tmp_path):
    path, sprung = tmp_path / "pickle.npz", tmp_path / "sprung"
    trap = np.full(3, Trap(sprung), dtype=object)
    np.savez(path, **{"classes": ANIMALS, "embeddings": NUMBERS} | {name: trap})
    assert str(path) in complaint(load, str(path), ANIMALS)
    assert not sprung.exists()
    with np.load(path, allow_pickle=True) as archive:
        archive[name]
    assert sprung.exists()  # the trap works


def test_an_unknown_source_is_an_error_that_lists_the_choices():
    for semantics in ("CLIP", "embeddings.npy", ""):
        message = complaint(load, semantics, ANIMALS)
        assert f"'{semantics}'" in message
        assert all(choice in message for choice in ("clip", "bert", "word2vec", "onehot",
                                                    "segments", ".npz"))


# ------------------------------------------------------------------------ semantics: word vectors


@pytest.mark.parametrize("header", ["", "5 4"])
def test_word_vectors_are_read_from_either_text_format(header, tmp_path):
    vectors = {"the": [9, 9, 9, 9], "frog": [0.5, -1e-3, 2, 3], "cat": [1, 2, 3, 4],
               "dog": [-1.25, 0, 0, 7], "Çat": [9, 9, 9, 9]}
    path = write_vectors(tmp_path / "vectors.txt", vectors, header)
    ours = generator.read_word_vectors(path, ANIMALS)
    np.testing.assert_array_equal(ours, [vectors[name] for name in ANIMALS])


def test_word_vectors_are_found_among_lines_of_other_kinds(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_bytes(b"\xef\xbb\xbfcat 1 2\n"  # a byte order mark
                     b"dog name@domain.com 8 8\n"  # one of GloVe's files has words with spaces
                     b"\xff\xfe 7 7\ndog\t3\t4\r\n\nfrog  5 6 \nfro 9 9\n. . 1 1\n"
                     b"cat name@domain.com 8 8\n\n")
    ours = generator.read_word_vectors(str(path), ANIMALS)
    np.testing.assert_array_equal(ours, [[1, 2], [3, 4], [5, 6]])


def test_a_name_of_several_words_has_the_mean_of_their_vectors(tmp_path):
    path = write_vectors(tmp_path / "vectors.txt", {
        "t": [1, 0], "shirt": [2, 6], "top": [9, 3], "ankle": [4, 4], "boot": [0, 1],
        "aquarium": [5, 5], "fish": [7, 0]})
    ours = generator.read_word_vectors(path, ["T-shirt/top", "Ankle boot", "aquarium_fish", "boot"])
    np.testing.assert_array_equal(ours, [[4, 3], [2, 2.5], [6, 2.5], [0, 1]])


def test_words_are_looked_up_as_they_are_before_their_lower_case(tmp_path):
    lower, upper = {"bag": [1, 2], "ship": [4, 4]}, {"Bag": [3, 5], "Ship": [9, 9]}
    for vectors in ({**lower, **upper}, {**upper, **lower}):
        path = write_vectors(tmp_path / "vectors.txt", vectors)
        assert generator.read_word_vectors(path, ["Bag", "ship"]).tolist() == [[3, 5], [4, 4]]
    path = write_vectors(tmp_path / "vectors.txt", lower)
    assert generator.read_word_vectors(path, ["Bag", "SHIP"]).tolist() == [[1, 2], [4, 4]]
    path = write_vectors(tmp_path / "vectors.txt", upper)
    assert "'ship'" in complaint(generator.read_word_vectors, path, ["Bag", "ship"])


@pytest.mark.parametrize("content, words", [
    (b"cat 1 2\ndog 3 4\n", "'tree frog'"),
    (b"cat 1 2\ndog 3 4\nfrog 5 6\n", "'tree frog'"),
    (b"", "lacks"),
    (b"cat 1 2\ndog 3 4\ntree 1 2 3\nfrog 5 6 7\n", "one length"),
    (b"cat 1 2\ndog 3 nan\ntree 1 2\nfrog 5 6\n", "'dog'"),
    (b"cat 1 2\ndog 3 four\ntree 1 2\nfrog 5 6\n", "'dog'"),
    (b"cat\ndog\ntree\nfrog\n", "'cat'"),
    (b"cat 1 2\ndog 1e200 3\ntree 1 2\nfrog 5 6\n", "'dog'"),
    (bytes(range(256)) * 40, ""),
])
def test_wrong_word_vectors_are_an_error_that_names_the_file(content, words, tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    message = complaint(load, "word2vec", ["cat", "dog", "tree frog"],
                        word_vectors=str(path))
    assert words in message and str(path) in message


def test_word_vectors_that_are_not_there_are_an_error(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        message = complaint(load, "word2vec", ANIMALS, word_vectors=str(path))
        assert str(path) in message
    assert "--word-vectors" in complaint(load, "word2vec", ANIMALS)
    path = write_vectors(tmp_path / "vectors.txt", {"cat": [1, 2]})
    assert "'?'" in complaint(generator.read_word_vectors, path, ["cat", "?"])  # no word at all


# ---------------------------------------------------------------------- semantics: text encoders


def refuse(*args, **options):
    raise AssertionError("must not be called")


def test_what_an_encoder_gives_is_kept_for_the_next_time(tmp_path):
    cache, prompts = tmp_path / "new" / "folder" / "clip.npz", []

    def encode(texts):
        prompts.append(texts)
        return NUMBERS[:len(texts)]

    names = ["cat", "T-shirt/top", "aquarium_fish"]
    first = generator.encode_with_cache(encode, names, cache)
    assert prompts == [["a photo of a cat.", "a photo of a T-shirt/top.",
                        "a photo of a aquarium fish."]]
    kept = generator.encode_with_cache(refuse, names, cache)
    shuffled = generator.encode_with_cache(refuse, names[::-1], cache)
    np.testing.assert_array_equal(first, NUMBERS)
    np.testing.assert_array_equal(kept, NUMBERS)
    np.testing.assert_array_equal(shuffled, NUMBERS[::-1])
    assert list(cache.parent.iterdir()) == [cache]
    generator.encode_with_cache(encode, ["cat", "ship"], cache)
    assert len(prompts) == 2 and len(prompts[1]) == 2
    np.testing.assert_array_equal(generator.encode_with_cache(refuse, ["cat", "ship"], cache),
                                  NUMBERS[:2])


def test_semantics_are_the_same_bits_fresh_and_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "clip_embeddings", lambda texts: NUMBERS)
    fresh, kept = (load("clip", ANIMALS, data_dir=tmp_path) for _ in range(2))
    assert NUMBERS.dtype == np.float32 and torch.equal(fresh, kept)


def test_another_prompt_is_encoded_anew(tmp_path):
    cache = tmp_path / "clip.npz"
    generator.encode_with_cache(lambda texts: NUMBERS, ANIMALS, cache)
    again = generator.encode_with_cache(lambda texts: 2 * NUMBERS, ANIMALS, cache,
                                        "a drawing of a {}.")
    np.testing.assert_array_equal(again, 2 * NUMBERS)


@pytest.mark.parametrize("dataset, name, prompt", [
    ("emnist", "c", "a photo of the handwritten letter c."),
    ("digits", "3", "a photo of the handwritten digit 3."),
    ("svhn", "3", "a photo of the house number 3."), ("cifar10", "cat", "a photo of a cat."),
    ("folder/emnist.npz", "c", "a photo of a c.")])  # a user's own, of whatever it is
@pytest.mark.parametrize("encoder", ["clip", "bert"])
def test_prompts_fit_the_data_set(encoder, dataset, name, prompt, tmp_path, monkeypatch):
    texts = []

    def encode(given):
        texts.extend(given)
        return NUMBERS[:2]

    monkeypatch.setattr(generator, f"{encoder}_embeddings", encode)
    generator.load_semantics([name, "other"], semantics=encoder, dataset=dataset,
                             data_dir=tmp_path)
    assert texts[0] == prompt


def test_encoders_are_kept_from_logging_and_from_the_global_generator(caplog, tmp_path):
    def encode(texts):
        logging.getLogger("hub").error("again in 8 s")
        torch.randn(3)
        return NUMBERS

    def fail(texts):
        raise ValueError("no connection")

    before = torch.get_rng_state()
    generator.encode_with_cache(encode, ANIMALS, tmp_path / "clip.npz")
    assert complaint(generator.encode_with_cache, fail, ANIMALS,
                     tmp_path / "bert.npz") == "no connection"
    assert torch.equal(torch.get_rng_state(), before) and not caplog.records
    logging.getLogger("own").error("heard again")
    assert [record.message for record in caplog.records] == ["heard again"]


def test_a_damaged_cache_is_made_anew(tmp_path):
    cache = tmp_path / "clip.npz"
    generator.encode_with_cache(lambda texts: NUMBERS, ANIMALS, cache)
    whole = cache.read_bytes()
    for content in (whole[:len(whole) // 2], b""):
        cache.write_bytes(content)
        again = generator.encode_with_cache(lambda texts: 2 * NUMBERS, ANIMALS, cache)
        np.testing.assert_array_equal(again, 2 * NUMBERS)
        np.testing.assert_array_equal(generator.encode_with_cache(refuse, ANIMALS, cache), again)


def test_clip_embeddings_are_the_models_text_embeddings_of_unit_length(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    texts = ["a photo of a cat.", "a photo of a dog.", "T-shirt/top"]
    published = open_clip.get_model_config("ViT-B-32-quickgelu")
    assert published["embed_dim"] == 512 and published["quick_gelu"]
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    (tmp_path / "tiny-quickgelu.json").write_text(json.dumps(
        {"embed_dim": 48, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-quickgelu.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("tiny-quickgelu").eval()
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    path = tmp_path / "clip.pt"
    torch.save(halves, path)
    ours = generator.clip_embeddings(texts, weights=str(path), name="tiny-quickgelu")
    model.load_state_dict(halves)
    with torch.no_grad():
        expected = model.encode_text(open_clip.tokenize(texts)).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert ours.shape == (3, 48) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    cosines = ours @ ours.T
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-5)
    assert cosines[np.triu_indices(3, 1)].max() < 0.99


def test_clip_weights_that_cannot_be_had_are_an_error(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # else it tries again for 46 seconds
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for weights in ("openai", *(str(tmp_path / name) for name in ("none.pt", "other.pt",
                                                                  "junk.pt"))):
        message = complaint(generator.clip_embeddings, ["a photo of a cat."], weights=weights)
        assert f"'{weights}'" in message and "--semantics" in message


def test_bert_embeddings_are_means_over_the_tokens_of_each_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "aqua",
                  "##rium", "fish", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig(
            vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32)).eval()
    model.save_pretrained(tmp_path)
    texts = ["a photo of a cat.", "a photo of a aquarium fish.", "Cat"]
    tokens = [[2, 5, 6, 7, 5, 8, 12, 3], [2, 5, 6, 7, 5, 9, 10, 11, 12, 3], [2, 8, 3]]
    with torch.no_grad():
        expected = [model(torch.tensor([row])).last_hidden_state[0].mean(dim=0) for row in tokens]
    ours = generator.bert_embeddings(texts, weights=str(tmp_path))
    assert ours.shape == (3, 16) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, torch.stack(expected).numpy(), atol=1e-5)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"'{empty}'" in complaint(generator.bert_embeddings, texts, weights=str(empty))


def test_bert_without_its_package_is_an_error_that_tells_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = complaint(load, "bert", ANIMALS)
    assert "pip install transformers" in message and "--semantics" in message


# --------------------------------------------------------------------------------- unseen classes

ATTRIBUTES = torch.tensor(list(product([0.0, 1.0], repeat=4)))  # of 16 classes
LABELS = torch.arange(16).repeat_interleave(60)


def lit_quadrants(seed: int) -> torch.Tensor:
    """Noisy images of 16 classes: each attribute lights one quadrant."""
    quadrants = torch.zeros(4, 1, 32, 32)
    for quadrant, (top, left) in zip(quadrants, product([0, 16], repeat=2)):
        quadrant[:, top:top + 16, left:left + 16] = 1
    x = torch.einsum("ca,axyz->cxyz", 2 * ATTRIBUTES - 1, quadrants)[LABELS]
    x = x + 0.5 * torch.randn(x.shape, generator=random(seed))
    return (x - x.mean()) / x.std()


def trained_classifier(x, y, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2),
                            nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 16))
    optimizer, rng = torch.optim.Adam(net.parameters(), lr=3e-3), random(seed)
    for _ in range(100):
        rows = torch.randint(len(y), (50,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return net.eval()


@cache  # the two tests of a seed share the networks
def classifiers(seed: int):
    """Twelve seen and four unseen classes, a teacher of the seen ones and a judge of all."""
    x, order = lit_quadrants(seed), torch.randperm(16, generator=random(seed))
    seen, unseen = order[:12], order[12:]
    rows = torch.isin(LABELS, seen)
    return (seen, unseen, trained_classifier(x[rows], LABELS[rows], seed),
            trained_classifier(x, LABELS, seed + 50))


def accuracy_on_unseen_classes(seed: int, attributes) -> float:
    """The share of images generated of unseen classes that the judge recognises."""
    seen, unseen, teacher, judge = classifiers(seed)
    semantics = generator.standardise_embeddings(attributes.numpy())
    net = generator.initial_generator(semantics, 1, 20, random(seed))
    weights = torch.zeros(1, 16)
    weights[0, seen] = 1
    for _ in generator.train_generator(net, [teacher], weights, random(seed), generator_steps=60,
                                       generator_batch=4, distance="rms", lr=2e-3):
        pass
    y = unseen.repeat_interleave(50)
    with torch.no_grad():
        return (judge(generator.sample(net, y, random(1))).argmax(dim=1) == y).float().mean().item()


def deranged(seed: int) -> torch.Tensor:
    """The attributes, every class with those of another one."""
    rng = random(seed + 1000)  # one derangement in four happens to suit one of the unseen classes
    order = torch.arange(16)
    while (order == torch.arange(16)).any():
        order = torch.randperm(16, generator=rng)
    return ATTRIBUTES[order]


def test_unseen_classes_are_generated_from_their_attributes(narrow):
    assert accuracy_on_unseen_classes(0, ATTRIBUTES) >= 0.6


def test_unseen_classes_are_not_generated_from_other_classes_attributes(narrow):
    assert accuracy_on_unseen_classes(0, deranged(0)) <= 0.1
