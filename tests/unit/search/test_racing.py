"""Races stop what cannot matter, and report a score that the incumbent beats."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longrope.factor_search.racing import losing_bound

LOSSES = st.lists(st.floats(0.0, 20.0), min_size=2, max_size=8)


@given(losses=LOSSES, incumbent=LOSSES)
def test_only_who_loses_is_stopped_at_a_bound_between_the_incumbent_and_itself(losses, incumbent):
    size = min(len(losses), len(incumbent))
    losses, incumbent = losses[:size], incumbent[:size]
    for count in range(1, size + 1):
        bound = losing_bound(losses[:count], incumbent)
        if bound is not None:
            assert count < size and math.fsum(losses) > math.fsum(incumbent)
            assert math.fsum(incumbent) / size <= bound <= math.fsum(losses) / size


def test_a_candidate_is_stopped_at_the_first_sample_that_settles_it():
    incumbent = [1.0, 1.0, 1.0, 1.0]
    assert losing_bound([2.0, 1.9], incumbent) is None
    assert losing_bound([2.0, 1.9, 0.2], incumbent) == pytest.approx(4.1 / 4)


def test_equal_sums_are_no_defeat():
    assert losing_bound([2.0, 2.0], [1.0, 1.0, 1.0, 1.0]) is None


def test_a_candidate_with_all_its_samples_is_never_stopped():
    assert losing_bound([9.0, 9.0], [1.0, 1.0]) is None
