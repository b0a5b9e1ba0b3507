"""AP-FL: functions against loops written out, files of runs against computations by hand."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import (APFL, ASYNC, DROPOUT, FEW, TWO_OF_THREE, checkpoint, config, experiment_of,
                      go, lines, make_small, result)
from tiny import (EPOCHS, alike, few_digits, same, sgd, stream, tiny_data, tiny_experiment,
                  weights)
from torch import nn

import apfl
import baselines
import data
import federation
import generator
import models
from federation import Client, LabelledUpdate, Result, Task, Update
from semantics import load_semantics
from tests import every_round, unseen

RUNS = {
    # Two rounds, each of two of three clients, with all defaults
    "plain": [*APFL, "--rounds", "2"],
    # The third client alone has classes 8 and 9; every option of the stages is not the default
    "other": ["--method", "apfl", *DROPOUT, *FEW, *(
        "--rounds 1 --clients 3 --train-images 150 --beta 0.3 --beta-on friend --teacher clients "
        "--distance l2 --lambda 0.9 --friend-labels local --friend-epochs 2 --semantics onehot "
        "--generator-steps 4 --generator-batch 3 --synthetic-per-class 5 --noise-dim 3").split()]}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Give AP-FL a narrow generator, and three values of beta on all of the few test images."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(apfl, "BETAS", [0.0, 0.1, 1.0])
        patch.setattr(apfl, "BETA_TEST_IMAGES", 1000)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name -> folder, checkpoint and experiment of a run, and the outcome of its stages."""
    made = {}
    for name, flags in RUNS.items():
        out = tmp_path_factory.mktemp(name) / "out"
        go(out, *flags)
        saved, experiment = checkpoint(out), experiment_of(config(out))
        ending = experiment.method.finish(experiment, saved["server"], saved["stage_results"], None)
        made[name] = out, saved, experiment, ending
    return made


# ---------------------------------------------------------- federated training, asynchronous rounds

def test_the_server_averages_as_fedavg_and_keeps_each_clients_last_upload():
    plain = baselines.fedavg_init({"tiny": weights()})
    server = after = plain | {"teachers": {}}
    for seeds in ({1: 1, 2: 2}, {2: 3}):
        updates = {k: LabelledUpdate(weights(seed), k + seed, torch.tensor([k, seed]))
                   for k, seed in seeds.items()}
        after = apfl.apfl_server_update(after, updates)
        plain = baselines.fedavg_server_update(plain, updates)
    assert same(after["weights"]["tiny"], plain["weights"]["tiny"])
    assert alike(after["teachers"], {
        1: [weights(1), torch.tensor([1, 1])], 2: [weights(3), torch.tensor([2, 3])]})
    assert server["teachers"] == {}  # the old state stays


def test_clients_without_an_upload_train_late_by_fedavgs_update():
    experiment, server = tiny_experiment(), {"weights": {"tiny": weights()}, "teachers": {1: {}}}

    def check(late, works):
        """works: client -> number of its work, and the weights that it received"""
        update = partial(baselines.fedavg_client_update, **EPOCHS)
        alone = {k: federation.train_client(experiment, update, Task(experiment.clients[k], *work))
                 for k, work in works.items()}
        torch.testing.assert_close(late, {k: one.update.weights for k, one in alone.items()})

    first = 0, weights()
    check(apfl.apfl_late(experiment, server, **EPOCHS), {0: first, 2: first})
    # The first work of an asynchronous run is completed, on the weights that were sent.
    flight = {"received": weights(8), "version": 3, "work": 1, "arrival": 9.0}
    late = apfl.apfl_late(experiment, server | {"flights": {1: flight, 2: flight}}, **EPOCHS)
    check(late, {0: first, 2: (1, weights(8))})

    # FedAvg-FT trains every client in this way.
    tuned = baselines.fedavg_ft_finish(experiment, server, {}, lambda done: done,
                                       finetune_epochs=2, batch_size=8)
    check(tuned.models["client"], dict.fromkeys(range(3), first))


