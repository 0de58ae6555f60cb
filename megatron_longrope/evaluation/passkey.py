"""Passkey retrieval (paper appendix A.1): find a number hidden in filler text.

One teacher-forced forward per trial: the answer is appended, and the trial counts when the model's
greedy choice equals every answer token. For greedy decoding that is the same test as generating.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
_QUESTION = "What is the pass key? The pass key is"


class TextTokenizer(Protocol):
    """What a passkey prompt needs of a tokenizer."""

    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""


@dataclass(frozen=True)
class Trial:
    """One prompt with its answer."""

    tokens: list[int]
    """BOS, prompt and answer: at most the length asked for."""

    num_answer_tokens: int
    """Tokens at the end that are the answer."""

    key: int
    """The hidden number."""

    depth: float
    """Where it stands: 0 at the beginning of the filler, 1 at its end."""


def prompt(key: int, num_characters: int, num_before: int) -> str:
    """The prompt of the paper's code, up to the question.

    Args:
        num_characters (int): Filler characters in total.
        num_before (int): How many of them stand before the key.
    """
    filler = " ".join([_FILLER] * (num_characters // len(_FILLER) + 1))
    information = f"The pass key is {key}. Remember it. {key} is the pass key."
    before, after = filler[:num_before], filler[: num_characters - num_before]
    return "\n".join([_TASK, before, information, after, _QUESTION])


def make_trial(tokenizer: TextTokenizer, length: int, rng: np.random.Generator) -> Trial:
    """A prompt of as many tokens as fit into `length`, answer and BOS included.

    Raises:
        ValueError: The length cannot hold the prompt, or the tokenizer merges prompt and answer.
    """
    key = int(rng.integers(1, 50001))
    share = float(rng.random())

    def build(num_characters: int) -> tuple[list[int], int]:
        text = prompt(key, num_characters, round(share * num_characters))
        ids, whole = tokenizer.encode(text), tokenizer.encode(f"{text} {key}")
        if whole[: len(ids)] != ids:
            raise ValueError(
                "the tokenizer merges the end of the prompt with the answer, so that teacher "
                "forcing would not equal generation; use a tokenizer with stable prefixes"
            )
        prefix = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return prefix + whole, len(whole) - len(ids)

    if len(build(0)[0]) > length:
        raise ValueError(
            f"length {length} is too short for the passkey prompt of {len(build(0)[0])} tokens"
        )
    low, high = 0, len(_FILLER) + 16 * length
    while high - low > 1:  # token counts grow with the filler; find the last that fits
        middle = (low + high) // 2
        low, high = (middle, high) if len(build(middle)[0]) <= length else (low, middle)
    tokens, num_answer_tokens = build(low)
    return Trial(tokens, num_answer_tokens, key, share)


def is_retrieved(predictions: torch.Tensor, trial: Trial) -> bool:
    """True when the greedy choice is right at every answer token.

    Args:
        predictions (Tensor): `[num_answer_tokens]`: the most likely successors of the tokens that
            precede each answer token.
    """
    answer = trial.tokens[-trial.num_answer_tokens :]
    return predictions.tolist() == answer
