"""Progress on rank 0: a bar in a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time

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
        from tqdm import tqdm  # slow to import, and every command imports this module

        self._bar = tqdm(
            total=total, desc=label, unit=unit, disable=self._quiet or not self._terminal
        )
        self._total, self._label, self._unit, self._interval = total, label, unit, interval
        self._done = self._resumed = 0
        self._started = self._shown = time.monotonic()

    def update(self, note: str = "", count: int = 1, *, resumed: bool = False) -> None:
        """Count finished units; `note` is shown beside them.

        Args:
            resumed (bool): An earlier run did them: they count, but say nothing about the speed.
        """
        if resumed:
            self._resumed += count
            if not self._bar.disable:
                self._bar.initial += count
        self._done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if not resumed and (now - self._shown >= self._interval or self._done == self._total):
            self._print(note)

    def finish(self, note: str = "") -> None:
        """Less than `total` was needed: say so, unless the last line already did."""
        if self._done < self._total:
            self._total = self._bar.total = self._done
            self._bar.refresh()
            self._print(note)

    def _print(self, note: str) -> None:
        """A plain line."""
        if self._terminal or self._quiet:
            return
        self._shown = time.monotonic()
        elapsed = self._shown - self._started
        fresh = self._done - self._resumed
        line = f"{self._label}: {self._done}/{self._total} {self._unit}, {elapsed:.0f} s"
        if fresh:
            left = elapsed / fresh * (self._total - self._done)
            line += f", about {format_duration(left)} left"
        print(f"{line}{'; ' + note if note else ''}", flush=True)

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def format_duration(seconds: float) -> str:
    """Return `0.32 s`, `42 s`, `7 min` or `13.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
