"""CMA-ES with halved start tokens and a polish: deterministic, within its budget, and better."""

import math

import numpy as np
import pytest
from candidates import check_candidate
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longrope.config import FactorSet, identity_config
from megatron_longrope.factor_search.cma import CmaParameters, CmaSearch
from megatron_longrope.factor_search.coordinates import Coordinates, moved_candidate
from megatron_longrope.factor_search.critical import CriticalSpace, critical_seeds
from megatron_longrope.factor_search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.factor_search.problem import make_problem
from megatron_longrope.factor_search.space import START_TOKENS, SearchSpace
from megatron_longrope.methods import named_factors

SMALL = CmaParameters(max_evaluations=60, num_samples=4)


def published(space: SearchSpace) -> list:
    return [
        space.encode(named_factors(name, 2 * space.num_factors, space.scale, 10000.0, 4096))
        for name in ("pi", "ntk", "yarn")
    ]


def objective(space: SearchSpace, best_start: int = 4, rng_seed: int = 0):
    """exp of a squared log distance to a smooth detour from YaRN."""
    d = space.num_factors
    rng = np.random.default_rng(rng_seed)
    yarn = np.log(named_factors("yarn", 2 * d, space.scale, 10000.0, 4096))
    bump = np.exp(-0.5 * ((np.arange(d) - 0.6 * d) / (0.12 * d)) ** 2)
    target = np.maximum.accumulate(yarn * (1 + 0.15 * bump))
    weight = rng.uniform(0.5, 2.0, d)

    def score(factors, num_start_tokens) -> float:
        loss = float(np.mean(weight * (np.log(factors) - target) ** 2))
        return math.exp(
            3 + loss + 0.002 * abs(math.log2((1 + num_start_tokens) / (1 + best_start)))
        )

    return score


def run(search, score) -> list[tuple]:
    told = []
    while trials := search.trials():
        for trial in trials:
            value = score(*search.space.decode(trial.candidate))
            search.tell(trial.candidate, value)
            told.append((trial, value))
    return told


@pytest.mark.parametrize("space", ["floored", "full", "critical"])
@pytest.mark.parametrize(
    ("dim", "base", "window"), [(64, 1e5, 8192), (96, 1e4, 4096), (128, 5e5, 8192)]
)
def test_9_or_10_coordinates_and_a_population_of_10_as_the_docs_say(dim, base, window, space):
    problem = make_problem(identity_config(base, dim, window), 16 * window, space=space)
    for seed in problem.seeds.values():
        size = Coordinates(problem.space, seed).size
        assert size in (9, 10) and 4 + int(3 * math.log(size)) == 10


def cost(told, num_samples: int) -> int:
    """Sample-forwards, where nothing is scored twice."""
    scored = {}
    for trial, _ in told:
        wanted = trial.samples or num_samples
        scored[trial.candidate] = max(scored.get(trial.candidate, 0), wanted)
    return sum(scored.values())


def test_a_quarter_of_the_evaluations_reaches_more_than_the_evolution():
    space = SearchSpace(64, 16.0, start_tokens=(0,))
    score = objective(space)
    ours = CmaSearch(space, CmaParameters(), published(space), 0)
    run(ours, score)
    theirs = EvolutionSearch(space, EvolutionParameters(), published(space), 0)
    assert len(run(theirs, score)) == 1344
    assert ours.best[1] < theirs.best[1]


@settings(max_examples=20, deadline=None)
@given(
    scale=st.floats(1.01, 1024.0),
    num_factors=st.sampled_from([1, 2, 7, 64]),
    start_tokens=st.sampled_from([(0,), (0, 4, 64), START_TOKENS]),
    budget=st.integers(1, 90),
    lookahead=st.integers(0, 2),
)
def test_the_budget_is_kept_and_nothing_is_scored_in_full_twice(
    scale, num_factors, start_tokens, budget, lookahead
):
    space = SearchSpace(num_factors, scale, start_tokens=start_tokens)
    seeds = [space.encode([scale] * num_factors)]
    parameters = CmaParameters(max_evaluations=budget, num_samples=4)
    search = CmaSearch(space, parameters, seeds, 0, lookahead=lookahead)
    told = run(search, lambda factors, n: math.exp(float(np.var(factors)) / scale**2) + n)
    whole = [trial.candidate for trial, _ in told if trial.samples is None]
    assert len(set(whole)) == len(whole)
    assert cost(told, 4) <= 4 * budget and cost(told, 4) <= search.total_samples(4) + 40
    for trial, _ in told:
        check_candidate(space, trial.candidate)
    assert [trial.index for trial, _ in told] == list(range(len(told)))


@pytest.mark.parametrize("rng_seed", [0, 1, 2])
def test_a_best_seed_that_nothing_around_it_beats_is_left_for_the_second_best(rng_seed):
    space = SearchSpace(16, 8.0, start_tokens=(0,))
    bowl, (pi, _, yarn) = objective(space), published(space)
    valley = bowl(*space.decode(yarn))

    def score(factors, num_start_tokens):
        here = space.encode(factors)
        return valley - 0.01 if here == pi else bowl(factors, num_start_tokens)

    search = CmaSearch(space, SMALL, published(space), rng_seed)
    run(search, score)
    assert search.best[1] < valley - 0.02
    assert search.best[0].steps[0] < pi.steps[0] / 2


