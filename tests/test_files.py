"""What a run leaves in its folder: stopped, killed, grown and damaged runs, through main."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import apfl
import files
import models
import run
from commands import (APFL, ASYNC, CNN, DROPOUT, FEW, config, go, lines, make_small,
                      participants, refused, result, start)


# ---------------------------------------------------------------------------- stop and resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, as (flags, lines, result)."""
    out, flags = tmp_path_factory.mktemp("whole"), [*CNN, "--rounds", "4", "--noise", "0.1"]
    return flags, go(out, *flags), result(out)


def resumed_is(whole, out: Path) -> bool:
    flags, entries, final = whole
    return go(out, "--resume") == entries and result(out) == final


def test_killed_between_line_and_checkpoint_a_run_ends_as_if_never_stopped(tmp_path, whole):
    process = start(tmp_path / "out", *whole[0], killed_after_line=2)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["round"] == 1
    assert len(lines(tmp_path / "out")) == 2
    assert resumed_is(whole, tmp_path / "out")


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
    assert torch.load(out / "checkpoint.pt", weights_only=True)["round"] == 2
    assert len(lines(out)) == 3  # the line of round 3 came before its checkpoint
    monkeypatch.undo()
    assert resumed_is(whole, out)


def test_a_torn_last_line_is_dropped_and_rounds_may_grow(tmp_path, whole):
    flags, entries, final = whole
    go(tmp_path, *flags, "--rounds", "2")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "accuracy": 1}')  # all but its line break
    assert go(tmp_path, "--resume", "--rounds", "4") == entries
    assert json.loads((tmp_path / "config.json").read_text())["rounds"] == 4
    assert go(tmp_path, "--resume") == entries  # nothing left to do
    assert result(tmp_path) == final


def test_a_grown_run_has_the_lines_of_one_that_was_as_long_from_the_start(tmp_path):
    flags = [*CNN, "--eval-every", "2"]
    assert [entry["round"] for entry in go(tmp_path / "grown", *flags, "--rounds", "3")] == [2, 3]
    grown = go(tmp_path / "grown", "--resume", "--rounds", "4")
    assert grown == go(tmp_path / "long", *flags, "--rounds", "4")


def test_ctrl_c_between_checkpoints_saves_the_last_finished_round(tmp_path, monkeypatch, capsys):
    flags = [*CNN, "--rounds", "3", "--checkpoint-every", "3"]
    entries = go(tmp_path / "whole", *flags)
    capsys.readouterr()
    append = files.append_metrics

    for last in (1, 2):
        def interrupted(path, entry):
            if entry["round"] == last + 1:
                raise KeyboardInterrupt
            append(path, entry)

        out = tmp_path / f"until {last}"
        monkeypatch.setattr(files, "append_metrics", interrupted)
        assert "--resume" in refused(capsys, *flags, "--out", str(out), status=130)
        monkeypatch.undo()
        assert torch.load(out / "checkpoint.pt", weights_only=True)["round"] == last
        assert go(out, "--resume") == entries


def test_local_resumes_with_its_clients_models(tmp_path):
    flags = [*CNN, "--method", "local"]
    entries = go(tmp_path / "whole", *flags, "--rounds", "3")
    go(tmp_path / "parts", *flags, "--rounds", "2")
    memory = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["memory"]
    settings = config(tmp_path / "parts")
    assert memory.keys() == {k for t in (1, 2) for k in participants(settings, t)}
    assert go(tmp_path / "parts", "--resume", "--rounds", "3") == entries


