"""A run's folder: its owner, its data, wrong or foreign files in it, and how runs end."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from commands import (APFL, CNN, RESNET10, ROOT, config, few_digits, go, lines, make_small,
                      refused)

import files
import run

FEDAVG = [*CNN, "--method", "fedavg"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def copy_of_digits(folder: Path, name: str = "mine.npz") -> Path:
    return Path(shutil.copy(few_digits(), folder / name))


def on(dataset: Path, *flags: str) -> list[str]:
    """FEDAVG's flags on another data set."""
    return ["--dataset", str(dataset), *FEDAVG[2:], *flags]


# ---------------------------------------------------------------------------------------- ownership

def test_a_folder_with_nothing_but_hidden_and_half_written_files_is_empty(tmp_path, capsys):
    for name in (".DS_Store", "._run", "checkpoint.pt.0123456789ab.tmp", "error.log"):
        (tmp_path / name).touch()
    files.claim(tmp_path, resume=False)
    files.release()
    assert names(tmp_path) == {".DS_Store", "._run", "error.log"}
    out = tmp_path / "my runs"
    out.mkdir()
    for name in ("notes.txt", "report.tmp", "checkpoint.pt.0123456789ab.tmp"):
        (out / name).touch()
    before, error = names(out), refused(capsys, *FEDAVG, "--out", str(out))
    assert f"is not empty: resume its run with --resume --out '{out}'" in error
    assert names(out) == before
    assert "is a file" in refused(capsys, *FEDAVG, "--out", str(out / "notes.txt"))


def test_a_folder_is_locked_first_and_goes_if_nothing_is_in_it(tmp_path, monkeypatch):
    out = tmp_path / "a" / "b"
    files.claim(out, resume=False)
    files.release()
    assert names(tmp_path) == set()

    def acquire(lock, acquire=filelock.FileLock.acquire):
        acquire(lock)
        (out / "config.json").touch()  # by a run that has just ended

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(ValueError, match="is not empty"):
        files.claim(out, resume=False)
    files.release()
    assert names(out) == {"config.json"}


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError("flock"),
                                   PermissionError(13, "Permission denied")])
def test_a_folder_that_cannot_be_locked_is_an_error_that_says_what_to_do(error, tmp_path,
                                                                         monkeypatch):
    def acquire(lock):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(ValueError, match="cannot be locked .*choose an --out where you may write"):
        files.claim(tmp_path, resume=False)


# ------------------------------------------------------------------------ moved, other, wrong files

def test_a_run_is_resumed_where_its_data_have_moved(tmp_path, capsys, monkeypatch):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    copy_of_digits(Path())
    go(Path("run"), *on(Path("mine.npz")), "--rounds", "1")
    whole = go(Path("whole"), *on(Path("mine.npz")), "--rounds", "2")
    monkeypatch.chdir(tmp_path / "there")
    shutil.move("../here/mine.npz", "moved.NPZ")
    resume = ["--resume", "--rounds", "2"]
    error = refused(capsys, *resume, "--out", "../here/run")
    assert "reads mine.npz" in error and "--dataset" in error
    assert go(Path("../here/run"), *resume, "--dataset", "moved.NPZ")[-1:] == whole[-1:]
    assert config(Path("../here/run"))["dataset"] == "moved.NPZ"


def test_other_data_behind_an_equal_name_are_noticed(tmp_path, capsys):
    path, out = copy_of_digits(tmp_path), tmp_path / "run"
    go(out, *on(path), "--rounds", "1")
    before = (out / "metrics.jsonl").read_bytes()
    arrays = dict(np.load(path))
    pixel = (np.arange(arrays["x_train"].size) == 7).reshape(arrays["x_train"].shape)
    changes = {"a pixel": {"x_train": arrays["x_train"] ^ pixel},
               "labels": {"y_test": arrays["y_test"][::-1]},
               "a name": {"classes": np.array([*"abcdefghij"])},
               "colour": {name: np.repeat(arrays[name].reshape(*arrays[name].shape[:3], 1), 3, 3)
                          for name in ("x_train", "x_test")}}
    for name, change in changes.items():
        np.savez(path, **{"classes": np.arange(10), **arrays, **change})
        error = refused(capsys, "--resume", "--rounds", "2", "--out", str(out))
        assert "is not what this run began with" in error, name
    assert (out / "metrics.jsonl").read_bytes() == before
    np.savez(path, **arrays)
    go(out, "--resume", "--rounds", "2")


def test_other_embeddings_or_proxy_images_are_noticed(tmp_path, capsys, monkeypatch):
    make_small(monkeypatch)
    path, out = tmp_path / "embeddings.npz", tmp_path / "apfl"
    table = np.random.default_rng(0).normal(size=(10, 3))
    np.savez(path, classes=np.array([*"0123456789"], dtype="S1"), embeddings=table)  # bytes
    flags = [flag for flag in APFL if flag not in ("--semantics", "segments")]
    go(out, *flags, "--semantics", str(path), "--rounds", "1")
    np.savez(path, classes=np.array([*"0123456789"]), embeddings=table[::-1])
    error = refused(capsys, "--resume", "--rounds", "2", "--semantics", str(path), "--out",
                    str(out))
    assert "--semantics" in error and "is not what this run began with" in error
    images, out = copy_of_digits(tmp_path), tmp_path / "feddf"
    go(out, *CNN, "--method", "feddf", "--distillation-steps", "1", "--proxy", str(images),
       "--rounds", "1")
    arrays = dict(np.load(images))
    np.savez(images, **arrays | {"x_train": arrays["x_train"][:, ::-1]})
    error = refused(capsys, "--resume", "--rounds", "2", "--out", str(out))
    assert f"--proxy {images} is not what" in error


