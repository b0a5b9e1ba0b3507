"""The papers' tables: the runs that they need, their numbers by hand, and a few made for good."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from itertools import chain, takewhile
from pathlib import Path

import pytest
import torch
from commands import DROPOUT, FEW, FEW_DIGITS, ROOT, go, result

import analysis
import experiments
import files
import ranks
import report
import run
import tables
from experiments import cells
from settings import AFTER_ROUNDS

ARGS = Namespace(scale="small", seeds=3, jobs=1, data_dir="data", command="python tables.py x",
                 again=False, only=[])
SMALL, PAPER = experiments.tables("small"), experiments.tables("paper")
NON_IID = "CIFAR-10, Non-IID"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------ the runs of a table

@pytest.mark.parametrize("scale", experiments.SCALES)
def test_run_py_takes_the_flags_of_every_run(scale, capsys):
    assert tables.main(["--list", "--scale", scale]) == 0
    text, made = capsys.readouterr().out, experiments.tables(scale)
    kinds = ("FedIN, Table", "FedIN, Fig.", "AP-FL, Table", "AP-FL, Fig.")
    assert [text.count(kind) for kind in kinds] == ([7, 10, 4, 3] if scale != "cut" else
                                                    [7, 10, 0, 0])
    assert all(f"{name} " in text for name in made) and not list(Path().iterdir())


def test_the_papers_numbers_are_those_of_cells_that_we_make():
    made_besides = {"fedin-1": ("round", "speed"), "fedin-4": ("M", "MiB"), "apfl-1": ("classes",)}
    papers = report.papers_numbers()
    for name, known in papers.items():
        for row, column in known:
            assert (row, column) in cells(PAPER[name]) or (
                column.split(", ")[-1] in made_besides.get(name, ())), (name, row, column)
    assert papers["fedin-1"]["FedIN (+Noise)", NON_IID] == (77.3, None, "77.3")
    apfl = papers["apfl-2"]["AP-FL", "CIFAR-10, 5 clients, alpha 0.01"]
    assert apfl == (61.84, 1.75, "61.84 ± 1.75")
    counts = [len(known) for known in papers.values()]
    assert sorted(counts) == [10, 10, 10, 12, 14, 24, 24, 27, 30, 140, 144]


def ids_of(table: dict, args: Namespace = ARGS) -> dict:
    """Row and column -> ids of its runs."""
    return {key: list(runs) for key, runs in experiments.runs_of(table, args).items()}


def test_runs_keep_their_ids_and_the_papers_scale_is_that_of_run_py():
    Path("data").mkdir()
    Path("data/embeddings-word2vec-fashionmnist.npz").touch()
    args = Namespace(**{**vars(ARGS), "seeds": 5})  # Table 2b has five
    ids = {name: set(chain.from_iterable(ids_of(table, args).values()))
           for name, table in SMALL.items()}
    finished = report.recorded(ROOT / "results/small").keys()
    assert len(finished) > 150 and finished <= set().union(*ids.values())
    assert ids["fedin-fig5"] < ids["fedin-1"]
    assert "fedin-cifar10-0-fa19a4afe0" in ids["fedin-1"] & ids["fedin-6"]  # noise 0 is none
    assert experiments.SCALES["paper"] == {"fedin": {"eval_every": 1}, "apfl": {}}
    # README's headline figures: the scale of medium
    args = Namespace(**{**vars(ARGS), "scale": "medium"})
    flags = experiments.runs_of(experiments.tables("medium")["fedin"], args)["FedIN", NON_IID]
    settings = run.resolve(list(flags.values())[2])
    assert (settings["clients"], settings["rounds"], settings["local_epochs"], settings["seed"],
            settings["train_images"], settings["test_images"]) == (20, 20, 2, 2, 5000, None)


def test_an_id_stands_for_settings_that_change_numbers(monkeypatch):
    monkeypatch.setattr(run, "resolve", dict)
    flags = {"method": "fedavg", "dataset": "data/mine.npz", "seed": 0, "semantics": "clip"}
    for changes in ({"dataset": "elsewhere/mine.npz", "workers": 1, "device": "cuda"},
                    {"new": None, "switch": False, "several": [],  # flags of a later run.py
                     "friend": "synthetic"},
                    {"semantics": "data/embeddings-clip-mine.npz"}):
        assert experiments.run_id(flags | changes) == experiments.run_id(flags)
    for changes in ({"seed": 1}, {"beta": 0.0}, {"semantics": "bert"}, {"dataset": "other.npz"}):
        assert experiments.run_id(flags | changes) != experiments.run_id(flags)
        of_rounds = partial(experiments.digits_of, but=AFTER_ROUNDS)
        alike = of_rounds(flags | changes) == of_rounds(flags)
        assert alike == (changes.keys() <= {"beta", "semantics"})


def test_embeddings_that_a_user_has_go_before_the_encoder():
    clip, bert = ({"method": "apfl", "dataset": "cifar10", "value": "", **more}
                  for more in ({}, {"semantics": "bert"}))
    Path("data").mkdir()
    Path("data/clip-cifar10.npz").touch()  # cache of --semantics clip
    assert experiments.embeddings_of(clip, "data") == "clip"
    for choice in ("word2vec", "clip"):
        path = f"data/embeddings-{choice}-cifar10.npz"
        Path(path).touch()
        assert experiments.embeddings_of(clip, "data") == path
    assert experiments.embeddings_of(bert, "data") == "bert"
    args = Namespace(scale="smoke", data_dir="data")
    smoke = experiments.flags_of({"setting": "apfl"}, bert, args, 0)
    assert (smoke["semantics"], smoke["dataset"]) == ("onehot", "digits")


@pytest.mark.parametrize("words, part", [
    ("fedin-9", "unknown name fedin-9"), ("fedin-1 --seeds 0", "at least 1"),
    ("fedin-1 --again --commands", "not allowed with"),
    ("fedin-1 --scale huge", "(--help lists"), ("fedin-1 --jobs 0", "at least 1"),
    ("apfl-2 --scale cut", "unknown name apfl-2 at scale cut"),
    ("fedin-6 --only CIFAR10", "--only CIFAR10 is in none of these names: noise 0, Fashion-MN")])
def test_mistakes_are_one_line(capsys, words, part):
    assert tables.main(words.split()) == 2
    error = capsys.readouterr().err
    assert part in error and error.startswith("error: ") and error.count("\n") == 1


def test_commands_are_longest_first_and_share_the_rounds_of_apfl(capsys):
    flags = "--scale medium --seeds 1 --commands".split()
    names = ["apfl", "apfl-2", "apfl-readings", "fedin"]
    assert tables.main([*names, *flags]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    chosen = report.chosen(names, "medium")
    jobs = tables.missing_runs(Namespace(**{**vars(ARGS), "scale": "medium", "seeds": 1,
                                            "tables": chosen}))
    assert len(lines) == len(jobs) and not Path("runs").exists()
    flags = [run.read_command_line(line[2:]) for line in lines]
    assert all(line[:2] == ["python", "run.py"] for line in lines)
    assert all(each["resume"] and each["out"].startswith("runs/tables/medium/") for each in flags)
    costs = [tables.cost(jobs[Path(each["out"]).name]) for each in flags]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    sharing = [each for each in flags if "start_from" in each]
    assert len(sharing) == 4 * 4  # three of four readings and CCVR's friend, in four columns
    for each in sharing:
        before = flags[[other["out"] for other in flags].index(each["start_from"])]
        assert "start_from" not in before and flags.index(before) < flags.index(each)
        assert (before["alpha"], before["dataset"]) == (each["alpha"], each["dataset"])


# ------------------------------------------------------------------------------- numbers of a table

def line(accuracy: float, rounds=(4, 8), curve=None, **values) -> dict:
    return {"result": {"accuracy": float(accuracy), **values}, "rounds": list(rounds),
            "accuracy": curve or [accuracy - 1, accuracy], "commit": "abc", "machine": "one core",
            "id": f"{accuracy} {curve}"}


def test_a_table_is_put_together_as_by_hand():
    table = {"title": "FedIN, Table 0", "setting": "fedin", "columns": {"A": {}, "B": {}}, "rows": {
        name: {"method": name, "dataset": "cifar10"} for name in ("fedavg", "fedprox", "fedin")}}
    keys = list(cells(table))
    lines = dict(zip(keys, [[line(30), line(32)], [line(5)], [line(33.5), line(33.5)], [line(9)],
                            [line(31.5), line(33.5), line(99)], []]))
    papers = {("fedavg", "A"): (60.0, None, "60.00"), ("fedprox", "A"): (70.0, 1.5, "70 ± 1.5"),
              ("fedin", "A"): (80.0, None, "80.0"), ("fedin", "B"): (50.0, None, "50.0")}
    values = report.final(table, lines, ARGS).values
    assert report.markdown("fedin-0", table, values, papers, ["A note."]) == """# FedIN, Table 0

