"""The analyses against independent calculations, closed forms and invariances."""

import shutil
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import FEW, FEW_DIGITS, config, go, lines, make_small, participants
from tiny import alike, few_digits
from torch import nn

import analysis
import data
import fedin
import files
import models
import widths

FLAGS = [*FEW_DIGITS, *("--model cnn --train-images 72 --clients 3 --participation 0.67 --lr 2e-3 "
                        "--local-epochs 1 --partition iid --batch-size 12 --rounds 1").split()]
RESNET = ["--train-images", "48", "--clients", "2", "--model"]
RUNS = {name: ["--method", name] for name in ("scaffold", "local", "fedavg-ft")} | {
    "apfl": ["--method", "apfl", "--beta", "0.4", *FEW],
    "fedin": ["--method", "fedin", *RESNET, "resnet18"],
    "heterofl": ["--method", "heterofl", *RESNET, "resnet18-widths"]}


@pytest.fixture
def folder_of(run_of, monkeypatch):
    """Function from the name of a run to its folder."""
    make_small(monkeypatch)
    return lambda name: run_of(*FLAGS, *RUNS[name])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=9))[0]


# --------------------------------------------------------------------------- similarity of networks

def test_a_map_is_linear_cka_of_centred_kernels_and_its_mean_leaves_out_the_diagonal():
    parts = [normal(30, 5), normal(30, 8, seed=1), normal(30, 6, seed=2)]
    parts[1][:, :3] += parts[0][:, :3]
    similar, centre = analysis.cka_map(parts), np.eye(30) - 1 / 30
    kernels = [centre @ (x @ x.T).numpy() @ centre for x in parts]
    hsic = np.array([[(k * m).sum() for k in kernels] for m in kernels])
    expected = hsic / np.sqrt(np.outer(hsic.diagonal(), hsic.diagonal()))
    assert np.allclose(similar.numpy(), expected)
    pairs = expected[np.triu_indices(3, 1)]
    assert analysis.mean_similarity(similar) == pytest.approx(pairs.mean())


def test_unbiased_hsic_is_the_mean_over_four_different_images():
    x, y = normal(6, 3), normal(6, 2, seed=1)
    k, m = (x @ x.T).numpy(), (y @ y.T).numpy()
    terms = [k[t, u] * (m[t, u] + m[v, w] - 2 * m[t, v])
             for t, u, v, w in permutations(range(6), 4)]
    centred = x - x.mean(dim=0), y - y.mean(dim=0)
    assert float(analysis.hsic(*centred, unbiased=True)) == pytest.approx(np.mean(terms))


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_knows_no_rotation_scale_or_shift(unbiased):
    x, y = normal(40, 6), normal(40, 4, seed=1) + normal(40, 6)[:, :4]
    squeezed = x * torch.tensor([1, 1, 1, 1, 1, 100.0])  # no rotation
    similar = analysis.cka_map([x, 3 * x @ rotation(6) + 5, y, squeezed], unbiased=unbiased)
    assert [*similar.diagonal(), similar[0, 1]] == pytest.approx([1] * 5)
    assert similar[0, 2] == pytest.approx(similar[1, 2]) and 0.1 < similar[0, 2] < 0.9
    assert abs(similar[3, 2] - similar[0, 2]) > 0.05


def test_for_independent_features_biased_cka_is_high_and_unbiased_cka_is_none():
    pairs = [(normal(50, 50, seed=i), normal(50, 50, seed=100 + i)) for i in range(10)]
    biased, unbiased = (np.mean([analysis.cka_map(pair, unbiased=flag)[0, 1] for pair in pairs])
                        for flag in (False, True))
    assert biased == pytest.approx(50 / 100, abs=0.02) and abs(unbiased) < 0.02


def test_stages_are_pooled_and_the_last_is_the_classifiers_input():
    net, x = models.RESNETS["resnet10"](3, 10).eval(), torch.randn(6, 3, 32, 32)
    stages = analysis.stage_features(net, x.split(4))
    assert [tuple(stage.shape) for stage in stages] == [(6, 64), (6, 128), (6, 256), (6, 512)]
    assert torch.allclose(stages[3], models.representation(net, x), atol=1e-5)
    first = net.intermediate.layer1(net.extractor(x))
    assert torch.allclose(stages[0], first.mean(dim=(2, 3)), atol=1e-6)


