"""What a run shows of its numbers, which may come from saved files too: pictures and text."""

import io
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
from torch import Tensor
from tqdm import tqdm

SHEET_ROWS = 26  # classes in a column of a sheet of samples
PANELS = 4  # beside each other
DPI = 120
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and
# Ito's, which the colour-blind can tell apart; with LINES and MARKERS for twice as many methods
LINES, MARKERS = ("-", "--"), "os^Dv<>"

Line = tuple[Sequence, Sequence[float], Sequence[float] | None]  # x, y, and its deviation, if any

# ----------------------------------------------------------------------------------------- pictures

def new_figure(width: float, height: float):
    """An empty figure of so many inches; matplotlib is loaded when the first is made."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path | BinaryIO) -> None:
    """Write a figure as PNG; letters that the font lacks are boxes, without a warning of each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(path, dpi=DPI, format="png")


def draw_curves(path: Path | BinaryIO, history: Sequence[Mapping], title: str) -> None:
    """A picture of accuracy and loss against rounds, of asynchronous runs against the clock too.

    history: the lines of metrics.jsonl
    Accuracies after the stages that follow the last round are marks of their own.
    """
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    rounds, last = [entry["round"] for entry in history], history[-1]
    marker = "o" if len(rounds) <= 30 else None
    shown = [("accuracy", "whole test set", "C0"), ("personal_accuracy", "own share of it", "C1")]
    if "full_accuracy" in last:
        shown.append(("full_accuracy", "whole test set, whole network", "C2"))
    for name, label, colour in shown:
        left.plot(rounds, [entry.get(f"global_{name}", entry[name]) for entry in history],
                  marker=marker, markersize=3, label=label, color=colour)
        if "global_accuracy" in last:
            left.plot(rounds[-1], last[name], "*", markersize=10, color=colour, clip_on=False,
                      label=f"{label}, at the end")
    right.plot(rounds, [entry["loss"] for entry in history], marker=marker, markersize=3,
               label="training images", color="C3")
    left.set(xlabel="round", ylabel="accuracy, %")
    right.set(xlabel="round", ylabel="cross entropy")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if "staleness_mean" in last:
            axes.set_xlim(0, rounds[-1])  # where the two scales can be told apart from margins
            clock = [0.0, *(entry["clock"] for entry in history)]
            above = axes.secondary_xaxis("top", functions=(
                partial(np.interp, xp=[0, *rounds], fp=clock),
                partial(np.interp, xp=clock, fp=[0, *rounds])))
            above.set_xlabel("virtual clock")
    figure.suptitle(title, parse_math=False)
    save(figure, path)


