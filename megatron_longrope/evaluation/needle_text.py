"""What needle samples hide and ask for: in which lockers objects are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

TASKS = ("single", "multi_key", "multi_query")
"""What can be asked: one needle, one among others, several at once."""

INSTRUCTION = (
    "While reading, watch for sentences that say in which locker an object is kept. A question "
    "about that follows the last page.\n\n"
)
"""What every sample begins with."""

_NEEDLE = "\nThe {key} is kept in locker {value}.\n"
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
    """Return the line that says where an object is."""
    return _NEEDLE.format(key=key, value=value)


def question_text(keys: Sequence[str]) -> str:
    """Return the question for the lockers of `keys`, up to where the first number follows."""
    *others, last = keys
    if not others:
        return _QUESTION.format(keys=last)
    return _QUESTION_OF_MANY.format(keys=f"{', the '.join(others)} and the {last}")
