"""Progress of a conversion or preparation."""

from __future__ import annotations

import sys
import time

from megatron_longrope.progress import Progress

_MEGABYTE = 10**6


class ByteProgress:
    """Shows how many bytes are done; made for the `progress` of conversions and preparation.

    Args:
        label (str): What is being done.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._shown: Progress | None = None
        self._megabytes = 0

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total` bytes; first called with what an interrupted run wrote."""
        megabytes = done // _MEGABYTE if done < total else -(-total // _MEGABYTE)
        if self._shown is None:
            self._shown = Progress(-(-total // _MEGABYTE), self._label, "MB")
            self._begin(megabytes, done)
        elif megabytes > self._megabytes or done == total:
            seconds = time.monotonic() - self._started
            rate = (done - self._resumed) / _MEGABYTE / max(seconds, 1e-9)
            # tqdm has a rate of its own.
            note = "" if sys.stderr.isatty() else f"{rate:.0f} MB/s"
            self._shown.update(note, megabytes - self._megabytes)
        self._megabytes = megabytes
        if done == total:
            self._shown.close()

    def _begin(self, megabytes: int, done: int) -> None:
        self._started, self._resumed = time.monotonic(), done
        if done:
            print(f"continuing an interrupted run: {done} bytes are done", flush=True)
            self._shown.update(count=megabytes, resumed=True)
