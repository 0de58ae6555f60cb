"""The attention factor that a search's winner is best with.

A search runs under one attention factor, chosen by what its starting points score. Its winner may
want another one, and the choice costs a handful of evaluations: one number, one smooth minimum.
"""

from __future__ import annotations

from dataclasses import replace

from scipy.optimize import minimize_scalar

from megatron_longrope.factor_search.generations import Trial
from megatron_longrope.factor_search.objective import Objective
from megatron_longrope.factor_search.problem import SearchProblem
from megatron_longrope.factor_search.racing import Race
from megatron_longrope.factor_search.runner import SearchOutcome
from megatron_longrope.factor_search.scoring import score_trial

ATTENTION_EVALUATIONS = 8
"""Values that are tried, beside the one that the search ran under."""


def settle_attention(
    problem: SearchProblem, outcome: SearchOutcome, objective: Objective
) -> tuple[SearchProblem, SearchOutcome, dict[float, float]]:
    """Find the winner's best attention factor between none and twice what `su` adds.

    Args:
        problem (SearchProblem): What was searched, under the attention factor of the search.
        outcome (SearchOutcome): Its winner.
        objective (Objective): The windows that the winner's score is from.

    Returns:
        tuple: The problem and the outcome under the best value, which is the search's own where no
        other is better, and the score of each value that was tried.
    """
    target, policy = problem.target_length, problem.base.attention_factor_policy
    trial = Trial(0, outcome.candidate)
    scores: dict[float, float] = {}

    def score(value: float) -> float:
        value = round(float(value), 4)
        if value not in scores:
            changed = problem.with_attention(value, policy)
            scores[value] = score_trial(trial, changed, objective, Race("off")).score
        return scores[value]

    own = problem.base.attention_factor_for(target)
    score(own)
    lowest, su = (problem.base.attention_factor_by(name, target) for name in ("none", "su"))
    minimize_scalar(
        score,
        bounds=(lowest, 2 * su - lowest),
        method="bounded",
        options={"maxiter": ATTENTION_EVALUATIONS, "xatol": 1e-3},
    )
    best = min(scores, key=lambda value: scores[value])
    if best == round(own, 4):
        return problem, outcome, scores
    return problem.with_attention(best, policy), replace(outcome, score=scores[best]), scores
