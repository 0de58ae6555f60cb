"""Tokenized documents in files whose names say what they were made from.

A part is some consecutive documents of a source. Its name is a hash of the texts and of whatever
their tokens depend on, so that a run finds the parts of an earlier one by asking for them: nothing
is recorded that could be out of date. A part appears under its name only when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_longrope.data.segments import TokenizedDocument
from megatron_longrope.data.sources import Document
from megatron_longrope.data.tokenizer import Tokenizer
from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import atomic_file, hold


@dataclass(frozen=True)
class Encoder:
    """Turns texts into parts."""

    tokenizer: Tokenizer
    """Adds no special tokens."""

    def store(self, documents: Sequence[Document], directory: Path) -> tuple[Path, bool]:
        """Tokenize documents, at least one, into a part, unless the directory has it already.

        Returns:
            tuple[Path, bool]: The part, and whether it was found.

        Raises:
            LongRopeError: A token id is not below the vocabulary size.
        """
        # The colons as in release 0.2, whose parts an interrupted run then finds.
        name = hashlib.sha256(f"{self.tokenizer.sha256}::".encode())
        digests = []
        for document in documents:
            digests.append(hashlib.sha256(document.text.encode()).digest())
            name.update(digests[-1])
        path = directory / f"{name.hexdigest()}.npz"
        if path.exists():
            return path, True
        encoded = [self._encode(document) for document in documents]
        arrays = {
            "tokens": np.concatenate(encoded),
            "lengths": np.array([len(tokens) for tokens in encoded], dtype=np.int64),
            "digests": np.frombuffer(b"".join(digests), dtype=np.uint8),
        }
        with atomic_file(path) as file:
            np.savez(file, **arrays)
        return path, False

    def load(self, path: Path) -> Iterator[TokenizedDocument]:
        """The documents of a part, in order.

        Raises:
            LongRopeError: The file is damaged.
        """
        try:
            with np.load(path) as stored:  # a zip: every member is checked against its checksum
                arrays = dict(stored)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise LongRopeError(
                f"{path} is damaged ({error}); remove the file and run the command again"
            ) from None
        tokens = np.split(arrays["tokens"].astype(np.int64), np.cumsum(arrays["lengths"])[:-1])
        digests = arrays["digests"].reshape(len(tokens), -1)
        for k, ids in enumerate(tokens):
            yield TokenizedDocument(ids, digests[k].tobytes())

    def _encode(self, document: Document) -> np.ndarray:
        """Token ids, int32 [n]."""
        tokens = np.asarray(self.tokenizer.encode(document.text), dtype=np.int64)
        # A larger id would wrap around silently in a uint16 file.
        if len(tokens) and tokens.max() >= self.tokenizer.vocab_size:
            raise LongRopeError(
                f"{document.id}: token id {tokens.max()} is not below the vocabulary size "
                f"{self.tokenizer.vocab_size}; the tokenizer's files do not belong together"
            )
        return tokens.astype(np.int32)


@contextmanager
def parts_directory(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` for parts: kept when the block fails, removed when it ends.

    One run at a time has it. What a failed or killed run has left half written, as `*.tmp`, is
    removed.

    Raises:
        LongRopeError: Another run is writing the same set, or the disk is full.
    """
    directory = output.parent / f".{output.name}.parts"
    directory.mkdir(parents=True, exist_ok=True)
    lock = hold(directory / "lock", f"{output}", "wait for it or choose another name")
    try:
        _remove_unfinished(directory)
        yield directory
    except BaseException as error:
        _remove_unfinished(directory)
        if not any(directory.glob("*.npz")):
            shutil.rmtree(directory)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LongRopeError(
                f"{output.parent}: the disk is full; make room and run the command again, finished "
                "parts are kept, or give an --output elsewhere"
            ) from None
        raise
    else:
        shutil.rmtree(directory)
    finally:
        lock.release()


def _remove_unfinished(directory: Path) -> None:
    for leftover in directory.glob("*.tmp"):
        leftover.unlink()
