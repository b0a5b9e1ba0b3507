"""Break files, flags, environment and rights of runs; each mistake has to end in one line.

    python -m tests.fuzz [CASES [SEED]]     some minutes; not collected by pytest

Runs have to end with status 0 or 2 (wrong flags: also 1, diverged), and with one line on standard
error at most; without a mistake of the user, with status 0 alone.  Exits with status 1 if one does
not.
"""

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from commands import APFL, CNN, ROOT, SMALL

import analysis
import apfl
import generator
import report
import run

# Values that other programs leave in the environment
LEFT_OVER = {"MPLBACKEND": ["module://of_a_notebook.inline", "qtagg"], "RANK": ["1", "x"],
             "WORLD_SIZE": ["4", "x"], "LOCAL_WORLD_SIZE": ["8", "0"], "LOCAL_RANK": ["3"],
             "MASTER_ADDR": ["nowhere"], "COLUMNS": ["0"], "PYTHONWARNINGS": ["error"]}
LINES = ("null", "{}", '"text"', "[1]", "12", '{"id": []}', "\ufeff{}", '{"round": 1}', "\0", "{")
ODD = ("-1", "0", "3", "0.5", "nan", "1e400", "", "x", "cnn", "[1]", "True", "nowhere.npz")


def break_npz(path: Path, rng: random.Random) -> None:
    """Cut a file off, flip some of its bits, or give one of its arrays another type or shape."""
    arrays, content = dict(np.load(path)), bytearray(path.read_bytes())
    name, how = rng.choice(list(arrays)), rng.choice(["cut", "flip", "retype"])
    if how == "cut":
        del content[rng.randrange(len(content)):]
    for _ in range(rng.randint(1, 8) if how == "flip" else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    if how == "retype":
        array = arrays[name]
        arrays[name] = rng.choice([
            lambda: array.astype(str), lambda: array[:0], lambda: array[..., None],
            lambda: array.T, lambda: np.array(7), lambda: np.resize(array, len(array) + 1),
            lambda: array == array, lambda: np.full(array.shape, np.nan), lambda: array[::-1],
            lambda: np.full(array.shape, 1e300), lambda: np.full(array.shape, b"\xff")])()
        np.savez(path, **arrays)


def wrong_flags(rng: random.Random) -> list[str]:
    """One or two flags with values that they may not have."""
    actions, words = run.parser()._actions, []
    for action in rng.sample([action for action in actions if action.dest not in (
            "help", "out", "dataset", "method", "setting")], rng.randint(1, 2)):
        words += [action.option_strings[-1], rng.choice([*ODD, *(action.choices or ODD)])]
    return words


def status_of(*flags: str) -> tuple[int | str, str]:
    """Exit status of a command, and its text on standard error."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            return run.main(list(flags)), error.getvalue()
        except BaseException as raised:
            return type(raised).__name__, str(raised)


def in_odd_environment(rng: random.Random, out: str) -> tuple[int, str]:
    """Status and errors of a sound run in a process with variables that something else has left."""
    names = rng.sample(sorted(LEFT_OVER), rng.randint(1, 3))
    left = {name: rng.choice(LEFT_OVER[name]) for name in names}
    done = subprocess.run([sys.executable, ROOT / "run.py", *CNN, "--rounds", "1", "--out", out],
                          env=os.environ | left, capture_output=True, text=True)
    return done.returncode, f"{left}: {done.stderr}" if done.returncode else done.stderr


@contextlib.contextmanager
def another_user(folder: Path):
    """Be a user who may read a folder and write nothing in it."""
    for path in (folder.parent, folder, *folder.iterdir()):
        path.chmod(0o755 if path == folder.parent else 0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        folder.chmod(0o755)


def with_rights_to_read(rng: random.Random, out: str) -> tuple[int, str]:
    """Status and errors of someone else who resumes a run, starts one in it, or looks at it."""
    if status_of("--rounds", "1", *CNN, "--out", out)[0] != 0:
        return 3, "no run"
    flags = rng.choice([["--resume"], ["--resume", "--rounds", "2"], CNN, None])
    with another_user(Path(out)):
        before = {path.name: path.stat().st_mtime_ns for path in Path(out).iterdir()}
        if flags is None:
            analysis.trained_network(out)
            status, error = 0, ""
        else:
            status, error = status_of(*flags, "--out", f"{out}{'/new' * (flags == CNN)}")
        after = {path.name: path.stat().st_mtime_ns for path in Path(out).iterdir()}
    return (status, error) if before == after else (3, "files changed")


def with_odd_lines(rng: random.Random, out: str) -> tuple[int, str]:
    """Status and errors of a run that is resumed, and of results that are read, with odd lines."""
    line = rng.choice(LINES)
    if status_of("--rounds", "1", *CNN, "--out", out)[0] != 0:
        return 3, "no run"
    sound = {"id": "a", "result": 1, "rounds": 1, "accuracy": 1}
    for path in (Path(out, "metrics.jsonl"), Path(out, "runs.jsonl")):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n{json.dumps(sound)}")
    with contextlib.redirect_stdout(io.StringIO()):
        if report.recorded(Path(out).resolve()).keys() != {"a"}:
            return 3, f"{line} costs a line"
    return status_of("--resume", "--rounds", "2", "--out", out)


SOUND = {"environment": in_odd_environment, "rights": with_rights_to_read, "lines": with_odd_lines}


def main(cases: int = 300, seed: int = 0) -> int:
    """Break one thing per case, and count the outcomes."""
    rng, outcomes, failed = random.Random(seed), Counter(), 0
    generator.WIDTHS, apfl.BETA_TEST_IMAGES = SMALL
    with tempfile.TemporaryDirectory() as folder:
        out, embeddings, broken = (f"{folder}/{name}" for name in ("out", "a.npz", "b.npz"))
        np.savez(embeddings, classes=np.array([*"0123456789"]),
                 embeddings=np.random.default_rng(0).normal(size=(10, 3)))
        for case in range(cases):
            kind, flags = rng.choice([("data set", [*CNN, "--dataset", broken]), ("flags", CNN),
                                      ("embeddings", [*APFL, "--semantics", broken]),
                                      *((kind, CNN) for kind in SOUND)])
            shutil.rmtree(out, ignore_errors=True)
            if kind in SOUND:
                status, error = SOUND[kind](rng, out)
                flags = []
            elif kind == "flags":
                flags = [*flags, *wrong_flags(rng)]
            else:
                break_npz(Path(shutil.copy(CNN[1] if kind == "data set" else embeddings, broken)),
                          rng)
            if kind not in SOUND:
                status, error = status_of("--rounds", "1", *flags, "--out", out)
            outcomes[kind, status] += 1
            allowed = {"flags": (0, 1, 2), "environment": (0,)}.get(kind, (0, 2))
            if status not in allowed or error.count("\n") > (status != 0):
                failed += 1
                print(f"case {case}: {kind}, {flags[-4:]}: status {status}: {error[:300]}")
    print(*(f"{kind}: status {status}, {count} times" for (kind, status), count in sorted(
        outcomes.items(), key=str)), f"{failed} of {cases} failed", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
