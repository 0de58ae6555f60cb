"""Documents from text files, JSON lines, columns and directories of them, one at a time."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_longrope.data.columns import (
    NO_COLUMN,
    NO_TEXT,
    is_dataset_folder,
    read_dataset_folder,
    read_parquet,
    source_size,
)
from megatron_longrope.errors import LongRopeError

SUFFIXES = (
    ".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".parquet",
)  # fmt: skip

# Read as JSON lines where it is named itself; in directories such files are mostly something else.
_NAMED_SUFFIXES = (*SUFFIXES, ".json")

# What a reader yields: line or row, text, None or the reason why there is no text, bytes done.
_Rows = Iterator[tuple[int, str, str | None, int]]


@dataclass(frozen=True)
class Document:
    """One document of the corpus."""

    id: str
    """`FILE` for a text file, `FILE:LINE` for a line of JSON, `FILE:ROW` for a row of a column."""
    text: str
    """The text, newlines and all white space as they stand in the file."""


@dataclass(frozen=True)
class SkippedDocument:
    """A place that held no readable document."""

    file: str
    """Source file."""
    line: int
    """Line or row of the problem, counted from 1."""
    reason: str
    """What is wrong with it."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"

    @property
    def lacks_text(self) -> bool:
        """Return whether another key or column would have to be named."""
        return self.reason.startswith(NO_TEXT)

    @property
    def lacks_column(self) -> bool:
        """Return whether it is a whole file or folder, of which nothing can be read."""
        return self.reason.startswith(NO_COLUMN)

    @property
    def remedy(self) -> str:
        """Return what helps."""
        if self.lacks_text:
            return (
                "name the text with --text-key, or with text_key of the source in a mix, or leave "
                "the file out"
            )
        return "repair it or pass --on-error skip"


