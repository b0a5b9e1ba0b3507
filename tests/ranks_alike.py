"""One process against two and three under torchrun, method by method (not collected by pytest).

    python -m tests.ranks_alike [METHOD ...]     some minutes

For each: metrics.jsonl has to be the same but for timings, on one, two and three processes; and a
run on two, of which one is killed at a random moment, has to go on alike on one and on three.
Prints a line for each, and exits with status 1 if any differs.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = "--train-images 240 --clients 6 --rounds 3 --local-epochs 1 --workers 1".split()
APFL = "--generator-steps 4 --generator-batch 2 --synthetic-per-class 6 --friend-epochs 1".split()
FLAGS = {
    **{method: ["--method", method, *SMALL] for method in
       ("fedavg", "fedin", "scaffold", "moon", "heterofl", "fedgen", "feddf", "local")},
    "apfl": ["--method", "apfl", "--missing-classes", "0.2", *SMALL, *APFL],
    "async": ["--method", "apfl", "--aggregation", "async", *SMALL, *APFL],
}
TIMINGS = r'"seconds": [0-9.]+'


def start(processes: int, out: Path, *flags: str) -> subprocess.Popen:
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.Popen([sys.executable, *(several if processes > 1 else []), "run.py", *flags,
                             "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True)


def finish(process: subprocess.Popen) -> None:
    _, error = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"status {process.returncode}: {error}")


def metrics(out: Path) -> str:
    return re.sub(TIMINGS, "", (out / "metrics.jsonl").read_text())


def start_and_kill(out: Path, flags: list[str], wait: float,
                   rng: random.Random) -> subprocess.Popen:
    """A run on two processes, of which one is killed some seconds after it has begun.

    Where the run has ended by then, it begins anew and has half the time.
    """
    while True:
        process = start(2, out, *flags)
        wait_for(out / "config.json", process)
        time.sleep(wait)
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        if found.stdout:
            os.kill(rng.choice([int(line) for line in found.stdout.split()]), signal.SIGKILL)
            return process
        process.communicate()
        shutil.rmtree(out)
        wait /= 2


def wait_for(path: Path, process: subprocess.Popen) -> float:
    """Wait until the process has made a file; the time at which it had."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)
    return time.perf_counter()


def check(name: str, folder: Path, rng: random.Random) -> bool:
    whole = start(1, folder / "1", *FLAGS[name])
    began = wait_for(folder / "1" / "config.json", whole)
    finish(whole)
    length = time.perf_counter() - began
    alike = []
    for processes in (2, 3):
        finish(start(processes, folder / str(processes), *FLAGS[name]))
        alike.append(metrics(folder / str(processes)) == metrics(folder / "1"))
    for processes in (1, 3):
        out = folder / f"killed-{processes}"
        process = start_and_kill(out, FLAGS[name], rng.uniform(0.2, 0.7) * length, rng)
        _, error = process.communicate()
        said = len(re.findall(r"^error: ", error, re.MULTILINE))
        done = (out / "metrics.jsonl").read_text().count("\n") if (
            out / "metrics.jsonl").exists() else 0
        finish(start(processes, out, "--resume"))
        alike.append(process.returncode != 0 and said == 1
                     and metrics(out) == metrics(folder / "1"))
        print(f"{name}: one of two killed after {done} lines" + ("" if alike[-1] else (
            f"; status {process.returncode}: {error}")), flush=True)
    print(f"{name}: on 2 processes alike {alike[0]}, on 3 {alike[1]}; killed on 2, resumed on 1 "
          f"{alike[2]}, on 3 {alike[3]}", flush=True)
    return all(alike)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        rng = random.Random(0)
        outcomes = [check(method, Path(name) / method, rng) for method in sys.argv[1:] or FLAGS]
    sys.exit(0 if all(outcomes) else 1)
