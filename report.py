"""Write the papers' tables and figures from finished runs: Markdown, CSV and a picture each.

    python report.py fedin-1 --scale small          FedIN, Table 1, to results/small

tables.py runs what is missing, experiments.py lists the runs.  Here nothing is run but analyses of
networks.  A finished run in runs/tables/SCALE gets a line in results/SCALE/runs.jsonl, from which
the tables are made; so they can be made again where the folders are gone.

In reading order: runs.jsonl; numbers of a table; Markdown, CSV and pictures; the command line.
"""

import csv
import io
import json
import re
import shlex
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch

import analysis
import data
import experiments
import files
import partitions
import pictures
import run
from analysis import (Key, Measured, Papers, Values, agreement, mean_and_spread,
                      of_common_seeds)
from experiments import cells, flags_of

RUNS, RESULTS = Path("runs/tables"), Path("results")
PAPERS = Path(__file__).with_name("results") / "papers.csv"
TARGETS = {"Fashion-MNIST": 85, "SVHN": 80, "CIFAR-10": 60}  # percent, FedIN, Table 1
TARGET_SOURCE = "(below the paper's scale nine tenths of FedAvg's last accuracy, non-IID, by seed)"

Lines = Mapping[Key, list[dict]]  # lines of runs.jsonl for seeds 0, 1, ...


# --------------------------------------------------------------------------------------- runs.jsonl

def is_finished(folder: Path) -> bool:
    """Whether a run has ended and its networks are there."""
    return (folder / "result.json").exists() and (folder / "checkpoint.pt").exists()


def collect(made: Mapping[Key, Mapping], scale: str) -> dict[str, dict]:
    """Add lines of finished runs (see runs_of) to runs.jsonl; return all: id -> its last line."""
    known = recorded(scale)
    for run_id, flags in chain.from_iterable(runs.items() for runs in made.values()):
        if is_finished(RUNS / scale / run_id):
            line = line_of(RUNS / scale / run_id, flags)
            if known.get(run_id, {}).get("result") != line["result"]:
                known[run_id] = line
                append(scale, line)
    return known


def line_of(folder: Path, flags: Mapping[str, Any]) -> dict:
    """Line of a finished run, with the commit, machine and versions that trained it."""
    result, config = json.loads((folder / "result.json").read_text()), files.read_config(folder)
    entries = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    command = shlex.join(["python", "run.py", *run.command_line(flags)])
    return {"id": folder.name, "command": command, **config["versions"], "result": result,
            "rounds": [entry["round"] for entry in entries],
            "accuracy": [files.accuracy_in_rounds(entry) for entry in entries],
            "digests": config["digests"]}


def append(scale: str, line: dict) -> None:
    """Add a line to runs.jsonl."""
    path = RESULTS / scale / "runs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def recorded(scale: str) -> dict[str, dict]:
    """Id of a run -> its last line in runs.jsonl; a line that is no run's is told and left out."""
    path, lines = RESULTS / scale / "runs.jsonl", {}
    texts = path.read_bytes().splitlines() if path.exists() else []
    for number, text in enumerate(texts, start=1):
        with suppress(ValueError, AttributeError, TypeError):
            line = json.loads(text)
            if {"id", "result", "rounds", "accuracy"} <= line.keys():
                lines[line["id"]] = line
                continue
        print(f"note: line {number} of {path} is no run's and is left out")
    return lines


# ------------------------------------------------------------------------------- numbers of a table

def final(table: Mapping, lines: Lines, args: Namespace) -> Measured:
    """Result that each cell names, per seed."""
    return Measured({key: [line["result"].get(cell["value"]) for line in lines[key]]
                     for key, cell in cells(table).items()})


def swept(table: Mapping, lines: Lines, args: Namespace, label: str) -> Measured:
    """Final accuracies, drawn as a line per row over the columns, which are numbers."""
    values, columns, curves = final(table, lines, args).values, list(table["columns"]), {}

    # Means over the seeds that all cells with runs have, since other seeds have other splits
    seeds = min(len(per_seed) for per_seed in values.values() if per_seed)
    for row in table["rows"]:
        points = [mean_and_spread(values[row, column][:seeds]) for column in columns]
        means = [float("nan") if mean is None else mean for mean, _ in points]
        if any(mean is not None for mean, _ in points):
            curves[row] = columns, means, [spread or 0 for _, spread in points]
    return Measured(values, draw=partial(pictures.draw_lines, lines={"": curves},
                                         labels=(label, "accuracy, %")))


