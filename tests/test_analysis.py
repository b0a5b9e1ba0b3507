"""The analyses against independent calculations, closed forms and invariances."""

import hashlib
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn

import analysis
import baselines
import data
import fedin
import files
import models
from commands import RESNETS, config, go

RNG = np.random.default_rng(0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=9))[0]


# ---------------------------------------------------------------------------- representations


def test_cka_is_that_of_centred_kernels():
    x, y = normal(30, 5), normal(30, 8, seed=1)
    y[:, :3] += x[:, :3]
    centre = np.eye(30) - 1 / 30

    def hsic(a, b):
        return np.trace(a @ a.T @ centre @ b @ b.T @ centre)

    a, b = x.numpy(), y.numpy()
    expected = hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))
    assert analysis.linear_cka(x, y) == pytest.approx(expected)


def test_unbiased_hsic_is_the_mean_over_four_different_images():
    x, y = normal(6, 3), normal(6, 2, seed=1)
    k, m = (x @ x.T).numpy(), (y @ y.T).numpy()
    terms = [k[t, u] * (m[t, u] + m[v, w] - 2 * m[t, v])
             for t, u, v, w in permutations(range(6), 4)]
    centred = x - x.mean(dim=0), y - y.mean(dim=0)
    assert float(analysis.unbiased_hsic(*centred)) == pytest.approx(np.mean(terms))


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_knows_no_rotation_scale_or_shift(unbiased):
    x, y = normal(40, 6), normal(40, 4, seed=1) + normal(40, 6)[:, :4]
    changed = 3 * x @ rotation(6) + 5
    assert analysis.linear_cka(x, x, unbiased=unbiased) == pytest.approx(1)
    assert analysis.linear_cka(x, changed, unbiased=unbiased) == pytest.approx(1)
    value = analysis.linear_cka(x, y, unbiased=unbiased)
    assert value == pytest.approx(analysis.linear_cka(changed, y, unbiased=unbiased))
    assert value == pytest.approx(analysis.linear_cka(y, x, unbiased=unbiased))
    assert 0.1 < value < 0.9
    squeezed = x * torch.tensor([1, 1, 1, 1, 1, 100.0])  # which is no rotation
    assert abs(analysis.linear_cka(squeezed, y, unbiased=unbiased) - value) > 0.05


def test_of_independent_features_biased_cka_is_high_and_unbiased_is_none():
    pairs = [(normal(50, 50, seed=i), normal(50, 50, seed=100 + i)) for i in range(20)]
    biased, unbiased = (np.mean([analysis.linear_cka(x, y, unbiased=flag) for x, y in pairs])
                        for flag in (False, True))
    assert biased == pytest.approx(50 / 100, abs=0.02)
    assert abs(unbiased) < 0.02


def test_cka_needs_the_same_images():
    with pytest.raises(ValueError, match=r"of \[4, 5\] images"):
        analysis.linear_cka(normal(4, 2), normal(5, 2))


def test_a_map_holds_each_pair_and_its_mean_leaves_out_the_diagonal():
    parts = [normal(20, width, seed=width) for width in (3, 4, 5)]
    similar = analysis.cka_map(parts)
    for i, x in enumerate(parts):
        for j, y in enumerate(parts):
            assert float(similar[i, j]) == pytest.approx(analysis.linear_cka(x, y))
    assert analysis.mean_similarity(similar) == pytest.approx(
        float(similar[0, 1] + similar[0, 2] + similar[1, 2]) / 3)


def test_stages_are_pooled_and_the_last_is_what_the_classifier_receives():
    net, x = models.build("resnet14", 3, 10).eval(), torch.randn(6, 3, 32, 32)
    stages = analysis.stage_features(net, x.split(4))
    assert [tuple(stage.shape) for stage in stages] == [(6, 64), (6, 128), (6, 256), (6, 512)]
    assert torch.allclose(stages[3], models.representation(net, x), atol=1e-5)
    first = net.intermediate.layer1(net.extractor(x))
    assert torch.allclose(stages[0], first.mean(dim=(2, 3)), atol=1e-6)


