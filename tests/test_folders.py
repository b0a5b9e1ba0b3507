"""A run's folder: whose it is, what it holds, and what happens when something is wrong with it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import APFL, CNN, RESNET10, ROOT, config, go, lines, make_small, refused, start
from tiny import few_digits

import baselines
import data
import fedin
import files
import models
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

def test_a_folder_belongs_to_one_process_as_long_as_it_lives(tmp_path, capsys):
    out = tmp_path / "run"
    first = start(out, *FEDAVG, "--rounds", "500")
    while not (out / "metrics.jsonl").exists():
        assert first.poll() is None
    for flags in (["--resume"], [*FEDAVG, "--rounds", "1"]):
        assert "in use by a run that is still going" in refused(capsys, *flags, "--out", str(out))
    first.kill()
    first.communicate()
    assert (out / files.LOCK).exists()  # which means nothing
    done = len(lines(out))
    assert files.read_config(out)["rounds"] == 500 and done < 500
    files.take(out, resume=True)  # nobody else has it any more
    files.leave()


def test_of_two_new_runs_with_one_folder_one_is_refused(tmp_path):
    both = [start(tmp_path / "run", *FEDAVG, "--rounds", "10") for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    (error,) = filter(None, errors)
    assert error.count("\n") == 1 and "choose another --out" in error
    assert [entry["round"] for entry in lines(tmp_path / "run")] == list(range(1, 11))


def test_a_folder_with_nothing_but_files_of_the_system_is_empty(tmp_path, capsys):
    for name in (".DS_Store", "._run", "Thumbs.db", "checkpoint.pt.0123456789ab.tmp", "error.log"):
        (tmp_path / name).touch()
    go(tmp_path, *FEDAVG, "--rounds", "1")
    assert not list(tmp_path.glob("*.tmp")) and (tmp_path / ".DS_Store").exists()
    (tmp_path / "other").mkdir()
    for name in ("notes.txt", "report.tmp"):
        (tmp_path / "other" / name).touch()
    error = refused(capsys, *FEDAVG, "--out", str(tmp_path / "other"))
    assert "is not empty" in error and names(tmp_path / "other") == {"notes.txt", "report.tmp"}


def test_a_folder_with_spaces_is_quoted_in_the_command_to_type(tmp_path, capsys):
    out = tmp_path / "my runs"
    go(out, *FEDAVG, "--rounds", "1")
    capsys.readouterr()
    assert f"--resume --out '{out}'" in refused(capsys, *FEDAVG, "--out", str(out))


# ---------------------------------------------------------------------------------- temporary files

def test_processes_that_write_one_cache_at_once_do_not_disturb_each_other(tmp_path):
    program = f"""
import sys, pathlib, torch
sys.path.insert(0, {str(ROOT)!r})
import data
whole, path = data.load({few_digits()!r}), pathlib.Path("cache.npz")
for _ in range(30):
    data.write_npz(path, whole)
    assert torch.equal(data.read_npz(path).x_train, whole.x_train)
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path,
                                  stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[1] for process in processes] == ["", "", ""]
    assert names(tmp_path) == {"cache.npz"}


def test_what_cannot_be_written_leaves_no_temporary_file(tmp_path):
    def break_off(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        data.write_atomically(tmp_path / "a", break_off)
    assert names(tmp_path) == set()


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, capsys):
    whole = data.load(few_digits())
    monkeypatch.setattr(data, "download", lambda dataset, data_dir: whole)
    with tempfile.TemporaryDirectory() as folder:
        originals = Path(folder) / "originals"
        originals.mkdir()
        originals.chmod(0o555)
        os.chmod(folder, 0o755)
        user = os.geteuid()
        if user == 0:  # for whom no folder is read-only
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError):
                (originals / "a").touch()
            assert data.load("cifar10", originals) == whole
        finally:
            os.seteuid(user)
        assert names(originals) == set() and "could not be written" in capsys.readouterr().out


# ------------------------------------------------------------------------------ paths and same data

