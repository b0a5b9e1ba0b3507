"""FedIN against its equations: each is computed a second time here, by other means."""

from functools import partial
from itertools import cycle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from tiny import (EPOCHS, LR, adam, check_purity, check_step, double_batch, entropy, same, stream,
                  tiny_data, tiny_net, trimmed_adam, weights)

import baselines
import data
import fedin
import models
from federation import Client

MU = 0.3


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(rows: int = 16, seed: int = 3, dtype=torch.float32) -> fedin.Features:
    """Features of the shapes of TinyNet, as if from other clients."""
    rng = random(seed)
    return tuple(torch.rand(rows, *shape, generator=rng, dtype=dtype)
                 for shape in ((4, 3, 3), (6, 1, 1)))


def update(others: fedin.Features | None, scratch=adam, images=None, **options):
    return fedin.fedin_client_update(*scratch(), fedin.Download(weights(), others),
                                     images or tiny_data(), stream, **EPOCHS | options)


# ----------------------------------------------------------------------------- gradient alleviation

def random_pair(seed: int, agree: bool):
    """Two gradients whose dot product has the wanted sign."""
    inner, local = torch.randn(2, 4, 5, generator=random(seed), dtype=torch.float64)
    return inner, local if ((inner * local).sum() >= 0) == agree else -local


@pytest.mark.parametrize("seed", range(3))
def test_projection_keeps_a_gradient_that_does_not_oppose(seed):
    inner, local = random_pair(seed, agree=True)
    assert torch.equal(fedin.project_gradient(inner, local), inner)
    assert torch.equal(fedin.project_gradient(inner, 0 * local), inner)