def test_staleness_weights_have_their_closed_forms():
    for kind in ("constant", "polynomial", "hinge"):
        values = [apfl.staleness_weight(d, kind) for d in range(30)]
        assert values[0] == 1 and values == sorted(values, reverse=True) and min(values) > 0
    assert apfl.staleness_weight(29, "constant") == apfl.staleness_weight(4, "hinge") == 1
    assert apfl.staleness_weight(3, "polynomial") == pytest.approx(0.5)
    assert apfl.staleness_weight(8, "polynomial", exponent=2) == pytest.approx(1 / 81)
    assert apfl.staleness_weight(5, "hinge") == pytest.approx(1 / 11)
    assert apfl.staleness_weight(7, "hinge", slope=2, patience=6) == pytest.approx(1 / 3)


def test_constant_mixing_is_an_exponential_moving_average():
    sent = torch.tensor([[3.0, 1.0], [-2.0, 0.5], [4.0, 7.0]], dtype=torch.float64)
    mixed = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    closed = 0.7**3 * mixed["w"] + 0.3 * (0.7**2 * sent[0] + 0.7 * sent[1] + sent[2])
    for k in range(3):
        mixed = apfl.mix(mixed, {k: {"w": sent[k]}}, {k: 99}, share=0.3)
    torch.testing.assert_close(mixed["w"], closed, rtol=1e-12, atol=0)
    assert same(apfl.mix(weights(0), {3: weights(1)}, {}, share=0.0), weights(0))
    assert same(apfl.mix(weights(0), {3: weights(1)}, {}, share=1.0), weights(1))


def arrivals_by_hand(lengths, count: int) -> list[tuple]:
    """First arrivals: (time, client, number of its work).

    lengths: client -> time that a piece of its work takes
    """
    return sorted((n * length, k, n) for k, length in enumerate(lengths)
                  for n in range(1, count + 1))[:count]


def test_asynchronous_rounds_are_a_simulation_written_out(monkeypatch):
    """Client k's n-th work adds step(k, n); 0 and 1 arrive at equal times, 3 has dropped out."""
    sizes, speeds, rng = [10, 21, 15, 12], [1.0, 2.0, 3.7, 3.9], np.random.default_rng(0)
    steps, calls = rng.normal(size=(4, 40)), []

    def train_clients(experiment, update, tasks):
        assert update is baselines.fedavg_client_update
        calls.append([(task.client.id, task.number) for task in tasks])
        return {task.client.id: Result(
            Update({"w": task.received["w"] + steps[task.client.id, task.number]}, 1),
            loss=float(task.number), samples=task.client.id) for task in tasks}

    monkeypatch.setattr(apfl, "train_clients", train_clients)
    experiment = tiny_experiment()._replace(
        method=baselines.FEDAVG, speeds=speeds, available=[0, 1, 2],
        clients=[Client(k, torch.arange(n), "net") for k, n in enumerate(sizes)])
    server, logged = {"weights": {"net": {"w": torch.zeros((), dtype=torch.float64)}}}, []
    for _ in range(3):
        server, figures = apfl.asynchronous_round(experiment, server, local_epochs=2, batch_size=5,
                                                  mixing=0.7, staleness="polynomial")
        logged.append(figures)

    # Nine arrivals; of 21 images a batch of one is left out
    arrivals = arrivals_by_hand([2 * n / speed for n, speed in zip((10, 20, 15), speeds)], 9)
    x, received, behind, ends = 0.0, [(0.0, 0)] * 3, [], [0.0, *(time for time, *_ in arrivals)]
    for version, (_, k, n) in enumerate(arrivals):
        base, since = received[k]
        behind.append(version - since)
        share = 0.7 * (behind[-1] + 1) ** -0.5
        x = (1 - share) * x + share * (base + steps[k, n])
        received[k] = x, version + 1
    assert server["weights"]["net"]["w"].item() == pytest.approx(x, rel=1e-12)
    for t, figures in enumerate(logged):
        part = arrivals[3 * t:3 * t + 3]
        samples = sum(k for _, k, _ in part)
        assert figures == pytest.approx({
            "clock": ends[3 * t + 3] - ends[3 * t], "upload_mb": 24e-6, "download_mb": 24e-6,
            "staleness_mean": sum(behind[3 * t:3 * t + 3]) / 3, "samples": samples,
            "loss": sum(n for *_, n in part) / samples})
    assert sorted(sum(calls, [])) == sorted((k, n) for _, k, n in arrivals)  # nothing trains twice
    assert len(calls) < 9  # several clients train at a time


