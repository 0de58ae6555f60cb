"""Models whose RoPE is scaled already: what their frequencies are before any LongRoPE factor.

A description holds transformers' names and values, for example::

    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}

Every type slows each frequency of plain RoPE by a constant, which LongRoPE's factors multiply.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Mapping
from typing import Any

from megatron_longrope.config_rules import check_int, check_keys, check_positive
from megatron_longrope.errors import LongRopeError
from megatron_longrope.frequencies import inv_freq
from megatron_longrope.methods import linear_factors, yarn_factors

_WINDOW = "original_max_position_embeddings"
_MEGATRONS_FACTOR = 8.0  # RotaryEmbedding's default
_HYBRID_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")  # the second is older
_YARN_ATTENTION = ("attention_factor", "mscale", "mscale_all_dim")
# type -> (keys that must be there, keys that may be)
BASE_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", _WINDOW}),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor", _WINDOW}),
        frozenset({"beta_fast", "beta_slow", "truncate", *_YARN_ATTENTION}),
    ),
}


def validate_base_frequencies(value: Any) -> None:
    """Refuse a description that is not complete, or not one of the known types.

    Raises:
        LongRopeError: The message names the key, its value and the rule.
    """
    if not isinstance(value, Mapping):
        raise LongRopeError(f"base_frequencies is {value!r}; it must be an object or absent")
    kind = value.get("rope_type")
    if kind not in BASE_KEYS:
        raise LongRopeError(
            f"base_frequencies.rope_type is {kind!r}; it must be one of {', '.join(BASE_KEYS)}"
        )
    needed, optional = BASE_KEYS[kind]
    check_keys("base_frequencies", value, {"rope_type", *needed, *optional}, set(optional))
    for key, item in value.items():
        name = f"base_frequencies.{key}"
        if key == "truncate":
            if not isinstance(item, bool):
                raise LongRopeError(f"{name} is {item!r}; it must be true or false")
        elif key == _WINDOW:
            check_int(name, item, 2)
        elif key != "rope_type":
            check_positive(name, item)
    if kind == "llama3" and value["high_freq_factor"] <= value["low_freq_factor"]:
        raise LongRopeError(
            f"base_frequencies.high_freq_factor is {value['high_freq_factor']!r}; it must be above "
            f"low_freq_factor {value['low_freq_factor']!r}"
        )


def megatron_base_frequencies(args: argparse.Namespace) -> dict[str, Any] | None:
    """What `--use-rope-scaling` of Megatron-LM, or `rope_scaling` of Megatron-Bridge, does.

    megatron-core's `RotaryEmbedding._apply_scaling` knows Llama 3.1's numbers and a factor. Warns
    of what Megatron-LM took from its command line and gave to no model: that factor, and any
    scaling of a HybridModel.

    Returns:
        dict[str, Any] | None: A valid description; None where nothing is scaled.
    """
    by_argument = getattr(args, "use_rope_scaling", False)
    if not by_argument and not getattr(args, "rope_scaling", False):
        return None
    if any(getattr(args, name, None) is not None for name in _HYBRID_PATTERNS):
        warnings.warn(
            "the checkpoint's arguments have use_rope_scaling, but HybridModel of megatron-core "
            "does not scale RoPE whatever --use-rope-scaling says; it is taken as plain RoPE",
            stacklevel=2,
        )
        return None
    factor = float(getattr(args, "rope_scaling_factor", None) or _MEGATRONS_FACTOR)
    if by_argument and factor != _MEGATRONS_FACTOR:
        warnings.warn(
            f"the checkpoint's arguments have rope_scaling_factor {factor:g}, which is taken for "
            f"the model's, but pretrain_gpt.py of Megatron-LM scales by {_MEGATRONS_FACTOR:g} "
            "whatever --rope-scaling-factor says; if it trained this model, save the checkpoint "
            "once without that flag",
            stacklevel=2,
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        _WINDOW: 8192,
    }


def base_factors(
    value: Mapping[str, Any], rotary_base: float, rotary_dim: int
) -> tuple[float, ...]:
    """By what each frequency of plain RoPE is slowed.

    Args:
        value (Mapping): A valid description.

    Returns:
        tuple[float, ...]: `rotary_dim / 2` factors.
    """
    if value["rope_type"] == "linear":
        return tuple(linear_factors(rotary_dim, value["factor"]))
    if value["rope_type"] == "yarn":
        return tuple(
            yarn_factors(
                rotary_dim,
                value["factor"],
                rotary_base,
                value[_WINDOW],
                beta_fast=value.get("beta_fast", 32.0),
                beta_slow=value.get("beta_slow", 1.0),
                truncate=value.get("truncate", True),
            )
        )
    return tuple(_llama3_factor(value, item) for item in inv_freq(rotary_base, rotary_dim).tolist())


def _llama3_factor(value: Mapping[str, Any], frequency: float) -> float:
    """Llama 3.1: slow what rotates less than `low_freq_factor` times within the original window.

    What rotates more than `high_freq_factor` times stays, and the inverse of the factor is mixed
    linearly between the two.
    """
    factor, low, high = value["factor"], value["low_freq_factor"], value["high_freq_factor"]
    rotations = value[_WINDOW] * frequency / (2 * math.pi)
    if rotations > high:
        return 1.0
    if rotations < low:
        return float(factor)
    smooth = (rotations - low) / (high - low)
    return float(1.0 / ((1.0 - smooth) / factor + smooth))


def base_attention_factor(value: Mapping[str, Any]) -> float:
    """Multiplier of q and k that belongs to the scaling; 1 but for YaRN."""
    if value["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in value:
        return float(value["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if value["factor"] <= 1 else 0.1 * weight * math.log(value["factor"]) + 1.0

    if "mscale" in value and "mscale_all_dim" in value:
        return mscale(value["mscale"]) / mscale(value["mscale_all_dim"])
    return mscale(1.0)
