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
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_longrope.checkpoint.folders import TRACKER
from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import check_folder, hold, read_json, write_json_atomic

if TYPE_CHECKING:
    from filelock import BaseFileLock

_STAGING = ".converting"
_FINGERPRINT, _LOCK = "fingerprint.json", "lock"
_RESULT, _SHARDS, _REPLACED = "result", "shards", "replaced"
_DATA_FILES = ("*.safetensors", "*.distcp")
_MEGATRON = (TRACKER, "iter_[0-9]*/", "mp_rank_[0-9]*/", "*.distcp")
MAX_SHARD_BYTES = 5_000_000_000
"""Size of a file of tensors, unless more is asked for."""
_HASHED_BYTES = 2**20  # larger files are known by their size and time of change


class _Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


class StagingFolder:
    """Use :func:`staging_folder`.

    Args:
        output_dir (Path): What is to be written, as :func:`output_folder` gives it.
        overwrite (bool): Whether it may replace what has its name.
    """

    def __init__(self, output_dir: Path, overwrite: bool = False) -> None:
        self.output_dir = output_dir
        self._overwrite = overwrite
        self.path = _staging_path(output_dir)
        self.result = self.path / _RESULT
        self.shards = self.path / _SHARDS
        self._lock: BaseFileLock | None = None

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Keep the work of an earlier run with the same identity, or clear the folder.

        Args:
            identity (Mapping): What is converted and how, as JSON.
        """
        self._restore()
        known = self.path / _FINGERPRINT
        if known.is_file() and self.result.is_dir():
            try:
                same = read_json(known) == identity
            except LongRopeError as error:
                if isinstance(error.__cause__, OSError):
                    raise
                same = False  # damaged, so not known to be the same
            if same:
                for half in self.result.rglob(".*.tmp"):  # of a process that was killed
                    half.unlink()
                return
        for name in (_RESULT, _SHARDS, _REPLACED):
            shutil.rmtree(self.path / name, ignore_errors=True)
        known.unlink(missing_ok=True)
        self.result.mkdir()
        self.shards.mkdir()
        write_json_atomic(known, dict(identity))

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
        """Give the result the output's name; what had it before is removed afterwards.

        Raises:
            NotPutInPlace: Something has that name that had not when the conversion began, or the
                system refuses to rename.
        """
        complete = f"the result is complete and lies in {self.result}"
        if not self._overwrite and _is_there(self.output_dir):
            raise NotPutInPlace(
                f"{self.output_dir} appeared during the conversion; {complete}, so move it to "
                "where you want it, or move away what appeared and run the same command again"
            )
        replaced = self.path / _REPLACED
        try:
            if self.output_dir.exists():
                replaced.mkdir(exist_ok=True)
                self.output_dir.rename(replaced / self.output_dir.name)
            try:
                self.result.rename(self.output_dir)
            except BaseException:
                self._restore()
                raise
        except OSError as error:
            raise NotPutInPlace(
                f"{self.output_dir}: cannot take its name ({error}); {complete}, so move it to "
                "where you want it, or run the same command again"
            ) from error
        self.remove()

    def remove(self) -> None:
        """Delete the folder, unless another process has it."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def keep(self, how: str = "") -> str:
        """Close the folder if there is something to continue, else delete it; says so in words."""
        if not self.has_data():
            self.remove()
            return "nothing was left behind"
        self.close()
        return (
            f"complete files are kept in {self.path}; the same command {how}continues after them, "
            "and removing that folder gives up the conversion"
        )

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


class NotVerified(LongRopeError):
    """The result could not be compared, which says nothing against it; its files are kept."""


class NotPutInPlace(LongRopeError):
    """The complete result could not take the output's name; the staging folder is kept."""


def output_folder(output_dir: str | Path, remedy: str | None) -> Path:
    """The absolute path of an output that can be written.

    Args:
        remedy (str, optional): What to do about one that is there, unless it is an empty folder.
            None lets it be replaced, if it holds no Megatron checkpoint.

    Raises:
        LongRopeError: It is there; or it cannot take its name at the end, because nobody may write
            beside it or because it is a mount point.
    """
    path = Path(output_dir).resolve()
    check_folder(path.parent)
    if os.path.ismount(path):
        raise LongRopeError(
            f"{path} is a mount point, whose name a finished conversion cannot take; give a folder "
            "inside it"
        )
    if remedy is not None and _is_there(path):
        raise LongRopeError(f"{output_dir} exists already; {remedy}")
    for pattern in _MEGATRON:
        if found := next(path.rglob(pattern), None):
            raise LongRopeError(
                f"{output_dir} holds {found}, a part of a Megatron checkpoint, and --overwrite "
                "would delete all of it; give another --output"
            )
    return path


def check_apart(output_dir: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output that would take what it is made of with it when it is replaced.

    Args:
        inputs (Iterable): Paths of files and folders that are read; None for those not given.

    Raises:
        LongRopeError: The output is one of them, or holds one.
    """
    path = Path(output_dir).resolve()
    for item in filter(None, inputs):
        source = Path(item).resolve()
        if {path, _staging_path(path)} & {source, *source.parents}:
            raise LongRopeError(
                f"writing {output_dir} would delete {item}, which is read; give another --output"
            )


def _staging_path(output_dir: Path) -> Path:
    return output_dir.parent / f".{output_dir.name}{_STAGING}"


def _is_there(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


@contextmanager
def staging_folder(
    output_dir: Path, identity: Mapping[str, Any], overwrite: bool = False
) -> Iterator[StagingFolder]:
    """The staging folder of an output, with what an earlier run of the same conversion completed.

    What is refused, or fills the disk, leaves nothing. What ends otherwise, be it by an error of
    the system, leaves the files that were complete, if any; the exception says so, or its note.

    Args:
        output_dir (Path): As :func:`output_folder` gives it.
        identity (Mapping): See :meth:`StagingFolder.begin`.
        overwrite (bool): Whether the output may replace what has its name. Defaults to False.

    Raises:
        LongRopeError: The system reported an error, such as a full disk, another process is
            converting to the same output, or the output appeared in the meantime.
    """
    staging = StagingFolder(output_dir, overwrite)
    try:
        staging.lock()
        staging.begin(identity)
        yield staging
    except NotPutInPlace:
        staging.close()
        raise
    except NotVerified as error:
        raise LongRopeError(f"{error}; {staging.keep('with --no-verify ')}") from error
    except (LongRopeError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            staging.remove()
            raise
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            where = f"{output_dir}: " if cause is error else ""
            raise LongRopeError(f"{where}{error}; {staging.keep()}") from error
        staging.remove()
        raise LongRopeError(
            f"{output_dir.parent}: the disk is full; nothing was left behind, so make room or give "
            "an --output on another disk"
        ) from None
    except BaseException as error:
        error.add_note(staging.keep())
        raise
    staging.close()


def in_shards[Item: _Sized](items: Iterable[Item], max_bytes: int) -> list[list[Item]]:
    """Divide what is to be written, in its order, into files.

    Args:
        max_bytes (int): Largest file, unless a single item is larger.
    """
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.num_bytes
    return shards


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
            inside = ((item.relative_to(path), item) for item in path.rglob("*"))
            # What is being written is no part of it, wherever that lies.
            files += [
                (name.as_posix(), item)
                for name, item in inside
                if item.is_file() and not any(part.endswith(_STAGING) for part in name.parts)
            ]
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