def test_a_run_goes_on_where_its_data_have_moved(tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    copy_of_digits(Path())
    go(Path("run"), *on(Path("mine.npz")), "--rounds", "1")
    whole = go(Path("whole"), *on(Path("mine.npz")), "--rounds", "2")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    shutil.move("../here/mine.npz", "moved.NPZ")
    error = refused(capsys, "--resume", "--rounds", "2", "--out", "../here/run")
    assert "reads mine.npz" in error and "say by --dataset where it is" in error
    assert go(Path("../here/run"), "--resume", "--rounds", "2", "--dataset", "moved.NPZ")[-1:] == (
        whole[-1:])
    assert config(Path("../here/run"))["dataset"] == "moved.NPZ"


def test_other_data_behind_the_same_name_are_noticed(tmp_path, capsys):
    path, out = copy_of_digits(tmp_path), tmp_path / "run"
    go(out, *on(path), "--rounds", "1")
    before = (out / "metrics.jsonl").read_bytes()
    arrays = dict(np.load(path))
    changes = {"a pixel": {"x_train": arrays["x_train"] ^ (np.arange(arrays["x_train"].size) == 7
                                                          ).reshape(arrays["x_train"].shape)},
               "labels": {"y_test": arrays["y_test"][::-1]},
               "a name": {"classes": np.array([*"abcdefghij"])},
               "colour": {name: np.repeat(arrays[name].reshape(*arrays[name].shape[:3], 1), 3, 3)
                          for name in ("x_train", "x_test")},
               "fewer classes": {f"y_{part}": arrays[f"y_{part}"] % 7 for part in ("train", "test")}
               | {"classes": np.arange(7)}}
    for what, change in changes.items():
        np.savez(path, **{"classes": np.arange(10), **arrays, **change})
        error = refused(capsys, "--resume", "--rounds", "2", "--out", str(out))
        assert "is not what this run began with" in error, what
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
    error = refused(capsys, "--resume", "--rounds", "2", "--out", str(out))
    assert "--semantics" in error and "is not what this run began with" in error
    images, out = copy_of_digits(tmp_path), tmp_path / "feddf"
    go(out, *CNN, "--method", "feddf", "--distillation-steps", "1", "--proxy", str(images),
       "--rounds", "1")
    arrays = dict(np.load(images))
    np.savez(images, **arrays | {"x_train": arrays["x_train"][:, ::-1]})
    error = refused(capsys, "--resume", "--rounds", "2", "--out", str(out))
    assert f"--proxy {images} is not what" in error


def test_a_checkpoint_of_another_run_is_refused(tmp_path, capsys):
    go(tmp_path / "a", *FEDAVG, "--rounds", "1")
    go(tmp_path / "b", *RESNET10, "--method", "fedavg", "--rounds", "1")
    good = (tmp_path / "a" / "checkpoint.pt").read_bytes()
    saved = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    weights = saved["server"]["weights"]["cnn"]
    cut = {name: tensor[:1] for name, tensor in weights.items()}
    (tmp_path / "a" / "checkpoint.pt").write_bytes((tmp_path / "b/checkpoint.pt").read_bytes())
    assert "of another run" in refused(capsys, "--resume", "--rounds", "2", "--out",
                                       str(tmp_path / "a"))
    for change in ({"server": {"weights": {"cnn": cut}}}, {"server": 1}, {"round": "1"},
                   {"round": 99}, {"memory": {"x": 1}}, {"totals": {"samples": "x"}}):
        torch.save(saved | change, tmp_path / "a" / "checkpoint.pt")
        error = refused(capsys, "--resume", "--rounds", "2", "--out", str(tmp_path / "a"))
        assert "checkpoint.pt" in error and "move it away" in error
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4  # in the middle of a weight, which torch.load does not notice
    (tmp_path / "a" / "checkpoint.pt").write_bytes(flipped)
    assert "is damaged" in refused(capsys, "--resume", "--rounds", "2", "--out",
                                   str(tmp_path / "a"))


@pytest.mark.parametrize("name, value", [
    ("rounds", "3"), ("rounds", 0), ("lr", "fast"), ("lr", None), ("seed", 1.5), ("clients", True),
    ("model", "vgg"), ("method", 3), ("aggregation", ["layerwise"]), ("partition", "random")])
def test_a_setting_that_cannot_be_is_noticed(name, value, tmp_path, capsys):
    go(tmp_path, *FEDAVG, "--rounds", "1")
    written = config(tmp_path) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(written))
    error = refused(capsys, "--resume", "--out", str(tmp_path))
    assert "config.json is damaged or lacks settings" in error


# ----------------------------------------------------------------------------- the trained networks

def right(net: torch.nn.Module) -> float:
    """Accuracy on the test images, percent."""
    whole = data.load(few_digits())
    return 100 * float((net(whole.x_test).argmax(1) == whole.y_test).double().mean())


