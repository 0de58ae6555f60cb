"""Figures of retrieval for several models: by length and depth, and by length alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from megatron_longrope.lengths import format_length
from megatron_longrope.report.axes import panel_title
from megatron_longrope.report.comparison import RetrievalGroup, Tally
from megatron_longrope.report.line_figures import SUBJECT_FIELDS, subject_cells
from megatron_longrope.report.naming import Subject
from megatron_longrope.report.style import (
    INK,
    METHODS,
    MUTED,
    PAPER,
    Drawing,
    blank_figure,
    finish,
    shorten,
)

_SHARES = LinearSegmentedColormap.from_list(
    "shares", ["#f4f1ea", "#cfdfe6", "#8fbdd6", "#3f8cbb", "#0a5a93", "#07305a"]
)
"""Nothing to everything: lightness falls evenly, so that grey print keeps the order."""
_DARK_TEXT, _LIGHT_TEXT = "#15171a", "#ffffff"  # on cells, whose colours no theme exchanges
_INCHES = 6.9  # of a figure's width that panels may share
_POINTS_PER_CELL = 17.0  # the least at which a number in a cell can be read
_LEAST_SIZE = 4.5  # points; smaller numbers are left to the data file


def draw_heatmap(name: str, title: str, what: str, group: RetrievalGroup) -> Drawing | None:
    """Share found at each depth and length, one panel for each subject; None without depths."""
    if not group.by_depth:
        return None
    grids = group.by_depth
    lengths = sorted({length for row in grids.values() for length, _ in row})
    depths = sorted({depth for row in grids.values() for _, depth in row})
    columns = 1 if len(grids) == 1 or len(lengths) * _POINTS_PER_CELL > 200 else 2
    high = max(0.2 * len(depths), 0.8) + 0.75
    room = _room(columns, lengths)
    size = min(8.0, room / 2.4)
    trials = {tally.trials for row in grids.values() for tally in row.values()}
    counted = trials <= set(range(1, 10)) and all(t.whole for row in grids.values()
                                                  for t in row.values())  # fmt: skip
    with _panels(title, len(grids), columns, high) as (figure, grid):
        for axes, (subject, cells) in zip(grid, grids.items(), strict=True):
            _draw_cells(axes, cells, lengths, depths, room, counted=counted, size=size)
            tried = sum(tally.trials or 0 for tally in cells.values())
            panel_title(axes, shorten(subject.name, 36), f"{tried:,} trials")
        shown = "found of tried" if counted else "percent found"
        numbers = f"Numbers: {shown}." if size >= _LEAST_SIZE else "The data file has the numbers."
        rows = [
            (*subject_cells(subject), length, depth, tally.share, tally.trials,
             "" if tally.nll is None else tally.nll)
            for subject, cells in grids.items() for (length, depth), tally in cells.items()
        ]  # fmt: skip
        return finish(
            figure, name,
            f"{what} by depth (0 % is the beginning of the text) and length; the darker, the more "
            f"was found. {numbers}",
            (*SUBJECT_FIELDS, "length", "depth", "share", "trials", "nll"), rows,
        )  # fmt: skip


def draw_bars(
    name: str, title: str, what: str, by_length: Mapping[Subject, Mapping[int, Tally]],
    original_length: int | None,
) -> Drawing:  # fmt: skip
    """Share found at each length as bars, one panel for each subject, with Wilson intervals."""
    lengths = sorted({length for row in by_length.values() for length in row})
    columns = 1 if len(by_length) == 1 or len(lengths) > 12 else 2
    room = _room(columns, lengths)
    certain = any(tally.interval for row in by_length.values() for tally in row.values())
    with _panels(title, len(by_length), columns, 2.3) as (figure, grid):
        for axes, (subject, row) in zip(grid, by_length.items(), strict=True):
            _draw_bars(axes, row, lengths, room)
            within = sum(n <= original_length for n in lengths) if original_length else 0
            if 0 < within < len(lengths):
                axes.axvline(within - 0.5, color=MUTED, linewidth=0.9, zorder=1)
            trials = sorted({tally.trials for tally in row.values() if tally.trials})
            panel_title(axes, shorten(subject.name, 36), _trials(trials))
        bars = " Thin bars are 95 % Wilson intervals." if certain else ""
        edge = " The upright line is the end of the original window." if original_length else ""
        rows = [
            (*subject_cells(subject), length, tally.share, tally.trials or "",
             *(tally.interval or ("", "")), "" if tally.nll is None else tally.nll)
            for subject, row in by_length.items() for length, tally in row.items()
        ]  # fmt: skip
        return finish(
            figure, name, f"{what} by length.{bars}{edge}",
            (*SUBJECT_FIELDS, "length", "share", "trials", "wilson_low", "wilson_high", "nll"),
            rows,
        )  # fmt: skip


@contextmanager
def _panels(
    title: str, count: int, columns: int, high: float
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A blank figure with `count` axes of `high` inches, their titles included."""
    lines = math.ceil(count / columns)
    with blank_figure(title, 0.55 + high * lines) as figure:
        grid = list(figure.subplots(lines, columns, squeeze=False).flatten())
        for index, axes in enumerate(grid):
            axes.set_visible(index < count)
            if index + columns >= count:
                axes.set_xlabel("Sequence length (tokens)")
        yield figure, grid[:count]


