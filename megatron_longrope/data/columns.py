"""Documents from columns of text: parquet files and folders written by datasets' `save_to_disk`.

A row is a document. Rows are decoded a few at a time, whatever the size of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_longrope.errors import LongRopeError

# Rows decoded at once: 64 books are some 30 MB.
_ROWS = 64

# A folder holds a saved dataset when it has this file beside dataset_info.json.
_STATE = "state.json"

Kind = Literal["damage", "no key", "no column"]
"""Why there is no text; a column is missing in every row."""


class Row(NamedTuple):
    """What was read of one line or row."""

    number: int
    """Line or row, counted from 1."""
    text: str
    """The text, empty where there is none."""
    done: int
    """Bytes of the file that are read."""
    reason: str | None = None
    """Why there is no text."""
    kind: Kind = "damage"
    """The kind of reason."""


def is_dataset_folder(path: Path) -> bool:
    """Whether it is a dataset saved by `Dataset.save_to_disk` (one split, not a dict of them)."""
    return (path / _STATE).is_file() and (path / "dataset_info.json").is_file()


@contextmanager
def refuse_unreadable(path: Path) -> Iterator[None]:
    """Refuse what the file system does not let us read of `path` while the block runs.

    Raises:
        LongRopeError: A file or directory cannot be read; names it.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise LongRopeError(f"{where} cannot be read: {error.strerror or error}") from None


def read_parquet(path: Path, text_key: str) -> Iterator[Row]:
    """Rows of a parquet file; bytes are done by the share of rows.

    Raises:
        LongRopeError: pyarrow is not installed.
        OSError: The file cannot be read, whatever is in it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise LongRopeError(
            f"{path} needs pyarrow, which is not installed; run `pip install pyarrow`"
        ) from None

    size, row = path.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                yield _no_column(text_key, file.schema_arrow.names, size)
                return
            total = file.metadata.num_rows
            for batch in file.iter_batches(_ROWS, columns=[text_key]):
                for value in batch.column(0):
                    row += 1
                    yield _row(row, value, text_key, size * row // total)
    except (pyarrow.ArrowException, OSError) as error:
        # The disk's, such as EIO, have a number; too little memory and Ctrl-C are no damage either.
        no_damage = isinstance(error, (MemoryError, pyarrow.ArrowCancelled))
        if no_damage or getattr(error, "errno", None):
            raise
        reason = " ".join(str(error).split())
        yield Row(row + 1, "", size, f"the parquet data is damaged from here on ({reason})")


def read_dataset_folder(path: Path, text_key: str) -> Iterator[Row]:
    """Rows, as of :func:`read_parquet`, of a folder saved by `Dataset.save_to_disk`.

    Its files are mapped, not loaded.

    Raises:
        LongRopeError: datasets is not installed, or the folder cannot be opened.
    """
    try:
        from datasets import load_from_disk
    except ModuleNotFoundError:
        raise LongRopeError(
            f"{path} needs datasets, which is not installed; run `pip install datasets`"
        ) from None

    try:
        data: Any = load_from_disk(str(path))
    except Exception as error:  # datasets raises many types for a broken folder
        reason = " ".join(str(error).split())
        raise LongRopeError(f"{path} cannot be opened as a saved dataset: {reason}") from None
    size = source_size(path)
    if text_key not in data.column_names:
        yield _no_column(text_key, data.column_names, size)
        return
    data, row = data.select_columns([text_key]).with_format("arrow"), 0
    for table in data.iter(_ROWS):
        for value in table.column(0):
            row += 1
            yield _row(row, value, text_key, size * row // len(data))


def source_size(path: Path) -> int:
    """Bytes of a source: the file's, or those of all files of a saved dataset."""
    with refuse_unreadable(path):
        files = path.iterdir() if path.is_dir() else [path]
        return sum(item.stat().st_size for item in files if item.is_file())


def _row(number: int, value: Any, text_key: str, done: int) -> Row:
    """A cell as text, or the reason why it is none."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        reason = f"byte 0x{error.object[error.start]:02x} is not valid UTF-8"
        return Row(number, "", done, reason)
    if not isinstance(text, str):
        return Row(number, "", done, f"{text_key!r} holds {type(text).__name__}, not a string")
    return Row(number, text, done)


def _no_column(text_key: str, names: list[str], size: int) -> Row:
    reason = f"there is no column {text_key!r} (columns: {sorted(names)[:8]})"
    return Row(1, "", size, reason, "no column")
