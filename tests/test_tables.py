"""The papers' tables: the runs that they need, their numbers by hand, and a few made for good."""

import csv
import json
import os
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

import analysis
import run
import tables
from commands import DROPOUT, FEW, FEW_DIGITS, ROOT, go, result

ARGS = Namespace(scale="small", seeds=3, jobs=1, data_dir="data", command="python tables.py x")
SMALL, PAPER = tables.all_tables("small"), tables.all_tables("paper")
NON_IID = "CIFAR-10, Non-IID"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------ the runs of a table

@pytest.mark.parametrize("scale", tables.SCALES)
def test_run_py_takes_the_flags_of_every_run(scale, capsys):
    assert tables.main(["--list", "--scale", scale]) == 0
    text = capsys.readouterr().out
    kinds = ("FedIN, Table", "FedIN, Fig.", "AP-FL, Table", "AP-FL, Fig.")
    assert [text.count(kind) for kind in kinds] == [7, 10, 4, 3]
    assert all(f"{name} " in text for name in PAPER) and not list(Path().iterdir())


def test_the_papers_numbers_are_those_of_cells_that_we_make():
    made_besides = {"fedin-1": ("round", "speed"), "fedin-4": ("M", "MiB"), "apfl-1": ("classes",)}
    papers = tables.papers_numbers()
    for name, known in papers.items():
        for row, column in known:
            assert (row, column) in PAPER[name].cells or (
                column.split(", ")[-1] in made_besides.get(name, ())), (name, row, column)
    assert papers["fedin-1"]["FedIN (+Noise)", NON_IID] == (77.3, None, "77.3")
    apfl = papers["apfl-2"]["AP-FL", "CIFAR-10, 5 clients, alpha 0.01"]
    assert apfl == (61.84, 1.75, "61.84 ± 1.75")
    counts = [len(known) for known in papers.values()]
    assert sorted(counts) == [10, 10, 10, 12, 14, 24, 24, 27, 30, 140, 144]


def test_runs_keep_their_ids_and_the_papers_scale_is_that_of_run_py():
    Path("data").mkdir()
    Path("data/embeddings-word2vec-fashionmnist.npz").touch()
    ids = {name: set(chain.from_iterable(tables.jobs_of(table, ARGS).values()))
           for name, table in SMALL.items()}
    lines = (ROOT / "results/small/runs.jsonl").read_text().splitlines()
    finished = {name for each in lines if not (name := json.loads(each)["id"]).endswith("-peak")}
    assert len(finished) > 150 and finished <= set().union(*ids.values())
    assert ids["fedin-fig5"] < ids["fedin-1"]
    assert "fedin-cifar10-0-fa19a4afe0" in ids["fedin-1"] & ids["fedin-6"]  # noise 0 is none
    assert tables.SCALES["paper"] == {"fedin": {"eval_every": 1}, "apfl": {}}


def test_an_id_stands_for_settings_that_change_numbers(monkeypatch):
    monkeypatch.setattr(tables.run, "resolve", dict)
    flags = {"method": "fedavg", "dataset": "data/mine.npz", "seed": 0, "semantics": "clip"}
    for changes in ({"dataset": "elsewhere/mine.npz", "workers": 1, "device": "cuda"},
                    {"new": None, "switch": False, "several": []},  # flags of a later run.py
                    {"semantics": "data/embeddings-clip-mine.npz"}):
        assert tables.run_id(flags | changes) == tables.run_id(flags)
    for changes in ({"seed": 1}, {"beta": 0.0}, {"semantics": "bert"}, {"dataset": "other.npz"}):
        assert tables.run_id(flags | changes) != tables.run_id(flags)


def test_embeddings_that_a_user_has_go_before_the_encoder():
    encoder = tables.Cell({"method": "apfl", "setting": "apfl", "dataset": "cifar10"})
    bert = encoder._replace(flags={**encoder.flags, "semantics": "bert"})
    Path("data").mkdir()
    Path("data/clip-cifar10.npz").touch()  # cache of --semantics clip
    assert tables.semantics_of(encoder, "data") == "clip"
    for choice in ("word2vec", "clip"):
        Path(f"data/embeddings-{choice}-cifar10.npz").touch()
        assert tables.semantics_of(encoder, "data") == f"data/embeddings-{choice}-cifar10.npz"
    assert tables.semantics_of(bert, "data") == "bert"
    smoke = tables.flags_of(bert, Namespace(scale="smoke", data_dir="data"), 0)
    assert (smoke["semantics"], smoke["dataset"]) == ("onehot", "digits")
    error = tables.run_alone(Path("out"), {"dataset": "emnist", "semantics": "word2vec"}, 1)
    assert "put embeddings-word2vec-emnist.npz" in error