A note.

|  | A (seeds 0-1) | B (seed 0) |
| --- | --- | --- |
| fedavg | 60.00 / 31.00 ± 1.41 | – / 5.00 |
| fedprox | 70 ± 1.5 / 33.5 ± 0.0 | – / 9.00 |
| fedin | 80.0 / 32.5 ± 1.4 | 50.0 / – |

Every cell: the paper / ours, mean ± standard deviation, over the seeds that all rows of its \
column have.

Pairs of rows in the paper's order (ties are not), over the seeds of both: A 2 of 3.

![FedIN, Table 0](fedin-0.png)
"""
    assert report.csv_text("fedin-0", values, papers, "small").splitlines()[5] == (
        "fedin-0,small,fedin,A,80.0,,54.666666666666664,38.40681363161143,31.5 33.5 99.0")
    here = files.commit()
    lines["fedin", "B"] = [line(1) | {"commit": here, "id": "own"}]
    notes = report.notes_of(table, lines, ARGS)
    assert "Scale **small**" in notes[0] and "rounds 20" in notes[0]
    assert f"1 of commit {here}" in notes[1] and f"{here} (other" not in notes[1]
    assert "of commit abc (other code than now)" in notes[1] and "Machines: one core." in notes[1]
    assert report.lacking_runs(lines | {keys[0]: []}, 3) == [
        "Without runs: fedavg / A.", "Fewer than 3 seeds: fedavg / B (seed 0), fedprox / A (seeds "
        "0-1), fedprox / B (seed 0), fedin / B (seed 0)."]


def test_a_table_without_fedavg_has_no_speeds():
    table = PAPER["fedin-1"]
    lines = {key: [] for key in cells(table)} | {("FedIN", NON_IID): [line(60, (4,), [60])]}
    values = report.with_rounds(table, lines, Namespace(scale="paper", seeds=1)).values
    assert values["FedIN", "CIFAR-10, round"] == [4]
    assert not any(column.endswith("speed") for _, column in values)


def test_rounds_to_the_target_and_speed():
    table, rounds = SMALL["fedin-1"], (4, 8, 12)
    lines = {key: [] for key in cells(table)}
    lines["FedAvg", NON_IID] = [line(50, rounds, [10, 46, 50]), line(40, rounds, [10, 35, 40])]
    lines["FedIN", NON_IID] = [line(60, rounds, [48, 55, 60]), line(60, rounds, [30, 37, 60])]
    lines["MOON", NON_IID] = [line(9, rounds, [9, 9, 9])]
    lines["Scaffold", NON_IID] = [line(50, rounds, [46, 47, 50])]
    values, notes, _ = report.with_rounds(table, lines, ARGS)
    assert notes[0].startswith("Targets, %: CIFAR-10 40.5 (")  # mean of 45 and 36
    for row, to_target, speed in (
            ("FedAvg", [8, 12], [1]), ("FedIN", [4, 8], [2]), ("MOON", [None], None),
            ("Scaffold", [4], [2])):  # all speeds over the only seed of MOON and Scaffold
        assert values[row, "CIFAR-10, round"] == to_target
        assert values.get((row, "CIFAR-10, speed")) == speed
    lines["FedIN", NON_IID][1]["accuracy"] = [9, 9, 9]
    values = report.with_rounds(table, lines, ARGS).values
    text = report.markdown("x", table, values, {}, [])
    assert "CIFAR-10, Non-IID (seed 0)" in text and "4 (1 of 2)" not in text
    lines |= {("MOON", NON_IID): [], ("Scaffold", NON_IID): []}
    values = report.with_rounds(table, lines, ARGS).values
    assert ("FedIN", "CIFAR-10, speed") not in values and "4 (1 of 2)" in report.markdown(
        "x", table, values, {}, [])
    # The target is nine tenths of FedAvg's last accuracy, not of its best.
    lines["FedAvg", NON_IID][0]["accuracy"] = [10, 80, 50]
    assert report.targets_of("CIFAR-10", lines, ARGS) == [45, 36]


@pytest.mark.parametrize("fedin, moon, column, counts", [
    ([8, 8], [12, 12], "x, round", (1, 1)), ([4, None], [12, 12], "x, round", (0, 1)),
    ([4.0, 9.0, 9.0], [5.0], "y", (1, 1)), ([4.0], [None], "y", None)])
def test_rows_are_compared_over_the_seeds_of_both(fedin, moon, column, counts):
    papers = {("FedIN", column): (9.0, None, ""), ("MOON", column): (20.0, None, "")}
    values = {("FedIN", column): fedin, ("MOON", column): moon}
    assert analysis.agreement(values, papers).get(column) == counts


def test_curves_and_sweeps_are_means_over_the_seeds_that_all_have():
    table = SMALL["fedin-fig5"]
    lines = {key: [] for key in cells(table)}
    lines["FedAvg", NON_IID] = [line(20, curve=[10, 20]), line(90, curve=[80, 90])]
    lines["FedIN", NON_IID] = [line(40, curve=[30, 40])]
    values, notes, draw = report.curves(table, lines, ARGS, 0.6, "CIFAR-10")
    assert table["report"] == ("curves", {"goal": "CIFAR-10"}) and analysis.SMOOTHING == 0.6
    panel, targets = draw.keywords["lines"][NON_IID], draw.keywords["targets"]
    assert targets == {NON_IID: pytest.approx(18)} and "have (1)" in notes[0]
    assert values["FedAvg", NON_IID] == [20, 90] and panel.keys() == {"FedAvg", "FedIN"}
    assert panel["FedAvg"] == ([4, 8], pytest.approx([10, 14]), [0, 0])
    lines["FedIN", NON_IID].append(line(60, curve=[50, 60]))
    _, notes, draw = report.curves(table, lines, ARGS, 0.0)
    assert draw.keywords["lines"][NON_IID]["FedIN"] == (
        [4, 8], (40, 50), pytest.approx([200 ** 0.5] * 2)) and "smoothed" not in notes[0]
    runs = {("a", "8"): [line(20)], ("a", "16"): [line(30), line(90)], ("b", "8"): [],
            ("b", "16"): [line(7)]}
    table = {"rows": {"a": {}, "b": {}}, "columns": {"8": {}, "16": {}}}
    swept = report.swept(table, runs, ARGS, "x").draw.keywords["lines"][""]
    gap, seven = swept["b"][1]
    assert swept["a"] == (["8", "16"], [20, 30], [0, 0]) and gap != gap and seven == 7


def test_costs_are_by_rule_and_as_measured():
    table, key = SMALL["fedin-4"], ("FedIN", NON_IID)
    lines = {key: [] for key in cells(table)}
    lines[key] = [line(50, upload_mb=4500.0, memory_mb=1250.0), line(50, upload_mb=4500.0)]
    values = report.overheads(table, lines, ARGS).values
    assert values["FedIN", "measured: peak of the process, MB"] == [1250.0]
    assert values["FedIN", "measured: upload per update, MB"] == [4500 / (5 * 20)] * 2
    assert values["FedAvg", "measured: peak of the process, MB"] == []
    assert values["FedIN", "parameters sent, M"] == pytest.approx([12.36], abs=0.005)
    assert values["HeteroFL", "parameters sent, M"] == pytest.approx([15.51], abs=0.005)


def test_clients_are_shown_by_stage_and_by_method(monkeypatch):
    flat = [torch.full((4, 4), 0.1 * stage + 0.2).fill_diagonal_(1) for stage in range(4)]
    features = {arch: torch.randn(40, 6) for arch in ("resnet10", "resnet14", "resnet26")}
    seen = analysis.ClientComparison(flat, [stage - 0.1 for stage in flat], list("abcd"), features,
                                     torch.arange(40) % 2)
    folders = []
    monkeypatch.setattr(analysis, "_compared", lambda folder, **_: folders.append(folder) or seen)
    monkeypatch.setattr(files, "read_config", lambda folder: {
        "method": "fedin", "model": "resnets", "clients": 5})
    lines = {("FedIN", "IID"): [{"id": "a"}]}
    for shown in ("stages", "maps"):
        values, notes, draw = report.of_networks("similarity", {}, lines, ARGS, shown=shown)
        draw(Path("x.png"), title="x")
    assert folders == [Path("runs/tables/small/a")] * 2 and "40 test" in notes[0]
    assert values["FedIN", "IID, stage 2"] == pytest.approx([0.4])
    assert values["FedIN", "IID, stage 3, unbiased"] == pytest.approx([0.4])
    values, notes, draw = report.of_networks("scattered", {}, lines, ARGS, archs=tuple(features),
                                             count=200, label=0)
    assert [len(points) for points in draw.keywords["points"]["FedIN"].values()] == [20] * 3
    assert "20 test images of class 0" in notes[0] and "0.33" in notes[0]
    of_class = {arch: part[::2] for arch, part in features.items()}
    assert list(values.values()) == [[analysis.own_neighbours(of_class)]]


# ----------------------------------------------------------------------------------- tables of runs

def test_tables_are_written_and_drawn_from_finished_runs(monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda _, path, **__: path.write_text("x"))
    names = [name for name, table in SMALL.items() if table["rows"] and "networks" not in table]
    ids, known = {name: ids_of(SMALL[name]) for name in names}, {}
    for name in names:
        of_cell = cells(SMALL[name])
        for number, (key, runs) in enumerate(ids[name].items()):
            for seed, each in enumerate(runs):
                entry = known.setdefault(each, line(0, upload_mb=90.0) | {"id": each})
                entry["result"] |= {of_cell[key]["value"]: 40.0 + number % 7 + seed}
    for name in names:  # the second seed of a first cell
        known.pop(next(iter(ids[name].values()))[1], None)
    Path("results/small").mkdir(parents=True)
    Path("results/small/runs.jsonl").write_text(
        "\n".join([*map(json.dumps, known.values()), '{"id": "torn", "x']))
    assert report.recorded("small") == known
    assert report.main([*names, "--scale", "small"]) == 0
    for name in names:
        text, (row, column) = Path(f"results/small/{name}.md").read_text(), next(iter(ids[name]))
        assert f"Fewer than 3 seeds: {row} / {column} (seed 0)" in text
        assert f"{column} (seed 0)" in text or name == "fedin-4"  # its columns are others
        assert ("smoothed" in text) == (name in ("fedin-fig5", "fedin-fig9"))
        assert Path(f"results/small/{name}.png").read_text() == "x"
        lines = csv.DictReader(Path(f"results/small/{name}.csv").read_text().splitlines())
        by_seed = {(each["row"], each["column"]): each["by seed"] for each in lines}
        for key, runs in ids[name].items() if name != "fedin-4" else ():
            results = [known[each]["result"] for each in takewhile(known.__contains__, runs)]
            value = cells(SMALL[name])[key]["value"]
            assert by_seed[key] == " ".join(str(each[value]) for each in results)


@pytest.mark.parametrize("text", ["null", "{}", '"text"', "[1]", '{"id": 3}', "\ufeff{", "12",
                                  '{"id": "x", "result": {}}'])
def test_a_line_that_is_no_run_is_told_by_its_number_and_costs_no_other(text, capsys):
    good = line(5) | {"id": "good"}
    Path("results/small").mkdir(parents=True)
    Path("results/small/runs.jsonl").write_text(f"{text}\n{json.dumps(good)}\n", encoding="utf-8")
    assert report.recorded("small") == {"good": good}
    assert "note: line 1 of results/small/runs.jsonl is no run's" in capsys.readouterr().out


def test_nothing_is_written_without_runs(capsys):
    assert list(report.chosen(["all"], "small")) == list(SMALL)
    assert report.main(["fedin-fig7", "fedin-2", "fedin-fig10"]) == 0
    text = capsys.readouterr().out
    assert [words.split()[-1] for words in text.split(": no run is finished")[:-1]] == [
        "fedin-2a", "fedin-2b", "fedin-fig7", "fedin-fig10"] and not report.RESULTS.exists()
    assert text.count("whose networks are here") == 2 and "results are in" not in text


def test_the_dealt_classes_are_those_of_the_dropout_setting():
    assert tables.main(["apfl-1"]) == 0
    text = Path("results/smoke/apfl-1.md").read_text()
    rows = [set(row.split(" / ")[1].strip(" |").split()) for row in text.splitlines()
            if row.startswith("| client")]
    assert len(rows) == 10 and rows[-1] == {"8", "9"}  # the dropout client
    assert all(len(row) == 2 and not row & rows[-1] for row in rows[:-1])
    assert "In place of --dataset cifar10: digits." in text and not report.RUNS.exists()


SMALLEST = {"method": "local", "model": "cnn", "rounds": 1, "clients": 2, "train_images": 20,
            "dataset": FEW_DIGITS[1]}


@pytest.fixture
def one(monkeypatch) -> dict:
    """Table "one" at the scale of small, the only one, of two tiny runs."""
    table = {"title": "One", "setting": "quick", "rows": {"a": SMALLEST},
             "columns": {"x": {}, "y": {"batch_size": 5}}}
    monkeypatch.setitem(experiments.SCALES["small"], "quick", {})
    monkeypatch.setattr(experiments, "tables", lambda scale: {"one": table})
    return table


def test_a_run_is_that_of_its_command_and_is_made_once(one, capsys):
    command = "one --scale small --seeds 1".split()
    assert tables.main([*command, "--only", "x"]) == 0
    (known,) = report.recorded("small").values()
    folder = report.RUNS / "small" / known["id"]
    runs = experiments.runs_of(one, Namespace(**{**vars(ARGS), "seeds": 1}))["a", "x"]
    (flags,) = runs.values()
    go(Path("alone"), *run.command_line(flags))
    assert result(Path("alone")) == result(folder) and known["rounds"] == [1]
    assert known["result"].items() >= result(folder).items()
    assert known["commit"] == files.commit() and known["machine"] == files.machine()
    assert known["torch"] == torch.__version__

    # A table needs the line alone.  Repeating is one flag.
    folder.rename("away")
    assert tables.main([*command, "--only", "x"]) == 0 and not folder.exists()
    Path("away").rename(folder)
    Path("results/small/runs.jsonl").unlink()
    assert tables.main([*command, "--only", "x"]) == 0
    before = (folder / "config.json").stat().st_mtime_ns
    assert tables.main([*command, "--only", "x", "--again"]) == 0
    assert (folder / "config.json").stat().st_mtime_ns > before
    assert report.recorded("small").keys() == {known["id"]}
    assert report.main([*command, "--data-dir", "elsewhere"]) == 0
    assert len(Path("results/small/runs.jsonl").read_text().splitlines()) <= 2

    # Again, but stopped: the old line does not hide that the run is to be made.
    (folder / "result.json").unlink()
    capsys.readouterr()
    assert tables.main([*command, "--commands"]) == 0
    assert capsys.readouterr().out.count(known["id"]) == 1


def test_printed_commands_through_xargs_give_the_same_tables(one, capsys):
    command = "one --scale small --seeds 1".split()
    assert tables.main([*command, "--commands"]) == 0
    text = capsys.readouterr().out.replace("python run.py", f"{sys.executable} {ROOT / 'run.py'}")
    for _ in range(2):  # repeated, it finds its runs finished
        subprocess.run(["xargs", "-d", "\n", "-n", "1", "-P", "2", "sh", "-c"], input=text,
                       text=True, check=True, capture_output=True)
    assert report.main(command) == 0
    by_xargs = Path("results/small/one.csv").read_text()
    for folder in ("runs", "results"):
        Path(folder).rename(f"{folder}-before")
    assert tables.main(command) == 0 and Path("results/small/one.csv").read_text() == by_xargs


def test_processes_share_the_cores_and_their_errors_are_told(one, monkeypatch, capsys):
    script, words = Path("fake.py"), ["--seed", "1", "--out", "runs/a"]
    monkeypatch.setattr(tables, "RUN_PY", script)
    monkeypatch.setattr(ranks, "num_cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script.write_text("import os; os.kill(os.getpid(), 9)")
    assert "killed by signal 9: fewer --jobs" in tables.run_alone(words, 2)
    script.write_text("import sys; print(*sys.argv[1:])")
    assert tables.run_alone(words, 3) == ""
    assert Path("runs/a.log").read_text() == "--seed 1 --out runs/a --workers 2\n"
    script.write_text("import sys; print('error: no net', file=sys.stderr); sys.exit(2)")
    assert tables.main("one --scale small --seeds 1".split()) == 1
    assert capsys.readouterr().out.count(": error: no net") == 2


def test_an_interrupted_command_waits_for_its_processes_and_begins_no_other():
    Path("fake.py").write_text(
        "import sys, time, pathlib\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]); out.mkdir(parents=True)\n"
        "try: (out / 'begun').touch(); time.sleep(60)\n"
        "finally: time.sleep(0.5); (out / 'saved').touch()")
    program = ("import sys, tables; tables.RUN_PY = tables.Path('fake.py'); "
               "sys.exit(tables.main(['apfl-3', '--only', 'Local', '--jobs', '1']))")
    process = subprocess.Popen(  # Ctrl-C is for a whole group of processes
        [sys.executable, "-c", program], stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    while not list(report.RUNS.glob("smoke/*/begun")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[1] == b"error: interrupted: type the same command to resume\n"
    saved, logs = (list(report.RUNS.glob(f"smoke/{name}")) for name in ("*/saved", "*.log"))
    assert process.returncode == 130 and len(saved) == len(logs) == 1


def test_fedavg_and_its_fine_tuning_are_what_an_apfl_run_has_besides():
    runs = {"apfl": FEW, "fedavg": "--participation 1 --batch-size 50".split(), "fedavg-ft": []}
    for method, flags in runs.items():
        go(Path(method), *DROPOUT, "--rounds", "1", "--method", method, *flags)
    apfl, fedavg, finetuned = (result(Path(method)) for method in runs)
    assert apfl["global_accuracy"] == fedavg["accuracy"]
    assert apfl["dropout_client_accuracy"] == finetuned["dropout_accuracy"]
