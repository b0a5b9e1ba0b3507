"""Sub-models of one network by width and depth: sizes, identities, steps against autograd.

Client updates, index sets and averages over coordinates are written out in test_references.py.
"""

from functools import partial

import pytest
import torch
from tiny import (adam, all_same, check_purity, check_step, divergence, double_batch, entropy, same,
                  stream, tiny_net, weights)

import baselines
import data
import models
import widths
from federation import Client

X, Y = double_batch()
INFINITE, NONE = float("inf"), torch.zeros(3, dtype=torch.bool)


def make(rate: float, exits=None) -> models.Make:
    """Builder of a network of two blocks, which have 4 and 8 channels at the rate 1/16."""
    return partial(widths.WidthResNet, 1, 3, blocks=(1, 1), bottleneck=False, stem_stride=2,
                   rate=rate, exits=exits)


LARGE, SMALL, EXITS, ONE_EXIT = make(1/16), make(1/32), make(1/16, (1, 2)), make(1/32, (1,))


# ----------------------------------------------------------------------------------------- networks

def states(networks: dict, classes: int = 10) -> list:
    """State dicts without content, with three channels."""
    return [models.shapes(partial(constructor, 3, classes)) for constructor in networks.values()]


def size(state: models.State) -> int:
    return sum(map(torch.numel, state.values()))


def test_width_scaled_resnet152_has_the_published_numbers_of_parameters():
    networks = widths.MODELS["resnet152-widths"]
    assert [size(state) for state in states(networks)] == [  # counted by hand
        236_878, 926_738, 3_665_434, 14_578_730, 58_148_938]
    mean = sum(size(state) for state in states(networks, 1000)) / 5
    assert int(mean / 1e4) == 1629  # FedIN, Table 4: 16.29 M


@pytest.mark.parametrize("net, sections", [("resnet18", [4, 1, 1, 1, 1]),
                                           ("resnet152", [25, 7, 6, 6, 6])])
def test_levels_of_scalefl_have_heterofls_budgets_and_later_exits_the_wider_they_are(net, sections):
    networks, levels = widths.MODELS[f"{net}-widths"], widths.EXIT_MODELS[f"{net}-widths"]
    level_states = states(levels)
    for ours, theirs in zip(level_states, states(networks), strict=True):
        assert 0.94 < size(ours) / size(theirs) < 1.06
    for level, state in enumerate(level_states, start=1):
        blocks = {tuple(name.split(".")[1:3]) for name in state if name.startswith("intermediate")}
        assert [sum(section == str(i) for section, _ in blocks) for i in range(level)] == (
            sections[:level])
        assert {name.split(".")[1] for name in state if name.startswith("classifier")} == {
            str(i) for i in range(level)}
    with torch.device("meta"):
        logits = list(levels.values())[1](1, 3).exit_logits(torch.zeros(2, 1, 32, 32))
    assert [tuple(one.shape) for one in logits] == [(2, 3)] * 2


def test_the_last_exit_is_the_output_and_scalers_divide_in_training_alone():
    net, x = tiny_net(0, EXITS), X.float()
    assert torch.equal(net.exit_logits(x)[1], net(x)) and not torch.equal(*net.exit_logits(x))
    scaler = widths.Scaler(0.25)
    assert scaler.train()(torch.tensor(2.0)) == 8 and scaler.eval()(torch.tensor(2.0)) == 2


# --------------------------------------------------------------------------------------- sub-models

@pytest.mark.parametrize("start", [0, 3, 70])
@pytest.mark.parametrize("arch", [LARGE, EXITS])
def test_with_its_channels_rolled_on_the_whole_network_computes_the_same(arch, start):
    net, rolled = tiny_net(0, arch).double(), tiny_net(0, arch).double()
    whole = models.copy_state(net)
    part = widths.extract(whole, widths.index_sets(whole, whole, start=start))
    rolled.load_state_dict(part)
    torch.testing.assert_close(rolled(X), net(X))
    assert same(part, whole) == (start == 0)


@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize("archs", [[LARGE, SMALL, SMALL], [EXITS, ONE_EXIT]])
def test_extracting_sub_models_and_averaging_them_back_changes_nothing(archs, start):
    whole = weights(0, archs[0])
    sets = {k: widths.index_sets(whole, weights(0, arch), start=start)
            for k, arch in enumerate(archs)}
    uploads = {k: widths.extract(whole, places) for k, places in sets.items()}
    assert same(widths.average_coordinates(whole, uploads, {0: 3, 1: 7, 2: 11}, sets), whole)


