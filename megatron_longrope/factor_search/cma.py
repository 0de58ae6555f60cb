"""CMA-ES on the logarithms of the rescale factors.

The search has four parts, each a generation or more:

1. the seeds (PI, NTK, YaRN, ...);
2. start tokens, by successive halving on the best seed's factors: every choice is scored on one
   sample, the better half on two, and so on, so that most choices cost one sample each;
3. CMA-ES (Hansen's `cma` package) around the best candidate, on what its factors are multiplied by,
   started again from the best whenever it has not found a better one for a while, and once from
   the second best seed if nothing around the best one is better. Of its draws only those are scored
   that a regression on the known scores finds most promising;
4. start tokens again, now on the factors found, and a coordinate polish: single factors up and
   down, improvements joined, the step halved when there are none. What is then left of the budget
   goes to another CMA-ES around the best.

Neighbouring dimensions rotate at similar speeds, so that good factors vary smoothly around a good
seed. CMA-ES therefore starts from a smooth prior: its coordinates are the leading eigenvectors of a
squared-exponential covariance over the dimension index, which cuts 64 factors to 9 or 10
numbers; the polish then frees every factor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_longrope.config_rules import check_int, check_positive
from megatron_longrope.factor_search.coordinates import Coordinates, moved_candidate
from megatron_longrope.factor_search.generations import Generation, GenerationalSearch
from megatron_longrope.factor_search.space import Candidate, SearchSpace
from megatron_longrope.factor_search.surrogate import Surrogate

if TYPE_CHECKING:
    import cma

_STALE = 10  # generations of known candidates in a row: CMA-ES has converged on the grid
POLISH_SHARE = 0.25  # of the budget, kept for the coordinate polish
POLISH_STEP = 0.04  # the first, of the logarithm of a factor
_POLISH_STEPS = 5  # each half the one before
_MOVES = 16  # of a round of the polish, the most promising ones
_DRAWN = 5  # candidates drawn for each that is scored
_KNOWN = 24  # scores below which nothing is guessed from them
_PATIENCE = 5  # generations without a better candidate, after which CMA-ES starts again
_FRUITLESS = 2  # the same, from a seed that it has not left yet, while another one is left to try


@dataclass(frozen=True)
class CmaParameters:
    """Sizes of the search."""

    max_evaluations: int = 336
    """Budget, in evaluations of all samples: a quarter of the evolution's 1,344. An evaluation of
    fewer samples, in successive halving, counts as its share."""
    population_size: int | None = None
    """Candidates of a CMA-ES generation; None is the package's 4 + 3 ln n, 10 here. Give a multiple
    of the number of replicas, or a lookahead, to keep many of them busy."""
    initial_deviation: float = 0.1
    """Of the logarithm of the factors, relative to that of the largest factor of the best seed."""
    num_samples: int = 5
    """Samples of a full evaluation, which bound the rounds of successive halving."""

    def __post_init__(self) -> None:
        check_int("max_evaluations", self.max_evaluations, 1)
        check_int("num_samples", self.num_samples, 1)
        if self.population_size is not None:
            check_int("population_size", self.population_size, 4)
        check_positive("initial_deviation", self.initial_deviation)


class CmaSearch(GenerationalSearch):
    """CMA-ES with start tokens by successive halving and a coordinate polish.

    Args:
        space (SearchSpace): Bounds and grid.
        parameters (CmaParameters): Sizes of the search.
        seeds (Sequence[Candidate]): Starting points; the best of them is where it starts.
        rng_seed (int): Seed of every random choice.
        shared: See :class:`GenerationalSearch`; `max_evaluations` is one of the parameters here. A
            lookahead applies to the generations of CMA-ES.
    """

    def __init__(
        self,
        space: SearchSpace,
        parameters: CmaParameters,
        seeds: Sequence[Candidate],
        rng_seed: int,
        **shared: Any,
    ) -> None:
        super().__init__(space, **shared)
        check_int("rng_seed", rng_seed, 0)
        self._seeds = list(dict.fromkeys(seeds))
        self.parameters = parameters
        self._rng = np.random.default_rng(rng_seed)
        self._left = parameters.max_evaluations * parameters.num_samples  # sample-forwards
        self._paid: dict[Candidate, int] = {}  # samples of each candidate, asked for so far
        self._synchronous = True
        self._runner_up: Candidate | None = None  # second best seed, until it was started from
        self._parts = self._program()
        self._advance()

    def total_samples(self, num_samples: int) -> int:
        """Upper bound of the sample-forwards of the whole search."""
        return num_samples * min(self.parameters.max_evaluations, self.space.size)

    # Generations

    def _known(self, number: int) -> int:
        # Only CMA-ES itself can go on without the latest scores; every other part starts from them.
        return number if self._synchronous else super()._known(number)

    def _draw(self, number: int) -> Generation | None:
        return next(self._parts, None)

    def _affordable(
        self, candidates: Iterable[Candidate], samples: int | None = None
    ) -> Generation | None:
        """A generation of the first candidates that the budget is enough for."""
        chosen = []
        for candidate in candidates:
            if (price := self._price(candidate, samples)) > self._left:
                break
            self._left -= price
            self._paid[candidate] = self._paid.get(candidate, 0) + price
            chosen.append(candidate)
        return self._generation(chosen, samples=samples)

    def _price(self, candidate: Candidate, samples: int | None) -> int:
        """Sample-forwards of a trial; what an earlier one has scored is not scored again."""
        wanted = samples or self.parameters.num_samples
        return max(0, wanted - self._paid.get(candidate, 0))

    def _ask(self, candidates: Iterable[Candidate]) -> Iterator[Generation]:
        """One generation of those among `candidates` that have not been asked for."""
        new = [item for item in dict.fromkeys(candidates) if item not in self._asked]
        generation = self._affordable(new)
        if generation is not None:
            yield generation

    def _program(self) -> Iterator[Generation]:
        """All generations, in order; each `yield` returns when the next one may be drawn."""
        yield from self._ask(self._seeds)
        if len(ranked := self._ranked()) > 1 and math.isfinite(ranked[1][1]):
            self._runner_up = ranked[1][0]
        yield from self._halve_start_tokens()
        while self._left:
            before = self._left
            yield from self._run_cma()
            yield from self._halve_start_tokens()
            yield from self._polish()
            if self._left == before:
                return  # nothing new is within reach

    # Start tokens

    def _halve_start_tokens(self) -> Iterator[Generation]:
        """Successive halving over the second gene, on the best candidate's factors."""
        best = self.best[0]
        choices = self.space.choices(best)
        samples = 1
        while len(choices) > 1 and samples < self.parameters.num_samples:
            if sum(self._price(item, samples) for item in choices) > self._left:
                return  # half a round tells nothing
            generation = self._affordable(choices, samples)
            yield generation
            kept = sorted(choices, key=lambda item: (generation.scores[item], choices.index(item)))
            choices = kept[: (len(kept) + 1) // 2]
            samples *= 2
        yield from self._ask(choices)

    # CMA-ES

    def _run_cma(self) -> Iterator[Generation]:
        """CMA-ES until its part of the budget is used up, from the best candidate again and again.

        A selection that ignores all parents can lead away from a good start; a new attempt from the
        best candidate, with half the step, then costs less than finding the way back. A seed may be
        so sharp an optimum that every draw around it is worse: the second best one is then tried
        before the step is halved.
        """
        reserve = int(POLISH_SHARE * self._left)
        deviation, start = self.parameters.initial_deviation, self.best[0]
        while self._left > reserve:
            before = self._left
            improved = yield from self._descend(start, deviation, reserve)
            other, self._runner_up = self._runner_up, None
            if self._left == before and other is None:
                return
            if improved or other is None:
                start, deviation = self.best[0], deviation if improved else deviation / 2
            else:
                start = other

    def _descend(
        self, start: Candidate, deviation: float, reserve: int
    ) -> Generator[Generation, None, bool]:
        """One attempt of CMA-ES.

        Args:
            start (Candidate): Where it begins.
            deviation (float): Initial one.
            reserve (int): Sample-forwards to leave.

        Returns:
            bool: Whether it has found a better candidate than its start.
        """
        import cma  # with matplotlib and scipy.stats, seconds that only the rank that draws needs

        coordinates = Coordinates(self.space, start)
        strategy = self._strategy(coordinates.size, deviation)
        waiting: list[tuple[list[np.ndarray], list[Candidate]]] = []
        best, unimproved, stale = start, 0, 0
        self._synchronous = False
        while self._left > reserve and stale < _STALE:
            if unimproved >= (_FRUITLESS if best == start and self._runner_up else _PATIENCE):
                break
            if max(strategy.stds) * coordinates.widest < self.space.step / 2:
                break  # below the grid
            points, candidates = self._promising(strategy, coordinates)
            waiting.append((points, candidates))
            before = self._left
            yield from self._ask(candidates)
            stale = stale + 1 if self._left == before else 0
            if stale:  # nothing to wait for, hence wait for what is on its way
                yield from self._barrier()
            while len(waiting) > (0 if stale else self.lookahead):
                points, candidates = waiting.pop(0)
                if any(item not in self._asked for item in candidates):
                    break  # the budget cut the generation
                with warnings.catch_warnings():
                    # With a lookahead, points come from an earlier distribution than the latest.
                    warnings.simplefilter("ignore", cma.evolution_strategy.InjectionWarning)
                    strategy.tell(points, self._fitness(candidates))
                leader = min(candidates, key=lambda item: self._scores[item])
                better = self._scores[leader] < self._scores[best]
                best, unimproved = (leader, 0) if better else (best, unimproved + 1)
                if waiting:
                    strategy.ask()  # the package wants one before each tell; they go unused
        yield from self._barrier()
        self._synchronous = True
        return best != start

    def _barrier(self) -> Iterator[Generation]:
        """Wait for every trial: an empty generation that knows all the others."""
        before, self._synchronous = self._synchronous, True
        yield Generation(())
        self._synchronous = before

    def _strategy(self, size: int, deviation: float) -> cma.CMAEvolutionStrategy:
        import cma

        options = {
            "verbose": -9,
            "seed": math.nan,  # our generator draws; numpy's global state stays untouched
            "randn": lambda *shape: self._rng.standard_normal(shape),
        }
        if self.parameters.population_size is not None:
            options["popsize"] = self.parameters.population_size
        return cma.CMAEvolutionStrategy(np.zeros(size), deviation, options)

    def _promising(
        self, strategy: cma.CMAEvolutionStrategy, coordinates: Coordinates
    ) -> tuple[list[np.ndarray], list[Candidate]]:
        """The most promising of many draws: points and candidates of one generation."""
        model = self._surrogate(coordinates.start)
        if model is None:
            points = strategy.ask()
            return points, [coordinates.candidate(point) for point in points]
        points = strategy.ask(_DRAWN * strategy.popsize)
        candidates = [coordinates.candidate(point) for point in points]
        expected = model.predict(np.stack([self._logs(item) for item in candidates]))
        chosen = np.argsort(expected, kind="stable")[: strategy.popsize]
        return [points[i] for i in chosen], [candidates[i] for i in chosen]

    def _surrogate(self, start: Candidate) -> Surrogate | None:
        """Fitted to what the next generation may know; None while that is too little."""
        known = [
            (self._logs(item), math.log(score))
            for item, score in self._ranked(self._known(len(self._generations)))
            if math.isfinite(score) and item.start_index == start.start_index
        ]
        if len(known) < _KNOWN:
            return None
        points, losses = zip(*known, strict=True)
        return Surrogate(np.stack(points), np.asarray(losses))

    def _logs(self, candidate: Candidate) -> np.ndarray:
        """Logarithms of all factors, `[rotary_dim / 2]`."""
        return np.log(np.asarray(self.space.decode(candidate)[0]))

    def _fitness(self, candidates: Sequence[Candidate]) -> list[float]:
        """Mean losses; failures are worse than the others of their generation."""
        scores = [self._scores[item] for item in candidates]
        losses = [math.log(value) for value in scores if math.isfinite(value)]
        failed = max(losses, default=0.0) + 1.0
        return [math.log(value) if math.isfinite(value) else failed for value in scores]

    # Polish

    def _polish(self) -> Iterator[Generation]:
        """Single factors of the best candidate up and down, improvements joined."""
        step = POLISH_STEP
        for _ in range(_POLISH_STEPS):
            improved = True
            while improved and self._left:
                best, score = self.best
                genes = self._rng.permutation(np.asarray(self.space.genes(best))).tolist()
                moves = [(gene, sign * step) for gene in genes for sign in (1, -1)]
                moved = {move: moved_candidate(self.space, best, [move]) for move in moves}
                moved = self._promising_moves(moved, best)
                yield from self._ask(moved.values())
                gains = {
                    move: self._scores[item]
                    for move, item in moved.items()
                    if self._scores.get(item, math.inf) < score
                }
                order = sorted(gains, key=lambda move: gains[move])
                parts = [order[: math.ceil(len(order) / divisor)] for divisor in (1, 2, 4)]
                joined = [moved_candidate(self.space, best, part) for part in parts]
                yield from self._ask(joined)
                improved = self.best[0] != best
            step /= 2

    def _promising_moves(self, moved: dict, best: Candidate) -> dict:
        """The moves that are worth their evaluation."""
        new = {move: item for move, item in moved.items() if item not in self._asked}
        model = self._surrogate(best)
        if model is None or len(new) <= _MOVES:
            return new
        expected = model.predict(np.stack([self._logs(item) for item in new.values()]))
        order = np.argsort(expected, kind="stable")[:_MOVES]
        return {move: new[move] for move in (list(new)[i] for i in order)}
