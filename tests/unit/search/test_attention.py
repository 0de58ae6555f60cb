"""The attention factor that a winner is best with."""

import math

import pytest
from synthetic_search import small_problem

from megatron_longrope.factor_search.attention import (
    ATTENTION_EVALUATIONS,
    attention_scores,
    settle_attention,
)
from megatron_longrope.factor_search.retrieval import Retrieval, RetrievalVerdict


class OfAttention:
    """Losses with a minimum at one attention factor, whatever the rescale factors are."""

    num_samples = samples_per_forward = 2

    def __init__(self, best, broken=()):
        self.best, self.broken, self.asked = best, broken, 0

    def losses(self, config, first):
        self.asked += 1
        value = config.attention_factor_for(config.max_length)
        if any(low < value < high for low, high in self.broken):
            return [math.nan] * 2
        return [2 + (value - self.best) ** 2] * 2


def problem_and_scores(objective, own_score=None):
    problem = small_problem().with_attention(1.0, "none")
    return problem, attention_scores(problem, problem.seeds["yarn"], objective, own_score)


def settled(problem, scores, before=None, after=None, reference=None, **more):
    measured = {"yarn": reference, "longrope": before}
    verdict = None if before is None else RetrievalVerdict(None, measured, before, None)
    return settle_attention(
        problem, problem.seeds["yarn"], scores, verdict, lambda config: after, **more
    )


@pytest.mark.parametrize("best", [1.03, 1.12, 1.25])  # `su` is 1.17 here
def test_the_best_value_is_found(best):
    objective = OfAttention(best)
    problem, scores = problem_and_scores(objective)
    assert objective.asked == len(scores) <= ATTENTION_EVALUATIONS + 1
    found = settled(problem, scores)
    assert found.problem.base.attention_factor == pytest.approx(best, abs=5e-3)
    assert found.gain == min(scores.values()) / scores[1.0] < 1


def test_what_is_known_of_the_searchs_own_value_is_not_scored_again():
    objective = OfAttention(1.1)
    _, scores = problem_and_scores(objective, own_score=12.5)
    assert scores[1.0] == 12.5 and objective.asked == len(scores) - 1


def test_the_value_of_the_search_stays_where_no_other_is_better():
    problem, scores = problem_and_scores(OfAttention(1.0))
    found = settled(problem, scores)
    assert found.problem is problem and found.gain == 1 and min(scores, key=scores.get) == 1.0


def test_values_that_give_no_loss_lose():
    problem, scores = problem_and_scores(OfAttention(1.2, broken=[(1.01, 9.0)]))
    assert settled(problem, scores).problem is problem


def test_a_winner_without_a_score_under_the_searchs_own_value_keeps_it():
    problem, scores = problem_and_scores(OfAttention(1.1, broken=[(0.9, 1.01)]))
    found = settled(problem, scores)
    assert math.isinf(scores[1.0]) and found.problem is problem and found.gain == 1


def test_a_value_that_retrieves_worse_is_not_taken_where_retrieval_says_anything():
    problem, scores = problem_and_scores(OfAttention(1.1))
    good, bad = Retrieval(0.1, 3, 3), Retrieval(2.0, 1, 3)
    kept = settled(problem, scores, good, bad, reference=good)
    assert kept.problem is problem and kept.gain == 1 and kept.verdict.written == good
    assert "stays, as 1.1 retrieves worse: 1 of 3 answers" in kept.note.replace("1.0999", "1.1")
    taken = settled(problem, scores, bad, good, reference=good)
    assert taken.problem is not problem and taken.verdict.written == good
    assert settled(problem, scores, good, bad, reference=good, accept_worse=True).gain < 1
    # Two steps within the tolerance are one beyond it.
    step, two_steps = Retrieval(0.29, 3, 3), Retrieval(0.48, 3, 3)
    assert settled(problem, scores, step, two_steps, reference=good).problem is problem
    assert settled(problem, scores, step, step, reference=good).problem is not problem
    # No reference answers anything right: differences are noise.
    none = Retrieval(9.0, 0, 3)
    assert settled(problem, scores, none, Retrieval(9.9, 0, 3), reference=none).gain < 1
