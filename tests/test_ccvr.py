"""CCVR against pooled data, closed forms and AP-FL with its outcome for a friend model."""

import pytest
import torch
from commands import (CNN, DROPOUT, FEW, checkpoint, config, experiment_of, go, lines, make_small,
                      refused, result)
from tiny import all_same, tiny_data

import analysis
import ccvr
import models

DATA = [*CNN, *"--clients 3 --participation 1 --rounds 2 --partition dirichlet --alpha 0.3".split()]
RUN = [*DATA, *"--virtual-per-class 20 --calibration-epochs 2".split()]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features_of_three() -> tuple[torch.Tensor, torch.Tensor, list]:
    """Features of 60 images of four classes, and rows of three clients; one has one image of 3."""
    features = torch.randn(60, 5, generator=random(), dtype=torch.float64) * torch.arange(1, 6)
    labels = torch.randint(3, (60,), generator=random(1))
    labels[0] = 3
    return features, labels, [torch.arange(7), torch.arange(7, 30), torch.arange(30, 60)]


def test_statistics_of_clients_pooled_are_those_of_all_images():
    features, labels, clients = features_of_three()
    whole = ccvr.class_statistics(features, labels)
    parts = [ccvr.class_statistics(features[rows], labels[rows]) for rows in clients]
    assert parts[1].classes.tolist() == [0, 1, 2] and 3 in parts[0].classes
    for one, other in zip(ccvr.pooled(parts), whole):
        torch.testing.assert_close(one, other)
    for label in range(3):
        rows = features[labels == label]
        torch.testing.assert_close(whole.covariances[label], torch.cov(rows.T))
        torch.testing.assert_close(whole.means[label], rows.mean(dim=0))
    assert not whole.covariances[3].any() and whole.counts.tolist()[3] == 1
    (alone,) = ccvr.pooled(parts[:1]).classes[-1:]
    assert alone == 3


def test_drawn_features_have_the_means_and_covariances_of_their_classes(monkeypatch):
    features, labels, _ = features_of_three()
    features[:, 4] = 2 * features[:, 0] - features[:, 1]  # a singular covariance
    statistics = ccvr.class_statistics(features, labels)
    drawn, drawn_labels = ccvr.virtual_features(statistics, 4000, random(2))
    assert drawn.dtype == torch.float32 and drawn_labels.bincount().tolist() == [4000] * 4
    for label in range(3):
        rows = drawn[drawn_labels == label].double()
        scale = statistics.covariances[label].diagonal().sqrt()
        assert ((rows.mean(dim=0) - statistics.means[label]).abs() < 0.07 * scale).all()
        error = torch.cov(rows.T) - statistics.covariances[label]
        assert (error.abs() < 0.12 * torch.outer(scale, scale)).all()
        torch.testing.assert_close(rows[:, 4], 2 * rows[:, 0] - rows[:, 1], atol=1e-4, rtol=0)
    def flipped(covariances, eigh=torch.linalg.eigh):
        values, vectors = eigh(covariances)
        return values, vectors * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])

    monkeypatch.setattr(torch.linalg, "eigh", flipped)  # as another library may have it
    again, _ = ccvr.virtual_features(statistics, 4000, random(2))
    torch.testing.assert_close(again, drawn, atol=1e-4, rtol=1e-4)
    of_one = drawn[drawn_labels == 3]  # one image has nothing but its own features
    torch.testing.assert_close(of_one, statistics.means[3].float().expand_as(of_one))


def test_calibration_changes_the_last_layer_alone_and_separates_the_drawn_classes():
    weights = models.copy_state(models.CNN(1, 4))
    centres = 5 * torch.eye(4, 512)
    labels = torch.arange(4).repeat_interleave(50)
    features = centres[labels] + torch.randn(200, 512, generator=random())
    new = ccvr.calibrated(weights, features, labels, lambda purpose: random(purpose),
                          calibration_epochs=50)
    changed = {name for name in weights if not torch.equal(weights[name], new[name])}
    assert changed == {"classifier.fc.weight", "classifier.fc.bias"}
    assert new.keys() == weights.keys()
    logits = features @ new["classifier.fc.weight"].T + new["classifier.fc.bias"]
    assert (logits.argmax(dim=1) == labels).double().mean() > 0.99


