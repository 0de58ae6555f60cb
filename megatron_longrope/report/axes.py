"""Axes that several figures of a report share: sequence lengths, start tokens, titles of panels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megatron_longrope.evaluation.table import shorten
from megatron_longrope.lengths import format_length
from megatron_longrope.report.style import MUTED


def length_axis(axes: Axes, lengths: Sequence[int], original_length: int | None = None) -> None:
    """Make the x axis logarithmic with these lengths as ticks, less those that would collide.

    The original window is within the frame and marked by a line.
    """
    ends = [lengths[0], lengths[-1]] + ([original_length] if original_length else [])
    octaves = max(math.log2(max(ends) / min(ends)), 1.0)
    ticks = [lengths[-1]]
    room = octaves * 0.09
    for length in reversed(lengths[:-1]):
        if math.log2(ticks[-1] / length) >= room:
            ticks.append(length)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(ends) / 2 ** (octaves * 0.035), max(ends) * 2 ** (octaves * 0.035))
    if original_length:
        axes.axvline(original_length, color=MUTED, linewidth=0.9, zorder=1)
        note_above(axes, original_length, "original window")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_length(round(value))))
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_xlabel("Sequence length (tokens)")


def start_token_axis(axes: Axes, counts: Sequence[int], *, narrow: bool = False) -> None:
    """Make the x axis for n_hat, logarithmic in 1 + n so that 0 has a place.

    Labels that would collide are left out.

    Args:
        counts (Sequence[int]): Numbers of start tokens, ascending.
        narrow (bool): The panel shares its line with another.
    """
    axes.set_xscale("function", functions=(np.log1p, np.expm1))
    span = math.log1p(counts[-1]) - math.log1p(counts[0])
    room, air = span * (0.075 if narrow else 0.035), span * 0.035
    axes.set_xlim(math.expm1(math.log1p(counts[0]) - air), math.expm1(math.log1p(counts[-1]) + air))
    # The ends first, then powers of two, which read more easily than what lies between them.
    labelled: list[int] = []
    for count in sorted(counts, key=lambda n: (n not in (counts[0], counts[-1]), n & (n - 1), n)):
        if all(abs(math.log1p(count) - math.log1p(other)) >= room for other in labelled):
            labelled.append(count)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(counts), [str(n) if n in labelled else "" for n in counts], fontsize=8.5)


def note_above(axes: Axes, x: float, text: str) -> None:
    """Write a small note on top of the frame."""
    axes.annotate(
        text, (x, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="center", color=MUTED, fontsize=8,
    )  # fmt: skip


def panel_title(axes: Axes, name: str, detail: str) -> None:
    """Write a bold line with a quiet second one."""
    axes.set_title(shorten(name, 42), loc="left", fontsize=9, fontweight="bold", pad=19)
    axes.annotate(detail, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points",
                  fontsize=8.5, color=MUTED)  # fmt: skip
