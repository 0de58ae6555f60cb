"""The three searches of the paper as one problem: what is varied, from where, and what it becomes.

- first: factors for a longer window of the base model (section 3.2);
- second: a further, small extension of a fine-tuned model; candidates multiply its factors (3.3);
- recovery: factors for a short window of an extended model, with a reduced upper bound (3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.frequencies import named_factors
from megatron_longrope.search.space import START_TOKENS, Candidate, SearchSpace

SEED_METHODS = ("pi", "ntk", "yarn")


@dataclass(frozen=True)
class SearchProblem:
    """A search space around a base configuration."""

    stage: str
    """`first`, `second` or `recovery`."""

    base: LongRopeConfig
    """Configuration that the result extends."""

    target_length: int
    """Window, in tokens, that is searched for."""

    space: SearchSpace
    """What a candidate may be."""

    multiplier: tuple[float, ...]
    """Factors that a candidate multiplies; ones except in the second search."""

    seeds: Mapping[str, Candidate]
    """Named starting points."""

    def factor_set(
        self, candidate: Candidate, origin: Mapping[str, Any] | None = None
    ) -> FactorSet:
        """The absolute factors of a candidate."""
        factors, num_start_tokens = self.space.decode(candidate)
        product = tuple(a * b for a, b in zip(self.multiplier, factors, strict=True))
        return FactorSet(self.target_length, product, num_start_tokens, origin or {})

    def config(
        self, candidate: Candidate, origin: Mapping[str, Any] | None = None
    ) -> LongRopeConfig:
        """The base configuration with the candidate as the target length's set."""
        return self.base.with_factor_set(self.factor_set(candidate, origin))

    def with_attention(self, factor: float | None, policy: str) -> SearchProblem:
        """The same problem under another attention factor."""
        base = replace(self.base, attention_factor=factor, attention_factor_policy=policy)
        return replace(self, base=base)


def make_problem(
    base: LongRopeConfig,
    target_length: int,
    *,
    upper: float | None = None,
    start_tokens: tuple[int, ...] = START_TOKENS,
) -> SearchProblem:
    """Choose the stage from the lengths: beyond the base it extends, within it recovers.

    Args:
        base (LongRopeConfig): Plain RoPE for a first search, else a fine-tuned model's factors.
        target_length (int): Window in tokens.
        upper (float, optional): Largest candidate factor. Defaults to 1.25 s (the paper's space),
            for a recovery to max(3, 1 + s), which the published short factors stay within.
        start_tokens (tuple[int, ...]): Choices of n_hat.

    Raises:
        ValueError: Nothing to search, or a setting outside its range.
    """
    original = base.original_max_position_embeddings
    extended = base.max_length > original
    half = base.rotary_dim // 2
    ones = (1.0,) * half
    if target_length < original:
        raise ValueError(
            f"target length {target_length} is below the original window {original}; "
            "search for the original window or a longer one"
        )
    if target_length > base.max_length:
        longest = base.factor_sets[-1]
        scale = target_length / longest.max_length
        space = SearchSpace(half, scale, upper=upper, start_tokens=start_tokens)
        seeds = {
            name: space.encode(
                named_factors(name, base.rotary_dim, scale, base.rotary_base, longest.max_length)
            )
            for name in SEED_METHODS
        }
        stage = "second" if extended else "first"
        return SearchProblem(
            stage, base, target_length, space, longest.rescale_factors, _distinct(seeds)
        )
    if not extended:
        raise ValueError(
            f"target length {target_length} is the original window and the model is not extended; "
            "nothing to search: give a longer --target-length, or a --base-config to recover"
        )
    scale = target_length / original
    space = SearchSpace(
        half, max(scale, 1.01), upper=upper or max(3.0, 1.0 + scale), start_tokens=start_tokens
    )
    seeds = {
        "none": space.encode(ones),
        "base": space.encode(base.factor_set_for(target_length).rescale_factors),
        "longest": space.encode(base.factor_sets[-1].rescale_factors),
    }
    if scale > 1:
        seeds["ntk"] = space.encode(
            named_factors("ntk", base.rotary_dim, scale, base.rotary_base, original)
        )
    return SearchProblem("recovery", base, target_length, space, ones, _distinct(seeds))


def _distinct(seeds: Mapping[str, Candidate]) -> dict[str, Candidate]:
    """Drop seeds that coincide on the grid; the first name stays."""
    return {
        name: candidate
        for index, (name, candidate) in enumerate(seeds.items())
        if candidate not in list(seeds.values())[:index]
    }
