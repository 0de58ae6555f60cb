"""Documents from text files, JSON lines and directories of them, one at a time."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Document:
    """One document of the corpus."""

    id: str
    """`FILE` for a text file, `FILE:LINE` for a line of JSON."""

    text: str
    """The text, newlines and all white space as they stand in the file."""


@dataclass(frozen=True)
class SkippedDocument:
    """A place that held no readable document."""

    file: str
    """Source file."""

    line: int
    """Line of the problem, counted from 1."""

    reason: str
    """What is wrong with it."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def find_source_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Expand files and directories (recursively, sorted by path) into source files.

    Args:
        inputs (Iterable[Path]): .txt, .jsonl or .jsonl.gz files, or directories that hold some;
            the order is kept.

    Raises:
        ValueError: A path does not exist, has another suffix, stands twice, or a directory holds
            no source file.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(item for item in path.rglob("*") if item.is_file() and _is_source(item))
            if not found:
                raise ValueError(
                    f"directory {path} holds no {', '.join(SUFFIXES)} file; give one that does"
                )
            files.extend(found)
        elif not path.exists():
            raise ValueError(f"input {path} does not exist; check the path")
        elif not _is_source(path):
            raise ValueError(
                f"input {path} is of an unknown kind; sources are {', '.join(SUFFIXES)} files "
                "or directories of them"
            )
        else:
            files.append(path)
    if not files:
        raise ValueError("no input was given; name at least one file or directory")
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise ValueError(f"input {path} is given twice; name each file or directory once")
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
        on_skip (Callable, optional): Receives every unreadable document, which is then skipped.
            Defaults to raising.
        on_bytes (Callable, optional): Receives the bytes read from disk since the last call.

    Raises:
        ValueError: A document cannot be read and `on_skip` is None; names file and line.
    """

    def report(path: Path, line: int, reason: str) -> None:
        skipped = SkippedDocument(str(path), line, reason)
        if on_skip is None:
            raise ValueError(f"{skipped}; repair it or pass --on-error skip")
        on_skip(skipped)

    for path in map(Path, files):
        position = 0
        with path.open("rb") as raw:
            read = _read_text if path.name.endswith(".txt") else _read_json_lines
            for line, document in read(path, raw, text_key):
                if on_bytes is not None:
                    on_bytes(raw.tell() - position)
                    position = raw.tell()
                if isinstance(document, Document):
                    yield document
                else:
                    report(path, line, document)


def _is_source(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _read_text(path: Path, raw: BinaryIO, text_key: str) -> Iterator[tuple[int, Document | str]]:
    """The one document of a text file, or the reason why there is none."""
    data = raw.read()
    try:
        # Decoding bytes, unlike text mode, keeps \r\n; a byte order mark is not part of the text.
        yield 1, Document(str(path), data.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield line, f"byte 0x{data[error.start]:02x} is not valid UTF-8"


def _read_json_lines(
    path: Path, raw: BinaryIO, text_key: str
) -> Iterator[tuple[int, Document | str]]:
    """Line numbers with a document or with the reason why there is none."""
    lines = iter(gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw)
    number = 0
    while True:
        number += 1
        try:
            line = next(lines, None)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            # Nothing behind the damage can be decompressed.
            yield number, f"the gzip data is damaged from here on ({error})"
            return
        if line is None:
            return
        if not line.strip():
            continue
        try:
            yield number, Document(f"{path}:{number}", _parse_line(line, text_key))
        except ValueError as error:
            yield number, str(error)


def _parse_line(line: bytes, text_key: str) -> str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{line[error.start]:02x} is not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    if text_key not in value:
        raise ValueError(f"the object has no key {text_key!r} (keys: {sorted(value)[:8]})")
    text = value[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} holds {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, no tokenizer can read it
        raise ValueError(f"{text_key!r} holds an unpaired surrogate") from None
    return text
