"""FedIN against its equations: each is computed a second time here, by other means."""

import copy
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from tiny import adam, same, sgd, stream, tiny_data, tiny_net

import baselines
import data
import fedin
import models
from baselines import Client

EPOCHS = {"local_epochs": 2, "batch_size": 8}


def weights(seed: int = 5) -> dict:
    return models.copy_state(tiny_net(seed))


def features(rows: int = 16, seed: int = 3) -> fedin.Features:
    """Features of the shapes of the tiny network, as if from other clients."""
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 4, 3, 3, generator=rng), torch.rand(rows, 6, 1, 1, generator=rng)


def update(received, make=adam, own=None, **options):
    return fedin.fedin_client_update(*make(), received, own or tiny_data(), stream,
                                     **(EPOCHS | options))


# ------------------------------------------------------------------------ gradient alleviation


def random_pair(seed: int, agree: bool):
    """Two gradients whose dot product has the wanted sign."""
    rng = torch.Generator().manual_seed(seed)
    inner, local = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)
    if ((inner * local).sum() >= 0) != agree:
        local = -local
    return inner, local


@pytest.mark.parametrize("seed", range(5))
def test_projection_keeps_a_gradient_that_does_not_oppose(seed):
    inner, local = random_pair(seed, agree=True)
    assert torch.equal(fedin.project_gradient(inner, local), inner)


@pytest.mark.parametrize("seed", range(5))
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


def test_projection_on_a_zero_gradient_is_the_identity():
    inner = torch.randn(3, 3)
    assert torch.equal(fedin.project_gradient(inner, torch.zeros(3, 3)), inner)


def test_projection_weight_by_weight_differs_from_that_of_the_whole_vector():
    a_in, a_local = random_pair(0, agree=True)
    b_in, b_local = random_pair(1, agree=False)
    inner, local = {"a": a_in, "b": 9 * b_in}, {"b": 9 * b_local, "a": a_local, "elsewhere": a_in}
    apart = fedin.project_gradients(inner, local)
    assert torch.equal(apart["a"], a_in)
    assert torch.equal(apart["b"], fedin.project_gradient(9 * b_in, 9 * b_local))
    whole = fedin.project_gradients(inner, local, whole=True)
    flat = fedin.project_gradient(torch.cat([a_in.flatten(), 9 * b_in.flatten()]),
                                  torch.cat([a_local.flatten(), 9 * b_local.flatten()]))
    assert torch.equal(torch.cat([whole["a"].flatten(), whole["b"].flatten()]), flat)
    assert not torch.equal(whole["a"], a_in) and whole["b"].shape == b_in.shape


def steps_by_hand(received, own, mu, lr, combine):
    """FedIN's local steps with SGD, from two backward passes a step and a rule for Z (Eq. 3, 7)."""
    model = tiny_net(1)
    model.load_state_dict(received.weights)
    names = [name for name, _ in model.named_parameters()]
    theirs_in, theirs_out = received.features
    for x, y in data.batches(own, 8, 2, stream(data.BATCHES)):
        distance = sum(((parameter - received.weights[name]) ** 2).sum()
                       for name, parameter in model.named_parameters())
        l_local = F.cross_entropy(model(x), y) + mu / 2 * distance
        local = dict(zip(names, torch.autograd.grad(l_local, list(model.parameters()))))
        l_in = ((model.intermediate(theirs_in) - theirs_out) ** 2).mean()
        inner = torch.autograd.grad(l_in, list(model.intermediate.parameters()))
        inner = dict(zip([name for name in names if name.startswith("intermediate.")], inner))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= lr * combine(inner.get(name), local[name])
    return models.copy_state(model)


def eq_13(g_in, g_local):
    return 0.5 * g_local if g_in is None else g_in + 0.5 * g_local


def plain_sum(g_in, g_local):
    return g_local if g_in is None else g_in + g_local


def eq_12(g_in, g_local):
    if g_in is None:
        return g_local
    a, b = (g_local * g_local).sum(), (g_local * g_in).sum()
    return g_in if b >= 0 else g_in - b / a * g_local


