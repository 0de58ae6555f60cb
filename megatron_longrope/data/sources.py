"""Documents from text files, JSON lines, columns and directories of them, one at a time."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_longrope.data.columns import (
    Kind,
    Row,
    is_dataset_folder,
    read_dataset_folder,
    read_parquet,
    refuse_unreadable,
    source_size,
)
from megatron_longrope.errors import LongRopeError

SUFFIXES = (
    ".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".parquet",
)  # fmt: skip

# Bytes decompressed at once. Behind damage nothing of such a block can be read.
_BLOCK = 16384


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
    kind: Kind = "damage"
    """Whether the text is damaged, or another key or column would have to be named."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"

    @property
    def remedy(self) -> str:
        """Return what helps."""
        if self.kind != "damage":
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
        LongRopeError: A path does not exist, has another suffix, stands twice or cannot be read, or
            a directory holds no source file or a link to nothing.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        with refuse_unreadable(path):
            files += _expand(path, on_unread)
    if not files:
        raise LongRopeError("no input was given; name at least one file or directory")
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise LongRopeError(f"input {path} is given twice; name each file or directory once")
        seen.add(path.resolve())
    return files


def _expand(path: Path, on_unread: Callable[[Path], object]) -> list[Path]:
    """The source files that an input stands for."""
    if path.is_dir():
        if is_dataset_folder(path):
            return [path]
        below = sorted(_walk(path, on_unread))
        if not below:
            raise LongRopeError(
                f"directory {path} holds no {', '.join(SUFFIXES)} file and no saved dataset; "
                "give one that does"
            )
        # What a link shows a second time is one source, under its first name.
        return sorted({item.resolve(): item for item in reversed(below)}.values())
    if not path.exists():
        raise LongRopeError(f"input {path} does not exist; check the path")
    # In directories .json files are mostly something else than lines of JSON.
    if not _ends(path, *SUFFIXES, ".json"):
        raise LongRopeError(
            f"input {path} is of an unknown kind; sources are {', '.join(SUFFIXES)}, .json "
            "files, folders saved by datasets, or directories of them"
        )
    return [path]


def _ends(path: Path, *suffixes: str) -> bool:
    return path.name.lower().endswith(suffixes)


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
        for row in _rows(path, text_key):
            if on_bytes is not None:
                on_bytes(row.done - done)
                done = row.done
            if row.reason is None:
                yield Document(
                    str(path) if _ends(path, ".txt") else f"{path}:{row.number}", row.text
                )
                continue
            skipped = SkippedDocument(str(path), row.number, row.reason, row.kind)
            if on_skip is not None:
                on_skip(skipped)
            if on_skip is None or skipped.kind == "no column":
                raise LongRopeError(f"{skipped}; {skipped.remedy}")
        if on_bytes is not None:
            on_bytes(source_size(path) - done)


def _rows(path: Path, text_key: str) -> Iterator[Row]:
    with refuse_unreadable(path):
        yield from _reader(path)(path, text_key)


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
        elif (
            item.is_symlink() and not item.exists() and (not item.suffix or _ends(item, *SUFFIXES))
        ):
            # A download that was not finished, a folder's disk that is not mounted.
            raise LongRopeError(
                f"{item} is a link to {item.readlink()}, where nothing is; bring that back, or "
                "remove the link"
            )
        elif is_dataset_folder(item) or (item.is_file() and _ends(item, *SUFFIXES)):
            yield item
        elif not item.is_dir():
            on_unread(item)
        elif item.resolve() not in above:
            yield from _walk(item, on_unread, above)


def _reader(path: Path) -> Callable[[Path, str], Iterator[Row]]:
    if path.is_dir():
        return read_dataset_folder
    if _ends(path, ".parquet"):
        return read_parquet
    return _read_text if _ends(path, ".txt") else _read_json_lines


def _read_text(path: Path, text_key: str) -> Iterator[Row]:
    """The one document of a text file, or the reason why there is none."""
    data = path.read_bytes()
    try:
        # Decoding bytes, unlike text mode, keeps \r\n; a byte order mark is not part of the text.
        yield Row(1, data.decode("utf-8").removeprefix("\ufeff"), len(data))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield Row(line, "", len(data), f"byte 0x{data[error.start]:02x} is not valid UTF-8")


def _read_json_lines(path: Path, text_key: str) -> Iterator[Row]:
    """Lines with a document or with the reason why there is none."""
    damage, compression = _decompression_errors(path)
    with path.open("rb") as raw:
        lines = _decompressed(path, raw)
        number = 0
        while True:
            number += 1
            try:
                line = next(lines, None)
            except damage as error:
                # Nothing behind the damage can be decompressed.
                reason = f"the {compression} data is damaged from here on ({error})"
                yield Row(number, "", raw.tell(), reason)
                return
            if line is None:
                return
            if not line.strip():
                continue
            text, reason, kind = _parse_line(line, text_key)
            yield Row(number, text, raw.tell(), reason, kind)


def _decompressed(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file."""
    if _ends(path, ".gz"):
        return iter(gzip.GzipFile(fileobj=raw))
    return _lines(_frames(path, raw)) if _ends(path, ".zst") else iter(raw)


def _frames(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """What the frames of a zstd file hold, piece by piece; parallel compressors write several.

    zstandard's own stream_reader takes a file that ends within a frame for a complete one.
    """
    # Long windows, as of `zstd --long=31`; without this 128 MB are the most.
    decompressor = _zstandard(path).ZstdDecompressor(max_window_size=2**31)
    frame = None
    while block := raw.read(_BLOCK):
        while block:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(block)
            block = b""
            if frame.eof:
                block, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the file ended before the end of a frame")


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for piece in pieces:
        *ends, rest = piece.split(b"\n")
        for end in ends:
            yield b"".join([*begun, end])
            begun = []
        begun.append(rest)
    yield b"".join(begun)


def _decompression_errors(path: Path) -> tuple[tuple[type[Exception], ...], str]:
    """What reading a damaged file of this kind raises, and the name of the kind."""
    if _ends(path, ".zst"):
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


def _parse_line(line: bytes, text_key: str) -> tuple[str, str | None, Kind]:
    """The text of a line of JSON, or the reason why there is none, and its kind."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return "", f"byte 0x{line[error.start]:02x} is not valid UTF-8", "damage"
    except json.JSONDecodeError as error:
        return "", f"not valid JSON at column {error.colno}: {error.msg}", "damage"
    except ValueError as error:  # a number of thousands of digits
        return "", f"not valid JSON: {error}", "damage"
    except RecursionError:
        return "", "the JSON is nested too deeply", "damage"
    if not isinstance(value, dict):
        return "", f"expected a JSON object on each line, got {type(value).__name__}", "damage"
    if text_key not in value:
        return "", f"there is no key {text_key!r} (keys: {sorted(value)[:8]})", "no key"
    text = value[text_key]
    if not isinstance(text, str):
        return "", f"{text_key!r} holds {type(text).__name__}, not a string", "damage"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, no tokenizer can read it
        return "", f"{text_key!r} holds an unpaired surrogate", "damage"
    return text, None, "damage"
