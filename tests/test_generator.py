"""AP-FL's generator: layers, losses and steps against plain loops, sampling, unseen classes."""

import copy
import weakref
from itertools import permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import same
from torch import nn

import generator
import models

# Nobody holds classes 1 and 4 of five, and the first client alone lacks class 2.
WEIGHTS = torch.tensor([[3 / 4, 0, 0, 6 / 8, 0], [1 / 4, 0, 1, 2 / 8, 0]])
HELD = torch.tensor([0, 2, 3])
PUBLISHED_WIDTHS = generator.WIDTHS


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Few channels for every generator of these tests, to save time."""
    monkeypatch.setattr(generator, "WIDTHS", (16, 8))


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_generator(channels: int = 1, noise_dim: int = 4):
    """A generator of five classes whose running statistics are no longer the initial ones."""
    rng = random()
    net = generator.initial_generator(torch.randn(5, 3, generator=rng), channels, noise_dim, rng)
    net(torch.randn(5, noise_dim, generator=rng), torch.arange(5))
    return net


def small_teacher(seed: int) -> nn.Module:
    """A sharp classifier into five classes, in which the mode shows: evaluation or training."""
    with models.drawing_from(random(seed)):
        net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8),
                            nn.Tanh(), nn.Linear(8, 5))
        nn.init.normal_(net[2].weight, std=2)
        nn.init.normal_(net[5].weight, std=2)
        net(torch.randn(12, 1, 32, 32))
    return net


def l_cls_by_hand(x, y, teachers, weights):
    return sum(weight[label] * F.cross_entropy(teacher(image[None]), label[None])
               for image, label in zip(x, y) for teacher, weight in zip(teachers, weights)) / len(y)


def l_diversity_by_hand(x):
    n_s = x.shape[1]
    distances = [(a - b).square().sum().sqrt() for row in x for a, b in permutations(row, 2)]
    return -sum(distances) / (len(x) * n_s * (n_s - 1))


def loss_and_gradient(loss, x):
    leaf = x.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), *torch.autograd.grad(value, leaf)


# ------------------------------------------------------------------------------------------ network

def test_generator_has_the_size_counted_from_its_layers(monkeypatch):
    monkeypatch.setattr(generator, "WIDTHS", PUBLISHED_WIDTHS)
    with torch.device("meta"):
        net = generator.SemanticGenerator(torch.empty(10, 512), 3)
    assert sum(parameter.numel() for parameter in net.parameters()) == 4_590_083


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_those_of_the_layers_written_out_for_noise_and_embedding(channels):
    net, z, y = small_generator(channels), torch.randn(5, 4, generator=random()), torch.arange(5)
    state = net.state_dict()

    def layer(index):
        return state[f"network.{index}.weight"], state[f"network.{index}.bias"]

    def normalised(x, *affine):
        return F.batch_norm(x, None, None, *affine, training=True)

    x = F.linear(torch.cat([z, net.semantics[y]], dim=1), *layer(0)).view(5, 16, 8, 8)
    x = F.interpolate(normalised(x, *layer(2)), scale_factor=2)
    x = F.leaky_relu(normalised(F.conv2d(x, *layer(4), padding=1), *layer(5)), 0.2)
    x = F.interpolate(x, scale_factor=2)
    x = F.leaky_relu(normalised(F.conv2d(x, *layer(8), padding=1), *layer(9)), 0.2)
    x = F.conv2d(x, *layer(11), padding=1)
    torch.testing.assert_close(net(z, y), normalised(x.tanh()), rtol=1e-4, atol=1e-4)


def test_initial_weights_are_drawn_from_the_stream_given():
    before = torch.get_rng_state()
    first, again, other = (generator.initial_generator(torch.eye(5), 3, 4, random(seed))
                           for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first.state_dict(), again.state_dict())
    random_ones = [name.split(".")[1] for name, parameter in first.named_parameters()
                   if not torch.equal(parameter, other.get_parameter(name))]
    assert random_ones == ["0", "0", "4", "4", "8", "8", "11", "11"]  # all but batch normalisation


def test_a_generator_is_restored_from_its_state_dict_and_nothing_is_drawn():
    net, before = small_generator(noise_dim=6).eval(), torch.get_rng_state()
    given, z, y = models.copy_state(net), torch.randn(5, 6, generator=random()), torch.arange(5)
    loaded = generator.load_generator(given, 1, 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(loaded.state_dict(), net.state_dict()) and loaded.noise_dim == 6
    torch.testing.assert_close(loaded(z, y), net(z, y), rtol=1e-4, atol=1e-5)
    train(loaded, [small_teacher(0)], WEIGHTS[1:])
    assert same(given, net.state_dict())


# ------------------------------------------------------------------------------------------- losses

def test_a_weight_is_the_share_of_the_images_of_the_class():
    weights = generator.class_weights(torch.tensor([[3, 0, 0, 6, 0], [1, 0, 4, 2, 0]]))
    assert weights.dtype == torch.float32 and torch.equal(weights, WEIGHTS)
    assert not generator.class_weights(torch.zeros(2, 3).long()).any()


def test_classification_loss_and_its_gradient_are_those_of_the_double_sum():
    teachers = [small_teacher(seed).eval().double() for seed in range(3)]
    weights = torch.cat([WEIGHTS, torch.zeros(1, 5)])  # the last teacher counts for no class
    x = torch.randn(11, 1, 32, 32, generator=random(), dtype=torch.float64)
    y = torch.tensor([4, 0, 3, 2, 1, 0, 3, 3, 2, 1, 0])
    expected = loss_and_gradient(lambda x: l_cls_by_hand(x, y, teachers, weights), x)
    for rows in (None, [torch.arange(11)] * 3):  # samples that do not count change no sum
        ours = loss_and_gradient(
            lambda x: generator.classification_loss(x, y, teachers, weights, rows), x)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(ours[1].flatten(1).any(dim=1), torch.isin(y, HELD))


def l2_diversity_loss(x):
    return generator.diversity_loss(x, distance="l2")


def test_diversity_loss_and_its_gradient_are_those_of_the_double_sum():
    x = torch.randn(3, 4, 2, 3, 5, generator=random(), dtype=torch.float64)
    expected = loss_and_gradient(l_diversity_by_hand, x)
    torch.testing.assert_close(loss_and_gradient(l2_diversity_loss, x), expected)
    torch.testing.assert_close(generator.diversity_loss(x, distance="rms"), expected[0] / 30 ** 0.5)


def test_equal_samples_have_a_gradient():
    # The equal pair adds nothing, so each of the two is pushed away from the third alone.
    x = torch.tensor([[[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]]])
    _, gradient = loss_and_gradient(l2_diversity_loss, x)
    torch.testing.assert_close(gradient, torch.tensor([[[-3.0, -4.0]] * 2 + [[6.0, 8.0]]]) / 15)
    equal = torch.randn(2, 1, 4, generator=random()).repeat(1, 30, 1)
    loss, gradient = loss_and_gradient(l2_diversity_loss, equal)
    assert loss == 0 and not gradient.any()


# -------------------------------------------------------------------------------- one training step

class Scales(nn.Module):
    """A generator of two pixels without batch normalisation: scale[y] * z."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64))

    def forward(self, z, y):
        return self.scale[y, None] * z


