"""Forward passes of a cell that is being measured, kept for a run that is killed within it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_longrope import __version__
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.kind import read_numbers
from megatron_longrope.evaluation.records import Records
from megatron_longrope.evaluation.series import Row
from megatron_longrope.ranks import rank

_INTERVAL = 10.0  # seconds between writes: a file system may take as long for one as a short pass
_LONG = 1.0  # seconds of a pass that is written at once


class Passes:
    """Results by number of the pass, in a file of the cell's own beside the records.

    Args:
        records (Records): Where the cell will go; its key identifies the cell.
        cell (Mapping): Its fields that are known before measuring.
    """

    def __init__(self, records: Records, cell: Mapping[str, Any]) -> None:
        from megatron_longrope.engine.process_groups import from_first_rank

        path = _path(records, cell)
        try:
            self._file = Records(path, ("number",), _read)
        except LongRopeError:  # damaged; what it had is measured again
            with suppress(FileNotFoundError):  # another rank was first
                path.unlink()
            self._file = Records(path, ("number",), _read)
        self._waiting: list[Row] = []
        rows = from_first_rank(self._file.rows)
        self.results: dict[int, Any] = {row["number"]: row["result"] for row in rows}
        """Of the passes so far, the same on every rank."""
        self.seconds: float = max((row["seconds"] for row in rows), default=0.0)
        """What earlier runs took for them."""
        self._started = self._written = self._added = time.monotonic()

    def add(self, number: int, result: Any) -> None:
        """Keep a result, something small that JSON can hold; short passes are written together."""
        now = time.monotonic()
        seconds = self.seconds + now - self._started
        self.results[number] = result
        self._waiting.append({"number": number, "result": result, "seconds": seconds})
        if now - self._added >= _LONG or now - self._written >= _INTERVAL:
            self._file.append(*self._waiting)
            self._waiting, self._written = [], now
        self._added = now


def discard(records: Records, cell: Mapping[str, Any]) -> None:
    """Delete the passes of a cell that is recorded, if there are any."""
    if rank() == 0:
        _path(records, cell).unlink(missing_ok=True)


def _path(records: Records, cell: Mapping[str, Any]) -> Path:
    """Another one for each release, whose losses may differ."""
    key = f"{__version__} {records.key_of(cell)}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return records.path.with_suffix(f".{digest}.passes.jsonl")


def _read(row: Row, where: str) -> Row:
    if "result" not in row or "seconds" not in row:
        raise LongRopeError(f"{where}: not a pass")
    return row | {"result": read_numbers(row["result"], None)}
