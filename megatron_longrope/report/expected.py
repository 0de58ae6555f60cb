"""Published values beside our own: what a report was expected to say."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.kind import Section
from megatron_longrope.evaluation.table import Column, Table, Value

FIELDS = ("table", "row", "column", "value", "source")
"""Columns of a file of expected values. The first three name a cell of the report's tables/."""


@dataclass(frozen=True)
class Expected:
    """A published value of one cell."""

    table: str
    """Name of the report's table: `perplexity`, `passkey`, `short_benchmarks`."""
    row: str
    """Name of the row; or its beginning, before what tells series of one name apart in parentheses;
    or whole words of it. One row alone has a value there."""
    column: str
    """Title of the column, such as 8k."""
    value: str
    """As published: a number, or a bound such as >1e4."""
    source: str
    """Where it was published."""

    @property
    def number(self) -> float | None:
        """The value, unless it is a bound."""
        try:
            return float(self.value)
        except ValueError:
            return None


def read_expected(path: str | Path) -> list[Expected]:
    """Read a CSV file with the columns :data:`FIELDS`; lines that begin with # are comments.

    Raises:
        LongRopeError: It cannot be read, a column is missing, a value is neither a number nor a
            bound, or a source has two of a cell.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise LongRopeError(f"{path} cannot be read ({error}); give a CSV file") from None
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    reader = csv.DictReader(io.StringIO("\n".join(lines)))
    if tuple(reader.fieldnames or ()) != FIELDS:
        raise LongRopeError(f"{path}: its first line must be {','.join(FIELDS)}")
    found = []
    for line in reader:
        if None in line or None in line.values() or not _is_value(line["value"]):
            raise LongRopeError(
                f"{path}: {','.join(map(str, line.values()))} is not {','.join(FIELDS)} with a "
                "number or a bound such as >1e4 as its value"
            )
        item = Expected(**{name: cell.strip() for name, cell in line.items()})
        if any(replace(other, value=item.value) == item for other in found):
            raise LongRopeError(
                f"{path}: {item.source} has two values of {item.table}: {item.row}, {item.column}; "
                "give one of them"
            )
        found.append(item)
    return found


def _is_value(text: str) -> bool:
    try:
        number = text.strip().removeprefix("<").removeprefix(">")
        return "_" not in number and math.isfinite(float(number))
    except ValueError:
        return False


def compare(expected: Sequence[Expected], tables: Sequence[Table], name: str) -> Section:
    """Set published values beside the report's, with the difference in percent of the published.

    Args:
        expected (Sequence[Expected]): In the order in which they are listed.
        tables (Sequence[Table]): Of the report.
        name (str): Of the file, for the title.

    Raises:
        LongRopeError: Several rows with a value in the column go by that name.
    """
    rows: dict[str, list[Value | None]] = {}
    missing = 0
    for item in expected:
        ours = _find(item, tables)
        missing += ours is None
        shown = difference = None
        if ours is not None:
            shown = Value(ours.text, below=ours.below)
            # As shown, in the same unit: published values are rounded, too.
            number = re.match(r"-?[\d,]+(\.\d+)?(e[+-]?\d+)?", ours.text)
            if number and item.number:
                ratio = float(number[0].replace(",", "")) / item.number
                difference = Value(f"{100 * (ratio - 1):+.1f} %")
        name_of_cell = f"{item.table}: {item.row}, {item.column}"
        if name_of_cell in rows:
            name_of_cell += f" ({item.source})"
        rows[name_of_cell] = [shown, Value(item.value), difference, Value(item.source)]
    columns = [*map(Column, ("here", "published", "difference")), Column("source", is_text=True)]
    note = "Published on other hardware, and maybe on other documents; see the source."
    table = Table("expected", f"Beside {name}", columns, rows, note=note, corner="Cell")
    absent = f"{missing} of {len(expected)} published values were not measured here."
    return Section(table.title, [table], warnings=[absent] if missing else [])


def _find(item: Expected, tables: Sequence[Table]) -> Value | None:
    words = re.compile(rf"(?<![\w-]){re.escape(item.row)}(?![\w-])")
    for table in tables:
        titles = [column.title for column in table.columns]
        if table.name != item.table or item.column not in titles:
            continue
        place = titles.index(item.column)
        named = (
            [row for row in table.rows if row == item.row]
            or [row for row in table.rows if row.startswith(f"{item.row} (")]
            or [row for row in table.rows if words.search(row)]
        )
        # Factors that were searched for one window are a series of their own for each window.
        found = {row: value for row in named if (value := table.rows[row][place]) is not None}
        if len(found) > 1:
            raise LongRopeError(
                f"{item.row!r} may be any of the rows {', '.join(found)} of {table.name}, which "
                f"all have a value at {item.column}; write more of the one that is meant"
            )
        if found:
            return next(iter(found.values()))
    return None
