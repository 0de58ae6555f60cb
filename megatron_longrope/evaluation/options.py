"""Options that several kinds of evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_longrope.errors import LongRopeError
from megatron_longrope.lengths import parse_lengths
from megatron_longrope.options import Loading, SeveralModels, flag, parse_positive


def parse_hours(text: str) -> float:
    """Parse a number of hours above 0."""
    hours = float(text)
    if not hours > 0:
        raise LongRopeError(f"{text} hours must be above 0")
    return hours


def parse_choices(*allowed: str) -> Callable[[str], list[str]]:
    """Return the parser of a comma-separated choice among `allowed`: at least one, none twice."""

    def parse(text: str) -> list[str]:
        values = [part.strip() for part in text.split(",") if part.strip()]
        if wrong := [value for value in values if value not in allowed]:
            raise LongRopeError(f"{wrong[0]!r} is unknown; choose among {', '.join(allowed)}")
        if not values:
            raise LongRopeError(f"{text!r} names nothing; choose among {', '.join(allowed)}")
        if twice := [value for value in values if values.count(value) > 1]:
            raise LongRopeError(f"{twice[0]!r} is named twice; name it once")
        return values

    return parse


def parse_depths(text: str) -> list[float | None]:
    """Parse depths: `random` is [None], `3` is [0, 0.5, 1], `0,0.25` and `1.0` are themselves."""
    if text == "random":
        return [None]
    is_count = text.isascii() and text.isdigit()
    if is_count and int(text) > 1:
        return [index / (int(text) - 1) for index in range(int(text))]
    try:
        depths = [float(part) for part in text.split(",")]
    except ValueError:
        depths = [-1.0]
    is_list = all(0 <= depth <= 1 for depth in depths) and len(set(depths)) == len(depths)
    if is_count or not is_list:
        raise LongRopeError(
            f"depths {text!r}: give how many, at least 2, or a list of different numbers from 0 to "
            "1 such as 0,0.5,1 or 1.0, or random"
        )
    return depths


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Loading, SeveralModels):
    """What every kind of evaluation is told."""

    GROUP: ClassVar[str] = "what is measured"

    longrope_config: Sequence[str] = flag((), action="append", metavar="[LABEL=]F.json")
    """factor file, for every model; may be given several times (default: each model's own
    factors)"""
    lengths: Sequence[int] = flag(type=parse_lengths, metavar="LIST")
    """4k,8k,... tokens (1k = 1024)"""
    output: str = flag(metavar="DIR")
    """directory for the results"""
    max_hours: float = flag(12.0, type=parse_hours, metavar="H")
    """refuse to begin when more hours are expected, unless --yes is given (default: 12)"""
    yes: bool = flag(False)
    """go on whatever it is expected to take"""


def tokenizer_flag() -> Any:
    """Return the field of --tokenizer."""
    return flag(
        None,
        metavar="T",
        help="the models' tokenizer, a sentencepiece .model file or a Hugging Face folder "
        "(default: of a single --hf)",
    )


def text_key_flag() -> Any:
    """Return the field of --text-key."""
    return flag("text", metavar="KEY", help="of text in JSON lines or columns: its key")


def depths_flag(default: str) -> Any:
    """Return the field of --depths."""
    return flag(
        tuple(parse_depths(default)),
        type=parse_depths,
        metavar="D",
        help="where the number is hidden: how many depths, evenly from 0 to 1; or a list such as "
        f"0,0.5,1; or, for passkey, `random` as in the paper's code (default: {default})",
    )


def trials_flag(of_each: str) -> Any:
    """Return the field of --trials."""
    return flag(10, type=parse_positive, metavar="K", help=f"trials of each {of_each}")


def seed_flag() -> Any:
    """Return the field of the --seed of trials."""
    return flag(42, type=int, help="of keys and places")
