"""Progress on rank 0: a bar in a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from megatron_longrope.ranks import rank


class Progress:
    """Counts units of work; shows what is done, the rate and the time left.

    Args:
        total (int): Units of work.
        label (str): What is being done.
        unit (str): Name of a unit.
        interval (float): Seconds between plain lines.
    """

    def __init__(self, total: int, label: str, unit: str, interval: float = 15.0) -> None:
        self._quiet = rank() != 0
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, desc=label, unit=unit, disable=self._quiet or not self._terminal
        )
        self._total, self._label, self._unit, self._interval = total, label, unit, interval
        self._done = 0
        self._started = self._shown = time.monotonic()

    def update(self, note: str = "", count: int = 1) -> None:
        """Count finished units; `note` is shown beside them."""
        self._done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        due = now - self._shown >= self._interval or self._done == self._total
        if due and not self._terminal and not self._quiet:
            self._shown = now
            elapsed = now - self._started
            left = elapsed / max(self._done, 1) * (self._total - self._done)
            line = f"{self._label}: {self._done}/{self._total} {self._unit}, {elapsed:.0f} s, "
            print(f"{line}about {left:.0f} s left{'; ' + note if note else ''}", flush=True)

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