def test_a_checkpoint_that_is_damaged_or_of_another_run_is_refused(tmp_path, capsys):
    go(tmp_path / "a", *FEDAVG, "--rounds", "1")
    go(tmp_path / "b", *RESNET10, "--method", "fedavg", "--rounds", "1")
    path = tmp_path / "a" / "checkpoint.pt"
    good, saved = path.read_bytes(), torch.load(path, weights_only=True)
    weights = saved["server"]["weights"]["cnn"]
    cut = {name: tensor[:1] for name, tensor in weights.items()}
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4  # in the middle of a weight; torch.load does not notice it
    cases = [((tmp_path / "b/checkpoint.pt").read_bytes(), "of another run"),
             (flipped, "is damaged"), (b"PK\x03\x04 nonsense", "is damaged"), (b"", "is damaged")]
    for change in ({"server": {"weights": {"cnn": cut}}}, {"server": 1}, {"round": "1"},
                   {"round": 99}, {"memory": {"x": 1}}, {"totals": {"samples": "x"}}, {"more": 1}):
        torch.save(saved | change, path)
        cases.append((path.read_bytes(), "damaged"))
    for content, words in cases:
        path.write_bytes(content)
        error = refused(capsys, "--resume", "--rounds", "2", "--out", str(tmp_path / "a"))
        assert "checkpoint.pt" in error and words in error and "move it away" in error


def test_a_setting_that_cannot_be_is_noticed(tmp_path, capsys):
    go(tmp_path, *FEDAVG, "--rounds", "1")
    wrong = [("rounds", "3"), ("rounds", 0), ("lr", "fast"), ("lr", None), ("seed", 1.5),
             ("clients", True), ("model", "vgg"), ("method", 3), ("aggregation", ["layerwise"]),
             ("partition", "random")]
    texts = [json.dumps(config(tmp_path) | {name: value}) for name, value in wrong]
    for text in (*texts, "{", "[]", '{"method": "fedin", "rounds": 3}', '{"method": []}'):
        (tmp_path / "config.json").write_text(text)
        assert "config.json is damaged" in refused(capsys, "--resume", "--out", str(tmp_path)), text


# --------------------------------------------------------------------------------- output and ends

def test_a_display_that_ends_early_does_not_end_a_run(tmp_path):
    command = [sys.executable, "run.py", *FEDAVG, "--rounds", "3", "--out", str(tmp_path / "run")]
    done = subprocess.run(f"set -o pipefail; {' '.join(command)} 2>&- | head -n 1", shell=True,
                          executable="/bin/bash", cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert "result.json" in names(tmp_path / "run") and len(lines(tmp_path / "run")) == 3


def test_an_unforeseen_error_in_a_client_is_one_line_and_a_log(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, usual = Path("run"), run.METHODS["fedavg"]
    go(out, *FEDAVG, "--rounds", "1")
    kept = (out / "checkpoint.pt").read_bytes()
    for error, words in ((RuntimeError("CPU: can't allocate memory: 9 bytes"), "fewer --workers"),
                         (KeyError("w"), "KeyError: 'w'; details are in run/error.log"),
                         (RuntimeError("long " * 1000), "RuntimeError: long long")):
        def client_update(*args, error=error, **kwargs):
            raise error

        monkeypatch.setitem(run.METHODS, "fedavg", usual._replace(client_update=client_update))
        capsys.readouterr()
        message = refused(capsys, "--resume", "--rounds", "2", "--out", "run", status=3)
        assert "round 2, client " in message and words in message and len(message) <= 301
        assert message.endswith("run/error.log, beside the last checkpoint\n")
        log = (out / "error.log").read_text()
        assert "Traceback" in log and "client_update" in log
        assert (out / "checkpoint.pt").read_bytes() == kept


def test_a_gpu_that_is_too_small_is_one_line_with_a_remedy(tmp_path, capsys, monkeypatch):
    def client_update(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    usual = run.METHODS["fedavg"]
    monkeypatch.setitem(run.METHODS, "fedavg", usual._replace(client_update=client_update))
    message = refused(capsys, *FEDAVG, "--out", str(tmp_path / "run"))
    out = tmp_path / "run"
    assert "the GPU's memory is full: start a new run with a smaller --batch-size" in message
    assert message.endswith(f"or resume with: python run.py --resume --out {out} --workers 1\n")
    assert not (out / "error.log").exists()


def test_a_loss_that_is_finite_but_absurd_is_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "loss_is_absurd", lambda history: history[-1]["round"] == 2)
    go(tmp_path, *FEDAVG, "--rounds", "3")
    shown = capsys.readouterr()
    assert shown.out.count("warning: ") == 1 and "warning: round 2: the loss is" in shown.out
    assert shown.err == ""


def test_a_long_message_is_cut_to_a_line_that_keeps_its_end():
    line = files.one_line("a\n" * 1500 + "b" * 100 + ": check its path")
    assert len(line) == 300 and line.startswith("a a") and line.endswith("bb: check its path")


def test_optimised_python_without_docstrings_helps_too(capsys):
    module = types.ModuleType("run_without_docstrings")
    exec(compile((ROOT / "run.py").read_text(), "run.py", "exec", optimize=2), vars(module))
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert "--seed" in capsys.readouterr().out
