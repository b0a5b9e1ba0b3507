"""Pictures and text for the numbers of runs, from the runs themselves or from saved files."""

import math
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
from torch import Tensor
from tqdm import tqdm

SHEET_ROWS = 26  # classes per column of a sheet of samples
PANELS = 4  # panels per row
DPI = 120
# Okabe and Ito's colours, for the colour-blind too; dashed lines double the number of methods
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES, MARKERS = ("-", "--"), "os^Dv<>"

Line = tuple[Sequence, Sequence[float], Sequence[float] | None]  # x, y, its standard deviation

# ---------------------------------------------------------------------------- figures and their end

def new_figure(width: float, height: float):
    """An empty figure, in inches; the first one imports matplotlib, which takes long."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(names: Sequence[str], size: tuple[float, float], margin: tuple[float, float],
           columns: int = PANELS, **shared: object) -> tuple:
    """A figure with a panel per name, and its axes by name, each with the name above it.

    size, margin: (width, height) per panel and around all panels, in inches
    """
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(margin[0] + columns * size[0], margin[1] + rows * size[1])
    grid = figure.subplots(rows, columns, squeeze=False, **shared).flatten()
    for axes in grid[len(names):]:
        axes.remove()
    for name, axes in zip(names, grid):
        axes.set_title(name, fontsize=9, parse_math=False)
    return figure, dict(zip(names, grid))


def finish(figure, path: Path | BinaryIO, title: str, legend: str | None = None) -> None:
    """Add a title, and one legend of all panels at a place, and write the figure as PNG."""
    handles = {name: handle for axes in figure.axes
               for handle, name in zip(*axes.get_legend_handles_labels())}
    if legend is not None and len(handles) > 1:
        columns = {"ncols": len(handles)} if "lower" in legend else {}
        figure.legend(handles.values(), handles.keys(), loc=legend, **columns)

    # Some 11 letters of the title fit into an inch.
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())), parse_math=False)

    # matplotlib would warn of each letter that its font lacks.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(path, dpi=DPI, format="png")


# -------------------------------------------------------------------------------- pictures of a run

def draw_curves(path: Path | BinaryIO, history: Sequence[Mapping], title: str) -> None:
    """Accuracy and loss against rounds; in asynchronous runs against the virtual clock too.

    history: entries of metrics.jsonl
    Stars are accuracies after the stages that follow the last round.
    """
    figure, last = new_figure(9, 3.6), history[-1]
    left, right = figure.subplots(1, 2)
    rounds = [entry["round"] for entry in history]
    style = {"marker": "o" if len(rounds) <= 30 else None, "markersize": 3}

    # Accuracies
    labels = {"accuracy": "whole test set", "personal_accuracy": "own test share"}
    if "full_accuracy" in last:
        labels["full_accuracy"] = "whole test set, whole network"
    for (name, label), colour in zip(labels.items(), ("C0", "C1", "C2")):
        left.plot(rounds, [entry.get(f"global_{name}", entry[name]) for entry in history],
                  label=label, color=colour, **style)
        if "global_accuracy" in last:
            left.plot(rounds[-1], last[name], "*", markersize=10, color=colour, clip_on=False,
                      label=f"{label}, at the end")

    # Loss, and the axes of both
    right.plot(rounds, [entry["loss"] for entry in history], label="training images", color="C3",
               **style)
    left.set(xlabel="round", ylabel="accuracy, %")
    right.set(xlabel="round", ylabel="cross entropy")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if "staleness_mean" in last:
            add_clock(axes, rounds, [entry["clock"] for entry in history])
    finish(figure, path, title)


def add_clock(axes, rounds: Sequence[int], clock: Sequence[float]) -> None:
    """Add a scale of the virtual clock above axes over rounds."""
    rounds, clock = [0, *rounds], [0.0, *clock]
    axes.set_xlim(0, rounds[-1])  # no margins, for which the clock is not known
    to_clock = partial(np.interp, xp=rounds, fp=clock)
    to_round = partial(np.interp, xp=clock, fp=rounds)
    axes.secondary_xaxis("top", functions=(to_clock, to_round)).set_xlabel("virtual clock")


def draw_samples(path: Path | BinaryIO, images: Tensor, names: Sequence[str],
                 seen: Sequence[bool], title: str) -> None:
    """Images (classes, samples, C, H, W) uint8, a row per class; unseen classes are marked."""
    # A strip (H, samples * W, C) per class
    samples, size = images.shape[1], images.shape[3]
    strips = images.permute(0, 3, 1, 4, 2).reshape(len(names), size, samples * size, -1)
    starts = range(0, len(names), SHEET_ROWS)
    figure = new_figure(5.5 * len(starts), 0.8 + 0.45 * min(SHEET_ROWS, len(names)))

    # Columns of at most SHEET_ROWS strips
    for axes, start in zip(figure.subplots(1, len(starts), squeeze=False)[0], starts):
        labels = range(start, min(start + SHEET_ROWS, len(names)))
        column = strips[start:start + SHEET_ROWS].flatten(0, 1).squeeze(-1)
        axes.imshow(column.numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_xticks([])
        texts = [names[label] + ("" if seen[label] else " (unseen)") for label in labels]
        axes.set_yticks([(row + 0.5) * size for row in range(len(labels))], texts, parse_math=False)
        for label, tick in zip(labels, axes.get_yticklabels()):
            tick.set_color("black" if seen[label] else "C3")
    finish(figure, path, title)


def draw_beta(path: Path | BinaryIO, betas: Sequence[float],
              curves: Mapping[tuple[str, str], Sequence[float]], used: float, title: str) -> None:
    """Accuracy of interpolated models against beta of AP-FL, Eq. 10 as printed, 0 to 1.

    curves: ("dropout" or "" for others, "accuracy" or "personal_accuracy") -> percent by beta
    used: beta of the run
    """
    figure = new_figure(5.5, 3.8)
    axes = figure.subplots()
    for (group, name), values in curves.items():
        label = "whole test set" if name == "accuracy" else "own test share"
        if ("dropout", name) in curves:
            label += f", {group or 'client'}s"
        axes.plot(betas, values, marker="o", markersize=3, linestyle="--" if group else "-",
                  color="C0" if name == "accuracy" else "C1", label=label)
    axes.axvline(used, color="gray", linewidth=1, linestyle=":", label=f"this run, {used:g}")
    axes.set(xlabel="beta (0: friend model, 1: client model)", ylabel="accuracy, %")
    axes.legend()
    axes.grid(alpha=0.3)
    finish(figure, path, title)


# ------------------------------------------------------------------------- pictures of several runs

def draw_numbers(path: Path | BinaryIO, numbers: Mapping[str, Mapping[str, tuple]],
                 labels: Mapping[str, str], title: str) -> None:
    """The paper's numbers beside ours: a panel per column of a table, a line per row.

    numbers: column -> row -> (paper, our mean, our standard deviation), each a number or None
    labels: column -> label of its axis
    """
    rows = list(dict.fromkeys(chain.from_iterable(numbers.values())))
    figure, axes_of = panels(list(numbers), (2.2, 0.6 + 0.2 * len(rows)), (2.2, 1.2), sharey=True)
    for column, axes in axes_of.items():
        # Marks
        for height, row in enumerate(rows):
            paper, mean, deviation = numbers[column].get(row, (None, None, None))
            if paper is not None:
                axes.plot(paper, height, "D", color=COLOURS[1], fillstyle="none", label="paper")
            if mean is not None:
                axes.errorbar(mean, height, xerr=deviation, fmt="o", color=COLOURS[0], capsize=3,
                              label="ours")

        # Axes, the first row on top
        axes.set_yticks(range(len(rows)), rows, parse_math=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(labels[column], fontsize=8)
        axes.grid(alpha=0.3)
    finish(figure, path, title, "outside lower right")


def draw_lines(path: Path | BinaryIO, lines: Mapping[str, Mapping[str, Line]], labels: tuple,
               title: str, *, ends: Mapping[tuple[str, str], float] = {},
               targets: Mapping[str, float] = {}) -> None:
    """Panels with several lines each: panel -> line -> (x, y, standard deviation as a band).

    labels: labels of the two axes.  x may be words, which then stand at equal distances
    ends: (panel, line) -> value after the last x, a star;  targets: panel -> level, a dotted line
    """
    names = list(dict.fromkeys(chain.from_iterable(lines.values())))
    figure, axes_of = panels(list(lines), (3.4, 3.4), (2.4, 0))
    for panel, axes in axes_of.items():
        ticks = list(dict.fromkeys(chain.from_iterable(x for x, *_ in lines[panel].values())))
        are_words = isinstance(ticks[0], str)

        # Lines with bands and stars
        for name, (x, y, deviation) in lines[panel].items():
            number = names.index(name)
            style = {"color": COLOURS[number % len(COLOURS)],
                     "linestyle": LINES[number // len(COLOURS) % len(LINES)]}
            x = [ticks.index(word) for word in x] if are_words else x
            axes.plot(x, y, label=name, marker=MARKERS[number % len(MARKERS)], markersize=4,
                      fillstyle="none" if number >= len(COLOURS) else "full", **style)
            if deviation is not None:
                axes.fill_between(x, np.subtract(y, deviation), np.add(y, deviation),
                                  color=style["color"], alpha=0.12, linewidth=0)
            if (panel, name) in ends:
                axes.plot(x[-1], ends[panel, name], "*", markersize=11, color=style["color"])
        if panel in targets:
            axes.axhline(targets[panel], color="gray", linestyle=":", label="target")

        # Axes
        if are_words:
            axes.set_xticks(range(len(ticks)), ticks, parse_math=False)
        elif all(isinstance(tick, int) for tick in ticks):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.grid(alpha=0.3)
    finish(figure, path, title, "outside right")


def draw_maps(path: Path | BinaryIO, maps: Mapping[str, Tensor], names: Sequence[str],
              labels: tuple[str, str, str], title: str, *, columns: int = PANELS,
              limits: tuple[float, float] | None = None) -> None:
    """Matrices as colours, a panel per matrix.

    names: names of the rows;  labels: labels of x, y and the colours;  columns: panels per row
    limits: values of the lowest and the highest colour; None: the least and the greatest value
    """
    low, high = limits or (min(float(values.min()) for values in maps.values()),
                           max(float(values.max()) for values in maps.values()))
    figure, axes_of = panels(list(maps), (3, 3), (2, 0.6), columns)
    for name, axes in axes_of.items():
        image = axes.imshow(maps[name].numpy(), vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(names)), names, fontsize="x-small", parse_math=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=labels[0], ylabel=labels[1])
    figure.colorbar(image, ax=list(axes_of.values()), label=labels[2])
    finish(figure, path, title)


def draw_points(path: Path | BinaryIO, points: Mapping[str, Mapping[str, Tensor]],
                title: str) -> None:
    """Points in the plane, whose axes mean nothing: panel -> kind -> (N, 2)."""
    figure, axes_of = panels(list(points), (3, 3), (1.6, 0.8))
    for panel, axes in axes_of.items():
        for number, (kind, positions) in enumerate(points[panel].items()):
            axes.scatter(*positions.T.numpy(), s=10, marker=MARKERS[number % len(MARKERS)],
                         color=COLOURS[number % len(COLOURS)], label=kind, alpha=0.7, linewidths=0)
        axes.set(xticks=[], yticks=[])
    finish(figure, path, title, "outside right")


def draw_reconstruction(path: Path | BinaryIO, images: Mapping[str, Tensor],
                        losses: Mapping[str, Sequence[float]], title: str) -> None:
    """Rows of images (N, C, H, W) uint8 by name; above them losses against steps, if any."""
    heights = [2.6 if losses else 0.01, 0.9 * len(images)]
    figure = new_figure(8, 0.8 + sum(heights))
    above, below = figure.subfigures(2, 1, height_ratios=heights)

    # Losses
    if losses:
        axes = above.subplots()
        for number, (name, values) in enumerate(losses.items()):
            axes.plot(values, label=name, color=COLOURS[number], linestyle=LINES[number % 2])
        axes.set(xlabel="step of the attacker", ylabel="mean squared error", yscale="log")
        axes.legend()
        axes.grid(alpha=0.3)

    # Images, a strip (H, N * W, C) per name
    grid = below.subplots(len(images), 1, squeeze=False)[:, 0]
    for (name, row), axes in zip(images.items(), grid):
        strip = row.permute(2, 0, 3, 1).flatten(1, 2).squeeze(-1)
        axes.imshow(strip.numpy(), cmap="gray", vmin=0, vmax=255, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center", parse_math=False)
    finish(figure, path, title)


# ------------------------------------------------------------------------------------- the terminal

def nowhere() -> TextIO:
    """A stream that shows nothing."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


