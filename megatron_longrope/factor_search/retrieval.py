"""Whether the winner of a search still finds what stands far back, and what is written if not.

Perplexity is an average over tokens that hardly need the long window: factors can lower it and lose
retrieval at the same time. So the references and the winner are asked for hidden numbers at the
target length, and a winner that finds fewer of them than the best reference is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.factor_search.journal import best_scores
from megatron_longrope.factor_search.needle import NeedleSamples
from megatron_longrope.factor_search.problem import SearchProblem
from megatron_longrope.factor_search.runner import SearchOutcome
from megatron_longrope.factor_search.space import Candidate, GivenFactors
from megatron_longrope.progress import Progress

if TYPE_CHECKING:
    from megatron_longrope.factor_search.replicas import Replica

# Three answers are few: among equal numbers of right ones a clearly higher loss is worse, too.
_TOLERANCE = 0.2  # nats per token of an answer


@dataclass(frozen=True)
class Retrieval:
    """Answers of a model under one set of factors."""

    loss: float
    """Mean loss of the answers' tokens, in nats."""
    correct: int
    """Answers whose every token is the greedy choice."""
    trials: int
    """Numbers asked for."""

    def is_worse_than(self, other: Retrieval) -> bool:
        """Whether fewer answers are right, or as many at a clearly higher loss."""
        if self.correct != other.correct:
            return self.correct < other.correct
        return not self.loss <= other.loss + _TOLERANCE

    def __str__(self) -> str:
        return f"{self.correct} of {self.trials} answers (loss {self.loss:.3g})"


def measure_retrieval(model: Replica, samples: NeedleSamples, config: LongRopeConfig) -> Retrieval:
    """Ask for each sample's number, one forward pass each."""
    model.set_config(config)
    losses, correct = [], 0
    for row, scored in zip(samples.tokens, samples.scored, strict=True):
        count = int(scored.sum())
        found = model.answer(row[None], count)
        losses.append(math.fsum(found.nll) / count)
        correct += found.predicted[:count] == row[-count:].tolist()
    return Retrieval(math.fsum(losses) / len(losses), correct, len(losses))


def check_retrieval(
    model: Replica,
    samples: NeedleSamples,
    problem: SearchProblem,
    outcome: SearchOutcome,
    *,
    accept_worse: bool = False,
) -> RetrievalVerdict:
    """Do :func:`choose_by_retrieval` on a model, and show the progress."""
    trials = len(samples.tokens)
    # At most: references, winner, and those that may stand in its place.
    candidates = len(problem.references) + 2 + int(math.log2(len(outcome.records) or 1))
    with Progress(candidates * trials, "retrieval", "answers") as progress:

        def measure(config: LongRopeConfig) -> Retrieval:
            found = measure_retrieval(model, samples, config)
            progress.update(str(found), trials)
            return found

        verdict = choose_by_retrieval(problem, outcome, measure, accept_worse=accept_worse)
        progress.finish()
    return verdict


@dataclass(frozen=True)
class RetrievalVerdict:
    """The outcome to write, and why."""

    outcome: SearchOutcome
    """The search's own, or another of its candidates in its place."""
    measured: Mapping[str, Retrieval]
    """Of each reference and, as `longrope`, of the search's own winner."""
    written: Retrieval
    """Of the outcome."""
    reason: str | None
    """Why the outcome is not the search's own, or why it would not be; None if it retrieves."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON for a result's origin."""
        return {
            "references": {name: asdict(item) for name, item in self.measured.items()},
            "written": asdict(self.written),
            "note": self.reason,
        }


def choose_by_retrieval(
    problem: SearchProblem,
    outcome: SearchOutcome,
    measure: Callable[[LongRopeConfig], Retrieval],
    *,
    accept_worse: bool = False,
) -> RetrievalVerdict:
    """Keep the winner if it retrieves as well as the best reference, else find one that does.

    The candidates tried are the 2nd, 3rd, 5th, 9th, ... best: neighbours of a winner mostly share
    its fault. The references end the list; the best of them retrieves as well as itself. Where no
    reference answers anything right, differences are noise and the winner stays.

    Args:
        measure (Callable): Retrieval under a configuration.
        accept_worse (bool): Keep the winner all the same, and say what it loses.
    """
    measured = {name: measure(problem.config(given)) for name, given in problem.references.items()}
    won = measured["longrope"] = measure(problem.config(outcome.candidate))
    names = list(problem.references)
    best_name = min(names, key=lambda name: (-measured[name].correct, measured[name].loss))
    best = measured[best_name]
    if not best.correct or not won.is_worse_than(best):
        return RetrievalVerdict(outcome, measured, won, None)
    reason = f"the best score retrieves worse than {best_name}: {won} against {best}"
    if accept_worse:
        return RetrievalVerdict(outcome, measured, won, f"{reason}; accepted as asked")
    fitting = {
        name: outcome.seed_scores[name]
        for name in names
        if math.isfinite(outcome.seed_scores.get(name, math.inf))
        and not measured[name].is_worse_than(best)
    }
    if not fitting:  # it could not be scored on the search text
        return RetrievalVerdict(outcome, measured, won, f"{reason}, which has no score")
    fallback = min(fitting, key=fitting.__getitem__)
    target = problem.factor_set(outcome.candidate)
    won_given = GivenFactors(target.rescale_factors, target.num_start_tokens)
    ranked = [
        (given, score)
        for given, score in best_scores(outcome.records).items()
        if score < fitting[fallback] and given != won_given
    ]
    place = 1
    while place <= len(ranked):
        given, score = ranked[place - 1]
        found = measure(problem.config(given))
        if not found.is_worse_than(best):
            reason += f"; in its place stands the {place + 1}. best, {found}"
            return RetrievalVerdict(_with(outcome, given, score), measured, found, reason)
        place = 2 * place
    reason += f"; in its place stands {fallback}"
    given, score = problem.references[fallback], fitting[fallback]
    return RetrievalVerdict(_with(outcome, given, score), measured, measured[fallback], reason)


def _with(
    outcome: SearchOutcome, candidate: Candidate | GivenFactors, score: float
) -> SearchOutcome:
    return replace(outcome, candidate=candidate, score=score)
