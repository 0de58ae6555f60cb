"""Samples for needle-driven perplexity (LongRoPE2, arXiv 2502.20082, section 3.2).

A number is hidden in a long document and asked for at its end; only the tokens of the answer are
scored. Plain perplexity averages over tokens that hardly need the long window; here every scored
token does.

The samples are put together from tokens, so that each has exactly the window's length with the
answer as its last tokens: a text cut to the window afterwards would lose the answer first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_longrope.config_rules import check_int
from megatron_longrope.data.answers import (
    cut_document,
    encode_within,
    needle_place,
    question_and_answer,
)
from megatron_longrope.data.tokenizer import Tokenizer, bos_prefix
from megatron_longrope.errors import LongRopeError

_INSTRUCTION = (
    "Somewhere in this text a lighthouse is given its registration number. Keep that number in "
    "mind while reading: it is asked for after the last line.\n"
)
_NEEDLE = "\nThe registration number of the lighthouse is {number}.\n"
_QUESTION = (
    "\n\nThis is the end of the text. It was to be read for one number. As stated above, the "
    "registration number of the lighthouse is"
)

_SMALLEST, _LARGEST = 1_000_000, 9_999_999  # seven digits, as in the paper


@dataclass(frozen=True, eq=False)
class NeedleSamples:
    """Fixed samples with the targets that count."""

    tokens: Tensor
    """`[k, n]`, int64: BOS if any, instruction, document with the needle, question and answer."""
    scored: Tensor
    """`[k, n - 1]`, bool: True at j where tokens[:, j + 1] belongs to the answer."""
    text: Tensor
    """`[k, n - 1]`, bool: True at j where tokens[:, j + 1] belongs to the document."""
    depths: tuple[float, ...]
    """Where each needle was to stand: 0 before the document's text, 1 behind it."""
    positions: tuple[int, ...]
    """Index of each needle's first token in its row."""
    numbers: tuple[int, ...]
    """The hidden numbers."""

    def describe(self) -> dict[str, Any]:
        """Wording, places and a hash of the tokens, as plain JSON for a journal or an origin."""
        return {
            "instruction": _INSTRUCTION,
            "needle": _NEEDLE,
            "question": _QUESTION,
            "depths": list(self.depths),
            "positions": list(self.positions),
            "numbers": list(self.numbers),
            "token_sha256": hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest(),
        }


def needle_samples(
    documents: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    length: int,
    *,
    bos_id: int | None,
    depths: Sequence[float],
    seed: int = 0,
) -> NeedleSamples:
    """Hide a number in each document and ask for it.

    Sample j takes document j and depth j, starting over at the end of either list; there are as
    many samples as the longer list has entries. A needle stands on a line of its own, where a line
    (failing that, a sentence) of the document ends within 64 tokens of its depth.

    Args:
        documents (Sequence[np.ndarray]): Token ids, int64 [n], without special tokens; the first
            tokens of each are used.
        tokenizer (Tokenizer): The one that made the documents.
        length (int): Tokens of every sample, BOS and answer included.
        bos_id (int, optional): Put before every sample; None for nothing.
        depths (Sequence[float]): Places in [0, 1]; `(0,)` is the paper's.
        seed (int): Of the numbers.

    Raises:
        LongRopeError: Documents or length too short, depths outside [0, 1], or a tokenizer that is
            not the documents' or that does not keep question and answer apart.
    """
    check_int("seed", seed, 0)
    for index, depth in enumerate(depths):
        if not 0 <= depth <= 1:
            raise LongRopeError(f"depths[{index}] is {depth!r}; it must be between 0 and 1")
    count = max(len(documents), len(depths))
    rng = np.random.default_rng(seed)
    numbers = rng.choice(_LARGEST + 1 - _SMALLEST, count, replace=False) + _SMALLEST
    tokens = torch.empty(count, length, dtype=torch.int64)
    scored, of_text = torch.zeros(2, count, length - 1, dtype=torch.bool)
    positions = []
    for row, number in enumerate(numbers.tolist()):
        which = row % len(documents)
        parts = _Parts.of(tokenizer, bos_id, number)
        text = _trimmed(documents[which], which, length, parts, tokenizer)
        place = needle_place(text, depths[row % len(depths)], tokenizer)
        ids = [*parts.before, *text[:place], *parts.needle, *text[place:], *parts.after]
        tokens[row] = torch.tensor(ids)
        scored[row, length - 1 - parts.num_answer_tokens :] = True
        first, answered = len(parts.before), length - len(parts.after)
        of_text[row, first - 1 : answered - 1] = True
        of_text[row, first + place - 1 : first + place + len(parts.needle) - 1] = False
        positions.append(first + place)
    used = tuple(float(depths[row % len(depths)]) for row in range(count))
    return NeedleSamples(tokens, scored, of_text, used, tuple(positions), tuple(numbers.tolist()))


@dataclass(frozen=True)
class _Parts:
    """Tokens of a sample that are not the document's."""

    before: list[int]
    needle: list[int]
    after: list[int]
    """Question and answer."""
    num_answer_tokens: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, bos_id: int | None, number: int) -> _Parts:
        question, answer, (span,) = question_and_answer(tokenizer, _QUESTION, [number])
        return cls(
            [*bos_prefix(bos_id), *tokenizer.encode(_INSTRUCTION)],
            encode_within(tokenizer, _NEEDLE.format(number=number)),
            [*question, *answer],
            span.stop - span.start,
        )


def _trimmed(
    document: np.ndarray, index: int, length: int, parts: _Parts, tokenizer: Tokenizer
) -> list[int]:
    """As much of the document as fits beside the other parts."""
    fixed = len(parts.before) + len(parts.needle) + len(parts.after)
    text = cut_document(document, f"document {index}", length, fixed)
    if max(text) >= tokenizer.vocab_size:
        raise LongRopeError(
            f"document {index} holds token {max(text)}, the tokenizer has {tokenizer.vocab_size}; "
            "give the tokenizer that the documents were made with"
        )
    return text
