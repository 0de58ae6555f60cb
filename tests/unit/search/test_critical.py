"""LongRoPE2's space: the theory's numbers, and NTK below them."""

import math

import numpy as np
import pytest
from candidates import all_candidates, check_candidate
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longrope.config import identity_config
from megatron_longrope.factor_search.critical import (
    CriticalSpace,
    critical_choices,
    critical_seeds,
    first_incomplete,
)
from megatron_longrope.factor_search.operators import crossover, mutate, random_candidate
from megatron_longrope.factor_search.space import Candidate

QUICK = settings(max_examples=50, deadline=None)
LLAMA3 = CriticalSpace(64, 16.0, critical_dimensions=tuple(range(24, 36)))


@st.composite
def spaces(draw) -> CriticalSpace:
    num_factors = draw(st.integers(1, 64))
    dimensions = draw(st.sets(st.integers(0, num_factors - 1), min_size=1, max_size=12))
    return CriticalSpace(
        num_factors,
        draw(st.floats(1.01, 1024.0)),
        critical_dimensions=tuple(sorted(dimensions)),
    )


seeds = st.integers(0, 2**32)


# Theory


@pytest.mark.parametrize(
    ("rotary_dim", "rotary_base", "window", "one_period", "ten_periods"),
    [
        pytest.param(96, 1e4, 2048, 31, 19, id="Phi3-mini"),
        pytest.param(128, 5e5, 8192, 35, 24, id="LLaMA3-8B"),
        pytest.param(128, 1e4, 4096, 46, 30, id="LLaMA2-7B"),
    ],
)
def test_the_critical_dimensions_are_the_papers(
    rotary_dim, rotary_base, window, one_period, ten_periods
):
    base = identity_config(rotary_base, rotary_dim, window)
    assert critical_choices(base) == tuple(range(ten_periods, one_period + 1))


def test_the_critical_dimensions_of_a_model_that_scales_rope_itself_are_those_of_its_own_periods():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    base = identity_config(5e5, 128, 131072, scaling)
    periods = [
        131072 / (2 * math.pi * factor * 5e5 ** (i / 64))
        for i, factor in enumerate(base.base_factors)
    ]
    choices = critical_choices(base)
    assert choices == tuple(range(33, 40)) and periods[38] >= 1 > periods[39]
    assert periods[choices[0] - 1] >= 10 > periods[choices[0]]


@QUICK
@given(
    half=st.integers(2, 128),
    rotary_base=st.floats(500, 1e7),
    window=st.integers(64, 32768),
    periods=st.sampled_from([1, 10]),
)
def test_the_critical_dimension_is_the_first_that_misses_its_periods(
    half, rotary_base, window, periods
):
    def count(i: int) -> float:
        return window / (2 * math.pi * rotary_base ** (i / half))

    base = identity_config(rotary_base, 2 * half, window)
    found = first_incomplete(base, window, (1.0,) * half, periods)
    if found is None:
        assert count(half - 1) >= periods * (1 - 1e-9)
        return
    assert count(found) < periods * (1 + 1e-9)
    assert found == 0 or count(found - 1) > periods * (1 - 1e-9)


# Factors


def test_ntk_below_the_critical_dimension_is_the_released_codes():
    space = CriticalSpace(64, 16.0, critical_dimensions=(33,))
    factors, start_tokens = space.decode(space.encode((21.81,) * 64))
    assert start_tokens == 0 and factors[33:] == (21.81,) * 31
    ext = 21.81 ** (64 / 33)
    assert ext == pytest.approx(394.62, abs=0.005)
    assert factors[:33] == pytest.approx([ext ** (i / 64) for i in range(33)], abs=1e-9)
    assert next(i for i, value in enumerate(factors) if value > 16) == 30
    assert factors[30] == pytest.approx(16.48, abs=0.005)


def test_genes_run_from_the_extension_ratio_to_twice_it():
    space = CriticalSpace(4, 4.0, critical_dimensions=(2,))
    assert (space.lower, space.upper, space.min_step, space.max_step) == (4.0, 8.0, 300, 700)
    lowest = space.encode((1.0,) * 4)
    assert lowest == Candidate((300,) * 4) and space.decode(lowest)[0] == (1.0, 2.0, 4.0, 4.0)
    assert space.decode(space.encode((99.0,) * 4))[0][2:] == (8.0, 8.0)


def test_an_extension_ratio_off_the_grid_is_rounded_up():
    space = CriticalSpace(2, 4.001, critical_dimensions=(1,))
    assert space.decode(space.encode((1.0, 1.0)))[0] == (1.0, 4.01)