@pytest.mark.parametrize("projection, combine",
                         [("simplified", eq_13), ("exact", eq_12), ("sum", plain_sum)])
def test_local_steps_follow_the_equations(projection, combine):
    received = fedin.Received(weights(), features())
    ours = update(received, sgd, projection=projection, mu=0.3)
    by_hand = steps_by_hand(received, tiny_data(), mu=0.3, lr=0.1, combine=combine)
    for name, tensor in by_hand.items():
        torch.testing.assert_close(ours.update.weights[name], tensor, rtol=1e-4, atol=1e-6)


def test_one_step_of_eq_13_descends_the_gradient_of_l_in_plus_half_l_local():
    received, own = fedin.Received(weights(), features()), tiny_data()
    ours = update(received, lambda: sgd(lr=1.0), local_epochs=1, batch_size=20)
    model = tiny_net(1)
    model.load_state_dict(received.weights)
    (x, y), = data.batches(own, 20, 1, stream(data.BATCHES))
    theirs_in, theirs_out = received.features
    l_in = F.mse_loss(model.intermediate(theirs_in), theirs_out)
    (l_in + F.cross_entropy(model(x), y) / 2).backward()  # the proximal term is zero at first
    for name, parameter in model.named_parameters():
        step = received.weights[name] - ours.update.weights[name]
        torch.testing.assert_close(step, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_projected_gradients_keep_the_memory_layout_that_fused_adam_relies_on(whole):
    model = tiny_net().to(memory_format=torch.channels_last)
    own, (theirs_in, theirs_out) = tiny_data(), features()
    F.cross_entropy(model(own.prepare(own.images)), own.labels).backward()
    l_in = F.mse_loss(model.intermediate(theirs_in), theirs_out)
    fedin.set_projected_gradients(model.intermediate, l_in, whole)
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()


# ------------------------------------------------------------------------- degenerate cases


@pytest.mark.parametrize("projection", ["simplified", "exact", "sum"])
@pytest.mark.parametrize("mu", [0.0, 0.1])
def test_without_features_fedin_is_fedprox(projection, mu):
    prox = baselines.fedprox_client_update(*adam(), weights(), tiny_data(), stream, mu=mu, **EPOCHS)
    ours = update(fedin.Received(weights(), None), projection=projection, mu=mu)
    assert same(ours.update.weights, prox.update.weights) and ours.loss == prox.loss


def test_features_that_cannot_make_a_batch_are_no_features():
    lone = tuple(tensor[:1] for tensor in features())
    with_lone = update(fedin.Received(weights(), lone))
    assert same(with_lone.update.weights, update(fedin.Received(weights(), None)).update.weights)


def test_features_change_the_intermediate_layers_alone_in_the_first_step():
    one_step = {"local_epochs": 1, "batch_size": 20, "make": sgd, "projection": "sum"}
    plain = update(fedin.Received(weights(), None), **one_step).update.weights
    trained = update(fedin.Received(weights(), features()), **one_step).update.weights
    for name, _ in tiny_net().named_parameters():
        moved = not torch.equal(plain[name], trained[name])
        assert moved == name.startswith("intermediate."), name


def test_own_function_as_target_gives_no_in_gradient():
    state, one_step = weights(), {"local_epochs": 1, "batch_size": 20, "make": sgd}
    model = tiny_net()
    model.load_state_dict(state)
    s_in = features()[0]
    s_out = model.train().intermediate(s_in).detach()
    plain = update(fedin.Received(state, None), **one_step).update.weights
    ours = update(fedin.Received(state, (s_in, s_out)), **one_step, projection="sum").update.weights
    for name, _ in model.named_parameters():
        torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=1e-7)


def test_arguments_are_unchanged_and_nothing_is_shared_with_the_scratch_model():
    received, own = fedin.Received(weights(), features()), tiny_data()
    before = copy.deepcopy(received)
    model, optimizer = adam()
    result = fedin.fedin_client_update(model, optimizer, received, own, stream, **EPOCHS)
    sent = copy.deepcopy(result.update)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert same(received.weights, before.weights) and same(result.update.weights, sent.weights)
    now, then = received.features + result.update.features, before.features + sent.features
    assert all(torch.equal(a, b) for a, b in zip(now, then))


