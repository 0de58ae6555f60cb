"""The three searches of the paper as one problem: what is varied, from where, and what it becomes.

- first: factors for a longer window of the base model (section 3.2);
- second: a further, small extension of a fine-tuned model; candidates multiply its factors (3.3);
- recovery: factors for a short window of an extended model, with a reduced upper bound (3.3).

The first two also run in LongRoPE2's space (arXiv 2502.20082), see
:mod:`megatron_longrope.factor_search.critical`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from megatron_longrope.baselines import extension
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.critical import (
    CriticalSpace,
    critical_choices,
    critical_seeds,
    first_incomplete,
)
from megatron_longrope.factor_search.space import Candidate, GivenFactors, SearchSpace
from megatron_longrope.lengths import format_length
from megatron_longrope.merging import check_same_model
from megatron_longrope.methods import named_factors

SEED_METHODS = ("pi", "ntk", "yarn")
SPACES = ("floored", "full", "critical")
"""LongRoPE's space with factors of at least s from the critical dimension on, without that floor,
and LongRoPE2's."""

# Section 3.3 extends a fine-tuned model by 2x to 16x without further training.
_SECOND_SCALES = (2.0, 16.0)


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
    """Named starting points; `near-X` is the candidate nearest to a reference X that the space does
    not hold."""
    references: Mapping[str, GivenFactors]
    """Absolute factors that are always scored, as they are: one of them is the result if nothing
    beats it."""
    exact: Mapping[Candidate, GivenFactors] = field(default_factory=dict)
    """References that stand for the candidate of their grid cell, so that starting from one loses
    nothing to rounding."""

    def factor_set(
        self, candidate: Candidate | GivenFactors, origin: Mapping[str, Any] | None = None
    ) -> FactorSet:
        """The absolute factors of a candidate or of a reference."""
        given = self.exact.get(candidate, candidate)
        if isinstance(given, Candidate):
            factors, num_start_tokens = self.space.decode(given)
            product = tuple(a * b for a, b in zip(self.multiplier, factors, strict=True))
            given = GivenFactors(product, num_start_tokens)
        return FactorSet(
            self.target_length, given.rescale_factors, given.num_start_tokens, origin or {}
        )

    def config(
        self, candidate: Candidate | GivenFactors, origin: Mapping[str, Any] | None = None
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
    start_tokens: tuple[int, ...] | None = None,
    space: str = "full",
    critical_dimension: int | None = None,
    warm_start: LongRopeConfig | None = None,
    for_retrieval: bool = False,
) -> SearchProblem:
    """Choose the stage from the lengths: beyond the base it extends, within it recovers.

    A second search in the critical space varies the multipliers, so its range [s, 2 s] is that of
    the further, small extension. Its critical dimensions are still the pre-training window's: a
    fine-tuned window is longer, but so are, by the base's factors, the periods there.

    Args:
        base (LongRopeConfig): Plain RoPE for a first search, else a fine-tuned model's factors.
        target_length (int): Window in tokens.
        upper (float, optional): Largest candidate factor. Defaults to 1.25 s (LongRoPE's space) or
            2 s (LongRoPE2's), for a recovery to max(3, 1 + s) or to the largest factor of the
            base's sets where that is larger, as all of them are starting points: published short
            factors are as large as the long ones (62 for 4k tokens of LLaMA2-256k). Less where the
            product with the base's factors would exceed 2 x the whole extension ratio.
        start_tokens (tuple[int, ...], optional): Choices of n_hat; the critical space has none.
            Defaults to what the base has, 0 for plain RoPE.
        space (str): One of :data:`SPACES`. A recovery, which extends nothing, has no floor.
        critical_dimension (int, optional): An index of frequencies: where the floor begins, by
            default at the first dimension that completes no period in the trained window; or the
            critical space's dimension, by default searched among algorithm 1's choices.
        warm_start (LongRopeConfig, optional): Factors of the same model for a near window, another
            starting point: of the sets beyond the base's window YaRN extends the longest one up to
            the target length; where all are longer, the shortest is taken as it is.
        for_retrieval (bool): Whether scores ask for hidden numbers: the floored space then has a
            starting point beyond the extension ratio.

    Raises:
        LongRopeError: Nothing to search, or a setting outside its range.
    """
    if space not in SPACES:
        raise LongRopeError(f"space {space!r} is unknown; choose one of {', '.join(SPACES)}")
    if critical_dimension is not None and space == "full":
        raise LongRopeError(
            f"critical_dimension {critical_dimension} has no meaning in the full space; "
            "leave it out or search the floored or the critical space"
        )
    original = base.original_max_position_embeddings
    if target_length < original:
        raise LongRopeError(
            f"target length {target_length} is below the original window {original}; "
            "search for the original window or a longer one"
        )
    if target_length > base.max_length:
        named = {name: _given(extension(name, base, target_length)) for name in SEED_METHODS}
        if warm_start is not None:
            named["warm"] = _warm(warm_start, base, target_length)
        dimension = critical_dimension
        if space == "critical":
            choices = critical_choices(base) if dimension is None else (dimension,)
            return _extension(
                base, target_length, upper, start_tokens or (0,), named,
                CriticalSpace, critical_dimensions=choices,
            )  # fmt: skip
        start_tokens = start_tokens or (base.factor_sets[-1].num_start_tokens,)
        if space == "floored" and dimension is None:
            # Slowed frequencies in the window that they were tuned for.
            longest = base.factor_sets[-1]
            factors = base.plain_factors(longest)
            dimension = first_incomplete(base, longest.max_length, factors)
        return _extension(
            base, target_length, upper, start_tokens, named,
            SearchSpace, slowed=for_retrieval, floor_dimension=dimension,
        )  # fmt: skip
    _check_recovery(base, target_length, space, critical_dimension, warm_start)
    return _recovery(base, target_length, upper, start_tokens)


