"""Networks against published figures and torchvision; averages against their formula."""

import random

import numpy as np
import pytest
import torch
from tiny import same, tiny_net
from torch import nn
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
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-5, atol=1e-5)


def plain_convolutions(net):
    """The network, computed by torch's own convolutions."""
    for layer in net.modules():
        if isinstance(layer, models.Conv2d):
            layer.__class__ = nn.Conv2d
    return net


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_convolution_is_torchs_whole_or_trimmed(size, stride, dtype, tolerance):
    kernels = [(kernel, padding) for kernel in (1, 2, 3, 5, 7) for padding in range(kernel // 2 + 1)
               if kernel <= size + 2 * padding]
    for kernel, padding in kernels:
        whole, trimmed = (models.Conv2d(3, 4, kernel, stride, padding).to(dtype) for _ in range(2))
        theirs = nn.Conv2d(3, 4, kernel, stride, padding, bias=False).to(dtype)
        theirs.load_state_dict(whole.state_dict())
        trimmed.trim(size, size + 1)
        trimmed.load_state_dict(whole.state_dict())
        x = torch.randn(5, 3, size, size + 1, dtype=dtype)
        outcomes = []
        for layer in (theirs, whole, trimmed):
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            out.square().sum().backward()
            gradient = torch.zeros_like(theirs.weight)
            gradient[getattr(layer, "trimmed_to", models.WHOLE)] = layer.weight.grad
            outcomes.append((out, leaf.grad, gradient))
        for ours in outcomes[1:]:
            torch.testing.assert_close(ours, outcomes[0], rtol=tolerance, atol=10 * tolerance)


def test_a_kernel_keeps_the_taps_that_meet_the_map():
    everything = slice(None)
    assert models.live_taps(size=1, kernel=3, stride=1, padding=1) == (slice(1, 2), 0)
    assert models.live_taps(size=2, kernel=3, stride=2, padding=1) == (slice(1, 3), 0)
    assert models.live_taps(size=2, kernel=3, stride=1, padding=1) == (everything, 1)
    assert models.live_taps(size=2, kernel=7, stride=1, padding=3) == (slice(2, 5), 1)
    assert models.live_taps(size=32, kernel=7, stride=2, padding=3) == (everything, 3)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_ten_steps_of_a_trimmed_network_are_those_of_a_plain_one(optimizer, dtype, tolerance):
    def stack():
        return nn.Sequential(models.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
                             models.Conv2d(8, 8, 3, 2, 1), models.Conv2d(8, 4, 3, 1, 1)).to(dtype)

    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    for size in range(1, 10):
        whole, plain, trimmed = stack(), plain_convolutions(stack()), models.trimmed(stack(), 3, size)
        start = models.copy_state(whole)
        x, y = torch.randn(6, 3, size, size, dtype=dtype), torch.randn(6, dtype=dtype)
        for net in (plain, whole, trimmed):
            net.load_state_dict(start)
            steps = kind(net.parameters(), lr=1e-2)
            for _ in range(10):
                loss = (net(x).mean(dim=(1, 2, 3)) - y).square().mean()
                steps.zero_grad()
                loss.backward()
                steps.step()
        for net in (whole, trimmed):
            torch.testing.assert_close(models.copy_state(net), models.copy_state(plain),
                                       rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("arch", ["resnet10", "resnet18-1/16", "cnn"])
def test_a_scratch_network_predicts_and_saves_what_it_loads(arch):
    net = models.build(arch, 3, 10).eval()
    scratch, _ = models.scratch_network(arch, 3, 10, torch.device("cpu"), optimizer="adam", lr=1e-3)
    state = models.copy_state(net)
    scratch.load_state_dict(state)
    assert same(models.copy_state(scratch), state)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(scratch.eval()(x), net(x), rtol=1e-5, atol=1e-5)


def test_what_never_meets_an_image_is_no_parameter_and_stays_as_it_was():
    net, optimizer = models.scratch_network("resnet10", 3, 10, torch.device("cpu"),
                                            optimizer="sgd", lr=0.1)
    # 3x3 kernels of which one tap is left, two of 512 x 512, and 2x2 of one of 512 x 256.
    idle = 8 * 512 * 512 + 5 * 512 * 256
    assert num_parameters(net) == RESNETS["resnet10"][0] - idle
    start = models.copy_state(models.build("resnet10", 3, 10))
    net.load_state_dict(start)
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = {name: tensor != start[name] for name, tensor in net.state_dict().items()}
    name = "intermediate.layer4.0.conv2.weight"
    assert moved[name][:, :, 1, 1].any() and moved[name].sum() == moved[name][:, :, 1, 1].sum()
    assert same(models.learnt_part(net, net.state_dict()),
                {name: parameter.detach() for name, parameter in net.named_parameters()})
    with pytest.raises(ValueError, match="trimmed to images of another size"):
        net(torch.randn(4, 3, 64, 64))


def test_most_of_the_five_resnets_never_meets_a_32x32_image():
    sizes = [num_parameters(models.trimmed(models.build_empty(arch, 3, 10, META), 3, 32))
             for arch in models.MODELS["resnets"]]
    assert sum(sizes) / len(sizes) == 4_502_346  # of 12,288,022.8: 63 % are idle


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


# ------------------------------------------------------------------------------ sub-models by width

# Of HeteroFL's pre-activation ResNet152 with three channels and ten classes, rates 1/16 to 1,
# counted from the layer shapes, apart from this code.
RESNET152 = {"1/16": 236_878, "1/8": 926_738, "1/4": 3_665_434, "1/2": 14_578_730, "1": 58_148_938}


def test_width_scaled_resnet152_has_the_published_numbers_of_parameters():
    for rate, parameters in RESNET152.items():
        assert num_parameters(models.build_empty(f"resnet152-{rate}", 3, 10, META)) == parameters
    assert list(RESNET152) == list(models.RATES)
    imagenet = [num_parameters(models.build_empty(arch, 3, 1000, META))
                for arch in models.MODELS["resnet152-widths"]]
    assert int(sum(imagenet) / 5 / 1e4) == 1629  # FedIN, Table 4: 16.29 M, truncated


@pytest.fixture(autouse=True)
def own_draws():
    """Whatever a test draws from the global generator, it draws the same alone as after others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("rate", models.RATES)
def test_width_scaled_resnet152_takes_a_step_at_every_rate(rate):
    net = models.build(f"resnet152-{rate}", 3, 10)
    before = models.copy_state(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    after = net.state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert all(not torch.equal(before[name], after[name]) for name in before
               if name.split(".")[-2] in ("conv1", "fc", "shortcut") or before[name].ndim == 4)


def small(arch: str = "resnet18-1/8", channels: int = 1, num_classes: int = 3) -> dict:
    """The weights of a width-scaled network, a narrow one in the part of the whole."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return models.copy_state(models.build(arch, channels, num_classes))


@pytest.mark.parametrize("start", [0, 1, 63, 100])
@pytest.mark.parametrize("exits", [False, True])
def test_extracting_a_sub_model_and_averaging_it_back_changes_nothing(start, exits):
    archs = models.MODELS["resnet18-widths"][:3]
    archs = models.with_exits(archs) if exits else archs
    whole, uploads, held = small(archs[-1]), {}, {}
    for k, arch in enumerate([*archs, archs[0]]):
        held[k] = models.index_sets(whole, models.shapes(arch, 1, 3), start=start)
        uploads[k] = models.extract(whole, held[k])
        assert {name: tensor.shape for name, tensor in uploads[k].items()} == {
            name: tensor.shape for name, tensor in models.shapes(arch, 1, 3).items()}
    counts = {0: 3, 1: 7, 2: 11, 3: 1}
    assert same(models.average(whole, uploads, counts, held=held), whole)


def test_a_sub_model_at_start_zero_is_the_corner_of_the_whole():
    whole = small()
    part = models.extract(whole, models.index_sets(whole, models.shapes("resnet18-1/16", 1, 3)))
    for name, tensor in part.items():
        corner = tuple(slice(size) for size in tensor.shape)
        assert torch.equal(tensor, whole[name][corner])
    assert part["extractor.conv1.weight"].shape == (4, 1, 3, 3)
    assert part["classifier.0.fc.weight"].shape == (3, 32)


@pytest.mark.parametrize("start", [3, 70])
def test_with_its_channels_rolled_on_the_whole_network_computes_the_same(start):
    for arch in ("resnet18-1/16", "resnet18-1/16-exit3"):
        net = models.build(arch, 2, 3).double().train()
        whole = models.copy_state(net)
        sets = models.index_sets(whole, whole, start=start)
        for name, indices in sets.items():
            for dim, index in enumerate(indices):
                assert index.sort().values.tolist() == list(range(whole[name].shape[dim]))
        rolled = models.build(arch, 2, 3).double().train()
        rolled.load_state_dict(models.extract(whole, sets))
        x = torch.randn(5, 2, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(rolled(x), net(x))
        assert not same(models.copy_state(rolled), whole)


def test_a_coordinate_that_nobody_holds_keeps_its_value_and_others_are_weighted_means():
    old = {"layer.weight": torch.arange(12.0).view(3, 4)}
    uploads = {2: {"layer.weight": torch.full((2, 2), 10.0)},
               5: {"layer.weight": torch.full((1, 3), 40.0)}}
    held = {2: {"layer.weight": (torch.tensor([0, 2]), torch.tensor([1, 2]))},
            5: {"layer.weight": (torch.tensor([2]), torch.tensor([2, 3, 0]))}}
    new = models.average(old, uploads, {2: 10, 5: 20}, held=held)["layer.weight"]
    assert new.tolist() == [[0, 10, 10, 3], [4, 5, 6, 7], [40, 10, 30, 40]]
    new = models.average(old, uploads, {2: 10, 5: 20}, held=held, uniform=True)["layer.weight"]
    assert new[2].tolist() == [40, 10, 25, 40]


def test_coordinates_held_by_all_are_averaged_bit_for_bit_as_whole_tensors_are():
    whole = small()
    rng = torch.Generator().manual_seed(0)
    uploads = {k: {name: tensor + torch.randn(tensor.shape, generator=rng)
                   for name, tensor in whole.items()} for k in range(3)}
    held = dict.fromkeys(uploads, models.index_sets(whole, whole))
    counts = {0: 31, 1: 5, 2: 17}
    assert same(models.average(whole, uploads, counts, held=held),
                models.average(whole, uploads, counts))


def test_classes_that_a_part_lacks_are_the_rows_it_does_not_touch():
    whole = small()
    sets = models.index_sets(whole, whole, start=5, classes=torch.tensor([0, 2]))
    rows, columns = sets["classifier.0.fc.weight"]
    assert rows.tolist() == [0, 2] and sets["classifier.0.fc.bias"][0].tolist() == [0, 2]
    assert columns[0] == 5  # the window of channels does roll


def test_the_scaler_divides_by_the_rate_in_training_alone():
    scaler, x = models.Scaler(0.25), torch.tensor([1.0, -2.0])
    assert scaler.train()(x).tolist() == [4, -8] and scaler.eval()(x).tolist() == [1, -2]


def test_static_batch_normalisation_keeps_nothing_until_statistics_are_collected():
    net = models.build("resnet18-1/16", 1, 3)
    assert all(models.is_parameter(name) for name in net.state_dict())
    batches = [torch.randn(8, 1, 32, 32) for _ in range(3)]
    seen = []
    first = net.classifier[0].norm[1]
    handle = first.register_forward_hook(lambda layer, x, out: seen.append(x[0]))
    net.train()
    models.collect_statistics(net, batches)
    handle.remove()
    mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
    var = torch.stack([x.var(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
    torch.testing.assert_close(first.running_mean, mean)
    torch.testing.assert_close(first.running_var, var)
    assert not net.training and not any(layer.training for layer in net.modules())
    # Now a prediction depends on no other image of its batch, and scalers rest.
    x = torch.cat(batches)
    torch.testing.assert_close(net(x)[:5], net(x[:5]))
    inputs = []
    handle = net.intermediate[0][0].norm[1].register_forward_hook(
        lambda layer, x, out: inputs.append(x[0]))
    net(x)
    handle.remove()
    torch.testing.assert_close(inputs[0], net.extractor(x))


def test_collecting_statistics_leaves_other_networks_as_they_are():
    net = tiny_net().train()
    before = models.copy_state(net)
    models.collect_statistics(net, [torch.randn(4, 1, 8, 8)])
    assert same(models.copy_state(net), before) and net.training


@pytest.mark.parametrize("net", models.WIDTH_RESNETS)
def test_levels_of_scalefl_have_the_budgets_of_heterofl(net):
    widths = models.MODELS[f"{net}-widths"]
    for by_width, by_both in zip(widths, models.with_exits(widths), strict=True):
        budget, ours = (sum(tensor.numel() for name, tensor in models.shapes(arch, 3, 10).items()
                            if models.is_parameter(name)) for arch in (by_width, by_both))
        assert 0.94 < ours / budget < 1.06
    assert models.with_exits(widths[-1:]) == (f"{net}-1-exit1",)  # of one architecture


def test_levels_of_scalefl_end_at_later_exits_the_wider_they_are():
    archs = models.with_exits(models.MODELS["resnet18-widths"])
    assert archs[0] == "resnet18-1/4-exit1" and archs[-1] == "resnet18-1-exit5"
    states = [models.shapes(arch, 3, 10) for arch in archs]
    for level, (small_one, large) in enumerate(zip(states, states[1:]), start=1):
        assert small_one.keys() < large.keys()
        heads = {name.split(".")[1] for name in small_one if name.startswith("classifier")}
        assert heads == {str(head) for head in range(level)}
    net = models.build(archs[2], 1, 3).eval()
    models.collect_statistics(net, [torch.randn(8, 1, 32, 32)])
    logits = net.exit_logits(torch.randn(2, 1, 32, 32))
    assert [tuple(each.shape) for each in logits] == [(2, 3)] * 3
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(net.exit_logits(x)[-1], net(x))
    blocks = [len(section) for section in models.build_empty(
        "resnet152-1-exit5", 3, 10, META).intermediate]
    assert blocks == [25, 7, 6, 6, 6]  # a half, five, six, seven eighths and all of fifty


def test_a_representation_is_what_the_last_layer_receives_with_or_without_a_head():
    x = torch.randn(2, 1, 32, 32)
    for net, width in ((models.CNN(1, 3), 512), (models.CNN(1, 3, projection=256), 256),
                       (models.ResNet((1, 1, 1, 1), 1, 3, projection=256).eval(), 256)):
        z = models.representation(net, x)
        assert z.shape == (2, width) and torch.equal(net.classifier.fc(z), net(x))
    assert num_parameters(models.CNN(1, 3, projection=256)) - num_parameters(models.CNN(1, 3)) == (
        512 * 512 + 512 + 512 * 256 + 256 - 3 * 256)


def test_names_of_blocks_and_buffers_are_told_apart():
    assert models.block_of("intermediate.layer3.1.conv2.weight") == (
        "intermediate.layer3", 1, "conv2.weight")
    assert models.block_of("extractor.layer1.10.bn1.running_var") == (
        "extractor.layer1", 10, "bn1.running_var")
    assert models.block_of("extractor.conv1.weight") is None
    assert models.block_of("classifier.fc.bias") is None
    net = models.build_empty("resnet10", 1, 10, META)
    assert {name for name in net.state_dict() if models.is_parameter(name)} == {
        name for name, _ in net.named_parameters()}
