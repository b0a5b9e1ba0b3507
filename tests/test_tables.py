"""The papers' tables: what they need, how they are put together, and a few made for good."""

import csv
import inspect
import io
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from filelock import FileLock

import analysis
import apfl
import data
import files
import tables
from commands import DROPOUT, FEW, FEW_DIGITS, ROOT, go, result

PLACE = tables.Place("small", 3, 1, "data", "python tables.py x")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def made(*words: str) -> str:
    """The Markdown of a command that has to succeed, from the folder that it writes to."""
    assert tables.main(list(words)) == 0
    return (tables.RESULTS / "smoke" / f"{words[0]}.md").read_text()


# ----------------------------------------------------------------------------------- the plan


def test_every_run_of_every_table_can_be_asked_for(capsys):
    assert tables.main(["--list"]) == 0
    said = capsys.readouterr().out
    for name in tables.all_tables("paper"):
        assert f"\n{name} " in said
    for number in range(1, 7):
        assert f"FedIN, Table {number}" in said and (number < 3 or f"FedIN, Fig. {number}" in said)
    for number in range(1, 5):
        assert f"AP-FL, Table {number}" in said
    assert not list(tables.Path().iterdir())


def test_the_papers_numbers_are_those_of_cells_that_we_make():
    made_besides = {"fedin-1": ("round", "speed"), "fedin-4": ("M", "MiB"), "apfl-1": ("classes",)}
    papers, at_scale = tables.papers_numbers(), tables.all_tables("paper")
    assert papers.keys() <= at_scale.keys()
    for name, known in papers.items():
        for row, column in known:
            ending = column.split(", ")[-1]
            assert (row, column) in at_scale[name].cells or (
                ending in made_besides.get(name, ())), (name, row, column)
    assert papers["fedin-1"]["FedIN (+Noise)", "CIFAR-10, Non-IID"] == (77.3, None, "77.3")
    key = "AP-FL", "CIFAR-10, 5 clients, alpha 0.01"
    assert papers["apfl-2"][key] == (61.84, 1.75, "61.84 ± 1.75")
    counts = {"fedin-1": 144, "fedin-2a": 10, "fedin-2b": 10, "fedin-3": 14, "fedin-4": 12,
              "fedin-5": 30, "fedin-6": 27, "apfl-1": 10, "apfl-2": 140, "apfl-3": 24, "apfl-4": 24}
    assert {name: len(known) for name, known in papers.items()} == counts


def test_the_papers_scale_is_what_run_py_has_for_it():
    paper = tables.all_tables("paper")
    place = PLACE._replace(scale="paper")
    fedin = tables.job_of(paper["fedin-1"].cells["FedIN", "CIFAR-10, Non-IID"], place, 0).settings
    assert (fedin["clients"], fedin["rounds"], fedin["local_epochs"]) == (100, 500, 5)
    assert (fedin["participation"], fedin["alpha"], fedin["train_images"]) == (0.1, 0.5, None)
    key = "AP-FL", "CIFAR-10, 5 clients, alpha 0.01"
    apfl = tables.job_of(paper["apfl-2"].cells[key], place, 0).settings
    assert (apfl["clients"], apfl["rounds"], apfl["local_epochs"]) == (5, 50, 20)
    assert (apfl["synthetic_per_class"], apfl["alpha"]) == (600, 0.01)


def test_equal_settings_are_one_run_and_machines_do_not_matter():
    small = tables.all_tables("small")
    whole = {job.id for job in tables.jobs_of(small["fedin-1"], PLACE)}
    assert {job.id for job in tables.jobs_of(small["fedin-fig5"], PLACE)} < whole
    settings = {"method": "fedavg", "dataset": "data/mine.npz", "workers": 2, "device": "cpu"}
    moved = settings | {"dataset": "elsewhere/mine.npz", "workers": 1, "device": "cuda"}
    assert tables.digest(settings) == tables.digest(moved)
    assert tables.digest(settings) != tables.digest(settings | {"seed": 1})
    unused = {"new": None, "switch": False, "several": []}  # which a later run.py may have
    assert tables.digest(settings) == tables.digest(settings | unused)
    assert tables.digest(settings) != tables.digest(settings | {"beta": 0.0})
    named, run_here = ({**settings, "semantics": name} for name in (
        "data/embeddings-clip-mine.npz", "clip"))
    assert tables.digest(named) == tables.digest(run_here)
    assert tables.digest(named) != tables.digest(settings | {"semantics": "bert"})


