"""Figures as data: what a kind of evaluation wants drawn; `report/` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_longrope.evaluation.series import Series
from megatron_longrope.evaluation.statistics import Tally


@dataclass(frozen=True)
class _Figure:
    name: str
    """File name without suffix, unique in a report."""
    title: str
    """What it shows, in a few words."""
    caption: str
    """How to read it."""


@dataclass(frozen=True)
class Lines(_Figure):
    """A line for each series."""

    lines: Mapping[Series, Mapping[float, float]]
    """Of each series its points, x ascending; finite numbers."""
    xlabel: str
    ylabel: str

    lengths: bool
    """Whether x is a sequence length, on a logarithmic axis; else a place in a window."""
    window: int | None
    """Pre-trained window in tokens, marked among lengths; of places the last one."""
    header: Sequence[str]
    """Columns of its CSV file, after those of the series."""
    data: Sequence[tuple[Series, Sequence[Any]]]
    """Rows of its CSV file, those of what could not be drawn among them."""


@dataclass(frozen=True)
class Bars(_Figure):
    """Share found at each length, a panel for each series, with Wilson intervals."""

    bars: Mapping[Series, Mapping[int, Tally]]
    """By sequence length in tokens."""
    window: int | None
    """Pre-trained window in tokens."""


@dataclass(frozen=True)
class Grid(_Figure):
    """Share found at each length and each depth or task, a panel for each series."""

    cells: Mapping[Series, Mapping[tuple[int, Any], Tally]]
    """By (sequence length in tokens, row)."""
    rows: Mapping[Any, str]
    """Rows from top to bottom, and what stands beside each."""
    ylabel: str
    """What a row is."""


Figure = Lines | Bars | Grid
