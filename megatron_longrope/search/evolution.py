"""Evolutionary search of LongRoPE (arXiv 2402.13753, algorithm 1) behind ask and tell.

The caller owns the loop, so candidates can be scored on any number of ranks:

    search = EvolutionSearch(space, EvolutionParameters(), seeds, rng_seed=0)
    while not search.done:
        candidates = search.ask()
        search.tell(candidates, [objective(*space.decode(item)) for item in candidates])
    candidate, score = search.best

The trajectory is a pure function of the seed and the scores told: telling the records of a journal,
one by one or in any grouping, restores the search exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_longrope.search.operators import MUTATION_PROB, crossover, mutate, unique
from megatron_longrope.search.space import Candidate, SearchSpace, check_int


@dataclass(frozen=True)
class EvolutionParameters:
    """Sizes of algorithm 1; the defaults are the paper's for targets up to 256k (section 4.1).

    Raises:
        ValueError: A field breaks its rule; the message names field, value and rule.
    """

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
            raise ValueError(
                f"mutation_prob is {self.mutation_prob!r}; it must be above 0 and at most 1"
            )
        if self.max_iterations and not self.num_mutations + self.num_crossovers:
            raise ValueError(
                f"num_mutations and num_crossovers are both 0, so {self.max_iterations} iterations "
                "would have no children; raise one of them or set max_iterations to 0"
            )

    @property
    def total_evaluations(self) -> int:
        """P + T (N1 + N2): 1,344 for the defaults."""
        return self.population_size + self.max_iterations * (
            self.num_mutations + self.num_crossovers
        )

    def halved(self) -> EvolutionParameters:
        """P, N1 and N2 halved, as in the paper for targets of 512k and above (section 4.1).

        The published values become 32, 8 and 8; odd values round up, T and the top-k stay.
        """
        return replace(
            self,
            population_size=(self.population_size + 1) // 2,
            num_mutations=(self.num_mutations + 1) // 2,
            num_crossovers=(self.num_crossovers + 1) // 2,
        )


class EvolutionSearch:
    """Algorithm 1 with ask and tell; no candidate is ever asked for twice.

    Args:
        space (SearchSpace): Bounds and grid.
        parameters (EvolutionParameters): Sizes of the search.
        seeds (Sequence[Candidate]): Starting points, such as PI, NTK and YaRN. The rest of the
            initial population are mutations of them, in turn.
        rng_seed (int): Seed of every random choice.
        max_evaluations (int, optional): Stop after so many evaluations. The last generation is cut
            short, so a search with a larger cap continues the same trajectory.

    Raises:
        ValueError: No seed, more seeds than the population holds, or a seed outside the space.
    """

    def __init__(
        self,
        space: SearchSpace,
        parameters: EvolutionParameters,
        seeds: Sequence[Candidate],
        rng_seed: int,
        *,
        max_evaluations: int | None = None,
    ) -> None:
        check_int("rng_seed", rng_seed, 0)
        if max_evaluations is not None:
            check_int("max_evaluations", max_evaluations, 1)
        seeds = list(dict.fromkeys(seeds))
        if not seeds:
            raise ValueError("seeds is empty; give at least one starting candidate")
        if len(seeds) > parameters.population_size:
            raise ValueError(
                f"population_size is {parameters.population_size}, below the {len(seeds)} "
                "different seeds; raise it or give fewer seeds"
            )
        for seed in seeds:
            space.check(seed)
        self.space = space
        self.parameters = parameters
        self.iteration = 0
        """Generation in progress: 0 is the initial population, max_iterations the last."""
        self._max_evaluations = max_evaluations
        self._rng = np.random.default_rng(rng_seed)
        self._asked: dict[Candidate, int] = {}  # everything ever asked for -> order of asking
        self._scores: dict[Candidate, float] = {}
        self._generation = self._within_budget(self._initial_population(seeds))

    @property
    def total_evaluations(self) -> int:
        """Upper bound of the number of evaluations of the whole search."""
        bounds = [self.parameters.total_evaluations, self.space.size]
        if self._max_evaluations is not None:
            bounds.append(self._max_evaluations)
        return min(bounds)

    @property
    def num_evaluations(self) -> int:
        """Evaluations told so far."""
        return len(self._scores)

    @property
    def done(self) -> bool:
        """True when nothing is left to evaluate: iterations, budget or space are used up."""
        return not self.ask()

    @property
    def population(self) -> list[tuple[Candidate, float]]:
        """The top-k told so far, best first; equal scores stand in the order of asking."""
        ranked = sorted(self._scores.items(), key=lambda item: (item[1], self._asked[item[0]]))
        return ranked[: self.parameters.num_parents]

    @property
    def best(self) -> tuple[Candidate, float]:
        """The best candidate told so far and its score (infinite when every evaluation failed).

        Raises:
            RuntimeError: Nothing has been told yet.
        """
        if not self._scores:
            raise RuntimeError("no candidate has a score yet; call ask() and tell() first")
        return self.population[0]

    def ask(self) -> list[Candidate]:
        """The candidates of the current generation that have no score yet; empty when done.

        Asking again without telling returns the same candidates.
        """
        return [item for item in self._generation if item not in self._scores]

    def tell(self, candidates: Sequence[Candidate], scores: Sequence[float]) -> None:
        """Record scores, lower is better; NaN and infinite scores rank last.

        The order of telling within a generation, and whether it is told at once or in parts, do not
        matter: the next generation is drawn when the last score has arrived.

        Raises:
            ValueError: Lengths differ, or a candidate is not among those now asked for. Nothing is
                recorded then.
        """
        if len(candidates) != len(scores):
            raise ValueError(f"{len(candidates)} candidates came with {len(scores)} scores")
        waiting = set(self.ask())
        for candidate in candidates:
            if candidate not in waiting:
                known = candidate in self._asked
                raise ValueError(
                    f"candidate {self.space.decode(candidate)} "
                    + ("was told before" if known else "was not asked for")
                    + "; tell each candidate of ask() once (a journal must come from the same "
                    "seed, seeds and settings)"
                )
            waiting.remove(candidate)
        finite = [float(score) if math.isfinite(score) else math.inf for score in scores]
        self._scores.update(zip(candidates, finite, strict=True))
        if candidates and not waiting and self.iteration < self.parameters.max_iterations:
            children = self._within_budget(self._children())
            if children:
                self._generation = children
                self.iteration += 1

    def _initial_population(self, seeds: list[Candidate]) -> list[Candidate]:
        """P_0: the seeds and mutations of each in turn."""
        population = dict.fromkeys(seeds)
        for index in range(self.parameters.population_size - len(seeds)):
            child = self._mutated(seeds[index % len(seeds)])
            child = unique(
                child, self.space, self._rng, population.keys(), self.parameters.mutation_prob
            )
            if child is None:
                break
            population[child] = None
        return list(population)

    def _children(self) -> list[Candidate]:
        """P_mut and P_cro of one iteration; fewer when the space runs out of new candidates."""
        ranked = self.population
        # Failed evaluations are parents only when there is nothing else.
        parents = [item for item, score in ranked if math.isfinite(score)]
        parents = parents or [item for item, _ in ranked]
        seen = set(self._asked)
        children: list[Candidate] = []
        for index in range(self.parameters.num_mutations + self.parameters.num_crossovers):
            first, second = self._rng.choice(len(parents), 2, replace=len(parents) < 2)
            if index < self.parameters.num_mutations:
                child = self._mutated(parents[first])
            else:
                child = crossover(parents[first], parents[second], self.space, self._rng)
            child = unique(child, self.space, self._rng, seen, self.parameters.mutation_prob)
            if child is None:
                break
            seen.add(child)
            children.append(child)
        return children

    def _mutated(self, parent: Candidate) -> Candidate:
        return mutate(parent, self.space, self._rng, self.parameters.mutation_prob)

    def _within_budget(self, generation: list[Candidate]) -> list[Candidate]:
        """Cut the generation to the evaluations left and note what will be asked for."""
        if self._max_evaluations is not None:
            generation = generation[: self._max_evaluations - len(self._asked)]
        for candidate in generation:
            self._asked[candidate] = len(self._asked)
        return generation
