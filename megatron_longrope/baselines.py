"""Published methods as configurations, to seed a search and to compare with."""

from __future__ import annotations

from dataclasses import replace

from megatron_longrope import methods
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.frequencies import attention_factor
from megatron_longrope.methods import named_factors


def extension(method: str, base: LongRopeConfig, target_length: int) -> FactorSet:
    """Factors of a method for a longer window of the model that `base` describes.

    A model with factors keeps them: the method's multiply those of its longest window, which is
    what a second extension of a fine-tuned model is (LongRoPE, table 9).

    Args:
        method (str): One of :data:`megatron_longrope.methods.METHODS`.
        base (LongRopeConfig): Plain RoPE, or a model's own factors.
        target_length (int): Window, in tokens, beyond the base's.

    Raises:
        LongRopeError: The method is unknown, or the base's window is as long as the target.
    """
    longest = base.factor_sets[-1]
    further = named_factors(
        method,
        base.rotary_dim,
        target_length / longest.max_length,
        base.rotary_base,
        longest.max_length,
        base.plain_factors(longest),  # rotations are those of the frequencies that were trained
    )
    factors = tuple(a * b for a, b in zip(longest.rescale_factors, further, strict=True))
    return FactorSet(target_length, factors, longest.num_start_tokens, {"method": method})


def extended_config(
    method: str, base: LongRopeConfig, target_length: int, policy: str | None = None
) -> LongRopeConfig:
    """The base with a method's factors for a longer window; within its own window, the base.

    Args:
        method (str): One of :data:`megatron_longrope.methods.METHODS`.
        base (LongRopeConfig): Plain RoPE, or a model's own factors.
        target_length (int): Window, in tokens.
        policy (str, optional): Attention-factor policy of every window. By default the base keeps
            its attention factor, and YaRN multiplies it by its own for the further extension.
    """
    longer = target_length > base.max_length
    config = base.with_factor_set(extension(method, base, target_length)) if longer else base
    if policy is not None:
        return replace(config, attention_factor=None, attention_factor_policy=policy)
    if not longer:
        return config
    value = base.attention_factor_for(base.max_length) * attention_factor(
        methods.method(method).policy,
        target_length / base.max_length,
        base.original_max_position_embeddings,
    )
    return replace(config, attention_factor=value)
