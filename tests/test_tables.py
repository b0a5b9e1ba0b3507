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
from filelock import FileLock

import apfl
import data
import tables
from commands import ROOT, DROPOUT, FEW, go, result

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


def test_the_papers_numbers_are_those_of_cells_that_we_make():
    made_besides = {"fedin-1": ("round", "speed"), "fedin-4": ("M", "MiB"), "apfl-1": ("classes",)}
    papers, at_scale = tables.papers_numbers(), tables.all_tables("paper")
    assert papers.keys() <= at_scale.keys()
    for name, known in papers.items():
        for row, column in known:
            ending = column.split(", ")[-1]
            assert (row, column) in at_scale[name].cells or (
                ending in made_besides.get(name, ())), (name, row, column)
    assert papers["fedin-1"]["FedIN (+Noise)", "CIFAR-10, Non-IID"] == (77.3, None)
    assert papers["apfl-2"]["AP-FL", "CIFAR-10, 5 clients, alpha 0.01"] == (61.84, 1.75)
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


def test_the_flags_that_only_stages_read_are_apfls():
    assert tables.STAGES.keys() == {flag.name for flag in apfl.FLAGS}
    reads = {name: set(inspect.signature(stage).parameters) for name, stage in
             apfl.METHODS["apfl"].stages.items()}
    for flag, stage in tables.STAGES.items():
        first = next((name for name in ("late", "generator", "friends")
                      if {"lambda": "balance"}.get(flag, flag) in reads[name]), None)
        assert first in (stage, None), flag


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


@pytest.mark.parametrize("words, said", [
    ("fedin-9", "there is no fedin-9"), ("", "name a table"), ("fedin-1 --seeds 0", "at least 1"),
    ("fedin-1 --scale huge", "invalid choice"), ("fedin-1 --jobs -1", "at least 0")])
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
    table = tables.Table("FedIN, Table 0", cells, tables.final, tables.numbers)
    found = {("fedavg", "A"): [line(30), line(32)], ("fedavg", "B"): [line(5)],
             ("fedprox", "A"): [line(33.5), line(33.5)], ("fedprox", "B"): [line(9)],
             ("fedin", "A"): [line(31.5), line(33.5)], ("fedin", "B"): []}
    papers = {("fedavg", "A"): (60.0, None), ("fedprox", "A"): (70.0, 1.5),
              ("fedin", "A"): (80.0, None), ("fedin", "B"): (50.0, None)}
    values, _ = tables.final(table, found, PLACE)
    text = tables.markdown("fedin-0", table, values, papers, ["A note."])
    assert text == """# FedIN, Table 0

A note.

|  | A | B |
| --- | --- | --- |
| fedavg | 60.0 / 31.0 ± 1.4 | – / 5.00 |
| fedprox | 70.0 ± 1.5 / 33.5 ± 0.0 | – / 9.00 |
| fedin | 80.0 / 32.5 ± 1.4 | 50.0 / – |

Every cell: the paper / ours, mean ± standard deviation over the seeds.

Pairs of rows that come in the paper's order: A 2 of 3.

![FedIN, Table 0](fedin-0.png)
"""
    tables.write_csv(tables.Path("x.csv"), "fedin-0", values, papers, "small")
    rows = list(csv.DictReader(io.StringIO(tables.Path("x.csv").read_text())))
    assert rows[0] == {"table": "fedin-0", "scale": "small", "row": "fedavg", "column": "A",
                       "paper": "60.0", "paper deviation": "", "mean": "31.0", "deviation": "1.4142135623730951",
                       "by seed": "30.0 32.0"}
    assert rows[-1]["mean"] == rows[-1]["by seed"] == "" and rows[-1]["paper"] == "50.0"
    failed = {tables.job_of(cells["fedin", "B"], PLACE, 2).id: "no data", "another": "no net"}
    notes = tables.notes_of(table, found, PLACE, failed, None)
    for said in ("Scale **small**", "rounds 20", "Seeds: 0, 1, 2"):
        assert said in notes[0]
    assert "commit abc on one core" in notes[1] and "python tables.py x" in notes[1]
    assert "Lacking runs: fedavg / A" in notes[-1] and notes[-1].endswith("(no data).")


def test_rounds_to_the_target_and_speed():
    table = tables.all_tables("small")["fedin-1"]
    found = {key: [] for key in table.cells}
    key = "CIFAR-10, Non-IID"
    found["FedAvg", key] = [line(50, (4, 8, 12), [10, 46, 50]), line(50, (4, 8, 12), [10, 20, 50])]
    found["FedIN", key] = [line(60, (4, 8, 12), [48, 55, 60]), line(60, (4, 8, 12), [30, 48, 60])]
    found["MOON", key] = [line(9, (4, 8, 12), [9, 9, 9])]
    values, targets = tables.with_rounds(table, found, PLACE)
    assert targets == {"CIFAR-10": pytest.approx(45)}
    assert values["FedAvg", "CIFAR-10, round"] == [8, 12]
    assert values["FedIN", "CIFAR-10, round"] == [4, 8]
    assert values["MOON", "CIFAR-10, round"] == [None]
    assert values["FedIN", "CIFAR-10, speed"] == [pytest.approx(10 / 6)]
    assert values["FedAvg", "CIFAR-10, speed"] == [1] and ("MOON", "CIFAR-10, speed") not in values
    found["FedIN", key][1]["accuracy"] = [9, 9, 9]
    text = tables.markdown("x", table, tables.with_rounds(table, found, PLACE)[0], {}, [])
    assert "4 (1 of 2)" in text  # a seed did not get there
    papers = {("FedIN", "c"): (9, None), ("MOON", "c"): (20, None)}  # rounds; and who never does
    assert tables.agreement({("FedIN", "c"): [4], ("MOON", "c"): [None]}, papers) == {"c": (1, 1)}
    assert tables.target_of("CIFAR-10", found, PLACE._replace(scale="paper")) == 60


def test_a_data_set_that_is_not_there_is_said_and_the_others_are_made(monkeypatch, capsys):
    def no_net(name, data_dir):
        raise ValueError(f"{name} could not be loaded: no net")

    monkeypatch.setattr(data, "download", no_net)
    job = tables.jobs_of(tables.all_tables("small")["fedin-2b"], PLACE)[0]
    assert tables.run_missing([job], [], PLACE) == {job.id: "cifar10 could not be loaded: no net"}


# --------------------------------------------------------------------------------- made for good

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
    assert len(runs) == 2 and "Fashionmnist is digits." in text and "Scale **smoke**" in text
    assert (folder / "apfl-fig5b.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(dict.fromkeys(line["id"] for line in lines))
    assert {line["id"] for line in lines} == runs.keys()
    logs = [path.read_text() for path in tables.RUNS.glob("smoke/*.log")]
    assert ["going on after round 2" in log for log in logs] == [True] * 2  # resumed, or begun so
    with open(folder / "apfl-fig5b.csv") as file:
        found = {row["column"]: row["mean"] for row in csv.DictReader(file) if row["mean"]}
    cell = tables.all_tables("smoke")["apfl-fig5b"].cells["Fashion-MNIST", "4"]
    job = tables.job_of(cell, tables.Place("smoke", 1, 1, "data", ""), 0)
    go(tables.Path("alone"), *tables.command_line(job.typed))
    assert result(tables.Path("alone")) == result(job.folder)
    assert float(found["4"]) == result(job.folder)["friend_accuracy"] and len(found) == 2
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