def targets_of(name: str, lines: Lines, args: Namespace) -> list[float]:
    """Target accuracy on a data set per seed, in percent."""
    if args.scale == "paper":
        return [TARGETS[name]] * args.seeds
    return [0.9 * line["accuracy"][-1] for line in lines.get(("FedAvg", f"{name}, Non-IID"), [])]


def with_rounds(table: Mapping, lines: Lines, args: Namespace) -> Measured:
    """Accuracies, and per data set the rounds to the target and the speed-up over FedAvg."""
    values, texts = final(table, lines, args).values, []
    for name in TARGETS:
        targets, column = targets_of(name, lines, args), f"{name}, round"
        if not targets:
            continue
        texts.append(f"{name} {statistics.mean(targets):.1f}")

        # First round at the target
        for row in table["rows"]:
            values[row, column] = [
                analysis.rounds_to_target(line["rounds"], line["accuracy"], target)
                for line, target in zip(lines[row, f"{name}, Non-IID"], targets)]

        # Speed-up, over the seeds that all methods have, if both reach the target with each
        common = of_common_seeds(values)
        for row in table["rows"]:
            pairs = list(zip(*(common.get((one, column), []) for one in ("FedAvg", row))))
            if pairs and not any(None in pair for pair in pairs):
                values[row, f"{name}, speed"] = [
                    analysis.speed_up(*map(statistics.mean, zip(*pairs)))]
    return Measured(values, [f"Targets, %: {', '.join(texts)} {TARGET_SOURCE}."] if texts else [])


def mean_curves(lines: Lines, weight: float) -> dict[str, dict[str, tuple]]:
    """Column -> row -> rounds, mean accuracy and its standard deviation over seeds, smoothed."""
    panels: dict[str, dict] = {}
    for (row, column), runs in lines.items():
        per_seed = [analysis.smoothed(line["accuracy"], weight) for line in runs]
        means, spreads = zip(*map(mean_and_spread, zip(*per_seed)))
        panels.setdefault(column, {})[row] = runs[0]["rounds"], means, [one or 0 for one in spreads]
    return panels


def curves(table: Mapping, lines: Lines, args: Namespace, weight: float = analysis.SMOOTHING,
           goal: str = "") -> Measured:
    """Final accuracies and smoothed curves, with the target on a data set if one is named."""
    common, targets, ends = of_common_seeds(lines), {}, {}
    counts = " or ".join(sorted({str(len(runs)) for runs in common.values()}))
    smoothing = f", smoothed exponentially with weight {weight} (not given in the papers)"
    notes = [f"Curves are means over the seeds that all methods of a panel have ({counts}), with a "
             f"band of one standard deviation{smoothing * (weight > 0)}."]

    # Target of FedIN's Fig. 5
    if goal and (per_seed := targets_of(goal, common, args)):
        targets[f"{goal}, Non-IID"] = statistics.mean(per_seed)
        notes.append(f"Target: {statistics.mean(per_seed):.1f} % {TARGET_SOURCE}.")

    # Accuracy after the stages that follow AP-FL's last round
    for (row, column), runs in common.items():
        if row == "AP-FL":
            ends[column, row] = statistics.mean(line["result"]["accuracy"] for line in runs)
    if ends:
        notes.append("AP-FL's line covers FedAvg's, since their rounds are equal.")
    return Measured(final(table, lines, args).values, notes, partial(
        pictures.draw_lines, lines=mean_curves(common, weight), targets=targets, ends=ends,
        labels=("round", "smoothed " * (weight > 0) + "accuracy, %")))


def overheads(table: Mapping, lines: Lines, args: Namespace) -> Measured:
    """Cost of a method, by rule for the paper's networks and as measured (FedIN, Table 4)."""
    values, rules = {}, analysis.costs_by_rule()
    for (row, column), runs in lines.items():
        settings = run.resolve(flags_of(table, cells(table)[row, column], args, 0))
        updates = run.num_participants(settings) * settings["rounds"]
        millions, mib = rules[row]
        values[row, "parameters sent, M"], values[row, "memory by rule, MiB"] = [millions], [mib]
        values[row, "measured: upload per update, MB"] = [
            line["result"]["upload_mb"] / updates for line in runs]
        values[row, "measured: peak of the process, MB"] = [
            line["result"]["memory_mb"] for line in runs if "memory_mb" in line["result"]]
    return Measured(values, [
        "By rule: the paper's networks for ten classes and colour images. The paper's 16.29 is of "
        "HeteroFL's networks for 1000 classes; for ten it is 15.51. Memory is the state of one "
        "client per network (HeteroFL, FedRolex: of the whole ResNet152), times a method's copies.",
        "Measured: with the networks of this scale. A peak is of a whole run, with library and "
        "data."])