def find_source_files(
    inputs: Iterable[str | Path], on_unread: Callable[[Path], object] = lambda _: None
) -> list[Path]:
    """Expand files and directories (recursively, sorted by path) into source files.

    What begins with a dot in a directory (`.git`, `.ipynb_checkpoints`) is passed over, and so are
    files of other kinds; a path that is given itself is read whatever its name.

    Args:
        inputs (Iterable[Path]): Files of :data:`SUFFIXES`, folders written by datasets'
            `save_to_disk`, or directories that hold some of these; the order is kept. A .json file
            that is named itself is read as JSON lines.
        on_unread (Callable, optional): Receives every path that was passed over.

    Raises:
        LongRopeError: A path does not exist, has another suffix, stands twice, or a directory holds
            no source file.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = [path]
            if not is_dataset_folder(path):
                below = sorted(_walk(path, on_unread))
                # What a link shows a second time is one source, under its first name.
                found = sorted({item.resolve(): item for item in reversed(below)}.values())
            if not found:
                raise LongRopeError(
                    f"directory {path} holds no {', '.join(SUFFIXES)} file and no saved dataset; "
                    "give one that does"
                )
            files.extend(found)
        elif not path.exists():
            raise LongRopeError(f"input {path} does not exist; check the path")
        elif not path.name.endswith(_NAMED_SUFFIXES):
            raise LongRopeError(
                f"input {path} is of an unknown kind; sources are {', '.join(_NAMED_SUFFIXES)} "
                "files, folders saved by datasets, or directories of them"
            )
        else:
            files.append(path)
    if not files:
        raise LongRopeError("no input was given; name at least one file or directory")
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise LongRopeError(f"input {path} is given twice; name each file or directory once")
        seen.add(path.resolve())
    return files


def iterate_documents(
    files: Iterable[str | Path],
    text_key: str = "text",
    on_skip: Callable[[SkippedDocument], object] | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Iterator[Document]:
    """Yield the documents of `files` in order; blank lines of JSON-lines files are no documents.

    Args:
        files (Iterable[Path]): Source files, see :func:`find_source_files`.
        text_key (str): Key of the text in each JSON object. Defaults to "text".
        on_skip (Callable, optional): Receives every unreadable document, which is then skipped,
            unless it is a file without the column. Defaults to raising.
        on_bytes (Callable, optional): Receives the bytes read from disk since the last call.

    Raises:
        LongRopeError: A document cannot be read and `on_skip` is None, or a file or its column is
            not there to be read; names file and line.
    """

    for path in map(Path, files):
        done = 0
        for line, text, reason, position in _rows(path, text_key):
            if on_bytes is not None:
                on_bytes(position - done)
                done = position
            if reason is None:
                yield Document(str(path) if path.name.endswith(".txt") else f"{path}:{line}", text)
                continue
            skipped = SkippedDocument(str(path), line, reason)
            if on_skip is not None:
                on_skip(skipped)
            if on_skip is None or skipped.lacks_column:
                raise LongRopeError(f"{skipped}; {skipped.remedy}")
        if on_bytes is not None:
            on_bytes(source_size(path) - done)


def _rows(path: Path, text_key: str) -> _Rows:
    try:
        yield from _reader(path)(path, text_key)
    except OSError as error:
        raise LongRopeError(f"{path} cannot be read: {error.strerror or error}") from None


def _walk(
    directory: Path, on_unread: Callable[[Path], object], above: frozenset[Path] = frozenset()
) -> Iterator[Path]:
    """The source files below a directory that are not hidden; a saved dataset counts as one.

    Links are followed, but for one to a directory that it lies in (`above`), which holds nothing
    else.
    """
    above |= {directory.resolve()}
    for item in directory.iterdir():
        if item.name.startswith("."):
            on_unread(item)
        elif is_dataset_folder(item) or (item.is_file() and item.name.endswith(SUFFIXES)):
            yield item
        elif not item.is_dir():
            on_unread(item)
        elif item.resolve() not in above:
            yield from _walk(item, on_unread, above)


def _reader(path: Path) -> Callable[[Path, str], _Rows]:
    if path.is_dir():
        return read_dataset_folder
    if path.name.endswith(".parquet"):
        return read_parquet
    return _read_text if path.name.endswith(".txt") else _read_json_lines


def _read_text(path: Path, text_key: str) -> _Rows:
    """The one document of a text file, or the reason why there is none."""
    data = path.read_bytes()
    try:
        # Decoding bytes, unlike text mode, keeps \r\n; a byte order mark is not part of the text.
        yield 1, data.decode("utf-8").removeprefix("\ufeff"), None, len(data)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield line, "", f"byte 0x{data[error.start]:02x} is not valid UTF-8", len(data)


def _read_json_lines(path: Path, text_key: str) -> _Rows:
    """Lines with a document or with the reason why there is none."""
    damage, kind = _decompression_errors(path)
    with path.open("rb") as raw:
        lines = iter(_decompressed(path, raw))
        number = 0
        while True:
            number += 1
            try:
                line = next(lines, None)
            except damage as error:
                # Nothing behind the damage can be decompressed.
                reason = f"the {kind} data is damaged from here on ({error})"
                yield number, "", reason, raw.tell()
                return
            if line is None:
                return
            if not line.strip():
                continue
            try:
                yield number, _parse_line(line, text_key), None, raw.tell()
            except ValueError as error:
                yield number, "", str(error), raw.tell()


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.name.endswith(".zst"):
        # A file may be several frames, one behind the other, as parallel compressors write them.
        reader = _zstandard(path).ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(reader)
    return raw


def _decompression_errors(path: Path) -> tuple[tuple[type[Exception], ...], str]:
    """What reading a damaged file of this kind raises, and the name of the kind."""
    if path.name.endswith(".zst"):
        return (EOFError, _zstandard(path).ZstdError), "zstd"
    return (EOFError, gzip.BadGzipFile, zlib.error), "gzip"


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise LongRopeError(
            f"{path} needs zstandard, which is not installed; run `pip install zstandard`, "
            "or decompress the file"
        ) from None
    return zstandard


def _parse_line(line: bytes, text_key: str) -> str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LongRopeError(f"byte 0x{line[error.start]:02x} is not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise LongRopeError(f"not valid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise LongRopeError("the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise LongRopeError(f"expected a JSON object on each line, got {type(value).__name__}")
    if text_key not in value:
        raise LongRopeError(f"{NO_TEXT} key {text_key!r} (keys: {sorted(value)[:8]})")
    text = value[text_key]
    if not isinstance(text, str):
        raise LongRopeError(f"{text_key!r} holds {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, no tokenizer can read it
        raise LongRopeError(f"{text_key!r} holds an unpaired surrogate") from None
    return text
