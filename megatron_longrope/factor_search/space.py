"""The search space of LongRoPE (arXiv 2402.13753, section 3.2 and table 4) on an integer grid.

A factor lambda_i lies in [1, 1.25 s] at multiples of 0.01 above 1 and never decreases with i; n_hat
is one of 14 start-token counts. Working on the integers k_i = (lambda_i - 1) / step makes equality
exact, so a candidate can be hashed and its factors are never scored twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

from megatron_longrope.config_rules import check_int, check_positive
from megatron_longrope.errors import LongRopeError

START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
"""Choices for n_hat in table 4 of the paper."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One grid point: lambda_i = 1 + step * steps[i], n_hat = start_tokens[start_index]."""

    steps: tuple[int, ...]
    """k_i >= 0, non-decreasing, one for each of the rotary_dim / 2 frequencies."""
    start_index: int = 0
    """Index into the space's start_tokens; in a critical space, into its critical_dimensions."""


@dataclass(frozen=True, slots=True)
class GivenFactors:
    """Absolute factors from elsewhere, which need lie in no space and on no grid."""

    rescale_factors: tuple[float, ...]
    """lambda_i, `[rotary_dim / 2]`."""
    num_start_tokens: int = 0
    """n_hat."""


@dataclass(frozen=True)
class SearchSpace:
    """Bounds, grid and start-token choices of a search.

    :class:`.critical.CriticalSpace` narrows it to LongRoPE2's. Operators and algorithms know a
    space by `min_step`, `max_step`, `num_choices`, `first_gene` and `canonical`, and treat both
    alike.
    """

    num_factors: int
    """Number of rescale factors: rotary_dim / 2."""
    scale: float
    """Extension ratio s that the search covers (target length / the model's window); 1 in a
    recovery, which extends nothing."""
    upper: float | None = None
    """Largest factor; None becomes 1.25 * scale (table 4)."""
    start_tokens: tuple[int, ...] = START_TOKENS
    """Choices for n_hat, ascending; `(0,)` leaves start tokens out of the search."""
    floor_dimension: int | None = None
    """First dimension whose factors are at least `scale`; None leaves all of them free. A dimension
    that completes no period in the trained window meets unseen angles under a smaller factor, which
    perplexity hardly sees and retrieval does (LongRoPE2, section 3.1)."""
    step: ClassVar[float] = 0.01
    """Grid distance of the factors (table 4)."""
    upper_ratio: ClassVar[float] = 1.25
    """Default of `upper` in units of `scale`."""

    def __post_init__(self) -> None:
        if self.upper is None:
            object.__setattr__(self, "upper", self.upper_ratio * self.scale)
        check_positive("upper", self.upper)
        if self.max_step < 1:
            raise LongRopeError(
                f"upper is {self.upper!r}; it must be at least 1 + step = {1 + self.step!r}"
            )
        if self.floor_dimension is not None:
            self._check_dimension("floor_dimension", self.floor_dimension)
            if self.lowest(self.floor_dimension) > self.max_step:
                raise LongRopeError(
                    f"upper is {self.upper!r}, below the extension ratio {self.scale!r} (on the "
                    f"grid) that factors from dimension {self.floor_dimension} on must reach; "
                    "raise upper"
                )
        for index, value in enumerate(self.start_tokens):
            check_int(f"start_tokens[{index}]", value, 0)

    def _check_dimension(self, name: str, value: int) -> None:
        if not 0 <= value < self.num_factors:
            raise LongRopeError(
                f"{name} is {value}; it must be below rotary_dim / 2 = {self.num_factors} and not "
                "negative"
            )

    @property
    def lower(self) -> float:
        """Smallest factor of a gene."""
        return 1.0

    @property
    def min_step(self) -> int:
        """Smallest k_i: the first grid point that is not below `lower`."""
        return math.ceil((self.lower - 1.0) / self.step - 1e-6)

    @property
    def max_step(self) -> int:
        """Largest k_i: the last grid point that does not exceed `upper`."""
        # 1e-6 of a step absorbs the rounding of (upper - 1) / step.
        return math.floor((self.upper - 1.0) / self.step + 1e-6)

    def lowest(self, gene: int) -> int:
        """Smallest k of one factor; it never falls with the dimension."""
        if self.floor_dimension is None or gene < self.floor_dimension:
            return self.min_step
        return math.ceil((self.scale - 1.0) / self.step - 1e-6)

    @property
    def num_choices(self) -> int:
        """Number of values of a candidate's `start_index`."""
        return len(self.start_tokens)

    @property
    def size(self) -> int:
        """Number of candidates, C(K + d, d) monotonic vectors; fewer under a floor."""
        vectors = math.comb(self.max_step + self.num_factors, self.num_factors)
        return vectors * len(self.start_tokens)

    def first_gene(self, start_index: int) -> int:
        """Index of the first factor that is a gene; those before it follow from the genes."""
        return 0

    def canonical(self, candidate: Candidate) -> Candidate:
        """The one representative of candidates whose genes mean the same: here itself."""
        return candidate

    def encode(self, rescale_factors: Sequence[float], num_start_tokens: int = 0) -> Candidate:
        """Nearest candidate: factors rounded to the grid, clipped (under a floor also from below),
        then made non-decreasing.

        A running maximum removes decreases (published factors hold a few, of one step). Of
        `start_tokens`, the choice closest to `num_start_tokens` is taken, the smaller one on a tie.
        """
        steps = self._nearest_steps(rescale_factors)
        distances = [abs(choice - num_start_tokens) for choice in self.start_tokens]
        return Candidate(tuple(accumulate(steps, max)), distances.index(min(distances)))

    def decode(self, candidate: Candidate) -> tuple[tuple[float, ...], int]:
        """Rescale factors and num_start_tokens of a candidate, without floating-point dust."""
        factors = tuple(self._factor(k) for k in candidate.steps)
        return factors, self.start_tokens[candidate.start_index]

    def _factor(self, k: int) -> float:
        return round(1.0 + k * self.step, 10)

    def _nearest_steps(self, rescale_factors: Sequence[float]) -> list[int]:
        """Every factor rounded to the grid and clipped."""
        steps = []
        for index, value in enumerate(rescale_factors):
            nearest = round((float(value) - 1.0) / self.step)
            steps.append(min(max(nearest, self.lowest(index)), self.max_step))
        return steps

    # What continuous search needs: the genes that count, and the way back to the grid.

    def genes(self, candidate: Candidate) -> range:
        """Indices of the factors that may be changed one by one."""
        return range(self.first_gene(candidate.start_index), self.num_factors)

    def with_factors(
        self, candidate: Candidate, genes: Sequence[int], factors: Sequence[float]
    ) -> Candidate:
        """`candidate` with other factors at `genes`, all of those that count, on the grid."""
        return replace(self.encode(factors), start_index=candidate.start_index)

    def choices(self, candidate: Candidate) -> list[Candidate]:
        """`candidate` under every start-token count."""
        return [replace(candidate, start_index=index) for index in range(len(self.start_tokens))]