def of_networks(function: str, table: Mapping, lines: Lines, args: Namespace,
                **options: object) -> Measured:
    """Measure the networks of runs by a function of analysis.py."""
    folders = {key: RUNS / args.scale / runs[0]["id"] for key, runs in lines.items() if runs}
    options |= experiments.SCALES[args.scale].get(function, {})
    return getattr(analysis, function)(folders, data_dir=args.data_dir, **options)


def dealt_classes(table: Mapping, lines: Lines, args: Namespace) -> Measured:
    """Classes and images of each client with --missing-classes 0.2 on CIFAR-10 (AP-FL, Table 1)."""
    cell = {"method": "fedavg", **experiments.CIFAR}
    flags = flags_of(table, cell, args, 0)
    split = partitions.split_data(data.load(flags["dataset"], args.data_dir), 10, 0,
                                  train_images=flags.get("train_images"), missing_classes=0.2)
    counts = torch.stack([split.data.y_train[part].bincount(minlength=10) for part in split.parts])
    values = {(f"client {client}", "classes"): [" ".join(map(str, row.nonzero()[:, 0].tolist()))]
              for client, row in enumerate(counts)}
    return Measured(values, substitutions(table, [cell], args), partial(
        pictures.draw_maps, maps={"": counts.double()}, names=[row for row, _ in values],
        labels=("class", "", "training images")))


# ----------------------------------------------------------------------- Markdown, CSV and pictures

