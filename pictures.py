"""Pictures and text for the numbers of runs, from the runs themselves or from saved files."""

import math
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial, partialmethod
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
LINES, MARKERS = ("-", "--"), "os^Dv<>"  # a marker per colour
File = Path | BinaryIO

# ---------------------------------------------------------------------------- figures and their end

def new_figure(width: float, height: float):
    """An empty figure, in inches; the first one imports matplotlib, which takes long."""
    try:
        from matplotlib.figure import Figure
    except ValueError:  # MPLBACKEND names a notebook's backend, which is not here; none is needed
        os.environ.pop("MPLBACKEND", None)
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(names: Sequence[str], size: tuple[float, float], margin: tuple[float, float],
           columns: int = PANELS, **shared: object) -> tuple:
    """A figure, and its panels' axes by title; size per panel and margin around all in inches."""
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(margin[0] + columns * size[0], margin[1] + rows * size[1])
    grid = figure.subplots(rows, columns, squeeze=False, **shared).flatten()
    for axes in grid[len(names):]:
        axes.remove()
    for name, axes in zip(names, grid):
        axes.set_title(name, fontsize=9, parse_math=False)
    return figure, dict(zip(names, grid))


def label_axes(axes, x: str, y: str, legend: bool = False, **settings: object) -> None:
    """Name the axes and draw a grid, with a legend inside if wanted."""
    axes.set(xlabel=x, ylabel=y, **settings)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend()


def show_images(axes, images: Tensor, **options: object) -> None:
    """Show images (rows, columns, C, H, W) uint8 side by side, without scales."""
    sheet = images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(-1)
    axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=255, **options)
    axes.set(xticks=[], yticks=[])


def finish(figure, path: File, title: str, legend: str | None = None) -> None:
    """Add a title, and one legend of all panels at a place, and write the figure as PNG."""
    handles = {name: handle for axes in figure.axes
               for handle, name in zip(*axes.get_legend_handles_labels())}
    if legend is not None and len(handles) > 1:
        columns = {"ncols": len(handles)} if "lower" in legend else {}
        figure.legend(handles.values(), handles.keys(), loc=legend, **columns)
    # Some 11 letters of the title fit into an inch.
    lines = textwrap.fill(title, int(11 * figure.get_figwidth()), break_on_hyphens=False)
    figure.suptitle(lines, parse_math=False)
    # matplotlib would warn of each letter that its font lacks.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        figure.savefig(path, dpi=DPI, format="png")


# -------------------------------------------------------------------------------- pictures of a run

