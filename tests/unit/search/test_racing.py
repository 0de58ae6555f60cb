"""Races stop what cannot matter, and report a score that the incumbent beats."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longrope.factor_search.racing import Race

LOSSES = st.lists(st.floats(0.0, 20.0), min_size=2, max_size=8)


def first_verdict(race, losses, incumbent):
    """What the race says at the first sample where it says anything."""
    for count in range(1, len(losses) + 1):
        if verdict := race.lost(losses[:count], incumbent):
            return count, *verdict
    return None


@given(losses=LOSSES, incumbent=LOSSES)
def test_the_exact_rule_stops_only_who_loses_and_reports_a_bound_above_the_incumbent(
    losses, incumbent
):
    size = min(len(losses), len(incumbent))
    losses, incumbent = losses[:size], incumbent[:size]
    verdict = first_verdict(Race("exact"), losses, incumbent)
    if verdict is None:
        return
    count, rule, bound = verdict
    assert rule == "exact" and count < size
    assert math.fsum(incumbent) / size <= bound <= math.fsum(losses) / size
    assert math.fsum(losses) > math.fsum(incumbent)


def test_the_exact_rule_stops_at_the_first_sample_that_settles_it():
    incumbent = [1.0, 1.0, 1.0, 1.0]
    assert Race("exact").lost([2.0, 1.9], incumbent) is None
    assert Race("exact").lost([2.0, 1.9, 0.2], incumbent) == ("exact", pytest.approx(4.1 / 4))


def test_equal_sums_are_no_defeat():
    assert Race("exact").lost([2.0, 2.0], [1.0, 1.0, 1.0, 1.0]) is None


def test_a_candidate_with_all_its_samples_is_never_stopped():
    for rule in ("exact", "paired", "off"):
        assert Race(rule).lost([9.0, 9.0], [1.0, 1.0]) is None


def test_off_stops_nobody():
    assert Race("off").lost([9.0], [1.0, 1.0]) is None


@given(losses=LOSSES, incumbent=LOSSES)
def test_whoever_a_paired_race_stops_is_reported_above_the_incumbent(losses, incumbent):
    size = min(len(losses), len(incumbent))
    losses, incumbent = losses[:size], incumbent[:size]
    verdict = first_verdict(Race("paired"), losses, incumbent)
    if verdict is not None:
        assert verdict[2] >= math.fsum(incumbent) / size


def test_a_steady_difference_ends_a_paired_race_after_two_samples():
    incumbent = [3.0, 4.0, 5.0, 6.0, 7.0]
    rule, estimate = Race("paired").lost([3.1, 4.101], incumbent)
    assert rule == "paired" and estimate == pytest.approx(5.1005)
    assert Race("paired").lost([3.1], incumbent) is None
    assert Race("paired").lost([3.1, 4.0], incumbent) is None  # too uneven to tell
    assert Race("paired").lost([2.9, 3.899], incumbent) is None  # better


def test_the_paired_margin_is_that_of_the_t_table():
    # One-sided 5 % with 4 degrees of freedom: 2.132.
    differences = [0.1, 0.3, 0.2, 0.5, 0.15]
    error = statistics.stdev(differences) / math.sqrt(5)
    incumbent = [1.0] * 6

    def shifted(margin):
        mean = statistics.fmean(differences)
        return [1.0 + value - mean + margin * error for value in differences]

    assert Race("paired").lost(shifted(2.12), incumbent) is None
    assert Race("paired").lost(shifted(2.14), incumbent) is not None


def test_equal_candidates_are_stopped_about_as_often_as_the_significance_says():
    rng = random.Random(0)
    race, incumbent = Race("paired", 0.05), [3.0] * 5
    stopped = sum(
        race.lost([rng.gauss(3, 0.1) for _ in range(3)], incumbent) is not None for _ in range(4000)
    )
    assert 0.035 < stopped / 4000 < 0.065
