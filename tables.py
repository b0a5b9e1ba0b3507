"""Run what the papers' tables need, here or anywhere, and write the tables.

    python tables.py --list                          names, and the number of runs at a scale
    python tables.py all --scale smoke               everything, tiny, to see that it works
    python tables.py fedin-1 --scale small --commands > runs.txt
                                                     the missing runs as commands, longest first

experiments.py lists the runs.  They lie in runs/tables/SCALE.  Every command may be repeated: it
begins, resumes or leaves its run.  report.py writes the tables, here after the runs.
"""

import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

import experiments
import pictures
import ranks
import report
import run
from experiments import digits_of
from report import RUNS, is_finished
from settings import AFTER_ROUNDS

RUN_PY = Path(__file__).with_name("run.py")


# ------------------------------------------------------------------------------------- missing runs

def missing_runs(args: Namespace) -> dict[str, dict]:
    """Runs to make: id -> flags.  Raises ValueError if --only has a text that is in no name."""
    known, jobs, names = report.recorded(args.scale), {}, {}
    for table in args.tables.values():
        for key, runs in experiments.runs_of(table, args).items():
            names |= dict.fromkeys(key)
            chosen = not args.only or any(text in name for text in args.only for name in key)
            for run_id, flags in runs.items() if chosen else ():
                # A line will do, but not for networks, nor for a run that is under way again.
                folder = RUNS / args.scale / run_id
                line = run_id in known and not (table.get("networks") or folder.exists())
                if args.again or not (line or is_finished(folder)):
                    jobs[run_id] = flags
    for text in args.only:
        if not any(text in name for name in names):
            raise ValueError(f"--only {text} is in none of these names: {', '.join(names)}")
    return jobs


def commands(jobs: Mapping[str, dict], args: Namespace) -> dict[str, list[str]]:
    """Id -> words of run.py's command line, longest run first, of equal ones lower seeds first.

    Runs with equal rounds start after those of one of them.
    """
    lines, first_of = {}, {}
    for name in sorted(jobs, key=lambda name: (-cost(jobs[name]), jobs[name]["seed"])):
        words = [*run.command_line(jobs[name]), "--resume", "--out", str(RUNS / args.scale / name)]
        first = first_of.setdefault(digits_of(jobs[name], but=AFTER_ROUNDS), name)
        if first != name:
            words += ["--start-from", str(RUNS / args.scale / first)]
        lines[name] = words
    return lines


def cost(flags: Mapping) -> float:
    """Work of a run, to sort by: images in training, times the size of the networks."""
    settings = run.resolve(dict(flags))
    images = (settings["train_images"] or 50_000) * run.num_participants(settings)
    size = {"cnn": 1, "resnet152-widths": 40}.get(settings["model"], 8)
    return settings["rounds"] * settings["local_epochs"] * images / settings["clients"] * size


# ------------------------------------------------------------------------------------- running here

def run_here(lines: Mapping[str, list[str]], args: Namespace) -> int:
    """Run commands, args.jobs at a time; returns the exit status, 1 if one fails."""
    # Runs that start after another's rounds come last.  Ctrl-C reaches the processes too: they save
    # what they have, and no other begins.
    status, pool = 0, ThreadPoolExecutor(args.jobs)
    bar = pictures.progress_bar(None, "runs", "run", len(lines))
    waves = [[name for name in lines if ("--start-from" in lines[name]) == later]
             for later in (False, True)]
    try:
        for wave in waves:
            futures = {pool.submit(run_alone, lines[name], args.jobs): name for name in wave}
            for future in as_completed(futures):
                if error := future.result():
                    status = 1
                    bar.write(f"{futures[future]}: {error}", file=sys.stdout)
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return status


def run_alone(words: Sequence[str], jobs: int) -> str:
    """Run a command in a process of its own; its error in a line, or nothing."""
    folder = Path(words[words.index("--out") + 1])
    if not torch.cuda.is_available():  # the processes share the cores
        words = [*words, "--workers", str(max(1, ranks.num_cores() // jobs))]
    log = folder.with_suffix(".log")  # beside the folder
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        status = subprocess.run([sys.executable, "-u", str(RUN_PY), *words], stdout=file,
                                stderr=subprocess.STDOUT).returncode
    if status < 0:
        return f"killed by signal {-status}: fewer --jobs need less memory"
    return log.read_text(encoding="utf-8").splitlines()[-1] if status else ""


# --------------------------------------------------------------------------------- the command line

def listing(args: Namespace) -> str:
    """Every table and figure, with the number of its runs."""
    lines, every = [], set()
    for name, table in experiments.tables(args.scale).items():
        ids = set().union(*experiments.runs_of(table, args).values())
        lines.append(f"{name:14}{len(ids):5} runs  {table['title']}")
        every |= ids
    return "\n".join([*lines, f"{'all':14}{len(every):5} runs  all of these, which share runs", "",
                      f"Scale {args.scale}, seeds: {args.seeds} (figures that need networks: 1). "
                      "FedIN's Fig. 1 and 2 and AP-FL's Fig. 1 to 3 are drawings."])


def work(words: Sequence[str]) -> int:
    """Do what a command line says; returns the exit status."""
    made = report.parser("tables.py", __doc__)
    add, add_one = made.add_argument, made.add_mutually_exclusive_group().add_argument
    add("--list", action="store_true", help="print all names and stop")
    add_one("--commands", action="store_true", help="print the missing runs as commands and stop")
    add("--jobs", type=run.number(int, 1), metavar="N", default=1 if torch.cuda.is_available() else
        ranks.num_cores(), help="runs at a time (default: number of cores, on a GPU 1)")
    add("--only", nargs="+", default=[], metavar="TEXT", help="run only rows and columns with such "
        "a text in their names, as CIFAR-10")
    add_one("--again", action="store_true", help="delete the folders of chosen runs, and run again")
    args = report.read_arguments(made, words)
    if args.list or not args.names:
        print(listing(args))
        return 0

    jobs = missing_runs(args)
    lines = commands(jobs, args)
    if args.commands:
        print("".join(shlex.join(["python", "run.py", *line]) + "\n" for line in lines.values()),
              end="")
        return 0
    for name in jobs if args.again else ():
        shutil.rmtree(RUNS / args.scale / name, ignore_errors=True)
    return run_here(lines, args) | report.write_tables(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and write tables; see report.ends_in_one_line for the status."""
    return report.ends_in_one_line(work, argv)


if __name__ == "__main__":
    sys.stdout, sys.stderr = pictures.Display(sys.stdout), pictures.Display(sys.stderr)
    sys.exit(main())