@pytest.mark.parametrize("words, part", [
    ("fedin-9", "unknown name fedin-9"), ("fedin-1 --seeds 0", "at least 1"),
    ("fedin-1 --scale huge", "(python tables.py --help"), ("fedin-1 --jobs -1", "at least 0"),
    ("fedin-6 --only CIFAR10", "--only CIFAR10 is in none of these names: noise 0, Fashion-MN")])
def test_mistakes_are_one_line(capsys, words, part):
    assert tables.main(words.split()) == 2
    error = capsys.readouterr().err
    assert part in error and error.startswith("error: ") and error.count("\n") == 1


# ------------------------------------------------------------------------------- numbers of a table

def line(accuracy: float, rounds=(4, 8), curve=None, **values) -> dict:
    return {"result": {"accuracy": float(accuracy), **values}, "rounds": list(rounds),
            "accuracy": curve or [accuracy - 1, accuracy], "commit": "abc", "machine": "one core"}


def test_a_table_is_put_together_as_by_hand():
    keys = [(row, column) for row in ("fedavg", "fedprox", "fedin") for column in ("A", "B")]
    table = tables.Table("FedIN, Table 0", {key: tables.Cell({
        "setting": "fedin", "method": key[0], "dataset": "cifar10"}) for key in keys})
    lines = dict(zip(keys, [[line(30), line(32)], [line(5)], [line(33.5), line(33.5)], [line(9)],
                            [line(31.5), line(33.5)], []]))
    papers = {("fedavg", "A"): (60.0, None, "60.00"), ("fedprox", "A"): (70.0, 1.5, "70 ± 1.5"),
              ("fedin", "A"): (80.0, None, "80.0"), ("fedin", "B"): (50.0, None, "50.0")}
    values = tables.final(table, lines, ARGS).values
    assert tables.markdown("fedin-0", table, values, papers, ["A note."]) == """# FedIN, Table 0

A note.

|  | A | B |
| --- | --- | --- |
| fedavg | 60.00 / 31.00 ± 1.41 | – / 5.00 |
| fedprox | 70 ± 1.5 / 33.5 ± 0.0 | – / 9.00 |
| fedin | 80.0 / 32.5 ± 1.4 | 50.0 / – |

Every cell: the paper / ours, mean ± standard deviation over seeds; (k of n): over k seeds alone.

Pairs of rows in the paper's order (ties are not), over the seeds of both: A 2 of 3.

![FedIN, Table 0](fedin-0.png)
"""
    assert tables.csv_text("fedin-0", values, papers, "small").splitlines()[5] == (
        "fedin-0,small,fedin,A,80.0,,32.5,1.4142135623730951,31.5 33.5")
    notes = tables.notes_of(table, lines, 3, ARGS)
    assert "Scale **small**" in notes[0] and "rounds 20" in notes[0] and "0, 1, 2" in notes[0]
    assert notes[1] == "`python tables.py x`; runs of commit abc on one core."
    ids = {key: ["a", "b", "c"] if key == ("fedin", "B") else ["d", "e"] for key in keys}
    assert tables.lacking_runs(ids, lines, {"c": "no data", "x": "no net"}) == [
        "Lacking runs: fedavg / B, fedprox / B (not run).", "Lacking runs: fedin / B (no data)."]