class Display:
    """A stream to print on that ends no run, even if it is closed, full or lacks letters."""

    def __init__(self, stream: TextIO | None):
        self.stream = nowhere() if stream is None else stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except (OSError, ValueError):
            self.stream = nowhere()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.stream = nowhere()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)  # isatty, fileno, encoding, ...


def progress_bar(items: Iterable | None, what: str | None, unit: str, total: int | None = None,
                 **options: object) -> tqdm:
    """The same items, with a progress bar on standard output; standard error holds errors alone."""
    return tqdm(items, what, total, unit=f" {unit}", file=sys.stdout, **options)


def partition_table(counts: Sequence[Sequence[int]], archs: Sequence[str], names: Sequence[str],
                    unseen: Sequence[str] = (), dropouts: Sequence[int] = ()) -> str:
    """Client x class counts as a table if it fits on a screen, else the range of client sizes.

    counts: (clients, classes) numbers of images;  archs: network per client;  names: class names
    dropouts: clients that do not take part;  unseen: classes held by dropout clients alone
    """
    # Remarks
    remarks, sizes = [], [sum(row) for row in counts]
    if dropouts:
        remarks.append(f"dropout clients: {', '.join(map(str, dropouts))}; classes held by "
                       f"dropout clients alone: {', '.join(unseen)}")
    absent = sum(not any(column) for column in zip(*counts))
    if absent:
        remarks.append(f"{absent} of {len(names)} classes are held by no client, and their images "
                       "are not used; more --clients hold more classes")
    if len(counts) > 20 or len(names) > 12:
        return "\n".join([f"images per client: {min(sizes)} to {max(sizes)}, mean "
                          f"{sum(sizes) / len(sizes):.0f}", *remarks])

    # Table
    width = max(10, 1 + max(map(len, archs)))
    lines = [f"client  {'network':{width}}{'images':>7}" + "".join(
        f"{name[:6]:>7}" for name in names)]
    for client, (row, arch, size) in enumerate(zip(counts, archs, sizes)):
        cells = "".join(f"{count or '.':>7}" for count in row)
        lines.append(f"{client:>6}  {arch:{width}}{size:>7}{cells}")
    return "\n".join(lines + remarks)


