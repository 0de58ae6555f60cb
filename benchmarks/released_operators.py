"""The search operators of the released LongRoPE code, re-implemented to be compared with.

Written from a description of their behaviour, on the integer grid of this package. They differ from
algorithm 1 of the paper (arXiv 2402.13753) in this:

- One starting point, YaRN's ramp mixed into the factors instead of the inverse frequencies; no PI,
  no NTK, no start tokens. The rest of the population are mutations of it.
- A mutation sweeps over the genes until the vector is monotone and new, and a sweep that fails is
  not undone: changes accumulate. Where many genes are equal that takes dozens of sweeps, and nearly
  every gene ends up redrawn instead of 30 % of them.
- An inner gene is drawn from its left neighbour up to a step above its right one, the first never
  reaches its right neighbour, the last goes up to 1 + s.
- A crossover takes over one gene after the other and returns at the first state that is monotone
  and new, usually a single-gene swap; failing that, parent 1 is mutated instead.

Sizes (64 + 40 x (16 + 16), top 32) are the paper's. The one thing added is a bound on the sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from itertools import pairwise

import numpy as np

from megatron_longrope.config_rules import check_int
from megatron_longrope.factor_search.evolution import EvolutionParameters
from megatron_longrope.factor_search.generations import Generation, GenerationalSearch
from megatron_longrope.factor_search.operators import unique
from megatron_longrope.factor_search.space import Candidate, SearchSpace
from megatron_longrope.methods import yarn_factors

MAX_SWEEPS = 2000
"""Sweeps of one mutation before it is ended; the released loop has no bound."""

_MAX_CROSSOVER_TRIES = 20
_SWAP_PROB = 0.5  # of a gene that a crossover looks at

Steps = tuple[int, ...]


def released_space(num_factors: int, scale: float) -> SearchSpace:
    """Factors up to 1 + s, no start tokens."""
    return SearchSpace(num_factors, scale, upper=1.0 + scale, start_tokens=(0,))


def released_seed(
    space: SearchSpace, rotary_base: float, original_max_position_embeddings: int
) -> Candidate:
    """The one starting point: lambda = (1 - ramp) + ramp s, linear where YaRN is harmonic."""
    scale = space.scale
    yarn = yarn_factors(2 * space.num_factors, scale, rotary_base, original_max_position_embeddings)
    # YaRN has 1 / lambda = ramp / s + (1 - ramp); solved for the ramp.
    ramps = [(1.0 - 1.0 / factor) / (1.0 - 1.0 / scale) for factor in yarn]
    return space.encode([1.0 + ramp * (scale - 1.0) for ramp in ramps])


def accumulating_mutation(
    steps: Steps, space: SearchSpace, rng: np.random.Generator, prob: float, seen: Set[Steps]
) -> tuple[Steps, int]:
    """Sweep until the vector is monotone and not in `seen`.

    Returns:
        tuple: The vector and the number of sweeps. After `MAX_SWEEPS` it is whatever was reached,
        monotone or not.
    """
    current = list(steps)
    for sweeps in range(MAX_SWEEPS):
        if is_monotone(current) and tuple(current) not in seen:
            return tuple(current), sweeps
        chances, draws = rng.random((2, len(current))).tolist()
        for gene, (chance, draw) in enumerate(zip(chances, draws, strict=True)):
            if chance < prob:
                low, count = _choices(current, gene, space)
                if count > 0:
                    current[gene] = low + int(draw * count)
    return tuple(current), MAX_SWEEPS


def first_novel_crossover(
    first: Steps, second: Steps, rng: np.random.Generator, prob: float, seen: Set[Steps]
) -> Steps | None:
    """Genes of `second` move into `first` until the state is monotone and not in `seen`.

    Returns:
        tuple | None: None for equal parents, or when 20 tries, each going on from where the last
        one ended, found nothing.
    """
    if first == second:
        return None
    current = list(first)
    for _ in range(_MAX_CROSSOVER_TRIES):
        for gene, value in enumerate(second):
            if rng.random() >= prob:
                continue
            if rng.random() < _SWAP_PROB:
                current[gene] = value
            if is_monotone(current) and tuple(current) not in seen:
                return tuple(current)
    return None


def is_monotone(steps: Sequence[int]) -> bool:
    """Whether no value is below its predecessor."""
    return all(a <= b for a, b in pairwise(steps))


def _choices(steps: Sequence[int], gene: int, space: SearchSpace) -> tuple[int, int]:
    """Lowest step that a gene may be redrawn to, and how many there are from it on."""
    if gene == len(steps) - 1:
        low = steps[gene - 1] if gene else 0
        return low, space.max_step - low + 1
    if gene == 0:
        return 0, steps[1]
    # The released range ends before one step above the right neighbour, but in floating point: the
    # end is included whenever rounding makes the range a little longer, which is what breaks the
    # order of genes that are equal.
    low, high = (1.0 + steps[index] * space.step for index in (gene - 1, gene + 1))
    count = math.ceil((high + space.step - low) / space.step)
    return steps[gene - 1], min(count, space.max_step - steps[gene - 1] + 1)


class ReleasedSearch(GenerationalSearch):
    """The released search with ask and tell.

    Args:
        space (SearchSpace): From :func:`released_space`.
        parameters (EvolutionParameters): Sizes of the search; the release has the paper's.
        seeds (Sequence[Candidate]): The release has one, :func:`released_seed`. Mutations of the
            first one fill the initial population.
        rng_seed (int): Seed of every random choice.
        max_evaluations (int, optional): Stop after so many evaluations.
    """

    def __init__(
        self,
        space: SearchSpace,
        parameters: EvolutionParameters,
        seeds: Sequence[Candidate],
        rng_seed: int,
        max_evaluations: int | None = None,
    ) -> None:
        super().__init__(space, max_evaluations=max_evaluations)
        check_int("rng_seed", rng_seed, 0)
        self._seeds = list(dict.fromkeys(seeds))
        self.parameters = parameters
        self.num_capped = 0
        """Mutations that were ended at `MAX_SWEEPS` and repaired; 0 says that nothing was added."""
        self._rng = np.random.default_rng(rng_seed)
        self._seen: set[Steps] = set()
        self._advance()

    @property
    def total_evaluations(self) -> int:
        """Upper bound of the number of evaluations of the whole search."""
        planned = min(self.parameters.total_evaluations, self.space.size)
        return min(planned, self._max_evaluations or planned)

    def total_samples(self, num_samples: int) -> int:
        """Upper bound of its sample-forwards; every evaluation is a full one."""
        return self.total_evaluations * num_samples

    def _draw(self, number: int) -> Generation | None:
        sizes = self.parameters
        children = []
        if number == 0:
            children = [self._keep(seed.steps) for seed in self._seeds]
            while len(children) < sizes.population_size:
                children.append(self._mutated(self._seeds[0].steps))
        elif number <= sizes.max_iterations:
            ranked = self._ranked(self._known(number))[: sizes.num_parents]
            parents = [candidate.steps for candidate, _ in ranked]
            for _ in range(sizes.num_mutations):
                children.append(self._mutated(parents[self._rng.integers(len(parents))]))
            for _ in range(sizes.num_crossovers):
                children.append(self._crossed(parents))
        return self._generation(child for child in children if child is not None)

    def _crossed(self, parents: Sequence[Steps]) -> Candidate | None:
        # The better of the two is parent 1.
        first, second = sorted(self._rng.choice(len(parents), 2, replace=len(parents) < 2))
        child = first_novel_crossover(
            parents[first],
            parents[second],
            self._rng,
            self.parameters.mutation_prob,
            self._seen,
        )
        return self._mutated(parents[first]) if child is None else self._keep(child)

    def _mutated(self, parent: Steps) -> Candidate | None:
        """A mutation; None when the space has nothing new."""
        child, sweeps = accumulating_mutation(
            parent, self.space, self._rng, self.parameters.mutation_prob, self._seen
        )
        if sweeps < MAX_SWEEPS:
            return self._keep(child)
        self.num_capped += 1
        seen = {Candidate(steps) for steps in self._seen}
        repaired = unique(Candidate(tuple(np.maximum.accumulate(child).tolist())), self.space,
                          self._rng, seen)  # fmt: skip
        return repaired and self._keep(repaired.steps)

    def _keep(self, steps: Steps) -> Candidate:
        self._seen.add(steps)
        return Candidate(steps)
