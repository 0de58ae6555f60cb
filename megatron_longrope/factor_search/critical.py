"""LongRoPE2's search space (arXiv 2502.20082, section 3.2 and algorithms 1 and 2).

A dimension that never completes its period within the pre-training window meets unseen angles in a
longer one, unless its factor reaches the extension ratio s. Only the dimensions from the critical
one up are searched, on [s, 2 s]; those below follow from the critical one's factor as in NTK
interpolation. There are no start tokens: a candidate's second gene chooses the critical dimension,
which is found below the theory's because the slow dimensions are under-trained.

Dimensions are indices i of frequencies, 0 .. d/2 - 1, half of the paper's d_tcd and d_rcd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.space import Candidate, SearchSpace

_MIN_SEEDS = 8  # starting points of the released code for its single critical dimension
_SEED_RATIOS = 8


def first_incomplete(
    base: LongRopeConfig, window: int, factors: Sequence[float], periods: float = 1.0
) -> int | None:
    """Find the first dimension that completes fewer than `periods` periods in a window.

    On plain RoPE and for one period half of section 3.1's d_tcd: 31 for Phi3-mini (d = 96, base
    1e4, 2048 tokens), 35 for LLaMA3-8B (128, 5e5, 8192).

    Args:
        base (LongRopeConfig): Has the rotary base and dimensions.
        window (int): In tokens.
        factors (Sequence[float]): `[rotary_dim / 2]`, by what each frequency is slowed.
        periods (float): 10 gives the lower end of algorithm 1. Defaults to 1.

    Returns:
        int | None: An index of frequencies; None where every dimension completes that many.
    """
    for index, factor in enumerate(factors):
        period = 2 * math.pi * factor * base.rotary_base ** (2 * index / base.rotary_dim)
        if periods * period > window:
            return index
    return None


def critical_choices(base: LongRopeConfig) -> tuple[int, ...]:
    """Return algorithm 1's critical dimensions: from ten periods in the trained window to one.

    The periods are those of the model as it was trained, which may scale RoPE itself.

    Raises:
        LongRopeError: No dimension is critical.
    """
    window = base.original_max_position_embeddings
    factors = base.base_factors or (1.0,) * (base.rotary_dim // 2)
    lowest = first_incomplete(base, window, factors, periods=10.0)
    highest = first_incomplete(base, window, factors)
    if lowest is None or highest is None:
        raise LongRopeError(
            f"all {len(factors)} dimensions complete their period in the original window of "
            f"{window} tokens, so that none is critical; search the full space"
        )
    return tuple(range(lowest, highest + 1))


@dataclass(frozen=True)
class CriticalSpace(SearchSpace):
    """Factors on [s, 2 s] from a critical dimension up, NTK below it.

    The steps of a candidate below its critical dimension are no genes and hold `min_step`.
    """

    start_tokens: tuple[int, ...] = (0,)
    """LongRoPE2 has none."""
    critical_dimensions: tuple[int, ...] = ()
    """Choices of the critical dimension, ascending indices of frequencies."""
    upper_ratio: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_tokens != (0,):
            raise LongRopeError(
                f"start_tokens {self.start_tokens!r} cannot be searched in the critical space, "
                "which has none; leave them out or search the full space"
            )
        if self.max_step < self.min_step:
            raise LongRopeError(
                f"upper is {self.upper!r}, below {super()._factor(self.min_step)}, the smallest "
                "factor of this space (the extension ratio, on the grid); raise upper"
            )
        for index, value in enumerate(self.critical_dimensions):
            self._check_dimension(f"critical_dimensions[{index}]", value)

    @property
    def lower(self) -> float:
        """Smallest factor of a gene: the extension ratio."""
        return self.scale

    @property
    def num_choices(self) -> int:
        """Number of critical dimensions to choose from."""
        return len(self.critical_dimensions)

    @property
    def size(self) -> int:
        """Number of candidates."""
        levels = self.max_step - self.min_step
        genes = [self.num_factors - first for first in self.critical_dimensions]
        return sum(math.comb(levels + count, count) for count in genes)

    def first_gene(self, start_index: int) -> int:
        """The critical dimension of a choice."""
        return self.critical_dimensions[start_index]

    def canonical(self, candidate: Candidate) -> Candidate:
        """The representative of all candidates with the same genes: the lowest step below them.

        Args:
            candidate (Candidate): Monotone from its critical dimension up; anything below it.
        """
        first = self.critical_dimensions[candidate.start_index]
        return replace(candidate, steps=(self.min_step,) * first + candidate.steps[first:])

    def encode(self, rescale_factors: Sequence[float], num_start_tokens: int = 0) -> Candidate:
        """Nearest candidate: of every choice's rounded factors, the closest in log(lambda).

        Args:
            rescale_factors (Sequence[float]): `[rotary_dim / 2]`.
            num_start_tokens (int): Without effect, as the space has no start tokens.
        """
        nearest = self._nearest_steps(rescale_factors)
        wanted = [math.log(max(value, 1.0)) for value in rescale_factors]

        def distance(candidate: Candidate) -> float:
            return math.dist(wanted, [math.log(value) for value in self.decode(candidate)[0]])

        candidates = [self._rounded(nearest, index) for index in range(self.num_choices)]
        return min(candidates, key=distance)

    def decode(self, candidate: Candidate) -> tuple[tuple[float, ...], int]:
        """Rescale factors and num_start_tokens (0) of a candidate.

        Below the critical dimension c, lambda_i = lambda_c^(i / c), as in the released code: NTK
        interpolation whose base makes dimension c meet its own factor.
        """
        first = self.critical_dimensions[candidate.start_index]
        factors = [self._factor(k) for k in candidate.steps[first:]]
        return (*(_ntk(factors[0], i, first) for i in range(first)), *factors), 0

    def with_factors(
        self, candidate: Candidate, genes: Sequence[int], factors: Sequence[float]
    ) -> Candidate:
        """`candidate` with other factors at `genes`, all of those that count, on the grid."""
        values = [self.lower] * self.num_factors
        for gene, value in zip(genes, factors, strict=True):
            values[gene] = float(value)
        return self._rounded(self._nearest_steps(values), candidate.start_index)

    def choices(self, candidate: Candidate) -> list[Candidate]:
        """The candidates nearest to `candidate` with each critical dimension."""
        nearest = self._nearest_steps(self.decode(candidate)[0])
        return list(
            dict.fromkeys(self._rounded(nearest, index) for index in range(self.num_choices))
        )

    def _factor(self, k: int) -> float:
        # The last grid point may exceed the bound by rounding, which the configuration refuses.
        return min(super()._factor(k), float(self.upper))

    def _rounded(self, steps: Sequence[int], start_index: int) -> Candidate:
        """The candidate with these steps, made non-decreasing, at the genes of a choice."""
        first = self.critical_dimensions[start_index]
        genes = accumulate(steps[first:], max)
        return Candidate((self.min_step,) * first + tuple(genes), start_index)


def critical_seeds(space: CriticalSpace) -> dict[str, Candidate]:
    """Starting points of algorithm 1: lambda_i = s0 from a critical dimension up, NTK below.

    The paper draws s0 from [s, 2 s]; here it runs through s (1 + k/8), k = 0 .. 7, as in the
    released code. Every critical dimension has one, and there are at least eight.

    Returns:
        dict: `cd<dimension>x<s0 / s>` -> candidate; seeds that coincide stand once.
    """
    seeds: dict[str, Candidate] = {}
    for index in range(max(_MIN_SEEDS, space.num_choices)):
        dimension = space.critical_dimensions[index % space.num_choices]
        ratio = 1.0 + index % _SEED_RATIOS / _SEED_RATIOS
        steps = space._nearest_steps((ratio * space.scale,) * space.num_factors)
        candidate = space._rounded(steps, index % space.num_choices)
        if candidate not in seeds.values():
            seeds[f"cd{dimension}x{ratio:g}"] = candidate
    return seeds


def _ntk(critical_factor: float, i: int, critical: int) -> float:
    return round(critical_factor ** (i / critical), 10)