def result_text(result: Mapping) -> str:
    """The content of result.json as sentences."""
    # AP-FL's models after the last round; clients without test images have no personal accuracy
    lines = []
    for prefix, clients in (("", ""), ("dropout_", "dropout clients' ")):
        for kind in ("client", "friend", "personalised"):
            whole = result.get(f"{prefix}{kind}_accuracy")
            personal = result.get(f"{prefix}{kind}_personal_accuracy")
            if whole is not None:
                share = "-" if personal is None else f"{personal:.2f} %"
                lines.append(f"{clients}{kind} models: {whole:.2f} % of the whole test set, "
                             f"{share} of their own test shares")
    if "harmonic_accuracy" in result:
        lines.append(f"dropout clients: {result['seen_accuracy']:.2f} % of the seen classes, "
                     f"{result['unseen_accuracy']:.2f} % of the unseen ones, harmonic mean "
                     f"{result['harmonic_accuracy']:.2f} %")

    # All methods
    final = f"accuracy {result['accuracy']:.2f} %"
    if "global_accuracy" in result:
        final += f"; global model {result['global_accuracy']:.2f} %"
    lines.append(f"{final} after {result['rounds']} rounds (best {result['best_accuracy']:.2f} % "
                 f"in round {result['best_round']}, mean of the last ten evaluations "
                 f"{result['last10_accuracy']:.2f} %)")
    if "full_accuracy" in result:
        lines.append(f"whole network: {result['full_accuracy']:.2f} %")
    lines.append(f"{result['seconds']:.0f} s, {result['images_per_second']:.0f} training images "
                 f"per second, {result['upload_mb']:.1f} MB uploaded, {result['download_mb']:.1f} "
                 "MB downloaded")
    return "\n".join(lines)
