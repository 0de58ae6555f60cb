"""Kill a workflow as crashes do: its first process alone, or everything at once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Processes below one, the deepest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found += [*descendants(int(path.parent.name)), int(path.parent.name)]
    return found


def kill(process: subprocess.Popen, chance: random.Random) -> None:
    """Kill -9 it; with even odds all of its descendants too."""
    victims = descendants(process.pid) if chance.random() < 0.5 else []
    for pid in [process.pid, *victims]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