def draw_curves(path: File, history: Sequence[Mapping], title: str) -> None:
    """Accuracy and loss per round; stars are accuracies after the stages that follow the rounds."""
    figure, last = new_figure(9, 3.6), history[-1]
    left, right = figure.subplots(1, 2)
    rounds = [entry["round"] for entry in history]
    style = {"marker": "o" if len(rounds) <= 30 else None, "markersize": 3}

    # Accuracies
    labels = {"accuracy": "whole test set", "personal_accuracy": "own test share"}
    if "full_accuracy" in last:
        labels["full_accuracy"] = "whole test set, whole network"
    for (name, label), colour in zip(labels.items(), ("C0", "C1", "C2")):
        values = [entry.get(f"global_{name}", entry[name]) for entry in history]
        left.plot(rounds, values, label=label, color=colour, **style)
        if "global_accuracy" in last:
            left.plot(rounds[-1], last[name], "*", markersize=10, color=colour, clip_on=False,
                      label=f"{label}, at the end")

    # Loss, and the axes of both
    losses = [entry["loss"] for entry in history]
    right.plot(rounds, losses, label="training images", color="C3", **style)
    for axes, label in ((left, "accuracy, %"), (right, "cross entropy")):
        label_axes(axes, "round", label, legend=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if "staleness_mean" in last:
            add_clock(axes, [0, *rounds], [0.0, *(entry["clock"] for entry in history)])
    finish(figure, path, title)


def add_clock(axes, rounds: Sequence[int], clock: Sequence[float]) -> None:
    """Add a scale of an asynchronous run's virtual clock above axes over rounds."""
    axes.set_xlim(0, rounds[-1])  # no margins, for which the clock is not known
    scales = partial(np.interp, xp=rounds, fp=clock), partial(np.interp, xp=clock, fp=rounds)
    axes.secondary_xaxis("top", functions=scales).set_xlabel("virtual clock")


def draw_samples(path: File, images: Tensor, names: Sequence[str],
                 seen: Sequence[bool], title: str) -> None:
    """Images (classes, samples, C, H, W) uint8, a row per class; unseen classes are marked."""
    starts = range(0, len(names), SHEET_ROWS)
    figure = new_figure(5.5 * len(starts), 0.8 + 0.45 * min(SHEET_ROWS, len(names)))
    texts = [name + ("" if is_seen else " (unseen)") for name, is_seen in zip(names, seen)]
    # Columns of at most SHEET_ROWS classes
    for axes, start in zip(figure.subplots(1, len(starts), squeeze=False)[0], starts):
        rows = slice(start, start + SHEET_ROWS)
        show_images(axes, images[rows])
        axes.set_anchor("N")  # the last column may be shorter
        heights = (np.arange(len(images[rows])) + 0.5) * images.shape[3]
        axes.set_yticks(heights, texts[rows], parse_math=False)
        for is_seen, tick in zip(seen[rows], axes.get_yticklabels()):
            tick.set_color("black" if is_seen else "C3")
    finish(figure, path, title)


def draw_beta(path: File, betas: Sequence[float],
              curves: Mapping[tuple[str, str], Sequence[float]], used: float, title: str) -> None:
    """Accuracy of interpolated models against beta of AP-FL, Eq. 10 as printed, 0 to 1.

    curves: ("" or "dropout", "accuracy" or "personal_accuracy") -> percent;  used: the run's beta
    """
    figure = new_figure(5.5, 3.8)
    axes = figure.subplots()
    styles = {"accuracy": ("whole test set", "C0"), "personal_accuracy": ("own test share", "C1")}
    for (group, name), values in curves.items():
        label, colour = styles[name]
        if ("dropout", name) in curves:
            label += f", {group or 'client'}s"
        axes.plot(betas, values, "o--" if group else "o-", markersize=3, color=colour, label=label)
    axes.axvline(used, color="gray", linewidth=1, linestyle=":", label=f"this run, {used:g}")
    label_axes(axes, "beta (0: friend model, 1: client model)", "accuracy, %", legend=True)
    finish(figure, path, title)


# ------------------------------------------------------------------------- pictures of several runs

def draw_numbers(path: File, numbers: Mapping[str, Mapping[str, tuple]],
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


def draw_lines(path: File, lines: Mapping[str, Mapping[str, tuple]], labels: tuple, title: str, *,
               ends: Mapping[tuple, float] = {}, targets: Mapping[str, float] = {}) -> None:
    """Panels of lines: panel -> line -> (x, y, standard deviation of y as a band, or None).

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
            repeat, place = divmod(names.index(name), len(COLOURS))
            colour, look = COLOURS[place], MARKERS[place] + LINES[repeat % len(LINES)]
            x = [ticks.index(word) for word in x] if are_words else x
            axes.plot(x, y, look, label=name, color=colour, markersize=4,
                      fillstyle="none" if repeat else "full")
            if deviation is not None:
                axes.fill_between(x, np.subtract(y, deviation), np.add(y, deviation), color=colour,
                                  alpha=0.12, linewidth=0)
            if (panel, name) in ends:
                axes.plot(x[-1], ends[panel, name], "*", markersize=11, color=colour)
        if panel in targets:
            axes.axhline(targets[panel], color="gray", linestyle=":", label="target")

        # Axes
        if are_words:
            axes.set_xticks(range(len(ticks)), ticks, parse_math=False)
        elif all(isinstance(tick, int) for tick in ticks):
            axes.xaxis.get_major_locator().set_params(integer=True)
        label_axes(axes, *labels)
    finish(figure, path, title, "outside right")


def draw_maps(path: File, maps: Mapping[str, Tensor], names: Sequence[str], labels: tuple,
              title: str, *, columns: int = PANELS, limits: tuple | None = None) -> None:
    """Matrices as colours, a panel per matrix.

    names: names of the rows;  labels: labels of x, y and the colours;  columns: panels per row
    limits: values of the lowest and the highest colour; None: the least and the greatest value
    """
    low, high = limits or (float(min(values.min() for values in maps.values())),
                           float(max(values.max() for values in maps.values())))
    figure, axes_of = panels(list(maps), (3, 3), (2, 0.6), columns)
    for name, axes in axes_of.items():
        image = axes.imshow(maps[name].numpy(), vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(names)), names, fontsize="x-small", parse_math=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=labels[0], ylabel=labels[1])
    figure.colorbar(image, ax=list(axes_of.values()), label=labels[2])
    finish(figure, path, title)


def draw_points(path: File, points: Mapping[str, Mapping[str, Tensor]], title: str) -> None:
    """Points in the plane, whose axes mean nothing: panel -> kind -> (N, 2)."""
    figure, axes_of = panels(list(points), (3, 3), (1.6, 0.8))
    for panel, axes in axes_of.items():
        for number, (kind, positions) in enumerate(points[panel].items()):
            axes.scatter(*positions.T.numpy(), s=10, marker=MARKERS[number % len(MARKERS)],
                         color=COLOURS[number % len(COLOURS)], label=kind, alpha=0.7, linewidths=0)
        axes.set(xticks=[], yticks=[])
    finish(figure, path, title, "outside right")


def draw_reconstruction(path: File, images: Mapping[str, Tensor],
                        losses: Mapping[str, Sequence[float]], title: str) -> None:
    """Rows of images (N, C, H, W) uint8 by name; above them losses against steps, if any."""
    heights = [2.6 if losses else 0.01, 0.9 * len(images)]
    figure = new_figure(8, 0.8 + sum(heights))
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    if losses:
        axes = above.subplots()
        for number, (name, values) in enumerate(losses.items()):
            axes.plot(values, label=name, color=COLOURS[number], linestyle=LINES[number % 2])
        label_axes(axes, "step of the attacker", "mean squared error", legend=True, yscale="log")
    for name, axes in zip(images, below.subplots(len(images), 1, squeeze=False).flat):
        show_images(axes, images[name][None], aspect="auto")
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

    def attempt(self, name: str, *arguments: object) -> object:
        """Call a method of the stream; once that fails, show nothing."""
        try:
            return getattr(self.stream, name)(*arguments)
        except (OSError, ValueError):
            self.stream = nowhere()

    write, flush = partialmethod(attempt, "write"), partialmethod(attempt, "flush")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)  # isatty, fileno, encoding, ...


def progress_bar(items: Iterable | None, what: str | None, unit: str, total: int | None = None,
                 **options: object) -> tqdm:
    """Items, with a progress bar on standard output; standard error holds errors alone."""
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
        text = (f"dropout clients: {', '.join(map(str, dropouts))}; classes held by dropout "
                f"clients alone: {', '.join(unseen)}")
        remarks.append(textwrap.fill(text, 100, break_on_hyphens=False))
    if absent := sum(not any(column) for column in zip(*counts)):
        remarks.append(f"{absent} of {len(names)} classes are held by no client, and their images "
                       "are not used; more --clients or --classes-per-client hold more")
    if len(counts) > 20 or len(names) > 12:
        lines = [f"images per client: {min(sizes)} to {max(sizes)}, mean {np.mean(sizes):.0f}"]
        return "\n".join(lines + remarks)

    # Table
    width = max(10, 1 + max(map(len, archs)))
    lines = [f"client  {'network':{width}}{'images':>7}" + "".join(map("{:>7.6}".format, names))]
    for client, (row, arch, size) in enumerate(zip(counts, archs, sizes)):
        cells = "".join(f"{count or '.':>7}" for count in row)
        lines.append(f"{client:>6}  {arch:{width}}{size:>7}{cells}")
    return "\n".join(lines + remarks)


def number_text(value: float | str | None, spread: float | None, paper_text: str) -> str:
    """Mean and its standard deviation, with as many decimals as the paper's number has."""
    # Words and whole numbers stay as they are
    if value is None or isinstance(value, str) or isinstance(value, int) and spread is None:
        return "–" if value is None else str(value)
    digits = 1 if abs(value) >= 10 else 2
    if paper_text:
        digits = max(1, len(paper_text.split(" ")[0].partition(".")[2]))
    text = f"{value:.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def result_text(result: Mapping) -> str:
    """The content of result.json as sentences."""
    # AP-FL's models after the last round
    lines, kinds = [], ("client", "friend", "personalised")
    for name in (*kinds, *(f"dropout_{kind}" for kind in kinds)):
        if f"{name}_accuracy" in result:
            models = name.replace("dropout_", "dropout clients' ")
            lines.append(f"{models} models: {{{name}_accuracy}} of the whole test set, "
                         f"{{{name}_personal_accuracy}} of their own test shares")
    if "harmonic_accuracy" in result:
        lines.append("dropout clients: {seen_accuracy} of the seen classes, {unseen_accuracy} of "
                     "the unseen ones, harmonic mean {harmonic_accuracy}")

    # All methods
    shared = "; global model {global_accuracy}" if "global_accuracy" in result else ""
    rounds = "1 round" if result["rounds"] == 1 else "{rounds} rounds"
    lines.append("accuracy {accuracy}" + shared + f" after {rounds} (best {{best_accuracy}} in "
                 "round {best_round}, mean of the last ten evaluations {last10_accuracy})")
    if "full_accuracy" in result:
        lines.append("whole network: {full_accuracy}")
    lines.append("{seconds:.0f} s, {images_per_second:.0f} training images per second, "
                 "{upload_mb:.1f} MB uploaded, {download_mb:.1f} MB downloaded")
    for name, place in {"memory_mb": "memory", "gpu_memory_mb": "the GPU's memory"}.items():
        lines[-1] += f", {{{name}:.0f}} MB of {place}" if name in result else ""

    # Accuracies in percent; clients without test images have none on their shares
    percent = {name: "-" if value is None else f"{value:.2f} %"
               for name, value in result.items() if name.endswith("accuracy")}
    return "\n".join(lines).format_map({**result, **percent})
