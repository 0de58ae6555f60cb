"""Where a conversion works until its output is complete, and what an interrupted one comes back to.

The staging folder lies beside the output, hence on the same disk: the finished result takes the
output's name in one rename. It knows what is being converted and how. Whoever converts the same
thing the same way continues after the last complete file, even if the process before was killed;
for anything else it starts anew.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import hold, read_json, write_json_atomic

if TYPE_CHECKING:
    from filelock import BaseFileLock

_FINGERPRINT, _LOCK = "fingerprint.json", "lock"
_RESULT, _SHARDS, _REPLACED = "result", "shards", "replaced"
_DATA_FILES = ("*.safetensors", "*.distcp")
_HASHED_BYTES = 2**20  # larger files are known by their size and time of change


class StagingFolder:
    """Use :func:`staging_folder`.

    Args:
        output_dir (Path): What is to be written.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.path = output_dir.parent / f".{output_dir.name}.converting"
        self.result = self.path / _RESULT
        self.shards = self.path / _SHARDS
        self._lock: BaseFileLock | None = None

    def begin(self, identity: Mapping[str, Any]) -> bool:
        """Find what is to be continued, or clear the folder, which is locked.

        Args:
            identity (Mapping): What is converted and how, as JSON.

        Returns:
            bool: Whether an earlier run with the same identity has left its work here.
        """
        self._restore()
        known = self.path / _FINGERPRINT
        if known.is_file() and self.result.is_dir():
            with suppress(ValueError):  # damaged, so not known to be the same
                if read_json(known) == identity:
                    return self.has_data()
        for name in (_RESULT, _SHARDS, _REPLACED):
            shutil.rmtree(self.path / name, ignore_errors=True)
        known.unlink(missing_ok=True)
        self.result.mkdir()
        self.shards.mkdir()
        write_json_atomic(known, dict(identity))
        return False

    def has_data(self) -> bool:
        """Whether a file of tensors is complete."""
        return any(any(self.result.rglob(pattern)) for pattern in _DATA_FILES)

    def check_space(self, num_bytes: int) -> None:
        """Refuse to begin what the disk has no room for.

        Args:
            num_bytes (int): Bytes of tensors in all, those already written included.

        Raises:
            LongRopeError: Less is free than is still to be written.
        """
        files = (path for pattern in _DATA_FILES for path in self.result.rglob(pattern))
        needed = num_bytes - sum(path.stat().st_size for path in files)
        if (free := shutil.disk_usage(self.path).free) < needed:
            raise LongRopeError(
                f"{self.output_dir.parent}: has {free} bytes free and needs {needed}; make room or "
                "give an --output on another disk"
            )

    def put_in_place(self) -> None:
        """Give the result the output's name; what had it before is removed afterwards."""
        replaced = self.path / _REPLACED
        if self.output_dir.exists():
            replaced.mkdir(exist_ok=True)
            self.output_dir.rename(replaced / self.output_dir.name)
        try:
            self.result.rename(self.output_dir)
        except BaseException:
            self._restore()
            raise
        self.remove()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.release()

    def lock(self) -> None:
        """Make the folder and keep others out; the kernel lets them in when a process is killed.

        Raises:
            LongRopeError: Another process is converting to the same output.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = hold(
            self.path / _LOCK, f"{self.output_dir}", "wait for that one or give another --output"
        )

    def _restore(self) -> None:
        """Give back the folder that was to be replaced when the process ended in between."""
        replaced = self.path / _REPLACED / self.output_dir.name
        if replaced.exists() and not self.output_dir.exists():
            replaced.rename(self.output_dir)


def refuse_existing(output_dir: Path, remedy: str) -> None:
    """Refuse an output that is there, unless it is an empty folder.

    Raises:
        LongRopeError: It is.
    """
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise LongRopeError(f"{output_dir} exists already; {remedy}")


@contextmanager
def staging_folder(
    output_dir: Path, identity: Mapping[str, Any]
) -> Iterator[tuple[StagingFolder, bool]]:
    """The staging folder of an output, and whether an earlier run's work is in it.

    What fails leaves nothing. What is interrupted leaves the files that were complete, if any, and
    the exception carries a note that says so.

    Raises:
        LongRopeError: The disk is full, or another process is converting to the same output.
    """
    staging = StagingFolder(output_dir)
    staging.lock()
    try:
        yield staging, staging.begin(identity)
    except KeyboardInterrupt as error:
        if not staging.has_data():
            staging.remove()
            raise
        staging.close()
        error.add_note(
            f"complete files are kept in {staging.path}; the same command continues after them, "
            "and removing that folder gives up the conversion"
        )
        raise
    except OSError as error:
        staging.remove()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise LongRopeError(
            f"{output_dir.parent}: the disk is full; nothing was left behind, so make room or give "
            "an --output on another disk"
        ) from None
    except BaseException:
        staging.remove()
        raise
    staging.close()


@contextmanager
def complete_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that has its name once all of it is on the disk.

    Unlike :func:`megatron_longrope.files.atomic_file` it has one temporary name: gigabytes that a
    killed process leaves are overwritten by the next one, which the folder's lock keeps alone.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def file_identity(paths: Iterable[Path]) -> list[list[Any]]:
    """What tells files with other content apart, without reading large ones.

    Args:
        paths (Iterable[Path]): Files, and directories with everything in them.

    Returns:
        list: Name, size, and the content's hash or, above 1 MiB, the time of change in ns.
    """
    files: list[tuple[str, Path]] = []
    for path in paths:
        if path.is_dir():
            inside = (item for item in path.rglob("*") if item.is_file())
            files += [(item.relative_to(path).as_posix(), item) for item in inside]
        else:
            files.append((path.name, path))
    found = []
    for name, path in sorted(files):
        status = path.stat()
        known: str | int = status.st_mtime_ns
        if status.st_size <= _HASHED_BYTES:
            known = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append([name, status.st_size, known])
    return found