def test_without_dimensions_below_it_every_factor_is_a_gene():
    space = CriticalSpace(2, 2.0, critical_dimensions=(0,))
    assert space.decode(space.encode((2.5, 3.5)))[0] == (2.5, 3.5)


@QUICK
@given(space=spaces(), seed=seeds)
def test_every_candidate_is_one_that_a_configuration_accepts(space, seed):
    candidate = random_candidate(space, np.random.default_rng(seed))
    factors, start_tokens = space.decode(candidate)
    assert start_tokens == 0 and all(type(value) is float for value in factors)
    assert list(factors) == sorted(factors) and factors[0] >= 1.0
    first = space.critical_dimensions[candidate.start_index]
    assert factors[first] >= space.scale - 1e-7 and factors[-1] <= 2 * space.scale
    on_grid = np.array(factors[first:-1]) * 100
    assert np.allclose(on_grid, np.round(on_grid), atol=1e-6)


@QUICK
@given(space=spaces(), data=st.data())
def test_encode_always_lands_inside_the_space(space, data):
    values = st.lists(st.floats(-5, 3000), min_size=space.num_factors, max_size=space.num_factors)
    factors = data.draw(values)
    candidate = space.encode(factors)
    check_candidate(space, candidate)
    for other in space.choices(candidate):
        check_candidate(space, other)
    nearest = space._nearest_steps(factors)
    for index in range(space.num_choices):
        other = space._rounded(nearest, index)
        assert log_distance(space, candidate, factors) <= log_distance(space, other, factors)


def log_distance(space, candidate, factors) -> float:
    logs = [math.log(max(value, 1.0)) for value in factors]
    return math.dist(logs, [math.log(value) for value in space.decode(candidate)[0]])


def test_encode_finds_the_critical_dimension_of_a_curve():
    for index, dimension in enumerate(LLAMA3.critical_dimensions):
        curve = [20.0 ** min(i / dimension, 1.0) for i in range(64)]
        assert LLAMA3.encode(curve).start_index == index


def test_steps_below_the_critical_dimension_do_not_tell_candidates_apart():
    space = CriticalSpace(4, 4.0, critical_dimensions=(1, 2))
    canonical = space.canonical(Candidate((17, 350, 400, 500), 1))
    assert canonical == Candidate((300, 300, 400, 500), 1)
    check_candidate(space, canonical)


@pytest.mark.parametrize("dimensions", [(0,), (1,), (0, 1, 2), (2,)])
def test_the_size_is_the_number_of_candidates(dimensions):
    space = CriticalSpace(3, 2.0, upper=2.05, critical_dimensions=dimensions)
    assert len(list(all_candidates(space))) == space.size


# Operators


def test_mutation_draws_only_genes_and_leaves_the_rest_at_the_lowest_step():
    space = CriticalSpace(4, 4.0, critical_dimensions=(2,))
    rng = np.random.default_rng(0)
    parent = Candidate((300, 300, 320, 330))
    children = [mutate(parent, space, rng, 1.0).steps for _ in range(2000)]
    assert {steps[:2] for steps in children} == {(300, 300)}
    assert {steps[2] for steps in children} == set(range(300, 331))
    assert max(steps[3] for steps in children) > 690


def test_in_a_crossover_only_genes_push_later_genes_up():
    space = CriticalSpace(3, 2.0, critical_dimensions=(0, 2))
    rng = np.random.default_rng(3)
    a, b = Candidate((290, 290, 290), 0), Candidate((100, 100, 110), 1)
    children = [crossover(a, b, space, rng) for _ in range(200)]
    short = {child.steps for child in children if child.start_index == 1}
    assert short == {(100, 100, 110), (100, 100, 290)}


# Seeds


def test_every_critical_dimension_has_a_seed_of_constant_factors():
    seeds = critical_seeds(LLAMA3)
    assert len(seeds) == 12 and len(set(seeds.values())) == 12
    assert {item.start_index for item in seeds.values()} == set(range(12))
    factors = LLAMA3.decode(seeds["cd26x1.25"])[0]
    assert factors[26:] == (20.0,) * 38
    for candidate in seeds.values():
        check_candidate(LLAMA3, candidate)


def test_a_given_critical_dimension_has_the_released_codes_eight_seeds():
    space = CriticalSpace(64, 32.0, critical_dimensions=(33,))
    tops = [space.decode(item)[0][-1] for item in critical_seeds(space).values()]
    assert tops == [32.0, 36.0, 40.0, 44.0, 48.0, 52.0, 56.0, 60.0]


def test_seeds_stay_within_a_lower_bound():
    space = CriticalSpace(8, 4.0, upper=5.0, critical_dimensions=(5,))
    tops = [space.decode(item)[0][-1] for item in critical_seeds(space).values()]
    assert tops == [4.0, 4.5, 5.0]
