"""Draw the figures of evaluations: lines, grids of depths, bars."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter

from megatron_longrope.evaluation.figure import Bars, Figure, Grid, Lines
from megatron_longrope.evaluation.series import Series
from megatron_longrope.evaluation.statistics import Tally
from megatron_longrope.evaluation.table import shorten
from megatron_longrope.lengths import format_length
from megatron_longrope.report.axes import length_axis, panel_title
from megatron_longrope.report.style import (
    INK,
    LONGROPE,
    MUTED,
    PAPER,
    Drawing,
    Style,
    blank_figure,
    finish,
    label_ends,
    panels,
    plot_line,
    score_axis,
    swatch,
)

_LENGTH = "Sequence length (tokens)"
_END_LABEL = 26  # characters that fit beside a line's end
_SHARES = LinearSegmentedColormap.from_list(
    "shares", ["#f4f1ea", "#cfdfe6", "#8fbdd6", "#3f8cbb", "#0a5a93", "#07305a"]
)
"""Nothing to everything: lightness falls evenly, so that grey print keeps the order."""
_DARK_TEXT, _LIGHT_TEXT = "#15171a", "#ffffff"  # on cells, whose colours no theme exchanges
_INCHES = 6.9  # of a figure's width that panels may share
_POINTS_PER_CELL = 17.0  # the least at which a number in a cell can be read
_LEAST_SIZE = 4.5  # points; smaller numbers are left to the data file

_SERIES_FIELDS = ("series", "model", "label", "policy", "iteration")  # of every data file


def draw(figure: Figure, styles: Mapping[Series, Style]) -> Drawing:
    """Draw a figure.

    Args:
        figure (Figure): What a kind of evaluation wants drawn.
        styles (Mapping[Series, Style]): The look of each series, the same in every figure.
    """
    if isinstance(figure, Lines):
        return _draw_lines(figure, styles)
    return _draw_grid(figure) if isinstance(figure, Grid) else _draw_bars(figure)


def _draw_lines(figure: Lines, styles: Mapping[Series, Style]) -> Drawing:
    height = 4.4 if figure.lengths else 3.2
    looks = [styles[series] for series in figure.lines]
    with _lines_figure(shorten(figure.title, 90), height, looks) as (canvas, axes, beside):
        for series, line in figure.lines.items():
            plot_line(axes, [*line], [*line.values()], styles[series], clip_on=False, zorder=3)
        score_axis(axes, [value for line in figure.lines.values() for value in line.values()])
        places = sorted({place for line in figure.lines.values() for place in line})
        if figure.lengths:
            length_axis(axes, places, figure.window)
        else:
            axes.set_xlim(0, figure.window)
            eighths = [figure.window * part / 8 for part in range(9)]
            axes.xaxis.set_major_locator(FixedLocator(eighths))
            axes.xaxis.set_major_formatter(FuncFormatter(_position))
        axes.set(xlabel=figure.xlabel, ylabel=figure.ylabel)
        if beside:
            label_ends(axes, [
                (line[max(line)], styles[series], series.name, max(line) == places[-1])
                for series, line in figure.lines.items()
            ])  # fmt: skip
        rows = [(*_series_cells(series), *row) for series, row in figure.data]
        return finish(canvas, figure.name, figure.caption, (*_SERIES_FIELDS, *figure.header), rows)


def _draw_grid(figure: Grid) -> Drawing:
    """Draw the share found at each length in each row, one panel for each series."""
    lengths = sorted({length for row in figure.cells.values() for length, _ in row})
    columns = 1 if len(figure.cells) == 1 or len(lengths) * _POINTS_PER_CELL > 200 else 2
    high = max(0.2 * len(figure.rows), 0.8) + 0.75
    sizes: dict[str, Any] = {"columns": columns, "high": high, "head": 0.55}
    room = _room(columns, lengths)
    size = min(8.0, room / 2.4)
    tallies = [tally for row in figure.cells.values() for tally in row.values()]
    counted = all(tally.trials < 10 and tally.whole for tally in tallies)
    with panels(figure.title, len(figure.cells), _LENGTH, **sizes) as (canvas, grid):
        for axes, (series, cells) in zip(grid, figure.cells.items(), strict=True):
            _fill_grid(axes, cells, lengths, figure.rows, room, counted=counted, size=size)
            axes.set_ylabel(figure.ylabel, labelpad=3)
            tried = sum(tally.trials for tally in cells.values())
            panel_title(axes, shorten(series.name, 36), f"{tried:,} trials")
        shown = "found of tried" if counted else "percent found"
        numbers = f"Numbers: {shown}." if size >= _LEAST_SIZE else "The data file has the numbers."
        rows = [
            (*_series_cells(series), length, row, tally.share, tally.trials, _blank(tally.nll))
            for series, cells in figure.cells.items()
            for (length, row), tally in cells.items()
        ]
        header = (*_SERIES_FIELDS, "length", figure.ylabel.lower(), "share", "trials", "nll")
        return finish(canvas, figure.name, f"{figure.caption} {numbers}", header, rows)


def _draw_bars(figure: Bars) -> Drawing:
    """Draw the share found at each length as bars, one panel for each series."""
    lengths = sorted({length for row in figure.bars.values() for length in row})
    columns = 1 if len(figure.bars) == 1 or len(lengths) > 12 else 2
    room = _room(columns, lengths)
    sizes: dict[str, Any] = {"columns": columns, "high": 2.3, "head": 0.55}
    certain = any(tally.interval for row in figure.bars.values() for tally in row.values())
    with panels(figure.title, len(figure.bars), _LENGTH, **sizes) as (canvas, grid):
        for axes, (series, row) in zip(grid, figure.bars.items(), strict=True):
            _fill_bars(axes, row, lengths, room)
            within = sum(n <= figure.window for n in lengths) if figure.window else 0
            if 0 < within < len(lengths):
                axes.axvline(within - 0.5, color=MUTED, linewidth=0.9, zorder=1)
            trials = sorted({tally.trials for tally in row.values()})
            panel_title(axes, shorten(series.name, 36), _trials(trials))
        bars = " Thin bars are 95 % Wilson intervals." if certain else ""
        rows = [
            (*_series_cells(series), length, tally.share, tally.trials,
             *(tally.interval or ("", "")), _blank(tally.nll))
            for series, row in figure.bars.items() for length, tally in row.items()
        ]  # fmt: skip
        header = ("length", "share", "trials", "wilson_low", "wilson_high", "nll")
        return finish(
            canvas, figure.name, f"{figure.caption}{bars}", (*_SERIES_FIELDS, *header), rows
        )


def _series_cells(series: Series) -> tuple[Any, ...]:
    """Return the first columns of a series' rows in a data file."""
    one = series.identity
    cells = (one.model, one.label, one.policy, one.iteration)
    return (series.name, *map(_blank, cells))


