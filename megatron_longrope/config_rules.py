"""The rules of a configuration: each broken one is a sentence naming field, value and rule."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_longrope.frequencies import ATTENTION_FACTOR_POLICIES

if TYPE_CHECKING:
    from megatron_longrope.config import LongRopeConfig

_MAX_INT = 2**53  # beyond it a JSON number is no longer an exact integer everywhere


def check_keys(where: str, value: Mapping[str, Any], known: set[str], optional: set[str]) -> None:
    """Refuse unknown and missing keys of a JSON object."""
    if unknown := sorted(value.keys() - known):
        raise ValueError(f"{where} has unknown key {unknown[0]!r}; known keys: {sorted(known)}")
    if missing := sorted(known - optional - value.keys()):
        raise ValueError(f"{where} lacks the key {missing[0]!r}")


def is_number(value: Any) -> bool:
    """True for int and float; booleans are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_int(name: str, value: Any, minimum: int) -> None:
    """Refuse what is no integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {minimum}")
    if value > _MAX_INT:
        raise ValueError(f"{name} is {value}; it must be at most 2^53")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} is {value!r}; it must be a finite number above 0")


def validate_geometry(config: LongRopeConfig) -> None:
    """Check everything but the factor sets."""
    check_positive("rotary_base", config.rotary_base)
    if config.rotary_base <= 1:
        raise ValueError(f"rotary_base is {config.rotary_base!r}; it must be above 1")
    check_int("rotary_dim", config.rotary_dim, 2)
    if config.rotary_dim % 2:
        raise ValueError(
            f"rotary_dim is {config.rotary_dim}, which is odd; dimensions rotate in pairs"
        )
    check_int("original_max_position_embeddings", config.original_max_position_embeddings, 2)
    if config.attention_factor is not None:
        check_positive("attention_factor", config.attention_factor)
    if config.attention_factor_policy not in ATTENTION_FACTOR_POLICIES:
        raise ValueError(
            f"attention_factor_policy is {config.attention_factor_policy!r}; "
            f"it must be one of {', '.join(ATTENTION_FACTOR_POLICIES)}"
        )


def validate_factor_sets(config: LongRopeConfig) -> None:
    """Check order, lengths and factors of all sets."""
    if not config.factor_sets:
        raise ValueError("factor_sets is empty; at least one set is needed")
    for index, item in enumerate(config.factor_sets):
        check_int(f"factor_sets[{index}].max_length", item.max_length, 1)
    # LongRoPE searches up to 1.25 s (the release: 1 + s), LongRoPE2 up to 2 s. A short window's
    # recovered factors stay near the long ones, so the bound is one for all sets.
    ratio = max(item.max_length for item in config.factor_sets)
    bound = 2.0 * max(ratio / config.original_max_position_embeddings, 1.0)
    previous = 0
    for index, item in enumerate(config.factor_sets):
        where = f"factor_sets[{index}]"
        if item.max_length == previous:
            raise ValueError(
                f"{where}.max_length {item.max_length} is a duplicate; each length may stand once"
            )
        if item.max_length < previous:
            raise ValueError(
                f"{where}.max_length {item.max_length} follows {previous}; sets must be sorted"
            )
        previous = item.max_length
        check_int(f"{where}.num_start_tokens", item.num_start_tokens, 0)
        validate_factors(f"{where}.rescale_factors", item.rescale_factors, config, bound)
        try:
            json.dumps(dict(item.origin), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}.origin must be plain JSON: {error}") from None


def validate_factors(
    where: str, factors: Sequence[float], config: LongRopeConfig, bound: float
) -> None:
    """Check one factor vector: count, finite, at least 1, non-decreasing, at most `bound`."""
    expected = config.rotary_dim // 2
    if len(factors) != expected:
        raise ValueError(
            f"{where} has {len(factors)} values; rotary_dim {config.rotary_dim} needs {expected}"
        )
    for index, value in enumerate(factors):
        here = f"{where}[{index}]"
        if not is_number(value):
            raise ValueError(f"{here} is {value!r}; it must be a number")
        if value != value:  # not math.isnan, which overflows on an integer of 400 digits
            raise ValueError(f"{here} is NaN; factors must be finite")
        if abs(value) == math.inf:
            raise ValueError(f"{here} is infinite; factors must be finite")
        if value < 1:
            raise ValueError(f"{here} is {value!r}, below 1; a factor may only slow a rotation")
        if index and value < factors[index - 1]:
            raise ValueError(
                f"{here} is {value!r}, below its predecessor {factors[index - 1]!r}; "
                "factors must not decrease (the paper's monotonic constraint)"
            )
        if value > bound:
            raise ValueError(
                f"{here} is {value!r}, over the bound {bound:g} = 2 x largest max_length / "
                "original_max_position_embeddings; check both lengths"
            )
