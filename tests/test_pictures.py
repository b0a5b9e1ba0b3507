"""Pictures, tables and displays, from numbers alone, without a run."""

import io
import os
import subprocess
import sys

import pytest
import torch
from commands import ROOT
from matplotlib.figure import Figure

import pictures


@pytest.fixture
def drawn(monkeypatch):
    """The saved figures, as matplotlib has them."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def entry(t: int, **others) -> dict:
    return {"round": t, "accuracy": 10.0 * t, "personal_accuracy": 12.0 * t, "loss": 1 / t,
            "clock": 3.0 * t, **others}


def labels_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_yticklabels()]


def test_curves_show_the_rounds_and_apart_from_them_the_outcome_of_later_stages(drawn):
    last = entry(3) | {"global_accuracy": 30.0, "accuracy": 50.0, "global_personal_accuracy": 36.0,
                       "personal_accuracy": 60.0}
    pictures.draw_curves("c.png", [entry(1), entry(2), last], "a $title_")
    left, right = drawn[0].axes
    curves = {line.get_label(): line.get_ydata().tolist() for line in left.lines}
    assert curves == {"whole test set": [10, 20, 30], "whole test set, at the end": [50],
                      "own test share": [12, 24, 36], "own test share, at the end": [60]}
    assert right.lines[0].get_ydata().tolist() == [1, 1 / 2, 1 / 3]
    assert left.get_xlabel() == "round" and "%" in left.get_ylabel()


def test_curves_of_asynchronous_runs_have_the_clock_above(drawn):
    history = [entry(t, staleness_mean=1.0, full_accuracy=5.0) for t in (1, 2)]
    pictures.draw_curves("c.png", history, "title")
    left = drawn[0].axes[0]
    (above,) = left.child_axes
    assert above.get_xlabel() == "virtual clock" and above._functions[0](2) == 6
    assert len(left.lines) == 3


def test_a_sheet_of_samples_has_a_row_per_class_and_marks_the_unseen(drawn):
    images = torch.zeros(30, 4, 1, 8, 8, dtype=torch.uint8)
    images[27, 2] = 200
    seen = [label != 27 for label in range(30)]
    pictures.draw_samples("s.png", images, [f"class {k}" for k in range(30)], seen, "title")
    first, second = drawn[0].axes  # 26 classes, then four
    sheet = second.images[0].get_array()
    assert sheet.shape == (4 * 8, 4 * 8) and (sheet[8:16, 16:24] == 200).all()
    assert sheet.sum() == 64 * 200 and first.images[0].get_array().sum() == 0
    assert labels_of(second) == ["class 26", "class 27 (unseen)", "class 28", "class 29"]
    assert first.get_anchor() == second.get_anchor() == "N"  # columns begin level


def test_a_notebooks_backend_in_the_environment_costs_no_picture(tmp_path):
    program = ("import torch, pictures; pictures.draw_samples('s.png', torch.zeros(2, 1, 1, 8, 8, "
               "dtype=torch.uint8), 'ab', [True, False], 'samples of AP-FL and of others')")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=os.environ | {
        "MPLBACKEND": "module://of_a_notebook.inline", "PYTHONPATH": str(ROOT)})
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_titles_break_between_words_alone(drawn):
    figure = pictures.new_figure(1, 1)
    figure.subplots()
    pictures.finish(figure, "t.png", "AP-FL, AP-FL, AP-FL")
    assert drawn[0].get_suptitle().split("\n") == ["AP-FL,", "AP-FL,", "AP-FL"]


def test_the_curve_over_beta_tells_clients_that_took_part_from_dropouts(drawn):
    curves = {("", "accuracy"): [1, 2], ("dropout", "accuracy"): [3, 4]}
    pictures.draw_beta("b.png", [0, 1], curves, 0.1, "title")
    pictures.draw_beta("b.png", [0, 1], {("", "accuracy"): [1, 2]}, 0.1, "title")
    labels = [[line.get_label() for line in figure.axes[0].lines] for figure in drawn]
    assert labels[0] == ["whole test set, clients", "whole test set, dropouts", "this run, 0.1"]
    assert labels[1] == ["whole test set", "this run, 0.1"]


def test_numbers_are_a_panel_per_column_with_the_papers_beside_ours(drawn):
    numbers = {f"column {i}": {"a": (50.0, 30.0, 2.0), "b": (None, 20.0, None),
                               "c": (40.0, None, None)} for i in range(5)}
    labels = {column: f"unit of {column}" for column in numbers}
    pictures.draw_numbers("n.png", numbers, labels, "title " * 40)
    figure = drawn[0]
    assert [axes.get_xlabel() for axes in figure.axes] == list(labels.values())
    assert [axes.get_title() for axes in figure.axes] == list(numbers)
    assert labels_of(figure.axes[0]) == ["a", "b", "c"]
    marks = {(float(line.get_xdata()[0]), float(line.get_ydata()[0]))
             for line in figure.axes[4].lines if len(line.get_xdata()) == 1}
    assert {(50, 0), (30, 0), (20, 1), (40, 2)} <= marks
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"paper", "ours"}
    assert "\n" in figure.get_suptitle()  # wrapped to the width


def test_lines_have_bands_stars_and_targets_and_words_stand_at_equal_distances(drawn):
    names = [f"method {i}" for i in range(12)]
    lines = {"A": {name: ([1, 2], [10.0 + i, 20.0 + i], [1.0, 2.0])
                   for i, name in enumerate(names)},
             "B": {"method 3": (["16", "512"], [1, 2], None)}}
    pictures.draw_lines("l.png", lines, ("round", "accuracy, %"), "title",
                        ends={("A", "method 0"): 44.0}, targets={"A": 15.0})
    first, second = drawn[0].axes
    by_label = {line.get_label(): line for line in first.lines}
    assert by_label["method 11"].get_ydata().tolist() == [21, 31]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker(), line.get_fillstyle())
             for name, line in by_label.items() if name in names}
    assert len(looks) == 12 and len(first.collections) == 12  # all can be told apart
    assert [44.0] in [list(line.get_ydata()) for line in first.lines]
    assert by_label["target"].get_ydata()[0] == 15
    assert second.lines[0].get_xdata().tolist() == [0, 1]
    assert [text.get_text() for text in second.get_xticklabels()] == ["16", "512"]
    assert second.lines[0].get_color() == by_label["method 3"].get_color()


def test_maps_share_their_colours(drawn):
    maps = {name: torch.tensor([[1.0, off], [off, 1.0]]) for name, off in (("A", 0.2), ("B", 0.9))}
    for options in ({"limits": (0, 1)}, {"columns": 1}):
        pictures.draw_maps("m.png", maps, ["0: cnn", "1: cnn"], ("x", "y", "CKA"), "title",
                           **options)
    for figure, limits in zip(drawn, ((0, 1), (pytest.approx(0.2), 1))):
        first, second = figure.axes[:2]
        assert labels_of(first) == ["0: cnn", "1: cnn"]
        assert (second.get_xlabel(), second.get_ylabel()) == ("x", "y")
        assert first.images[0].get_clim() == second.images[0].get_clim() == limits
    assert figure.axes[2].get_ylabel() == "CKA"


def test_points_and_images_are_where_they_belong(drawn):
    at = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    pictures.draw_points("p.png", {"A": {"x": at, "y": at + 1}, "B": {"x": at}}, "title")
    assert drawn[0].axes[0].collections[1].get_offsets().tolist() == [[2, 3], [4, 5]]
    images = {"true": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
              "found": torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)}
    images["true"][1] = 9
    for losses in ({"plain": [1.0, 0.5]}, {}):
        pictures.draw_reconstruction("r.png", images, losses, "title")
    for figure, extra in zip(drawn[1:], (1, 0)):
        first, second = figure.axes[extra:]
        assert first.images[0].get_array().shape == (4, 8, 3)
        assert (first.images[0].get_array()[:, 4:] == 9).all() and first.get_ylabel() == "true"
        assert (second.images[0].get_array() == 7).all()
    assert drawn[1].axes[0].lines[0].get_ydata().tolist() == [1, 0.5]


def test_the_table_of_a_partition_has_a_row_per_client_and_says_what_is_missing():
    text = pictures.partition_table([[5, 0, 0], [0, 12, 0]], ["cnn", "resnet10"],
                                    ["cat", "dog", "frog"], ["dog"], [1])
    rows = text.splitlines()
    assert rows[0].split() == ["client", "network", "images", "cat", "dog", "frog"]
    assert rows[2].split() == ["1", "resnet10", "12", ".", "12", "."]
    assert rows[3] == "dropout clients: 1; classes held by dropout clients alone: dog"
    assert rows[4].startswith("1 of 3 classes are held by no client")
    assert rows[4].endswith("more --clients or --classes-per-client hold more")
    names = [f"a class of {number}" for number in range(40)]
    text = pictures.partition_table([[1] * 40], ["cnn"], names, names[20:], [0])
    assert max(map(len, text.splitlines())) <= 100
    assert pictures.partition_table([[1, 2]] * 20, ["cnn"] * 20, ["a", "b"]).count("\n") == 20
    many = pictures.partition_table([[1, 2]] * 20 + [[3, 6]], ["cnn"] * 21, ["a", "b"])
    assert many == "images per client: 3 to 9, mean 3"


def test_the_result_is_told_with_all_kinds_of_accuracies():
    result = {"rounds": 2, "accuracy": 60.0, "best_accuracy": 41.0, "best_round": 1,
              "last10_accuracy": 40.5, "seconds": 3.2, "images_per_second": 99.6,
              "upload_mb": 1.0, "download_mb": 2.0, "memory_mb": 411.6}
    assert pictures.result_text(result) == (
        "accuracy 60.00 % after 2 rounds (best 41.00 % in round 1, mean of the last ten "
        "evaluations 40.50 %)\n3 s, 100 training images per second, 1.0 MB uploaded, 2.0 MB "
        "downloaded, 412 MB of memory")
    text = pictures.result_text(result | {
        "global_accuracy": 40.0, "friend_accuracy": 7.0, "friend_personal_accuracy": None,
        "dropout_client_accuracy": 8.0, "dropout_client_personal_accuracy": 9.0,
        "seen_accuracy": 1.0, "unseen_accuracy": 2.0, "harmonic_accuracy": 1.5,
        "full_accuracy": 3.0, "gpu_memory_mb": 7.7})
    for part in ("friend models: 7.00 % of the whole test set, - of their own test shares",
                 "dropout clients' client models: 8.00 % of the whole test set, 9.00 %",
                 "2.00 % of the unseen ones, harmonic mean 1.50 %", "whole network: 3.00 %",
                 "accuracy 60.00 %; global model 40.00 % after 2 rounds",
                 "412 MB of memory, 8 MB of the GPU's memory"):
        assert part in text


@pytest.mark.parametrize("stream", [
    lambda: None, lambda: open("/dev/full", "w"), lambda: open(os.devnull)])
def test_a_display_that_cannot_show_anything_says_nothing(stream):
    display = pictures.Display(stream())
    for _ in range(2):
        print("text", file=display, flush=True)
    assert not display.isatty() and display.encoding.lower() == "utf-8"


def test_a_display_replaces_letters_that_it_cannot_show():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    print("Äpfel", file=pictures.Display(stream), flush=True)
    assert stream.buffer.getvalue() == b"?pfel\n"