def test_asynchronous_runs_follow_the_clients_speeds_with_any_workers_and_resume(tmp_path):
    flags = [*ASYNC, "--method", "fedprox", "--speed-spread", "9"]
    entries = go(tmp_path / "one", *flags, "--rounds", "3", "--workers", "1")
    assert {"mixing": 0.6, "staleness": "polynomial"}.items() <= config(tmp_path / "one").items()

    # Each of five clients has 24 images.
    speeds = [9.0**exponent for exponent in data.numpy_stream(0, data.SPEEDS).uniform(size=5)]
    arrivals = arrivals_by_hand([24 / speed for speed in speeds], 15)
    assert [entry["clock"] for entry in entries] == pytest.approx(
        [arrivals[last][0] for last in (4, 9, 14)])

    go(tmp_path / "two", *flags, "--rounds", "2", "--workers", "2")
    assert go(tmp_path / "two", "--resume", "--rounds", "3") == entries
    assert result(tmp_path / "two") == result(tmp_path / "one")


def test_a_client_in_flight_at_the_end_completes_its_work(tmp_path):
    """With a share of 1 the server has the weights of the last arrival."""
    go(tmp_path, *ASYNC, *FEW, "--method", "apfl", *(
        "--rounds 1 --clients 3 --train-images 72 --speed-spread 200 --mixing 1 "
        "--staleness constant").split())
    server, late = checkpoint(tmp_path)["server"], checkpoint(tmp_path)["stage_results"]["late"]
    assert late and late.keys() == set(range(3)) - server["teachers"].keys()
    experiment = experiment_of(config(tmp_path))
    first = federation.first_server(experiment)["weights"]["cnn"]
    for k, state in late.items():
        assert same(server["flights"][k]["received"], first) and not same(state, first)
    _, last, _ = arrivals_by_hand([24 / speed for speed in experiment.speeds], 3)[-1]
    assert same(server["weights"]["cnn"], server["teachers"][last]["weights"])


# ----------------------------------------------------------- teachers, friend models, interpolation

def test_teachers_are_the_global_model_or_the_last_uploads_by_their_share_of_each_class():
    server = {"weights": {"tiny": weights(0)}, "teachers": {
        5: {"weights": weights(5), "class_counts": torch.tensor([3, 0, 1])},
        2: {"weights": weights(2), "class_counts": torch.tensor([1, 0, 0])}}}
    states, alpha = apfl.teachers_of(server, "global")
    assert alpha.tolist() == [[1, 0, 1]] and alike(states, [weights(0)])
    states, alpha = apfl.teachers_of(server, "clients")
    assert alpha.tolist() == [[0.25, 0, 0], [0.75, 0, 1]]
    assert alike(states, [weights(2), weights(5)])


class TinyGenerator(nn.Module):
    """Images of 8 x 8 for TinyNet, of noise and one of three classes."""

    noise_dim, semantics = 4, torch.eye(3)

    def __init__(self):
        super().__init__()
        with models.drawing_from(torch.Generator().manual_seed(3)):
            self.linear = nn.Linear(7, 64)

    def forward(self, z, y):
        return self.linear(torch.cat([z, self.semantics[y]], dim=1)).unflatten(1, (1, 8, 8))


