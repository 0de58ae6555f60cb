"""What needle samples hide and ask for: in which lockers objects are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_longrope.data.tokenizer import Tokenizer
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.haystack import encode_within

INSTRUCTION = (
    "While reading, watch for sentences that say in which locker an object is kept. A question "
    "about that follows the last page.\n\n"
)
"""What every sample begins with."""

_NEEDLE = "The {key} is kept in locker {value}."
_QUESTION = "\n\nThe pages end here. According to a sentence in them, the {keys} is kept in locker"
_QUESTION_OF_MANY = (
    "\n\nThe pages end here. According to sentences in them, the {keys} are kept, in this order, "
    "in the lockers"
)
_ADJECTIVES = (
    *("amber", "brittle", "bronze", "carved", "crimson", "dented", "dusty", "faded"),
    *("folded", "gilded", "heavy", "hollow", "ivory", "knitted", "narrow", "painted"),
    *("polished", "purple", "rusty", "silent", "striped", "tiny", "velvet", "wooden"),
)
_NOUNS = (
    *("accordion", "anchor", "basket", "bell", "blanket", "bottle", "bucket", "candle"),
    *("clock", "compass", "cushion", "drum", "fiddle", "hammer", "helmet", "kettle"),
    *("ladder", "lantern", "mirror", "notebook", "paddle", "puppet", "quilt", "saddle"),
    *("scarf", "shovel", "spoon", "teapot", "trumpet", "umbrella", "violin", "wagon"),
)
NUM_KEYS = len(_ADJECTIVES) * len(_NOUNS)
"""Different objects there are."""

_SMALLEST, _LARGEST = 1_000_000, 9_999_999  # seven digits, as in both papers


def draw_keys(count: int, rng: np.random.Generator) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Draw `count` objects and the numbers of their lockers, no two alike.

    An object is an adjective and a noun, a number has seven digits.
    """
    picked = rng.choice(NUM_KEYS, count, replace=False).tolist()
    numbers = rng.choice(_LARGEST + 1 - _SMALLEST, count, replace=False) + _SMALLEST
    pairs = (divmod(index, len(_NOUNS)) for index in picked)
    return tuple(f"{_ADJECTIVES[i]} {_NOUNS[j]}" for i, j in pairs), tuple(numbers.tolist())


def needle_text(key: str, value: int) -> str:
    """Return the sentence that says where an object is."""
    return _NEEDLE.format(key=key, value=value)


def question_and_answer(
    tokenizer: Tokenizer, keys: Sequence[str], values: Sequence[int]
) -> tuple[list[int], list[int], tuple[slice, ...]]:
    """Return the tokens of a question for `keys`, of its answer, and of each number in it.

    Raises:
        LongRopeError: The tokenizer merges the question with the answer, or a number with what
            follows it, so that scoring would not equal generation; or it does not keep the digits.
    """
    *others, last = keys
    text = _QUESTION.format(keys=last)
    if others:
        text = _QUESTION_OF_MANY.format(keys=f"{', the '.join(others)} and the {last}")
    question = encode_within(tokenizer, text)
    ids, spans = question, []
    for value in values:
        lead = f"{text}," if spans else text
        text = f"{lead} {value}"
        before, whole = encode_within(tokenizer, lead), encode_within(tokenizer, text)
        if before[: len(ids)] != ids or whole[: len(before)] != before:
            raise LongRopeError(
                f"the tokenizer {tokenizer.path} merges the end of {lead[-40:]!r} with what "
                "follows, so that scoring would not equal generation; use a tokenizer with stable "
                "prefixes"
            )
        first = len(before)
        # The space before a number is no part of it, where it is a token of its own.
        while first < len(whole) and not tokenizer.decode(whole[first : first + 1]).strip():
            first += 1
        read = tokenizer.decode(whole[first:]).strip()
        if read != str(value):
            raise LongRopeError(
                f"the tokenizer {tokenizer.path} reads {read!r} where the answer {value} was "
                "written; use a tokenizer that keeps digits"
            )
        spans.append(slice(first - len(question), len(whole) - len(question)))
        ids = whole
    return question, ids[len(question) :], tuple(spans)
