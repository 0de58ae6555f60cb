"""What a finished search says about its result."""

import math

from synthetic_search import Synthetic, small_problem

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.factor_search.outcome import export_notes, write
from megatron_longrope.factor_search.runner import SearchOutcome
from megatron_longrope.factor_search.space import GivenFactors


def outcome_of(given):
    return SearchOutcome(given, 12.5, {}, 1, 5, 0, 0)


def test_start_tokens_and_two_attention_factors_are_said_with_what_they_cost_at_export():
    problem = small_problem()
    factors = problem.references["yarn"].rescale_factors
    objective = Synthetic()
    tokens, attention = export_notes(problem, outcome_of(GivenFactors(factors, 4)), objective)
    without = problem.config(GivenFactors(factors))
    losses = [objective.losses(without, sample)[0] for sample in range(5)]
    assert "4 start tokens cannot be exported" in tokens and "--drop-start-tokens" in tokens
    assert f"at {math.exp(sum(losses) / 5):.4f} instead of 12.5000" in tokens
    assert "attention factor 1 up to 256 tokens and 1.1726 beyond" in attention
    assert "--attention-factor 1.17260393995" in attention


def test_a_reference_that_could_not_be_scored_does_not_keep_the_result_from_being_written(tmp_path):
    problem = small_problem((0,))
    origin = {"seed_perplexity": {"pi": 9.5, "ntk": math.inf}, "needle": [math.nan, 1.0]}
    write(tmp_path / "F.json", problem, outcome_of(problem.references["pi"]), origin)
    found = LongRopeConfig.load(tmp_path / "F.json").factor_sets[-1].origin
    assert found == {"seed_perplexity": {"pi": 9.5, "ntk": None}, "needle": [None, 1.0]}


def test_the_default_result_of_a_first_search_needs_no_note():
    problem = small_problem((0,)).with_attention(1.17264, "su")
    objective = Synthetic(fail_after=0)  # nothing is scored for it
    assert export_notes(problem, outcome_of(problem.references["pi"]), objective) == []