def test_tsne_places_sets_together_and_keeps_neighbours_together():
    far = {"a": normal(10, 5), "b": normal(8, 5, seed=1) + 30, "c": normal(9, 5, seed=2)}
    points = analysis.tsne(far, perplexity=5)
    a, b, c = (points[name].mean(dim=0) for name in "abc")
    assert (a - b).norm() > 3 * max((a - c).norm(), (points["b"] - b).norm(dim=1).mean())


def test_features_of_dead_and_diverged_networks_have_their_answers():
    dead = {"a": torch.ones(40, 5), "b": torch.ones(40, 5)}
    assert all(not points.any() and points.shape == (40, 2)
               for points in analysis.tsne(dead).values())
    with pytest.raises(ValueError, match="has the run diverged"):
        analysis.tsne(dead | {"b": torch.full((40, 5), torch.nan)})
    assert analysis.cka_map([normal(40, 5), dead["a"]])[0].tolist() == pytest.approx([1, 0])


def test_neighbours_are_of_their_own_set_where_sets_lie_apart_and_of_any_where_they_agree():
    x = normal(90, 6)
    assert analysis.own_neighbours({"a": x, "b": x + 30, "c": x - 30}) == 1
    near = {name: x + 0.5 * normal(90, 6, seed=seed) for seed, name in enumerate("abc", 1)}
    share = analysis.own_neighbours(near)
    assert share == analysis.own_neighbours({name: 7 * part + 1 for name, part in near.items()})
    columns, count = torch.cat(list(near.values())).numpy(), 0
    for i in range(270):
        distance = np.linalg.norm((columns - columns[i]) / columns.std(axis=0), axis=1)
        distance[i % 90::90] = np.inf
        count += distance.argmin() // 90 == i // 90
    assert share == pytest.approx(count / 270) and abs(share - 1 / 3) < 0.1


# ----------------------------------------------------------------------- an attack on sent features

def test_the_attack_finds_the_images_behind_an_invertible_extractor():
    x, start = (torch.randn(2, 3, 4, 4, generator=rng(seed)) for seed in (1, 0))
    net = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(rotation(3)[..., None, None])  # pixel by pixel, which keeps all distances
        sent = net(x)
    images, losses = analysis.reconstruct(net, sent, x.shape, rng(), steps=250)
    assert torch.allclose(images, x, atol=1e-2) and len(losses) == 250 and losses[-1] < 1e-6
    assert losses[0] == pytest.approx(float((start - x).square().mean()), rel=1e-5)
    assert net.weight.grad is None

    # On the way to a far target, a step of Adam is as long as its learning rate.
    images, _ = analysis.reconstruct(nn.Identity(), start + 1000, x.shape, rng(), steps=20)
    way = sum(0.1 * (1 + np.cos(np.pi * t / 20)) / 2 for t in range(20))
    assert np.allclose(images - start, way, rtol=1e-3)


def test_psnr_of_a_constant_error_and_ssim_by_hand_window_by_window():
    truth, noise = torch.from_numpy(np.random.default_rng(0).random((2, 2, 3, 20, 17)))
    images = 0.7 * truth + 0.3 * noise
    assert analysis.psnr(truth + 0.1, truth).tolist() == pytest.approx([20, 20])
    line, values = np.exp(-np.arange(-5, 6) ** 2 / 4.5), []
    window = np.outer(line, line) / line.sum() ** 2
    for channel, top, left in np.ndindex(3, 10, 7):
        x, y = (part[1, channel, top:top + 11, left:left + 11].numpy() for part in (images, truth))
        mean_x, mean_y = (window * x).sum(), (window * y).sum()
        (xx, xy), (_, yy) = np.cov(x.flat, y.flat, ddof=0, aweights=window.flat)
        values.append((2 * mean_x * mean_y + 1e-4) * (2 * xy + 9e-4)
                      / (mean_x**2 + mean_y**2 + 1e-4) / (xx + yy + 9e-4))
    assert float(analysis.ssim(images, truth)[1]) == pytest.approx(np.mean(values))
    assert analysis.ssim(truth, truth).tolist() == pytest.approx([1, 1])


# ------------------------------------------------------------------------------- costs and curves

def test_the_rules_give_the_numbers_of_fedins_table_4():
    nets = [models.shapes(partial(make, 3, 10)) for make in models.RESNETS.values()]
    features = 16 * (64 * 8 * 8 + 512)
    for memory, sent, copies, further in (  # SCAFFOLD sends two copies, FedIN a batch of features
            (235.0, 12.28, 1, 0), (470.0, 24.56, 2, 0), (235.3, 12.35, 1, features)):
        assert analysis.memory_mib(nets, copies, further) == pytest.approx(memory, rel=0.002)
        assert analysis.mean_millions(nets, models.is_parameter, further, copies) == pytest.approx(
            sent, rel=0.002)
    whole = models.shapes(partial(widths.MODELS["resnet152-widths"]["resnet152-1"], 3, 10))
    assert analysis.memory_mib([whole], 2) == pytest.approx(445.6, rel=0.005)