def test_ctrl_c_leaves_a_run_to_resume(tmp_path, whole):
    process = start(tmp_path / "out", *whole[0])
    assert any("round 1 took" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.count("\n") == 1 and "--resume" in error and "Traceback" not in error
    assert resumed_is(whole, tmp_path / "out")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def whole_apfl(tmp_path_factory):
    """An AP-FL run that was never stopped: its flags, metrics and result."""
    flags = ["--method", "apfl", *DROPOUT, *FEW, "--clients", "4", "--train-images", "120"]
    out = tmp_path_factory.mktemp("apfl") / "out"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return flags, go(out, *flags), result(out)


class Killed(BaseException):
    """What no code of a run handles."""


def test_killed_in_every_stage_and_resumed_a_run_ends_as_if_never_stopped(tmp_path, whole_apfl,
                                                                          monkeypatch):
    save, stages, out = files.save_checkpoint, ["late", "generator", "friends"], tmp_path / "out"
    flags = [*whole_apfl[0], "--out", str(out)]
    for number, stage in enumerate(stages[:2], start=1):
        def save_and_die(folder, progress):
            save(folder, progress)
            if stage in progress.after:
                raise Killed

        monkeypatch.setattr(files, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            run.main(flags)
        saved = torch.load(out / "checkpoint.pt", weights_only=True)
        assert sorted(saved["after"]) == sorted(stages[:number])
        flags = ["--resume", "--out", str(out)]
    monkeypatch.setattr(files, "save_checkpoint", save)
    assert not (out / "samples.png").exists()  # it was killed before it could draw them
    assert resumed_is(whole_apfl, out) and (out / "samples.png").exists()


def test_ctrl_c_in_the_generator_stage_keeps_the_stages_before(tmp_path, whole_apfl, monkeypatch,
                                                               capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(apfl, "train_generator", interrupted)
    out = tmp_path / "out"
    assert "--resume" in refused(capsys, *whole_apfl[0], "--out", str(out), status=130)
    monkeypatch.undo()
    make_small(monkeypatch)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["round"] == 2 and sorted(saved["after"]) == ["late"]
    assert resumed_is(whole_apfl, out)


def test_a_finished_apfl_run_may_grow_and_finished_twice_is_the_same(tmp_path, whole_apfl):
    flags, entries, final = whole_apfl
    out = tmp_path / "grown"
    go(out, *flags, "--rounds", "1")
    assert "friend_accuracy" in lines(out)[0]
    assert go(out, "--resume", "--rounds", "2") == entries and result(out) == final
    assert go(out, "--resume") == entries and result(out) == final


def test_a_generator_that_diverges_stops_the_run(tmp_path, monkeypatch, capsys):
    plain = apfl.train_generator
    monkeypatch.setattr(apfl, "train_generator", lambda *a, **o: plain(*a, **o, lr=1e30))
    out = ["--out", str(tmp_path)]
    assert "generator" in refused(capsys, *APFL, "--rounds", "1", *out, status=1)


def test_resume_refuses_what_does_not_agree(tmp_path, capsys):
    out = ["--resume", "--out", str(tmp_path / "out")]
    assert "no run" in refused(capsys, *out)
    go(tmp_path / "out", *CNN, "--rounds", "2")
    before = lines(tmp_path / "out")
    capsys.readouterr()
    assert "--lr" in refused(capsys, *out, "--lr", "0.5")
    assert "--method" in refused(capsys, *out, "--method", "fedavg")
    assert "--classes-per-client" in refused(capsys, *out, "--classes-per-client", "2")
    assert "only grow" in refused(capsys, *out, "--rounds", "1")
    assert "not empty" in refused(capsys, *CNN, "--out", str(tmp_path / "out"))
    assert lines(tmp_path / "out") == before
    (tmp_path / "out" / "metrics.jsonl").rename(tmp_path / "elsewhere")
    assert "metrics.jsonl lacks lines" in refused(capsys, *out)
    (tmp_path / "elsewhere").rename(tmp_path / "out" / "metrics.jsonl")
    assert go(tmp_path / "out", "--resume", "--lr", "0.0004", "--workers", "1") == before
    capsys.readouterr()
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"PK\x03\x04 nonsense")
    assert "damaged" in refused(capsys, *out)
    for text in ("{", '{"method": "fedin", "rounds": 3}', '{"method": []}'):
        (tmp_path / "out" / "config.json").write_text(text)
        assert "config.json is damaged" in refused(capsys, *out)


@pytest.mark.parametrize("lr", [1e6, 1e39])  # at 1e39 the loss of the one step is finite still
def test_a_run_that_diverges_later_keeps_its_last_good_checkpoint(tmp_path, capsys, lr):
    flags = [*CNN, "--optimizer", "sgd", "--batch-size", "24" if lr > 1e38 else "12"]
    go(tmp_path, *flags, "--rounds", "1")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"lr": lr}))
    capsys.readouterr()
    out = ["--out", str(tmp_path)]
    assert "round 2, client" in refused(capsys, "--resume", "--rounds", "3", *out, status=1)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["round"] == 1 == len(lines(tmp_path))
    assert all(tensor.isfinite().all() for tensor in models.tensors_in(saved))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_round_and_client(tmp_path, capsys):
    flags = [*CNN, "--optimizer", "sgd", "--rounds", "3"]
    out = ["--out", str(tmp_path / "out")]
    message = refused(capsys, *flags, *out, "--lr", "1e6", status=1)
    first = participants({"seed": 0, "clients": 5, "participation": 0.6}, 1)[0]
    assert f"round 1, client {first}:" in message
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


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
    path.write_text('{"round": 1}\n{"round": 2}\n{"round": 3}')
    assert files.trim_metrics(path, 2, settings) == [{"round": 1}, {"round": 2}]
    assert path.read_text() == '{"round": 1}\n{"round": 2}\n'
    path.write_text('{"round": 1}\n{"round": 2}')
    with pytest.raises(ValueError, match="lacks lines"):
        files.trim_metrics(path, 2, settings)


def test_the_time_before_a_stop_counts(tmp_path):
    go(tmp_path, *CNN, "--rounds", "1")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    saved["totals"]["seconds"] += 1000.0
    torch.save(saved, tmp_path / "checkpoint.pt")
    go(tmp_path, "--resume", "--rounds", "2")
    assert json.loads((tmp_path / "result.json").read_text())["seconds"] > 1000


@pytest.mark.parametrize("flags", [
    [*CNN, "--method", "feddf", "--distillation-steps", "0"], [*ASYNC, "--method", "fedavg"],
    [*CNN, "--ablate", "in", "prox"], [*CNN, "--partition", "pathological"]])
def test_flags_that_decide_about_others_do_so_on_resume_too(flags, tmp_path):
    go(tmp_path, *flags, "--rounds", "1")
    assert len(go(tmp_path, "--resume", "--rounds", "2")) == 2