def test_tsne_keeps_neighbours_together():
    far = torch.cat([normal(20, 5), normal(20, 5, seed=1) + 30])
    placed = analysis.tsne(far)
    assert torch.equal(placed, analysis.tsne(far))
    centres = placed[:20].mean(dim=0), placed[20:].mean(dim=0)
    apart = (centres[0] - centres[1]).norm()
    assert apart > 3 * (placed[:20] - centres[0]).norm(dim=1).mean()


def test_points_of_several_sets_are_placed_together_and_each_keeps_its_own():
    far = {"a": normal(20, 5), "b": normal(20, 5, seed=1) + 30, "c": normal(20, 5, seed=2)}
    placed = analysis.scatter(far)
    assert torch.equal(torch.cat(list(placed.values())), analysis.tsne(torch.cat(list(far.values()))))
    a, b, c = (placed[name].mean(dim=0) for name in "abc")
    assert (a - b).norm() > 3 * (a - c).norm()


def test_neighbours_are_of_the_same_set_where_sets_lie_apart_and_of_any_where_they_agree():
    x = normal(90, 6)
    assert analysis.own_neighbours({"a": x, "b": x + 30, "c": x - 30}) == 1
    assert analysis.own_neighbours({"a": x, "b": x, "c": x}) == pytest.approx(1 / 3)
    near = {name: x + 0.5 * normal(90, 6, seed=seed) for seed, name in enumerate("abc", 1)}
    assert analysis.own_neighbours(near) == pytest.approx(1 / 3, abs=0.1)
    scaled = {name: 7 * part + 1 for name, part in near.items()}
    assert analysis.own_neighbours(scaled) == analysis.own_neighbours(near)
    by_hand = 0
    columns = np.concatenate([part.numpy() for part in near.values()])
    columns = columns / columns.std(axis=0)
    for i, row in enumerate(columns):
        others = [j for j in range(270) if j % 90 != i % 90]
        nearest = min(others, key=lambda j: np.linalg.norm(columns[j] - row))
        by_hand += nearest // 90 == i // 90
    assert analysis.own_neighbours(near) == pytest.approx(by_hand / 270)


# ------------------------------------------------------------------------------------ the attack


def isometry(channels: int) -> nn.Module:
    """An extractor that keeps all distances: three channels to more, pixel by pixel."""
    net = nn.Conv2d(3, channels, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(rotation(channels)[:, :3, None, None])
    return net


def test_the_attack_finds_what_an_invertible_extractor_was_given():
    x, net = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), isometry(3)
    found, losses = analysis.reconstruct(net, net(x).detach(), x.shape, torch.Generator(),
                                         steps=300)
    assert torch.allclose(found, x, atol=1e-3)
    assert len(losses) == 300 and losses[-1] < 1e-6 < losses[0]
    assert net.weight.grad is None


def test_of_noise_the_attack_cannot_undo_what_lies_outside_the_extractors_range():
    x, net = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)), isometry(6)
    s_in, rng = net(x).detach(), torch.Generator().manual_seed(0)
    sent = fedin.add_noise(s_in, 0.8, rng)
    _, losses = analysis.reconstruct(net, sent, x.shape, rng, steps=300)
    half = 0.5 * float((0.8 * s_in.std()) ** 2)  # three of six dimensions
    assert losses[-1] == pytest.approx(half, rel=0.03)


def test_total_variation_smooths():
    x, net = torch.zeros(1, 3, 8, 8), isometry(3)
    sent = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    rough, smooth = (analysis.reconstruct(net, sent, x.shape, torch.Generator().manual_seed(0),
                                          steps=100, total_variation=weight)[0]
                     for weight in (0.0, 1.0))
    assert smooth.diff(dim=3).abs().mean() < 0.5 * rough.diff(dim=3).abs().mean()


def test_psnr_of_a_constant_error():
    truth = torch.rand(2, 3, 12, 12)
    assert analysis.psnr(truth + 0.1, truth).tolist() == pytest.approx([20, 20])
    bytes_off = analysis.psnr(255 * truth + 25.5, 255 * truth, peak=255)
    assert bytes_off.tolist() == pytest.approx([20, 20])


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    truth = torch.from_numpy(RNG.random((3, 3, 20, 17)))
    return (0.7 * truth + 0.3 * torch.from_numpy(RNG.random((3, 3, 20, 17)))), truth


