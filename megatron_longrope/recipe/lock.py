"""One writer at a time: who works in an output folder, or did until a moment ago."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "LONGROPE_RECIPE_OUTPUT"
"""Environment variable of every process that a run starts; its value is the output folder."""

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Owner:
    """The process that took the lock last."""

    pid: int
    """Process id."""

    host: str
    """Its machine."""

    born: int | None
    """When it started, in the kernel's ticks, since ids are used again; None if unknown."""

    @property
    def lives(self) -> bool:
        """Whether it still runs. Of another machine's process nothing is known: yes."""
        if self.host != os.uname().nodename:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return self.born == _born(self.pid)


def owner(path: Path) -> Owner | None:
    """Who took the lock last; None when nobody did, or has given it back."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or just being written
        return None


@contextlib.contextmanager
def held(path: Path, output: Path, patience: float = _PATIENCE_S) -> Iterator[int | None]:
    """Hold the lock of an output folder.

    Processes that inherit the file descriptor hold it too: when a run is killed, the next one waits
    until the commands that it left behind are gone.

    Args:
        path (Path): The lock file; it stays.
        output (Path): The folder that it stands for.
        patience (float): Seconds to wait for what a killed run left behind. Defaults to 60.

    Yields:
        int | None: The file descriptor; None where the file system has no locks.

    Raises:
        ValueError: Another run works there, or what a killed one left behind does not end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked = _wait(fd, path, output, patience)
        entry = {"pid": os.getpid(), "host": os.uname().nodename, "born": _born(os.getpid())}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(entry).encode(), 0)
        try:
            yield fd if locked else None
        finally:
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _wait(fd: int, path: Path, output: Path, patience: float) -> bool:
    """Wait until nobody works there; whether the file system has locks."""
    deadline = time.monotonic() + patience
    lockable = True
    while True:
        free = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError as error:  # some network file systems have no flock
            warnings.warn(
                f"{path} cannot be locked ({error}); make sure that one run at a time works there",
                stacklevel=3,
            )
            lockable = False
        found = owner(path)
        if found and found.lives and not (free and lockable):
            raise ValueError(
                f"{output}: another recipe run works there (process {found.pid} on {found.host}); "
                f"wait for it to end or stop it; if its machine is gone, delete {path}"
            )
        # A run that ended in order left no entry; what it left running is no writer of its stages.
        left = workers(output) if found or not free else {}
        if free and not left:
            return lockable
        if time.monotonic() > deadline:
            who = ", ".join(f"{pid} ({name})" for pid, name in left.items()) or "unknown"
            raise ValueError(
                f"{output}: a run was killed, and what it started still works there after "
                f"{patience:.0f} s: process {who}; wait for it, or end it"
            )
        time.sleep(0.1)


def workers(output: Path) -> dict[int, str]:
    """Processes that a run in this output folder started: their ids and command lines.

    Empty where the kernel does not tell (anywhere but Linux).
    """
    mark = f"{MARK}={os.path.realpath(output)}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = line.decode(errors="replace").strip()[:80]
    found.pop(os.getpid(), None)
    return found


def _born(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None where that is not known."""
    with contextlib.suppress(OSError):
        # The name, in parentheses, may hold spaces; the 22nd field is the 20th behind it.
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    return None
