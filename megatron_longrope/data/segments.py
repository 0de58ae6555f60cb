"""From tokenized documents to what a .bin holds: fixed-length segments or whole documents.

Fine-tuning follows the paper: every sample is one segment, bookended with BOS and EOS. Megatron's
GPTDataset concatenates the entries of a .bin and cuts sample i at tokens i * S to (i + 1) * S (plus
one token for the labels), so samples equal segments exactly when every entry has S tokens. The
very last segment of a run has no label token behind it: n segments give n - 1 samples in one epoch.

Search and evaluation read whole documents without special tokens and add BOS themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

TAILS = ("drop", "pad", "pack")


@dataclass(frozen=True)
class FixedSegments:
    """Cut documents into pieces of S - 2 tokens, each stored as [BOS] piece [EOS].

    Raises:
        ValueError: A field breaks its rule.
    """

    segment_length: int
    """S, tokens in every segment, BOS and EOS included; Megatron's --seq-length."""

    tail: str = "drop"
    """What becomes of the tokens after a document's last full piece.

    `drop` discards them. `pad` fills their segment with EOS. `pack` joins the tails of consecutive
    documents, each with its own BOS and EOS, until a segment is full; a tail that does not fit goes
    on in the next segment, behind a new BOS. Two places too few for another token, and the end of
    the corpus, are filled with EOS.
    """

    mode: ClassVar[str] = "segments"
    needs_special_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.segment_length < 3:
            raise ValueError(
                f"segment_length is {self.segment_length}; BOS, EOS and a token need at least 3"
            )
        if self.tail not in TAILS:
            raise ValueError(f"tail is {self.tail!r}; it must be one of {', '.join(TAILS)}")

    def arrange(
        self, documents: Iterable[np.ndarray], bos_id: int, eos_id: int
    ) -> Iterator[np.ndarray]:
        """Yield segments, int64 [S]; the pieces of a document come in its order.

        Args:
            documents (Iterable[np.ndarray]): Token ids, int64 [n], one array for each document.
            bos_id (int): First token of every segment.
            eos_id (int): Last token of every segment.
        """
        size = self.segment_length - 2
        packer = _Packer(self.segment_length, bos_id, eos_id)
        for tokens in documents:
            covered = len(tokens) // size * size
            for start in range(0, covered, size):
                yield _bookend(tokens[start : start + size], bos_id, eos_id)
            rest = tokens[covered:]
            if self.tail == "pad" and len(rest):
                segment = np.full(self.segment_length, eos_id, dtype=np.int64)
                segment[0] = bos_id
                segment[1 : 1 + len(rest)] = rest
                yield segment
            elif self.tail == "pack":
                yield from packer.add(rest)
        yield from packer.flush()

    def describe(self) -> dict[str, Any]:
        """The recipe as manifest fields."""
        return {"mode": self.mode, **asdict(self)}


@dataclass(frozen=True)
class WholeDocuments:
    """Keep whole documents without special tokens: the held-out sets of search and evaluation.

    Raises:
        ValueError: A field breaks its rule.
    """

    min_length: int = 1
    """Only documents of at least this many tokens are kept."""

    max_length: int | None = None
    """Documents are truncated to this many tokens; None keeps them whole."""

    max_documents: int | None = None
    """Stop after this many kept documents; None keeps all."""

    mode: ClassVar[str] = "whole"
    needs_special_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("min_length", "max_length", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(
                f"max_length {self.max_length} is below min_length {self.min_length}; documents "
                "would be truncated below the length they were chosen for, so raise max_length"
            )

    def arrange(
        self, documents: Iterable[np.ndarray], bos_id: int | None, eos_id: int | None
    ) -> Iterator[np.ndarray]:
        """Yield documents, int64 [n], in order; special tokens are not used."""
        kept = 0
        for tokens in documents:
            if len(tokens) < self.min_length:
                continue
            yield tokens[: self.max_length]
            kept += 1
            if kept == self.max_documents:
                return

    def describe(self) -> dict[str, Any]:
        """The recipe as manifest fields."""
        return {"mode": self.mode, **asdict(self)}


Recipe = FixedSegments | WholeDocuments


class _Packer:
    """Joins bookended tails into full segments."""

    def __init__(self, segment_length: int, bos_id: int, eos_id: int) -> None:
        self._length = segment_length
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._parts: list[np.ndarray] = []
        self._used = 0

    def add(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Append `tokens`, int64 [n]; yield the segments that this fills."""
        while len(tokens):
            piece = tokens[: self._length - self._used - 2]
            tokens = tokens[len(piece) :]
            self._parts.append(_bookend(piece, self._bos_id, self._eos_id))
            self._used += len(piece) + 2
            if self._length - self._used < 3:
                yield from self.flush()

    def flush(self) -> Iterator[np.ndarray]:
        """Yield what is left, filled with EOS."""
        if self._parts:
            filling = np.full(self._length - self._used, self._eos_id, dtype=np.int64)
            yield np.concatenate([*self._parts, filling])
        self._parts, self._used = [], 0


def _bookend(piece: np.ndarray, bos_id: int, eos_id: int) -> np.ndarray:
    return np.concatenate([[bos_id], piece, [eos_id]]).astype(np.int64)  # [n] -> [n + 2]


def length_bucket(length: int) -> int:
    """Largest power of two not above `length`; 0 for an empty document."""
    return 1 << (length.bit_length() - 1) if length else 0