def test_ssim_by_hand_window_by_window():
    images, truth = pictures()
    line = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    window, values = np.outer(line, line) / line.sum() ** 2, []
    for channel in range(3):
        for top in range(10):
            for left in range(7):
                x, y = (part[0, channel, top:top + 11, left:left + 11].numpy()
                        for part in (images, truth))
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                variance_x, variance_y = ((window * (part - mean) ** 2).sum()
                                          for part, mean in ((x, mean_x), (y, mean_y)))
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                values.append((2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
                              / (mean_x**2 + mean_y**2 + 1e-4) / (variance_x + variance_y + 9e-4))
    assert float(analysis.ssim(images, truth)[0]) == pytest.approx(np.mean(values))
    assert analysis.ssim(truth, truth).tolist() == pytest.approx([1] * 3)


def test_psnr_and_ssim_are_those_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")  # which this project does not need otherwise
    for peak in (1.0, 255.0):
        images, truth = (peak * part for part in pictures())
        pairs = [[part.numpy() for part in pair] for pair in zip(truth, images)]
        assert analysis.ssim(images, truth, peak).tolist() == pytest.approx([
            metrics.structural_similarity(*pair, data_range=peak, gaussian_weights=True, sigma=1.5,
                                          use_sample_covariance=False, channel_axis=0)
            for pair in pairs])
        assert analysis.psnr(images, truth, peak).tolist() == pytest.approx([
            metrics.peak_signal_noise_ratio(*pair, data_range=peak) for pair in pairs])


# ----------------------------------------------------------------------- overheads and curves


def test_the_rules_give_the_numbers_of_fedins_table_4():
    nets = [models.shapes(arch, 3, 10) for arch in models.MODELS["resnets"]]
    features = 16 * (64 * 8 * 8 + 512)
    for memory, copies, further in ((235.0, 1, 0), (470.0, 2, 0), (705.0, 3, 0),
                                    (235.3, 1, features)):
        assert analysis.memory_mib(nets, copies, further) == pytest.approx(memory, rel=0.002)
    for sent, copies, further in ((12.28, 1, 0), (24.56, 2, 0), (12.35, 1, features)):
        assert analysis.mean_millions(nets, models.is_parameter, further, copies) == pytest.approx(
            sent, rel=0.002)
    whole = models.shapes("resnet152-1", 3, 10)
    assert analysis.memory_mib([whole], 2) == pytest.approx(445.6, rel=0.005)


def test_smoothing_rounds_and_speed():
    assert analysis.smoothed([1, 1, 1], 0.9) == pytest.approx([1, 1, 1])
    assert analysis.smoothed([0, 1, 1, 1], 0.5) == pytest.approx([0, 0.5, 0.75, 0.875])
    assert analysis.smoothed([3, 5], 0) == [3, 5]
    assert analysis.rounds_to_target([4, 8, 12], [10, 30, 20], 30) == 8
    assert analysis.rounds_to_target([4, 8, 12], [10, 30, 20], 31) is None
    assert analysis.speed_up(109, 54) == pytest.approx(2.0185, abs=1e-4)
    assert analysis.speed_up(109, None) is analysis.speed_up(None, 54) is None
    assert analysis.in_order([1, 2, 3], [1, 2, 3]) == (3, 3)
    assert analysis.in_order([1, 2, 3], [3, 2, 1]) == (0, 3)
    assert analysis.in_order([1, 2, 2], [5, 7, 6]) == (2, 2)  # the paper's draw counts for nothing
    assert analysis.in_order([1, 2], [5, 5]) == (0, 1)


# ----------------------------------------------------------------------------- one more round


def test_one_more_round_is_what_the_next_round_would_average(tmp_path, capsys):
    flags = [flag if flag != "0.6" else "1" for flag in [*RESNETS, "--model", "resnet10"]]
    go(tmp_path / "one", *flags, "--rounds", "1")
    go(tmp_path / "two", *flags, "--rounds", "2")

    def left() -> dict:
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                 for path in sorted((tmp_path / "one").iterdir())}
        return files | {"config.json": config(tmp_path / "one")}  # whose order may change

    before = left()
    experiment, updates = analysis.one_more_round(tmp_path / "one")
    assert left() == before
    assert sorted(updates) == list(range(experiment.settings["clients"]))
    states = {k: update.weights for k, update in updates.items()}
    counts = {k: update.num_samples for k, update in updates.items()}
    saved = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["server"]["weights"]
             for run in ("one", "two")]
    mean = models.layerwise_average(saved[0], states, counts)
    for name, tensor in saved[1]["resnet10"].items():
        assert torch.equal(mean["resnet10"][name], tensor), name
    assert not any(torch.equal(states[0][name], tensor) for name, tensor in saved[0][
        "resnet10"].items() if name.endswith("conv1.weight"))