def _blank(value: Any) -> Any:
    return "" if value is None else value


@contextmanager
def _lines_figure(
    title: str, height: float, styles: Sequence[Style]
) -> Iterator[tuple[Canvas, Axes, bool]]:
    """Make a figure with one axes for lines, and whether their names fit beside their ends.

    Where they do not, a legend below the axes has them.
    """
    names = [style.label for style in styles]
    beside = len(names) <= height * 3.2 and max(map(len, names)) <= _END_LABEL
    columns = 3 if max(map(len, names)) <= 30 else 2 if max(map(len, names)) <= 48 else 1
    below = 0.0 if beside else 0.2 * math.ceil(len(names) / columns)
    with blank_figure(title, height + below) as figure:
        axes = figure.add_subplot()
        if not beside:
            figure.legend(
                handles=[swatch(style) for style in styles],
                labels=[shorten(name, 96) for name in names],
                loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5,
            )  # fmt: skip
        yield figure, axes, beside


def _position(value: float, _: Any) -> str:
    return format_length(round(value)) if value else "0"


def _room(columns: int, lengths: Sequence[int]) -> float:
    """Return the points from one length to the next in a panel."""
    return (_INCHES / columns - 0.75) / len(lengths) * 72


def _fill_grid(
    axes: Axes, cells: Mapping[tuple[int, Any], Tally], lengths: Sequence[int],
    rows: Mapping[Any, str], room: float, *, counted: bool, size: float,
) -> None:  # fmt: skip
    """Draw one panel of a grid; what was not measured stays blank."""
    places = {row: place for place, row in enumerate(rows)}
    shares = np.full((len(rows), len(lengths)), np.nan)
    for (length, row), tally in cells.items():
        x, y = lengths.index(length), places[row]
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
        np.arange(len(lengths) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5, shares,
        cmap=_SHARES, vmin=0, vmax=1, linewidth=0, zorder=0,
    )  # fmt: skip
    axes.grid(False)
    for edge in range(1, max(len(lengths), len(rows))):
        if edge < len(lengths):
            axes.axvline(edge - 0.5, color=PAPER, linewidth=1)
        if edge < len(rows):
            axes.axhline(edge - 0.5, color=PAPER, linewidth=1)
    axes.spines[["left", "bottom"]].set_visible(False)
    _length_ticks(axes, lengths, room)
    every = math.ceil(len(rows) / 13)
    axes.set_yticks(range(0, len(rows), every), [*rows.values()][::every], fontsize=8)
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row, the beginning of a text, on top


def _fill_bars(axes: Axes, row: Mapping[int, Tally], lengths: Sequence[int], room: float) -> None:
    """Draw one panel of bars."""
    places = [lengths.index(length) for length in row]
    shares = [tally.share for tally in row.values()]
    axes.bar(places, shares, width=0.62, color=LONGROPE.color, zorder=2)
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
    """Show every length as a tick, and as many labels as fit, the last one among them.

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
    low, high = counts[0], counts[-1]
    return f"{low} trials per length" if low == high else f"{low} to {high} trials per length"