@pytest.mark.parametrize("flags", [
    [*FEDAVG, "--rounds", "2"], [*RESNET10, "--method", "fedin", "--rounds", "2"],
    [*CNN, "--method", "local", "--participation", "1", "--rounds", "1"],
    [*CNN, "--method", "heterofl", "--model", "resnet18-widths", "--rounds", "1"]])
def test_the_trained_networks_are_those_that_were_evaluated(flags, tmp_path):
    last = go(tmp_path, *flags, "--lr", "1e-3")[-1]
    nets = [files.trained_network(tmp_path, client=k) for k in range(5)]
    assert np.mean([right(net) for net in nets]) == pytest.approx(last["accuracy"])
    assert nets[0].classes == [str(digit) for digit in range(10)]
    if "full_accuracy" in last:
        assert right(files.trained_network(tmp_path)) == pytest.approx(last["full_accuracy"])
        assert right(files.trained_network(tmp_path, "resnet18-1/4")) == right(nets[2])


def test_of_apfl_a_client_has_its_personalised_network(tmp_path, monkeypatch):
    make_small(monkeypatch)
    last = go(tmp_path, *APFL, "--rounds", "1")[-1]
    nets = [files.trained_network(tmp_path, client=k) for k in range(3)]
    assert np.mean([right(net) for net in nets]) == pytest.approx(last["personalised_accuracy"])
    assert right(files.trained_network(tmp_path)) == pytest.approx(last["global_accuracy"])


def test_a_network_that_there_is_not_is_an_error(tmp_path):
    go(tmp_path / "local", *CNN, "--method", "local", "--rounds", "1")
    for folder, choice, word in ((tmp_path / "local", {}, "of clients alone"),
                                 (tmp_path / "local", {"client": 5}, "one of 5 clients"),
                                 (tmp_path / "nowhere", {}, "no run")):
        with pytest.raises(ValueError, match=word):
            files.trained_network(folder, **choice)
    go(tmp_path / "fedavg", *FEDAVG, "--rounds", "1")
    with pytest.raises(ValueError, match="choose one of cnn"):
        files.trained_network(tmp_path / "fedavg", "resnet10")
    (tmp_path / "fedavg" / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="is not at its end"):
        files.trained_network(tmp_path / "fedavg")


# ------------------------------------------------------------------------------------------ buffers

def test_a_servers_step_moves_parameters_and_averages_buffers():
    old = {"w": torch.tensor([1.0]), "bn.running_var": torch.tensor([1.0]),
           "bn.num_batches_tracked": torch.tensor(0)}
    mean = {"w": torch.tensor([2.0]), "bn.running_var": torch.tensor([0.25]),
            "bn.num_batches_tracked": torch.tensor(4)}
    stepped = models.server_step(old, mean, 2.0)
    assert (float(stepped["w"]), float(stepped["bn.running_var"])) == (3.0, 0.25)
    assert int(stepped["bn.num_batches_tracked"]) == 4
    assert models.server_step(old, mean, 1) is mean


def test_scaffold_with_a_long_step_keeps_variances_positive():
    weights = {"net": {"w": torch.ones(2), "bn.running_var": torch.ones(2)}}
    server = {"weights": weights, "variates": {"net": {"w": torch.zeros(2)}}}
    sent = {"w": torch.full((2,), 3.0), "bn.running_var": torch.full((2,), 0.1)}
    update = baselines.ScaffoldUpdate(sent, 5, {"w": torch.zeros(2)})
    owners = {0: baselines.Client(0, torch.arange(5), "net")}
    new = baselines.scaffold_server_update(server, {0: update}, owners=owners, server_lr=2.0)
    assert torch.equal(new["weights"]["net"]["w"], torch.full((2,), 5.0))
    assert torch.equal(new["weights"]["net"]["bn.running_var"], torch.full((2,), 0.1))


# ---------------------------------------------------------------------------------- output and ends

def shell(command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command.replace("python", sys.executable), shell=True, cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, **env}, executable="/bin/bash")


