"""Append-only results: one JSON line per finished cell, so that a resumed run repeats none.

A number that is not finite is the text "NaN", "Infinity" or "-Infinity", and a number once read.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.kind import cell_key
from megatron_longrope.evaluation.series import Row
from megatron_longrope.files import finite_json, json_lines, write_text_atomic
from megatron_longrope.ranks import rank


def read_rows(
    path: Path, key: tuple[str, ...], check: Callable[[Row, str], Row]
) -> tuple[dict[str, Row], int]:
    """Read the last record of each cell, by what identifies it.

    Args:
        path (Path): A JSONL file.
        key (tuple[str, ...]): Fields that identify a cell.
        check (Callable): Completes or refuses a record, given with the place where it stands.

    Returns:
        tuple[dict[str, Row], int]: Records, and the bytes behind which the file may be torn.

    Raises:
        LongRopeError: A line before the last is not JSON, or a record is refused.
    """
    lines, whole = json_lines(path)
    found = {}
    for number, row in lines:
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise LongRopeError(
                f"{where}: a record must be a JSON object, got {type(row).__name__}; move the file "
                "away"
            )
        checked = check(row, where)
        found[cell_key(checked, key)] = checked
    return found, whole


class Records:
    """A JSONL file of cells, found again by their key fields; created on the first append.

    A torn last line, left by a crash, is dropped.

    Args:
        path (Path): The file.
        key (Sequence[str]): Fields that identify a cell.
        check (Callable): See :func:`read_rows`; of what is appended, too.

    Raises:
        LongRopeError: A line before the last is not JSON, one is no object, or is refused.
    """

    def __init__(
        self, path: Path, key: Sequence[str], check: Callable[[Row, str], Row] = lambda row, _: row
    ) -> None:
        self.path, self._key, self._check = path, tuple(key), check
        self._found: dict[str, Row] = {}
        if path.exists():
            self._found, whole = read_rows(path, self._key, check)
            if rank() == 0:
                self._end_with_a_line(whole)

    @property
    def rows(self) -> list[Row]:
        """The finished records; of several of one cell the last."""
        return list(self._found.values())

    def _end_with_a_line(self, whole: int) -> None:
        """Drop what is torn behind so many bytes; the next record stands alone."""
        if whole < self.path.stat().st_size:
            os.truncate(self.path, whole)
        elif whole and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def key_of(self, row: Mapping[str, Any]) -> str:
        """Return what two records of one cell have in common."""
        return cell_key(row, self._key)

    def find(self, cell: Mapping[str, Any]) -> Row | None:
        """Return the finished record with the same key fields, or None."""
        return self._found.get(self.key_of(cell))

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records and flush them to disk, once; only the first rank does."""
        plain: list[Row] = [finite_json(record, texts=True) for record in records]
        # As they will be read: what a command returns is what the next one finds.
        checked = [self._check(row, str(self.path)) for row in plain]
        self._found |= {self.key_of(row): row for row in checked}
        if rank() != 0 or not plain:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in plain)
            file.flush()
            os.fsync(file.fileno())


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write the chosen columns of the rows, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())
