"""Networks against published figures and torchvision; averages against their formula."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from tiny import TinyNet, same, tiny_net, weights
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import ResNet as TorchvisionResNet

import models
from federation import Update

# Parameters with 3 and with 1 input channel at ten classes, and entries of the state dict: counted
# from the layer shapes, apart from this code.
RESNETS = {"resnet10": (4_910_922, 4_904_650, 74), "resnet14": (10_812_234, 10_805_962, 98),
           "resnet18": (11_181_642, 11_175_370, 122), "resnet22": (17_082_954, 17_076_682, 146),
           "resnet26": (17_452_362, 17_446_090, 170)}
META = torch.device("meta")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def empty(arch: str, channels: int = 3, classes: int = 10) -> nn.Module:
    constructor = {**models.RESNETS, "cnn": models.CNN}[arch]
    return models.empty_network(partial(constructor, channels, classes), META)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def nets() -> dict:
    """A CNN and a ResNet, drawn once, in evaluation mode."""
    with models.drawing_from(rng()):
        return {"cnn": models.CNN(3, 10).eval(),
                "resnet14": models.RESNETS["resnet14"](3, 10).eval()}


# ----------------------------------------------------------------------------------------- networks

@pytest.mark.parametrize("arch", RESNETS)
def test_resnets_have_the_published_numbers_of_parameters(arch):
    net = empty(arch)
    assert (num_parameters(net), num_parameters(empty(arch, 1)), len(net.state_dict())) == (
        RESNETS[arch])
    assert num_parameters(net.extractor) == 64 * 3 * 7 * 7 + 2 * 64
    assert num_parameters(net.classifier) == 512 * 10 + 10


@pytest.mark.parametrize("channels, classes, parameters",
                         [(3, 10, 878_538), (3, 100, 924_708), (1, 26, 885_146), (1, 10, 876_938)])
def test_cnn_has_the_published_number_of_parameters(channels, classes, parameters):
    assert num_parameters(empty("cnn", channels, classes)) == parameters


def test_mean_of_the_five_resnets_is_the_papers_figure_of_which_most_is_idle():
    assert list(models.MODELS["resnets"]) == list(RESNETS)
    sizes = [num_parameters(empty(arch)) for arch in RESNETS]
    assert sum(sizes) / 5 == 12_288_022.8  # FedIN, Table 4: 12.28 M
    trimmed = [num_parameters(models.trimmed(empty(arch), (3, 32, 32))) for arch in RESNETS]
    assert sum(trimmed) / 5 == 4_502_346  # 63 % of the taps never meet a 32x32 image
    # ResNet10: 3x3 kernels of which one tap is left, two of 512 x 512, and 2x2 of 512 x 256
    assert sizes[0] - trimmed[0] == 8 * 512 * 512 + 5 * 512 * 256


@pytest.mark.parametrize("training", [True, False])
def test_resnet_is_torchvisions(training, nets):
    ours = copy.deepcopy(nets["resnet14"]).train(training)
    theirs = TorchvisionResNet(BasicBlock, [1, 1, 2, 2], num_classes=10).train(training)
    theirs.load_state_dict({name.split(".", 1)[1]: tensor
                            for name, tensor in ours.state_dict().items()})
    x = torch.randn(4, 3, 32, 32, generator=rng())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    weight = ours.state_dict()["intermediate.layer4.0.conv1.weight"]
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)  # fan out


@pytest.mark.parametrize("arch, shapes", [("cnn", ((32, 14, 14), (512,), 512)),
                                          ("resnet14", ((64, 8, 8), (512, 1, 1), 512))])
def test_a_network_is_its_three_parts_and_every_name_begins_with_one(arch, shapes, nets):
    net, x = nets[arch], torch.randn(2, 3, 32, 32, generator=rng())
    s_in = net.extractor(x)
    s_out = net.intermediate(s_in.clone())
    z = models.representation(net, x)
    assert (s_in.shape[1:], s_out.shape[1:], z.shape[1]) == shapes
    assert torch.equal(net(x), net.classifier(s_out)) and torch.equal(net.classifier.fc(z), net(x))
    assert {name.split(".")[0] for name in net.state_dict()} == {
        "extractor", "intermediate", "classifier"}


def test_each_resnet_contains_the_one_before_it():
    states = [empty(arch).state_dict() for arch in RESNETS]
    for small, large in zip(states, states[1:]):
        assert small.keys() < large.keys()
        assert all(small[name].shape == large[name].shape for name in small)
    only_resnet26 = {tuple(name.split(".")[1:3]) for name in states[4].keys() - states[3].keys()}
    assert only_resnet26 == {("layer1", "2"), ("layer2", "2")}


def test_architectures_are_even_contiguous_groups():
    assigned = [models.architecture_of(k, 100, list(RESNETS)) for k in range(100)]
    assert assigned == [arch for arch in RESNETS for _ in range(20)]
    uneven = [models.architecture_of(k, 7, list(RESNETS)) for k in range(7)]
    assert uneven == sorted(uneven) and set(uneven) == set(RESNETS)


# ------------------------------------------------------------------------------ skipping of padding

@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_torchs_whole_or_trimmed(size, stride):
    kernels = [(kernel, padding) for kernel in (1, 2, 3, 5, 7) for padding in range(kernel // 2 + 1)
               if kernel <= size + 2 * padding]
    for kernel, padding in kernels:
        whole, trimmed = (models.Conv2d(3, 4, kernel, stride, padding).double() for _ in range(2))
        theirs = nn.Conv2d(3, 4, kernel, stride, padding, bias=False).double()
        theirs.load_state_dict(whole.state_dict())
        trimmed.trim(size, size + 1)
        trimmed.load_state_dict(whole.state_dict())
        assert torch.equal(trimmed.state_dict()["weight"], whole.weight)
        x, outcomes = torch.randn(5, 3, size, size + 1, dtype=torch.float64), []
        for layer in (theirs, whole, trimmed):
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            out.square().sum().backward()
            gradient = torch.zeros_like(theirs.weight)
            gradient[getattr(layer, "trimmed_to", models.WHOLE)] = layer.weight.grad
            outcomes.append((out, leaf.grad, gradient))
        for ours in outcomes[1:]:
            torch.testing.assert_close(ours, outcomes[0], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("optimizer, kind, options", [
    ("adam", torch.optim.Adam, {}),
    ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01})])
def test_steps_of_a_scratch_network_are_those_of_a_whole_one_but_idle_taps_stay(optimizer, kind,
                                                                                options):
    """TinyNet: 4 taps of the second convolution meet its map, and 5 are idle."""
    scratch, ours = models.scratch_network(TinyNet, (1, 8, 8), torch.device("cpu"), lr=0.1,
                                           optimizer=optimizer, **options)
    whole, start = tiny_net(), weights()
    theirs = kind(whole.parameters(), lr=0.1, **options)
    assert num_parameters(whole) - num_parameters(scratch) == 5 * 4 * 6
    x = torch.randn(4, 1, 8, 8, generator=rng())
    for net, steps in ((scratch, ours), (whole, theirs)):
        net.load_state_dict(start)
        assert same(models.copy_state(net), start) and net.training
        for _ in range(3):
            steps.zero_grad()
            net(x).square().sum().backward()
            steps.step()
    after = models.copy_state(scratch)
    kernel = "intermediate.0.weight"
    moved = (after[kernel] != start[kernel]).any(dim=1).any(dim=0)
    decayed = models.copy_state(whole)
    decayed[kernel] = torch.where(moved, decayed[kernel], start[kernel])  # idle taps do not decay
    torch.testing.assert_close(after, decayed, rtol=1e-4, atol=1e-5)
    assert moved.tolist() == [[False] * 3, [False, True, True], [False, True, True]]
    assert same(models.learnt_part(scratch, after), models.copy_parameters(scratch))
    with pytest.raises(ValueError, match="trimmed to images of another size"):
        scratch(torch.randn(4, 1, 12, 12))


# ----------------------------------------------------------------------------- building and loading

def test_a_loaded_network_predicts_as_the_one_that_its_weights_are_from(nets):
    state = models.copy_state(nets["cnn"])
    loaded = models.load_network(partial(models.CNN, 3, 10), state)
    assert same(models.copy_state(loaded), state)
    x = torch.randn(2, 3, 32, 32, generator=rng())
    torch.testing.assert_close(loaded(x), nets["cnn"](x), rtol=1e-5, atol=1e-5)
    assert loaded.extractor.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_initial_weights_are_shared_repeatable_and_leave_the_global_generator_alone():
    networks = {"short": lambda: nn.Sequential(nn.Linear(2, 3)),
                "long": lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))}
    before = torch.get_rng_state()
    one, two, other = (models.initial_weights(networks, rng(seed)) for seed in (1, 1, 2))
    models.empty_network(networks["long"], "cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert same(one["long"], two["long"]) and one["short"]["0.weight"] is one["long"]["0.weight"]
    assert not torch.equal(one["short"]["0.weight"], other["short"]["0.weight"])
    assert {arch: list(state) for arch, state in one.items()} == {
        arch: list(make().state_dict()) for arch, make in networks.items()}


# ------------------------------------------------------------------------------------------ weights

def random_states(count: int) -> dict:
    generator = rng()
    return {k: {name: torch.randn(5, 3, generator=generator) for name in "ab"}
            for k in range(count)}


def test_average_is_the_weighted_mean_in_double_precision():
    uploads, counts = random_states(4), {0: 7, 1: 450, 2: 1, 3: 33}
    new = models.average({name: torch.zeros(5, 3) for name in "ab"}, uploads, counts)
    for name in "ab":
        stack = np.stack([uploads[k][name].numpy().astype(np.float64) for k in uploads])
        expected = np.average(stack, axis=0, weights=list(counts.values())).astype(np.float32)
        np.testing.assert_array_max_ulp(new[name].numpy(), expected, maxulp=1)


def test_each_weight_is_averaged_over_exactly_its_holders_and_integers_are_truncated():
    old = {"all": torch.full((2,), 100.0), "large": torch.zeros(2), "none": torch.zeros(2),
           "num_batches_tracked": torch.tensor(5)}
    uploads = {3: {"all": torch.tensor([1.0, 2.0]), "large": torch.tensor([5.0, 7.0]),
                   "num_batches_tracked": torch.tensor(10)},
               8: {"all": torch.tensor([4.0, 8.0]), "num_batches_tracked": torch.tensor(13)}}
    new = models.average(old, uploads, {3: 1, 8: 2})
    assert new["all"].tolist() == [3.0, 6.0]  # (1 + 2 * 4) / 3, (2 + 2 * 8) / 3
    assert new["large"].tolist() == [5.0, 7.0] and new["none"] is old["none"]
    assert new["num_batches_tracked"].item() == 12
    assert new["num_batches_tracked"].dtype is torch.int64
    assert old["all"][0] == 100 and uploads[3]["all"][0] == 1  # no argument is changed


def test_unchanged_weights_stay_unchanged_bit_for_bit():
    old = random_states(1)[0] | {"steps": torch.tensor(123_456_789)}
    uploads = {k: {name: tensor.clone() for name, tensor in old.items()} for k in range(7)}
    assert same(models.average(old, uploads, {k: 3**k for k in range(7)}), old)


def test_order_of_arrival_does_not_matter_bit_for_bit():
    # In double precision, where sums of float32 values would be exact in any order
    uploads = {k: {name: tensor.double() / 3 for name, tensor in state.items()}
               for k, state in random_states(9).items()}
    counts, old, order = {k: 11 * k + 3 for k in range(9)}, uploads[0], list(uploads)
    reference = models.average(old, uploads, counts)
    for seed in range(5):
        random.Random(seed).shuffle(order)
        assert same(models.average(old, {k: uploads[k] for k in order}, counts), reference)


@pytest.mark.parametrize("share, small, large", [(models.layerwise_average, 3.0, 3.0),
                                                 (models.per_architecture_average, 1.5, 9.0)])
def test_averages_share_layers_across_architectures_or_within_one(share, small, large):
    a, b = torch.zeros(2), torch.zeros(3)
    states = {"small": {"a": a}, "large": {"a": a, "b": b}}
    uploads = {0: {"a": torch.ones(2)}, 1: {"a": 2 * torch.ones(2)},
               2: {"a": 9 * torch.ones(2), "b": torch.ones(3)}}
    new = share(states, uploads, {0: 3, 1: 3, 2: 3 / 2})
    assert new["small"]["a"].tolist() == [small] * 2 and new["large"]["a"].tolist() == [large] * 2
    assert (new["large"]["a"] is new["small"]["a"]) == (small == large)
    assert new["large"]["b"].tolist() == [1.0] * 3 and a.tolist() == [0, 0]
    without_large = share(states, {0: uploads[0]}, {0: 3})
    assert without_large["large"]["a"][0] == (1 if small == large else 0)
    assert without_large["large"]["b"] is b
    alone = share({"small": states["small"]}, {0: uploads[0], 1: uploads[1]}, {0: 5, 1: 6})
    assert same(alone["small"], models.average(states["small"], {0: uploads[0], 1: uploads[1]},
                                               {0: 5, 1: 6}))


def test_interpolation_is_exact_at_its_ends_and_truncates_integers():
    start, end = random_states(2).values()
    start, end = start | {"steps": torch.tensor(1)}, end | {"steps": torch.tensor(8)}
    assert same(models.interpolate(start, end, 0), start)
    assert same(models.interpolate(start, end, 1), end)
    assert same(models.interpolate(start, start, 0.3), start)
    between = models.interpolate(start, end, 0.3)
    torch.testing.assert_close(between["a"], 0.7 * start["a"] + 0.3 * end["a"])
    assert between["steps"].item() == 3  # 1 + 0.3 * 7, truncated


def test_nests_are_counted_moved_and_checked_for_what_is_not_finite():
    nest = {"weights": {"a": torch.zeros(3), "n": torch.tensor(1)}, "update": Update({}, 3),
            "pair": (torch.zeros(2, 2, dtype=torch.float64), [torch.zeros(5, dtype=torch.uint8)]),
            "count": 12, "nothing": None}
    assert models.num_bytes(nest) == 3 * 4 + 8 + 4 * 8 + 5
    moved = models.on_device(nest, "meta")
    assert all(tensor.is_meta for tensor in models.tensors_in(moved))
    assert [type(moved[name]) for name in ("update", "pair")] == [Update, tuple]
    assert moved["count"] == 12 and moved["update"].num_samples == 3
    assert models.all_finite(nest) and models.all_finite(None)
    for wrong in (float("inf"), float("nan")):
        assert not models.all_finite([nest, (Update({"w": torch.tensor([0, wrong])}, 1),)])


def test_copies_of_a_network_do_not_follow_it():
    net = tiny_net().to(memory_format=torch.channels_last)
    copies = models.copy_state(net), models.copy_parameters(net)
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in copies]
    net(torch.randn(4, 1, 8, 8)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert same(copies[0], before[0]) and same(copies[1], before[1])
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in copies[0].values())
    assert copies[1].keys() == {name for name in copies[0] if models.is_parameter(name)}


# --------------------------------------------------------------------------------------- prediction

def test_predict_is_evaluation_mode_in_batches():
    net = tiny_net().train()
    images = torch.randint(256, (models.TEST_BATCH + 3, 1, 8, 8), dtype=torch.uint8)
    before = models.copy_state(net)
    logits = models.predict_logits(net, images, lambda x: x / 255)
    assert same(models.copy_state(net), before)  # running statistics did not move
    torch.testing.assert_close(logits, net.eval()(images / 255).detach())
    predicted = models.predict(net.train(), images, lambda x: x / 255)
    assert torch.equal(predicted, logits.argmax(dim=1)) and not net.training


def test_static_batch_normalisation_collects_plain_means_over_batches():
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False), nn.ReLU())
    net[0].momentum = None
    batches = [torch.randn(4, 2, 3, 3, generator=rng(seed)) for seed in range(3)]
    running = {name: tensor.clone() for name, tensor in net[0].state_dict().items()}
    models.collect_statistics(net.train(), batches)
    assert not any(layer.training for layer in net) and same(net[0].state_dict(), running)
    inputs = [net[0](x) for x in batches]
    mean = sum(x.mean(dim=(0, 2, 3)) for x in inputs) / 3
    variance = sum(x.var(dim=(0, 2, 3)) for x in inputs) / 3
    torch.testing.assert_close((net[1].running_mean, net[1].running_var),
                               (mean.detach(), variance.detach()))
    x = torch.cat(batches)
    torch.testing.assert_close(net(x)[:5], net(x[:5]))  # whatever else a batch holds

    other = tiny_net().train()  # without static layers
    before = models.copy_state(other)
    models.collect_statistics(other, [torch.randn(4, 1, 8, 8)])
    assert same(models.copy_state(other), before) and other.training