@pytest.mark.parametrize("ending", ["| head -n 1", ">&-", "> /dev/full", "2>&- | head -n 1"])
def test_a_display_that_ends_early_does_not_end_a_run(ending, tmp_path):
    command = " ".join(["python run.py", *FEDAVG, "--rounds 3 --out", str(tmp_path / "run")])
    done = shell(f"set -o pipefail; {command} {ending}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "result.json" in names(tmp_path / "run")


def test_a_name_that_the_terminal_cannot_show_is_replaced(tmp_path):
    path = copy_of_digits(tmp_path)
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"classes": np.array(["0", "Äpfel\nund 梨", *"23456789"])})
    done = shell(" ".join(["python run.py", *on(path), "--rounds 1 --out", str(tmp_path / "run")]),
                 PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and "?pfel" in done.stdout
    assert config(tmp_path / "run")["input"]["classes"][1] == "Äpfel und 梨"


def test_an_unforeseen_error_in_a_client_is_one_line_and_a_log(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, usual = Path("run"), run.METHODS["fedavg"]
    go(out, *FEDAVG, "--rounds", "1")
    kept = (out / "checkpoint.pt").read_bytes()
    for error, words in ((RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to "
                                       "allocate 9 bytes"), "fewer --workers"),
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
    monkeypatch.setitem(run.METHODS, "fedavg", usual)
    go(out, "--resume", "--rounds", "2")


def test_a_loss_that_is_finite_but_absurd_is_a_warning(tmp_path, capsys, monkeypatch):
    def train_round(experiment, t, server, memory, usual=run.train_round):
        server, memory, figures = usual(experiment, t, server, memory)
        return server, memory, figures | {"loss": figures["loss"] * (1e9 if t > 1 else 1)}

    monkeypatch.setattr(run, "train_round", train_round)
    go(tmp_path, *FEDAVG, "--rounds", "3")
    shown = capsys.readouterr()
    assert shown.out.count("warning: ") == 1 and "warning: round 2: the loss is" in shown.out
    assert shown.err == ""


# ------------------------------------------------------------------------------------------ corners

def test_optimised_python_runs_too(tmp_path, capsys):
    module = types.ModuleType("run_without_docstrings")
    exec(compile((ROOT / "run.py").read_text(), "run.py", "exec", optimize=2), vars(module))
    assert module.main.__doc__ is None
    assert module.main([*FEDAVG, "--rounds", "1", "--out", str(tmp_path / "run")]) == 0
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert "--seed" in capsys.readouterr().out


def test_an_npz_may_be_named_in_capitals_or_by_a_path(tmp_path):
    path = copy_of_digits(tmp_path, "MINE.NPZ")
    assert torch.equal(data.load(path).x_test, data.load(few_digits()).x_test)
    go(tmp_path / "run", *on(path), "--rounds", "1")


def test_class_names_may_be_bytes_and_have_line_breaks():
    assert data.class_names(np.array([b"a cat", "Möwe".encode()])) == ["a cat", "Möwe"]
    assert data.class_names(np.array(["two\n lines", "3"])) == ["two lines", "3"]


def test_integers_of_zero_and_one_alone_are_remarked_on(capsys):
    masks = (data.load(few_digits()).x_train[:20, 0] > 99).byte().numpy()
    labels = np.arange(20) % 2
    data.from_arrays(masks, labels, masks, labels)
    assert "x_train holds integers that are 0 and 1 alone" in capsys.readouterr().out
    data.from_arrays(masks.astype(np.float32), labels, 255 * masks, labels)
    assert capsys.readouterr().out == ""


def test_a_damaged_original_is_named(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_3").write_bytes(b"broken")
    with pytest.raises(ValueError, match="delete .*data_batch_3, which is damaged"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_projection_stands_any_size_of_gradient(size):
    rng = torch.Generator().manual_seed(0)
    inner, local = torch.randn(2, 50, generator=rng)
    local = local if (inner * local).sum() < 0 else -local
    expected = fedin.project_gradient(inner, local)
    assert torch.allclose(fedin.project_gradient(inner, size * local), expected, rtol=1e-5)
    assert torch.allclose(fedin.project_gradient(size * inner, local), size * expected, rtol=1e-5,
                          atol=1e-6 * size)


def test_the_first_cpu_is_the_cpu():
    settings = run.resolve({"device": "cpu:0"})
    assert settings["device"] == "cpu" and settings["workers"] == run.resolve(
        {"device": "cpu"})["workers"]


def test_a_long_message_is_cut_to_a_line_that_keeps_its_end(capsys):
    error = refused(capsys, "--dataset", "./" * 1500 + "y.npz")
    assert len(error) == 301 and error.endswith("y.npz: check its path\n")
