"""What a stage depends on, as hashes: its commands, and the content of what it reads."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_longrope.checkpoint.folders import TRACKER
from megatron_longrope.files import read_json, write_json_atomic

if TYPE_CHECKING:
    from megatron_longrope.recipe.document import Stage

_THREADS = min(8, os.cpu_count() or 1)
_TOLD_BYTES = 1 << 30  # reading so much takes a while; say so


@dataclass(frozen=True)
class Parts:
    """Everything that decides whether a stage's result is still the one wanted."""

    commands: tuple[tuple[str, ...], ...]
    """`run` and `args` of every command."""

    reads: Mapping[str, str]
    """For each input the hash of its content; `absent` without one."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all of it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"commands": [list(words) for words in self.commands], "reads": dict(self.reads)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Parts:
        """The inverse of :meth:`to_dict`."""
        return cls(tuple(tuple(words) for words in data["commands"]), dict(data["reads"]))

    def changes_since(self, old: Parts) -> list[str]:
        """What differs from an older state, a phrase each."""
        found = [
            f"{name} is new among its inputs"
            if name not in old.reads
            else f"{name} has another content"
            for name, content in self.reads.items()
            if old.reads.get(name) != content
        ]
        found += [f"{name} is no longer an input" for name in old.reads if name not in self.reads]
        if len(self.commands) != len(old.commands):
            return [*found, f"{len(self.commands)} commands instead of {len(old.commands)}"]
        for ours, theirs in zip(self.commands, old.commands, strict=True):
            found += _changed_flags(ours, theirs)
        return found


class Contents:
    """Hashes of files and folders; a file that was not touched is not read again.

    Args:
        cache (Path): Remembers the hash of every file by its path, size, time and inode.
        say (Callable[[str], None], optional): Is told when much has to be read.
        keep (bool): Write the cache. Defaults to True.
    """

    def __init__(
        self, cache: Path, say: Callable[[str], None] | None = None, *, keep: bool = True
    ) -> None:
        self._cache, self._say, self._keep = cache, say, keep
        self._known: dict[str, list] = read_json(cache) if cache.exists() else {}
        self._lock = threading.Lock()

    def parts(self, stage: Stage) -> Parts:
        """What the stage depends on, as its files are now.

        Raises:
            OSError: A file cannot be read.
        """
        with self._lock:  # stages that start side by side may read the same checkpoint
            return Parts(
                tuple(command.computed for command in stage.commands),
                {name: self._hash(path) for path, name in stage.reads.items()},
            )

    def _hash(self, path: str) -> str:
        """The hash of a file, or of the names and hashes of all files in a folder."""
        root = Path(path).absolute()
        if not root.exists():
            return "absent"
        files = sorted(_files(root))
        self._read([file for file in files if self._remembered(file) is None])
        digests = [self._known[str(file)][1] for file in files]
        if root.is_file():
            return digests[0]
        lines = (
            f"{file.relative_to(root)}\0{digest}\n"
            for file, digest in zip(files, digests, strict=True)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _remembered(self, file: Path) -> str | None:
        known = self._known.get(str(file))
        return known[1] if known is not None and known[0] == _stamp(file) else None

    def _read(self, files: Sequence[Path]) -> None:
        if not files:
            return
        # Taken before the content: what is written meanwhile is seen the next time.
        stamps = [_stamp(file) for file in files]
        if self._say and (size := sum(stamp[0] for stamp in stamps)) >= _TOLD_BYTES:
            self._say(f"reading {size / 1e9:.1f} GB in {len(files)} files to know their content")
        with ThreadPoolExecutor(_THREADS) as pool:
            for file, stamp, digest in zip(
                files, stamps, pool.map(file_digest, files), strict=True
            ):
                self._known[str(file)] = [stamp, digest]
        if self._keep:
            write_json_atomic(self._cache, self._known)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _files(path: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files below; of a Megatron `--save` folder the tracker and the iteration it names."""
    if not path.is_dir():
        if path.exists():  # no dangling link
            yield path
        return
    status = path.stat()
    place = (status.st_dev, status.st_ino)
    if place in above:  # a link to a folder around it
        return
    tracker = path / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        inner = [tracker, path / (f"iter_{int(text):07d}" if text.isdecimal() else "release")]
    else:
        inner = list(path.iterdir())
    for item in inner:
        yield from _files(item, (*above, place))


def _changed_flags(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    new, old = _flags(ours), _flags(theirs)
    found = []
    for flag in dict.fromkeys((*new, *old)):
        if new.get(flag) == old.get(flag):
            continue
        if flag not in old:
            found.append(f"{new[flag]} is new")
        elif flag not in new:
            found.append(f"{old[flag]} is gone")
        else:
            found.append(f"{old[flag]} became {new[flag]}")
    return found or (["the order of its flags"] if tuple(ours) != tuple(theirs) else [])


def _flags(words: Sequence[str]) -> dict[str, str]:
    """Words by the flag that they follow; what stands before the first belongs to no flag."""
    found: dict[str, str] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
        found[flag] = f"{found[flag]} {word}" if flag in found else word
    return found
