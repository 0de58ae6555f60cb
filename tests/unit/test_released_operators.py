"""The re-implemented operators of the released search do what the release does, and end."""

import sys
from pathlib import Path

import numpy as np
import pytest
from candidates import all_candidates, check_candidate

from megatron_longrope.factor_search.evolution import EvolutionParameters
from megatron_longrope.factor_search.space import Candidate, SearchSpace

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import released_operators
from released_operators import (
    ReleasedSearch,
    accumulating_mutation,
    first_novel_crossover,
    is_monotone,
    released_seed,
    released_space,
)

SMALL = EvolutionParameters(
    population_size=12, num_mutations=4, num_crossovers=4, max_iterations=5, num_parents=6
)


def run(search):
    """Every candidate that was asked for; the score is the distance to a ramp."""
    asked = []
    target = np.linspace(0, search.space.max_step, search.space.num_factors) ** 1.2
    while trials := search.trials():
        for trial in trials:
            asked.append(trial.candidate)
            search.tell(asked[-1], float(np.abs(np.array(asked[-1].steps) - target).sum()))
    return asked


def differences(a, b):
    return sum(x != y for x, y in zip(a, b, strict=True))


def start(num_factors=16, **options):
    space = released_space(num_factors, 8.0)
    seed = released_seed(space, 10000.0, 256)
    return ReleasedSearch(space, SMALL, [seed], 0, **options)


def test_the_starting_point_mixes_the_factors_linearly_where_yarn_mixes_frequencies():
    space = released_space(64, 32.0)
    factors, _ = space.decode(released_seed(space, 10000.0, 4096))
    # In the middle of the ramp 16.5; YaRN has 1 / (0.5 / 32 + 0.5) = 1.94 there.
    steps = np.diff(factors)
    ramp = np.flatnonzero(steps > 0)
    assert factors[0] == 1.0 and factors[-1] == 32.0
    assert np.ptp(steps[ramp]) < 0.011  # a straight line, up to the grid
    middle = (ramp[0] + ramp[-1] + 1) / 2
    assert np.interp(middle, range(64), factors) == pytest.approx(16.5, abs=0.01)


def test_the_bound_is_one_plus_the_extension_ratio():
    space = released_space(16, 8.0)
    assert (space.upper, space.max_step, space.start_tokens) == (9.0, 800, (0,))


def test_a_search_asks_for_its_budget_of_different_monotone_candidates():
    search = start()
    asked = run(search)
    assert len(asked) == len(set(asked)) == SMALL.total_evaluations
    for candidate in asked:
        check_candidate(search.space, candidate)
    assert search.num_capped == 0
    assert search.best[1] == min(search._scores.values())


def test_the_same_seed_gives_the_same_search_and_a_cap_its_beginning():
    asked = run(start())
    assert run(start()) == asked
    assert run(start(max_evaluations=30)) == asked[:30]


def test_the_initial_population_descends_from_the_one_seed():
    search = start()
    first, *others = search.trials()
    assert first.candidate == released_seed(search.space, 10000.0, 256)
    assert len(others) == SMALL.population_size - 1


def test_a_mutation_accumulates_changes_over_sweeps_that_fail():
    space = released_space(64, 8.0)
    seed = released_seed(space, 10000.0, 4096).steps  # with long runs of equal genes
    rng = np.random.default_rng(0)
    children = [accumulating_mutation(seed, space, rng, 0.3, {seed}) for _ in range(40)]
    assert all(is_monotone(child) for child, _ in children)
    assert np.median([sweeps for _, sweeps in children]) > 5
    changed = [differences(seed, child) for child, _ in children]
    assert np.median(changed) > 0.8 * 64  # where p = 0.3 asks for 19


def test_a_redrawn_gene_keeps_to_the_ranges_of_the_release():
    space = SearchSpace(3, 8, upper=9.0, start_tokens=(0,))
    rng = np.random.default_rng(0)
    parent = (10, 20, 30)
    children = {accumulating_mutation(parent, space, rng, 0.3, {parent})[0] for _ in range(4000)}
    first, middle, last = (
        {child[gene] for child in children if differences(parent, child) == 1} - {parent[gene]}
        for gene in range(3)
    )
    assert min(first) == 0 and max(first) == 19  # its right neighbour is left out
    assert min(middle) == 10 and max(middle) == 30
    assert min(last) >= 20 and max(last) > 700


def test_genes_that_are_equal_may_step_above_their_right_neighbour():
    space = released_space(3, 8.0)
    low, count = released_operators._choices((0, 0, 0), 1, space)
    assert (low, count) == (0, 2)  # rounding lets the excluded end in


def test_a_crossover_returns_at_the_first_single_swap_that_is_new():
    rng = np.random.default_rng(0)
    first, second = (1, 3, 5, 7, 9), (2, 4, 6, 8, 10)
    for _ in range(50):
        child = first_novel_crossover(first, second, rng, 0.3, {first, second})
        assert differences(first, child) == 1


def test_a_crossover_of_equal_parents_gives_up():
    rng = np.random.default_rng(0)
    assert first_novel_crossover((1, 2), (1, 2), rng, 0.3, set()) is None


def test_a_mutation_without_an_end_is_ended_counted_and_repaired(monkeypatch):
    monkeypatch.setattr(released_operators, "MAX_SWEEPS", 3)
    space = released_space(64, 8.0)
    flat = Candidate((0,) * 64)  # no first gene below its right neighbour, nothing but ties
    search = ReleasedSearch(space, SMALL, [flat], 0)
    asked = run(search)
    assert search.num_capped > 0
    assert len(set(asked)) == SMALL.total_evaluations
    for candidate in asked:
        check_candidate(space, candidate)


def test_a_space_that_runs_out_ends_the_search(monkeypatch):
    monkeypatch.setattr(released_operators, "MAX_SWEEPS", 20)
    space = SearchSpace(2, 1.01, upper=1.02, start_tokens=(0,))  # six candidates
    search = ReleasedSearch(space, SMALL, [Candidate((0, 1))], 0)
    assert 3 < len(set(run(search)) & set(all_candidates(space))) <= space.size == 6
