"""The attention factor that a search's winner is best with.

A search runs under one attention factor, LongRoPE's formula by default. Its winner may want another
one, and finding it costs a handful of evaluations: one number, one smooth minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from scipy.optimize import minimize_scalar

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.factor_search.generations import Trial
from megatron_longrope.factor_search.objective import PerplexityObjective
from megatron_longrope.factor_search.problem import SearchProblem
from megatron_longrope.factor_search.racing import Race
from megatron_longrope.factor_search.retrieval import Retrieval, RetrievalVerdict
from megatron_longrope.factor_search.scoring import score_trial
from megatron_longrope.factor_search.space import Candidate, GivenFactors

ATTENTION_EVALUATIONS = 8
"""Values that are tried, beside the one that the search ran under."""


@dataclass(frozen=True)
class SettledAttention:
    """A winner's attention factor, and what it costs and brings."""

    problem: SearchProblem
    """What was searched, under the value that is written; the same object where that is the
    search's own."""
    scores: dict[float, float]
    """Of :func:`attention_scores`."""
    gain: float
    """Perplexity under the value that is written, as a share of that under the search's own."""
    verdict: RetrievalVerdict | None
    """Retrieval under the value that is written; None where it was not measured."""
    note: str
    """The above in a sentence."""


def settle_attention(
    problem: SearchProblem,
    winner: Candidate | GivenFactors,
    scores: dict[float, float],
    verdict: RetrievalVerdict | None,
    measure: Callable[[LongRopeConfig], Retrieval],
    *,
    accept_worse: bool = False,
) -> SettledAttention:
    """Take the value with the lowest perplexity, unless the winner retrieves worse under it.

    Worse than under the search's own value, or than the best reference that it was held against.

    Args:
        problem (SearchProblem): What was searched, under the attention factor of the search.
        winner (Candidate | GivenFactors): What is to be written.
        scores (dict[float, float]): Of :func:`attention_scores`.
        verdict (RetrievalVerdict, optional): Retrieval under the search's own value.
        measure (Callable): Retrieval under a configuration; not called without a verdict.
        accept_worse (bool): Take it all the same.
    """
    own, best = next(iter(scores)), min(scores, key=scores.__getitem__)
    if best == own or not math.isfinite(scores[own]):
        note = f"no attention factor is better for the winner than the search's own {own:g}"
        return SettledAttention(problem, scores, 1.0, verdict, note)
    changed = problem.with_attention(best, problem.base.attention_factor_policy)
    note = f"attention factor {best:g}: {scores[best]:.4f}, {own:g} had {scores[own]:.4f}"
    if verdict is not None:
        found = measure(changed.config(winner))
        worse = any(map(found.is_worse_than, (verdict.written, *verdict.passed)))
        if verdict.decides and worse and not accept_worse:
            note += f"; {own:g} stays, as {best:g} retrieves worse: {found}"
            return SettledAttention(problem, scores, 1.0, verdict, note)
        verdict = replace(verdict, written=found)
    return SettledAttention(changed, scores, scores[best] / scores[own], verdict, note)


def attention_scores(
    problem: SearchProblem,
    winner: Candidate | GivenFactors,
    objective: PerplexityObjective,
    own_score: float | None = None,
) -> dict[float, float]:
    """Score a winner under attention factors between none and twice what `su` adds.

    Args:
        problem (SearchProblem): What was searched, under the attention factor of the search.
        winner (Candidate | GivenFactors): What is to be written.
        objective (PerplexityObjective): Windows of text.
        own_score (float, optional): Of the winner on these windows under the search's own value,
            where that is known. Defaults to one evaluation more.

    Returns:
        dict[float, float]: Perplexity by attention factor, the search's own first, towards the best
            value that a bounded minimisation finds.
    """
    target, policy = problem.target_length, problem.base.attention_factor_policy
    own = problem.base.attention_factor_for(target)
    scores = {} if own_score is None else {own: own_score}

    def score(value: float) -> float:
        value = own if abs(value - own) < 5e-5 else round(float(value), 4)
        if value not in scores:
            changed = problem.with_attention(value, policy)
            scores[value] = score_trial(Trial(0, winner), changed, objective, Race("off")).score
        return scores[value]

    score(own)
    lowest, su = (problem.base.attention_factor_by(name, target) for name in ("none", "su"))
    minimize_scalar(
        score,
        bounds=(lowest, 2 * su - lowest),
        method="bounded",
        options={"maxiter": ATTENTION_EVALUATIONS, "xatol": 1e-3},
    )
    return scores
