"""Evolutionary search of LongRoPE (arXiv 2402.13753, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_longrope.config_rules import check_int
from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.generations import Generation, GenerationalSearch
from megatron_longrope.factor_search.operators import MUTATION_PROB, crossover, mutate, unique
from megatron_longrope.factor_search.space import Candidate, SearchSpace


@dataclass(frozen=True)
class EvolutionParameters:
    """Sizes of algorithm 1; the defaults are the paper's for targets up to 256k (section 4.1)."""

    population_size: int = 64
    """P: candidates of the initial population, seeds included."""
    num_mutations: int = 16
    """N1: mutated children per iteration."""
    num_crossovers: int = 16
    """N2: crossover children per iteration."""
    mutation_prob: float = MUTATION_PROB
    """p: probability that a gene is redrawn."""
    max_iterations: int = 40
    """T: generations of children after the initial population."""
    num_parents: int = 32
    """Size of the top-k that children descend from."""

    def __post_init__(self) -> None:
        check_int("population_size", self.population_size, 1)
        check_int("num_mutations", self.num_mutations, 0)
        check_int("num_crossovers", self.num_crossovers, 0)
        check_int("max_iterations", self.max_iterations, 0)
        check_int("num_parents", self.num_parents, 1)
        if not isinstance(self.mutation_prob, (int, float)) or not 0 < self.mutation_prob <= 1:
            raise LongRopeError(
                f"mutation_prob is {self.mutation_prob!r}; it must be above 0 and at most 1"
            )
        if self.max_iterations and not self.num_mutations + self.num_crossovers:
            raise LongRopeError(
                f"num_mutations and num_crossovers are both 0, so {self.max_iterations} iterations "
                "would have no children; raise one of them or set max_iterations to 0"
            )

    @property
    def total_evaluations(self) -> int:
        """P + T (N1 + N2): 1,344 for the defaults."""
        return self.population_size + self.max_iterations * (
            self.num_mutations + self.num_crossovers
        )


class EvolutionSearch(GenerationalSearch):
    """Algorithm 1; no candidate is ever asked for twice.

    Args:
        space (SearchSpace): Bounds and grid.
        parameters (EvolutionParameters): Sizes of the search.
        seeds (Sequence[Candidate]): Starting points, such as PI, NTK and YaRN. The rest of the
            initial population are mutations of them, in turn.
        rng_seed (int): Seed of every random choice.
        shared: See :class:`GenerationalSearch`; a lookahead of 0 is the algorithm of the paper.

    Raises:
        LongRopeError: There are more seeds than the population holds.
    """

    def __init__(
        self,
        space: SearchSpace,
        parameters: EvolutionParameters,
        seeds: Sequence[Candidate],
        rng_seed: int,
        **shared: Any,
    ) -> None:
        super().__init__(space, **shared)
        check_int("rng_seed", rng_seed, 0)
        self._seeds = list(dict.fromkeys(seeds))
        if len(self._seeds) > parameters.population_size:
            raise LongRopeError(
                f"population_size is {parameters.population_size}, below the {len(self._seeds)} "
                "different seeds; raise it or give fewer seeds"
            )
        self.parameters = parameters
        self._rng = np.random.default_rng(rng_seed)
        self._advance()

    def total_samples(self, num_samples: int) -> int:
        """Upper bound of the sample-forwards of the whole search."""
        evaluations = min(self.parameters.total_evaluations, self.space.size)
        return num_samples * min(evaluations, self._max_evaluations or evaluations)

    def _draw(self, number: int) -> Generation | None:
        if number == 0:
            return self._generation(self._initial_population())
        if number > self.parameters.max_iterations:
            return None
        survivors = self._ranked(self._known(number))[: self.parameters.num_parents]
        incumbent, score = survivors[-1]
        # Whoever is not better than the last survivor has no children: racing may stop it.
        full = len(survivors) == self.parameters.num_parents and math.isfinite(score)
        return self._generation(self._children(survivors), incumbent=incumbent if full else None)

    def _initial_population(self) -> list[Candidate]:
        """P_0: the seeds and mutations of each in turn."""
        population = dict.fromkeys(self._seeds)
        for index in range(self.parameters.population_size - len(self._seeds)):
            mutated = self._mutated(self._seeds[index % len(self._seeds)])
            child = unique(
                mutated, self.space, self._rng, population.keys(), self.parameters.mutation_prob
            )
            if child is None:
                break
            population[child] = None
        return list(population)

    def _children(self, survivors: Sequence[tuple[Candidate, float]]) -> list[Candidate]:
        """P_mut and P_cro of one iteration; fewer when the space runs out of new candidates."""
        # Failed evaluations are parents only when there is nothing else.
        parents = [item for item, score in survivors if math.isfinite(score)]
        parents = parents or [item for item, _ in survivors]
        seen = set(self._asked)
        children: list[Candidate] = []
        for index in range(self.parameters.num_mutations + self.parameters.num_crossovers):
            first, second = self._rng.choice(len(parents), 2, replace=len(parents) < 2)
            if index < self.parameters.num_mutations:
                bred = self._mutated(parents[first])
            else:
                bred = crossover(parents[first], parents[second], self.space, self._rng)
            child = unique(bred, self.space, self._rng, seen, self.parameters.mutation_prob)
            if child is None:
                break
            seen.add(child)
            children.append(child)
        return children

    def _mutated(self, parent: Candidate) -> Candidate:
        return mutate(parent, self.space, self._rng, self.parameters.mutation_prob)
