"""The rules of a configuration: each broken one is a sentence naming field, value and rule."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.frequencies import ATTENTION_FACTOR_POLICIES

if TYPE_CHECKING:
    from megatron_longrope.config import LongRopeConfig

_MAX_INT = 2**53  # beyond it a JSON number is no longer an exact integer everywhere
_LEAST_FACTOR = 2.0**-126  # below it float32 may flush to zero, and a frequency is 1 / factor
_LEAST_BOUND = 128.0


def check_keys(where: str, value: Mapping[str, Any], known: set[str], optional: set[str]) -> None:
    """Refuse unknown and missing keys of a JSON object."""
    if unknown := sorted(value.keys() - known):
        raise LongRopeError(f"{where} has unknown key {unknown[0]!r}; known keys: {sorted(known)}")
    if missing := sorted(known - optional - value.keys()):
        raise LongRopeError(f"{where} lacks the key {missing[0]!r}")


def is_number(value: Any) -> bool:
    """True for int and float; booleans are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_int(name: str, value: Any, minimum: int) -> int:
    """Return the value; refuse what is no integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise LongRopeError(f"{name} is {value!r}; it must be an integer of at least {minimum}")
    if value > _MAX_INT:
        raise LongRopeError(f"{name} is {value}; it must be at most 2^53")
    return value


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise LongRopeError(f"{name} is {value!r}; it must be a finite number above 0")


def validate_geometry(config: LongRopeConfig) -> None:
    """Check everything but the factor sets."""
    check_positive("rotary_base", config.rotary_base)
    if config.rotary_base <= 1:
        raise LongRopeError(f"rotary_base is {config.rotary_base!r}; it must be above 1")
    check_int("rotary_dim", config.rotary_dim, 2)
    if config.rotary_dim % 2:
        raise LongRopeError(
            f"rotary_dim is {config.rotary_dim}, which is odd; dimensions rotate in pairs"
        )
    check_int("original_max_position_embeddings", config.original_max_position_embeddings, 2)
    if config.attention_factor is not None:
        check_positive("attention_factor", config.attention_factor)
    if config.attention_factor_policy not in ATTENTION_FACTOR_POLICIES:
        raise LongRopeError(
            f"attention_factor_policy is {config.attention_factor_policy!r}; "
            f"it must be one of {', '.join(ATTENTION_FACTOR_POLICIES)}"
        )


def validate_factor_sets(config: LongRopeConfig) -> None:
    """Check order, lengths and factors of all sets."""
    if not config.factor_sets:
        raise LongRopeError("factor_sets is empty; at least one set is needed")
    for index, item in enumerate(config.factor_sets):
        check_int(f"factor_sets[{index}].max_length", item.max_length, 1)
    extension = extension_ratio(config)
    previous = 0
    for index, item in enumerate(config.factor_sets):
        where = f"factor_sets[{index}]"
        if item.max_length == previous:
            raise LongRopeError(
                f"{where}.max_length {item.max_length} is a duplicate; each length may stand once"
            )
        if item.max_length < previous:
            raise LongRopeError(
                f"{where}.max_length {item.max_length} follows {previous}; sets must be sorted"
            )
        previous = item.max_length
        check_int(f"{where}.num_start_tokens", item.num_start_tokens, 0)
        validate_factors(
            f"{where}.rescale_factors", item.rescale_factors, config.rotary_dim, extension
        )
        try:
            json.dumps(dict(item.origin), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise LongRopeError(f"{where}.origin must be plain JSON: {error}") from None


def extension_ratio(config: LongRopeConfig) -> float:
    """s: the longest window over the original one, at least 1.

    One for all sets of a file, as a short window's recovered factors stay near the long ones.
    """
    longest = max(item.max_length for item in config.factor_sets)
    return max(longest / config.original_max_position_embeddings, 1.0)


def validate_factors(
    where: str, factors: Sequence[float], rotary_dim: int, extension: float
) -> None:
    """Refuse a factor vector that cannot be rotated with.

    Published factors decrease at some indices, fall below 1 or exceed 2 x s; that is for
    :func:`unusual_factor` to say, not to refuse. Far beyond s one of the two lengths is wrong.

    Args:
        where (str): Name of the vector in messages.
        extension (float): s of the file that holds the vector.

    Raises:
        LongRopeError: Wrong count, no number, not finite, not above 0, or over s^3.
    """
    expected = rotary_dim // 2
    if len(factors) != expected:
        raise LongRopeError(
            f"{where} has {len(factors)} values; rotary_dim {rotary_dim} needs {expected}"
        )
    # Dynamic NTK reaches s^2 - s + 1, a base change s^2.4 (base 5e6, 4k tokens). The authors'
    # factors for 4k tokens of a model tuned at 256k reach 62, and may stand alone.
    bound = max(extension**3, _LEAST_BOUND)
    for index, value in enumerate(factors):
        here = f"{where}[{index}]"
        if not is_number(value):
            raise LongRopeError(f"{here} is {value!r}; it must be a number")
        if value != value:  # not math.isnan, which overflows on an integer of 400 digits
            raise LongRopeError(f"{here} is NaN; factors must be finite")
        if abs(value) == math.inf:
            raise LongRopeError(f"{here} is infinite; factors must be finite")
        if value < _LEAST_FACTOR:
            raise LongRopeError(f"{here} is {value!r}; a factor must be above 0, in float32 too")
        if value > bound:
            raise LongRopeError(
                f"{here} is {value!r}, over the bound {bound:g} = (largest max_length / "
                f"original_max_position_embeddings)^3 (at least {_LEAST_BOUND:g}); check both "
                "lengths"
            )


def unusual_factor(where: str, factors: Sequence[float], extension: float) -> str | None:
    """Name the first factor that no search would propose, or None.

    LongRoPE's candidates never decrease and lie between 1 and 1.25 s (its release: 1 + s),
    LongRoPE2's up to 2 s. Released models hold others: Phi-3 exceeds 2 s, Mistral's decrease by
    one step of 0.01 here and there, MiniCPM4 begins at 0.9978.
    """
    previous = 1.0
    for index, value in enumerate(factors):
        here = f"{where}[{index}] is {value!r}"
        if value < 1:
            return f"{here}, below 1"
        if value < previous:
            return f"{here}, below its predecessor {previous!r}"
        if value > 2 * extension:
            return f"{here}, over {2 * extension:g} = 2 x the extension ratio"
        previous = value
    return None
