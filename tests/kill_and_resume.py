"""Kill runs at ten random moments each, resume them, and compare them with runs never stopped.

    python -m tests.kill_and_resume [METHOD [SEED]]     minutes for each; not collected by pytest

METHOD is fedin, scaffold (clients keep something), apfl (kills also fall into later stages), or
async (clients are under way between rounds); all four if it is left out.
Exits with status 1 if metrics.jsonl or result.json differ in anything but timings.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from commands import lines, result

KILLS = 10
RESNET14 = ("--train-images 300 --clients 6 --rounds 12 --local-epochs 1 --partition iid "
            "--model resnet14").split()
FLAGS = {
    "fedin": [*RESNET14, "--noise", "0.1"], "scaffold": [*RESNET14, "--method", "scaffold"],
    "async": ("--method fedavg --aggregation async --train-images 600 --clients 6 --rounds 20 "
              "--model cnn").split(),
    "apfl": ("--method apfl --train-images 600 --clients 6 --rounds 5 --missing-classes 0.2 "
             "--generator-steps 40 --generator-batch 4 --synthetic-per-class 40").split()}


def start(out: Path, flags: list[str], processes: int = 1) -> subprocess.Popen:
    """Start a run on a number of processes, or resume it once it has begun."""
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    words = ["--resume"] if (out / "config.json").exists() else flags
    return subprocess.Popen([sys.executable, *(several if processes > 1 else []), "run.py", *words,
                             "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for a run, which has to end well or by a kill."""
    _, error = process.communicate()
    if process.returncode not in (0, -9):
        raise RuntimeError(f"status {process.returncode}: {error}")


def main(flags: list[str], seed: int) -> int:
    """Compare a run that is killed and resumed with one that is never stopped."""
    rng, kills, alike = random.Random(seed), 0, True
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        began = time.perf_counter()
        finish(start(whole, flags))
        length = time.perf_counter() - began
        while alike and (kills < KILLS or not (parts / "result.json").exists()):
            process = start(parts, flags)
            try:
                process.wait(timeout=rng.uniform(0.1, 0.5) * length if kills < KILLS else None)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            finish(process)
            if process.returncode == 0:  # if it finished first, another run begins
                alike = lines(parts) == lines(whole) and result(parts) == result(whole)
                parts = parts if kills == KILLS else parts.with_name(parts.name + "-")
    print(f"{kills} kills, alike: {alike}", flush=True)
    return 0 if alike else 1


if __name__ == "__main__":
    methods, seed = sys.argv[1:2] or list(FLAGS), int((*sys.argv, "0", "0")[2])
    sys.exit(max([main(FLAGS[method], seed) for method in methods]))