def test_several_batches_of_features_take_turns():
    rows = features(16)
    halves = [tuple(tensor[part] for tensor in rows) for part in (slice(0, 8), slice(8, 16))]
    assert [len(s_in) for s_in, _ in fedin.feature_pairs(rows, 8)] == [8, 8]
    assert [len(s_in) for s_in, _ in fedin.feature_pairs(features(17), 8)] == [8, 8]  # no lone row
    two_steps = {"local_epochs": 1, "batch_size": 10, "feature_batch_size": 8, "make": sgd}
    both = update(fedin.Received(weights(), rows), **two_steps).update.weights
    first = update(fedin.Received(weights(), halves[0]), **two_steps).update.weights
    assert not same(both, first)  # the second step saw the second batch
    one_step = {**two_steps, "batch_size": 20}
    assert same(update(fedin.Received(weights(), rows), **one_step).update.weights,
                update(fedin.Received(weights(), halves[0]), **one_step).update.weights)


def test_batch_normalisation_sees_other_clients_features_as_asked():
    statistics, weight = "intermediate.1.running_mean", "intermediate.0.weight"
    one_step = {"local_epochs": 1, "batch_size": 20, "make": sgd}
    plain = update(fedin.Received(weights(), None), **one_step).update.weights
    seen = {kind: update(fedin.Received(weights(), features()), in_statistics=kind,
                         **one_step).update.weights
            for kind in ("batch and running", "batch", "running")}
    assert not torch.equal(seen["batch and running"][statistics], plain[statistics])
    assert torch.equal(seen["batch"][statistics], plain[statistics])
    assert torch.equal(seen["running"][statistics], plain[statistics])
    assert torch.equal(seen["batch"][weight], seen["batch and running"][weight])
    assert not torch.equal(seen["batch"][weight], seen["running"][weight])


# ---------------------------------------------------------------------------------------- noise


def test_noise_has_the_standard_deviation_of_the_features():
    s = 5 * torch.rand(64, 8, 16, 16) + torch.arange(8.0).view(1, 8, 1, 1)
    z = fedin.add_noise(s, 0.8, torch.Generator().manual_seed(1)) - s
    assert z.std().item() == pytest.approx(0.8 * s.std().item(), rel=0.02)
    assert z.mean().item() == pytest.approx(0, abs=0.02)
    z = fedin.add_noise(s, 0.8, torch.Generator().manual_seed(1), per_channel=True) - s
    for channel in range(8):
        expected = 0.8 * s[:, channel].std().item()
        assert z[:, channel].std().item() == pytest.approx(expected, rel=0.05)


def test_noise_carries_no_gradient_of_its_deviation():
    s = torch.randn(6, 2, requires_grad=True)
    fedin.add_noise(s, 0.8, torch.Generator().manual_seed(1)).sum().backward()
    assert torch.equal(s.grad, torch.ones(6, 2))


def test_noise_at_zero_draws_nothing_and_changes_nothing():
    rng = torch.Generator().manual_seed(1)
    before, s = rng.get_state(), torch.randn(3, 2)
    assert fedin.add_noise(s, 0.0, rng) is s and torch.equal(rng.get_state(), before)


def test_noise_at_zero_is_a_run_that_never_heard_of_noise(monkeypatch):
    received = fedin.Received(weights(), features())
    quiet = update(received, noise=0.0)
    monkeypatch.setattr(fedin, "add_noise", lambda s, level, rng: s)
    silent = update(received)
    assert same(quiet.update.weights, silent.update.weights)
    assert all(torch.equal(a, b) for a, b in zip(quiet.update.features, silent.update.features))


