import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic_search import Synthetic, drop_seconds, small_problem

from megatron_longrope.baselines import extension
from megatron_longrope.config import FactorSet, identity_config
from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.cma import CmaParameters, CmaSearch
from megatron_longrope.factor_search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.factor_search.generations import Trial
from megatron_longrope.factor_search.journal import Evaluation, Journal, best_scores, read_records
from megatron_longrope.factor_search.known_scores import KnownScores
from megatron_longrope.factor_search.problem import make_problem
from megatron_longrope.factor_search.runner import SearchRun, run_search
from megatron_longrope.factor_search.scoring import score_trial

SMALL = EvolutionParameters(
    population_size=8, num_mutations=4, num_crossovers=4, max_iterations=3, num_parents=4
)


@pytest.fixture
def problem():
    return small_problem()


def evolution(problem, rng_seed=1, **options):
    return EvolutionSearch(problem.space, SMALL, list(problem.seeds.values()), rng_seed, **options)


def covariance(problem, rng_seed=1, **options):
    parameters = CmaParameters(max_evaluations=60, num_samples=Synthetic.num_samples)
    return CmaSearch(problem.space, parameters, list(problem.seeds.values()), rng_seed, **options)


SEARCHES = {"evolution": evolution, "cma": covariance}


@pytest.fixture(params=SEARCHES)
def new_search(request):
    return SEARCHES[request.param]


def test_a_second_search_never_ends_above_the_best_composed_baseline(new_search, tmp_path):
    plain = identity_config(10000.0, 32, 256)
    tuned = plain.with_factor_set(FactorSet(2048, tuple(1.0 + 7.003 * i / 15 for i in range(16))))
    problem = make_problem(tuned, 8192, space="floored")
    yarn = extension("yarn", tuned, 8192).rescale_factors
    # Lowest for the exact vector, and a little higher already for its nearest grid point.
    objective = OnlyOneIsGood(yarn, at=8192)
    outcome = run_search(new_search(problem), problem, objective, SearchRun(tmp_path / "j.jsonl"))
    assert outcome.score == outcome.seed_scores["yarn"] == pytest.approx(math.exp(2.0))
    assert problem.factor_set(outcome.candidate).rescale_factors == yarn


def drop_time(record):
    return replace(record, seconds=0.0)


def test_the_winner_is_at_least_as_good_as_every_seed(problem, new_search, tmp_path):
    search = new_search(problem)
    outcome = run_search(search, problem, Synthetic(), SearchRun(tmp_path / "j.jsonl"))
    assert set(outcome.seed_scores) == {"pi", "ntk", "yarn"}
    assert outcome.score < min(outcome.seed_scores.values())
    assert outcome.num_evaluations == len(outcome.records)


def test_an_evolution_scores_what_its_parameters_say(problem, tmp_path):
    outcome = run_search(
        evolution(problem), problem, Synthetic(), SearchRun(tmp_path / "j", racing="off")
    )
    assert outcome.num_evaluations == 8 + 3 * 8
    assert outcome.sample_forwards == 32 * Synthetic.num_samples


def test_the_journal_holds_every_samples_loss_of_every_candidate(problem, tmp_path):
    path = tmp_path / "j.jsonl"
    run_search(evolution(problem), problem, Synthetic(), SearchRun(path, racing="off"))
    with Journal(path, {"racing": "off"}, resume=True) as journal:
        for index, record in enumerate(journal.records):
            assert record.index == index
            assert len(record.sample_nlls) == Synthetic.num_samples
            assert record.score == math.exp(math.fsum(record.sample_nlls) / 5)


@pytest.mark.parametrize(
    ("racing", "stop"),
    [("exact", 0), ("exact", 38), ("exact", 77), ("off", 7), ("off", 38)],
)
def test_an_interrupted_search_resumes_to_the_same_journal_without_repeating_work(
    problem, new_search, tmp_path, racing, stop
):
    whole = Synthetic()
    run = SearchRun(tmp_path / "whole.jsonl", {"seed": 1}, racing)
    outcome = run_search(new_search(problem), problem, whole, run)
    cut = SearchRun(tmp_path / "cut.jsonl", {"seed": 1}, racing, resume=True)
    first = Synthetic(fail_after=stop)
    with pytest.raises(KeyboardInterrupt):
        run_search(new_search(problem), problem, first, cut)
    rest = Synthetic()
    assert run_search(new_search(problem), problem, rest, cut) == outcome
    assert drop_seconds(cut.journal) == drop_seconds(run.journal)
    # Only the trial that was interrupted is scored again.
    assert 0 <= first.calls + rest.calls - whole.calls < Synthetic.num_samples


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("CUDA error: out of memory\nCompile with"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
        (math.nan, "the loss of sample 1 is nan"),
        (1e5, "is no perplexity"),
    ],
)
def test_a_failed_evaluation_is_recorded_with_its_reason_and_the_search_goes_on(
    problem, new_search, tmp_path, failure, reason
):
    objective = Synthetic(failures={1: failure})
    outcome = run_search(new_search(problem), problem, objective, SearchRun(tmp_path / "j.jsonl"))
    assert outcome.num_failed == 1
    (failed,) = [record for record in outcome.records if record.error]
    assert failed.index == 1 and failed.score == math.inf and reason in failed.error


