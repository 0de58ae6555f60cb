"""Published methods as configurations, to seed a search and to compare with."""

from __future__ import annotations

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.frequencies import named_factors

METHODS = ("none", "pi", "ntk", "yarn")


def baseline_config(
    method: str,
    rotary_base: float,
    rotary_dim: int,
    original_max_position_embeddings: int,
    target_length: int,
    policy: str = "none",
) -> LongRopeConfig:
    """Configuration of `none`, `pi`, `ntk` or `yarn` for one target length.

    Args:
        target_length (int): Window, in tokens; at or below the original window nothing is rescaled.
        policy (str): Attention-factor policy at the target length. Defaults to `none`.

    Returns:
        LongRopeConfig: Sets for the original window (all ones) and, if longer, the target.
    """
    original = original_max_position_embeddings
    sets = [FactorSet(original, (1.0,) * (rotary_dim // 2), origin={"method": "none"})]
    if target_length > original:
        factors = named_factors(method, rotary_dim, target_length / original, rotary_base, original)
        sets.append(FactorSet(target_length, tuple(factors), origin={"method": method}))
    return LongRopeConfig(
        rotary_base=rotary_base,
        rotary_dim=rotary_dim,
        original_max_position_embeddings=original,
        factor_sets=tuple(sets),
        attention_factor_policy=policy,
    )
