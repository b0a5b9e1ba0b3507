"""Break files that a run reads, and type wrong flags; each mistake has to end in one line.

    python -m tests.fuzz [CASES [SEED]]     some minutes; not collected by pytest

Runs have to end with status 0 or 2 (wrong flags: also 1, diverged), and with one line on standard
error at most.  Exits with status 1 if one does not.
"""

import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from commands import APFL, CNN, SMALL

import apfl
import generator
import run

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
                                      ("embeddings", [*APFL, "--semantics", broken])])
            shutil.rmtree(out, ignore_errors=True)
            if kind == "flags":
                flags = [*flags, *wrong_flags(rng)]
            else:
                break_npz(Path(shutil.copy(CNN[1] if kind == "data set" else embeddings, broken)),
                          rng)
            status, error = status_of("--rounds", "1", *flags, "--out", out)
            outcomes[kind, status] += 1
            if status not in (0, 2, *[1] * (kind == "flags")) or error.count("\n") > (status != 0):
                failed += 1
                print(f"case {case}: {kind}, {flags[-4:]}: status {status}: {error[:300]}")
    print(*(f"{kind}: status {status}, {count} times" for (kind, status), count in sorted(
        outcomes.items(), key=str)), f"{failed} of {cases} failed", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