def test_rounds_to_the_target_and_speed():
    table, rounds = SMALL["fedin-1"], (4, 8, 12)
    lines = {key: [] for key in table.cells}
    lines["FedAvg", NON_IID] = [line(50, rounds, [10, 46, 50]), line(40, rounds, [10, 35, 40])]
    lines["FedIN", NON_IID] = [line(60, rounds, [48, 55, 60]), line(60, rounds, [30, 37, 60])]
    lines["MOON", NON_IID] = [line(9, rounds, [9, 9, 9])]
    lines["Scaffold", NON_IID] = [line(50, rounds, [46, 47, 50])]
    values, notes, _ = tables.with_rounds(table, lines, ARGS)
    assert notes[0].startswith("Targets, %: CIFAR-10 40.5 (")  # mean of 45 and 36
    for row, to_target, speed in (
            ("FedAvg", [8, 12], [1]), ("FedIN", [4, 8], [pytest.approx(10 / 6)]),
            ("MOON", [None], None), ("Scaffold", [4], [2])):  # Scaffold over its only seed
        assert values[row, "CIFAR-10, round"] == to_target
        assert values.get((row, "CIFAR-10, speed")) == speed
    lines["FedIN", NON_IID][1]["accuracy"] = [9, 9, 9]
    values = tables.with_rounds(table, lines, ARGS).values
    text = tables.markdown("x", table, values, {}, [])
    assert "4 (1 of 2)" in text and "9.00 (1 of 2)" in text  # target missed; seed not run
    assert ("FedIN", "CIFAR-10, speed") not in values


@pytest.mark.parametrize("fedin, moon, column, counts", [
    ([8, 8], [12, 12], "x, round", (1, 1)), ([4, None], [12, 12], "x, round", (0, 1)),
    ([4.0, 9.0, 9.0], [5.0], "y", (1, 1)), ([4.0], [None], "y", None)])
def test_rows_are_compared_over_the_seeds_of_both(fedin, moon, column, counts):
    papers = {("FedIN", column): (9.0, None, ""), ("MOON", column): (20.0, None, "")}
    values = {("FedIN", column): fedin, ("MOON", column): moon}
    assert tables.agreement(values, papers).get(column) == counts


def test_curves_and_sweeps_are_means_over_the_seeds_that_all_have():
    table = SMALL["fedin-fig5"]
    lines = {key: [] for key in table.cells}
    lines["FedAvg", NON_IID] = [line(20, curve=[10, 20]), line(90, curve=[80, 90])]
    lines["FedIN", NON_IID] = [line(40, curve=[30, 40])]
    values, notes, draw = table.measure(table, lines, ARGS)
    panel, targets = draw.keywords["lines"][NON_IID], draw.keywords["targets"]
    assert targets == {NON_IID: pytest.approx(18)} and "have (1)" in notes[0]
    assert values["FedAvg", NON_IID] == [20, 90] and panel.keys() == {"FedAvg", "FedIN"}
    assert panel["FedAvg"] == ([4, 8], pytest.approx([10, 14]), [0, 0])
    lines["FedIN", NON_IID].append(line(60, curve=[50, 60]))
    _, notes, draw = tables.curves("", 0.0, table, lines, ARGS)
    assert draw.keywords["lines"][NON_IID]["FedIN"] == (
        [4, 8], (40, 50), pytest.approx([200 ** 0.5] * 2)) and "smoothed" not in notes[0]
    runs = {("a", "8"): [line(20)], ("a", "16"): [line(30), line(90)], ("b", "8"): [],
            ("b", "16"): [line(7)]}
    table = tables.Table("", dict.fromkeys(runs, tables.Cell({})))
    swept = tables.swept("x", table, runs, ARGS).draw.keywords["lines"][""]
    gap, seven = swept["b"][1]
    assert swept["a"] == (["8", "16"], [20, 30], [0, 0]) and gap != gap and seven == 7


def test_costs_are_by_rule_and_as_measured():
    table, key = SMALL["fedin-4"], ("FedIN", NON_IID)
    lines = {key: [] for key in table.cells} | {key: [line(50, upload_mb=4500.0)]}
    flags = tables.flags_of(table.cells[key], ARGS, 0)
    assert tables.peak_memory(flags, Namespace(scale="small", jobs=0)) is None
    tables.append("small", f"{tables.run_id(flags)}-peak", flags, peak_gib=1.25)
    values = tables.overheads(table, lines, ARGS).values
    assert values["FedIN", "measured: peak of the process, GiB"] == [1.25]
    assert values["FedIN", "measured: upload per update, MB"] == [4500 / (5 * 20)]
    assert values["FedAvg", "measured: peak of the process, GiB"] == []
    assert values["FedIN", "parameters sent, M"] == pytest.approx([12.36], abs=0.005)
    assert values["HeteroFL", "parameters sent, M"] == pytest.approx([15.51], abs=0.005)