def _room(columns: int, lengths: Sequence[int]) -> float:
    """Points from one length to the next in a panel."""
    return (_INCHES / columns - 0.75) / len(lengths) * 72


def _draw_cells(
    axes: Axes, cells: Mapping[tuple[int, float], Tally], lengths: Sequence[int],
    depths: Sequence[float], room: float, *, counted: bool, size: float,
) -> None:  # fmt: skip
    """One panel of a heatmap; what was not measured stays blank."""
    shares = np.full((len(depths), len(lengths)), np.nan)
    for (length, depth), tally in cells.items():
        x, y = lengths.index(length), depths.index(depth)
        shares[y, x] = tally.share
        if size < _LEAST_SIZE:
            continue
        text = f"{round(tally.hits)}/{tally.trials}" if counted else f"{100 * tally.share:.0f}"
        ink = _LIGHT_TEXT if tally.share > 0.55 else _DARK_TEXT
        # Nothing within the frame concerns the layout, which would measure every single text.
        axes.text(x, y, text, ha="center", va="center", fontsize=size, color=ink).set_in_layout(
            False
        )
    axes.pcolormesh(
        np.arange(len(lengths) + 1) - 0.5, np.arange(len(depths) + 1) - 0.5, shares,
        cmap=_SHARES, vmin=0, vmax=1, linewidth=0, zorder=0,
    )  # fmt: skip
    axes.grid(False)
    for edge in range(1, max(len(lengths), len(depths))):
        if edge < len(lengths):
            axes.axvline(edge - 0.5, color=PAPER, linewidth=1)
        if edge < len(depths):
            axes.axhline(edge - 0.5, color=PAPER, linewidth=1)
    axes.spines[["left", "bottom"]].set_visible(False)
    _length_ticks(axes, lengths, room)
    every = math.ceil(len(depths) / 11)
    axes.set_yticks(range(0, len(depths), every), [f"{d:.0%}" for d in depths[::every]],
                    fontsize=8)  # fmt: skip
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)  # the beginning of the text on top
    axes.set_ylabel("Depth", labelpad=3)


def _draw_bars(axes: Axes, row: Mapping[int, Tally], lengths: Sequence[int], room: float) -> None:
    places = [lengths.index(length) for length in row]
    shares = [tally.share for tally in row.values()]
    axes.bar(places, shares, width=0.62, color=METHODS["longrope_search"].color, zorder=2)
    for place, tally in zip(places, row.values(), strict=True):
        low, high = tally.interval or (tally.share, tally.share)
        if tally.interval:
            axes.plot([place, place], [low, high], color=PAPER, linewidth=3.4, zorder=3)
            axes.plot([place, place], [low, high], color=INK, linewidth=1.3, zorder=4)
        axes.annotate(
            f"{100 * tally.share:.0f}" + (" %" if room > 30 else ""),
            (place, max(tally.share, high)), (0, 3), ha="center", textcoords="offset points",
            fontsize=min(8.5, room / 2.4),
        )  # fmt: skip
    _length_ticks(axes, lengths, room)
    axes.set_xlim(-0.7, len(lengths) - 0.3)
    axes.set_ylim(0, 1.16)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def _length_ticks(axes: Axes, lengths: Sequence[int], room: float) -> None:
    """Every length as a tick, and as many labels as fit, the last one among them.

    Args:
        axes (Axes): The lengths are at 0, 1, ...
        lengths (Sequence[int]): In tokens, ascending.
        room (float): Points from one tick to the next.
    """
    labels = [format_length(length) for length in lengths]
    size = 8 if room > 26 else 7
    every = math.ceil((max(map(len, labels)) * 0.66 * size + 3) / room)
    shown = [
        label if (len(labels) - 1 - index) % every == 0 else ""
        for index, label in enumerate(labels)
    ]
    axes.set_xticks(range(len(labels)), shown, fontsize=size)
    axes.tick_params(axis="x", length=0)


def _trials(counts: Sequence[int]) -> str:
    if not counts:
        return ""
    low, high = counts[0], counts[-1]
    return f"{low} trials per length" if low == high else f"{low} to {high} trials per length"