def test_an_unknown_failure_ends_the_search_with_the_journal_intact(problem, tmp_path):
    path = tmp_path / "j.jsonl"
    objective = Synthetic(failures={3: RuntimeError("NCCL error")})
    with pytest.raises(RuntimeError, match="NCCL"):
        run_search(evolution(problem), problem, objective, SearchRun(path))
    assert len(path.read_text().splitlines()) == 1 + 3


def test_a_search_in_which_every_evaluation_fails_says_so(problem, new_search, tmp_path):
    broken = Synthetic(failures=dict.fromkeys(range(1000), math.nan))
    with pytest.raises(LongRopeError, match="no candidate could be scored"):
        run_search(new_search(problem), problem, broken, SearchRun(tmp_path / "j.jsonl"))


def references_of(problem):
    return list(problem.references.values())


def test_what_the_references_scored_is_not_scored_again(problem, new_search, tmp_path):
    run = SearchRun(tmp_path / "j.jsonl", resume=True)
    first, rest, again = Synthetic(fail_after=14), Synthetic(), Synthetic()
    with pytest.raises(KeyboardInterrupt):  # within the last one
        run_search(new_search(problem), problem, first, run, references=references_of(problem))
    outcome = run_search(new_search(problem), problem, rest, run, references=references_of(problem))
    # The whole search, references included, costs what the search alone does.
    alone, other = Synthetic(), SearchRun(tmp_path / "alone.jsonl")
    assert run_search(new_search(problem), problem, alone, other) == outcome
    assert first.calls + rest.calls == alone.calls + 4
    references, trials = drop_seconds(run.journal)[:3], drop_seconds(run.journal)[3:]
    assert [item["index"] for item in references] == [-3, -2, -1]
    assert trials == drop_seconds(other.journal)
    assert [item.index for item in read_records(run.journal)] == list(range(len(trials)))
    found = run_search(new_search(problem), problem, again, run, references=references_of(problem))
    assert found == outcome and not again.calls


