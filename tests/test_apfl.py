"""AP-FL: what is sent and kept, staleness and the order of arrivals, friends, interpolation."""

import pytest
import torch
from torch import nn

import apfl
import baselines
import data
import generator
import models
from tiny import same

COUNT = 24  # images of a client
TRAIN = dict(local_epochs=2, batch_size=8)


def weights_of(seed: int) -> models.State:
    rng = torch.Generator().manual_seed(seed)
    return models.initial_weights(["cnn"], 1, 10, rng, torch.device("cpu"))["cnn"]


def own_data(labels, seed: int = 0) -> data.ClientData:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (len(labels), 1, 32, 32), dtype=torch.uint8, generator=rng)
    return data.ClientData(images, torch.tensor(labels), torch.arange(len(labels)),
                           lambda x: x / 128 - 1)


def stream(purpose: int, client: int = 0) -> torch.Generator:
    return data.torch_stream(0, purpose, round=1, client=client)


def scratch():
    model = models.build_empty("cnn", 1, 10, torch.device("cpu"))
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def small_generator(seed: int = 0) -> generator.SemanticGenerator:
    net = generator.initial_generator(torch.eye(10), 1, 4, torch.Generator().manual_seed(seed))
    return net.eval()


def upload(seed: int, counts: list[int]) -> apfl.LabelledUpdate:
    return apfl.LabelledUpdate(weights_of(seed), sum(counts), torch.tensor(counts))


# ------------------------------------------------------------------------- federated training


def test_a_client_trains_as_in_fedavg_and_tells_its_class_counts():
    own = own_data([0, 0, 3, 9] * 6)
    received = weights_of(1)
    plain = baselines.fedavg_client_update(*scratch(), received, own, stream, **TRAIN)
    ours = apfl.apfl_client_update(*scratch(), received, own, stream, **TRAIN)
    assert same(ours.update.weights, plain.update.weights)
    assert (ours.loss, ours.samples, ours.kept) == (plain.loss, plain.samples, None)
    assert ours.update.num_samples == COUNT
    assert ours.update.class_counts.tolist() == [12, 0, 0, 6, 0, 0, 0, 0, 0, 6]


def test_the_server_averages_as_fedavg_and_keeps_each_clients_last_upload():
    server = apfl.apfl_init({"cnn": weights_of(0)})
    first = {1: upload(1, [3, 1]), 2: upload(2, [0, 5])}
    second = {2: upload(3, [0, 7])}
    after = apfl.apfl_server_update(apfl.apfl_server_update(server, first), second)
    plain = baselines.fedavg_init({"cnn": weights_of(0)})
    for updates in (first, second):
        plain = baselines.fedavg_server_update(plain, updates)
    assert same(after["weights"]["cnn"], plain["weights"]["cnn"])
    assert same(after["teachers"][1]["weights"], first[1].weights)
    assert same(after["teachers"][2]["weights"], second[2].weights)
    assert after["teachers"][2]["class_counts"].tolist() == [0, 7]
    assert server["teachers"] == {}  # the old state is as it was


def test_clients_that_never_took_part_train_late():
    server = apfl.apfl_server_update(apfl.apfl_init({"cnn": weights_of(0)}),
                                     {1: upload(1, [3, 1])})
    late = [apfl.apfl_trains_late(server, baselines.Client(k, torch.arange(2), "cnn"))
            for k in range(3)]
    assert late == [True, False, True]


# ------------------------------------------------------------------- asynchronous aggregation


def test_staleness_weights():
    for kind in ("constant", "polynomial", "hinge"):
        values = [apfl.staleness_weight(d, kind) for d in range(30)]
        assert values[0] == 1 and values == sorted(values, reverse=True) and min(values) > 0
    assert {apfl.staleness_weight(d, "constant") for d in range(30)} == {1}
    assert apfl.staleness_weight(3, "polynomial") == pytest.approx(0.5)
    assert apfl.staleness_weight(8, "polynomial", exponent=2) == pytest.approx(1 / 81)
    assert apfl.staleness_weight(4, "hinge") == 1  # up to patience
    assert apfl.staleness_weight(5, "hinge") == pytest.approx(1 / 11)
    assert apfl.staleness_weight(7, "hinge", slope=2, patience=6) == pytest.approx(1 / 3)


def test_constant_mixing_is_an_exponential_moving_average():
    x, a = {"cnn": {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}}, 0.3
    sent = [torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
            for k in range(6)]
    mixed = x
    for k, tensor in enumerate(sent):
        mixed = apfl.mix(mixed, {k: {"w": tensor}}, a)
    n = len(sent)
    closed = (1 - a) ** n * x["cnn"]["w"] + sum(
        a * (1 - a) ** (n - 1 - k) * tensor for k, tensor in enumerate(sent))
    assert torch.allclose(mixed["cnn"]["w"], closed, rtol=1e-12, atol=0)


def test_mixing_zero_freezes_and_one_replaces():
    old, new = weights_of(0), weights_of(1)
    assert same(apfl.mix({"cnn": old}, {3: new}, 0.0)["cnn"], old)
    assert same(apfl.mix({"cnn": old}, {3: new}, 1.0)["cnn"], new)


def arrivals_by_clock(first: dict, durations: dict, count: int) -> list:
    """All events of each client on its own, sorted: no queue."""
    events = [(first[k] + sum([durations[k]] * n), k) for k in first for n in range(count)]
    return sorted(events)[:count]


