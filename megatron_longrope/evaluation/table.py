"""Tables as data: the same one is printed in a terminal, set in the page and saved as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

from megatron_longrope.lengths import format_length

ABSENT = "\N{EN DASH}"
"""Stands for a cell that was not measured."""

_LONGEST_NAME = 44  # characters of a row's name in a terminal


@dataclass(frozen=True)
class Value:
    """One cell of a table."""

    text: str
    """As shown."""
    rank: float | None = None
    """Number by which its column is ranked, if it takes part."""
    below: tuple[str, ...] = ()
    """Lines in small print under it."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str

    below: str = ""
    """A line in small print under the title."""
    best: str = ""
    """Which value is marked: `lowest`, `highest`, or none."""
    is_text: bool = False
    """Whether it holds words, which stand on the left."""


@dataclass(frozen=True)
class Table:
    """Named rows of values."""

    name: str
    """File name without suffix, unique in a report."""
    title: str

    columns: Sequence[Column]

    rows: Mapping[str, Sequence[Value | None]]
    """Of each row a value per column; None where nothing was measured."""
    note: str = ""
    """How to read it."""
    corner: str = "Model"
    """Title of the rows' names."""

    @cached_property
    def best(self) -> set[tuple[str, int]]:
        """(row, index of the column) of every marked value.

        A column with one value or with equal ones has no best, and what is not finite is none.
        """
        found: set[tuple[str, int]] = set()
        for index, column in enumerate(self.columns):
            ranks = self._ranks(index)
            finite = [rank for rank in ranks.values() if math.isfinite(rank)]
            if column.best and finite and len(set(ranks.values())) > 1:
                best = min(finite) if column.best == "lowest" else max(finite)
                found |= {(name, index) for name, rank in ranks.items() if rank == best}
        return found

    def text(self, *, details: bool = False) -> str:
        """Return the table for a terminal; a star marks the best of a column.

        Args:
            details (bool): Show the small print under the values, too. Defaults to False.
        """
        absent = f"{ABSENT} "
        lines = [["", *(f"{column.title} " for column in self.columns)]]
        for name, values in self.rows.items():
            cells = [
                f"{value.text}{'*' if (name, index) in self.best else ' '}" if value else absent
                for index, value in enumerate(values)
            ]
            lines.append([shorten(name, _LONGEST_NAME), *cells])
            if details:
                below = (value.below if value else () for value in values)
                small = zip_longest(*below, fillvalue="")
                lines += [["", *(f"{cell} " for cell in line)] for line in small]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        shown = [self.title, shown[0], "-" * max(map(len, shown)), *shown[1:]]
        marks = dict.fromkeys(self.columns[index].best for _, index in sorted(self.best))
        return "\n".join(
            [*shown, *(["* " + " or ".join(marks) + " of its column"] if marks else [])]
        )

    def csv(self) -> str:
        """Return a line per value: row, column, number (or text), small print."""
        data = io.StringIO()
        writer = csv.writer(data, lineterminator="\n")
        writer.writerow((self.corner.lower(), "column", "value", "details"))
        for name, values in self.rows.items():
            for column, value in zip(self.columns, values, strict=True):
                if value is not None:
                    title = " ".join(filter(None, (column.title, column.below)))
                    number = value.text if value.rank is None else value.rank
                    writer.writerow((name, title, number, "; ".join(value.below)))
        return data.getvalue()

    def _ranks(self, index: int) -> dict[str, float]:
        found = {name: values[index] for name, values in self.rows.items()}
        return {
            name: value.rank
            for name, value in found.items()
            if value is not None and value.rank is not None and not math.isnan(value.rank)
        }


def length_column(length: int, window: int | None, best: str) -> Column:
    """Return the column of a sequence length in tokens.

    Args:
        length (int): In tokens.
        window (int, optional): Pre-trained window in tokens, to which the length is compared.
        best (str): See :attr:`Column.best`.
    """
    below = f"{format_ratio(length / window)}\N{MULTIPLICATION SIGN}" if window else ""
    return Column(format_length(length), below, best)


def format_score(value: float) -> str:
    """Return a perplexity for people: `23.41`, `1,234`, `2.1e+07`, `\N{INFINITY}`."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "\N{INFINITY}"
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def format_ratio(ratio: float) -> str:
    """Return an extension ratio for people: `8` or `2.5`."""
    return f"{ratio:.4g}"


def shorten(text: str, most: int) -> str:
    """Return at most `most` characters, without the middle of a longer text."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}"
