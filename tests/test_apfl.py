"""AP-FL: what is sent and kept, staleness and the order of arrivals, friends, interpolation.

And through the command line: the stages after the last round, the dropout setting, asynchronous
rounds.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

import apfl
import baselines
import data
import generator
import models
import pictures
import run
from commands import (APFL, ASYNC, DROPOUT, FEW, TWO_OF_THREE, config, go, lines, make_small,
                      participants, result)
from tiny import few_digits, same

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


def test_clients_without_an_upload_train_late_by_fedavgs_update():
    server = apfl.apfl_server_update(apfl.apfl_init({"cnn": weights_of(0)}),
                                     {1: upload(1, [3, 1])})
    own = own_data([0, 1] * 6)
    clients = [baselines.Client(k, own.indices, "cnn") for k in range(3)]
    experiment = baselines.Experiment(
        {"seed": 0}, None, None, clients, [], [], [], [], None, [], {},
        train=lambda update, tasks, what: {task.client.id: update(
            *scratch(), task.received, own, lambda purpose, k=task.client.id: data.torch_stream(
                0, purpose, task.number, k)) for task in tasks})
    late = apfl.apfl_late(experiment, server, {}, **TRAIN)
    assert sorted(late) == [0, 2]
    by_hand = baselines.fedavg_client_update(
        *scratch(), server["weights"]["cnn"], own,
        lambda purpose: data.torch_stream(0, purpose, 0, 2), **TRAIN).update.weights
    assert same(late[2], by_hand) and not same(late[0], by_hand)
    begun = {"received": weights_of(5), "version": 3, "work": 1, "arrival": 9.0}
    under_way = apfl.apfl_late(experiment, {**server, "flights": {1: begun, 2: begun}}, {}, **TRAIN)
    by_hand = baselines.fedavg_client_update(
        *scratch(), weights_of(5), own,
        lambda purpose: data.torch_stream(0, purpose, 1, 2), **TRAIN).update.weights
    assert same(under_way[2], by_hand) and same(under_way[0], late[0])
    assert sorted(under_way) == [0, 2]
    tuned = baselines.fedavg_ft_late(experiment, server, {}, finetune_epochs=TRAIN["local_epochs"],
                                     batch_size=TRAIN["batch_size"])
    assert sorted(tuned) == [0, 1, 2] and same(tuned[2], late[2])
    untuned = baselines.fedavg_ft_late(experiment, server, {}, finetune_epochs=0, batch_size=4)
    assert all(same(state, server["weights"]["cnn"]) for state in untuned.values())


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
    by_client, by_global = memorised(server, teacher="clients"), memorised(server)
    assert same(by_client, by_global)
    assert not same(by_client, models.copy_state(small_generator()))


def test_teachers_differ_from_the_global_model_where_there_are_several():
    updates = {k: upload(k, [1 + k] * 10) for k in (1, 2)}
    server = apfl.apfl_server_update(apfl.apfl_init({"cnn": weights_of(0)}), updates)
    assert not same(memorised(server, teacher="clients"), memorised(server, teacher="global"))


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
    result = friend((weights, net), own_data([2] * 6 + [7] * 18), friend_epochs=2,
                    friend_labels="local")

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
    one = friend(received, own_data(labels, seed=0), friend_labels="local")
    assert same(one.kept, friend(received, own_data(labels, seed=1), friend_labels="local").kept)
    others = friend(received, own_data(labels[::-1] + [1]), friend_labels="local")
    assert not same(one.kept, others.kept)
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


# ------------------------------------------------------- AP-FL: stages after the last round


@pytest.fixture(scope="module")
def plain_apfl(tmp_path_factory):
    """The folder of a run of two rounds without options, read by several tests."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        out = tmp_path_factory.mktemp("plain") / "out"
        go(out, *APFL, "--rounds", "2")
        return out


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