@pytest.mark.parametrize("labels, shares", [("local", [0.25, 0, 0.75]), ("all", [1 / 3] * 3)])
def test_a_friend_is_the_global_model_trained_on_synthetic_samples_alone(labels, shares):
    def friend(images, friend_epochs=2):
        return apfl.apfl_friend_update(
            *sgd(), (weights(), TinyGenerator()), images, stream, friend_epochs=friend_epochs,
            synthetic_per_class=5, batch_size=8, friend_labels=labels)

    images = tiny_data(8)
    images.labels[images.indices] = torch.tensor([0, 2, 2, 2, 0, 2, 2, 2])
    trained = friend(images)
    rng, (model, optimizer), order = stream(data.SYNTHETIC), sgd(), stream(data.FRIEND_BATCHES)
    y = torch.multinomial(torch.tensor(shares), 15, replacement=True, generator=rng)
    x = TinyGenerator()(torch.randn(15, 4, generator=rng), y).detach()
    model.load_state_dict(weights())
    for _ in range(2):
        for rows in torch.randperm(15, generator=order).split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    assert same(trained.kept, models.copy_state(model)) and trained.samples == 30
    assert models.num_bytes(trained.update) == 0  # nothing is sent
    others = images._replace(images=255 - images.images)  # only labels are read
    assert same(friend(others).kept, trained.kept)
    assert same(friend(images, friend_epochs=0).kept, weights())


def test_beta_one_is_the_client_and_beta_zero_the_friend():
    client, friend = weights(1), weights(2)
    assert same(apfl.personalise(client, friend, beta=1.0), client)
    assert same(apfl.personalise(client, friend, beta=0.0), friend)
    assert same(apfl.personalise(client, friend, beta=1.0, beta_on="friend"), friend)
    assert same(apfl.personalise(client, client, beta=0.77), client)
    for name, tensor in apfl.personalise(client, friend, beta=0.77).items():
        expected = (0.77 * client[name] + 0.23 * friend[name]).to(tensor.dtype)
        torch.testing.assert_close(tensor, expected)


# ---------------------------------------------------------------------- stages after the last round

def test_a_run_leaves_pictures_and_the_accuracies_of_all_its_models(runs):
    out, saved, experiment, ending = runs["plain"]
    assert {"curves.png", "samples.png", "beta.png"} <= {path.name for path in out.iterdir()}
    (before, last), drawn = lines(out), ending.pictures["beta.png"].keywords
    assert last.keys() - before.keys() == {
        f"{kind}_{name}" for kind in ("client", "friend", "personalised", "global")
        for name in ("accuracy", "personal_accuracy")}
    assert (config(out)["beta"], config(out)["semantics"], drawn["used"]) == (0.1, "segments", 0.1)
    for name in ("accuracy", "personal_accuracy"):
        assert last[name] == last[f"personalised_{name}"] == result(out)[name]
        ends = [last[f"{kind}_{name}"] for kind in ("friend", "personalised", "client")]
        assert drawn["curves"]["", name] == pytest.approx(ends)  # at beta 0, 0.1 and 1

    # Traffic of the stages: the global weights and the generator to each of three clients
    size = models.num_bytes(saved["server"]["weights"])
    sent = 3 * (size + models.num_bytes(saved["stage_results"]["generator"]))
    assert last["download_mb"] == pytest.approx((2 * size + sent) / 1e6)
    assert result(out)["download_mb"] == pytest.approx((4 * size + sent) / 1e6)

    # Samples in the range of images
    net = generator.load_generator(saved["stage_results"]["generator"], 1, 4)
    x = generator.sample(net, torch.arange(10).repeat_interleave(10),
                         data.torch_stream(config(out)["seed"], data.GENERATOR_NOISE, round=1))
    mean, deviation = experiment.statistics
    expected = (x * deviation + mean).clamp(0, 255).reshape(10, 10, 1, 32, 32).floor()
    images = ending.pictures["samples.png"].keywords["images"]
    assert images.dtype == torch.uint8 and images.float().std() > 10
    assert (images - expected).abs().max() <= 1