@pytest.mark.parametrize("seed", range(3))
def test_projection_solves_the_papers_optimisation_problem(seed):
    inner, local = random_pair(seed, agree=False)
    z = fedin.project_gradient(inner, local)
    assert (z * local).sum().item() == pytest.approx(0, abs=1e-12)
    g_in, g_local = inner.flatten().numpy(), local.flatten().numpy()
    solved = minimize(lambda v: ((g_in - v) ** 2).sum(), np.zeros_like(g_in),
                      jac=lambda v: 2 * (v - g_in), method="SLSQP", tol=1e-12,
                      constraints={"type": "ineq", "fun": lambda v: v @ g_local,
                                   "jac": lambda v: g_local})  # Eq. 9
    assert solved.success
    np.testing.assert_allclose(z.flatten().numpy(), solved.x, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_projection_survives_gradients_whose_squares_do_not(scale):
    inner, local = (tensor.float() for tensor in random_pair(0, agree=False))
    expected = fedin.project_gradient(inner, local)
    torch.testing.assert_close(fedin.project_gradient(inner, scale * local), expected)
    torch.testing.assert_close(fedin.project_gradient(scale * inner, local) / scale, expected)


def test_projected_gradients_keep_the_memory_layout_that_fused_adam_relies_on():
    model, images = tiny_net().to(memory_format=torch.channels_last), tiny_data()
    F.cross_entropy(model(images.prepare(images.images)), images.labels).backward()
    theirs_in, theirs_out = features()
    fedin.set_projected_gradients(model.intermediate,
                                  F.mse_loss(model.intermediate(theirs_in), theirs_out))
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()


# ----------------------------------------------------------------------------------------- one step

X, Y = double_batch()
THEIRS = features(dtype=torch.float64)
NOISE = tuple(torch.randn(8, *s.shape[1:], generator=random(1), dtype=torch.float64)
              for s in THEIRS)
START = {name: tensor.double() for name, tensor in weights(2).items()}
QUIET = {"noise": 0.0, "z": None}
NOISY = {"noise": 0.8, "z": NOISE}


def local_loss(net, noise, z):
    """L_local of Eq. 3, and its first term, with noise on both ends of the intermediate layers."""
    s_in = net.extractor(X)
    if z is not None:
        s_in = s_in + noise * s_in.detach().std() * z[0]
    s_out = net.intermediate(s_in)
    if z is not None:
        s_out = s_out + noise * s_out.detach().std() * z[1]
    distance = sum((parameter - START[name]).square().sum()
                   for name, parameter in net.named_parameters())
    loss = entropy(net.classifier(s_out), Y)
    return loss + MU / 2 * distance, loss


def in_loss(net):
    """L_IN of Eq. 7."""
    return (net.intermediate(THEIRS[0]) - THEIRS[1]).square().mean()


def fedin_step(*scratch, others, noise, z, projection):
    return fedin.fedin_step(*scratch, X, Y, others, z, START, mu=MU, noise=noise,
                            projection=projection)


@pytest.mark.parametrize("noise", [QUIET, NOISY])
@pytest.mark.parametrize("projection, share", [("simplified", 0.5), ("sum", 1.0)])
def test_a_step_descends_the_in_loss_and_a_share_of_the_local_one(projection, share, noise):
    def objective(net):
        whole, loss = local_loss(net, **noise)
        return in_loss(net) + share * whole, loss

    check_step(partial(fedin_step, others=THEIRS, projection=projection, **noise),
               tiny_net(1).double(), objective)


@pytest.mark.parametrize("noise", [QUIET, NOISY])
@pytest.mark.parametrize("projection", fedin.LOCAL_SHARE)
def test_a_step_without_features_descends_the_whole_local_loss(projection, noise):
    check_step(partial(fedin_step, others=None, projection=projection, **noise),
               tiny_net(1).double(), partial(local_loss, **noise))


@pytest.mark.parametrize("noise", [QUIET, NOISY])
def test_an_exact_step_replaces_the_intermediate_gradients_by_those_of_eq_12(noise):
    model, twin = tiny_net(1).double(), tiny_net(1).double()
    names = [name for name, _ in twin.named_parameters()]
    whole, loss = local_loss(twin, **noise)
    gradients = dict(zip(names, torch.autograd.grad(whole, list(twin.parameters()))))
    inner = torch.autograd.grad(in_loss(twin), list(twin.intermediate.parameters()))
    signs = set()
    for name, g_in in zip((name for name in names if name.startswith("intermediate.")), inner):
        a, b = gradients[name].square().sum(), (gradients[name] * g_in).sum()
        signs.add(bool(b < 0))
        gradients[name] = g_in if b >= 0 else g_in - b / a * gradients[name]

    reported = fedin_step(model, torch.optim.SGD(model.parameters(), lr=LR), others=THEIRS,
                          projection="exact", **noise)
    assert not reported.requires_grad and signs == {True, False}
    torch.testing.assert_close(reported, loss.detach())
    for (name, parameter), old in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(parameter, old - LR * gradients[name])


@pytest.mark.parametrize("projection", fedin.LOCAL_SHARE)
def test_a_step_without_features_and_noise_is_fedproxs_bit_for_bit(projection):
    ours, theirs = tiny_net(1).double(), tiny_net(1).double()
    reported = fedin_step(ours, torch.optim.Adam(ours.parameters()), others=None,
                          projection=projection, **QUIET)
    loss = baselines.fedprox_step(theirs, torch.optim.Adam(theirs.parameters()), X, Y, START, mu=MU)
    assert torch.equal(reported, loss)
    assert same(models.copy_state(ours), models.copy_state(theirs))


# ------------------------------------------------------------------------------------ client update

@pytest.mark.parametrize("projection", fedin.LOCAL_SHARE)
@pytest.mark.parametrize("mu", [0.0, 0.1])
def test_without_features_fedin_is_fedprox(projection, mu):
    prox = baselines.fedprox_client_update(*adam(), weights(), tiny_data(), stream, mu=mu, **EPOCHS)
    for others in (None, tuple(tensor[:1] for tensor in features())):  # one row makes no batch
        ours = update(others, projection=projection, mu=mu)
        assert same(ours.update.weights, prox.update.weights) and ours.loss == prox.loss


@pytest.mark.parametrize("noise", [0.0, 0.8])
@pytest.mark.parametrize("others", [None, features(17)])
@pytest.mark.parametrize("noise_on", ["features", "upload"])
def test_an_update_is_the_loop_of_its_step_written_out(noise, others, noise_on):
    options = {"mu": MU, "noise": noise, "noise_on": noise_on, "feature_batch_size": 8}
    ours, trimmed = update(others, **options), update(others, trimmed_adam, **options)
    (model, optimizer), rng, total = adam(), stream(data.NOISE), 0.0
    model.load_state_dict(weights())
    # A last row alone is left out; the batches of features take turns.
    turns = cycle([[tensor[rows] for tensor in others] for rows in (slice(0, 8), slice(8, 16))]
                  if others else [None])
    for (rows,) in data.batches(tiny_data(), 8, 2, stream(data.BATCHES)):
        (x, y), z = tiny_data().batch(rows), None
        if noise > 0 and noise_on == "features":
            z = [torch.randn(len(x), *shape, generator=rng) for shape in ((4, 3, 3), (6, 1, 1))]
        loss = fedin.fedin_step(model, optimizer, x, y, next(turns), z, weights(), mu=MU,
                                noise=noise, projection="simplified")
        total += loss.item() * len(y)
    assert same(ours.update.weights, models.copy_state(model))
    assert ours.loss == pytest.approx(total) and ours.samples == 40
    torch.testing.assert_close(trimmed.update, ours.update, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"noise": 0.8, "projection": "exact"}])
def test_an_update_is_pure(options):
    check_purity(fedin.fedin_client_update, fedin.Download(weights(), features()), **options)


# ------------------------------------------------------------------------------- noise and features

