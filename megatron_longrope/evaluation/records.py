"""Append-only results: one JSON line per finished cell, so that a resumed run repeats none.

A number that is not finite, which JSON has no word for, is null.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longrope.evaluation.kind import cell_key, check_object
from megatron_longrope.evaluation.series import Row
from megatron_longrope.files import finite_json, json_lines, write_text_atomic
from megatron_longrope.ranks import rank


def read_rows(
    path: Path, key: tuple[str, ...], check: Callable[[Any, str], Row]
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
    rows = [check(row, f"{path}, line {number}") for number, row in lines]
    return {cell_key(row, key): row for row in rows}, whole


class Records:
    """A JSONL file of cells, found again by their key fields; created on the first append.

    A torn last line, left by a crash, is dropped.

    Raises:
        LongRopeError: A line before the last is not JSON, or one is no object.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self._key = path, tuple(key)
        self._found: dict[str, Row] = {}
        if path.exists():
            self._found, whole = read_rows(path, self._key, check_object)
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
        plain: list[dict[str, Any]] = [finite_json(record) for record in records]
        self._found |= {self.key_of(row): row for row in plain}
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