def test_the_rounds_of_apfl_and_fedavg_ft_are_fedavgs(runs, tmp_path):
    folders = [runs["plain"][0]]
    for method in ("fedavg", "fedavg-ft"):
        folders.append(tmp_path / method)
        go(folders[-1], *TWO_OF_THREE, "--method", method, "--rounds", "2")
    ours, plain, tuned = map(lines, folders)
    states = [checkpoint(out)["server"]["weights"]["cnn"] for out in folders]
    assert same(states[0], states[1]) and same(states[0], states[2])
    counts = 2 * 8 * 10 / 1e6  # two clients send int64 numbers of images of ten classes
    for line, theirs in zip(ours, plain):
        assert line["upload_mb"] == pytest.approx(theirs["upload_mb"] + counts, abs=1e-12)
        assert all(line[name] == theirs[name] for name in ("loss", "samples", "clock"))
    assert ours[0]["accuracy"] == plain[0]["accuracy"] and tuned[0] == plain[0]
    size = models.num_bytes(states[0]) / 1e6  # to each of three clients once more
    assert tuned[1]["download_mb"] == pytest.approx(plain[1]["download_mb"] + 3 * size)
    for line in (ours[1], tuned[1]):
        for name in ("accuracy", "personal_accuracy"):
            assert line[f"global_{name}"] == plain[1][name]


@pytest.mark.parametrize("run, teacher, semantics, noise_dim, training, friends", [
    ("plain", "global", "segments", 4, (3, 2, 0.5, "rms"), (1, 4, "all", 12)),
    ("other", "clients", "onehot", 3, (4, 3, 0.9, "l2"), (2, 5, "local", 50))])
def test_stages_are_as_by_hand(run, teacher, semantics, noise_dim, training, friends, runs):
    out, saved, experiment, _ = runs[run]
    server, done, seed = saved["server"], saved["stage_results"], config(out)["seed"]
    for k, sent in server["teachers"].items():
        labels = experiment.data.y_train[experiment.clients[k].indices]
        assert torch.equal(sent["class_counts"], labels.bincount(minlength=10))

    # The generator
    embeddings = load_semantics(experiment.data.classes, semantics=semantics)
    net = generator.initial_generator(embeddings, 1, noise_dim,
                                      data.torch_stream(seed, data.GENERATOR_WEIGHTS))
    states, alpha = apfl.teachers_of(server, teacher)
    names = ("generator_steps", "generator_batch", "balance", "distance")
    generator.train_generator(
        net, [experiment.network("cnn", state) for state in states], alpha,
        data.torch_stream(seed, data.GENERATOR_NOISE), **dict(zip(names, training)))
    assert same(done["generator"], models.copy_state(net))

    # Friend models; worker threads round differently
    names = ("friend_epochs", "synthetic_per_class", "friend_labels", "batch_size")
    update = partial(apfl.apfl_friend_update, **dict(zip(names, friends)))
    by_hand = {client.id: federation.train_client(
        experiment, update, Task(client, 0, (server["weights"]["cnn"], net))).kept
        for client in experiment.clients}
    torch.testing.assert_close(done["friends"], by_hand)


def test_each_stage_is_saved_and_what_is_done_is_not_done_again(runs, monkeypatch):
    (_, saved, experiment, whole), saves = runs["plain"], []
    finish = partial(experiment.method.finish, experiment, saved["server"],
                     save=lambda done: saves.append(done) or done)
    monkeypatch.setattr(apfl, "BETAS", [])
    finish({})
    assert [list(done) for done in saves] == [
        ["late"], ["late", "generator"], ["late", "generator", "friends"]]
    assert alike(saves[2], saved["stage_results"])
    for done, function in zip(tuple(saves), ("train_late", "train_generator", "train_clients")):
        monkeypatch.setattr(apfl, function, None)  # cannot be called any more
        saves.clear()
        resumed = finish(done)
        assert len(saves) == 3 - len(done)
        assert alike(resumed.models, whole.models) and resumed.download == whole.download