def papers_numbers() -> dict[str, Papers]:
    """Table -> the paper's numbers (apfl-1: classes of clients), from results/papers.csv."""
    tables: dict[str, dict] = {}
    with open(PAPERS, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            value, spread = line["value"], line["deviation"]
            number = float(value) if re.fullmatch(r"[\d.]+", value) else value
            tables.setdefault(line["table"], {})[line["row"], line["column"]] = (
                number, float(spread) if spread else None, value + f" ± {spread}" * bool(spread))
    return tables


def cell_text(key: Key, values: Values, papers: Papers) -> str:
    """A cell in Markdown: the paper's number if the table has any, a slash, ours."""
    per_seed, (*_, paper_text) = values.get(key, []), papers.get(key, ("",))
    text = pictures.number_text(*mean_and_spread(per_seed), paper_text)
    reached = sum(value is not None for value in per_seed)
    if 0 < reached < len(per_seed):  # not every seed reached the target
        text += f" ({reached} of {len(per_seed)})"
    return f"{paper_text or '–'} / {text}" if papers else text


def markdown(name: str, table: Mapping, values: Values, papers: Papers,
             notes: Sequence[str]) -> str:
    """A table as Markdown, with notes above it and its picture below."""
    # Seeds of a column, in its head
    shown = of_common_seeds(values)
    heads = {column: column for _, column in values}
    heads |= {column: f"{column} ({seeds_text(len(per_seed))})"
              for (_, column), per_seed in shown.items() if column in table["columns"]}

    # Numbers, transposed if there are many columns
    grid = [["", *heads.values()]]
    for row in dict.fromkeys(row for row, _ in values):
        grid.append([row, *(cell_text((row, column), shown, papers) for column in heads)])
    if len(heads) > 12:
        grid = list(zip(*grid))
    grid.insert(1, ["---"] * len(grid[0]))
    text = "\n".join("| " + " | ".join(line) + " |" for line in grid)

    # Remarks
    spread = ", mean ± standard deviation" * any(len(each) > 1 for each in shown.values())
    remarks = [f"Every cell: {'the paper / ours' if papers else 'ours'}{spread}, over the seeds "
               "that all rows of its column have."]
    if pairs := [f"{column} {alike} of {total}"
                 for column, (alike, total) in agreement(values, papers).items()]:
        remarks.append("Pairs of rows in the paper's order (ties are not), over the seeds of both: "
                       + "; ".join(pairs) + ".")
    return "\n\n".join([f"# {table['title']}", *notes, text, *remarks,
                        f"![{table['title']}]({name}.png)"]) + "\n"


def seeds_text(count: int) -> str:
    """Seeds 0, 1, ... in words."""
    return "seed 0" if count == 1 else f"seeds 0-{count - 1}"


def notes_of(table: Mapping, lines: Lines, args: Namespace) -> list[str]:
    """Sentences on scale, command, code and machines, and on differences."""
    # Scale
    scale, setting = experiments.SCALES[args.scale], table["setting"]
    used = [cell for key, cell in cells(table).items() if lines[key]]
    parts = [setting, *sorted({f"method {cell['method']}" for cell in used})]
    flags = [f"{flag} {value}" for part in parts for flag, value in scale.get(part, {}).items()]
    notes = [f"Scale **{args.scale}**: `--setting {setting}` with "
             f"{', '.join(dict.fromkeys(flags)) or 'nothing else'}."]

    # Command; runs by commit, those of other code than this by name; machines
    runs = {line["id"]: line for per_seed in lines.values() for line in per_seed}.values()
    counts, today = Counter(line["commit"] for line in runs), files.commit()
    origin = "; ".join(f"{count} of commit {name}" + " (other code than now)" * (name != today)
                       for name, count in sorted(counts.items())) or "none"
    machines = "; ".join(sorted({line["machine"] for line in runs})) or "none"
    analyses = f" Analyses of commit {today} on {files.machine()}." if table.get("networks") else ""
    notes.append(f"`{args.command}`. Runs: {origin}. Machines: {machines}.{analyses}")
    return notes + substitutions(table, used, args)


def substitutions(table: Mapping, used: Sequence[Mapping], args: Namespace) -> list[str]:
    """Sentences on data sets, networks and embeddings that are not those of the cells."""
    notes: dict[str, None] = {}
    for cell in used:
        asked, given = {"semantics": "clip", **cell}, flags_of(table, cell, args, 0)
        for name in ("dataset", "semantics"):
            if given.get(name, asked[name]) != asked[name]:
                notes[f"In place of --{name} {asked[name]}: {Path(given[name]).name}."] = None
        if given.get("model") == "resnet18-widths":
            notes["HeteroFL, FedRolex, ScaleFL: resnet18-widths (paper: ResNet152)."] = None
    return list(notes)


def lacking_runs(lines: Lines, seeds: int) -> list[str]:
    """Sentences on cells without runs, and on cells with fewer seeds than others."""
    kinds = {"Without runs": [" / ".join(key) for key, runs in lines.items() if not runs],
             f"Fewer than {seeds} seeds": [
                 f"{' / '.join(key)} ({seeds_text(len(runs))})" for key, runs in lines.items()
                 if 0 < len(runs) < seeds]}
    return [f"{kind}: {', '.join(texts[:6])}"
            + (f" and {len(texts) - 6} more" if len(texts) > 6 else "") + "."
            for kind, texts in kinds.items() if texts]


def csv_text(name: str, values: Values, papers: Papers, scale: str) -> str:
    """A table as CSV, a line per cell: the paper's number, ours, and every seed's."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "scale", "row", "column", "paper", "paper deviation", "mean",
                     "deviation", "by seed"])
    writer.writerows([name, scale, *key, *papers.get(key, (None, None))[:2],
                      *mean_and_spread(per_seed), " ".join(map(str, per_seed))]
                     for key, per_seed in values.items())
    return file.getvalue()


def draw_values(values: Values, papers: Papers, path: Any, title: str) -> None:
    """Draw the paper's numbers and ours, a panel per column."""
    units = {"round": "rounds to the target", "speed": "times as fast as FedAvg", "M": "millions",
             "MB": "MB", "MiB": "MiB", "GiB": "GiB"}
    columns: dict[str, dict] = {}
    for (row, column), per_seed in values.items():
        paper, *_ = papers.get((row, column), (None,))
        columns.setdefault(column, {})[row] = paper, *mean_and_spread(per_seed)
    labels = {column: units.get(column.rpartition(", ")[2], "accuracy, %") for column in columns}
    pictures.draw_numbers(path, columns, labels, title)


# --------------------------------------------------------------------------------- the command line

REPORTS = {function.__name__: function for function in (
    final, swept, with_rounds, curves, overheads, dealt_classes)}


def report(name: str, table: Mapping, args: Namespace) -> str:
    """Write a table's Markdown, CSV and picture to results/SCALE; returns the Markdown."""
    # Lines of seeds 0, 1, ..., up to the first that lacks
    made, networks = experiments.runs_of(table, args), table.get("networks", False)
    known = collect(made, args.scale)
    usable = {run_id for run_id in known
              if not networks or is_finished(RUNS / args.scale / run_id)}
    lines = {key: [known[run_id] for run_id in takewhile(usable.__contains__, runs)]
             for key, runs in made.items()}
    if made and not any(lines.values()):
        return f"{name}: no run is finished" + " whose networks are here" * networks

    # Numbers
    function, options = table.get("report", ("final", {}))
    papers = papers_numbers().get(table.get("papers", name), {})
    measure = partial(of_networks, function) if networks else REPORTS[function]
    values, remarks, draw = measure(table, lines, args, **options)
    notes = [*notes_of(table, lines, args),
             *lacking_runs(lines, max(map(len, made.values()), default=0)), *remarks]
    text = markdown(name, table, values, papers, notes)

    # Files
    path = RESULTS / args.scale / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    path.with_suffix(".csv").write_text(csv_text(name, values, papers, args.scale), "utf-8")
    if any(values.values()):
        draw = draw or partial(draw_values, of_common_seeds(values), papers)
        draw(path.with_suffix(".png"), title=f"{table['title']} (scale: {args.scale})")
    return text


def write_tables(args: Namespace) -> int:
    """Write the chosen tables and print them; returns the exit status, 1 if one fails."""
    status = 0
    for name, table in args.tables.items():
        try:
            print(f"\n{report(name, table, args)}", flush=True)
        except Exception as error:  # an error of any kind leaves the others to be made
            print(f"\n{name}: {type(error).__name__}: {data.first_line(error)}", flush=True)
            status = 1
    if (RESULTS / args.scale).exists():
        print(f"results are in {RESULTS / args.scale}")
    return status


def parser(script: str, docstring: str | None) -> ArgumentParser:
    """Command line of tables and scales, to which a script adds its own flags."""
    made = ArgumentParser(script, allow_abbrev=False, description=(docstring or "").split("\n")[0])
    made.error = run.raise_usage_error
    made.add_argument("names", nargs="*", metavar="NAME", help="fedin-1, apfl-fig4, ...; fedin-2 "
                      "is fedin-2a and fedin-2b; or all")
    made.add_argument("--scale", choices=experiments.SCALES, default="smoke", help="rounds, "
                      "clients, epochs and images; smoke (default) is a trial on digits")
    made.add_argument("--seeds", type=run.number(int, 1), metavar="N", help="seeds 0 to N - 1 per "
                      "run (default: by scale; 1 for figures that need networks)")
    made.add_argument("--data-dir", default="data", help="folder of downloads, and of your own "
                      "embeddings-ENCODER-DATASET.npz (classes, embeddings) for clip, bert or "
                      "word2vec (default: data)")
    return made


def read_arguments(made: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Read a command line and choose its tables.  Raises ValueError if it is wrong."""
    args = made.parse_args(words)
    args.command = shlex.join(["python", made.prog, *words])
    args.seeds = experiments.SEEDS[args.scale] if args.seeds is None else args.seeds
    args.tables = chosen(args.names, args.scale)
    return args


def chosen(names: Sequence[str], scale: str) -> dict[str, dict]:
    """Tables with these names, or these and letters (fedin-2: fedin-2a), in their own order."""
    tables, matching = experiments.tables(scale), set()
    for name in names:
        pattern = ".*" if name == "all" else re.escape(name) + "[a-z]*"
        keys = {key for key in tables if re.fullmatch(pattern, key)}
        if not keys:
            raise ValueError(f"unknown name {name} at scale {scale}: choose among "
                             f"{', '.join(tables)}, or all")
        matching |= keys
    return {name: table for name, table in tables.items() if name in matching}


def ends_in_one_line(work: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Do the work of a script: status 0, 1 if a part failed, 2 for a user error, 130 if stopped."""
    try:
        return work(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("error: interrupted: type the same command to resume", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(files.one_line(f"error: {error}"), file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables of finished runs; see ends_in_one_line for the status."""
    return ends_in_one_line(
        lambda words: write_tables(read_arguments(parser("report.py", __doc__), words)), argv)


if __name__ == "__main__":
    sys.stdout, sys.stderr = pictures.Display(sys.stdout), pictures.Display(sys.stderr)
    sys.exit(main())