def test_what_clients_see_is_shown_by_stage_and_by_method(monkeypatch):
    flat = [torch.full((4, 4), 0.1 * stage + 0.2).fill_diagonal_(1) for stage in range(4)]
    features = {arch: torch.randn(40, 6) for arch in ("resnet10", "resnet14", "resnet26")}
    seen = analysis.ClientComparison(flat, [stage - 0.1 for stage in flat], list("abcd"), features,
                                     torch.arange(40) % 2)
    monkeypatch.setattr(tables, "compare_clients", lambda folder: seen)
    lines = {("FedIN", "IID"): [{"id": "a"}]}
    values, notes, draw = tables.similarity(tables.draw_maps, None, lines, ARGS)
    assert values["FedIN", "IID, stage 2"] == pytest.approx([0.4]) and "40 test" in notes[0]
    assert values["FedIN", "IID, stage 3, unbiased"] == pytest.approx([0.4])
    for drawing in (draw, partial(tables.draw_stages, *draw.args)):
        drawing(Path("x.png"), title="x")
    values, notes, draw = tables.scattered(tuple(features), 200, 0, None, lines, ARGS)
    assert [len(points) for points in draw.keywords["points"]["FedIN"].values()] == [20] * 3
    assert "20 test images of class 0" in notes[0] and "0.33" in notes[0]
    of_class = {arch: part[::2] for arch, part in features.items()}
    assert list(values.values()) == [[analysis.own_neighbours(of_class)]]


# ----------------------------------------------------------------------------------- tables of runs

def test_tables_are_written_and_drawn_from_finished_runs(monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, file, **__: file.write(b"x"))
    names = [name for name, table in SMALL.items() if table.cells and not table.networks]
    jobs, known = {name: tables.jobs_of(SMALL[name], ARGS) for name in names}, {}
    for name in names:
        for number, (key, runs) in enumerate(jobs[name].items()):
            for seed, each in enumerate(runs):
                entry = known.setdefault(each, line(0, upload_mb=90.0) | {"id": each})
                entry["result"] |= {SMALL[name].cells[key].value: 40.0 + number % 7 + seed}
    for name in names:  # the second seed of a first cell
        known.pop(list(next(iter(jobs[name].values())))[1], None)
    Path("results/small").mkdir(parents=True)
    Path("results/small/runs.jsonl").write_text(
        "\n".join([*map(json.dumps, known.values()), '{"id": "torn", "x']))
    assert tables.recorded("small") == known
    assert tables.main([*names, "--scale", "small", "--jobs", "0"]) == 0
    for name in names:
        text, (row, column) = Path(f"results/small/{name}.md").read_text(), next(iter(jobs[name]))
        assert f"Lacking runs: {row} / {column}" in text and "±" in text
        assert ("smoothed" in text) == (name in ("fedin-fig5", "fedin-fig9"))
        assert Path(f"results/small/{name}.png").read_bytes() == b"x"
        lines = csv.DictReader(Path(f"results/small/{name}.csv").read_text().splitlines())
        by_seed = {(each["row"], each["column"]): each["by seed"] for each in lines}
        for key, runs in jobs[name].items() if name != "fedin-4" else ():  # columns of its own
            results = [known[each]["result"] for each in takewhile(known.__contains__, runs)]
            value = SMALL[name].cells[key].value
            assert by_seed[key] == " ".join(str(each[value]) for each in results)


def test_nothing_is_written_without_runs(capsys):
    assert list(tables.chosen(["all"], SMALL)) == list(SMALL)
    assert tables.main(["fedin-fig7", "fedin-2", "fedin-fig10", "--jobs", "0"]) == 0
    text = capsys.readouterr().out
    assert [words.split()[-1] for words in text.split(": no run is finished")[:-1]] == [
        "fedin-2a", "fedin-2b", "fedin-fig7", "fedin-fig10"] and not tables.RESULTS.exists()
    assert text.count("whose networks are here") == 2 and "results are in" not in text


