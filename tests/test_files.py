"""Stopped, killed, grown, damaged and diverged runs, through main."""

import json
import os
import signal

import pytest
import torch
from commands import (APFL, ASYNC, CNN, DROPOUT, FEW, config, go, lines, make_small,
                      participants, refused, result, start)
from filelock import FileLock
from tiny import alike

import apfl
import files
import models
import run
from settings import AFTER_ROUNDS, CALIBRATION


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of FedIN that was never stopped, as (flags, lines, result)."""
    out, flags = tmp_path_factory.mktemp("whole"), [*CNN, "--rounds", "4", "--noise", "0.1"]
    return flags, go(out, *flags), result(out)


@pytest.fixture(scope="module")
def whole_apfl(tmp_path_factory):
    """A run of AP-FL that was never stopped, as (flags, lines, result)."""
    flags = ["--method", "apfl", *DROPOUT, *FEW, "--clients", "4", "--train-images", "120"]
    out = tmp_path_factory.mktemp("apfl")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return flags, go(out, *flags), result(out)


def resumed_is(whole, out) -> bool:
    flags, entries, final = whole
    return go(out, "--resume") == entries and result(out) == final


def checkpoint(out) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


# ---------------------------------------------------------------------------------- stop and resume

def test_killed_between_line_and_checkpoint_a_run_ends_as_if_never_stopped(tmp_path, whole, capsys):
    out = tmp_path / "out"
    process = start(out, *whole[0], killed_after_line=2)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint(out)["round"] == 1 and len(lines(out)) == 2
    with FileLock(out / files.LOCK):  # left by the killed process; only another owner matters
        for flags in (["--resume"], whole[0]):
            assert "in use by a run that" in refused(capsys, *flags, "--out", str(out))
    assert resumed_is(whole, out)


def test_a_checkpoint_that_cannot_be_renamed_stops_the_run_and_loses_nothing(
        tmp_path, whole, monkeypatch, capsys):
    rename, calls = os.replace, []

    def failing(source, target):
        calls.append(str(target))
        if sum(target.endswith("checkpoint.pt") for target in calls) == 3:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    out = tmp_path / "out"
    message = refused(capsys, *whole[0], "--out", str(out))
    assert "No space left" in message and f"--resume --out {out}" in message
    assert checkpoint(out)["round"] == 2
    assert len(lines(out)) == 3  # the line of round 3 came before its checkpoint
    monkeypatch.setattr(os, "replace", rename)
    assert resumed_is(whole, out)


def test_a_torn_last_line_is_dropped_and_rounds_may_grow(tmp_path, whole):
    flags, entries, final = whole
    go(tmp_path, *flags, "--rounds", "2")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "accuracy": 1}')  # without its line break
    assert go(tmp_path, "--resume", "--rounds", "4") == entries
    assert config(tmp_path)["rounds"] == 4
    assert go(tmp_path, "--resume") == entries  # nothing left to do
    assert result(tmp_path) == final


def test_a_grown_run_has_the_lines_of_one_that_was_as_long_from_the_start(tmp_path):
    flags = [*CNN, "--method", "local", "--eval-every", "2"]  # its clients' models are resumed too
    assert [entry["round"] for entry in go(tmp_path / "grown", *flags, "--rounds", "3")] == [2, 3]
    memory, settings = checkpoint(tmp_path / "grown")["memory"], config(tmp_path / "grown")
    assert memory.keys() == {k for t in (1, 2, 3) for k in participants(settings, t)}
    grown = go(tmp_path / "grown", "--resume", "--rounds", "4")
    assert grown == go(tmp_path / "long", *flags, "--rounds", "4")


@pytest.mark.parametrize("last", [1, 2])
def test_ctrl_c_between_checkpoints_saves_the_last_finished_round(last, tmp_path, whole,
                                                                  monkeypatch, capsys):
    def interrupted(path, entry, append=files.append_metrics):
        if entry["round"] == last + 1:
            raise KeyboardInterrupt
        append(path, entry)

    flags = [*whole[0], "--checkpoint-every", "4", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(files, "append_metrics", interrupted)
        assert "--resume" in refused(capsys, *flags, status=130)
    assert checkpoint(tmp_path)["round"] == last
    assert resumed_is(whole, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # Ctrl-C, and a cluster's
def test_a_signal_leaves_a_run_to_resume(number, tmp_path, whole):
    process = start(tmp_path / "out", *whole[0], "--checkpoint-every", "4")
    assert any("round 1 took" in line for line in process.stdout)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.count("\n") == 1 and "--resume" in error and "Traceback" not in error
    assert checkpoint(tmp_path / "out")["round"] >= 1 and resumed_is(whole, tmp_path / "out")


def test_stopped_in_the_stages_and_resumed_a_run_ends_as_if_never_stopped(tmp_path, whole_apfl,
                                                                          monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    def save_and_die(folder, progress, save=files.save_checkpoint):
        save(folder, progress)
        if "generator" in progress.stage_results:
            raise SystemExit  # no code of a run handles it

    with monkeypatch.context() as patch:
        patch.setattr(apfl, "train_generator", interrupted)
        assert "--resume" in refused(capsys, *whole_apfl[0], "--out", str(tmp_path), status=130)
    saved = checkpoint(tmp_path)
    assert saved["round"] == 2 and sorted(saved["stage_results"]) == ["late"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_checkpoint", save_and_die)
        with pytest.raises(SystemExit):
            run.main(["--resume", "--out", str(tmp_path)])
    assert sorted(checkpoint(tmp_path)["stage_results"]) == ["generator", "late"]
    assert not (tmp_path / "samples.png").exists()
    assert resumed_is(whole_apfl, tmp_path) and (tmp_path / "samples.png").exists()


def test_a_finished_apfl_run_may_grow_and_finished_twice_is_equal(tmp_path, whole_apfl):
    flags, entries, final = whole_apfl
    assert "friend_accuracy" in go(tmp_path, *flags, "--rounds", "1")[0]
    assert go(tmp_path, "--resume", "--rounds", "2") == entries and result(tmp_path) == final
    assert resumed_is(whole_apfl, tmp_path)


def bytes_in(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_command_with_resume_begins_resumes_and_tells_the_result(tmp_path, whole, capsys):
    flags, entries, final = whole
    out, repeated = tmp_path / "out", [*flags, "--resume"]
    assert start(out, *repeated, killed_after_line=2).wait() == -signal.SIGKILL
    assert go(out, *repeated) == entries and result(out) == final
    before = bytes_in(out)
    shown = capsys.readouterr().out
    assert "resuming after round 1" in shown and "no run in" not in shown
    for again in (repeated, ["--resume"], ["--resume", "--workers", "1"]):
        assert go(out, *again) == entries
        shown = capsys.readouterr().out
        assert f"the run in {out} is finished\naccuracy {final['accuracy']:.2f} %" in shown
    assert bytes_in(out) == before
    assert len(go(out, "--resume", "--rounds", "5")) == 5
    go(tmp_path / "new", *CNN, "--rounds", "1", "--resume")
    assert f"there is no run in {tmp_path / 'new'} yet: it begins" in capsys.readouterr().out


# A value of each of settings.AFTER_ROUNDS that is not AP-FL's default here
OTHER_STAGES = ("--beta 0.5 --beta-on friend --lambda 0.3 --semantics onehot --teacher clients "
                "--distance l2 --friend-labels local --noise-dim 3 --synthetic-per-class 5 "
                "--generator-steps 2 --generator-batch 3 --friend-epochs 2").split()


def test_a_run_may_start_after_the_rounds_of_one_with_other_stages(tmp_path, whole_apfl, capsys):
    flags, entries, _ = whole_apfl
    named = {flag.removeprefix("--").replace("-", "_") for flag in OTHER_STAGES[::2]}
    assert {*AFTER_ROUNDS} == named | {"finetune_epochs", "word_vectors", "friend", *CALIBRATION}
    go(tmp_path / "first", *flags)
    before = bytes_in(tmp_path / "first")
    alone = go(tmp_path / "alone", *flags, *OTHER_STAGES)
    assert alone[:-1] == entries[:-1] and alone[-1] != entries[-1]
    from_first = [*flags, *OTHER_STAGES, "--start-from", str(tmp_path / "first"), "--resume"]
    for _ in range(2):  # begun, and repeated
        assert go(tmp_path / "second", *from_first) == alone
    calibrated = ["--friend", "calibrated", "--start-from", str(tmp_path / "first")]
    start = flags.index(FEW[0])
    kept = [*flags[:start], *flags[start + len(FEW):]]  # but the generator's
    assert go(tmp_path / "third", *kept, *calibrated)[:-1] == entries[:-1]
    assert result(tmp_path / "second") == result(tmp_path / "alone")
    assert config(tmp_path / "second") == config(tmp_path / "alone")
    assert alike(checkpoint(tmp_path / "second"), checkpoint(tmp_path / "alone"))
    assert bytes_in(tmp_path / "first") == before

    # Other rounds, or a run that has not ended
    for other in (["--lr", "0.1"], ["--rounds", "3"], ["--train-images", "130"], ["--seed", "9"]):
        error = refused(capsys, *flags, *other, "--start-from", str(tmp_path / "first"), "--out",
                        str(tmp_path / "other"))
        assert other[0] in error and "its rounds are others" in error
        assert not (tmp_path / "other").exists()
    (tmp_path / "first" / "result.json").unlink()
    for out, words in (("first", "is not finished: finish it by python run.py --resume --out"),
                       ("nowhere", "to start from: check --start-from")):
        error = refused(capsys, *flags, "--start-from", str(tmp_path / out), "--out",
                        str(tmp_path / "other"))
        assert words in error and not (tmp_path / "other").exists()


@pytest.mark.parametrize("flags", [
    [*CNN, "--method", "feddf", "--distillation-steps", "0"], [*ASYNC, "--method", "fedavg"],
    [*CNN, "--ablate", "in", "prox"], [*CNN, "--partition", "pathological"]])
def test_flags_that_decide_about_others_do_so_on_resume_too(flags, tmp_path):
    go(tmp_path, *flags, "--rounds", "1")
    saved = checkpoint(tmp_path)
    saved["totals"]["seconds"] += 1000.0
    old_names = ("round", "server", "memory", "totals", "line", "after")
    torch.save(dict(zip(old_names, saved.values())), tmp_path / "checkpoint.pt")
    assert len(go(tmp_path, "--resume", "--rounds", "2")) == 2
    seconds = json.loads((tmp_path / "result.json").read_text())["seconds"]
    assert seconds > 1000  # the time before a stop counts


def test_resume_refuses_what_does_not_agree(tmp_path, capsys):
    folder, out = tmp_path / "out", ["--resume", "--out", str(tmp_path / "out")]
    assert "no run" in refused(capsys, *out)
    go(folder, *CNN, "--rounds", "2")
    before = lines(folder)
    capsys.readouterr()
    for flag, value in (("--lr", "0.5"), ("--method", "fedavg"), ("--classes-per-client", "2")):
        assert flag in refused(capsys, *out, flag, value)
    assert "only grow" in refused(capsys, *out, "--rounds", "1")
    assert "not empty" in refused(capsys, *CNN, "--out", str(folder))
    assert lines(folder) == before
    (folder / "metrics.jsonl").rename(tmp_path / "elsewhere")
    (folder / "result.json").unlink()
    assert "metrics.jsonl lacks lines" in refused(capsys, *out)
    (tmp_path / "elsewhere").rename(folder / "metrics.jsonl")
    assert go(folder, "--resume", "--lr", "0.0004", "--workers", "1") == before


def test_a_generator_that_diverges_stops_the_run(tmp_path, monkeypatch, capsys):
    plain = apfl.train_generator
    monkeypatch.setattr(apfl, "train_generator", lambda *a, **o: plain(*a, **o, lr=1e30))
    error = refused(capsys, *APFL, "--rounds", "1", "--out", str(tmp_path), status=1)
    assert "finite" in error and "checkpoint" in error


@pytest.mark.parametrize("lr", [1e6, 1e39])  # at 1e39 the loss of the one step is finite still
def test_a_run_that_diverges_later_keeps_its_last_good_checkpoint(tmp_path, capsys, lr,
                                                                  monkeypatch):
    monkeypatch.setattr(run, "LARGEST", lr)
    flags = [*CNN, "--optimizer", "sgd", "--batch-size", "24" if lr > 1e38 else "12"]
    go(tmp_path, *flags, "--rounds", "1")
    (tmp_path / "config.json").write_text(json.dumps(config(tmp_path) | {"lr": lr}))
    capsys.readouterr()
    message = refused(capsys, "--resume", "--rounds", "3", "--out", str(tmp_path), status=1)
    assert any(f"round 2, client {k}:" in message for k in participants(config(tmp_path), 2))
    saved = checkpoint(tmp_path)
    assert saved["round"] == 1 == len(lines(tmp_path))
    assert all(tensor.isfinite().all() for tensor in models.tensors_in(saved))


# --------------------------------------------------------------------------------- from lines alone

def test_the_summary_is_of_the_models_in_use_in_rounds_and_of_the_last_ten_lines():
    history = [{"round": t, "accuracy": float(t), "seconds": 9.0} for t in range(1, 13)]
    history[-1] |= {"accuracy": 80.0, "global_accuracy": 3.5}
    final = files.summarise(history, {"training_seconds": 4.0, "samples": 10, "seconds": 5.0})
    assert (final["accuracy"], final["best_accuracy"], final["best_round"]) == (80, 11, 11)
    assert final["last10_accuracy"] == pytest.approx((sum(range(3, 12)) + 3.5) / 10)
    assert (final["rounds"], final["images_per_second"], final["seconds"]) == (12, 2.5, 5.0)
    assert "training_seconds" not in final and "round" not in final


def test_a_torn_line_is_no_line_even_where_its_break_alone_is_missing(tmp_path):
    path, settings = tmp_path / "metrics.jsonl", {"eval_every": 1, "rounds": 3}
    progress = files.Progress(2, {}, {}, {}, {"round": 2, "a": 1}, {})
    path.write_text('{"round": 1}\n{"round": 2, "a": 7}\n{"round": 3}')
    assert files.metrics_so_far(tmp_path, progress, settings) == [{"round": 1},
                                                                  {"round": 2, "a": 1}]
    assert path.read_text() == '{"round": 1}\n{"round": 2, "a": 1}\n'
    path.write_text('{"round": 1}\n{"round": 2}')
    with pytest.raises(ValueError, match="lacks lines"):
        files.metrics_so_far(tmp_path, progress, settings)


def test_a_loss_is_absurd_once():
    losses = [2.0, 3.0, 2.1e6, 5e6, 1.0, 1e9]
    absurd = [files.loss_is_absurd([{"loss": loss} for loss in losses[:n]]) for n in range(1, 7)]
    assert absurd == [False, False, True, False, False, True]
