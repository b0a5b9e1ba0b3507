"""Several processes under torchrun against one: equal bytes, and how the death of one ends.

python -m tests.ranks_alike compares more methods, on two and three processes, and kills either.
"""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from commands import DROPOUT, FEW, RESNET10, ROOT, lines, result

import ranks
import run

# Rank 1 does something for both, a run is refused, and another is carried out.
SHARES = """
import sys
sys.path.insert(0, {root!r})
import ranks, run

ranks.join()
ranks.join = lambda: None
assert ranks.on_rank(1, lambda: {{"rank": ranks.number()}}) == {{"rank": 1}}
try:
    ranks.on_rank(1, lambda: 1 / 0)
    raise AssertionError("the error has not travelled")
except ZeroDivisionError as error:
    assert "<lambda>" in ranks.traceback_of(error)
assert run.main(["--clients", "5000", "--out", {refused!r}]) == 2
sys.exit(run.main())
"""
DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import federation, ranks, run

def train_client(experiment, update, task, train=federation.train_client):
    if task.number == 2 and ranks.number() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(experiment, update, task)

federation.train_client = train_client
status = run.main()
os._exit(status)
"""


def torchrun(program, text: str, *flags: str) -> subprocess.CompletedProcess:
    """Run a program on two processes."""
    program.write_text(text)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           str(program), *flags, "--workers", "1"], text=True, capture_output=True)


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
    assert ranks.share_of_cores(6) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [ranks.share_of_cores(cores) for cores in (2, 6, 8)] == [1, 1, 2]


def test_two_processes_leave_what_one_does(tmp_path):
    """AP-FL with a dropout client: rounds, late training, generator, friends, all evaluations."""
    flags = [*DROPOUT, "--method", "apfl", "--train-images", "120", *FEW]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run.main([*flags, "--out", str(one)]) == 0
    text = SHARES.format(root=str(ROOT), refused=str(tmp_path / "refused"))
    done = torchrun(tmp_path / "shares.py", text, *flags, "--out", str(two))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 1 and not (tmp_path / "refused").exists()
    assert "in each of 2 processes" in done.stdout and done.stdout.count("written to") == 1
    assert lines(one) == lines(two) and result(one) == result(two)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


def test_a_process_that_dies_ends_the_run_in_one_line_and_any_number_resumes(tmp_path):
    flags = [*RESNET10, "--method", "moon", "--rounds", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    died = torchrun(tmp_path / "dies.py", DIES.format(root=str(ROOT)), *flags, "--out", str(parts))
    assert died.returncode != 0
    (error,) = [line for line in died.stderr.splitlines() if line.startswith("error: ")]
    assert "another process of this run has ended" in error
    assert f"--resume --out {parts}" in error and len(lines(parts)) == 1
    assert run.main(["--resume", "--out", str(parts)]) == 0
    assert run.main([*flags, "--out", str(whole)]) == 0
    assert lines(parts) == lines(whole)


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