@pytest.fixture
def no_polish(monkeypatch):
    """Leaves CMA-ES all trials but those of the seeds."""
    monkeypatch.setattr(CmaSearch, "_polish", lambda self: iter(()))


def test_a_recovery_that_starts_from_plain_rope_runs_cma(no_polish):
    tuned = FactorSet(2048, tuple(np.linspace(1, 8, 16)))
    problem = make_problem(identity_config(10000.0, 32, 256).with_factor_set(tuned), 256)
    target = np.linspace(0.0, 0.4, 16) ** 2

    def score(factors, num_start_tokens):
        return math.exp(2 + float(np.mean((np.log(factors) - target) ** 2)))

    search = CmaSearch(problem.space, SMALL, list(problem.seeds.values()), 0)
    told = run(search, score)
    assert min(told[:2], key=lambda item: item[1])[0].candidate == problem.seeds["none"]
    assert len(told) - 2 > SMALL.max_evaluations / 2
    assert search.best[1] < math.exp(2.001) < told[0][1]


def test_a_start_that_no_step_leaves_gives_way_to_the_second_best(no_polish):
    space = SearchSpace(16, 1.01, upper=4.0, start_tokens=(0,))  # its steps lie below the grid
    seeds = [space.encode([1.0] * 16), space.encode(np.linspace(1, 4, 16))]
    told = run(CmaSearch(space, SMALL, seeds, 0), lambda factors, _: math.exp(max(factors)))
    assert len(told) - 2 > 10


def test_start_tokens_are_found_for_a_fraction_of_what_trying_them_all_costs():
    space = SearchSpace(16, 8.0, start_tokens=START_TOKENS)
    search = CmaSearch(space, CmaParameters(max_evaluations=200), published(space), 0)
    told = run(search, objective(space, best_start=20))
    halving = [trial for trial, _ in told[3:] if trial.samples is not None][: 14 + 7 + 4]
    assert [trial.samples for trial in halving] == [1] * 14 + [2] * 7 + [4] * 4
    assert space.decode(search.best[0])[1] == 20


def test_every_candidate_of_the_critical_space_is_canonical():
    space = CriticalSpace(16, 8.0, critical_dimensions=(5, 6, 7, 8, 9))
    search = CmaSearch(space, SMALL, list(critical_seeds(space).values()), 0)
    told = run(search, objective(space, 0))
    for trial, _ in told:
        check_candidate(space, trial.candidate)
    decoded = [space.decode(trial.candidate) for trial, _ in told if trial.samples is None]
    assert len(set(decoded)) == len(decoded)
    assert search.best[1] < told[0][1]


def test_failures_everywhere_but_in_the_seeds_do_not_end_the_search_early():
    space = SearchSpace(16, 8.0, start_tokens=(0,))
    search = CmaSearch(space, SMALL, published(space), 0)
    seeds = set(published(space))
    while trials := search.trials():
        for trial in trials:
            value = 5.0 if trial.candidate in seeds else math.nan
            search.tell(trial.candidate, value)
    assert search.best[1] == 5.0
    assert search._num_asked >= 50


# Coordinates and moves


@given(seed=st.integers(0, 100), spread=st.floats(0.0, 3.0))
def test_coordinates_give_candidates_of_the_space_and_their_origin_is_the_start(seed, spread):
    space = SearchSpace(64, 32.0)
    start = published(space)[2]
    coordinates = Coordinates(space, start)
    assert 4 <= coordinates.size <= 24
    assert coordinates.candidate(np.zeros(coordinates.size)) == start
    point = spread * np.random.default_rng(seed).standard_normal(coordinates.size)
    check_candidate(space, coordinates.candidate(point))


@given(gene=st.integers(0, 15), step=st.sampled_from([-0.5, -0.04, 0.04, 0.5]))
def test_a_move_changes_its_factor_and_drags_only_what_is_in_the_way(gene, step):
    space = SearchSpace(16, 8.0)
    start = published(space)[1]
    moved = moved_candidate(space, start, [(gene, step)])
    check_candidate(space, moved)
    before, after = np.array(space.decode(start)[0]), np.array(space.decode(moved)[0])
    expected = min(max(before[gene] * math.exp(step), 1.0), 10.0)
    assert after[gene] == pytest.approx(expected, abs=0.006)
    changed = np.flatnonzero(before != after)
    if len(changed):
        assert (changed >= gene).all() if step > 0 else (changed <= gene).all()


def test_opposite_moves_meet_in_the_middle():
    space = SearchSpace(4, 8.0)
    start = space.encode([1.0, 2.0, 2.0, 4.0])
    moved = moved_candidate(space, start, [(1, 0.2), (2, -0.2)])
    assert space.decode(moved)[0] == (1.0, 2.0, 2.0, 4.0)
