"""What a kind of evaluation is: how its cells are told apart, recorded, tabulated and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.series import Row, Rows, identify, name_series
from megatron_longrope.files import NOT_FINITE

if TYPE_CHECKING:
    from megatron_longrope.evaluation.figure import Figure
    from megatron_longrope.evaluation.options import EvaluationOptions
    from megatron_longrope.evaluation.session import Plan
    from megatron_longrope.evaluation.table import Table
    from megatron_longrope.evaluation.targets import NamedModel

Check = tuple[Callable[[Any], bool], str]
"""A rule for a field of a record, in code and in words."""

TARGET_KEY = (
    "iteration", "label", "policy", "config_sha256", "sliding_window", "requested_dtype",
    "checkpoint_sha256",
)  # fmt: skip
"""Fields of a record that say what was measured: a checkpoint, which is known by its content, how
it was loaded, and a set of factors. What a record lacks was the default."""

MODEL_COLUMNS = ("model", *TARGET_KEY)
"""Of every CSV: what tells one model from another."""


@dataclass(frozen=True)
class Section:
    """A part of a report: a title with tables and figures under it."""

    title: str

    tables: Sequence[Table] = ()

    figures: Sequence[Figure] = ()

    warnings: Sequence[str] = ()
    """What must not be overlooked."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Data, seeds and versions behind it; empty values are left out."""

    def text(self, *, details: bool = False) -> str:
        """Return the tables for a terminal, and once below them what must not be overlooked."""
        tables = "\n\n".join(table.text(details=details) for table in self.tables)
        return "\n".join([tables, *self.warnings])


@dataclass(frozen=True)
class Kind:
    """A kind of evaluation: all that the command line, the recorder and the report know of it."""

    name: str
    """Of the command and of its files: `longrope eval <name>` writes `<name>.jsonl`."""
    key: tuple[str, ...]
    """Fields that, with :data:`TARGET_KEY`, identify a cell. The recorder resumes by it: a setting
    that is missing here is overwritten without a word. `sections` must split by whatever of it its
    tables do not show; test_reading.py checks that."""
    required: Mapping[str, Check]
    """Fields that a record must hold."""
    help: str
    """One line about the command."""
    description: str
    """A few sentences about it."""
    options: type[EvaluationOptions]
    """What it can be told; the flags and their help are made from it."""
    plan: Callable[[Any, Sequence[NamedModel]], Plan]
    """Makes cells of options and models, and what measures them. Refuses bad input with one
    sentence before a weight is loaded."""
    unit: str
    """What the progress counts."""
    summary: Callable[[Sequence[Row]], list[Row]]
    """Lines of `<name>.csv`, made of all records."""
    sections: Callable[[Rows, int | None], list[Section]]
    """Tables and figures of records; given the pre-trained window in tokens where all share it."""
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    """Fields that hold numbers, in lists and objects, too, which need not be finite; and what null
    stands for in each, as in old records."""

    @property
    def cell_fields(self) -> tuple[str, ...]:
        """Every field that tells one cell from another."""
        return (*TARGET_KEY, *self.key)

    def sections_of(self, records: Sequence[Row]) -> list[Section]:
        """Return tables and figures of records that lie in one file."""
        series = name_series(
            [(identify(row), Path(), cell_key(row, self.cell_fields), row) for row in records]
        )
        windows = {row.get("original_length") for row in records}
        window = windows.pop() if len(windows) == 1 else None
        return self.sections(list(zip(series, records, strict=True)), window)

    def check(self, row: Row, where: str) -> Row:
        """Return a record as it was measured, given as JSON; `where` it stands is for the error.

        Raises:
            LongRopeError: It is no record of this kind.
        """
        row = row | {
            name: read_numbers(row[name], null)
            for name, null in self.numbers.items()
            if name in row and (row[name] is not None or name in self.required)
        }
        for name, (good, rule) in {**self.required, "checkpoint_sha256": TEXT}.items():
            if name not in row:
                raise LongRopeError(
                    f"{where}: the record lacks {name!r}; move the file away and measure again "
                    f"with `longrope eval {self.name}`"
                )
            if not good(row[name]):
                raise LongRopeError(f"{where}: {name} is {row[name]!r}; it must be {rule}")
        return row


def read_numbers(value: Any, null: float | None) -> Any:
    """Return a value with the numbers that :func:`.finite_json` made texts of, and for null."""
    if isinstance(value, list):
        return [read_numbers(item, null) for item in value]
    if isinstance(value, dict):
        return {name: read_numbers(item, null) for name, item in value.items()}
    if value in NOT_FINITE:
        return float(value)
    return null if value is None else value


def cell_key(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the identity of a record: equal for two records of one cell."""
    return json.dumps([row.get(name) for name in names], sort_keys=True)


def is_number(value: Any) -> bool:
    """Return whether it is a number; NaN and infinity, which lost models give, are some."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


NUMBER: Check = (is_number, "a number")
COUNT: Check = (_is_count, "a positive integer")
SHARE: Check = (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
BOOLEAN: Check = (lambda value: isinstance(value, bool), "true or false")
TEXT: Check = (lambda value: isinstance(value, str) and value != "", "a text that is not empty")
ANYTHING: Check = (lambda value: True, "")