def test_the_curve_over_beta_uses_evenly_spaced_test_images(runs, monkeypatch):
    (_, _, experiment, _), used = runs["plain"], []

    monkeypatch.setattr(apfl, "predicted_right", lambda smaller, in_use: used.append(smaller) or {
        k: torch.ones(5, dtype=torch.bool) for k, *_ in in_use})
    monkeypatch.setattr(apfl, "BETA_TEST_IMAGES", 5)
    states = {k: weights(k) for k in range(3)}
    assert apfl.beta_curves(experiment, states, states)["", "accuracy"] == [100] * 3
    images, rows = experiment.data, [39 * n // 4 for n in range(5)]
    assert alike([used[0].data.x_test, used[0].data.y_test],
                 [images.x_test[rows], images.y_test[rows]])
    for share, smaller in zip(experiment.test_shares, used[0].test_shares):
        assert [rows[n] for n in smaller.tolist()] == [n for n in rows if n in share.tolist()]


def test_colour_images_a_resnet_and_augmentation_work(tmp_path):
    x = np.random.default_rng(0).integers(256, size=(60, 32, 32, 3), dtype=np.uint8)
    y, path, out = np.arange(60) % 3, tmp_path / "colour.npz", tmp_path / "out"
    np.savez(path, x_train=x[:48], y_train=y[:48], x_test=x[48:], y_test=y[48:])
    entry, = go(out, *APFL, "--dataset", str(path), "--augment", *(
        "--model resnet10 --rounds 1 --clients 2 --participation 1 --train-images 48 "
        "--semantics onehot").split())
    assert entry["accuracy"] == entry["personalised_accuracy"] and config(out)["beta"] == 0.01


def test_final_accuracies_are_those_of_the_saved_models(runs):
    out, saved, experiment, ending = runs["other"]
    last, teachers, done = lines(out)[-1], saved["server"]["teachers"], saved["stage_results"]
    assert (sorted(teachers), list(done["late"]), experiment.unseen) == ([0, 1], [2], [8, 9])
    sheet, drawn = (ending.pictures[f"{name}.png"].keywords for name in ("samples", "beta"))
    assert sheet["seen"] == [label in experiment.seen for label in range(10)]
    assert drawn["used"] == 0.7 and ("dropout", "accuracy") in drawn["curves"]

    # The models of all clients; beta weights the friend
    client = {k: teachers[k]["weights"] for k in (0, 1)} | done["late"]
    both = {k: {name: 0.3 * done["friends"][k][name] + 0.7 * tensor for name, tensor in one.items()}
            for k, one in client.items()}
    torch.testing.assert_close(ending.models, {
        "client": client, "friend": done["friends"], "personalised": both})

    # Test images that they get right
    mean, deviation = experiment.statistics
    x, labels = (experiment.data.x_test - mean) / deviation, experiment.data.y_test
    for kind, states in ending.models.items():
        right = [100 * (experiment.network("cnn", states[k])(x).argmax(dim=1) == labels)
                 .double().mean().item() for k in range(3)]
        assert last[f"{kind}_accuracy"] == pytest.approx(sum(right[:2]) / 2)
        assert last[f"dropout_{kind}_accuracy"] == pytest.approx(right[2])


def test_images_of_dropout_clients_never_reach_the_global_model(runs, tmp_path):
    arrays, rng = dict(np.load(few_digits())), np.random.default_rng(0)
    noise = rng.integers(256, size=arrays["x_train"].shape, dtype=np.uint8)
    arrays["x_train"] = np.where(arrays["y_train"][:, None, None] >= 8, noise, arrays["x_train"])
    np.savez(tmp_path / "noise.npz", **arrays)
    go(tmp_path / "out", *RUNS["other"], "--dataset", str(tmp_path / "noise.npz"))
    clean, noisy = runs["other"][1], checkpoint(tmp_path / "out")
    assert alike(clean["server"], noisy["server"])
    assert same(clean["stage_results"]["generator"], noisy["stage_results"]["generator"])
    assert not alike(clean["stage_results"]["late"], noisy["stage_results"]["late"])


@pytest.mark.parametrize("method", ["fedavg", "fedavg-ft", "local"])
def test_a_dropout_client_knows_its_own_classes_best_if_it_trains(method, tmp_path):
    last, trains = go(tmp_path, "--method", method, *DROPOUT)[-1], method != "fedavg"
    assert (last["unseen_accuracy"] > last["seen_accuracy"]) == trains
    assert (last["unseen_accuracy"] > 0) == trains and last["dropout_personal_accuracy"] >= 0


def test_the_check_of_unseen_classes_counts_as_by_hand(runs):
    _, saved, experiment, ending = runs["other"]
    progress = SimpleNamespace(server=saved["server"], stage_results=saved["stage_results"])
    found = dict(unseen.measured(experiment, progress))
    images, labels = experiment.data.x_test, experiment.data.y_test.tolist()
    for kind in ("friend", "personalised"):
        net = experiment.network("cnn", ending.models[kind][2]).eval()
        logits = net(experiment.prepare(images)).tolist()
        called = [row.index(max(row)) for row in logits]
        new = [number for number, label in enumerate(labels) if label >= 8]
        old = [number for number, label in enumerate(labels) if label < 8]
        for what, hits, of in (
                ("unseen images that it gets right", [called[n] == labels[n] for n in new], new),
                ("unseen images called unseen", [called[n] >= 8 for n in new], new),
                ("seen images called unseen", [called[n] >= 8 for n in old], old),
                ("right between the unseen labels alone, by chance 50",
                 [(logits[n][9] > logits[n][8]) == (labels[n] == 9) for n in new], new)):
            assert found[f"{kind} models: {what}"] == pytest.approx(100 * sum(hits) / len(of))
    # Labels 0, 1, 3, 4, 4, of which 3 and 4 are unseen; predictions 3, 1, 4, 0, 4
    logits = torch.tensor([[0, 1, 0, 9, 2], [0, 9, 0, 1, 2], [0, 0, 0, 1, 9], [9, 0, 0, 1, 2],
                           [0, 0, 0, 1, 9]]).float()
    four = unseen.shares(logits, torch.tensor([0, 1, 3, 4, 4]), torch.tensor([3, 4]))
    assert four.tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 2, 2 / 3])
    x, y = torch.tensor([0.0, 3, 7, 1, 1])[:, None, None, None], torch.tensor([0, 0, 0, 1, 1])
    assert unseen.spread(x, y, [0, 1]) == pytest.approx(((3 + 4 + 7) / 3 + 0) / 2)


