"""Networks against published figures and torchvision; averages against their formula."""

import random

import numpy as np
import pytest
import torch
from tiny import same, tiny_net
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import ResNet as TorchvisionResNet

import models

# Parameters with 3 and with 1 input channel at ten classes, and entries of the state dict: counted
# from the layer shapes, apart from this code.
RESNETS = {"resnet10": (4_910_922, 4_904_650, 74), "resnet14": (10_812_234, 10_805_962, 98),
           "resnet18": (11_181_642, 11_175_370, 122), "resnet22": (17_082_954, 17_076_682, 146),
           "resnet26": (17_452_362, 17_446_090, 170)}
META = torch.device("meta")


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("arch", RESNETS)
def test_resnets_have_the_published_numbers_of_parameters(arch):
    colour, gray, entries = RESNETS[arch]
    net = models.build_empty(arch, 3, 10, META)
    assert num_parameters(net) == colour
    assert num_parameters(models.build_empty(arch, 1, 10, META)) == gray
    assert len(net.state_dict()) == entries
    assert num_parameters(net.extractor) == 64 * 3 * 7 * 7 + 2 * 64 == 9_536
    assert num_parameters(net.classifier) == 512 * 10 + 10 == 5_130


def test_mean_of_the_five_resnets_is_the_papers_figure():
    sizes = [num_parameters(models.build_empty(arch, 3, 10, META))
             for arch in models.MODELS["resnets"]]
    assert sum(sizes) / len(sizes) == 12_288_022.8  # FedIN, Table 4: 12.28 M


@pytest.mark.parametrize("channels, classes, parameters",
                         [(3, 10, 878_538), (3, 100, 924_708), (1, 26, 885_146), (1, 10, 876_938)])
def test_cnn_has_the_published_number_of_parameters(channels, classes, parameters):
    assert num_parameters(models.build_empty("cnn", channels, classes, META)) == parameters


@pytest.mark.parametrize("arch", ["resnet14", "resnet18"])
def test_resnet_is_torchvisions(arch):
    ours = models.build(arch, 3, 10)
    theirs = TorchvisionResNet(BasicBlock, list(models.RESNET_BLOCKS[arch]), num_classes=10)
    plain = {name.split(".", 1)[1]: tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(plain)
    x = torch.randn(4, 3, 32, 32)
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(x), theirs.train(mode)(x))


def test_resnet_weights_are_drawn_like_torchvisions():
    weight = models.build("resnet10", 3, 10).state_dict()["intermediate.layer4.0.conv1.weight"]
    assert weight.shape == (512, 256, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)  # fan out


@pytest.mark.parametrize("arch", ["cnn", "resnet10"])
def test_a_network_is_its_three_parts_and_every_name_begins_with_one(arch):
    net = models.build(arch, 3, 10).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), net.classifier(net.intermediate(net.extractor(x))))
    parts = {name.split(".")[0] for name in net.state_dict()}
    assert parts == {"extractor", "intermediate", "classifier"} == dict(net.named_children()).keys()


@pytest.mark.parametrize("cut", ["stem", "layer1"])
def test_features_have_the_papers_shapes_at_either_cut(cut):
    net = models.ResNet((1, 1, 1, 1), 3, 10, cut=cut).eval()
    s_in = net.extractor(torch.randn(16, 3, 32, 32))
    s_out = net.intermediate(s_in)
    assert s_in.shape == (16, 64, 8, 8) and s_out.shape == (16, 512, 1, 1)
    assert s_in.numel() + s_out.numel() == 73_728  # FedIN, Table 4: the 0.07 M of 12.35 - 12.28
    assert any("layer1" in name for name in net.extractor.state_dict()) == (cut == "layer1")


def test_each_resnet_contains_the_one_before_it():
    states = [models.build_empty(arch, 3, 10, META).state_dict() for arch in RESNETS]
    for small, large in zip(states, states[1:]):
        assert small.keys() < large.keys()
        assert all(small[name].shape == large[name].shape for name in small)
    only_resnet26 = states[4].keys() - states[3].keys()
    assert {tuple(name.split(".")[1:3]) for name in only_resnet26} == {("layer1", "2"),
                                                                       ("layer2", "2")}