def test_apfl_leaves_pictures_and_the_accuracies_of_all_its_models(plain_apfl, tmp_path, capsys):
    entries = go(tmp_path, *APFL, "--rounds", "1")
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "result.json", "curves.png",
        "samples.png", "beta.png"}
    names = [f"{kind}_{name}" for kind in ("client", "friend", "personalised", "global")
             for name in ("accuracy", "personal_accuracy")]
    before, last = lines(plain_apfl)
    assert set(last) - set(before) == set(names)
    for entry in (last, entries[-1]):
        assert all(0 <= entry[name] <= 100 for name in names)
        assert entry["accuracy"] == entry["personalised_accuracy"]
        assert entry["personal_accuracy"] == entry["personalised_personal_accuracy"]
    final = json.loads((tmp_path / "result.json").read_text())
    assert final["friend_accuracy"] == entries[-1]["friend_accuracy"]
    assert final["generator_seconds"] > 0 and final["friends_seconds"] > 0
    settings = config(tmp_path)
    assert (settings["beta"], settings["semantics"], settings["lambda"]) == (0.1, "segments", 0.5)
    shown = capsys.readouterr()
    assert shown.err == "" and "personalised models" in shown.out and "generator" in shown.out


def test_the_rounds_of_apfl_and_fedavg_ft_are_fedavgs(tmp_path, plain_apfl):
    plain = go(tmp_path / "fedavg", *TWO_OF_THREE, "--method", "fedavg", "--rounds", "2")
    tuned = go(tmp_path / "fedavg-ft", *TWO_OF_THREE, "--method", "fedavg-ft", "--rounds", "2")
    apfl_lines = lines(plain_apfl)
    counts = 2 * 8 * 10 / 1e6  # two participants tell how many images of ten classes they have
    for a, b in zip(plain, apfl_lines):
        assert a["upload_mb"] + counts == pytest.approx(b["upload_mb"], abs=1e-12)
        for name in ("loss", "samples", "clock"):
            assert a[name] == b[name]
    assert plain[0]["accuracy"] == apfl_lines[0]["accuracy"] and plain[0] == tuned[0]
    both = {"global_accuracy", "global_personal_accuracy"}
    assert tuned[-1].keys() == plain[-1].keys() | both
    size = models.num_bytes(models.shapes("cnn", 1, 10)) / 1e6  # to each of three clients once more
    assert tuned[-1]["download_mb"] == pytest.approx(plain[-1]["download_mb"] + 3 * size)
    for last in (apfl_lines[-1], tuned[-1]):
        assert last["global_accuracy"] == plain[-1]["accuracy"]
        assert last["global_personal_accuracy"] == plain[-1]["personal_accuracy"]
    weights = [torch.load(out / "checkpoint.pt", weights_only=True)["server"]["weights"]["cnn"]
               for out in (tmp_path / "fedavg", tmp_path / "fedavg-ft", plain_apfl)]
    assert same(weights[0], weights[1]) and same(weights[0], weights[2])


def test_the_stages_traffic_is_on_the_last_line_and_in_the_totals(plain_apfl):
    entries = lines(plain_apfl)
    saved = torch.load(plain_apfl / "checkpoint.pt", weights_only=True)
    size = models.num_bytes(saved["server"]["weights"])
    late = 3 - len(saved["server"]["teachers"])
    sent = 3 * (size + models.num_bytes(saved["after"]["generator"]))
    assert late > 0 and len(saved["after"]["late"]) == late
    assert entries[-1]["download_mb"] == pytest.approx((2 * size + sent) / 1e6)
    assert result(plain_apfl)["download_mb"] == pytest.approx((4 * size + sent) / 1e6)