def test_noise_in_training_is_on_both_ends_of_the_intermediate_layers():
    ours = update(fedin.Received(weights(), None), sgd, noise=0.8, local_epochs=1, batch_size=20)
    model, rng = tiny_net(1), stream(data.NOISE)
    model.load_state_dict(weights())
    (x, y), = data.batches(tiny_data(), 20, 1, stream(data.BATCHES))
    s_in = model.extractor(x)
    s_in = s_in + 0.8 * s_in.detach().std() * torch.randn(s_in.shape, generator=rng)
    s_out = model.intermediate(s_in)
    s_out = s_out + 0.8 * s_out.detach().std() * torch.randn(s_out.shape, generator=rng)
    F.cross_entropy(model.classifier(s_out), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours.update.weights[name], parameter - 0.1 * parameter.grad)


def test_noise_enters_training_and_upload_or_the_upload_alone():
    received = fedin.Received(weights(), features())
    clean = update(received)
    both, sent = update(received, noise=0.8), update(received, noise=0.8, noise_on="upload")
    assert not same(both.update.weights, clean.update.weights)
    assert same(sent.update.weights, clean.update.weights)
    assert not torch.equal(sent.update.features[0], clean.update.features[0])
    assert same(both.update.weights, update(received, noise=0.8).update.weights)  # repeatable


# -------------------------------------------------------------------------------------- features


def test_uploaded_features_are_those_of_the_trained_model_on_own_images():
    result = update(fedin.Received(weights(), features()))
    model = tiny_net(1).eval()
    model.load_state_dict(result.update.weights)
    own = tiny_data()
    s_in = model.extractor(own.prepare(own.images[own.indices]))
    s_out = model.intermediate(s_in)
    sent_in, sent_out = result.update.features
    assert len(sent_in) == 16 and not sent_in.requires_grad and not sent_out.requires_grad
    rows = [next(i for i in range(len(s_in)) if torch.allclose(a, s_in[i], atol=1e-6)
                 and torch.allclose(b, s_out[i], atol=1e-6)) for a, b in zip(sent_in, sent_out)]
    assert len(set(rows)) == 16  # 16 different images of its own


@pytest.mark.parametrize("in_forward", [True, False])
def test_uploaded_outputs_come_from_the_noisy_or_from_the_clean_inputs(in_forward):
    model, _ = adam()
    clean_in, clean_out = fedin.own_features(model, tiny_data(), 16, stream, 0.0)
    sent_in, sent_out = fedin.own_features(model, tiny_data(), 16, stream, 0.8,
                                           noise_on="features" if in_forward else "upload")
    rng = stream(data.FEATURE_NOISE)
    noisy_in = fedin.add_noise(clean_in, 0.8, rng)
    s_out = model.intermediate(noisy_in) if in_forward else clean_out
    assert torch.equal(sent_in, noisy_in)
    torch.testing.assert_close(sent_out, fedin.add_noise(s_out.detach(), 0.8, rng))


def test_a_small_client_sends_features_of_all_its_images():
    result = update(fedin.Received(weights(), None), own=tiny_data(5), batch_size=5)
    assert len(result.update.features[0]) == 5


def test_features_in_training_mode_use_batch_statistics():
    model, _ = adam()
    calm, busy = (fedin.own_features(model, tiny_data(), 8, stream, 0.0, training=training)
                  for training in (False, True))
    assert calm[0].shape == busy[0].shape and not torch.allclose(calm[0], busy[0])


def test_without_exchange_no_features_travel():
    result = update(fedin.Received(weights(), None), feature_batches=0)
    assert result.update.features is None
    server = fedin.fedin_server_update(fedin.fedin_init({"tiny": weights()}), {0: result.update})
    assert fedin.fedin_download(server, Client(1, torch.arange(2), "tiny"), stream).features is None


def uploads(owners, rows: int = 6) -> dict:
    """Updates whose features name their owner and row."""
    made = {}
    for k in owners:
        mark = 100 * k + torch.arange(rows, dtype=torch.float32).view(-1, 1, 1, 1)
        pair = (mark.expand(rows, 4, 3, 3).clone(), mark.expand(rows, 6, 1, 1).clone())
        made[k] = fedin.Update(weights(k), 10 + k, pair)
    return made


def served(owners) -> dict:
    return fedin.fedin_server_update(fedin.fedin_init({"tiny": weights()}), uploads(owners))