def test_clients_train_on_synthetic_images_or_their_own_again_from_round_two_on(monkeypatch):
    monkeypatch.setattr(every_round, "PER_CLASS", 4)
    net = generator.initial_generator(torch.eye(3), 1, generator.NOISE_DIM, stream(1))
    memory, images = models.copy_state(net), tiny_data()
    x, y = images.batch(images.indices)
    made, labels = every_round.synthetic(x, y, memory, stream)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(made, generator.sample(net, labels, stream(data.SYNTHETIC)))
    drawn, labels = every_round.own_again(x, y, memory, stream)
    assert len(drawn) == len(labels) == 12
    assert all(((x == image).flatten(1).all(1) & (y == label)).any()
               for image, label in zip(drawn, labels))

    # In round 1 the update is FedAvg's; later it is FedAvg's on both kinds of images.
    update = partial(every_round.client_update, more=every_round.own_again)
    both = data.ClientData(torch.cat([x, drawn]), torch.cat([y, labels]), torch.arange(32),
                           lambda part: part)
    for received, expected in (({}, images), (memory, both)):
        result = update(*sgd(), (weights(), received), images, stream, **EPOCHS)
        fedavg = baselines.fedavg_client_update(*sgd(), weights(), expected, stream, **EPOCHS)
        assert same(result.update.weights, fedavg.update.weights)
        assert result.samples == fedavg.samples and result.update.num_samples == 20
        assert torch.equal(result.update.class_counts, y.bincount(minlength=3))
