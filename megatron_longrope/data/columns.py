"""Documents from columns of text: parquet files and folders written by datasets' `save_to_disk`.

A row is a document. Rows are decoded a few at a time, whatever the size of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_longrope.errors import LongRopeError

# Rows decoded at once: 64 books are some 30 MB.
_ROWS = 64

# A folder holds a saved dataset when it has this file beside dataset_info.json.
_STATE = "state.json"

NO_TEXT = "there is no"
"""How a reason begins that another key or column would mend."""

NO_COLUMN = f"{NO_TEXT} column"
"""How a reason begins that is true of every row."""


def is_dataset_folder(path: Path) -> bool:
    """Whether it is a dataset saved by `Dataset.save_to_disk` (one split, not a dict of them)."""
    return (path / _STATE).is_file() and (path / "dataset_info.json").is_file()


def read_parquet(path: Path, text_key: str) -> Iterator[tuple[int, str, str | None, int]]:
    """Rows of a parquet file.

    Yields:
        tuple: Row from 1, the text, None, and the bytes of the file that are done, by share of
            rows. For a row without text: the reason instead of None.

    Raises:
        LongRopeError: pyarrow is not installed.
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
                yield 1, "", _no_column(text_key, file.schema_arrow.names), size
                return
            total = file.metadata.num_rows
            for batch in file.iter_batches(_ROWS, columns=[text_key]):
                for value in batch.column(0):
                    row += 1
                    yield (row, *_text_of(value, text_key), size * row // total)
    except PermissionError:
        raise
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        yield row + 1, "", f"the parquet data is damaged from here on ({reason})", size


def read_dataset_folder(path: Path, text_key: str) -> Iterator[tuple[int, str, str | None, int]]:
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
        yield 1, "", _no_column(text_key, data.column_names), size
        return
    data, row = data.select_columns([text_key]).with_format("arrow"), 0
    for table in data.iter(_ROWS):
        for value in table.column(0):
            row += 1
            yield (row, *_text_of(value, text_key), size * row // len(data))


def source_size(path: Path) -> int:
    """Bytes of a source: the file's, or those of all files of a saved dataset."""
    if path.is_dir():
        return sum(item.stat().st_size for item in path.iterdir() if item.is_file())
    return path.stat().st_size


def _text_of(value: Any, text_key: str) -> tuple[str, str | None]:
    """A cell as text, or an empty string and the reason why it is none."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return "", f"byte 0x{error.object[error.start]:02x} is not valid UTF-8"
    if not isinstance(text, str):
        return "", f"{text_key!r} holds {type(text).__name__}, not a string"
    return text, None


def _no_column(text_key: str, names: list[str]) -> str:
    return f"{NO_COLUMN} {text_key!r} (columns: {sorted(names)[:8]})"