def losses_and_gradient(teachers, weights, parts, balance):
    """The losses of one step of gradient descent on noise (2, n_s, 2), and what it subtracts."""
    net, slices = Scales(), []
    for z in parts:
        y = torch.arange(2)[:, None].repeat(1, z.shape[1])
        rows = generator.counting_rows(y.flatten(), weights)
        slices.append(generator.Slice(z.flatten(0, 1), y, rows))
    before, optimizer = net.scale.detach().clone(), torch.optim.SGD(net.parameters(), lr=1.0)
    losses = generator.generator_step(net, optimizer, teachers, weights, slices,
                                      balance=balance, distance="l2")
    assert losses.shape == (2,) and not losses.requires_grad
    return losses.tolist(), (before - net.scale.detach()).tolist()


def test_a_step_is_the_gradient_step_of_equation_9_worked_out_by_hand():
    # The teacher's logits are the two pixels themselves; it counts 1 for class 0, 1/2 for class 1.
    z = torch.tensor([[[1.0, 2.0], [4.0, 6.0]], [[0.0, 1.0], [0.0, 3.0]]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    losses, gradient = losses_and_gradient([nn.Identity()], weights, [z], 0.3)

    # x = (.5, 1), (2, 3), (0, -2), (0, -6).  The cross entropy for class c is log(1 + exp(gap)),
    # gap = x_other - x_c, and its slope in the scale is sigmoid(gap) (z_other - z_c).
    gap, slope = np.array([[0.5, 1.0], [2.0, 6.0]]), np.array([[1.0, 2.0], [-1.0, -3.0]])
    alpha = np.array([[1.0], [0.5]])
    l_cls = (alpha * np.log1p(np.exp(gap))).sum() / 4
    slopes = (alpha * slope / (1 + np.exp(-gap))).sum(axis=1) / 4
    # The distances within the classes are 5 and 2 times |scale|, and the mean over classes counts.
    assert losses == pytest.approx([l_cls, -(2.5 + 4) / 2], rel=1e-12)
    assert gradient == pytest.approx(0.3 * slopes + 0.7 * np.array([-5 / 2, 2 / 2]), rel=1e-12)


def test_gradients_of_slices_add_up_to_that_of_the_whole_step():
    z = torch.randn(2, 5, 2, generator=random(), dtype=torch.float64)
    weights = torch.tensor([[0.75, 0.2], [0.25, 0.8]], dtype=torch.float64)
    teachers = [lambda x: x, lambda x: x.flip(1).tanh()]
    # Balance 1, since the pairs of L_diversity within the slices are not all pairs.
    whole, sliced = (losses_and_gradient(teachers, weights, parts, 1.0)
                     for parts in ([z], z.split([3, 2], dim=1)))
    assert sliced[0][0] == pytest.approx(whole[0][0], rel=1e-12)
    assert sliced[1] == pytest.approx(whole[1], rel=1e-12)


# ----------------------------------------------------------------------------------------- training

def train(net, teachers, weights=WEIGHTS, steps: int = 2, batch: int = 3, **options) -> list:
    """Train a generator; returns the losses that it reports."""
    losses = []
    generator.train_generator(net, teachers, weights, random(7), generator_steps=steps,
                              generator_batch=batch, report=losses.append, **options)
    return losses


@pytest.mark.parametrize("options, sizes", [
    ({}, [3]), ({"balance": 0.8, "distance": "l2", "lr": 0.01}, [3]), ({"balance": 0.3}, [3, 2])])
def test_training_is_adam_on_equation_9_written_out(options, sizes, monkeypatch):
    monkeypatch.setattr(generator, "SLICE", 9)
    net, teachers = small_generator(), [small_teacher(seed).eval() for seed in range(2)]
    by_hand, rng, batch = copy.deepcopy(net).train(), random(7), sum(sizes)
    balance, unit = options.get("balance", 0.5), 1 if "distance" in options else 32
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=options.get("lr", 0.001))
    before = torch.get_rng_state()
    steps = train(net.eval(), teachers, steps=3, batch=batch, **options)
    assert len(steps) == 3 and torch.equal(torch.get_rng_state(), before)
    for losses in steps:
        optimizer.zero_grad()
        expected = torch.zeros(2)
        for size in sizes:
            y = HELD.repeat_interleave(size)
            x = by_hand(torch.randn(len(y), 4, generator=rng), y)
            both = torch.stack([l_cls_by_hand(x, y, teachers, WEIGHTS),
                                l_diversity_by_hand(x.unflatten(0, (3, size))) / unit])
            (size / batch * (balance * both[0] + (1 - balance) * both[1])).backward()
            expected += size / batch * both.detach()
        optimizer.step()
        assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert torch.equal(net.semantics, by_hand.semantics)  # A(y) is given, not learnt
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("n_s, classes, limit, sizes", [
    (16, 10, 1000, [16]), (600, 100, 1000, [10] * 60), (7, 3, 12, [4, 3]), (7, 3, 11, [3, 2, 2]),
    (3, 1000, 10, [3]), (5, 1000, 10, [3, 2])])
def test_steps_are_divided_evenly_into_slices_of_pairs(n_s, classes, limit, sizes, monkeypatch):
    monkeypatch.setattr(generator, "SLICE", limit)
    assert generator.slice_sizes(n_s, classes) == sizes


def test_training_shows_frozen_teachers_only_the_classes_that_they_can_judge():
    net, teachers = small_generator(), [small_teacher(seed).train() for seed in range(3)]
    labels, rows = [], [[], [], []]
    net.register_forward_pre_hook(lambda module, args: labels.append(args[1]))
    for teacher, counts in zip(teachers, rows):
        teacher.register_forward_pre_hook(lambda module, args, to=counts: to.append(len(args[0])))
    train(net, teachers, torch.cat([WEIGHTS, torch.zeros(1, 5)]))
    assert len(labels) == 2 and all(torch.equal(y, HELD.repeat_interleave(3)) for y in labels)
    assert rows == [[6, 6], [9, 9], []]
    for teacher in teachers:
        assert not teacher[3].training  # its running statistics stay as they are
        assert not any(parameter.requires_grad for parameter in teacher.parameters())


# ----------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("chunk", [1, 4, 250])
def test_samples_are_the_images_of_one_stream_of_noise_however_many_at_a_time(chunk, monkeypatch):
    # 16, because torch.randn draws pieces of other lengths differently than the whole.
    net, y = small_generator(noise_dim=16), torch.tensor([4, 0, 0, 3, 1, 1, 0, 2, 4, 0, 3])
    assert net.training  # samples are made in the other mode
    monkeypatch.setattr(generator, "SAMPLE_BATCH", chunk)
    images = generator.sample(net, y, random(3))
    assert images.shape == (11, 1, 32, 32) and not images.requires_grad
    expected = net.eval()(torch.randn(11, 16, generator=random(3)), y)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


def test_an_image_is_held_once_while_others_are_sampled(monkeypatch):
    def forward(z, labels):
        assert all(made() is None for made in batches[:-1])  # the last one is about to go
        batches.append(weakref.ref(images := torch.zeros(len(labels), 1, 32, 32)))
        return images

    batches, net = [], small_generator(noise_dim=2)
    monkeypatch.setattr(generator, "SAMPLE_BATCH", 2)
    monkeypatch.setattr(net, "forward", forward)
    assert len(generator.sample(net, torch.arange(5), random(3))) == 5 and len(batches) == 3


# ----------------------------------------------------------------------------------- unseen classes

ATTRIBUTES = torch.tensor(list(product([0.0, 1.0], repeat=4)))  # lit quadrants of 16 classes
SEEN, UNSEEN = torch.randperm(16, generator=random()).split([12, 4])


def classifier(classes):
    """A classifier into some classes, in closed form, by the light in the quadrants of an image."""
    net = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(4, 16))
    net[2].weight.data = 8 * ATTRIBUTES - 4
    net[2].bias.data = torch.where(torch.isin(torch.arange(16), classes), 0.0, -1e4)
    return net


def accuracy_on_unseen_classes(attributes) -> float:
    """The share of images generated of unseen classes that a classifier of all recognises."""
    net = generator.initial_generator(2 * attributes - 1, 1, 20, random())
    weights = torch.isin(torch.arange(16), SEEN).float()[None]
    train(net, [classifier(SEEN)], weights, steps=20, batch=4, lr=3e-3)
    y = UNSEEN.repeat_interleave(25)
    predicted = classifier(torch.arange(16))(generator.sample(net, y, random(1))).argmax(dim=1)
    return (predicted == y).float().mean().item()


def test_unseen_classes_are_generated_from_their_own_attributes_alone():
    assert accuracy_on_unseen_classes(ATTRIBUTES) >= 0.8
    shuffled = torch.randperm(16, generator=random(3))  # no class keeps its own attributes
    assert accuracy_on_unseen_classes(ATTRIBUTES[shuffled]) <= 0.1
