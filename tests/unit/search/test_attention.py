"""The attention factor that a winner is best with."""

import math

import pytest
from synthetic_search import small_problem

from megatron_longrope.factor_search.attention import ATTENTION_EVALUATIONS, settle_attention
from megatron_longrope.factor_search.runner import SearchOutcome


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


def settled(objective, value=1.0):
    problem = small_problem().with_attention(value, "none")
    winner = problem.seeds["yarn"]
    outcome = SearchOutcome(winner, math.inf, {}, 1, 2, 0, 0)
    return problem, *settle_attention(problem, outcome, objective)


@pytest.mark.parametrize("best", [1.03, 1.07, 1.12])
def test_the_best_value_is_found_and_the_score_is_its_own(best):
    objective = OfAttention(best)
    problem, changed, outcome, scores = settled(objective)
    found = changed.base.attention_factor_for(problem.target_length)
    assert found == pytest.approx(best, abs=5e-3)
    assert outcome.score == min(scores.values()) == scores[found]
    assert objective.asked == len(scores) <= ATTENTION_EVALUATIONS + 1


def test_the_value_of_the_search_stays_where_no_other_is_better():
    problem, changed, outcome, scores = settled(OfAttention(1.0))
    assert changed is problem and outcome.score == math.inf and min(scores, key=scores.get) == 1.0


def test_values_that_give_no_loss_lose():
    problem, changed, *_ = settled(OfAttention(1.2, broken=[(1.01, 9.0)]))
    assert changed is problem
