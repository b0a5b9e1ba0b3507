"""Captured steps without a GPU: a stand-in for the graph runs the step on the kept tensors.

Whatever a step was given is spoilt afterwards, so that nothing can rest on it.  What only a GPU can
show is in test_gpu.py.
"""

import copy
from functools import partial

import pytest
import torch
from commands import APFL, CNN, FEW_DIGITS, RESNET10, config, go, make_small
from tiny import TinyNet, adam, alike, same, sgd, stream, tiny_data, tiny_net, weights

import baselines
import data
import federation
import graphs
import models

CPU = torch.device("cpu")


class StandIn:
    """A function in place of a CUDA graph, which runs at every replay, and a count of captures."""

    def __init__(self, monkeypatch):
        self.captures = 0
        self.replayed = graphs.replayed
        monkeypatch.setattr(graphs, "capture", self.capture)
        monkeypatch.setattr(graphs, "_uncapturable", set())
        always = property(lambda place: True, lambda place, value: None)
        monkeypatch.setattr(graphs.Place, "uses_graphs", always, raising=False)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def capture(self, function, place):
        self.captures += 1
        result = torch.zeros(())

        def replay():
            result.data = function()

        return replay, result

    def careful(self, step, model, optimizer, *, fixed=(), **others):
        """graphs.replayed, given copies that are spoilt after use."""
        given = copy.deepcopy(fixed)
        take = self.replayed(step, model, optimizer, fixed=given, **others)
        spoil(given)

        def spoiling(*batch):
            batch = copy.deepcopy(batch)
            loss = take(*batch)
            spoil(batch)
            return loss

        return spoiling


def spoil(nest: object) -> None:
    """Fill all tensors with numbers that no step can use."""
    for tensor in models.tensors_in(nest):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -10**6)


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    return StandIn(monkeypatch)


@pytest.fixture
def spoilt(monkeypatch, stand_in) -> StandIn:
    """The stand-in, with graphs.replayed made careful."""
    monkeypatch.setattr(graphs, "replayed", stand_in.careful)
    return stand_in


# ------------------------------------------------------------------------------ runs of all methods

FEDGEN = "--method fedgen --participation 1".split()
FEDDF = "--method feddf --participation 1 --distillation-steps 51 --rounds 1".split()
WIDTHS = [*FEW_DIGITS, *("--train-images 36 --clients 3 --participation 0.7 --local-epochs 1 "
                         "--partition iid --batch-size 8 --model resnet18-widths").split()]


@pytest.mark.parametrize("flags", [
    [*CNN, "--method", "fedavg", "--augment"],
    [*RESNET10, "--method", "fedprox", "--amp"], [*CNN, "--method", "scaffold"],
    [*RESNET10, "--method", "moon"], [*RESNET10, "--noise", "0.8"],
    [*RESNET10, "--feature-batches", "2", "--projection", "exact"], [*CNN, *FEDGEN],
    [*CNN, *FEDDF], [*WIDTHS, "--method", "heterofl"],
    [*WIDTHS, "--method", "scalefl", "--self-distillation", "0.1"], APFL], ids=" ".join)
def test_a_run_with_captured_steps_equals_one_without(tmp_path, monkeypatch, flags, request):
    make_small(monkeypatch)
    flags = ["--rounds", "2", "--workers", "2", *flags]
    plain = go(tmp_path / "plain", *flags)
    spoilt = request.getfixturevalue("spoilt")
    assert go(tmp_path / "captured", *flags) == plain
    assert 0 < spoilt.captures <= 24 and not graphs._uncapturable


# ------------------------------------------------------------------------------- one step and place

def update(place: graphs.Place, count: int = 20, seed: int = 5, scratch=adam, **options):
    """FedProx's update at a place, whose network lasts."""
    if "tiny" not in place.networks:
        place.networks["tiny"] = scratch()
    images = tiny_data()
    images = images._replace(indices=images.indices[:count], **options)
    with place.entered():
        return baselines.fedprox_client_update(*place.networks["tiny"], weights(seed), images,
                                               stream, mu=0.1, local_epochs=2, batch_size=8)


@pytest.mark.parametrize("scratch", [adam, sgd, partial(sgd, momentum=0.9), partial(
    models.scratch_network, TinyNet, (1, 8, 8), CPU, optimizer="adam", lr=1e-2)])
def test_clients_take_turns_on_one_network_as_on_new_ones(stand_in, scratch):
    place, images = graphs.Place(CPU), {"images": tiny_data().images, "labels": tiny_data().labels,
                                        "prepare": tiny_data().prepare}
    for count, seed in ((20, 5), (18, 6), (2, 7), (20, 8), (1, 9)):
        mine = update(place, count, seed, scratch, **images)
        alone = update(graphs.Place(CPU), count, seed, scratch, **images)
        plain = baselines.fedprox_client_update(
            *scratch(), weights(seed), tiny_data()._replace(indices=tiny_data().indices[:count]),
            stream, mu=0.1, local_epochs=2, batch_size=8)
        assert alike(mine.update, plain.update) and mine.loss == plain.loss
        assert alike(alone.update, plain.update)
    # Batches of 8, 4 and 2, each captured once at the place that lasts, again at the others
    assert len(place.kept) == 1 and [len(made) for _, made in place.kept.values()] == [3]