def test_the_dealt_classes_are_those_of_the_dropout_setting():
    assert tables.main(["apfl-1"]) == 0
    text = Path("results/smoke/apfl-1.md").read_text()
    rows = [set(row.split(" / ")[1].strip(" |").split()) for row in text.splitlines()
            if row.startswith("| client")]
    assert len(rows) == 10 and rows[-1] == {"8", "9"}  # the dropout client
    assert all(len(row) == 2 and not row & rows[-1] for row in rows[:-1])
    assert "In place of --dataset cifar10: digits." in text and not tables.RUNS.exists()


def test_a_run_is_that_of_its_command_and_is_made_once(monkeypatch):
    cell = tables.Cell({"setting": "quick", "method": "local", "model": "cnn", "rounds": 1,
                        "clients": 2, "train_images": 20, "dataset": FEW_DIGITS[1]})
    table, command = tables.Table("One", {("a", "x"): cell}), "one --scale small --seeds 1".split()
    monkeypatch.setitem(tables.SCALES["small"], "quick", {})
    monkeypatch.setattr(tables, "all_tables", lambda scale: {"one": table})
    assert tables.main(command) == 0
    (known,) = tables.recorded("small").values()
    folder = tables.RUNS / "small" / known["id"]
    go(Path("alone"), *run.command_line(tables.flags_of(cell, ARGS, 0)))
    assert result(Path("alone")) == result(folder) and known["rounds"] == [1]
    assert known["result"].items() >= result(folder).items()
    # A table needs the line alone.  Without it, the run resumes where it was stopped
    (folder / "result.json").unlink()
    metrics = (folder / "metrics.jsonl").read_text()
    assert tables.main(command) == 0 and not (folder / "result.json").exists()
    Path("results/small/runs.jsonl").unlink()
    assert tables.main(command) == 0 and (folder / "metrics.jsonl").read_text() == metrics
    assert tables.recorded("small").keys() == {known["id"]}


def test_processes_share_the_cores_and_their_errors_are_told(monkeypatch, capsys):
    script, folder, flags = Path("fake.py"), Path("runs/a"), {"method": "fedavg", "seed": 1}
    monkeypatch.setattr(tables, "RUN_PY", script)
    monkeypatch.setattr(tables.run, "num_cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script.write_text("import os; os.kill(os.getpid(), 9)")
    assert "killed by signal 9: fewer --jobs" in tables.run_alone(folder, flags, 2)
    script.write_text("import sys; print(*sys.argv[1:])")
    folder.mkdir()
    (folder / "config.json").touch()
    assert tables.run_alone(folder, flags, 3) == ""
    words = "--method fedavg --seed 1 --resume --workers 2 --out runs/a\n"
    assert Path("runs/a.log").read_text() == words
    script.write_text("import sys; print('error: no net', file=sys.stderr); sys.exit(2)")
    assert tables.main(["apfl-3", "--only", "Local"]) == 1
    assert capsys.readouterr().out.count(": error: no net") == 2


def test_an_interrupted_command_waits_for_its_processes_and_begins_no_other():
    Path("fake.py").write_text(
        "import sys, time, pathlib; out = pathlib.Path(sys.argv[-1]); out.mkdir(parents=True)\n"
        "try: (out / 'begun').touch(); time.sleep(60)\n"
        "finally: time.sleep(0.5); (out / 'saved').touch()")
    program = ("import sys, tables; tables.RUN_PY = tables.Path('fake.py'); "
               "sys.exit(tables.main(['apfl-3', '--only', 'Local', '--jobs', '1']))")
    process = subprocess.Popen(  # Ctrl-C is for a whole group of processes
        [sys.executable, "-c", program], stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    while not list(tables.RUNS.glob("smoke/*/begun")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[1] == b"error: interrupted: type the same command to resume\n"
    saved, logs = (list(tables.RUNS.glob(f"smoke/{name}")) for name in ("*/saved", "*.log"))
    assert process.returncode == 130 and len(saved) == len(logs) == 1


def test_fedavg_and_its_fine_tuning_are_what_an_apfl_run_has_besides():
    runs = {"apfl": FEW, "fedavg": "--participation 1 --batch-size 50".split(), "fedavg-ft": []}
    for method, flags in runs.items():
        go(Path(method), *DROPOUT, "--rounds", "1", "--method", method, *flags)
    apfl, fedavg, finetuned = (result(Path(method)) for method in runs)
    assert apfl["global_accuracy"] == fedavg["accuracy"]
    assert apfl["dropout_client_accuracy"] == finetuned["dropout_accuracy"]