def draw_samples(path: Path | BinaryIO, images: Tensor, names: Sequence[str],
                 seen: Sequence[bool], title: str) -> None:
    """A sheet of images, a row a class; classes that are not seen are marked.

    images: (classes, samples, C, H, W) uint8
    """
    samples, size = images.shape[1], images.shape[3]
    strips = images.permute(0, 3, 1, 4, 2).reshape(len(names), size, samples * size, -1)
    starts = range(0, len(names), SHEET_ROWS)
    figure = new_figure(5.5 * len(starts), 0.8 + 0.45 * min(SHEET_ROWS, len(names)))
    for axes, start in zip(figure.subplots(1, len(starts), squeeze=False)[0], starts):
        block = strips[start:start + SHEET_ROWS]
        axes.imshow(block.flatten(0, 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_xticks([])
        shown = range(start, start + len(block))
        axes.set_yticks([(row + 0.5) * size for row in range(len(block))], [
            names[label] + ("" if seen[label] else " (unseen)") for label in shown],
            parse_math=False)
        for label, tick in zip(shown, axes.get_yticklabels()):
            tick.set_color("black" if seen[label] else "C3")
    figure.suptitle(title, parse_math=False)
    save(figure, path)


def draw_beta(path: Path | BinaryIO, betas: Sequence[float],
              curves: Mapping[tuple[str, str], Sequence[float]], used: float, title: str) -> None:
    """Accuracy of interpolated models against beta of AP-FL's Eq. 10 as printed, 0 to 1.

    curves: (whose, "accuracy" or "personal_accuracy") -> percent at each beta; "dropout" clients
        apart from the others, "";  used: the beta of the run
    """
    figure = new_figure(5.5, 3.8)
    axes = figure.subplots()
    for (group, name), values in curves.items():
        axes.plot(betas, values, marker="o", markersize=3,
                  linestyle="--" if group else "-", color="C0" if name == "accuracy" else "C1",
                  label=("whole test set" if name == "accuracy" else "own share of it")
                  + (f", {group or 'client'}s" if ("dropout", name) in curves else ""))
    axes.axvline(used, color="gray", linewidth=1, linestyle=":", label=f"this run, {used:g}")
    axes.set(xlabel="beta, the weight of the client's model (0: friend model)",
             ylabel="accuracy, %")
    axes.set_title(title, parse_math=False)
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


def panels(figure, names: Sequence[str], columns: int = PANELS, **shared: object) -> dict:
    """Axes by name, so many in a line, each with its name above it."""
    columns = min(columns, len(names))
    grid = figure.subplots(-(-len(names) // columns), columns, squeeze=False, **shared).flatten()
    for axes in grid[len(names):]:
        axes.remove()
    for name, axes in zip(names, grid):
        axes.set_title(name, fontsize=9, parse_math=False)
    return dict(zip(names, grid))


def finish(figure, path: Path | BinaryIO, title: str, place: str | None = None) -> None:
    """Add a title and one legend for all panels, and save.  place: of the legend, None: none"""
    found = {name: handle for axes in figure.axes
             for handle, name in zip(*axes.get_legend_handles_labels())}
    if place is not None and len(found) > 1:
        beside = {"ncols": len(found)} if "lower" in place else {}
        figure.legend(found.values(), found.keys(), loc=place, **beside)
    width = int(11 * figure.get_figwidth())  # letters that fit
    figure.suptitle(textwrap.fill(title, width), parse_math=False)
    save(figure, path)


def draw_numbers(path: Path | BinaryIO, numbers: Mapping[str, Mapping[str, tuple]],
                 labels: Mapping[str, str], title: str) -> None:
    """A panel a column of a table, a line a row of it, with the paper's number and ours.

    numbers: column -> row -> (the paper's or None, our mean or None, our deviation or None)
    labels: column -> what its numbers are
    """
    rows = list(dict.fromkeys(row for column in numbers.values() for row in column))
    lines = -(-len(numbers) // PANELS)
    figure = new_figure(2.2 + 2.2 * min(PANELS, len(numbers)),
                        1.2 + lines * (0.6 + 0.2 * len(rows)))
    for column, axes in panels(figure, list(numbers), sharey=True).items():
        for place, row in enumerate(rows):
            paper, mean, deviation = numbers[column].get(row, (None, None, None))
            if paper is not None:
                axes.plot(paper, place, "D", color=COLOURS[1], fillstyle="none", label="paper")
            if mean is not None:
                axes.errorbar(mean, place, xerr=deviation, fmt="o", color=COLOURS[0], capsize=3,
                              label="ours")
        axes.set_yticks(range(len(rows)), rows, parse_math=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(labels[column], fontsize=8)
        axes.grid(alpha=0.3)
    finish(figure, path, title, "outside lower right")


def draw_lines(path: Path | BinaryIO, lines: Mapping[str, Mapping[str, Line]], labels: tuple,
               title: str, *, ends: Mapping[tuple[str, str], float] = {},
               targets: Mapping[str, float] = {}) -> None:
    """A panel with several lines each: panel -> line -> x, y and deviation, a band.

    labels: of the axes.  x may be words, which then stand at equal distances
    ends: (panel, line) -> a value that it jumps to at the end, a star;  targets: panel -> a level
    """
    names = list(dict.fromkeys(name for panel in lines.values() for name in panel))
    figure = new_figure(2.4 + 3.4 * min(PANELS, len(lines)), 3.4 * -(-len(lines) // PANELS))
    for panel, axes in panels(figure, list(lines)).items():
        words = list(dict.fromkeys(word for x, *_ in lines[panel].values() for word in x))
        for name, (x, y, deviation) in lines[panel].items():
            number = names.index(name)
            style = {"color": COLOURS[number % len(COLOURS)],
                     "linestyle": LINES[number // len(COLOURS) % len(LINES)]}
            at = [words.index(word) for word in x] if isinstance(x[0], str) else x
            axes.plot(at, y, marker=MARKERS[number % len(MARKERS)], markersize=4,
                      fillstyle="none" if number >= len(COLOURS) else "full", label=name, **style)
            if at is not x:
                axes.set_xticks(range(len(words)), words, parse_math=False)
            if deviation is not None:
                low, high = (np.add(y, sign * np.asarray(deviation)) for sign in (-1, 1))
                axes.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
            if (panel, name) in ends:
                axes.plot(at[-1], ends[panel, name], "*", markersize=11, color=style["color"])
        if panel in targets:
            axes.axhline(targets[panel], color="gray", linestyle=":", label="target")
        if all(isinstance(value, int) for x, *_ in lines[panel].values() for value in x):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.grid(alpha=0.3)
    finish(figure, path, title, "outside right")


def draw_maps(path: Path | BinaryIO, maps: Mapping[str, Tensor], names: Sequence[str],
              labels: tuple[str, str, str], title: str, *, columns: int = PANELS,
              limits: tuple[float, float] | None = None) -> None:
    """Matrices as colours, a panel each: a row and a column a client for CKA.

    names: of the rows;  labels: of the axes and of the colours;  columns: panels beside each other
    limits: values of the lowest and the highest colour, else the least and the greatest
    """
    low, high = limits or (min(float(each.min()) for each in maps.values()), max(
        float(each.max()) for each in maps.values()))
    columns = min(columns, len(maps))
    figure = new_figure(2 + 3 * columns, 0.6 + 3 * -(-len(maps) // columns))
    axes_of = panels(figure, list(maps), columns)
    for name, axes in axes_of.items():
        shown = axes.imshow(maps[name].numpy(), vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(names)), names, fontsize="x-small", parse_math=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=labels[0], ylabel=labels[1])
    figure.colorbar(shown, ax=list(axes_of.values()), label=labels[2])
    finish(figure, path, title)


def draw_points(path: Path | BinaryIO, points: Mapping[str, Mapping[str, Tensor]],
                title: str) -> None:
    """Points in the plane, whose axes mean nothing: panel -> kind -> (N, 2)."""
    figure = new_figure(1.6 + 3 * min(PANELS, len(points)), 0.8 + 3 * -(-len(points) // PANELS))
    for panel, axes in panels(figure, list(points)).items():
        for number, (kind, at) in enumerate(points[panel].items()):
            axes.scatter(*at.T.numpy(), s=10, marker=MARKERS[number % len(MARKERS)],
                         color=COLOURS[number % len(COLOURS)], label=kind, alpha=0.7, linewidths=0)
        axes.set(xticks=[], yticks=[])
    finish(figure, path, title, "outside right")


def draw_reconstruction(path: Path | BinaryIO, images: Mapping[str, Tensor],
                        losses: Mapping[str, Sequence[float]], title: str) -> None:
    """Rows of images (N, C, H, W) uint8 by what they are, below losses against steps, if any."""
    figure = new_figure(8, 0.8 + 0.9 * len(images) + (2.6 if losses else 0))
    above, below = figure.subfigures(2, 1, height_ratios=[2.6 if losses else 0.01,
                                                          0.9 * len(images)])
    if losses:
        axes = above.subplots()
        for number, (name, values) in enumerate(losses.items()):
            axes.plot(values, color=COLOURS[number], linestyle=LINES[number % len(LINES)],
                      label=name)
        axes.set(xlabel="step of the attacker's optimiser", ylabel="mean squared error",
                 yscale="log")
        axes.legend()
        axes.grid(alpha=0.3)
    strips = [part.permute(2, 0, 3, 1).flatten(1, 2).squeeze(-1).numpy()
              for part in images.values()]
    grid = below.subplots(len(images), 1, squeeze=False)[:, 0]
    for name, strip, axes in zip(images, strips, grid):
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center", parse_math=False)
    finish(figure, path, title)


# ------------------------------------------------------------------------------------- the terminal

def nowhere() -> TextIO:
    """A stream that shows nothing."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


class Display(io.TextIOBase):
    """A stream to print on that never ends a run; what it cannot encode is replaced.

    Once it is closed, gone or full, nothing is shown any more.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = nowhere() if stream is None else stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self.stream.flush())

    def _try(self, work: Callable) -> None:
        try:
            work()
        except (OSError, ValueError):
            self.stream = nowhere()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:
        return self.stream.encoding


def watch(items: Iterable | None, what: str | None, unit: str, total: int | None = None,
          **options: object) -> tqdm:
    """The same items, with a progress bar on standard output; standard error holds errors alone."""
    return tqdm(items, what, total, unit=f" {unit}", file=sys.stdout, **options)


def table(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """Columns of these widths, each row of as many lines as its cells need."""
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, width, break_on_hyphens=False)
                 for cell, width in zip(row, widths)]
        lines += ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip()
                  for line in zip_longest(*cells, fillvalue="")] + [""]
    return "\n".join(lines)


def partition_table(counts: Sequence[Sequence[int]], archs: Sequence[str], names: Sequence[str],
                    unseen: Sequence[str] = (), dropouts: Sequence[int] = ()) -> str:
    """Client x class counts as a table where it fits on a screen, else the range of sizes.

    counts: of each client its images by class;  archs: its network;  names: of the classes
    dropouts: clients that do not take part;  unseen: classes that they alone hold
    """
    notes, sizes = [], [sum(row) for row in counts]
    if dropouts:
        notes.append(f"dropout clients: {', '.join(map(str, dropouts))}, which alone hold "
                     + ", ".join(unseen))
    without = sum(not any(column) for column in zip(*counts))
    if without:
        notes.append(f"{without} of {len(names)} classes are with no client (more --clients hold "
                     "more), and their images are left out")
    if len(counts) > 20 or len(names) > 12:
        return "\n".join([f"images a client: {min(sizes)} to {max(sizes)}, mean "
                          f"{sum(sizes) / len(sizes):.0f}", *notes])
    width = max(10, 1 + max(map(len, archs)))
    lines = [f"client  {'network':{width}}{'images':>7}" + "".join(
        f"{name[:6]:>7}" for name in names)]
    for client, (row, arch, total) in enumerate(zip(counts, archs, sizes)):
        cells = "".join(f"{n or '.':>7}" for n in row)
        lines.append(f"{client:>6}  {arch:{width}}{total:>7}{cells}")
    return "\n".join(lines + notes)


def result_text(result: Mapping) -> str:
    """The content of result.json as sentences."""
    lines = []
    for prefix, whose in (("", ""), ("dropout_", "dropout clients' ")):
        for kind in ("client", "friend", "personalised"):
            name = f"{prefix}{kind}"
            if f"{name}_accuracy" in result:
                own = result[f"{name}_personal_accuracy"]  # None without test images of their own
                lines.append(f"{whose}{kind} models: {result[f'{name}_accuracy']:.2f} % of the "
                             "whole test set, " + ("-" if own is None else f"{own:.2f} %")
                             + " of their own share of it")
    if "harmonic_accuracy" in result:
        lines.append(f"dropout clients: {result['seen_accuracy']:.2f} % of the seen classes, "
                     f"{result['unseen_accuracy']:.2f} % of the unseen ones, harmonic mean "
                     f"{result['harmonic_accuracy']:.2f} %")
    last = result.get("global_accuracy", result["accuracy"])
    rounds = (f"{last:.2f} % after {result['rounds']} rounds (best {result['best_accuracy']:.2f} % "
              f"in round {result['best_round']}, mean of the last ten evaluations "
              f"{result['last10_accuracy']:.2f} %)")
    if "global_accuracy" in result:
        lines.append(f"accuracy {result['accuracy']:.2f} %; of the global model {rounds}")
    else:
        lines.append(f"accuracy {rounds}")
    if "full_accuracy" in result:
        lines.append(f"of the whole network: {result['full_accuracy']:.2f} %")
    lines.append(f"{result['seconds']:.0f} s, {result['images_per_second']:.0f} training images a "
                 f"second, {result['upload_mb']:.1f} MB sent up and {result['download_mb']:.1f} MB "
                 "down")
    stages = [f"{name.removesuffix('_seconds')} {result[name]:.0f} s"
              for name in result if name.endswith("_seconds")]
    if stages:
        lines.append(f"stages after the last round: {', '.join(stages)}")
    return "\n".join(lines)
