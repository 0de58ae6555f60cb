"""Append-only results: one JSON line per finished cell, so that a resumed run repeats none."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longrope.files import write_text_atomic


class Records:
    """A JSONL file of cells, found again by their key fields.

    A torn last line, left by a crash, is dropped.

    Args:
        path (Path): The file; created on the first append.
        key (Sequence[str]): Fields that identify a cell.

    Raises:
        ValueError: A line before the last is not JSON.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self._key = path, tuple(key)
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {number}: not JSON ({error}); move the file away"
                ) from None
        if torn:
            os.truncate(self.path, len(content) - len(torn))

    def find(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
        """The finished record with the same key fields, or None."""
        wanted = [cell[name] for name in self._key]
        for row in self.rows:
            if [row.get(name) for name in self._key] == wanted:
                return row
        return None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record and flush it to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(dict(record))


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write the chosen columns of the rows, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())