def test_the_flags_that_only_stages_read_are_apfls():
    assert tables.STAGES.keys() == {flag.name for flag in apfl.FLAGS}
    reads = {name: set(inspect.signature(stage).parameters) for name, stage in
             apfl.METHODS["apfl"].stages.items()}
    for flag, stage in tables.STAGES.items():
        first = next((name for name in ("late", "generator", "friends")
                      if {"lambda": "balance"}.get(flag, flag) in reads[name]), None)
        assert first in (stage, None), flag
    by_hand = {"semantics": "generator", "word_vectors": "generator", "beta": "end",
               "beta_on": "end"}  # what no stage is given as an argument
    assert {flag: tables.STAGES[flag] for flag in by_hand} == by_hand


def test_no_noise_is_the_same_run_as_fedin_and_a_torn_line_is_no_run(tmp_path):
    small = tables.all_tables("small")
    plain = tables.job_of(small["fedin-1"].cells["FedIN", "CIFAR-10, Non-IID"], PLACE, 0)
    assert tables.job_of(small["fedin-6"].cells["noise 0", "CIFAR-10"], PLACE, 0).id == plain.id
    PLACE.results.mkdir(parents=True)
    (PLACE.results / "runs.jsonl").write_text('{"id": "a", "x": 1}\n{"id": "b", "x')
    assert tables.recorded(PLACE) == {"a": {"id": "a", "x": 1}}


