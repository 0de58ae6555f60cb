"""Operators stay monotonic, bounded and deterministic, and always end."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
from candidates import all_candidates, check_candidate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_critical import spaces as critical_spaces

from megatron_longrope.factor_search.coordinates import moved_candidate
from megatron_longrope.factor_search.critical import CriticalSpace
from megatron_longrope.factor_search.operators import crossover, mutate, random_candidate, unique
from megatron_longrope.factor_search.space import START_TOKENS, Candidate, SearchSpace

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def spaces(draw) -> SearchSpace:
    num_factors, scale = draw(st.integers(1, 64)), draw(st.floats(1.01, 1024.0))
    return SearchSpace(
        num_factors,
        scale,
        start_tokens=draw(st.sampled_from([(0,), (0, 4), START_TOKENS])),
        floor_dimension=draw(st.none() | st.integers(0, num_factors - 1)),
    )


seeds = st.integers(0, 2**32)


@QUICK
@given(space=spaces() | critical_spaces(), seed=seeds, prob=st.sampled_from([0.05, 0.3, 1.0]))
def test_every_operator_stays_inside_the_space(space, seed, prob):
    rng = np.random.default_rng(seed)
    a, b = random_candidate(space, rng), random_candidate(space, rng)
    moved = moved_candidate(space, a, [(space.num_factors - 1, -0.9)])
    for candidate in (a, b, moved, mutate(a, space, rng, prob), crossover(a, b, space, rng)):
        check_candidate(space, candidate)  # grid, bounds, monotonicity, canonical
        assert all(type(value) is int for value in candidate.steps)
        assert type(candidate.start_index) is int


@QUICK
@given(space=spaces() | critical_spaces(), seed=seeds)
def test_decoding_and_encoding_returns_the_same_candidate(space, seed):
    candidate = random_candidate(space, np.random.default_rng(seed))
    assert space.encode(*space.decode(candidate)) == candidate
    assert candidate in space.choices(candidate)
    genes = space.genes(candidate)
    values = [space.decode(candidate)[0][gene] for gene in genes]
    assert space.with_factors(candidate, genes, values) == candidate


def test_mutation_draws_between_the_updated_left_and_the_parents_right_neighbour():
    space = SearchSpace(3, 4, start_tokens=(0,))
    rng = np.random.default_rng(0)
    parent = Candidate((10, 20, 30))
    seen = [mutate(parent, space, rng, prob=1.0).steps for _ in range(3000)]
    assert {k[0] for k in seen} == set(range(0, 21))
    assert all(k[0] <= k[1] <= 30 for k in seen)
    assert max(k[2] for k in seen) > 390  # the last gene reaches for the bound of 400
    # The first gene is uniform: 21 values, about 143 draws each.
    counts = Counter(k[0] for k in seen)
    assert min(counts.values()) > 95 and max(counts.values()) < 195


def test_mutation_changes_about_p_of_the_genes():
    space = SearchSpace(64, 64)
    rng = np.random.default_rng(1)
    parent = Candidate(tuple(range(0, 6400, 100)))
    children = np.array([mutate(parent, space, rng, 0.3).steps for _ in range(300)])
    assert 0.27 < np.mean(children != np.array(parent.steps)) < 0.31


@pytest.mark.parametrize(
    "space", [SearchSpace(2, 4), CriticalSpace(36, 4, critical_dimensions=tuple(range(24, 36)))]
)
def test_the_second_gene_changes_with_probability_p_to_every_other_choice(space):
    rng = np.random.default_rng(2)
    parent = Candidate((space.min_step,) * space.num_factors, 3)
    seen = Counter(mutate(parent, space, rng, 0.3).start_index for _ in range(4000))
    assert set(seen) == set(range(space.num_choices))
    assert 0.66 < seen[3] / 4000 < 0.74


def test_start_tokens_never_change_when_there_is_one_choice():
    space = SearchSpace(2, 4, start_tokens=(16,))
    rng = np.random.default_rng(3)
    assert {mutate(Candidate((0, 0)), space, rng, 1.0).start_index for _ in range(50)} == {0}


def test_crossover_takes_each_gene_from_a_parent_and_repairs_decreases():
    space = SearchSpace(4, 4)
    rng = np.random.default_rng(4)
    a, b = Candidate((1, 1, 1, 9), 0), Candidate((2, 5, 7, 8), 5)
    children = [crossover(a, b, space, rng) for _ in range(500)]
    for child in children:
        assert all(
            k in {a.steps[i], b.steps[i], child.steps[i - 1]} for i, k in enumerate(child.steps)
        )
    assert {child.start_index for child in children} == {0, 5}
    assert (2, 2, 7, 9) in {child.steps for child in children}  # the second gene was repaired
    assert 0.4 < np.mean([child.steps[0] == 1 for child in children]) < 0.6


def test_crossover_of_a_candidate_with_itself_is_itself():
    space, rng = SearchSpace(3, 4), np.random.default_rng(5)
    a = Candidate((1, 2, 3), 4)
    assert crossover(a, a, space, rng) == a


def test_a_random_candidate_is_uniform_over_the_space():
    space = SearchSpace(2, 1, upper=1.03, start_tokens=(0,))
    rng = np.random.default_rng(6)
    counts = Counter(random_candidate(space, rng) for _ in range(5000))
    assert len(counts) == space.size == 10
    assert min(counts.values()) > 400 and max(counts.values()) < 600


def test_unique_returns_a_new_child_untouched():
    space, rng = SearchSpace(3, 4), np.random.default_rng(7)
    child = Candidate((1, 2, 3))
    assert unique(child, space, rng, set()) is child


@pytest.mark.parametrize("kind", [SearchSpace, partial(CriticalSpace, critical_dimensions=(33,))])
@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1.01, 1024.0), seed=seeds, at_bound=st.booleans())
def test_unique_escapes_degenerate_parents_at_any_scale(kind, scale, seed, at_bound):
    """Equal factors at a bound leave mutation almost no room; the released code hangs beyond it."""
    space = kind(64, scale, start_tokens=(0,))
    rng = np.random.default_rng(seed)
    parent = space.encode((2 * scale if at_bound else 1.0,) * 64)
    seen = {parent}
    for _ in range(30):
        child = unique(parent, space, rng, seen)
        assert child is not None and child not in seen
        check_candidate(space, child)
        seen.add(child)


@pytest.mark.parametrize("start_tokens", [(0,), (0, 8)])
def test_in_a_space_of_which_all_was_seen_unique_finds_nothing(start_tokens):
    space = SearchSpace(3, 1, upper=1.03, start_tokens=start_tokens)
    rng, seen = np.random.default_rng(8), set(all_candidates(space))
    start = space.encode((1.0,) * 3)
    assert unique(start, space, rng, seen) is None
    assert unique(start, space, rng, seen - {start}) == start
