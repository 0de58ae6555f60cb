import math

import pytest

from megatron_longrope.config import identity_config
from megatron_longrope.search.evolution import EvolutionParameters
from megatron_longrope.search.journal import Evaluation
from megatron_longrope.search.problem import make_problem
from megatron_longrope.search.runner import choose_policy, run_evolution

SMALL = EvolutionParameters(
    population_size=8, num_mutations=4, num_crossovers=4, max_iterations=3, num_parents=4
)


class Synthetic:
    """Perplexity that is lowest for factors rising as a square; counts its calls."""

    def __init__(self, fail_after=None):
        self.calls, self.fail_after = 0, fail_after

    def __call__(self, config):
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise KeyboardInterrupt
        item = config.factor_set_for(2048)
        target = [1 + 7 * (i / 15) ** 2 for i in range(16)]
        distance = sum((a - b) ** 2 for a, b in zip(item.rescale_factors, target, strict=True))
        bonus = config.attention_factor_for(2048) - 1
        score = 2 + math.sqrt(distance) - bonus
        return Evaluation(item.rescale_factors, item.num_start_tokens, score, (math.log(score),))


@pytest.fixture
def problem():
    return make_problem(identity_config(10000.0, 32, 256), 2048, start_tokens=(0,))


def test_the_winner_is_at_least_as_good_as_every_seed(problem, tmp_path):
    outcome = run_evolution(problem, SMALL, Synthetic(), tmp_path / "j.jsonl", {}, seed=1)
    assert outcome.score <= min(outcome.seed_scores.values())
    assert outcome.num_evaluations == 8 + 3 * 8


def test_an_interrupted_search_resumes_to_the_same_winner_without_repeating_work(problem, tmp_path):
    whole = run_evolution(problem, SMALL, Synthetic(), tmp_path / "whole.jsonl", {}, seed=1)
    path = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_evolution(problem, SMALL, Synthetic(fail_after=13), path, {}, seed=1)
    rest = Synthetic()
    resumed = run_evolution(problem, SMALL, rest, path, {}, seed=1, resume=True)
    assert resumed == whole
    assert rest.calls == whole.num_evaluations - 13
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_changed_setting_refuses_to_resume(problem, tmp_path):
    path = tmp_path / "j.jsonl"
    run_evolution(problem, SMALL, Synthetic(), path, {"seed": 1}, seed=1)
    with pytest.raises(ValueError, match="seed"):
        run_evolution(problem, SMALL, Synthetic(), path, {"seed": 2}, seed=2, resume=True)


def test_an_existing_journal_is_not_overwritten_silently(problem, tmp_path):
    path = tmp_path / "j.jsonl"
    run_evolution(problem, SMALL, Synthetic(), path, {}, seed=1)
    with pytest.raises(ValueError, match="resume"):
        run_evolution(problem, SMALL, Synthetic(), path, {}, seed=1)


def test_a_search_in_which_every_evaluation_fails_says_so(problem, tmp_path):
    def broken(config):
        item = config.factor_set_for(2048)
        return Evaluation(item.rescale_factors, 0, math.inf, error="out of memory")

    with pytest.raises(RuntimeError, match="no candidate could be scored"):
        run_evolution(problem, SMALL, broken, tmp_path / "j.jsonl", {})


def test_the_policy_of_the_best_seed_is_chosen_and_remembered(problem, tmp_path):
    def choose(objective, resume):
        return choose_policy(
            problem, ("su", "none"), objective, tmp_path / "j.jsonl", {}, resume=resume,
            overwrite=False,
        )  # fmt: skip

    policy, table = choose(Synthetic(), False)
    assert policy == "su"  # its attention factor lowers the synthetic score
    assert set(table) == {"su", "none"} and set(table["su"]) == {"pi", "ntk", "yarn"}
    again = Synthetic()
    assert choose(again, True) == (policy, table)
    assert again.calls == 0
