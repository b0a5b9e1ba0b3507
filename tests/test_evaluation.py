"""Accuracies against counts by hand, on a few test images and clients."""

import pytest
import torch
from tiny import TinyNet, tiny_experiment, tiny_net, weights

import evaluation
import federation
import models

# Test images that the models get right of clients 0 and 1, who take part, and of 2, who does not
RIGHT = {0: torch.tensor([1, 1, 1, 1, 0, 0]).bool(), 1: torch.tensor([1, 1, 0, 1, 0, 0]).bool(),
         2: torch.tensor([1, 1, 1, 0, 1, 0]).bool()}
ALL = {"accuracy": 100 * 11 / 18, "personal_accuracy": 100 * 5 / 7, "dropout_accuracy": 100 * 4 / 6,
       "dropout_personal_accuracy": 50, "seen_accuracy": 75, "unseen_accuracy": 50,
       "harmonic_accuracy": 60}  # 2 * 75 * 50 / 125


def test_predictions_are_those_of_each_distinct_model_made_once(monkeypatch):
    run, collected, predicted = tiny_experiment(), [], []

    def predict(model, images, prepare):
        predicted.append(model)
        return models.predict(model, images, prepare)

    monkeypatch.setattr(evaluation, "predict", predict)
    monkeypatch.setattr(evaluation, "collect_statistics",
                        lambda model, batches: collected.append(torch.cat(list(batches))))
    monkeypatch.setattr(evaluation, "TEST_BATCH", 10)
    in_use = ((k, "tiny", key, weights(key)) for k, key in ((0, 5), (2, 6), ("full", 5)))
    right = evaluation.predicted_right(run, in_use)
    assert list(right) == [0, 2, "full"] and right["full"] is right[0] and len(predicted) == 2
    mean, deviation = run.statistics
    for k, seed in ((0, 5), (2, 6)):
        logits = tiny_net(seed).eval()((run.data.x_test.float() - mean) / deviation)
        assert torch.equal(right[k], logits.argmax(dim=1) == run.data.y_test)
    assert not torch.equal(right[0], right[2])

    # The 18 training images of those who take part make two batches, spread over all of them.
    rows = torch.cat([client.indices for client in run.clients[:2]])
    spread = run.data.x_train[torch.cat([rows[::2], rows[1::2]])]
    torch.testing.assert_close(collected[0], (spread.float() - mean) / deviation)


@pytest.mark.parametrize("seen, unseen, expected", [
    ([0], [1, 2], [100, 50, 200 / 3]), ([0, 1, 2], [], [200 / 3, 0, 0]),
    ([0, 1, 9], [2], [75, 50, 60])])  # no test image is of class 9
def test_zero_shot_accuracies_are_means_over_classes(seen, unseen, expected):
    values = evaluation.zero_shot_accuracies(RIGHT[2][None], torch.arange(6) // 2, seen, unseen)
    assert list(values.values()) == pytest.approx(expected, abs=1e-6)


def test_accuracies_are_over_all_clients_and_over_groups_of_them():
    assert evaluation.accuracies(tiny_experiment(), RIGHT) == pytest.approx(ALL)
    assert evaluation.accuracies(tiny_experiment()._replace(dropouts=[]), RIGHT) == pytest.approx(
        {name: ALL[name] for name in ("accuracy", "personal_accuracy")})
    assert evaluation.group_accuracies(tiny_experiment(), RIGHT) == pytest.approx({
        ("", "accuracy"): 100 * 7 / 12, ("", "personal_accuracy"): 80,
        ("dropout", "accuracy"): 100 * 4 / 6, ("dropout", "personal_accuracy"): 50})
    nothing = [torch.tensor([], dtype=torch.int64)] * 3
    assert evaluation.share_accuracies(RIGHT, nothing)["personal_accuracy"] is None


def test_a_line_is_of_the_models_in_use_and_of_the_whole_network_if_it_is_another(monkeypatch):
    used = []

    def predicted_right(run, in_use):
        used[:] = in_use
        return RIGHT | ({"full": RIGHT[2]} if len(used) == 4 else {})

    monkeypatch.setattr(evaluation, "predicted_right", predicted_right)
    run, server = tiny_experiment(), {"weights": {"tiny": "w"}}
    run = run._replace(method=run.method._replace(
        deploy=lambda server, client, kept: (kept or client.id, server["weights"]["tiny"])))
    assert evaluation.evaluate(run, server, {1: "kept"}) == pytest.approx(ALL)
    assert used == [(0, "tiny", 0, "w"), (1, "tiny", "kept", "w"), (2, "tiny", 2, "w")]

    # With more architectures than global networks, clients' networks are cut out of the one.
    cut = run._replace(networks={"small": TinyNet, "tiny": TinyNet})
    line = evaluation.evaluate(cut, server, {})
    assert line == pytest.approx(ALL | {"full_accuracy": 100 * 4 / 6})
    assert used[3] == ("full", "tiny", "tiny", "w")


def test_the_last_line_has_the_accuracies_of_each_kind_and_those_of_the_rounds(monkeypatch):
    monkeypatch.setattr(evaluation, "predicted_right", lambda run, in_use: {
        k: right for k, arch, key, right in in_use})
    line = {"accuracy": 1.0, "personal_accuracy": 2.0, "download_mb": 3.0, "upload_mb": 1.0,
            "round": 9}
    ending = federation.Ending({"client": dict.fromkeys(RIGHT, RIGHT[0] >= 0), "friend": RIGHT},
                               5_000_000, {}, 2_000_000)
    last, common = evaluation.final_metrics(tiny_experiment(), line, ending), {
        "round": 9, "global_accuracy": 1, "global_personal_accuracy": 2}
    names = [f"{group}{kind}_{name}" for kind in ("client", "friend") for group in ("", "dropout_")
             for name in ("accuracy", "personal_accuracy")]
    of_kinds = dict(zip(names, [100] * 4 + [100 * 7 / 12, 80, 100 * 4 / 6, 50]))
    assert last == pytest.approx(ALL | common | of_kinds | {"download_mb": 8, "upload_mb": 3})
    one_kind = federation.Ending({"client": RIGHT}, 0, {})
    assert evaluation.final_metrics(tiny_experiment(), line, one_kind) == pytest.approx(
        ALL | common | {"download_mb": 3, "upload_mb": 1})
