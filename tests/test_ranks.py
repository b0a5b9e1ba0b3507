"""Several processes under torchrun against one: the same bytes, and what happens when one dies.

python -m tests.ranks_alike compares more methods, on two and three processes, and kills either.
"""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from commands import DROPOUT, FEW, RESNET10, ROOT, lines, result

import data
import ranks
import run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import run, ranks

def train_client(experiment, update, task, train=run.train_client):
    if task.number == 2 and ranks.number() == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(experiment, update, task)

run.train_client = train_client
status = run.main()
os._exit(status)
"""


def torchrun(count: int, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, str(count), *command], text=True, capture_output=True)


def test_work_is_dealt_out_by_its_cost(monkeypatch):
    assert ranks.share_out({"a": 1, "b": 5}) == {"a": 0, "b": 0}  # there is one process
    monkeypatch.setattr(ranks, "count", lambda: 3)
    owner = ranks.share_out({"a": 1, "b": 2, "c": 3, "d": 4, "e": 4})
    loads = [sum(cost for item, cost in {"a": 1, "b": 2, "c": 3, "d": 4, "e": 4}.items()
                 if owner[item] == rank) for rank in range(3)]
    assert sorted(loads) == [4, 5, 5]


def test_one_process_does_everything_itself():
    work = iter([torch.ones(1), torch.zeros(1)])
    assert ranks.done_by(0, work.__next__) == 1
    assert (ranks.count(), ranks.number(), ranks.is_first(), ranks.is_speaker()) == (
        1, 0, True, True)
    assert ranks.own_device("cuda:7") == "cuda:7"
    with pytest.raises(FloatingPointError):
        ranks.done_by(0, lambda: (_ for _ in ()).throw(FloatingPointError))


def test_cores_of_a_machine_are_shared_by_its_processes(monkeypatch):
    assert ranks.share_of_cores(6) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [ranks.share_of_cores(cores) for cores in (2, 6, 8)] == [1, 1, 2]


def test_a_nest_of_values_moves_with_all_its_tensors():
    moved = data.on_device({"a": [torch.ones(1), {"b": torch.ones(2)}], "c": 3}, "meta")
    assert moved["c"] == 3 and moved["a"][0].is_meta and moved["a"][1]["b"].is_meta


def test_the_last_resort_waits_for_sigterm_and_says_one_line(monkeypatch, capsys):
    told, tell = os.pipe()
    monkeypatch.setattr(ranks, "GRACE", 0)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    os.write(tell, bytes([signal.SIGINT]))
    thread = threading.Thread(target=ranks.end_at_last, args=(told,))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()  # Ctrl-C has a handler of its own
    os.write(tell, bytes([signal.SIGTERM]))
    thread.join(10)
    error = capsys.readouterr().err
    assert not thread.is_alive() and error.startswith("error: ") and error.count("\n") == 1


def test_two_processes_leave_what_one_does(tmp_path):
    """AP-FL with a dropout client: rounds, late training, generator, friends, all evaluations."""
    flags = [*DROPOUT, "--method", "apfl", "--train-images", "120", *FEW]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run.main([*flags, "--out", str(one)]) == 0
    done = torchrun(2, str(ROOT / "run.py"), *flags, "--workers", "1", "--out", str(two))
    assert done.returncode == 0, done.stderr
    assert "in each of 2 processes" in done.stdout and done.stdout.count("written to") == 1
    assert lines(one) == lines(two) and result(one) == result(two)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


def test_a_process_that_dies_ends_the_run_in_one_line_and_any_number_goes_on(tmp_path):
    flags = [*RESNET10, "--method", "moon", "--rounds", "3"]
    program = tmp_path / "dies.py"
    program.write_text(DIES.format(root=str(ROOT), rank=0))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    died = torchrun(2, str(program), *flags, "--workers", "1", "--out", str(parts))
    assert died.returncode != 0
    said = [line for line in died.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "another process of this run has ended" in said[0]
    assert f"--resume --out {parts}" in said[0] and len(lines(parts)) == 1
    assert run.main(["--resume", "--out", str(parts)]) == 0
    assert run.main([*flags, "--out", str(whole)]) == 0
    assert lines(parts) == lines(whole)


def test_what_is_wrong_is_said_once(tmp_path):
    done = torchrun(2, str(ROOT / "run.py"), "--method", "fedavg", "--clients", "5000",
                    "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] and not (
        tmp_path / "run").exists()
    assert done.stderr.count("error: ") == 1


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
