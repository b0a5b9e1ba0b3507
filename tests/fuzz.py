"""Break what a run reads, in 500 ways, and see that it says so in one line.

    python -m tests.fuzz [CASES [SEED]]     some minutes; not collected by pytest

Data sets, embeddings, word vectors, checkpoints, metrics and config.json are cut off, have bits
flipped, or hold values of other types.  Whatever is done to them, a run has to end in status 0 or
2, with one line on standard error at most.  Prints what came of each kind; exits with status 1 if
one did not.
"""

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from commands import APFL, CNN, SMALL

import apfl
import generator
import run

ODD = (None, -1, 0, 3, 10**30, 0.5, float("nan"), "", "x", "cnn", [], [1], {}, {"a": 1}, True)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[:rng.randrange(len(content))]


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def retype_npz(path: Path, rng: random.Random) -> None:
    """Another type or shape for one of the arrays."""
    arrays = dict(np.load(path))
    name = rng.choice(list(arrays))
    array = arrays[name]
    arrays[name] = rng.choice([
        lambda: array.astype(str), lambda: array[:0], lambda: array[..., None], lambda: array.T,
        lambda: np.array(7), lambda: np.resize(array, len(array) + 1), lambda: array == array,
        lambda: np.full(array.shape, np.nan), lambda: np.full(array.shape, -1),
        lambda: np.full(array.shape, 1e300), lambda: np.full(array.shape, b"\xff"),
        lambda: array.astype(complex) if array.dtype.kind in "uif" else array[::-1]])()
    np.savez(path, **arrays)


def retype_words(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines()
    row = rng.randrange(len(lines))
    lines[row] = rng.choice(["", "zero", "zero 1 nan", "zero 1 2 3 4 5", "\x00\x01", "1 2 3",
                             lines[row].replace(" ", "  "), lines[row].upper(), "zero 1e999 1"])
    path.write_text("\n".join(lines))


def retype_nest(value: object, rng: random.Random, depth: int) -> object:
    """A nest of dicts with another value somewhere, not deeper than depth."""
    if depth == 0 or not isinstance(value, dict) or not value:
        return rng.choice([*ODD, torch.zeros(2)])
    key = rng.choice(list(value))
    if rng.random() < 0.2:
        return {name: item for name, item in value.items() if name != key}
    return value | {key: retype_nest(value[key], rng, depth - 1)}


def retype_checkpoint(path: Path, rng: random.Random) -> None:
    saved = torch.load(path, weights_only=True)
    torch.save(retype_nest(saved, rng, rng.randint(1, 2)), path)


def retype_config(path: Path, rng: random.Random) -> None:
    settings = json.loads(path.read_text())
    key = rng.choice(list(settings))
    path.write_text(json.dumps(settings | {key: rng.choice(ODD)}))


def retype_metrics(path: Path, rng: random.Random) -> None:
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {rng.choice(list(entry)): rng.choice(ODD)}) + "\n")


def status_of(*flags: str) -> tuple[int, str]:
    """The exit status of a command, and what it wrote on standard error."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        status = run.main(list(flags))
    return status, error.getvalue()


def main(cases: int, seed: int) -> int:
    rng, outcomes, failed = random.Random(seed), Counter(), 0
    generator.WIDTHS, apfl.BETA_TEST_IMAGES = SMALL
    dataset = Path(CNN[CNN.index("--dataset") + 1])
    without = [flag for flag in APFL if flag not in ("--semantics", "segments")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "embeddings.npz", classes=np.array([*"0123456789"]),
                 embeddings=np.random.default_rng(0).normal(size=(10, 3)))
        (folder / "words.txt").write_text("\n".join(
            f"{digit} {digit / 3} {digit % 4}" for digit in range(10)))
        whole = folder / "whole"
        scaffold = [*CNN, "--method", "scaffold", "--rounds", "1", "--out", str(whole)]
        assert status_of(*scaffold) == (0, "")
        on = [*CNN[:CNN.index("--dataset")], *CNN[CNN.index("--dataset") + 2:]]
        kinds = {  # what is broken -> the file, how its content gets other types, the command
            "data set": (dataset, retype_npz, lambda file: [
                "--dataset", str(file), *on, "--method", "fedavg", "--rounds", "1"]),
            "embeddings": (folder / "embeddings.npz", retype_npz, lambda file: [
                *without, "--semantics", str(file), "--rounds", "1"]),
            "word vectors": (folder / "words.txt", retype_words, lambda file: [
                *without, "--semantics", "word2vec", "--word-vectors", str(file), "--rounds", "1"]),
            "checkpoint": (whole / "checkpoint.pt", retype_checkpoint, None),
            "config.json": (whole / "config.json", retype_config, None),
            "metrics": (whole / "metrics.jsonl", retype_metrics, None)}
        for case in range(cases):
            kind = list(kinds)[case % len(kinds)]
            original, retype, command = kinds[kind]
            out, how = folder / "out", rng.choice(["cut", "flip", "retype"])
            shutil.rmtree(out, ignore_errors=True)
            if command is None:
                shutil.copytree(whole, out)
                broken, flags = out / original.name, ["--resume"]
            else:
                broken = Path(shutil.copy(original, folder / f"broken{original.suffix}"))
                flags = command(broken)
            if how == "retype":
                retype(broken, rng)
            else:
                broken.write_bytes({"cut": cut, "flip": flip}[how](broken.read_bytes(), rng))
            try:
                status, error = status_of(*flags, "--out", str(out))
            except BaseException as raised:
                status, error = f"{type(raised).__name__}", str(raised)
            outcomes[kind, how, status] += 1
            if status not in (0, 2) or error.count("\n") > (status == 2):
                failed += 1
                print(f"case {case}: {kind}, {how}: status {status}: {error[:300]}", flush=True)
    for (kind, how, status), count in sorted(outcomes.items(), key=str):
        print(f"{kind}, {how}: status {status}, {count} times")
    print(json.dumps({"cases": cases, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    cases, seed = (*map(int, sys.argv[1:]), *(500, 0)[len(sys.argv) - 1:])
    sys.exit(main(cases, seed))
