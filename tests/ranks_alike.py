"""One process against two and three under torchrun, method by method (not collected by pytest).

    python -m tests.ranks_alike [METHOD ...]     some minutes

metrics.jsonl has to be equal but for timings on one, two and three processes, and after one of two
is killed at a random moment and the run resumed on one and on three.  Status 1 if any differs.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from commands import lines
from kill_and_resume import finish, start

SMALL = "--train-images 240 --clients 6 --rounds 3 --local-epochs 1 --workers 1".split()
APFL = "--generator-steps 4 --generator-batch 2 --synthetic-per-class 6 --friend-epochs 1".split()
FLAGS = {
    **{method: ["--method", method, *SMALL] for method in
       "fedavg fedin scaffold moon heterofl fedgen feddf local ccvr".split()},
    "apfl": ["--method", "apfl", "--missing-classes", "0.2", *SMALL, *APFL],
    "async": ["--method", "apfl", "--aggregation", "async", *SMALL, *APFL]}


def wait_for(path: Path, process: subprocess.Popen) -> float:
    """Time at which the process has made a file, or has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)
    return time.perf_counter()


def start_and_kill(out: Path, flags: list[str], wait: float, rng: random.Random) -> str:
    """Kill one of two processes of a run some seconds after its begin; return its errors."""
    process = start(out, flags, 2)
    wait_for(out / "config.json", process)
    time.sleep(wait)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], stdout=subprocess.PIPE).stdout
    os.kill(int(rng.choice(workers.split())), signal.SIGKILL)  # fails if the run has ended
    return process.communicate()[1]


def check(name: str, folder: Path, rng: random.Random) -> bool:
    """Compare the runs of one method."""
    one = folder / "1"
    process = start(one, FLAGS[name])
    began = wait_for(one / "config.json", process)
    finish(process)
    length, alike = time.perf_counter() - began, {}
    for processes in (2, 3):
        out = folder / str(processes)
        finish(start(out, FLAGS[name], processes))
        alike[f"on {processes}"] = lines(out) == lines(one)
    for processes in (1, 3):
        out = folder / f"killed-{processes}"
        error = start_and_kill(out, FLAGS[name], rng.uniform(0.1, 0.5) * length, rng)
        finish(start(out, FLAGS[name], processes))
        alike[f"killed, resumed on {processes}"] = lines(out) == lines(one) and len(
            re.findall(r"^error: ", error, re.MULTILINE)) == 1
    print(f"{name}: alike {alike}", flush=True)
    return all(alike.values())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        rng = random.Random(0)
        outcomes = [check(method, Path(name) / method, rng) for method in sys.argv[1:] or FLAGS]
    sys.exit(0 if all(outcomes) else 1)
