"""Several processes under torchrun against one: equal bytes, and how the death of one ends.

python -m tests.ranks_alike compares more methods, on two and three processes, and kills either.
"""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from commands import CNN, DROPOUT, FEW, ROOT, SMALL, lines, make_small, result

import ranks
import run

APFL = [*DROPOUT, "--method", "apfl", "--clients", "4", "--train-images", "120", *FEW]
MOON = [*CNN, "--method", "moon", "--rounds", "3"]
PROGRAM = """
import os, signal, sys
sys.path.insert(0, {root!r})
import apfl, federation, generator, ranks, run

def train_client(experiment, update, task, train=federation.train_client):
    if experiment.settings["method"] == "moon" and task.number == 2 and ranks.number() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(experiment, update, task)

federation.train_client = train_client
generator.WIDTHS, apfl.BETA_TEST_IMAGES = {small}

# Rank 1 works for both
ranks.join()
ranks.join = ranks.leave = lambda: None
assert ranks.on_rank(1, lambda: {{"rank": ranks.number()}}) == {{"rank": 1}}
try:
    ranks.on_rank(1, lambda: 1 / 0)
    raise AssertionError("the error has not travelled")
except ZeroDivisionError as error:
    assert "<lambda>" in ranks.traceback_of(error)

# A run is refused, one ends, in one rank 0 dies
assert run.main(["--clients", "5000", "--out", {out!r} + "/refused"]) == 2
assert run.main([*{apfl}, "--out", {out!r} + "/apfl"]) == 0
ranks.on_rank(0, lambda: ranks._store.delete_key("speaker"))
os._exit(run.main([*{moon}, "--out", {out!r} + "/moon"]))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Output of PROGRAM on two processes, and the folder of its runs."""
    out = tmp_path_factory.mktemp("two")
    program, flags = out / "program.py", ["--workers", "1"]
    program.write_text(PROGRAM.format(root=str(ROOT), out=str(out), small=SMALL,
                                      apfl=APFL + flags, moon=MOON + flags))
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           str(program)], text=True, capture_output=True), out


def test_work_is_dealt_out_by_its_cost(monkeypatch):
    assert ranks.deal_out({"a": 1, "b": 5}) == {"a": 0, "b": 0}  # one process
    monkeypatch.setattr(ranks, "count", lambda: 3)
    costs = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 4}
    owner = ranks.deal_out(costs)
    loads = [sum(cost for item, cost in costs.items() if owner[item] == rank) for rank in range(3)]
    assert sorted(loads) == [4, 5, 5]


def test_one_process_does_everything_itself():
    work = iter([torch.ones(1), torch.zeros(1)])
    assert ranks.on_rank(0, work.__next__) == 1
    assert (ranks.count(), ranks.number(), ranks.is_first(), ranks.is_speaker()) == (
        1, 0, True, True)
    assert ranks.own_device("cuda:7") == "cuda:7"
    assert str(ranks.find_device("cpu:0")) == "cpu"
    with pytest.raises(FloatingPointError):
        ranks.on_rank(0, lambda: (_ for _ in ()).throw(FloatingPointError))


def test_one_process_speaks_and_cores_are_shared_by_all(monkeypatch):
    monkeypatch.setattr(ranks, "_store", dist.HashStore())
    assert [ranks.is_speaker() for _ in range(3)] == [True, False, False]
    monkeypatch.setattr(ranks, "num_cores", lambda: 6)
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):  # left over: torchrun did not start this
        monkeypatch.setenv(name, "2")
    ranks.join()
    assert ranks.share_of_cores() == 6 and ranks.count() == 1
    monkeypatch.setattr(ranks, "count", lambda: 2)
    shares = {}
    for processes in "1248":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        shares[processes] = ranks.share_of_cores()
    assert shares == {"1": 6, "2": 3, "4": 1, "8": 1}


def test_two_processes_leave_what_one_does(two, tmp_path, monkeypatch):
    """AP-FL with a dropout client: rounds, late training, generator, friends, all evaluations."""
    make_small(monkeypatch)
    done, folder = two
    assert run.main([*APFL, "--out", str(tmp_path)]) == 0
    assert "in each of 2 processes" in done.stdout and done.stdout.count("written to") == 1
    assert lines(folder / "apfl") == lines(tmp_path), done.stderr
    assert result(folder / "apfl") == result(tmp_path)
    assert {path.name for path in (folder / "apfl").iterdir()} == {
        path.name for path in tmp_path.iterdir()}


def test_a_process_that_dies_ends_the_run_in_one_line_and_any_number_resumes(two, tmp_path):
    done, folder = two
    out = folder / "moon"
    refused, died = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "clients" in refused and not (folder / "refused").exists() and done.returncode != 0
    assert "another process of this run has ended" in died
    assert f"--resume --out {out}" in died and len(lines(out)) == 1
    assert run.main(["--resume", "--out", str(out)]) == 0
    assert run.main([*MOON, "--out", str(tmp_path)]) == 0
    assert lines(out) == lines(tmp_path)


def test_an_error_of_any_class_can_travel():
    class Odd(Exception):  # cannot be pickled, since it is defined here
        pass

    class Odder(ValueError):
        def __init__(self, one, two):
            super().__init__(one)

    for error in (Odd("a"), Odder("a", 2), KeyError("a")):
        error.add_note("client 3")
        try:
            raise error
        except Exception as raised:
            copy = ranks.portable(raised)
        assert "a" in str(copy) and copy.__notes__ == ["client 3"]
        assert "test_an_error_of_any_class_can_travel" in ranks.traceback_of(copy)