def test_final_accuracies_are_those_of_the_saved_models(tmp_path):
    last = go(tmp_path, "--method", "apfl", *FEW, *DROPOUT, "--beta", "0.3")[-1]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    experiment = run.prepare_experiment(config(tmp_path))
    x = data.standardise(experiment.data.x_test, *experiment.statistics)
    labels, right = experiment.data.y_test, {}
    for k in range(6):
        own = saved["after"]["late"][5] if k == 5 else saved["server"]["teachers"][k]["weights"]
        friend = saved["after"]["friends"][k]
        for kind, state in (("client", own), ("friend", friend), ("personalised", {
                name: 0.3 * own[name] + 0.7 * friend[name] for name in own})):
            net = models.build("cnn", 1, 10).eval()
            net.load_state_dict(state)
            with torch.no_grad():
                right[kind, k] = (net(x).argmax(1) == labels).double()
    for kind in ("client", "friend", "personalised"):
        whole = [100 * right[kind, k].mean().item() for k in range(6)]
        assert last[f"{kind}_accuracy"] == pytest.approx(sum(whole[:5]) / 5, abs=0.06)
        assert last[f"dropout_{kind}_accuracy"] == pytest.approx(whole[5], abs=0.3)
        own = 100 * right[kind, 5][experiment.test_shares[5]].mean().item()
        assert last[f"dropout_{kind}_personal_accuracy"] == pytest.approx(own, abs=1.5)
    by_class = [100 * right["personalised", 5][labels == c].mean().item() for c in range(10)]
    seen, unseen = sum(by_class[:8]) / 8, sum(by_class[8:]) / 2
    assert last["seen_accuracy"] == pytest.approx(seen, abs=0.4)
    assert last["unseen_accuracy"] == pytest.approx(unseen, abs=1.5)
    assert last["harmonic_accuracy"] == pytest.approx(
        2 * last["seen_accuracy"] * last["unseen_accuracy"]
        / max(1e-9, last["seen_accuracy"] + last["unseen_accuracy"]))


def test_harmonic_accuracy_of_known_predictions():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    experiment = baselines.Experiment(
        {}, run.METHODS["apfl"], data.Dataset(None, None, None, labels, ["a", "b", "c"]),
        [baselines.Client(k, None, "cnn") for k in range(2)], dropouts=[1], seen=[0, 1], unseen=[2],
        test_shares=[torch.tensor([0, 2]), torch.tensor([4, 5])], statistics=None, speeds=[],
        idle={})
    right = {0: torch.tensor([1, 1, 1, 1, 0, 0]).bool(), 1: torch.tensor([1, 1, 1, 0, 1, 0]).bool()}
    entry = apfl.accuracies(experiment, right)
    assert entry["accuracy"] == pytest.approx(100 * 8 / 12)
    assert entry["personal_accuracy"] == pytest.approx(75)
    assert entry["dropout_accuracy"] == pytest.approx(100 * 4 / 6)
    assert entry["dropout_personal_accuracy"] == 50
    assert (entry["seen_accuracy"], entry["unseen_accuracy"]) == (75, 50)
    assert entry["harmonic_accuracy"] == pytest.approx(60)
    apart = apfl.group_accuracies(experiment, right)
    assert apart["", "accuracy"] == pytest.approx(100 * 4 / 6)
    assert (apart["", "personal_accuracy"], apart["dropout", "personal_accuracy"]) == (100, 50)


def test_the_curve_over_beta_ends_at_the_friend_and_at_the_clients_own_model(plain_apfl,
                                                                            monkeypatch):
    monkeypatch.setattr(apfl, "BETA_TEST_IMAGES", 1000)  # more than there are: all
    experiment = run.prepare_experiment(config(plain_apfl))._replace(
        watch=lambda items, what, unit: items)
    saved = torch.load(plain_apfl / "checkpoint.pt", weights_only=True)
    curves = apfl.beta_curves(experiment, saved["server"], saved["after"], [0.0, 0.1, 1.0])
    last = lines(plain_apfl)[-1]
    for name in ("accuracy", "personal_accuracy"):
        ends = [last[f"{kind}_{name}"] for kind in ("friend", "personalised", "client")]
        assert curves["", name] == pytest.approx(ends) and ("dropout", name) not in curves