def test_one_more_round_needs_a_run_whose_clients_send_something(tmp_path):
    with pytest.raises(ValueError, match="there is no run"):
        analysis.one_more_round(tmp_path / "none")
    go(tmp_path / "local", *RESNETS, "--model", "cnn", "--method", "local", "--rounds", "1")
    with pytest.raises(ValueError, match="send nothing"):
        analysis.one_more_round(tmp_path / "local")
    assert baselines.METHODS["local"].has_server is False


# ------------------------------------------------------------------- what is asked of a finished run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two architectures, tested on few images."""
    folder = tmp_path_factory.mktemp("runs") / "fedin"
    go(folder, *RESNETS, "--method", "fedin", "--model", "resnets", "--rounds", "1",
       "--train-images", "80", "--clients", "6", "--test-images", "20", "--seed", "3")
    return folder


def test_clients_are_compared_on_the_whole_test_set_before_any_average(trained):
    seen = analysis.look(trained, images=100)
    settings = files.read_config(trained)
    whole = data.load(settings["dataset"])
    assert len(seen.labels) == min(100, len(whole.y_test)) > settings["test_images"]
    experiment, updates = analysis.one_more_round(trained)
    order = [int(name.split(":")[0]) for name in seen.names]
    assert sorted(order) == list(range(6))
    archs = [experiment.clients[k].arch for k in order]
    assert archs == sorted(archs) and [f"{k}: {arch}" for k, arch in zip(order, archs)] == seen.names
    rows = np.linspace(0, len(whole.y_test) - 1, len(seen.labels)).astype(int)
    assert seen.labels.tolist() == whole.y_test[rows].tolist()
    mean, deviation = experiment.statistics
    x, deepest = (whole.x_test[rows] - mean) / deviation, []
    for k in order[:3]:
        net = models.load_network(experiment.clients[k].arch, *experiment.shape, updates[k].weights)
        with torch.no_grad():
            deepest.append(models.representation(net.eval(), x))
    for maps, unbiased in ((seen.maps, False), (seen.unbiased, True)):
        assert len(maps) == 4 and all(tuple(stage.shape) == (6, 6) for stage in maps)
        expected = analysis.cka_map(deepest, unbiased=unbiased)
        assert torch.allclose(maps[3][:3, :3], expected, atol=1e-4)
    assert torch.allclose(seen.features[archs[0]], deepest[0], atol=1e-4)
    assert seen.features.keys() == set(archs)


def test_the_attack_on_a_runs_features_tells_what_the_noise_left(trained):
    before = (trained / "checkpoint.pt").read_bytes()
    truth, plain = analysis.attack(trained, "data", steps=40, level=0.0, count=3)
    again, noisy = analysis.attack(trained, "data", steps=40, level=2.0, count=3)
    whole = data.load(files.read_config(trained)["dataset"])
    assert torch.equal(truth, whole.x_test[:3]) and torch.equal(again, truth)
    assert plain.images.shape == truth.shape and plain.images.dtype == torch.uint8
    assert plain.noise == 0 and plain.losses[-1] < 0.5 * plain.losses[0]
    net = files.trained_network(trained, "resnet18")
    with torch.no_grad():
        s_in = net.net.extractor(net.prepare(truth))
    assert noisy.noise == pytest.approx(4 * float(s_in.var()))
    assert noisy.losses[-1] > 0.2 * noisy.noise > plain.losses[-1]
    error = (plain.images / 255 - truth / 255).square().mean(dim=(1, 2, 3))
    assert plain.psnr == pytest.approx(float((-10 * error.log10()).mean()), abs=0.1)
    assert (trained / "checkpoint.pt").read_bytes() == before