def test_clients_send_the_statistics_of_their_features_in_evaluation_mode():
    net, images = models.RESNETS["resnet10"](1, 10), tiny_data(24)._replace(
        images=torch.randint(256, (48, 1, 32, 32), dtype=torch.uint8, generator=random()))
    other = models.RESNETS["resnet10"](1, 10)
    sent = ccvr.statistics_update(other, None, net.state_dict(), images, None).update
    with torch.no_grad():
        expected = ccvr.class_statistics(models.representation(
            net.eval(), images.batch(images.indices)[0]), images.labels[images.indices])
    assert torch.equal(sent.classes, expected.classes) and sent.means.dtype == torch.float32
    torch.testing.assert_close(sent.means.double(), expected.means, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sent.covariances.double(), expected.covariances, atol=1e-4,
                               rtol=1e-3)


def test_the_rounds_are_fedavgs_and_the_statistics_count_as_traffic(run_of):
    fedavg, run = run_of(*DATA, "--method", "fedavg"), run_of(*RUN, "--method", "ccvr")
    last, before = lines(run)[-1], lines(fedavg)[-1]
    assert last["global_accuracy"] == before["accuracy"]
    assert all_same(checkpoint(run)["server"]["weights"], checkpoint(fedavg)["server"]["weights"])
    experiment, numbers = experiment_of(config(run)), 0
    for client in experiment.clients:
        held = len(experiment.data.y_train[client.indices].unique())
        numbers += held * (8 + 8 + 4 * 512 + 4 * 512 * 512)
    assert 1e6 * (last["upload_mb"] - before["upload_mb"]) == pytest.approx(numbers)
    assert 1e6 * (result(run)["upload_mb"] - result(fedavg)["upload_mb"]) == pytest.approx(numbers)
    received = 3 * (models.num_bytes(checkpoint(run)["server"]["weights"]) + 4 * 513 * 10)
    assert 1e6 * (last["download_mb"] - before["download_mb"]) == pytest.approx(received)


def test_apfls_friend_model_may_be_ccvrs_model(run_of, monkeypatch):
    make_small(monkeypatch)
    run = run_of(*RUN, "--method", "ccvr")
    apfl = run_of(*RUN, "--method", "apfl", "--friend", "calibrated", "--beta", "0.25")
    last = lines(apfl)[-1]
    assert last["friend_accuracy"] == lines(run)[-1]["accuracy"]
    assert lines(run_of(*DATA, "--method", "apfl", *FEW))[-1]["client_accuracy"] == (
        last["client_accuracy"])
    saved = checkpoint(apfl)
    friend, _ = saved["stage_results"]["calibrated"]
    own = saved["server"]["teachers"][1]["weights"]
    mine = analysis.trained_network(apfl, client=1).net.state_dict()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, 0.25 * own[name] + 0.75 * friend[name])
    for choice in ({"client": 2}, {}):
        assert all_same({"a": analysis.trained_network(run, **choice).net.state_dict()},
                        {"a": checkpoint(run)["stage_results"]["calibrated"][0]})


def test_dropout_clients_send_nothing_and_the_stage_resumes(tmp_path, monkeypatch, capsys):
    def stopped(parts, pool=ccvr.pooled):
        known.append(pool(parts).classes.tolist())
        if len(known) == 1:
            raise KeyboardInterrupt
        return pool(parts)

    known, flags = [], [*DROPOUT, "--rounds", "1", "--method", "apfl", "--friend", "calibrated"]
    monkeypatch.setattr(ccvr, "pooled", stopped)
    assert "--resume" in refused(capsys, *flags, "--out", str(tmp_path / "one"), status=130)
    assert [*checkpoint(tmp_path / "one")["stage_results"]] == ["late"]
    assert go(tmp_path / "one", "--resume") == go(tmp_path / "two", *flags)
    assert known == [list(range(8))] * 3  # classes 8 and 9 are the dropout client's alone