def test_the_stages_hand_their_settings_on(monkeypatch):
    """What the generator's training and a client's friend update are called with."""
    of_generator = {"generator_steps": 3, "generator_batch": 4, "distance": "l2"}
    of_friend = {"friend_epochs": 2, "synthetic_per_class": 6, "friend_labels": "local",
                 "batch_size": 7}
    settings = run.resolve({"method": "apfl", "train_images": 100, "partition": "iid",
                            "lambda": 0.8, **of_generator, **of_friend})
    called = []

    def train_generator(net, teachers, weights, rng, **options):
        called.append((rng.initial_seed(), options))
        yield torch.tensor([1.0, 2.0])

    def train(update, tasks, what):
        called.append(update.keywords)
        assert {task.number for task in tasks} == {0}
        return {task.client.id: baselines.Result(None, 0.0, 1, kept={}) for task in tasks}

    monkeypatch.setattr(apfl, "train_generator", train_generator)
    experiment = run.prepare_experiment(settings)._replace(
        semantics=torch.eye(10), train=train, watch=lambda items, *_: Bar(items))
    server = {"weights": {"cnn": weights_of(0)}, "teachers": {0: {
        "weights": weights_of(1), "class_counts": torch.ones(10, dtype=torch.int64)}}}
    stages = experiment.method.stages
    after = {"generator": stages["generator"](experiment, server, {})}
    stages["friends"](experiment, server, after)
    (seed, options), keywords = called
    assert seed == data.torch_stream(0, data.GENERATOR_NOISE).initial_seed()
    assert (of_generator | {"balance": 0.8}).items() <= options.items() and keywords == of_friend


class Bar(list):
    """A progress bar that shows nothing."""

    def set_postfix_str(self, text, refresh):
        assert text == "L_cls 1.000, L_diversity 2.000"


def test_the_sheet_shows_samples_in_the_range_of_images(plain_apfl):
    experiment = run.prepare_experiment(config(plain_apfl))
    after = torch.load(plain_apfl / "checkpoint.pt", weights_only=True)["after"]
    net = generator.load_generator(after["generator"], 1, 4)
    x = generator.sample(net, torch.arange(10).repeat_interleave(10), data.torch_stream(
        config(plain_apfl)["seed"], data.GENERATOR_NOISE, round=1))
    mean, deviation = (number.item() for number in experiment.statistics)
    expected = (x.numpy() * deviation + mean).clip(0, 255).reshape(10, 10, 1, 32, 32)
    sheet = apfl.sample_sheet(experiment, after)
    assert sheet.dtype == torch.uint8 and sheet.float().std() > 10
    assert np.abs(sheet.numpy() - np.floor(expected)).max() <= 1