def _extension(
    base: LongRopeConfig,
    target_length: int,
    upper: float | None,
    start_tokens: tuple[int, ...],
    named: Mapping[str, GivenFactors],
    kind: type[SearchSpace],
    slowed: bool = False,
    **dimensions: Any,
) -> SearchProblem:
    """First or second search in LongRoPE's space or in LongRoPE2's.

    Args:
        named (Mapping): The references.
        kind (type): The space.
        slowed (bool): Whether a floored space also starts from its slowest factors.
        dimensions: What it is told of the critical dimension.
    """
    stage, scale, multiplier = _further(base, target_length)
    limit = _limit(base, target_length, multiplier)
    if kind is CriticalSpace and upper is None and limit < scale + SearchSpace.step:
        raise LongRopeError(
            f"the base's largest factor {max(multiplier):g} leaves candidates up to {limit:.4g}, "
            f"not above the extension ratio {scale:g} that starts the critical space; "
            "search the full space"
        )
    upper = _bounded(upper, kind.upper_ratio * scale, limit)
    space = kind(base.rotary_dim // 2, scale, upper=upper, start_tokens=start_tokens, **dimensions)
    seeds = None
    if isinstance(space, CriticalSpace):
        seeds = critical_seeds(space)
    elif slowed and space.floor_dimension and upper > scale:
        seeds = _slowed(space, space.floor_dimension)
    return _problem(stage, base, target_length, space, multiplier, named, seeds)


def _slowed(space: SearchSpace, dimension: int) -> dict[str, Candidate]:
    """The NTK whose `dimension` meets the largest factor, which is that of all dimensions beyond.

    No published method slows a dimension by more than s, and a model may find a number far back
    only beyond it: SmolLM2-135M at twice its window loses 3.3 nats per token of a number at s and
    0.17 here, where 20 candidates of a search that starts at s do not get.
    """
    assert space.upper is not None
    factors = [space.upper ** min(i / dimension, 1.0) for i in range(space.num_factors)]
    ratio = space.upper / space.scale
    return {f"cd{dimension}x{ratio:g}": space.encode(factors, space.start_tokens[0])}


def _check_recovery(
    base: LongRopeConfig,
    target_length: int,
    space: str,
    critical_dimension: int | None,
    warm_start: LongRopeConfig | None,
) -> None:
    """Refuse what only an extension has, and a model that is not extended.

    Raises:
        LongRopeError: One of them.
    """
    if warm_start is not None:
        raise LongRopeError(
            "a warm start belongs to a search beyond the base's window; a recovery starts from the "
            "base's own factors"
        )
    if critical_dimension is not None:
        raise LongRopeError(
            f"critical_dimension {critical_dimension} has no meaning in a recovery, whose factors "
            "have no floor; leave it out"
        )
    if base.max_length <= base.original_max_position_embeddings:
        raise LongRopeError(
            f"target length {target_length} is the original window and the model is not extended; "
            "nothing to search: give a longer --target-length, or a --base-config to recover"
        )
    if space == "critical":
        raise LongRopeError(
            f"target length {target_length} lies within the base's window, which is a recovery, "
            "and LongRoPE2's critical space only extends (its short factors are 1); "
            "search the full space"
        )


def _recovery(
    base: LongRopeConfig,
    target_length: int,
    upper: float | None,
    start_tokens: tuple[int, ...] | None,
) -> SearchProblem:
    """Search for a window that the base already covers."""
    original = base.original_max_position_embeddings
    scale = target_length / original
    ones = (1.0,) * (base.rotary_dim // 2)
    *shorter, longest = base.factor_sets
    # After second searches the tuned window's set is neither the current nor the longest one.
    named = {
        "none": GivenFactors(ones),
        "base": _given(base.factor_set_for(target_length)),
        "longest": _given(longest),
        **{f"base-{format_length(item.max_length)}": _given(item) for item in shorter},
    }
    if scale > 1:
        factors = named_factors("ntk", base.rotary_dim, scale, base.rotary_base, original)
        named["ntk"] = GivenFactors(tuple(factors))
    if start_tokens is None:
        start_tokens = tuple(sorted({item.num_start_tokens for item in base.factor_sets}))
    largest = max(max(item.rescale_factors) for item in base.factor_sets)
    step = SearchSpace.step
    covering = round(1.0 + step * math.ceil((largest - 1.0) / step - 1e-6), 10)
    default = max(3.0, 1.0 + scale, covering)
    upper = _bounded(upper, default, _limit(base, target_length, ones))
    space = SearchSpace(len(ones), 1.0, upper=upper, start_tokens=start_tokens)
    return _problem("recovery", base, target_length, space, ones, named)


def _problem(
    stage: str,
    base: LongRopeConfig,
    target_length: int,
    space: SearchSpace,
    multiplier: tuple[float, ...],
    references: Mapping[str, GivenFactors],
    seeds: Mapping[str, Candidate] | None = None,
) -> SearchProblem:
    """The problem with a starting point for each reference; those that coincide stand once."""
    references = {
        name: given
        for index, (name, given) in enumerate(references.items())
        if given not in list(references.values())[:index]
    }
    seeds = dict(seeds or {})
    exact: dict[Candidate, GivenFactors] = {}
    for name, given in references.items():
        relative = [a / b for a, b in zip(given.rescale_factors, multiplier, strict=True)]
        candidate = space.encode(relative, given.num_start_tokens)
        factors, num_start_tokens = space.decode(candidate)
        largest = max(abs(a - b) for a, b in zip(factors, relative, strict=True))
        held = num_start_tokens == given.num_start_tokens and largest < 0.51 * space.step
        # The first of two in one cell stands for it; the other one is scored apart.
        if held and candidate not in exact:
            exact[candidate] = given
        elif candidate in seeds.values() or candidate in exact:
            continue
        if candidate not in seeds.values():
            seeds[name if held else f"near-{name}"] = candidate
    return SearchProblem(stage, base, target_length, space, multiplier, seeds, references, exact)


def _given(factors: FactorSet) -> GivenFactors:
    return GivenFactors(factors.rescale_factors, factors.num_start_tokens)


def _warm(warm_start: LongRopeConfig, base: LongRopeConfig, target_length: int) -> GivenFactors:
    """The starting point that factors for another window give.

    Raises:
        LongRopeError: They are another model's, or none is for a window beyond the base's.
    """
    check_same_model(
        "the warm start", warm_start, "the base", base, "give factors of the same model"
    )
    further = [item for item in warm_start.factor_sets if item.max_length > base.max_length]
    if not further:
        raise LongRopeError(
            f"the warm start has no factors beyond the base's {base.max_length} tokens, hence "
            "nothing that this search does not know; give the result of a search for another window"
        )
    near = [item for item in further if item.max_length <= target_length]
    if not near or near[-1].max_length == target_length:
        return _given((near[-1:] or further)[0])
    return _given(extension("yarn", replace(warm_start, factor_sets=tuple(near)), target_length))


def _further(base: LongRopeConfig, target_length: int) -> tuple[str, float, tuple[float, ...]]:
    """Stage, extension ratio and multiplier of a search beyond the base's window."""
    longest = base.factor_sets[-1]
    scale = target_length / longest.max_length
    # Published factors hold a few decreases, which would be in every candidate's product.
    multiplier = tuple(accumulate(longest.rescale_factors, max))
    if multiplier != longest.rescale_factors:
        warnings.warn(
            f"the base's factors for {longest.max_length} tokens decrease in places; candidates "
            "multiply their running maximum, and the base itself stays as it is",
            stacklevel=4,
        )
    if longest.max_length <= base.original_max_position_embeddings:
        return "first", scale, multiplier
    low, high = _SECOND_SCALES
    if not low <= scale <= high:
        warnings.warn(
            f"the second search extends {longest.max_length} tokens by {scale:.4g}, outside the "
            f"{low:g}x to {high:g}x of the paper (section 3.3); check that the target length is "
            f"{target_length}, or fine-tune for a window in between",
            stacklevel=4,
        )
    return "second", scale, multiplier


def _limit(base: LongRopeConfig, target_length: int, multiplier: tuple[float, ...]) -> float:
    """Largest candidate factor whose product stays within 2 x the longest extension ratio."""
    longest = max(base.max_length, target_length)
    bound = 2.0 * longest / base.original_max_position_embeddings
    largest = max(multiplier)
    if largest == 1.0:
        return bound
    if largest > 2.0 * base.max_length / base.original_max_position_embeddings:
        bound = 2.0 * target_length / base.max_length * largest  # a base that is over it already
    # On the grid, as only there it shows whether the rounded product exceeds the bound.
    step = SearchSpace.step
    steps = math.floor((bound / largest - 1.0) / step + 1e-6)
    limit = round(1.0 + steps * step, 10)
    return limit if limit * largest <= bound else round(limit - step, 10)


def _bounded(upper: float | None, default: float, limit: float) -> float:
    """The `upper` of a space, which no candidate's product may carry over the bound."""
    if upper is None:
        return min(default, limit)
    if isinstance(upper, (int, float)) and upper > limit:
        raise LongRopeError(
            f"upper {upper:g} admits factors over 2 x the extension ratio, the bound of a search;"
            f" give at most {limit:.6g}"
        )
    return upper
