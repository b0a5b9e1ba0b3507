"""Kill runs at ten random moments each, resume them, and compare them with runs never stopped.

    python -m tests.kill_and_resume [METHOD [SEED]]     minutes for each; not collected by pytest

METHOD is fedin, scaffold (whose clients keep something), apfl (where kills fall into the stages
after the last round too) or async (where clients are under way between rounds); all four if it is
left out.

Exits with status 1 if metrics.jsonl or result.json differ in anything but timings.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS = 10
FLAGS = {
    "fedin": ("--train-images 300 --clients 6 --rounds 12 --local-epochs 1 --partition iid "
              "--noise 0.1 --model resnet14").split(),
    "scaffold": ("--method scaffold --train-images 300 --clients 6 --rounds 12 --local-epochs 1 "
                 "--partition iid --model resnet14").split(),
    "async": ("--method fedavg --aggregation async --train-images 600 --clients 6 --rounds 20 "
              "--model cnn").split(),
    "apfl": ("--method apfl --train-images 600 --clients 6 --rounds 5 --missing-classes 0.2 "
             "--generator-steps 40 --generator-batch 4 --synthetic-per-class 40").split(),
}
TIMINGS = r'"([a-z]*_?seconds|images_per_second)": [0-9.]+'


def start(out: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "run.py", *flags, "--out", str(out)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def outcome(out: Path) -> tuple[str, str]:
    """metrics.jsonl and result.json without timings."""
    return tuple(re.sub(TIMINGS, "", (out / name).read_text())
                 for name in ("metrics.jsonl", "result.json"))


def main(flags: list[str], seed: int) -> int:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        began = time.perf_counter()
        if start(whole, *flags).wait() != 0:
            raise RuntimeError("the run that is never stopped did not end well")
        length = time.perf_counter() - began
        kills = 0
        while kills < KILLS:
            resume = (parts / "config.json").exists()
            process = start(parts, *(["--resume"] if resume else flags))
            try:
                process.wait(timeout=rng.uniform(0.1, 0.5) * length)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            _, error = process.communicate()
            if process.returncode not in (0, -9):
                print(f"status {process.returncode}: {error}")
                return 1
            done = (parts / "metrics.jsonl").read_bytes().count(b"\n") if (
                parts / "metrics.jsonl").exists() else 0
            print(f"kill {kills}: {done} lines", flush=True)
            if process.returncode == 0:  # it finished first: begin a new one
                if outcome(whole) != outcome(parts):
                    print("a finished run differs")
                    return 1
                parts = parts.with_name(parts.name + "-")
        if start(parts, *(["--resume"] if (parts / "config.json").exists() else flags)).wait() != 0:
            print("the last run did not end well")
            return 1
        alike = outcome(whole) == outcome(parts)
        print(json.dumps({"kills": kills, "alike": alike}))
        return 0 if alike else 1


if __name__ == "__main__":
    methods, seed = sys.argv[1:2] or list(FLAGS), int((*sys.argv, "0", "0")[2])
    sys.exit(max([main(FLAGS[method], seed) for method in methods]))