def test_arrivals_are_those_of_each_client_on_its_own_in_order_of_time():
    durations = {0: 4.0, 1: 1.0, 2: 2.5}
    first = {0: 4.0, 1: 1.0, 2: 0.5}
    events = apfl.next_arrivals(first, durations, 12)
    assert events == arrivals_by_clock(first, durations, 12)
    assert [k for time, k in events if time == 4.0] == [0, 1]  # at equal times the lower id


# ------------------------------------------------------------------------------- memorisation


def memorised(server: dict, **options) -> models.State:
    def build(weights):
        net = models.build_empty("cnn", 1, 10, torch.device("cpu"))
        net.load_state_dict(weights)
        return net

    net = small_generator()
    list(apfl.apfl_memorise(server, net, build, torch.Generator().manual_seed(0),
                            generator_steps=2, generator_batch=2, **options))
    return models.copy_state(net)


def test_one_client_with_all_data_teaches_as_the_global_model_does():
    update = {4: upload(1, [3, 0, 2, 1, 5, 0, 0, 1, 1, 1])}
    server = apfl.apfl_server_update(apfl.apfl_init({"cnn": weights_of(0)}), update)
    by_client, by_global = memorised(server), memorised(server, teacher="global")
    assert same(by_client, by_global)
    assert not same(by_client, models.copy_state(small_generator()))


def test_teachers_differ_from_the_global_model_where_there_are_several():
    updates = {k: upload(k, [1 + k] * 10) for k in (1, 2)}
    server = apfl.apfl_server_update(apfl.apfl_init({"cnn": weights_of(0)}), updates)
    assert not same(memorised(server), memorised(server, teacher="global"))


# ------------------------------------------------------------------------------ friend models


def test_friend_labels_follow_the_client_or_all_classes():
    labels = torch.tensor([1, 1, 1, 4])
    assert apfl.friend_label_shares(labels, 6, "local").tolist() == [0, 0.75, 0, 0, 0.25, 0]
    assert apfl.friend_label_shares(labels, 6, "all").tolist() == pytest.approx([1 / 6] * 6)


def friend(received, own, **options) -> baselines.Result:
    return apfl.apfl_friend_update(*scratch(), received, own, stream, batch_size=8, **{
        "friend_epochs": 1, "synthetic_per_class": 4, **options})


def test_a_friend_is_the_global_model_trained_on_synthetic_samples_alone():
    weights, net = weights_of(0), small_generator()
    result = friend((weights, net), own_data([2] * 6 + [7] * 18), friend_epochs=2)

    rng = stream(data.SYNTHETIC)
    shares = torch.tensor([0, 0, 0.25, 0, 0, 0, 0, 0.75, 0, 0])
    y = torch.multinomial(shares, 40, replacement=True, generator=rng)
    x = generator.sample(net, y, rng)
    model, optimizer = scratch()
    model.load_state_dict(weights)
    order = stream(data.FRIEND_BATCHES)
    for _ in range(2):
        for rows in torch.randperm(40, generator=order).split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    assert same(result.kept, models.copy_state(model))
    assert set(y.tolist()) == {2, 7} and result.samples == 80
    assert models.num_bytes(result.update) == 0  # nothing is sent


def test_of_a_clients_data_a_friend_reads_the_labels_alone():
    received, labels = (weights_of(0), small_generator()), [2] * 6 + [7] * 18
    one = friend(received, own_data(labels, seed=0))
    assert same(one.kept, friend(received, own_data(labels, seed=1)).kept)
    assert not same(one.kept, friend(received, own_data(labels[::-1] + [1])).kept)
    every = friend(received, own_data(labels), friend_labels="all")
    assert same(every.kept, friend(received, own_data([0] * 24), friend_labels="all").kept)
    assert not same(one.kept, every.kept)


def test_no_epoch_leaves_the_global_model():
    received = weights_of(0), small_generator()
    assert same(friend(received, own_data([1] * 9), friend_epochs=0).kept, received[0])


# ---------------------------------------------------------------------- decoupled interpolation


def test_beta_one_is_the_client_and_beta_zero_the_friend():
    own, other = weights_of(1), weights_of(2)
    assert same(apfl.personalise(own, other, beta=1.0), own)
    assert same(apfl.personalise(own, other, beta=0.0), other)
    assert same(apfl.personalise(own, other, beta=0.0, beta_on="friend"), own)
    for beta in (0.01, 0.1, 0.5, 0.77):
        assert same(apfl.personalise(own, own, beta=beta), own)
        mixed = apfl.personalise(own, other, beta=beta)
        turned = apfl.personalise(own, other, beta=1 - beta, beta_on="friend")
        for name, tensor in mixed.items():
            assert torch.allclose(tensor, beta * own[name] + (1 - beta) * other[name], atol=1e-7)
            assert torch.allclose(tensor, turned[name], rtol=0, atol=1e-7)


def test_interpolation_keeps_types_and_truncates_integers():
    a = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(10)}
    b = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(15)}
    mixed = models.interpolate(a, b, 0.5)
    assert mixed["w"].tolist() == [0.5, 3.0] and mixed["w"].dtype == torch.float32
    assert mixed["n"].item() == 12 and mixed["n"].dtype == torch.int64


