"""Pictures and tables from numbers alone, without a run."""

import pytest
import torch
from matplotlib.figure import Figure

import pictures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, as matplotlib has them."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def entry(t: int, **others) -> dict:
    return {"round": t, "accuracy": 10.0 * t, "personal_accuracy": 12.0 * t, "loss": 1 / t,
            "clock": 3.0 * t, **others}


def test_curves_show_the_rounds_and_apart_from_them_what_later_stages_made(drawn, tmp_path):
    last = entry(3) | {"global_accuracy": 30.0, "accuracy": 50.0, "global_personal_accuracy": 36.0,
                       "personal_accuracy": 60.0}
    pictures.draw_curves(tmp_path / "c.png", [entry(1), entry(2), last], "a $title_")
    left, right = drawn[0].axes
    curves = {line.get_label(): line.get_ydata().tolist() for line in left.lines}
    assert curves["whole test set"] == [10, 20, 30] and curves["own share of it"] == [12, 24, 36]
    assert curves["whole test set, at the end"] == [50]
    assert right.lines[0].get_ydata().tolist() == [1, 1 / 2, 1 / 3]
    assert left.get_xlabel() == "round" and "%" in left.get_ylabel()


def test_curves_of_asynchronous_runs_have_the_clock_above(drawn, tmp_path):
    history = [entry(t, staleness_mean=1.0, full_accuracy=5.0) for t in (1, 2)]
    pictures.draw_curves(tmp_path / "c.png", history, "title")
    left = drawn[0].axes[0]
    (above,) = left.child_axes
    assert above.get_xlabel() == "virtual clock" and above._functions[0](2) == 6
    assert len(left.lines) == 3


def test_a_sheet_of_samples_has_a_row_a_class_and_marks_the_unseen(drawn, tmp_path):
    images = torch.zeros(30, 4, 1, 8, 8, dtype=torch.uint8)
    images[27, 2] = 200
    seen = [label != 27 for label in range(30)]
    names = [f"class {label}" for label in range(30)]
    pictures.draw_samples(tmp_path / "s.png", images, names, seen, "title")
    first, second = drawn[0].axes  # 26 classes, then four
    sheet = second.images[0].get_array()
    assert sheet.shape == (4 * 8, 4 * 8) and (sheet[8:16, 16:24] == 200).all()
    assert sheet.sum() == 64 * 200 and first.images[0].get_array().sum() == 0
    labels = [tick.get_text() for tick in second.get_yticklabels()]
    assert labels == ["class 26", "class 27 (unseen)", "class 28", "class 29"]


def test_the_curve_over_beta_tells_clients_that_took_part_from_dropouts(drawn, tmp_path):
    curves = {("", "accuracy"): [1, 2], ("dropout", "accuracy"): [3, 4]}
    pictures.draw_beta(tmp_path / "b.png", [0, 1], curves, 0.1, "title")
    pictures.draw_beta(tmp_path / "b.png", [0, 1], {("", "accuracy"): [1, 2]}, 0.1, "title")
    labels = [[line.get_label() for line in figure.axes[0].lines] for figure in drawn]
    assert labels[0] == ["whole test set, clients", "whole test set, dropouts", "this run, 0.1"]
    assert labels[1] == ["whole test set", "this run, 0.1"]


def test_the_table_of_a_partition_has_a_row_a_client_and_says_what_is_missing():
    text = pictures.partition_table([[5, 0, 0], [0, 12, 0]], ["cnn", "resnet10"],
                                    ["cat", "dog", "frog"], ["dog"], [1])
    rows = text.splitlines()
    assert rows[0].split() == ["client", "network", "images", "cat", "dog", "frog"]
    assert rows[2].split() == ["1", "resnet10", "12", ".", "12", "."]
    assert rows[3] == "dropout clients: 1, which alone hold dog"
    assert rows[4].startswith("1 of 3 classes are with no client")
    assert pictures.partition_table([[1, 2]] * 20, ["cnn"] * 20, ["a", "b"]).count("\n") == 20
    many = pictures.partition_table([[1, 2]] * 20 + [[3, 6]], ["cnn"] * 21, ["a", "b"])
    assert many == "images a client: 3 to 9, mean 3"


def test_the_result_is_told_with_all_kinds_of_accuracies():
    result = {"rounds": 2, "accuracy": 60.0, "best_accuracy": 41.0, "best_round": 1,
              "last10_accuracy": 40.5, "seconds": 3.2, "images_per_second": 99.6,
              "upload_mb": 1.0, "download_mb": 2.0}
    plain = pictures.result_text(result)
    assert "accuracy 60.00 % after 2 rounds (best 41.00 % in round 1" in plain
    text = pictures.result_text(result | {
        "global_accuracy": 40.0, "friend_accuracy": 7.0, "friend_personal_accuracy": None,
        "dropout_client_accuracy": 8.0, "dropout_client_personal_accuracy": 9.0,
        "seen_accuracy": 1.0, "unseen_accuracy": 2.0, "harmonic_accuracy": 1.5,
        "generator_seconds": 11.0})
    for part in ("friend models: 7.00 % of the whole test set, - of their own",
                 "dropout clients' client models: 8.00 % of the whole test set, 9.00 %",
                 "2.00 % of the unseen ones, harmonic mean 1.50 %",
                 "accuracy 60.00 %; of the global model 40.00 % after 2 rounds",
                 "stages after the last round: generator 11 s"):
        assert part in text


def test_cells_of_a_table_are_wrapped_to_their_columns():
    assert pictures.table([("a", "two words"), ("b", "-")], (3, 5)) == (
        "a    two\n     words\n\nb    -\n")
