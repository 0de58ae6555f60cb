"""One Megatron .bin/.idx pair, written entry by entry."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longrope.errors import LongRopeError


class SetWriter:
    """Writes each entry as one Megatron document, uint16 or int32; use it as a context manager."""

    def __init__(self, bin_path: Path, vocab_size: int) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._dtype = DType.optimal_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(str(bin_path), dtype=self._dtype)
        self._digest = hashlib.sha256()
        self.entries = 0
        self.tokens = 0

    def extend(self, entries: Iterable[np.ndarray]) -> None:
        """Append entries, int64 [n] each."""
        import torch

        for tokens in entries:
            self._builder.add_item(torch.from_numpy(tokens))
            self._builder.end_document()
            update_digest(self._digest, tokens)
            self.entries += 1
            self.tokens += len(tokens)

    def finish(self, idx_path: Path) -> dict[str, Any]:
        """Write the index; return what the manifest says about the data."""
        self._builder.finalize(str(idx_path))
        return {
            "dtype": np.dtype(self._dtype).name,
            "token_sha256": self._digest.hexdigest(),
            "segments": self.entries,
            "tokens": self.tokens,
        }

    def __enter__(self) -> SetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._builder.data_file.close()


def output_paths(prefix: str | Path) -> list[Path]:
    """`PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`; dots in the prefix stay.

    Raises:
        LongRopeError: The prefix ends like one of the files or names a directory.
    """
    if Path(prefix).suffix in (".bin", ".idx", ".json") or str(prefix).endswith("/"):
        raise LongRopeError(
            f"{prefix} is not a prefix; give the path of the data set without .bin, .idx or .json"
        )
    return [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")]


def flush(staged: Iterable[Path]) -> None:
    """Write files to the disk that may still be on their way; of a large set it takes minutes."""
    for path in staged:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def publish(sets: Sequence[tuple[Sequence[Path], Sequence[Path]]]) -> None:
    """Give the staged files of complete sets, flushed and in the same file system, their names.

    The manifest comes last and marks a set as complete: old ones are removed before the first file
    is renamed, so that they never describe new data. Those of all sets: what is held out now may
    stand in the training set of an earlier run.

    Args:
        sets (Sequence): Staged files and names of each set of one run, in this order.
    """
    for _, paths in sets:
        paths[-1].unlink(missing_ok=True)
    for staged, paths in sets:
        for source, target in zip(staged, paths, strict=True):
            os.replace(source, target)


def update_digest(digest: Any, tokens: np.ndarray) -> None:
    """Add token ids to a hash as little-endian int32, whatever the dtype of the .bin."""
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