def test_smoothing_rounds_and_speed():
    assert analysis.smoothed([0, 1, 1, 1], 0.25) == pytest.approx([0, 3 / 4, 15 / 16, 63 / 64])
    assert analysis.rounds_to_target([4, 8, 12], [10, 30, 20], 30) == 8
    assert analysis.rounds_to_target([4, 8, 12], [10, 30, 20], 31) is None
    pairs = (9, 4), (9, None), (None, 4)
    assert [analysis.speed_up(*pair) for pair in pairs] == [2.25, None, None]
    assert analysis.in_order([1, 2, 2], [5, 7, 6]) == (2, 2)  # the paper's draw counts for nothing
    assert analysis.in_order([1, 2, 3], [3, 1, 3]) == (1, 3)  # a draw in ours is out of order


# ------------------------------------------------------------------------ trained networks of a run

def right(net: nn.Module) -> float:
    """Accuracy on the test images, percent."""
    whole = data.load(few_digits())
    return 100 * float((net(whole.x_test).argmax(1) == whole.y_test).double().mean())


@pytest.mark.parametrize("name", RUNS)
def test_the_trained_networks_are_those_that_were_evaluated(name, folder_of):
    folder = folder_of(name)
    last, nets = lines(folder)[-1], [analysis.trained_network(folder, client=k)
                                     for k in range(config(folder)["clients"])]
    assert np.mean([right(net) for net in nets]) == pytest.approx(last["accuracy"])
    assert nets[0].classes == [str(digit) for digit in range(10)]
    for kind in last.keys() & {"global_accuracy", "full_accuracy"}:
        assert right(analysis.trained_network(folder)) == pytest.approx(last[kind])
    if name == "heterofl":
        assert right(analysis.trained_network(folder, "resnet18-1/4")) == right(nets[1])


def test_questions_that_a_run_cannot_answer_are_errors(folder_of, tmp_path):
    local, network, more = folder_of("local"), analysis.trained_network, analysis.one_more_round
    for ask, folder, choice, words in (
            (network, local, {}, "clients alone"), (network, local, {"client": 3}, "of 3 clients"),
            (network, local, {"arch": "cnn", "client": 0}, "architecture alone"),
            (network, folder_of("scaffold"), {"arch": "resnet10"}, "choose one of cnn"),
            (more, local, {}, "clients send nothing"), (more, tmp_path, {}, "there is no run")):
        with pytest.raises(ValueError, match=words):
            ask(folder, **choice)
    for images, words in ((torch.zeros(2, 1, 32, 32), "must be uint8 of shape"),
                          (torch.zeros(0, 1, 32, 32, dtype=torch.uint8), "N > 0"),
                          (np.zeros((2, 1, 32, 32), np.uint8), "a tensor, not ndarray")):
        with pytest.raises(ValueError, match=words):
            network(local, client=0)(images)


@pytest.mark.parametrize("name, done", [("fedavg-ft", []), ("apfl", ["late", "generator"])])
def test_clients_have_no_final_network_while_a_stage_is_left(name, done, folder_of, tmp_path):
    shutil.copytree(folder_of(name), tmp_path, dirs_exist_ok=True)
    saved = files.load_checkpoint(tmp_path, "cpu")
    files.save_checkpoint(tmp_path, saved._replace(
        stage_results={stage: saved.stage_results[stage] for stage in done}))
    analysis.trained_network(tmp_path)
    with pytest.raises(ValueError, match="is not at its end"):
        analysis.trained_network(tmp_path, client=0)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="is not at its end"):
        analysis.trained_network(tmp_path)


# ------------------------------------------------------------- clients before an average, an attack

def contents(folder: Path) -> dict:
    files_of_run = {part.name: part.read_bytes() for part in folder.iterdir()}
    return files_of_run | {"config.json": config(folder)}  # in any order