def test_the_curve_over_beta_uses_evenly_spaced_test_images(plain_apfl, monkeypatch):
    experiment = run.prepare_experiment(config(plain_apfl))._replace(watch=lambda items, *_: items)
    saved, seen = torch.load(plain_apfl / "checkpoint.pt", weights_only=True), []

    def predicted_right(few, in_use):
        seen.append(few)
        return {k: torch.ones(5, dtype=torch.bool) for k, *_ in in_use}

    monkeypatch.setattr(apfl, "predicted_right", predicted_right)
    curves = apfl.beta_curves(experiment, saved["server"], saved["after"], [0.5])
    rows = [39 * n // 4 for n in range(5)]  # of 40 test images
    assert torch.equal(seen[0].data.y_test, experiment.data.y_test[rows])
    assert torch.equal(seen[0].data.x_test, experiment.data.x_test[rows])
    for share, few in zip(experiment.test_shares, seen[0].test_shares):
        assert [rows[n] for n in few.tolist()] == [n for n in rows if n in share.tolist()]
    assert curves["", "accuracy"] == [100]


def same_nest(a: object, b: object) -> bool:
    """Whether all tensors of two checkpoints' parts are equal; others may differ in shape."""
    ours, theirs = list(models.tensors_in(a)), list(models.tensors_in(b))
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("flags", ["--beta 0.9", "--beta-on friend", "--lambda 0.9",
                                   "--semantics onehot", "--friend-labels local",
                                   "--teacher clients", "--distance l2", "--generator-steps 5"])
def test_an_option_of_apfl_changes_the_stages_and_nothing_else(flags, tmp_path, plain_apfl):
    go(tmp_path, *APFL, "--rounds", "2", *flags.split())
    plain, other = (torch.load(folder / "checkpoint.pt", weights_only=True)
                    for folder in (plain_apfl, tmp_path))
    line, other_line = ({name: value for name, value in saved["line"].items() if name != "seconds"}
                        for saved in (plain, other))
    assert line == other_line and same_nest(plain["server"], other["server"])
    same_parts = {part for part in plain["after"]
                  if same_nest(plain["after"][part], other["after"][part])}
    assert same_parts == {"late", *(["generator"] * flags.startswith(("--beta", "--friend"))),
                          *(["friends"] * flags.startswith("--beta"))}
    if flags.startswith("--beta"):
        assert lines(tmp_path)[-1] != lines(plain_apfl)[-1]


def test_apfl_works_with_a_resnet_and_with_augmentation(tmp_path):
    entry, = go(tmp_path, *APFL, "--model", "resnet10", "--rounds", "1", "--augment", "--clients",
                "2", "--participation", "1", "--train-images", "48")
    assert entry["accuracy"] == entry["personalised_accuracy"]


# --------------------------------------------------------------------------- the dropout setting


def test_of_dropout_clients_images_nothing_reaches_the_global_model(tmp_path):
    arrays = dict(np.load(few_digits()))
    gone = arrays["y_train"] >= 8
    noise = np.random.default_rng(0).integers(256, size=arrays["x_train"].shape, dtype=np.uint8)
    states = []
    for name, images in (("plain", arrays["x_train"]),
                         ("noise", np.where(gone[:, None, None], noise, arrays["x_train"]))):
        np.savez(tmp_path / f"{name}.npz", **(arrays | {"x_train": images}))
        go(tmp_path / name, "--method", "apfl", *FEW, *DROPOUT, "--rounds", "1", "--clients", "3",
           "--train-images", "150", "--dataset", str(tmp_path / f"{name}.npz"))
        states.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True))
    plain, noisy = states
    assert all(torch.equal(a, b) for part in ("weights", "teachers") for a, b in zip(
        models.tensors_in(plain["server"][part]), models.tensors_in(noisy["server"][part])))
    assert all(torch.equal(a, b) for a, b in zip(models.tensors_in(plain["after"]["generator"]),
                                                 models.tensors_in(noisy["after"]["generator"])))
    assert not torch.equal(plain["after"]["late"][2]["classifier.fc.weight"],
                           noisy["after"]["late"][2]["classifier.fc.weight"])
    assert sorted(plain["server"]["teachers"]) == [0, 1]


def test_pictures_know_the_unseen_classes_and_whose_weight_beta_is(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "draw_samples", lambda path, images, names, seen, title:
                        drawn.update(seen=seen))
    monkeypatch.setattr(pictures, "draw_beta", lambda path, betas, curves, used, title:
                        drawn.update(used=used, curves=curves))
    go(tmp_path, "--method", "apfl", *FEW, *DROPOUT, "--rounds", "1", "--beta-on", "friend")
    assert drawn["seen"] == 8 * [True] + 2 * [False] and drawn["used"] == 0.9
    assert ("dropout", "accuracy") in drawn["curves"]


@pytest.mark.parametrize("method", ["fedavg", "fedavg-ft", "local", "fedprox"])
def test_every_method_reports_on_dropout_clients(method, tmp_path):
    last = go(tmp_path, "--method", method, *DROPOUT)[-1]
    assert {"seen_accuracy", "unseen_accuracy", "harmonic_accuracy", "dropout_accuracy",
            "dropout_personal_accuracy"} <= last.keys()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if method == "local":  # who trains alone has nothing to drop out from
        assert sorted(saved["memory"]) == list(range(6))
    if method == "fedavg-ft":  # the dropout client learns its two classes, and forgets the others
        assert sorted(saved["after"]["late"]) == list(range(6))
        assert last["unseen_accuracy"] > last["seen_accuracy"]
    if method in ("fedavg", "fedprox"):
        assert last["unseen_accuracy"] == 0