def test_other_numbers_and_layouts_are_other_graphs_and_other_images_free_all(stand_in):
    place, images = graphs.Place(CPU), tiny_data()
    model, optimizer = place.networks["tiny"] = adam()

    def train(mu: float, start: dict, images: data.ClientData, batch_size: int = 10) -> None:
        with place.entered():
            federation.run_steps(baselines.fedprox_step, model, optimizer, images, data.batches(
                images, batch_size, 1, stream(data.BATCHES)), start, mu=mu)

    start, captures = models.copy_parameters(model), []
    for mu, batch_size in ((0.1, 10), (0.1, 10), (0.2, 10), (0.2, 5), (0.1, 10)):
        train(mu, start, images, batch_size)
        captures.append(stand_in.captures)
    assert captures == [1, 1, 2, 3, 3] and len(place.kept) == 2
    train(0.1, start, tiny_data())  # equal images elsewhere
    assert stand_in.captures == 4 and len(place.kept) == 1


def test_capturing_changes_neither_network_nor_optimiser(stand_in):
    (model, optimizer), images = adam(), tiny_data()
    step = partial(baselines.fedavg_step, model, optimizer)
    (rows,) = next(data.batches(images, 8, 1, stream(data.BATCHES)))
    place = graphs.Place(CPU)
    for _ in range(2):  # without state of the optimiser, and with
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        graphs.checked_graph(step, model, optimizer, images.batch(rows), (), place)
        after = model.state_dict(), optimizer.state_dict()["state"]
        assert same(before[0], after[0])
        old = list(models.tensors_in(list(before[1].values())))
        new = list(models.tensors_in(list(after[1].values())))
        assert all(torch.equal(a, b) for a, b in zip(old, new))
        assert old or not any(tensor.any() for tensor in new)
        step(*images.batch(rows))


def test_layers_count_batches_at_once_as_often_as_one_by_one():
    one, other = tiny_net(1), tiny_net(1)
    x = torch.randn(4, 1, 8, 8)

    def twice_inside(net):
        s_in = net.extractor(x)
        return net.intermediate(s_in).sum() + net.intermediate(2 * s_in).sum()

    expected = twice_inside(one)
    layers = graphs.counting_layers(other)
    result = graphs.counted_at_once(partial(twice_inside, other), layers, [1, 2])
    assert torch.equal(result, expected)
    assert same(one.state_dict(), other.state_dict())
    with pytest.raises(ZeroDivisionError):
        graphs.counted_at_once(lambda: 1 / 0, layers, [1, 2])
    assert same(one.state_dict(), other.state_dict())


# ----------------------------------------------------------------------------------------- failures

def test_a_step_that_cannot_be_captured_runs_as_it_is_and_one_line_says_so(stand_in, monkeypatch,
                                                                           capsys):
    def fails(function, place):
        function()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs, "capture", fails)
    place = graphs.Place(CPU)
    plain = baselines.fedprox_client_update(*adam(), weights(), tiny_data(), stream, mu=0.1,
                                            local_epochs=2, batch_size=8)
    for _ in range(2):
        assert alike(update(place).update, plain.update)
    assert capsys.readouterr().out == (
        "note: fedprox_step runs without CUDA graphs (operation not permitted)\n")
    assert graphs._uncapturable == {baselines.fedprox_step}


@pytest.mark.parametrize("trains", [True, False])
def test_a_graph_that_differs_from_its_step_is_not_used(stand_in, monkeypatch, capsys, trains):
    place, capture = graphs.Place(CPU), graphs.capture

    def wrong(function):
        """Another loss, or the right one without a change of the weights."""
        if trains:
            return 1.01 * function()
        model, _ = place.networks["tiny"]
        before = copy.deepcopy(model.state_dict())
        loss = function()
        model.load_state_dict(before)
        return loss

    monkeypatch.setattr(graphs, "capture", lambda function, place: capture(
        partial(wrong, function), place))
    plain = baselines.fedprox_client_update(*adam(), weights(), tiny_data(), stream, mu=0.1,
                                            local_epochs=2, batch_size=8)
    assert alike(update(place).update, plain.update)
    assert "the losses of its graph differ" in capsys.readouterr().out


def test_too_little_memory_is_no_reason_to_go_on_without_graphs(stand_in, monkeypatch):
    def full(function, place):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "capture", full)
    with pytest.raises(torch.OutOfMemoryError):
        update(graphs.Place(CPU))
    assert not graphs._uncapturable


def test_without_graphs_nothing_is_captured(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "capture", None)
    monkeypatch.setattr(graphs, "enabled", None)
    assert not graphs.Place(CPU).uses_graphs
    update(graphs.Place(CPU))
    for flags, wanted in (([], True), (["--no-graphs"], False)):
        go(tmp_path / str(wanted), *CNN, "--method", "fedavg", "--rounds", "1", *flags)
        assert graphs.enabled is wanted and "no_graphs" not in config(tmp_path / str(wanted))
