"""Candidates live on an integer grid; floats appear only at the border."""

import math

from candidates import all_candidates, check_candidate
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longrope.factor_search.space import Candidate, SearchSpace

QUICK = settings(max_examples=60, deadline=None)
scales = st.floats(1.01, 1024.0)


def test_the_defaults_are_table_4_of_the_paper():
    space = SearchSpace(num_factors=64, scale=4)
    assert space.start_tokens == (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
    assert (space.step, space.upper, space.max_step) == (0.01, 5.0, 400)  # 400 steps above 1


def test_the_bound_itself_is_a_grid_point_despite_rounding():
    # (1.13 - 1) / 0.01 is 12.99999999999999 in floating point.
    for k in range(1, 400):
        assert SearchSpace(2, 1, upper=1 + k / 100).max_step == k
    assert SearchSpace(2, 1, upper=1.139).max_step == 13
    assert SearchSpace(2, 1024).max_step == 127_900


def test_decode_gives_clean_floats_and_plain_python_types():
    space = SearchSpace(3, 8)
    factors, start_tokens = space.decode(Candidate((0, 29, 900), 3))
    assert factors == (1.0, 1.29, 10.0)
    assert start_tokens == 4
    assert all(type(value) is float for value in factors)


def test_encode_rounds_clips_and_removes_decreases():
    space = SearchSpace(5, 2)  # upper 2.5
    candidate = space.encode((0.9, 1.174, 1.16, 1.156, 7.0), 30)
    assert candidate.steps == (0, 17, 17, 17, 150)
    assert space.start_tokens[candidate.start_index] == 28  # 28 and 32 tie; the smaller one


def test_encode_without_start_tokens_drops_them():
    assert SearchSpace(1, 2, start_tokens=(0,)).encode((1.0,), 64) == Candidate((0,), 0)


@QUICK
@given(scale=scales, factors=st.lists(st.floats(-5, 2000), min_size=4, max_size=4))
def test_encode_always_lands_inside_the_space(scale, factors):
    space = SearchSpace(4, scale)
    candidate = space.encode(factors)
    check_candidate(space, candidate)
    decoded, _ = space.decode(candidate)
    assert list(decoded) == sorted(decoded)
    assert decoded[0] >= 1.0 and decoded[-1] <= space.upper + 1e-7


def test_the_size_is_the_number_of_candidates():
    space = SearchSpace(3, 1, upper=1.04, start_tokens=(0, 4))
    assert len(set(all_candidates(space))) == space.size == 2 * math.comb(7, 3)


# A floor under the slow dimensions


def test_from_the_floors_dimension_on_factors_reach_the_extension_ratio():
    floored = SearchSpace(4, 2.0, floor_dimension=2)
    assert floored.decode(floored.encode((1.0, 1.5, 1.6, 2.2)))[0] == (1.0, 1.5, 2.0, 2.2)
