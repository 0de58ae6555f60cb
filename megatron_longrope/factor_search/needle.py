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
from megatron_longrope.data.needle_prompt import make_needle_prompt
from megatron_longrope.data.tokenizer import Tokenizer
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
    many samples as the longer list has entries. A needle stands on a line of its own, where
    :func:`.hide` puts it.

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
        prompt = make_needle_prompt(
            documents[which],
            f"document {which}",
            tokenizer,
            length,
            bos_id=bos_id,
            instruction=_INSTRUCTION,
            needles=[_NEEDLE.format(number=number)],
            depths=[depths[row % len(depths)]],
            question=_QUESTION,
            values=[number],
        )
        (needle,), (answer,) = prompt.needles, prompt.spans
        tokens[row] = torch.tensor(prompt.ids)
        scored[row, answer.start - answer.stop :] = True
        of_text[row, prompt.text.start - 1 : prompt.text.stop - 1] = True
        of_text[row, needle.start - 1 : needle.stop - 1] = False
        positions.append(needle.start)
    used = tuple(float(depths[row % len(depths)]) for row in range(count))
    return NeedleSamples(tokens, scored, of_text, used, tuple(positions), tuple(numbers.tolist()))
