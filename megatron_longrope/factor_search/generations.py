"""What every search algorithm shares: generations of trials, asked for and told.

The caller owns the loop, so that trials can be scored on any number of ranks, in any order:

    while trials := search.trials():
        search.tell(trials[0].candidate, objective(*search.space.decode(trials[0].candidate)))
    candidate, score = search.best

The trajectory is a pure function of the seed and the scores told: telling the records of a journal,
in any order, restores the search exactly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_longrope.config_rules import check_int
from megatron_longrope.factor_search.space import Candidate, SearchSpace

WORTHWHILE = 0.001
"""Share by which the best score must fall to count as better to a search with patience."""


@dataclass(frozen=True)
class Trial:
    """One request for a score."""

    index: int
    """Order of asking, from 0, of references below; the same whatever the order of the scores."""
    candidate: Candidate
    """What to score."""
    samples: int | None = None
    """How many samples the score covers, from the first one; None for all of them."""
    incumbent: Candidate | None = None
    """A candidate, scored on all samples, that this one must beat to matter; scoring may stop as
    soon as it cannot. None, as always in CMA-ES: its score is needed whatever it is."""


@dataclass
class Generation:
    """Trials that are asked for together, of different candidates."""

    trials: tuple[Trial, ...]
    """In order of asking."""
    scores: dict[Candidate, float] = field(default_factory=dict)
    """Told so far."""

    @property
    def complete(self) -> bool:
        """Whether every trial has its score."""
        return len(self.scores) == len(self.trials)

    @property
    def waiting(self) -> list[Trial]:
        """Trials without a score, in order of asking."""
        return [trial for trial in self.trials if trial.candidate not in self.scores]


class GenerationalSearch(ABC):
    """Trials and their scores over generations; a subclass says what the next generation is.

    Args:
        space (SearchSpace): Bounds and grid.
        max_evaluations (int, optional): Stop after so many trials. The last generation is cut
            short, so a search with a larger cap continues the same trajectory.
        lookahead (int): Generations that may be drawn before an earlier one is complete, so that
            no replica waits for the slowest one at the end of a generation. Generation g then
            descends from the scores of generations up to g - 1 - lookahead, however many of the
            later ones have arrived: the trajectory depends on the setting, never on the timing.
            Defaults to 0.
        patience (int, optional): Draw no further generation when so many evaluations in a row have
            not lowered the best score by more than 0.1 %.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        max_evaluations: int | None = None,
        lookahead: int = 0,
        patience: int | None = None,
    ) -> None:
        if max_evaluations is not None:
            check_int("max_evaluations", max_evaluations, 1)
        if patience is not None:
            check_int("patience", patience, 1)
        check_int("lookahead", lookahead, 0)
        self.space = space
        self.lookahead = lookahead
        self._max_evaluations, self._patience = max_evaluations, patience
        self._generations: list[Generation] = []
        self._num_asked = 0
        self._asked: dict[Candidate, int] = {}  # in full, -> index of the trial
        self._scores: dict[Candidate, float] = {}  # of candidates asked for in full

    @property
    def has_patience(self) -> bool:
        """Return whether it may end before its budget does."""
        return self._patience is not None

    # What a subclass knows.

    @abstractmethod
    def _draw(self, number: int) -> Generation | None:
        """Generation `number`, through `_generation`; None when the search is over.

        Called once for every number, in order, when the generations that it may know are complete.
        """

    @abstractmethod
    def total_samples(self, num_samples: int) -> int:
        """Upper bound of the sample-forwards of the whole search.

        Args:
            num_samples (int): Samples of a full evaluation.
        """

    # What the caller sees.

    @property
    def best(self) -> tuple[Candidate, float]:
        """The best candidate told so far and its score (infinite when every evaluation failed).

        Raises:
            RuntimeError: Nothing has been told yet.
        """
        if not self._scores:
            raise RuntimeError("no candidate has a score yet; tell the scores of trials() first")
        return self._ranked()[0]

    def trials(self) -> list[Trial]:
        """The trials of the generations in progress that have no score yet, in order of asking;
        empty when done."""
        return [trial for generation in self._generations for trial in generation.waiting]

    def tell(self, candidate: Candidate, score: float) -> None:
        """Record the score of one of the trials, lower is better; NaN and infinity rank last.

        The order of telling within a generation does not matter: the next generation is drawn when
        the last score has arrived. A candidate whose scoring was stopped is told with a score that
        its incumbent beats.
        """
        generation, trial = next(
            (generation, trial)
            for generation in self._generations
            if candidate not in generation.scores
            for trial in generation.trials
            if trial.candidate == candidate
        )
        generation.scores[candidate] = float(score) if math.isfinite(score) else math.inf
        if trial.samples is None:
            self._scores[candidate] = generation.scores[candidate]
        self._advance()

    # What subclasses use.

    def _generation(
        self,
        candidates: Iterable[Candidate],
        *,
        samples: int | None = None,
        incumbent: Candidate | None = None,
    ) -> Generation | None:
        """A generation of `candidates`, cut to the budget; None when nothing is left of it."""
        chosen = list(candidates)
        if self._max_evaluations is not None:
            chosen = chosen[: self._max_evaluations - self._num_asked]
        if not chosen:
            return None
        trials = tuple(
            Trial(index, candidate, samples, incumbent)
            for index, candidate in enumerate(chosen, start=self._num_asked)
        )
        self._num_asked += len(trials)
        if samples is None:
            for trial in trials:
                self._asked.setdefault(trial.candidate, trial.index)
        return Generation(trials)

    def _known(self, number: int) -> int:
        """How many generations, from the first, generation `number` may know the scores of."""
        return max(min(number, 1), number - self.lookahead)

    def _ranked(self, generations: int | None = None) -> list[tuple[Candidate, float]]:
        """Candidates with a full score, best first; equal scores in the order of asking.

        Args:
            generations (int, optional): Only the first so many. Defaults to all.
        """
        scores = self._scores
        if generations is not None and generations < len(self._generations):
            scores = {
                trial.candidate: generation.scores[trial.candidate]
                for generation in self._generations[:generations]
                for trial in generation.trials
                if trial.samples is None and trial.candidate in generation.scores
            }
        return sorted(scores.items(), key=lambda item: (item[1], self._asked[item[0]]))

    def _advance(self) -> None:
        """Draw every generation that can be drawn now."""
        while True:
            number = len(self._generations)
            known = self._generations[: self._known(number)]
            if not all(generation.complete for generation in known) or self._is_stale(known):
                return
            generation = self._draw(number)
            if generation is None:
                return
            self._generations.append(generation)

    def _is_stale(self, generations: Sequence[Generation]) -> bool:
        """Whether patience has run out, by complete generations in the order of asking."""
        best, unimproved = math.inf, 0
        for generation in generations if self._patience else ():
            for trial in generation.trials:
                if trial.samples is not None:
                    continue
                score = generation.scores[trial.candidate]
                better = score < best * (1 - WORTHWHILE) or best == math.inf > score
                best, unimproved = (score, 0) if better else (best, unimproved + 1)
        return self._patience is not None and unimproved >= self._patience