def download(server, k: int, seed: int = 0, **options):
    def rng(purpose):
        return stream(purpose, seed, k)
    return fedin.fedin_download(server, Client(k, torch.arange(2), "tiny"), rng, **options)


@pytest.mark.parametrize("seed", range(5))
def test_a_client_receives_rows_of_others_never_its_own_none_twice(seed):
    s_in, s_out = download(served([2, 5, 7]), 5, seed, feature_batch_size=4,
                           feature_batches=2).features
    marks = s_in[:, 0, 0, 0]
    assert torch.equal(marks, s_out[:, 0, 0, 0])  # pairs stay pairs
    assert len(marks) == 8 == len(marks.unique()) and not ((marks // 100) == 5).any()
    bystander = download(served([2, 5, 7]), 1, seed, feature_batch_size=64).features
    assert len(bystander[0]) == 18  # all there is


def test_rows_mix_owners_or_come_from_one():
    server = served([2, 5, 7])
    mixed = {len((download(server, 2, seed).features[0][:, 0, 0, 0] // 100).unique())
             for seed in range(5)}
    single = {tuple((download(server, 2, seed, one_owner=True).features[0][:, 0, 0, 0] // 100)
                    .unique().tolist()) for seed in range(9)}
    assert mixed == {2} and single == {(5.0,), (7.0,)}


def test_nothing_to_receive_in_round_one_or_from_itself_alone():
    assert download(fedin.fedin_init({"tiny": weights()}), 0).features is None
    for one_owner in (False, True):
        assert download(served([3]), 3, one_owner=one_owner).features is None


def test_the_pool_holds_the_last_rounds_features_whatever_their_order_of_arrival():
    made = uploads([2, 5, 7])
    server = fedin.fedin_init({"tiny": weights()})
    forth = fedin.fedin_server_update(server, made)
    back = fedin.fedin_server_update(server, {k: made[k] for k in (7, 2, 5)})
    assert same(forth["pool"], back["pool"]) and server["pool"] == {}
    assert same(forth["weights"]["tiny"], back["weights"]["tiny"])
    assert same(forth["weights"]["tiny"],
                baselines.fedavg_server_update(server, made)["weights"]["tiny"])
    later = fedin.fedin_server_update(forth, uploads([4]))
    assert later["pool"]["owner"].unique().tolist() == [4]


def test_one_batch_of_features_of_the_resnets_costs_73728_floats():
    net = models.build("resnet10", 3, 10)
    own = data.ClientData(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.zeros(20).long(),
                          torch.arange(20), lambda x: x.float())
    sent = fedin.own_features(net, own, fedin.FEATURE_BATCH_SIZE, stream, 0.0)
    assert models.num_bytes(sent) == 4 * 73_728


# ------------------------------------------------------------------------------------- copy-out


@pytest.mark.parametrize("function", [fedin.project_gradient, fedin.add_noise,
                                      baselines.add_proximal_gradient, models.average])
def test_helpers_run_when_copied_into_a_file_of_their_own(function):
    # The first line, which the README names, leaves annotations unread.
    source = "from __future__ import annotations\nimport torch\n" + inspect.getsource(function)
    namespace = {}
    exec(source, namespace)
    copied = namespace[function.__name__]
    if function is fedin.project_gradient:
        pair = random_pair(0, agree=False)
        assert torch.equal(copied(*pair), function(*pair))
    elif function is fedin.add_noise:
        results = [f(torch.ones(3, 2), 0.5, torch.Generator()) for f in (copied, function)]
        assert torch.equal(*results)
    elif function is models.average:
        state = {"a": torch.ones(3)}
        assert same(copied(state, {0: state, 1: state}, {0: 1, 1: 2}), state)
    else:
        model = tiny_net()
        model(tiny_data().images / 255).sum().backward()
        before = model.classifier[1].weight.grad.clone()
        copied(model, weights(), 0.5)
        moved = 0.5 * (model.classifier[1].weight - weights()["classifier.1.weight"])
        torch.testing.assert_close(model.classifier[1].weight.grad, before + moved)
