"""From tokenized documents to what a .bin holds: fixed-length segments or whole documents.

Fine-tuning follows the paper: every sample is one segment, bookended with BOS and EOS; a tokenizer
without BOS (stock Qwen) has EOS alone at the end. Megatron's
GPTDataset concatenates the entries of a .bin and cuts sample i at tokens i * S to (i + 1) * S (plus
one token for the labels), so samples equal segments exactly when every entry has S tokens. The
very last segment of a run has no label token behind it: n segments give n - 1 samples in one epoch.

The paper's 256k samples are two consecutive 128k segments each, with EOS and BOS in the middle;
`joined` builds those.

Search and evaluation read whole documents without special tokens and add BOS themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from megatron_longrope.data.tokenizer import bos_prefix
from megatron_longrope.errors import LongRopeError


@dataclass(frozen=True)
class TokenizedDocument:
    """Token ids of one document, and what decisions about it rest on."""

    tokens: np.ndarray
    """int64 [n], without special tokens."""
    digest: bytes = b""
    """Hash of the text."""


@dataclass(frozen=True)
class _Described:
    mode: ClassVar[str]

    def describe(self) -> dict[str, Any]:
        """The packing as manifest fields."""
        return {"mode": self.mode, **asdict(self)}


@dataclass(frozen=True)
class FixedSegments(_Described):
    """Cut documents into pieces of S - 2 tokens, each stored as [BOS] piece [EOS].

    Without BOS, pieces have S - 1 tokens and are stored as piece [EOS].

    Raises:
        LongRopeError: A field breaks its rule.
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
    joined: int = 1
    """K > 1 makes every entry of K consecutive segments, K * S tokens; --seq-length is then K * S.

    Consecutive means in the order of the corpus: where a document's segments are used up, those of
    the next one follow. Fewer than K at the end of the corpus are discarded.
    """
    mode: ClassVar[str] = "segments"
    needs_special_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.segment_length < 3:
            raise LongRopeError(
                f"segment_length is {self.segment_length}; BOS, EOS and a token need at least 3"
            )

    def arrange(
        self, documents: Iterable[TokenizedDocument], bos_id: int | None, eos_id: int
    ) -> Iterator[np.ndarray]:
        """Yield entries, int64 [joined * S]; the pieces of a document come in its order."""
        segments = self._segments(documents, bos_id, eos_id)
        while len(group := list(islice(segments, self.joined))) == self.joined:
            yield np.concatenate(group)

    def _segments(
        self, documents: Iterable[TokenizedDocument], bos_id: int | None, eos_id: int
    ) -> Iterator[np.ndarray]:
        packer = _Packer(self.segment_length, bos_id, eos_id)
        room = self.segment_length - num_special(bos_id)
        for document in documents:
            tokens = document.tokens
            full = len(tokens) // room * room
            for start in range(0, full, room):
                piece = tokens[start : start + room]
                yield _filled(piece, self.segment_length, bos_id, eos_id)
            rest = tokens[full:]
            if self.tail == "pad" and len(rest):
                yield _filled(rest, self.segment_length, bos_id, eos_id)
            elif self.tail == "pack":
                yield from packer.add(rest)
        yield from packer.flush()


@dataclass(frozen=True)
class WholeDocuments(_Described):
    """Keep whole documents without special tokens: the held-out sets of search and evaluation.

    Raises:
        LongRopeError: A field breaks its rule.
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
        if self.max_length is not None and self.max_length < self.min_length:
            raise LongRopeError(
                f"max_length {self.max_length} is below min_length {self.min_length}; documents "
                "would be truncated below the length they were chosen for, so raise max_length"
            )

    def arrange(
        self, documents: Iterable[TokenizedDocument], bos_id: int | None, eos_id: int | None
    ) -> Iterator[np.ndarray]:
        """Yield documents, int64 [n], in order; special tokens are not used."""
        kept = 0
        for document in documents:
            if len(document.tokens) < self.min_length:
                continue
            yield document.tokens[: self.max_length]
            kept += 1
            if kept == self.max_documents:
                return


@dataclass(frozen=True)
class ShortDocuments(_Described):
    """Every document that fits a short window is an entry of its own: [BOS] document [EOS].

    A tokenizer without BOS gives document [EOS].

    This is the short half of mixed-window training (LongRoPE2, section 3.3): with inter-document
    masking Megatron's GPTDataset packs entries into a sample and hands their boundaries to
    attention, so that each trains in its own window. A document cut by the end of a sample goes on
    in another one as a document of its own.

    Raises:
        LongRopeError: A field breaks its rule.
    """

    window: int
    """Longest entry in tokens, BOS and EOS included; the model's original window."""
    multiple: int = 16
    """Entries are filled with EOS to a multiple of this; 2 x context-parallel size must divide it.

    As --seq-length has to be a multiple too, no cut breaks the rule.
    """
    mode: ClassVar[str] = "short"
    needs_special_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.multiple < 1 or self.window < 3 or self.window % self.multiple:
            raise LongRopeError(
                f"window {self.window} must be at least 3 and a multiple of {self.multiple}, to "
                "which documents are filled up; choose another window or multiple"
            )

    def fits(self, document: TokenizedDocument, bos_id: int | None) -> bool:
        """Return whether the document, with BOS (if there is one) and EOS, is within the window."""
        return 0 < len(document.tokens) <= self.window - num_special(bos_id)

    def arrange(
        self, documents: Iterable[TokenizedDocument], bos_id: int | None, eos_id: int
    ) -> Iterator[np.ndarray]:
        """Yield entries, int64 [n], of the documents that fit, in order."""
        for document in documents:
            if not self.fits(document, bos_id):
                continue
            least = len(document.tokens) + num_special(bos_id)
            length = -(-least // self.multiple) * self.multiple
            yield _filled(document.tokens, length, bos_id, eos_id)


Packing = FixedSegments | WholeDocuments | ShortDocuments


class _Packer:
    """Joins bookended tails into full segments."""

    def __init__(self, segment_length: int, bos_id: int | None, eos_id: int) -> None:
        self._length = segment_length
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._parts: list[np.ndarray] = []
        self._used = 0

    def add(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Append `tokens`, int64 [n]; yield the segments that this fills."""
        while len(tokens):
            special = num_special(self._bos_id)
            piece = tokens[: self._length - self._used - special]
            tokens = tokens[len(piece) :]
            size = len(piece) + special
            self._parts.append(_filled(piece, size, self._bos_id, self._eos_id))
            self._used += size
            if self._length - self._used <= special:
                yield from self.flush()

    def flush(self) -> Iterator[np.ndarray]:
        """Yield what is left, filled with EOS."""
        if self._parts:
            filling = np.full(self._length - self._used, self._eos_id, dtype=np.int64)
            yield np.concatenate([*self._parts, filling])
        self._parts, self._used = [], 0


def num_special(bos_id: int | None) -> int:
    """Count the special tokens around a piece: EOS, and BOS where there is one."""
    return 1 + len(bos_prefix(bos_id))


def _filled(piece: np.ndarray, length: int, bos_id: int | None, eos_id: int) -> np.ndarray:
    """[BOS] piece [EOS], then EOS up to `length`."""
    filled = np.full(length, eos_id, dtype=np.int64)
    before = bos_prefix(bos_id)
    filled[: len(before)] = before
    filled[len(before) : len(before) + len(piece)] = piece
    return filled


def length_bucket(length: int) -> int:
    """Largest power of two not above `length`; 0 for an empty document."""
    return 1 << (length.bit_length() - 1) if length else 0