def test_dropout_clients_are_never_drawn():
    settings = run.resolve({"clients": 10, "participation": 1.0, "missing_classes": 0.4})
    experiment = run.prepare_experiment(settings)
    assert experiment.dropouts == [8, 9]
    assert run.draw_participants(experiment, 1) == list(range(8))
    experiment = run.prepare_experiment(settings | {"participation": 0.5, "missing_classes": 0.2})
    drawn = [run.draw_participants(experiment, t) for t in range(1, 40)]
    assert all(len(chosen) == 5 and 9 not in chosen for chosen in drawn)
    assert {k for chosen in drawn for k in chosen} == set(range(9))
    assert drawn[2] == participants(experiment.settings, 3, gone=(9,))


# ------------------------------------------------------------------------ asynchronous aggregation


def test_asynchronous_rounds_are_a_simulation_written_out():
    """Client k's n-th work adds step(k, n) to what it received; the last client has dropped out."""
    sizes, speeds, rng = [10, 21, 15, 12], [1.0, 2.7, 1.9, 3.9], np.random.default_rng(0)
    steps = rng.normal(size=(4, 40))
    clients = [baselines.Client(k, torch.arange(n), "net") for k, n in enumerate(sizes)]
    trained = []

    def train(update, tasks, what=""):
        assert update is baselines.fedavg_client_update
        trained.extend((task.client.id, task.number) for task in tasks)
        return {task.client.id: baselines.Result(baselines.Update(
            {"w": task.received["w"] + steps[task.client.id, task.number]}, 1),
            loss=float(task.number), samples=task.client.id) for task in tasks}

    experiment = baselines.Experiment(
        {"seed": 0}, baselines.FEDAVG, None, clients, [3], [], [], [], None, speeds, {},
        train=train)
    server, logged = {"weights": {"net": {"w": torch.zeros((), dtype=torch.float64)}}}, []
    for t in (1, 2, 3):
        server, memory, figures = apfl.asynchronous_round(
            experiment, t, server, {"kept": 1}, local_epochs=2, batch_size=5, mixing=0.7,
            staleness="polynomial")
        assert memory == {"kept": 1}
        logged.append(figures)

    lengths = [2 * count / speed for count, speed in zip((10, 20, 15), speeds)]  # 21: 20 and one
    arrivals = sorted((n * length, k, n) for k, length in enumerate(lengths)
                      for n in range(1, 20))[:9]
    x, received, ends, behind = 0.0, [(0.0, 0)] * 3, [0.0], []
    for version, (now, k, n) in enumerate(arrivals):
        base, since = received[k]
        behind.append(version - since)
        share = 0.7 * (behind[-1] + 1) ** -0.5
        x = (1 - share) * x + share * (base + steps[k, n])
        received[k] = x, version + 1
        ends.append(now)
    assert server["weights"]["net"]["w"].item() == pytest.approx(x, rel=1e-12)
    for t, figures in enumerate(logged):
        part = arrivals[3 * t:3 * t + 3]
        assert figures["clock"] == pytest.approx(ends[3 * t + 3] - ends[3 * t])
        assert figures["staleness_mean"] == pytest.approx(sum(behind[3 * t:3 * t + 3]) / 3)
        assert figures["samples"] == sum(k for _, k, _ in part)
        assert figures["loss"] == pytest.approx(sum(n for *_, n in part) / figures["samples"])
        assert figures["upload_mb"] == figures["download_mb"] == 3 * 8 / 1e6
    assert sorted(trained) == sorted((k, n) for _, k, n in arrivals)  # each once, and no others


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "apfl"])
def test_asynchronous_runs_log_the_clock_and_staleness(method, tmp_path):
    few = FEW if method == "apfl" else []
    entries = go(tmp_path, *ASYNC, "--method", method, "--rounds", "3", *few)
    clocks = [entry["clock"] for entry in entries]
    assert clocks == sorted(clocks) and clocks[0] > 0
    assert entries[0]["staleness_mean"] < entries[1]["staleness_mean"]
    settings = config(tmp_path)
    assert settings["mixing"] == 0.6 and settings["staleness"] == "polynomial"
    assert "participation" not in settings
    one_upload = entries[0]["upload_mb"] / 5
    assert entries[1]["upload_mb"] == pytest.approx(5 * one_upload)
    assert entries[1]["download_mb"] == pytest.approx(entries[0]["download_mb"])