def test_noise_has_the_standard_deviation_of_the_features_and_no_gradient_of_it():
    s = (5 * torch.rand(64, 8, generator=random()) + torch.arange(8.0)).requires_grad_()
    z = torch.randn(64, 8, generator=random(1))
    noisy = fedin.add_noise(s, 0.8, z)
    torch.testing.assert_close(noisy, s + 0.8 * s.std() * z)
    noisy.sum().backward()
    assert torch.equal(s.grad, torch.ones(64, 8))


@pytest.mark.parametrize("noise", [0.0, 0.8])
@pytest.mark.parametrize("noise_on", ["features", "upload"])
def test_uploaded_features_are_those_of_the_trained_model_on_its_own_images(noise, noise_on):
    result = update(features(), noise=noise, noise_on=noise_on)
    model, images = tiny_net(1).eval(), tiny_data()
    model.load_state_dict(result.update.weights)
    rows = images.indices[torch.randperm(20, generator=stream(data.FEATURE_BATCH))[:16]]
    rng = stream(data.FEATURE_NOISE)
    clean = model.extractor(images.prepare(images.images[rows]))
    sent_in = clean + noise * clean.std() * torch.randn(clean.shape, generator=rng)
    s_out = model.intermediate(sent_in if noise_on == "features" else clean)
    sent_out = s_out + noise * s_out.std() * torch.randn(s_out.shape, generator=rng)
    torch.testing.assert_close(result.update.features, (sent_in.detach(), sent_out.detach()))
    assert not any(tensor.requires_grad for tensor in result.update.features)


@pytest.mark.parametrize("count, options, rows", [
    (5, {}, 5), (20, {"feature_batch_size": 4, "feature_batches": 2}, 8)])
def test_a_client_sends_as_many_features_as_asked_or_as_it_has_images(count, options, rows):
    result = update(None, images=tiny_data(count), **options)
    assert [len(tensor) for tensor in result.update.features] == [rows, rows]


def test_one_batch_of_features_of_the_resnets_costs_73728_floats():
    with torch.device("meta"):
        net = models.RESNETS["resnet10"](3, 10)
        shapes = fedin.feature_shapes(net, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert sum(s.numel() for s in shapes) * fedin.FEATURE_BATCH_SIZE == 73_728


# ------------------------------------------------------------------------------ download and server

def uploads(owners, rows: int = 6) -> dict:
    """Uploads whose features name their owner and row."""
    made = {}
    for k in owners:
        mark = 100 * k + torch.arange(rows, dtype=torch.float32).view(-1, 1, 1, 1)
        pair = (mark.expand(rows, 4, 3, 3).clone(), mark.expand(rows, 6, 1, 1).clone())
        made[k] = fedin.Upload(weights(k), 10 + k, pair)
    return made


def served(owners) -> dict:
    return fedin.fedin_server_update(fedin.fedin_init({"tiny": weights()}), uploads(owners))


def download(server, k: int, seed: int = 0, **options):
    return fedin.fedin_download(server, Client(k, torch.arange(2), "tiny"),
                                partial(stream, seed=seed, client=k), **options)


@pytest.mark.parametrize("seed", range(3))
def test_a_client_receives_rows_of_several_others_never_its_own_none_twice(seed):
    received = download(served([2, 5, 7]), 5, seed, feature_batch_size=4, feature_batches=2)
    marks = received.features[0][:, 0, 0, 0]
    assert torch.equal(marks, received.features[1][:, 0, 0, 0])  # pairs stay pairs
    assert len(marks) == 8 == len(marks.unique())
    assert (marks // 100).unique().tolist() == [2, 7]
    bystander = download(served([2, 5, 7]), 1, seed, feature_batch_size=64)
    assert len(bystander.features[0]) == 18  # all there is
    assert same(received.weights, served([2, 5, 7])["weights"]["tiny"])


def test_there_is_nothing_to_receive_in_round_one_or_without_other_uploads():
    assert download(fedin.fedin_init({"tiny": weights()}), 0).features is None
    assert download(served([3]), 3).features is None
    silent = update(None, feature_batches=0).update
    assert silent.features is None
    server = fedin.fedin_server_update(served([3]), {0: silent})
    assert server["pool"] == {} and download(server, 1).features is None


def test_the_pool_holds_the_last_rounds_features_whatever_their_order_of_arrival():
    made, server = uploads([2, 5, 7]), fedin.fedin_init({"tiny": weights()})
    forth = fedin.fedin_server_update(server, made)
    back = fedin.fedin_server_update(server, {k: made[k] for k in (7, 2, 5)})
    assert same(forth["pool"], back["pool"]) and server["pool"] == {}
    plain = baselines.fedavg_server_update(server, made)["weights"]["tiny"]
    assert same(forth["weights"]["tiny"], plain) and same(back["weights"]["tiny"], plain)
    later = fedin.fedin_server_update(forth, uploads([4]))
    assert later["pool"]["owner"].tolist() == [4] * 6
