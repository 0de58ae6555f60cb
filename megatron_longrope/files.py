"""Small file helpers: every artifact this package writes appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_longrope.errors import LongRopeError

if TYPE_CHECKING:
    from filelock import BaseFileLock


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made, or in which nothing can be written.

    Raises:
        LongRopeError: A part of it is a file, or does not let us write.
    """
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise LongRopeError(f"{path} cannot be a folder: {existing} is a file; name another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise LongRopeError(f"{path}: {existing} lets nobody write there; name another folder")


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Refuse when one of the files `paths` exists, unless `overwrite` is set.

    Raises:
        LongRopeError: One exists, or is a directory.
    """
    for path in paths:
        if path.is_dir():
            raise LongRopeError(f"{path} is a directory; give the name of a file")
        if path.exists() and not overwrite:
            raise LongRopeError(
                f"{path} exists; outputs are not replaced silently, "
                "pass --overwrite or choose another name"
            )


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, as :func:`write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, as :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when all is written: a reader sees the old or the new.

    The content goes to a temporary file in the same directory, is flushed to disk and then renamed.

    Raises:
        LongRopeError: The file cannot be begun, because of the OSError that is its cause.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise LongRopeError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates 0600; give the file the mode that open() would have given it.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def hold(path: Path, what: str, remedy: str, wait: float = 0.0) -> BaseFileLock:
    """Take a lock until `release()` or the end of this process, however it ends.

    The file says who has it. It may be removed, with the folder it lies in, before it is released.
    A file system without such locks is a warning: nothing is locked there.

    Args:
        path (Path): The lock file.
        what (str): What is written under it, for the error.
        remedy (str): What to do when another process has it.
        wait (float): Seconds to wait for that process. Defaults to 0.

    Raises:
        LongRopeError: Another process has it.
    """
    from filelock import FileLock, SoftFileLock, Timeout  # takes a tenth of a second

    lock = FileLock(path, thread_local=False)
    # Read before it is asked for, because filelock up to 3.29 empties the file in doing so.
    owner = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    reason: Exception | str | None = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flock not supported")  # ours is below
            # Its holder may remove the file between our opening and locking it; then filelock tries
            # again, for which it needs some time.
            lock.acquire(timeout=max(wait, 0.1))
    except Timeout:
        if not isinstance(lock, SoftFileLock):
            owner = owner or "another process"
            raise LongRopeError(f"{what} is being written by {owner}; {remedy}") from None
    except (OSError, NotImplementedError) as error:  # some network file systems have no flock
        reason = error
    # Where there is no flock filelock takes a soft lock, which would outlive a killed process.
    if isinstance(lock, SoftFileLock):
        lock.release()
        reason = "no flock there"
    if reason is not None:
        warnings.warn(
            f"{path} cannot be locked ({reason}); make sure that one process writes {what}",
            stacklevel=3,
        )
    else:
        with contextlib.suppress(OSError):  # a full disk, say, which needs no note to be locked
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    return lock


NOT_FINITE = ("NaN", "Infinity", "-Infinity")
"""Texts for what JSON has no number for, as protobuf writes them; `float` reads them."""


def finite_json(value: Any, *, texts: bool = False) -> Any:
    """The value with null, or texts of NOT_FINITE, in place of numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value) if texts else None
    if isinstance(value, Mapping):
        return {name: finite_json(item, texts=texts) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item, texts=texts) for item in value]
    return value


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; every failure is one sentence that names the file and the reason.

    Raises:
        LongRopeError: The file is missing, unreadable, empty, not UTF-8 or not JSON, or an object
            in it has one key twice, of which JSON would keep the last.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows put a mark in front
    except FileNotFoundError:
        raise LongRopeError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LongRopeError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise LongRopeError(f"{path}: the file is empty; expected a JSON object")
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except LongRopeError as error:
        raise LongRopeError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise LongRopeError(
            f"{path}: not valid JSON at line {error.lineno} column {error.colno}: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise LongRopeError(f"{path}: cannot be read as JSON: {error}") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a file with a JSON object, as :func:`read_json`.

    Raises:
        LongRopeError: Also when it holds another JSON value.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise LongRopeError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def json_lines(path: Path) -> tuple[list[tuple[int, Any]], int]:
    """Read a file with a JSON value on each line; what a crash left of the last is passed over.

    Returns:
        tuple[list[tuple[int, Any]], int]: Number and value of every line that is not empty; and the
        bytes up to the end of the last of them, behind which the file may go on torn.

    Raises:
        LongRopeError: A line before the last is not JSON.
    """
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append((number, json.loads(line)))
        except ValueError:
            if number == len(lines):
                return found, sum(len(whole) + 1 for whole in lines[:-1])
            raise LongRopeError(
                f"{path}, line {number}: not JSON; the file is damaged, repair the line or move "
                "the file away"
            ) from None
    return found, sum(len(whole) + 1 for whole in lines) - 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without a key that stands twice."""
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise LongRopeError(f"the key {key!r} stands twice in one object; rename or drop one")
        value[key] = item
    return value