def test_failed_references_are_scored_again_until_the_search_has_begun(
    problem, new_search, tmp_path
):
    run = SearchRun(tmp_path / "j.jsonl", resume=True)

    def search(objective):
        return run_search(
            new_search(problem), problem, objective, run, references=references_of(problem)
        )

    every = dict.fromkeys(range(3), torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(LongRopeError, match="no candidate could be scored"):
        search(Synthetic(failures=every))
    assert [item["index"] for item in drop_seconds(run.journal)] == [-3, -2, -1]
    with pytest.raises(KeyboardInterrupt):  # after the first trial, which is the failed reference
        search(Synthetic(failures={0: every[0]}, fail_after=12 + 5))
    begun = [item["index"] for item in drop_seconds(run.journal)]
    assert begun[:7] == [-3, -3, -2, -2, -1, -1, 0]
    search(Synthetic())
    whole = [item["index"] for item in drop_seconds(run.journal)]
    assert len(whole) > len(begun) == len([index for index in whole if index <= max(begun)])


def test_what_was_not_scored_to_its_end_counts_as_no_score(problem):
    given = problem.references["pi"]
    whole = Evaluation(given.rescale_factors, 0, 9.0, (2.0,) * 5)
    halved = replace(whole, score=2.0, stopped="budget")
    records = [halved, replace(whole, score=math.inf, error="out of memory")]
    assert best_scores(records) == {} and KnownScores(problem, records).losses(given) == (2.0,) * 5
    assert best_scores([*records, whole]) == {given: 9.0}


def test_a_part_of_the_samples_is_scored_by_itself_whatever_shares_its_forward_pass(problem):
    trial, pairs = Trial(0, problem.references["ntk"], samples=1), Synthetic(samples_per_forward=2)
    found = score_trial(trial, problem, pairs)
    assert len(found.sample_nlls) == 2 and found.stopped == "budget"
    assert found.score == pytest.approx(math.exp(found.sample_nlls[0]))


class OnlyOneIsGood(Synthetic):
    """Losses that are lowest for one vector, wherever it lies, and rise steeply around it."""

    def __init__(self, factors, at=256):
        super().__init__()
        self._factors, self._length = np.asarray(factors), at

    def _loss(self, config, index):
        factors = np.asarray(config.factor_set_for(self._length).rescale_factors)
        return 2.0 + float(np.abs(factors - self._factors).sum() > 1e-9)


@pytest.mark.parametrize("upper", [None, 3.0])
def test_a_recovery_keeps_the_tuned_factors_that_nothing_beats(new_search, tmp_path, upper):
    plain = identity_config(10000.0, 32, 256)
    tuned = tuple(1.0 + 7.003 * i / 15 for i in range(16))  # beyond 3, and on no grid
    problem = make_problem(plain.with_factor_set(FactorSet(2048, tuned)), 256, upper=upper)
    run = SearchRun(tmp_path / "j.jsonl")
    objective = OnlyOneIsGood(tuned)
    outcome = run_search(
        new_search(problem), problem, objective, run, references=references_of(problem)
    )
    assert problem.factor_set(outcome.candidate).rescale_factors == tuned
    assert outcome.seed_scores["longest"] == outcome.score == pytest.approx(math.exp(2.0))


def test_patience_ends_a_search_that_finds_nothing_better(problem, new_search, tmp_path):
    def run(name, **options):
        search = new_search(problem, **options)
        return run_search(search, problem, Synthetic(), SearchRun(tmp_path / name, resume=True))

    whole, cut = run("whole.jsonl"), run("cut.jsonl", patience=9)
    assert cut.num_evaluations < whole.num_evaluations
    # The same trajectory, only shorter, and it ends where the last worthwhile step lies behind it.
    assert [drop_time(item) for item in cut.records] == [
        drop_time(item) for item in whole.records[: cut.num_evaluations]
    ]
    assert run("cut.jsonl", patience=9) == cut
    complete = [item.score for item in cut.records if item.stopped is None]
    assert min(complete[:-9]) * 0.999 < min(complete)


# Racing


def test_exact_racing_changes_neither_the_winner_nor_the_population(problem, tmp_path):
    # Losses close to zero for good candidates, so that the bound stops many.
    results = {}
    for racing in ("off", "exact"):
        search = evolution(problem)
        objective = Synthetic(offset=0.0)
        run = SearchRun(tmp_path / f"{racing}.jsonl", racing=racing)
        outcome = run_search(search, problem, objective, run)
        results[racing] = outcome.candidate, outcome.score, search._ranked()[:4]
        if racing == "exact":
            assert outcome.sample_forwards_saved > 0
            assert outcome.sample_forwards + outcome.sample_forwards_saved == 32 * 5
            assert objective.calls == outcome.sample_forwards
    assert results["off"] == results["exact"]


def test_racing_leaves_every_trial_of_cma_as_it_is(problem, tmp_path):
    # Beyond the 24 scores from which the search guesses what to score next.
    ways = []
    for racing in ("off", "exact"):
        run = SearchRun(tmp_path / f"{racing}.jsonl", racing=racing)
        objective = Synthetic(offset=0.0, noise=1.0)
        outcome = run_search(covariance(problem), problem, objective, run)
        ways.append(drop_seconds(run.journal))
    assert ways[0] == ways[1] and sum(item["stopped"] is None for item in ways[0]) > 24
    assert outcome.sample_forwards_saved == 0


def test_a_stopped_candidate_never_wins(problem, tmp_path):
    run = SearchRun(tmp_path / "j.jsonl")
    outcome = run_search(evolution(problem), problem, Synthetic(offset=0.0, noise=1.0), run)
    complete = [record.score for record in outcome.records if record.stopped is None]
    stopped = [record.score for record in outcome.records if record.stopped == "exact"]
    assert stopped and outcome.score == min(complete) < min(stopped)


def test_samples_that_share_a_forward_pass_race_together(problem, tmp_path):
    objective = Synthetic(offset=0.0, samples_per_forward=2)
    run = SearchRun(tmp_path / "j.jsonl")
    outcome = run_search(evolution(problem), problem, objective, run)
    stopped = {len(record.sample_nlls) for record in outcome.records if record.stopped}
    assert stopped and stopped <= {2, 4}