def test_arrivals_follow_the_speeds_of_the_clients(tmp_path):
    entries = go(tmp_path, *ASYNC, "--method", "fedavg", "--rounds", "3", "--speed-spread", "9")
    experiment = run.prepare_experiment(config(tmp_path))
    exponents = data.numpy_stream(0, data.SPEEDS).uniform(size=5)
    assert experiment.speeds == [9.0 ** exponent for exponent in exponents]
    times = sorted((24 * n / speed, k) for k, speed in enumerate(experiment.speeds)
                   for n in range(1, 16))[:15]
    for t, entry in enumerate(entries, start=1):
        assert entry["clock"] == pytest.approx(times[5 * t - 1][0])
    version, received, staleness = 0, dict.fromkeys(range(5), 0), []
    for _, k in times:
        staleness.append(version - received[k])
        version += 1
        received[k] = version
    assert [entry["staleness_mean"] for entry in entries] == pytest.approx(
        [sum(staleness[5 * t:5 * t + 5]) / 5 for t in range(3)])


def test_asynchronous_runs_repeat_with_any_workers_and_resume_amid_their_events(tmp_path):
    flags = [*ASYNC, "--method", "fedavg"]
    whole = go(tmp_path / "one", *flags, "--rounds", "3", "--workers", "1")
    assert go(tmp_path / "two", *flags, "--rounds", "3", "--workers", "2") == whole
    go(tmp_path / "parts", *flags, "--rounds", "2")
    assert go(tmp_path / "parts", "--resume", "--rounds", "3") == whole
    assert result(tmp_path / "parts") == result(tmp_path / "one")


def test_a_client_in_flight_at_the_end_has_taken_part(tmp_path):
    """One of five is so slow that nothing of it arrives in the only round; it ends its work late."""
    flags = [*ASYNC, *FEW, "--method", "apfl", "--rounds", "1", "--speed-spread", "200"]
    entry, = go(tmp_path, *flags)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    server, late = saved["server"], saved["after"]["late"]
    assert late and set(late) == set(range(5)) - server["teachers"].keys()
    experiment = run.prepare_experiment(config(tmp_path))
    first = run.first_progress(experiment).server["weights"]["cnn"]
    for k, trained in late.items():
        assert same(server["flights"][k]["received"], first)  # since nothing of it has arrived
        task = baselines.Task(experiment.clients[k], 1, first)
        by_hand = run.train_client(experiment, experiment.method.client_update, task)
        for name, weight in by_hand.update.weights.items():  # made in a thread of other rounding
            torch.testing.assert_close(trained[name], weight)
        assert not torch.equal(trained["classifier.fc.bias"], first["classifier.fc.bias"])
    assert "dropout_accuracy" not in entry and experiment.dropouts == []


def test_mixing_zero_never_moves_and_staleness_matters(tmp_path):
    flags = [*ASYNC, "--method", "fedavg", "--rounds", "2"]
    still = go(tmp_path / "still", *flags, "--mixing", "0")
    assert still[0]["accuracy"] == still[1]["accuracy"]
    runs = [go(tmp_path / kind, *flags, "--staleness", kind)
            for kind in ("constant", "polynomial", "hinge")]
    assert runs[0] == runs[2] != runs[1]  # with five clients nobody is beyond the hinge