def test_what_runs_is_stopped_and_what_waits_is_not_begun(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(tables.run, "main", lambda argv: begun.append(argv) or 0)
    monkeypatch.setattr(tables, "_stopped", tables.threading.Event())
    assert tables.do(["a"], tmp_path / "log")[0] == 0
    tables.stop()  # between two runs
    assert tables.do(["b"], tmp_path / "log")[0] == 130 and begun == [["a"]]
    tables._running.set()
    with pytest.raises(KeyboardInterrupt):
        tables.stop()
    tables._running.clear()


@pytest.mark.parametrize("names, chosen", [
    (["fedin-2"], ["fedin-2a", "fedin-2b"]), (["apfl-fig5"], ["apfl-fig5a", "apfl-fig5b"]),
    (["fedin-1"], ["fedin-1"]), (["fedin-fig10", "apfl-1"], ["fedin-fig10", "apfl-1"]),
    (["all"], list(tables.all_tables("smoke")))])
def test_names(names, chosen):
    assert list(tables.chosen(names, tables.all_tables("smoke"))) == chosen


def test_what_is_stopped_says_how_to_go_on(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "run_missing", stop)
    assert tables.main(["fedin-fig10"]) == 130
    assert capsys.readouterr().err == "error: stopped; the same command goes on\n"


def test_a_worker_that_is_killed_is_told_in_a_line(monkeypatch, capsys):
    def die(*_):
        raise BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr(tables, "run_missing", die)
    assert tables.main(["fedin-fig10"]) == 2
    error = capsys.readouterr().err
    assert "fewer --jobs" in error and error.count("\n") == 1


def test_of_what_was_not_run_nothing_is_written(capsys):
    assert tables.main(["fedin-2", "fedin-fig7", "fedin-fig10", "--jobs", "0"]) == 0
    said = capsys.readouterr().out
    assert said.count("no run is finished") == 4 and not tables.RESULTS.exists()
    assert said.count("whose networks are here") == 2 and "results are in" not in said


def test_embeddings_that_a_user_has_go_before_the_encoder_whose_cache_is_another_file(tmp_path):
    place, folder = PLACE._replace(data_dir=str(tmp_path / "d")), tmp_path / "d"
    folder.mkdir()
    assert tables.embeddings(None, "cifar10", place) == "clip"
    (folder / "clip-cifar10.npz").touch()  # what --semantics clip leaves
    assert tables.embeddings(None, "cifar10", place) == "clip"
    (folder / "embeddings-word2vec-cifar10.npz").touch()
    assert tables.embeddings(None, "cifar10", place).endswith("d/embeddings-word2vec-cifar10.npz")
    (folder / "embeddings-clip-cifar10.npz").touch()
    assert tables.embeddings(None, "cifar10", place).endswith("d/embeddings-clip-cifar10.npz")
    assert tables.embeddings("bert", "cifar10", place) == "bert"
    flags = {"dataset": "cifar10", "semantics": tables.embeddings("word2vec", "emnist", place)}
    assert "put embeddings-word2vec-cifar10.npz" in tables.without_vectors(flags, place)
    smoke = place._replace(scale="smoke")
    assert tables.embeddings("bert", "fashionmnist", smoke).endswith("random-bert-digits.npz")


@pytest.mark.parametrize("words, said", [
    ("fedin-9", "there is no fedin-9"), ("", "name a table"), ("fedin-1 --seeds 0", "at least 1"),
    ("fedin-1 --scale huge", "(python tables.py --help"), ("fedin-1 --jobs -1", "at least 0"),
    ("fedin-6 --only CIFAR10", "--only CIFAR10: it is in none of noise 0, Fashion-MNIST, ")])
def test_mistakes_are_one_line(capsys, words, said):
    assert tables.main(words.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


# -------------------------------------------------------------------------- putting together


def line(accuracy: float, rounds=(4, 8), curve=None, **result) -> dict:
    return {"result": {"accuracy": float(accuracy), **result}, "rounds": list(rounds),
            "accuracy": curve or [accuracy - 1, accuracy], "commit": "abc", "machine": "one core"}


def test_a_table_is_put_together_as_by_hand(monkeypatch):
    cells = {(row, column): tables.Cell({"setting": "fedin", "method": row, "dataset": "cifar10"})
             for row in ("fedavg", "fedprox", "fedin") for column in ("A", "B")}
    table = tables.Table("FedIN, Table 0", cells, tables.final, tables.plot_numbers)
    found = {("fedavg", "A"): [line(30), line(32)], ("fedavg", "B"): [line(5)],
             ("fedprox", "A"): [line(33.5), line(33.5)], ("fedprox", "B"): [line(9)],
             ("fedin", "A"): [line(31.5), line(33.5)], ("fedin", "B"): []}
    papers = {("fedavg", "A"): tables.Printed(60.0, None, "60.00"),
              ("fedprox", "A"): tables.Printed(70.0, 1.5, "70 ± 1.5"),
              ("fedin", "A"): tables.Printed(80.0, None, "80.0"),
              ("fedin", "B"): tables.Printed(50.0, None, "50.0")}
    values = tables.final(table, found, PLACE).values
    text = tables.markdown("fedin-0", table, values, papers, ["A note."])
    assert text == """# FedIN, Table 0

A note.

|  | A | B |
| --- | --- | --- |
| fedavg | 60.00 / 31.00 ± 1.41 | – / 5.00 |
| fedprox | 70 ± 1.5 / 33.5 ± 0.0 | – / 9.00 |
| fedin | 80.0 / 32.5 ± 1.4 | 50.0 / – |

Every cell: the paper / ours, mean ± standard deviation over the seeds; (k of n): over k of these alone.

Pairs of rows in the paper's order, over the seeds of both (equal ones are not): A 2 of 3.

![FedIN, Table 0](fedin-0.png)
"""
    tables.write_csv(tables.Path("x.csv"), "fedin-0", values, papers, "small")
    rows = list(csv.DictReader(io.StringIO(tables.Path("x.csv").read_text())))
    assert rows[0] == {"table": "fedin-0", "scale": "small", "row": "fedavg", "column": "A",
                       "paper": "60.0", "paper deviation": "", "mean": "31.0",
                       "deviation": "1.4142135623730951", "by seed": "30.0 32.0"}
    assert rows[-1]["mean"] == rows[-1]["by seed"] == "" and rows[-1]["paper"] == "50.0"
    failed = {tables.job_of(cells["fedin", "B"], PLACE, 2).id: "no data", "another": "no net"}
    notes = tables.notes_of(table, found, PLACE, failed)
    for said in ("Scale **small**", "rounds 20", "Seeds: 0, 1, 2"):
        assert said in notes[0]
    assert "commit abc on one core" in notes[1] and "python tables.py x" in notes[1]
    assert notes[-2].startswith("Lacking runs: fedavg / A, ") and notes[-2].endswith("(not run).")
    assert notes[-1] == "Lacking runs: fedin / A, fedin / B (no data)."  # equal settings


def test_rounds_to_the_target_and_speed():
    table = tables.all_tables("small")["fedin-1"]
    found = {key: [] for key in table.cells}
    key = "CIFAR-10, Non-IID"
    found["FedAvg", key] = [line(50, (4, 8, 12), [10, 46, 50]), line(40, (4, 8, 12), [10, 35, 40])]
    found["FedIN", key] = [line(60, (4, 8, 12), [48, 55, 60]), line(60, (4, 8, 12), [30, 37, 60])]
    found["MOON", key] = [line(9, (4, 8, 12), [9, 9, 9])]
    found["Scaffold", key] = [line(50, (4, 8, 12), [46, 47, 50])]
    values, _, notes = tables.with_rounds(table, found, PLACE)
    assert notes == ["Targets, %: CIFAR-10 40.5, nine tenths of what FedAvg reaches with the same "
                     "seed, non-IID."]  # 45 and 36
    assert values["FedAvg", "CIFAR-10, round"] == [8, 12]
    assert values["FedIN", "CIFAR-10, round"] == [4, 8]
    assert values["MOON", "CIFAR-10, round"] == [None]
    assert values["FedIN", "CIFAR-10, speed"] == [pytest.approx(10 / 6)]
    assert values["Scaffold", "CIFAR-10, speed"] == [2]  # of the seed that it has
    assert values["FedAvg", "CIFAR-10, speed"] == [1] and ("MOON", "CIFAR-10, speed") not in values
    found["FedIN", key][1]["accuracy"] = [9, 9, 9]
    values = tables.with_rounds(table, found, PLACE).values
    text = tables.markdown("x", table, values, {}, [])
    assert "4 (1 of 2)" in text and "9.00 (1 of 2)" in text  # did not get there; was not run
    assert ("FedIN", "CIFAR-10, speed") not in values
    assert tables.targets_of("CIFAR-10", found, PLACE._replace(scale="paper")) == [60] * 3
    assert tables.shown(*tables.mean_and_deviation([8, 12]), "") == "10.0 ± 2.8"
    assert tables.shown(*tables.mean_and_deviation([8]), "54") == "8"


def test_rows_are_in_the_papers_order_over_the_seeds_of_both():
    rounds = {("FedIN", "x, round"): tables.Printed(9.0, None, "9"),
              ("MOON", "x, round"): tables.Printed(20.0, None, "20")}
    for ours, alike in (([8, 8], 1), ([4, None], 0)):  # who does not always get there comes last
        both = {("FedIN", "x, round"): ours, ("MOON", "x, round"): [12, 12]}
        assert tables.agreement(both, rounds) == {"x, round": (alike, 1)}
    other = {(row, "y"): printed for (row, _), printed in rounds.items()}
    assert tables.agreement({("FedIN", "y"): [4.0], ("MOON", "y"): [None]}, other) == {}
    three = {("FedIN", "y"): [4.0, 9.0, 9.0], ("MOON", "y"): [5.0]}  # of seed 0 alone
    assert tables.agreement(three, other) == {"y": (1, 1)}


def test_curves_are_of_the_seeds_that_all_methods_of_a_panel_have():
    table = tables.all_tables("small")["fedin-fig5"]
    found, key = {each: [] for each in table.cells}, "CIFAR-10, Non-IID"
    found["FedAvg", key] = [line(20, (4, 8), [10, 20]), line(90, (4, 8), [80, 90])]
    found["FedIN", key] = [line(40, (4, 8), [30, 40])]
    values, extra, notes = tables.to_the_target(table, found, PLACE)
    assert values["FedAvg", key] == [20, 90] and extra["targets"] == {key: pytest.approx(18)}
    rounds, mean, spread = extra["lines"][key]["FedAvg"]
    assert list(rounds) == [4, 8] and list(mean) == pytest.approx([10, 14]) and not spread.any()
    assert extra["lines"][key].keys() == {"FedAvg", "FedIN"}
    assert "that all of a panel have (how many: 1)" in notes[0]
    found["FedIN", key].append(line(60, (4, 8), [50, 60]))
    rounds, mean, spread = tables.over_rounds(table, found, PLACE, weight=0).extra["lines"][key][
        "FedIN"]
    assert list(mean) == [40, 50] and list(spread) == pytest.approx([200 ** 0.5] * 2)


def test_a_sweep_is_of_the_seeds_that_all_have(monkeypatch):
    drawn = []
    monkeypatch.setattr(tables.pictures, "draw_lines", lambda *args: drawn.append(args))
    values = {("a", "8"): [20.0], ("a", "16"): [30.0, 90.0, 90.0], ("b", "8"): [], ("b", "16"): [7.0]}
    tables.plot_sweep("x", "path", tables.Measured(values), {}, "title")
    (_, panels, labels, _), = drawn
    assert panels[""]["a"] == (["8", "16"], [20, 30], [0, 0]) and labels[0] == "x"
    gap, seven = panels[""]["b"][1]
    assert gap != gap and seven == 7


def test_a_data_set_that_is_not_there_is_said_and_the_others_are_made(monkeypatch, capsys):
    def no_net(name, data_dir):
        raise ValueError(f"{name} could not be loaded: no net")

    monkeypatch.setattr(data, "download", no_net)
    lost = tables.Cell({"setting": "fedin", "method": "fedavg", "dataset": "cifar10"})
    kept = tables.Cell({"setting": "quick", "method": "local", "dataset": FEW_DIGITS[1],
                        "model": "cnn", "rounds": 1, "local_epochs": 1, "clients": 2,
                        "train_images": 20})
    monkeypatch.setitem(tables.SCALES["small"], "quick", {})
    table = tables.Table("A table", {("a", "x"): lost, ("b", "x"): kept}, tables.final,
                         tables.plot_numbers)
    monkeypatch.setattr(tables, "all_tables", lambda scale: {"one": table})
    assert tables.main(["one", "--scale", "small", "--seeds", "1", "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert "Lacking runs: a / x (cifar10 could not be loaded: no net)." in said
    assert "| a | – |" in said and "| b | –" not in said


def test_costs_are_by_rule_and_as_measured_and_a_peak_is_measured_once(tmp_path):
    table = tables.all_tables("small")["fedin-4"]
    found = {key: [] for key in table.cells}
    key = "FedIN", "CIFAR-10, Non-IID"
    found[key] = [line(50, upload_mb=4500.0)]
    job = tables.job_of(table.cells[key], PLACE, 0)
    tables.append(PLACE, f"{job.id}-peak", job.flags, peak_gib=1.25)
    values, _, notes = tables.overheads(table, found, PLACE)
    assert values["FedIN", "measured: peak of the process, GiB"] == [1.25]
    assert values["FedIN", "measured: MB up a client, round"] == [4500 / (5 * 20)]
    assert values["FedAvg", "measured: peak of the process, GiB"] == []
    assert values["FedIN", "parameters sent, M"] == pytest.approx([12.36], abs=0.005)
    assert values["HeteroFL", "parameters sent, M"] == pytest.approx([15.51], abs=0.005)
    assert any("16.29" in note and "15.51" in note for note in notes)
    assert tables.peak_memory(job._replace(folder=tmp_path / "new"), PLACE._replace(jobs=0)) is None


def test_what_clients_see_is_shown_by_stage_and_by_method(monkeypatch):
    flat = [torch.full((4, 4), 0.1 * stage + 0.2).fill_diagonal_(1) for stage in range(4)]
    features = {arch: torch.randn(40, 6) for arch in ("resnet10", "resnet14", "resnet18",
                                                      "resnet22", "resnet26")}
    seen = analysis.Look(flat, [stage - 0.1 for stage in flat], list("abcd"), features,
                         torch.arange(40) % 2)
    monkeypatch.setattr(tables, "look", lambda folder: seen)
    found = {("FedIN", "CIFAR-10, IID"): [{"id": "a"}], ("FedAvg", "CIFAR-10, IID"): []}
    values, looks, notes = tables.similarity(None, found, PLACE)
    assert values["FedIN", "CIFAR-10, IID, stage 2"] == pytest.approx([0.4])
    assert values["FedIN", "CIFAR-10, IID, stage 3, unbiased"] == pytest.approx([0.4])
    assert looks.keys() == {("FedIN", "CIFAR-10, IID")} and "40 test images" in notes[0]
    values, panels, notes = tables.scattered_clients(None, found, PLACE)
    assert {arch: len(at) for arch, at in panels["FedIN"].items()} == {
        "resnet10": 20, "resnet14": 20, "resnet26": 20}
    assert "20 test images of class 0" in notes[0] and "0.33" in notes[0]
    ((share,),) = values.values()
    of_class = {arch: features[arch][::2] for arch in panels["FedIN"]}
    assert share == analysis.own_neighbours(of_class)


def test_the_dealt_classes_are_those_of_the_dropout_setting(capsys):
    text = made("apfl-1")
    assert "In place of cifar10: random images." in text
    rows = [row.split(" | ")[-1].split("/")[1].strip(" |").split() for row in text.splitlines()
            if row.startswith("| client")]
    assert len(rows) == 10 and sorted(rows[-1]) == ["8", "9"]  # who dropped out, and two classes
    assert all(len(row) == 2 and not set(row) & set(rows[-1]) for row in rows[:-1])
    assert not list(tables.RUNS.glob("*/*/")) and (tables.RESULTS / "smoke/apfl-1.png").exists()


@pytest.mark.parametrize("name", [name for name, table in tables.all_tables("small").items()
                                  if table.cells and not table.networks])
def test_every_table_is_written_and_drawn_from_runs_that_are_finished(name, monkeypatch):
    monkeypatch.setattr(tables, "all_tables", lambda scale, known=tables.all_tables(scale="small"):
                        {name: known[name]})
    table, place = tables.all_tables("small")[name], PLACE._replace(seeds=2, jobs=0)
    lacking = tables.job_of(next(iter(table.cells.values())), place, 1)
    for number, cell in enumerate(table.cells.values()):
        for seed in range(2):
            job = tables.job_of(cell, place, seed)
            if job.id == lacking.id:
                continue
            accuracy = 40.0 + number % 7 + seed
            tables.append(place, job.id, job.flags, rounds=[4, 8], digests={"dataset": "a"},
                          accuracy=[accuracy - 5, accuracy],
                          result={"accuracy": accuracy, "upload_mb": 90.0, cell.value: accuracy})
    assert tables.main([name, "--scale", "small", "--seeds", "2", "--jobs", "0"]) == 0
    folder = tables.RESULTS / "small"
    text = (folder / f"{name}.md").read_text()
    (row, column), *_ = table.cells
    assert f"Lacking runs: {row} / {column}" in text and "±" in text
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / f"{name}.csv") as file:
        made = {(line["row"], line["column"]): line for line in csv.DictReader(file)}
    key, number = list(table.cells)[-1], len(table.cells) - 1
    if name != "fedin-4":  # whose columns are others
        assert made[key]["by seed"] == f"{40.0 + number % 7} {41.0 + number % 7}"
    assert ("smoothed" in text) == (name in ("fedin-fig5", "fedin-fig9"))


# --------------------------------------------------------------------------------- made for good

OURS = "Fashion-MNIST (not in the paper)"
FIG5 = ["apfl-fig5b", "--only", "Fashion-MNIST", "--jobs", "1"]  # two runs of the CNN on digits


def finished() -> dict[str, float]:
    """Folder -> when its result was written, of the runs that are finished."""
    return {path.parent.name: path.stat().st_mtime for path in tables.RUNS.glob("*/*/result.json")}


def kill_in_midst() -> None:
    """Kill the command, with which its worker has to end, when a run has a checkpoint."""
    process = subprocess.Popen([sys.executable, str(ROOT / "tables.py"), *FIG5],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tables.RUNS.glob("*/*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    (lock,) = tables.RUNS.glob("*/*/.run-lock")
    taken = FileLock(lock, timeout=20)  # what a run that still went on would hold
    taken.acquire()
    taken.release()


def test_a_figure_whose_runs_share_rounds_is_made_once_even_if_it_is_killed():
    kill_in_midst()
    folder = tables.RESULTS / "smoke"
    assert not list(folder.glob("*.md"))
    text, runs = made(*FIG5), finished()
    assert len(runs) == 2 and "In place of fashionmnist: digits." in text and "Scale **smoke**" in text
    assert (folder / "apfl-fig5b.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(dict.fromkeys(line["id"] for line in lines))
    assert {line["id"] for line in lines} == runs.keys()
    logs = [path.read_text() for path in tables.RUNS.glob("smoke/*.log")]
    assert ["going on after round 2" in log for log in logs] == [True] * 2  # resumed, or begun so
    with open(folder / "apfl-fig5b.csv") as file:
        found = {row["column"]: row["mean"] for row in csv.DictReader(file) if row["mean"]}
    cell = tables.all_tables("smoke")["apfl-fig5b"].cells[OURS, "4"]
    job = tables.job_of(cell, tables.Place("smoke", 1, 1, "data", ""), 0)
    go(tables.Path("alone"), *tables.command_line(job.flags))
    assert result(tables.Path("alone")) == result(job.folder)
    assert float(found["4"]) == result(job.folder)["friend_accuracy"] and len(found) == 2
    cell = tables.all_tables("smoke")["apfl-fig5a"].cells[OURS, "100"]
    other = tables.job_of(cell, tables.Place("smoke", 1, 1, "data", ""), 0)
    argv = tables.arguments(other, [job])  # of another command, later
    assert argv[0] == "--resume" and files.read_config(other.folder)["noise_dim"] == 100
    begun = files.load_checkpoint(other.folder, "cpu")
    assert begun.round == 2 and begun.after.keys() == {"late"}  # the generator is another one
    shutil.rmtree(tables.RUNS / "smoke")  # what runs.jsonl has is not run again
    assert made(*FIG5) == text and finished() == {}


def test_fedavg_and_its_fine_tuning_are_what_an_apfl_run_has_besides():
    flags = [flag for flag in DROPOUT if flag != "--method"]
    go(tables.Path("apfl"), *flags, "--method", "apfl", *FEW)
    ours = result(tables.Path("apfl"))
    as_apfl = ["--participation", "1", "--batch-size", "50"]
    go(tables.Path("fedavg"), *flags, "--method", "fedavg", *as_apfl)
    go(tables.Path("ft"), *flags, "--method", "fedavg-ft")
    assert ours["global_accuracy"] == result(tables.Path("fedavg"))["accuracy"]
    assert ours["dropout_client_accuracy"] == result(tables.Path("ft"))["dropout_accuracy"]