# -------------------------------------------------------------------------------------------- steps

@pytest.mark.parametrize("clip", [INFINITE, 0.05])
def test_a_step_of_heterofl_descends_the_masked_cross_entropy(clip):
    absent, y = torch.tensor([False, True, False]), 2 * (Y % 2)
    check_step(partial(widths.heterofl_step, clip=clip), tiny_net(1, LARGE).double(),
               lambda net: entropy(net(X) * ~absent, y), X, y, absent, clip=clip)


@pytest.mark.parametrize("gamma, clip", [(0.0, INFINITE), (0.4, INFINITE), (0.4, 0.05)])
def test_a_step_of_scalefl_descends_a_weighted_sum_over_exits_taught_by_the_last(gamma, clip):
    def objective(net):
        first, last = net.exit_logits(X)
        taught = entropy(first, Y) + gamma * 2**2 * divergence(last.detach(), first, 2.0)
        return (taught + 2 * entropy(last, Y)) / 3, entropy(last, Y)

    step = partial(widths.scalefl_step, gamma=gamma, temperature=2.0, clip=clip)
    check_step(step, tiny_net(1, EXITS).double(), objective, X, Y, clip=clip)


@pytest.mark.parametrize("step", [
    partial(widths.heterofl_step, absent=NONE), partial(widths.scalefl_step, gamma=0.5)])
def test_with_all_classes_one_level_and_no_bound_a_step_is_fedavgs(step):
    ours, theirs = adam(make=LARGE), adam(make=LARGE)
    loss = step(*ours, X.float(), Y, clip=INFINITE)
    assert torch.equal(loss, baselines.fedavg_step(*theirs, X.float(), Y))
    assert same(models.copy_state(ours[0]), models.copy_state(theirs[0]))


# ---------------------------------------------------------------------------------------- one round

@pytest.mark.parametrize("update, arch, received", [
    (widths.heterofl_client_update, LARGE, weights(5, LARGE)),
    (partial(widths.scalefl_client_update, self_distillation=0.5), EXITS,
     widths.ScaledDownload(weights(5, EXITS), True))])
def test_an_update_is_pure(update, arch, received):
    check_purity(update, received, scratch=partial(adam, make=arch))


@pytest.mark.parametrize("update, init, counters", [
    (widths.heterofl_server_update, widths.heterofl_init, {"start": 0}),
    (widths.fedrolex_server_update, widths.heterofl_init, {"start": 1}),
    (widths.scalefl_server_update, widths.scalefl_init, {"start": 0, "round": 1})])
def test_of_whole_networks_the_average_is_fedavgs_bit_for_bit(update, init, counters):
    server = init({"small": {}, "large": weights(5, LARGE)})
    updates = {k: widths.WidthUpdate(weights(k, LARGE), 3 + 4 * k, None) for k in (1, 4)}
    new = update(server, updates)
    assert all_same(new["weights"], baselines.fedavg_server_update(server, updates)["weights"])
    assert {name: new[name] for name in new if name != "weights"} == counters
    assert server["start"] == 0 and all_same(server["weights"], {"large": weights(5, LARGE)})


def test_a_client_is_sent_and_uses_the_sub_model_of_its_architecture(monkeypatch):
    monkeypatch.setattr(widths, "CONSTRUCTORS", {"small": lambda channels, classes: SMALL()})
    whole, one = weights(5, LARGE), Client(0, None, "small")
    server = widths.heterofl_init({"large": whole}) | {"start": 3}
    sent = widths.heterofl_download(server, one, stream)
    assert {name: tensor.shape for name, tensor in sent.items()} == {
        name: tensor.shape for name, tensor in weights(5, SMALL).items()}
    assert torch.equal(sent["extractor.conv1.weight"], whole["extractor.conv1.weight"][[3, 0]])
    arch, used = widths.heterofl_deploy(server, one, None)
    assert arch == "small" and same(used, sent)
    levels = [widths.scalefl_download(server | {"round": t}, one, stream, rounds=8)
              for t in range(8)]
    assert same(levels[0].weights, sent)
    assert [level.distils for level in levels] == [False] * 3 + [True] * 5


def test_rates_are_drawn_anew_in_each_round_and_evenly():
    drawn = [[widths.heterofl_assign(Client(k, None, "a"), "abcde", data.streams(0, t, k)).arch
              for k in range(50)] for t in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert min((drawn[1] + drawn[2]).count(arch) for arch in "abcde") >= 10  # 20 expected
