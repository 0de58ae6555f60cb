"""A winner by perplexity that no longer retrieves is not what a search writes."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_longrope.config import identity_config
from megatron_longrope.factor_search.journal import Evaluation
from megatron_longrope.factor_search.problem import make_problem
from megatron_longrope.factor_search.retrieval import (
    Retrieval,
    choose_by_retrieval,
    measure_retrieval,
)
from megatron_longrope.factor_search.runner import SearchOutcome

PROBLEM = make_problem(identity_config(10000.0, 32, 256), 2048)
SLOWEST = 15


def outcome_of(factors_and_scores, seeds):
    """An outcome whose records have the given slowest factor and score, in that order."""
    records = [
        Evaluation((*(1.0,) * SLOWEST, slowest), 0, score, (math.log(score),), index=index)
        for index, (slowest, score) in enumerate(factors_and_scores)
    ]
    best = min(records, key=lambda record: record.score)
    winner = PROBLEM.space.encode(best.rescale_factors)
    return SearchOutcome(winner, best.score, seeds, len(records), 0, 0, 0, tuple(records))


def measured_by_floor(correct_at_floor=3):
    """Retrieves where the slowest dimension is slowed by the whole ratio, as YaRN does it."""

    def measure(config):
        factors = config.factor_set_for(2048).rescale_factors
        yarn = factors[SLOWEST] >= 8.0 and factors[8] != pytest.approx(8.0 ** (16 / 30))
        loss = 0.3 if factors[0] == 8.0 else 0.2  # PI's is a little higher
        return Retrieval(loss, correct_at_floor, 3) if yarn else Retrieval(0.1, 0, 3)

    return measure


SEEDS = {"pi": 30.0, "ntk": 24.0, "yarn": 22.89}


def test_a_winner_that_retrieves_stays():
    outcome = outcome_of([(7.0, 25.0), (8.5, 22.7)], SEEDS)
    verdict = choose_by_retrieval(PROBLEM, outcome, measured_by_floor())
    assert verdict.outcome is outcome and verdict.reason is None
    assert verdict.written == Retrieval(0.2, 3, 3)
    assert set(verdict.measured) == {"pi", "ntk", "yarn", "longrope"}


def test_a_winner_that_loses_retrieval_gives_way_to_the_best_that_does_not():
    outcome = outcome_of([(7.6, 22.7), (7.5, 22.75), (8.2, 22.8), (8.1, 23.5)], SEEDS)
    verdict = choose_by_retrieval(PROBLEM, outcome, measured_by_floor())
    assert verdict.outcome.score == 22.8
    assert PROBLEM.factor_set(verdict.outcome.candidate).rescale_factors[SLOWEST] == 8.2
    assert verdict.reason.startswith(
        "the best score retrieves worse than yarn: 0 of 3 answers (loss 0.1) against 3 of 3"
    )
    assert "in its place stands the 3. best, 3 of 3" in verdict.reason
    assert verdict.measured["longrope"].correct == 0 and verdict.written.correct == 3
    assert verdict.to_dict()["written"] == {"loss": 0.2, "correct": 3, "trials": 3}


def test_where_no_better_candidate_retrieves_the_best_retrieving_reference_is_written():
    outcome = outcome_of([(7.6, 22.7), (7.5, 22.75), (8.1, 23.5)], SEEDS)
    verdict = choose_by_retrieval(PROBLEM, outcome, measured_by_floor())
    assert verdict.outcome.candidate == PROBLEM.references["yarn"]
    assert verdict.outcome.score == 22.89 and verdict.reason.endswith("in its place stands yarn")


def test_a_reference_without_a_perplexity_is_not_written_in_the_winners_place():
    outcome = outcome_of([(7.6, 22.7)], {"pi": math.inf, "ntk": 24.0, "yarn": math.inf})
    verdict = choose_by_retrieval(PROBLEM, outcome, measured_by_floor())
    assert verdict.outcome is outcome and verdict.reason.endswith(", which has no score")


def test_worse_retrieval_is_written_only_when_it_is_accepted_and_said_even_then():
    outcome = outcome_of([(7.6, 22.7)], SEEDS)
    verdict = choose_by_retrieval(PROBLEM, outcome, measured_by_floor(), accept_worse=True)
    assert verdict.outcome is outcome and "accepted as asked" in verdict.reason


def test_a_model_that_retrieves_under_no_factors_decides_nothing():
    outcome = outcome_of([(7.6, 22.7)], SEEDS)
    verdict = choose_by_retrieval(PROBLEM, outcome, measured_by_floor(correct_at_floor=0))
    assert verdict.outcome is outcome and verdict.reason is None


def test_among_equal_counts_a_clearly_higher_or_no_loss_is_worse():
    best = Retrieval(0.1, 3, 3)
    assert not Retrieval(0.25, 3, 3).is_worse_than(best)
    assert Retrieval(0.5, 3, 3).is_worse_than(best)
    assert Retrieval(math.nan, 3, 3).is_worse_than(best)
    assert not Retrieval(0.9, 3, 3).is_worse_than(Retrieval(0.1, 2, 3))


def test_an_answer_is_right_when_every_token_is_the_greedy_choice():
    tokens = torch.arange(20).view(2, 10)
    scored = torch.zeros(2, 9, dtype=torch.bool)
    scored[:, -3:] = True

    class Model:
        def set_config(self, config):
            self.config = config

        def answer(self, row, count):
            assert row.shape == (1, 10) and count == 3
            right = row[0, -3:].tolist()
            wrong = [right[0], 99, right[2]]
            predicted = right if row[0, 0] == 0 else wrong
            # What would follow the answer comes last and does not count.
            return SimpleNamespace(predicted=[*predicted, 7], nll=[0.1, 0.2, 0.3 * (1 + row[0, 0])])

    model, config = Model(), PROBLEM.config(PROBLEM.references["pi"])
    found = measure_retrieval(model, SimpleNamespace(tokens=tokens, scored=scored), config)
    assert model.config is config and (found.correct, found.trials) == (1, 2)
    assert found.loss == pytest.approx((0.6 / 3 + (0.3 + 0.3 * 11) / 3) / 2)