def test_one_more_round_has_the_uploads_of_the_next_round(folder_of, tmp_path):
    before = contents(folder_of("scaffold"))
    experiment, updates = analysis.one_more_round(folder_of("scaffold"))
    assert contents(folder_of("scaffold")) == before and sorted(updates) == [0, 1, 2]

    go(tmp_path / "two", *FLAGS, *RUNS["scaffold"], "--rounds", "2")
    first, second = (files.load_checkpoint(folder, "cpu").server
                     for folder in (folder_of("scaffold"), tmp_path / "two"))
    drawn = participants(experiment.settings, 2)
    assert len(drawn) == 2
    assert alike(experiment.method.server_update(first, {k: updates[k] for k in drawn}), second)


def test_a_run_is_looked_at_from_anywhere_with_data_that_have_moved(tmp_path, monkeypatch):
    moved, gone = tmp_path / "moved.npz", tmp_path / "gone.npz"
    shutil.copy(few_digits(), gone)
    go(tmp_path / "run", *FLAGS, "--method", "scaffold", "--dataset", str(gone))
    gone.rename(moved)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match="in Python dataset="):
        analysis.one_more_round(tmp_path / "run")
    _, updates = analysis.one_more_round(tmp_path / "run", dataset=moved, device="cpu")
    assert len(updates) == 3
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}


def test_questions_that_fit_no_client_are_refused_before_the_round(folder_of, monkeypatch):
    monkeypatch.setattr(analysis, "train_clients", None)
    with pytest.raises(ValueError, match="no client of .* has resnet10, resnet14$"):
        analysis.scattered({("a", "b"): folder_of("fedin")}, count=3, label=None,
                           archs=("resnet10", "resnet14", "resnet18"))
    with pytest.raises(ValueError, match="only ResNets have stages"):
        analysis.compare_clients(folder_of("scaffold"))


def test_clients_are_compared_on_the_whole_test_set(folder_of, monkeypatch):
    # Three clients of two networks, in a run that was tested on five images
    experiment, _ = analysis.one_more_round(folder_of("scaffold"))
    archs, whole = ["resnet10", "resnet10", "resnet14"], data.load(few_digits())
    networks = {arch: partial(models.RESNETS[arch], 1, 10) for arch in archs}
    nets = [networks[arch]().eval() for arch in archs]
    experiment = experiment._replace(
        data=whole._replace(x_test=whole.x_test[:5]), networks=networks,
        clients=[experiment.clients[0]._replace(arch=arch) for arch in archs])
    updates = {k: fedin.Upload(nets[k].state_dict(), 1, None) for k in (2, 0, 1)}
    monkeypatch.setattr(analysis, "one_more_round", lambda folder: (experiment, updates))
    monkeypatch.setattr(files, "read_config", lambda folder: {"model": "resnets"})
    compared = analysis.compare_clients("", images=30)

    rows = np.linspace(0, len(whole.y_test) - 1, 30).astype(int)
    assert compared.labels.tolist() == whole.y_test[rows].tolist()
    assert compared.names == ["0: resnet10", "1: resnet10", "2: resnet14"]
    x = data.standardise(whole.x_test[rows], *experiment.statistics)
    deepest = [models.representation(net, x).detach() for net in nets]
    for maps, unbiased in ((compared.maps, False), (compared.unbiased, True)):
        assert [stage.shape for stage in maps] == [(3, 3)] * 4
        assert torch.allclose(maps[3], analysis.cka_map(deepest, unbiased=unbiased), atol=1e-4)
    for arch, features in (("resnet10", deepest[0]), ("resnet14", deepest[2])):
        assert torch.allclose(compared.features[arch], features, atol=1e-4)


def test_the_attack_on_a_runs_features_tells_what_the_noise_left(folder_of):
    before, first_images = contents(folder_of("fedin")), data.load(few_digits()).x_test[:2]
    (truth, plain), (_, noisy) = (analysis.attack(folder_of("fedin"), steps=30, level=level,
                                                  count=2) for level in (0.0, 2.0))
    assert torch.equal(truth, first_images) and contents(folder_of("fedin")) == before
    assert plain.noise == 0 and plain.losses[-1] < 0.5 * plain.losses[0]
    net = analysis.trained_network(folder_of("fedin"), "resnet18")
    s_in = net.net.extractor(net.prepare(truth)).detach()
    assert noisy.noise == pytest.approx(4 * float(s_in.var()))
    assert noisy.losses[-1] > 0.2 * noisy.noise > plain.losses[-1]
    similar = [float(measure(plain.images / 255, truth / 255).mean())
               for measure in (analysis.psnr, analysis.ssim)]
    assert [plain.psnr, plain.ssim] == pytest.approx(similar, rel=0.02)