def test_architectures_are_even_contiguous_groups():
    archs = models.MODELS["resnets"]
    assigned = [models.architecture_of(k, 100, archs) for k in range(100)]
    assert assigned == [arch for arch in archs for _ in range(20)]
    uneven = [models.architecture_of(k, 7, archs) for k in range(7)]
    assert uneven == sorted(uneven) and set(uneven) == set(archs)


def test_initial_weights_are_shared_repeatable_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    drawn = [models.initial_weights(models.MODELS["resnets"], 1, 10,
                                    torch.Generator().manual_seed(seed), torch.device("cpu"))
             for seed in (1, 1, 2)]
    models.build_empty("resnet26", 1, 10, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    assert all(same(drawn[0][arch], drawn[1][arch]) for arch in drawn[0])
    name = "intermediate.layer1.0.conv1.weight"
    assert not torch.equal(drawn[0]["resnet10"][name], drawn[2]["resnet10"][name])
    assert drawn[0]["resnet10"][name] is drawn[0]["resnet26"][name]
    for arch, state in drawn[0].items():
        models.build_empty(arch, 1, 10, torch.device("cpu")).load_state_dict(state)


# -------------------------------------------------------------------------------------- weights


def random_states(count: int, names=("a", "b"), seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    return {k: {name: torch.randn(5, 3, generator=rng) for name in names} for k in range(count)}


def test_average_is_the_weighted_mean_in_double_precision():
    uploads, counts = random_states(4), {0: 7, 1: 450, 2: 1, 3: 33}
    old = {name: torch.zeros(5, 3) for name in "ab"}
    for uniform in (False, True):
        new = models.average(old, uploads, counts, uniform=uniform)
        share = [1 if uniform else counts[k] for k in uploads]
        for name in old:
            stack = np.stack([uploads[k][name].numpy().astype(np.float64) for k in uploads])
            expected = np.average(stack, axis=0, weights=share).astype(np.float32)
            np.testing.assert_array_max_ulp(new[name].numpy(), expected, maxulp=1)


def test_each_weight_is_averaged_over_exactly_its_holders():
    old = {name: torch.full((2,), 100.0) for name in ("everybody", "large", "nobody")}
    uploads = {3: {"everybody": torch.tensor([1.0, 2.0]), "large": torch.tensor([5.0, 7.0])},
               8: {"everybody": torch.tensor([4.0, 8.0])}}
    new = models.average(old, uploads, {3: 1, 8: 2})
    assert new["everybody"].tolist() == [3.0, 6.0]  # (1 + 2 * 4) / 3, (2 + 2 * 8) / 3
    assert new["large"].tolist() == [5.0, 7.0]
    assert new["nobody"] is old["nobody"]


def test_unchanged_weights_stay_unchanged_bit_for_bit():
    old = random_states(1)[0] | {"steps": torch.tensor(123_456_789)}
    uploads = {k: {name: tensor.clone() for name, tensor in old.items()} for k in range(7)}
    new = models.average(old, uploads, {k: 3 ** k for k in range(7)})
    assert same(new, old)


def test_order_of_arrival_does_not_matter_bit_for_bit():
    # In double precision, where sums of float32 values would be exact in any order.
    uploads = {k: {name: tensor.double() / 3 for name, tensor in state.items()}
               for k, state in random_states(9).items()}
    counts, old = {k: 11 * k + 3 for k in range(9)}, uploads[0]
    reference = models.average(old, uploads, counts)
    order = list(uploads)
    for seed in range(5):
        random.Random(seed).shuffle(order)
        assert same(models.average(old, {k: uploads[k] for k in order}, counts), reference)


def test_integer_buffers_are_truncated_and_arguments_left_alone():
    old = {"steps": torch.tensor(5)}
    uploads = {0: {"steps": torch.tensor(10)}, 1: {"steps": torch.tensor(13)}}
    new = models.average(old, uploads, {0: 1, 1: 2})
    assert new["steps"].item() == 12 and new["steps"].dtype == torch.int64
    assert old["steps"].item() == 5 and uploads[0]["steps"].item() == 10


def test_batch_norm_buffers_are_averaged_like_weights():
    nets = [tiny_net(seed) for seed in (1, 2)]
    for net in nets:
        net(torch.randn(8, 1, 8, 8))
    states = {k: models.copy_state(net) for k, net in enumerate(nets)}
    new = models.average(states[0], states, {0: 1, 1: 3})
    for name in ("extractor.1.running_mean", "intermediate.1.running_var"):
        expected = states[0][name] / 4 + states[1][name] * 3 / 4
        torch.testing.assert_close(new[name], expected)
        assert not torch.equal(new[name], states[0][name])


def test_layerwise_average_shares_by_name_across_architectures():
    shared, own, late = torch.zeros(2), torch.zeros(3), torch.zeros(4)
    weights = {"small": {"a": shared}, "large": {"a": shared, "b": own, "c": late}}
    uploads = {0: {"a": torch.ones(2)}, 1: {"a": 4 * torch.ones(2), "b": torch.ones(3), "c": late}}
    new = models.layerwise_average(weights, uploads, {0: 2, 1: 1})
    assert new["small"]["a"].tolist() == [2.0, 2.0] and new["large"]["a"] is new["small"]["a"]
    assert new["large"]["b"].tolist() == [1.0] * 3 and torch.equal(new["large"]["c"], late)
    only_small = models.layerwise_average(weights, {0: uploads[0]}, {0: 2})
    assert only_small["large"]["a"].tolist() == [1.0, 1.0] and only_small["large"]["b"] is own


def test_layerwise_average_of_one_architecture_is_fedavgs():
    uploads, counts = random_states(3), {0: 5, 1: 6, 2: 7}
    old = {name: torch.zeros(5, 3) for name in "ab"}
    assert same(models.layerwise_average({"net": old}, uploads, counts)["net"],
                models.average(old, uploads, counts))


def test_per_architecture_average_leaks_nothing_between_architectures():
    shared = torch.zeros(2)
    weights = {"small": {"a": shared}, "large": {"a": shared, "b": torch.zeros(3)}}
    uploads = {0: {"a": torch.ones(2)}, 1: {"a": 3 * torch.ones(2)},
               2: {"a": 9 * torch.ones(2), "b": torch.ones(3)}}
    new = models.per_architecture_average(weights, uploads, {0: 1, 1: 1, 2: 1})
    assert new["small"]["a"].tolist() == [2.0, 2.0] and new["large"]["a"].tolist() == [9.0, 9.0]
    without_large = models.per_architecture_average(weights, {0: uploads[0]}, {0: 1})
    assert same(without_large["large"], weights["large"])


def test_num_bytes_counts_every_tensor_in_a_nest():
    nest = {"weights": {"a": torch.zeros(3), "n": torch.tensor(1)},
            "pair": (torch.zeros(2, 2, dtype=torch.float64), [torch.zeros(5, dtype=torch.uint8)]),
            "count": 12, "nothing": None}
    assert models.num_bytes(nest) == 3 * 4 + 8 + 4 * 8 + 5


def test_copy_state_is_a_copy():
    net = tiny_net()
    state = models.copy_state(net)
    before = {name: tensor.clone() for name, tensor in state.items()}
    net(torch.randn(4, 1, 8, 8)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert same(state, before) and not any(tensor.requires_grad for tensor in state.values())


def test_predict_is_evaluation_mode_in_batches():
    net = tiny_net().train()
    images = torch.randint(256, (models.TEST_BATCH + 3, 1, 8, 8), dtype=torch.uint8)
    before = models.copy_state(net)
    predicted = models.predict(net, images, lambda x: x / 255)
    assert same(models.copy_state(net), before)  # running statistics did not move
    one_by_one = torch.cat([net.eval()(image[None] / 255).argmax(1) for image in images])
    assert torch.equal(predicted, one_by_one)
