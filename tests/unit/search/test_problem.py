import warnings

import numpy as np
import pytest

from megatron_longrope.config import FactorSet, identity_config
from megatron_longrope.factor_search.critical import CriticalSpace
from megatron_longrope.factor_search.operators import random_candidate
from megatron_longrope.factor_search.problem import make_problem
from megatron_longrope.methods import yarn_factors

DIM, BASE, ORIGINAL = 32, 10000.0, 256


@pytest.fixture
def plain():
    return identity_config(BASE, DIM, ORIGINAL)


@pytest.fixture
def extended(plain):
    factors = tuple(1.0 + 7.0 * i / 15 for i in range(16))
    return plain.with_factor_set(FactorSet(2048, factors, origin={"method": "test"}))


def test_a_first_search_has_the_papers_space_and_seeds(plain):
    problem = make_problem(plain, 2048)
    assert problem.stage == "first"
    assert problem.space.scale == 8 and problem.space.max_step == 900  # (1.25 * 8 - 1) / 0.01
    assert set(problem.seeds) == {"pi", "ntk", "yarn"}
    assert problem.config(problem.seeds["pi"]).factor_set_for(2048).rescale_factors == (8.0,) * 16


def test_a_second_search_multiplies_the_fine_tuned_factors(extended):
    problem = make_problem(extended, 8192)
    assert problem.stage == "second" and problem.space.scale == 4
    config = problem.config(problem.seeds["pi"], {"method": "x"})
    base = extended.factor_set_for(2048).rescale_factors
    assert config.factor_set_for(8192).rescale_factors == tuple(4.0 * value for value in base)
    assert config.factor_set_for(2048) == extended.factor_set_for(2048)
    assert config.factor_set_for(8192).origin == {"method": "x"}


def test_a_second_search_multiplies_the_running_maximum_of_factors_that_decrease(plain):
    tuned = plain.with_factor_set(FactorSet(2048, (4.0, 3.0, *(8.0,) * 14)))
    with pytest.warns(UserWarning, match="factors for 2048 tokens decrease in places"):
        problem = make_problem(tuned, 8192)
    found = problem.config(problem.space.encode([2.0] * 16))
    assert [item.rescale_factors[1] for item in found.factor_sets] == [1.0, 3.0, 8.0]


def test_yarn_starts_a_second_search_at_the_rotations_of_the_tuned_frequencies(plain):
    tuned = plain.with_factor_set(FactorSet(2048, (8.0,) * 16))
    problem = make_problem(tuned, 8192)
    # A uniform slowing leaves the rotations as they were, and with them YaRN's ramp.
    expected = [8.0 * value for value in yarn_factors(DIM, 4.0, BASE, ORIGINAL)]
    got = problem.config(problem.seeds["yarn"]).factor_set_for(8192).rescale_factors
    assert got == pytest.approx(expected, rel=1e-12)


def test_a_published_method_is_scored_as_it_is_and_not_as_its_nearest_grid_point(plain):
    problem = make_problem(plain, 2048)
    expected = tuple(yarn_factors(DIM, 8.0, BASE, ORIGINAL))
    assert problem.space.decode(problem.seeds["yarn"])[0] != expected
    assert problem.factor_set(problem.seeds["yarn"]).rescale_factors == expected
    assert problem.factor_set(problem.references["yarn"]).rescale_factors == expected


def test_a_recovery_searchs_bound_covers_the_factors_that_the_base_has(extended):
    problem = make_problem(extended, 256)
    assert problem.stage == "recovery" and make_problem(extended, 512).space.scale == 1.0
    assert problem.space.decode(problem.space.encode([99.0] * 16))[0] == (8.0,) * 16
    config = problem.config(problem.seeds["longest"])
    longest = extended.factor_set_for(2048)
    assert config.factor_set_for(256).rescale_factors == longest.rescale_factors
    assert config.factor_set_for(2048) == longest
    assert "near-longest" in make_problem(extended, 256, upper=7.8).seeds


def test_a_recovery_starts_from_every_set_of_the_base(extended):
    """After second searches the tuned window's set is neither the current nor the longest one."""
    base = extended.with_factor_set(FactorSet(4096, (1.0,) * 15 + (20.0,), num_start_tokens=4))
    base = base.with_factor_set(FactorSet(8192, (1.5,) * 8 + (12.0,) * 8))
    problem = make_problem(base, 256)
    for name, window in (("base-2k", 2048), ("base-4k", 4096), ("longest", 8192)):
        item = base.factor_set_for(window)
        for found in (problem.references[name], problem.seeds[name]):
            got = problem.factor_set(found)
            assert got.rescale_factors == item.rescale_factors
            assert got.num_start_tokens == item.num_start_tokens
    assert set(problem.references) == {"none", "base-2k", "base-4k", "longest"}
    assert problem.space.upper == 20.0


def test_under_a_lower_bound_a_clipped_seed_has_another_name_and_the_whole_set_is_kept(extended):
    problem = make_problem(extended, 256, upper=3.0)
    assert "longest" not in problem.seeds
    assert max(problem.factor_set(problem.seeds["near-longest"]).rescale_factors) == 3.0
    longest = extended.factor_set_for(2048).rescale_factors
    assert problem.factor_set(problem.references["longest"]).rescale_factors == longest


def test_a_warm_start_is_another_searchs_winner_extended_as_yarn_would(extended):
    half = make_problem(extended, 4096)
    winner = half.config(half.space.encode([1.5] * 8 + [2.0] * 8))
    problem = make_problem(extended, 8192, warm_start=winner)
    got = problem.factor_set(problem.references["warm"]).rescale_factors
    mine = winner.factor_sets[-1].rescale_factors
    further = yarn_factors(DIM, 2.0, BASE, 4096, rescale_factors=mine)
    assert got == pytest.approx([a * b for a, b in zip(mine, further, strict=True)], rel=1e-12)
    assert "warm" in problem.seeds or "near-warm" in problem.seeds
    # The other way round it is taken as it is.
    shorter = make_problem(extended, 4096, warm_start=problem.config(problem.references["warm"]))
    assert shorter.references["warm"].rescale_factors == got
    with pytest.raises(ValueError, match="no factors beyond the base's 2048 tokens"):
        make_problem(extended, 4096, warm_start=extended)
    with pytest.raises(ValueError, match="a recovery starts from the base's own"):
        make_problem(extended, 256, warm_start=winner)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (identity_config(20000.0, DIM, ORIGINAL), "rotary_base 20000.0 and the base has 10000.0"),
        (identity_config(BASE, 2 * DIM, ORIGINAL), "rotary_dim 64 and the base has 32"),
        (identity_config(BASE, DIM, 512), "original_max_position_embeddings 512 and the base has"),
        (
            identity_config(BASE, DIM, ORIGINAL, {"rope_type": "linear", "factor": 2.0}),
            "base_frequencies {'rope_type': 'linear', 'factor': 2.0} and the base has None",
        ),
    ],
)
def test_another_models_factors_are_no_warm_start(extended, other, message):
    other = other.with_factor_set(FactorSet(4096, (2.0,) * (other.rotary_dim // 2)))
    with pytest.raises(ValueError, match=message):
        make_problem(extended, 8192, warm_start=other)


def test_seeds_that_coincide_are_searched_once(extended):
    # The base's short set is all ones, which is also what `none` is.
    assert set(make_problem(extended, 256).seeds) == {"none", "longest"}


def test_a_pinned_attention_factor_holds_for_every_window(plain):
    problem = make_problem(plain, 2048).with_attention(1.25, "su")
    config = problem.config(problem.seeds["ntk"])
    assert config.attention_factor_for(100) == config.attention_factor_for(2048) == 1.25


def test_a_plain_model_has_nothing_to_recover(plain):
    with pytest.raises(ValueError, match="nothing to search"):
        make_problem(plain, 256)


def test_a_target_below_the_original_window_is_refused(extended):
    with pytest.raises(ValueError, match="below the original window 256"):
        make_problem(extended, 128)


@pytest.mark.parametrize("scale", [1.5, 32])
def test_a_second_search_outside_2x_to_16x_warns_once_and_runs(extended, scale):
    with pytest.warns(UserWarning, match="outside the 2x to 16x of the paper") as caught:
        problem = make_problem(extended, int(2048 * scale))
    assert len(caught) == 1 and problem.stage == "second"


def test_searches_within_the_papers_range_do_not_warn(plain, extended):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_problem(plain, 256 * 64)
        make_problem(extended, 4096)
        make_problem(extended, 2048 * 16)
        make_problem(extended, 256)


def test_the_floor_begins_where_no_period_is_completed_and_changes_ntk_but_not_yarn(plain):
    problem = make_problem(plain, 2048, space="floored")
    # 256 / (2 pi 10000^(i / 16)) rotations: 1.29 in dimension 6, 0.72 in 7.
    assert problem.space.floor_dimension == 7
    assert set(problem.seeds) == {"pi", "near-ntk", "yarn"}
    raised = problem.factor_set(problem.seeds["near-ntk"]).rescale_factors
    assert raised[6] == pytest.approx(8.0 ** (12 / 30), abs=0.01) and raised[7:] == (8.0,) * 9
    ntk = problem.factor_set(problem.references["ntk"]).rescale_factors
    assert ntk[7] == pytest.approx(8.0 ** (14 / 30))
    assert make_problem(plain, 2048, space="floored", critical_dimension=9).space.lowest(8) == 0


def test_a_floored_search_for_retrieval_also_starts_from_the_slowest_factors(plain, extended):
    def starts(base, length, **options):
        problem = make_problem(base, length, for_retrieval=True, **options)
        return {name: problem.space.decode(seed)[0] for name, seed in problem.seeds.items()}

    added = starts(plain, 2048, space="floored")
    assert set(added) == {"cd7x1.25", "pi", "near-ntk", "yarn"}
    assert added["cd7x1.25"] == pytest.approx([10.0 ** min(i / 7, 1) for i in range(16)], abs=0.005)
    assert starts(plain, 2048, space="floored", upper=12.0)["cd7x1.5"][-1] == 12.0
    # Of a second search on top of what was tuned; of others none.
    assert "cd7x1.25" in starts(plain.with_factor_set(FactorSet(2048, (8.0,) * 16)), 8192,
                                space="floored")  # fmt: skip
    assert set(starts(plain, 2048)) == {"pi", "ntk", "yarn"}
    assert "cd7x1" not in starts(plain, 2048, space="floored", upper=8.0)
    assert "pi" in starts(plain, 2048, space="floored", critical_dimension=0)
    assert set(starts(extended, 256, space="floored")) == {"none", "longest"}


def test_the_floor_of_a_second_search_counts_on_the_tuned_frequencies(plain):
    tuned = plain.with_factor_set(FactorSet(2048, (8.0,) * 16))
    assert make_problem(tuned, 8192, space="floored").space.floor_dimension == 7
    untouched = plain.with_factor_set(FactorSet(2048, (1.0,) * 16))
    assert make_problem(untouched, 8192, space="floored").space.floor_dimension == 11
    assert make_problem(tuned, 256, space="floored").space.floor_dimension is None  # a recovery


# LongRoPE2's space


def test_the_critical_space_has_algorithm_1s_dimensions_bounds_and_seeds(plain):
    problem = make_problem(plain, 2048, space="critical")
    space = problem.space
    assert isinstance(space, CriticalSpace) and problem.stage == "first"
    assert space.critical_dimensions == (3, 4, 5, 6, 7)
    assert (space.scale, space.lower, space.upper) == (8, 8.0, 16.0)
    assert {item.start_index for item in problem.seeds.values()} == set(range(5))
    assert len(set(problem.seeds.values())) == len(problem.seeds)
    assert "cd4x1.125" in problem.seeds
    factors = problem.config(problem.seeds["cd4x1.125"]).factor_set_for(2048)
    assert factors.rescale_factors[4:] == (9.0,) * 12 and factors.num_start_tokens == 0


def test_published_methods_are_seeds_under_the_name_of_an_approximation(plain):
    problem = make_problem(plain, 2048, space="critical", critical_dimension=6)
    assert {name for name in problem.seeds if not name.startswith("cd")} <= {
        "near-pi",
        "near-ntk",
        "near-yarn",
    }
    assert problem.space.critical_dimensions == (6,)


def test_a_second_search_in_the_critical_space_ranges_over_the_further_extension(extended):
    problem = make_problem(extended, 8192, space="critical")
    assert problem.stage == "second"
    assert (problem.space.lower, problem.space.upper) == (4.0, 8.0)
    assert problem.space.critical_dimensions == (3, 4, 5, 6, 7)  # of the pre-training window
    base = extended.factor_set_for(2048).rescale_factors
    got = problem.config(problem.seeds["cd7x1.5"]).factor_set_for(8192).rescale_factors
    assert got[7:] == tuple(6.0 * value for value in base[7:])


@pytest.mark.parametrize("space", ["floored", "full", "critical"])
@pytest.mark.parametrize("largest", [8.0, 9.6, 12.7, 14.3, 17.3])
def test_no_candidate_of_a_second_search_exceeds_the_configurations_bound(plain, largest, space):
    """2 x the extension ratio; of a base that is over it already (Phi-3), as far over it."""
    bound = 64.0 if largest <= 16 else 8.0 * largest
    base = plain.with_factor_set(FactorSet(2048, (largest,) * 16))
    problem = make_problem(base, 8192, space=space)
    rng = np.random.default_rng(0)
    top = problem.space.encode((1e6,) * 16)
    for candidate in (top, *(random_candidate(problem.space, rng) for _ in range(50))):
        assert max(problem.config(candidate).factor_set_for(8192).rescale_factors) <= bound


def test_a_base_at_its_bound_leaves_the_critical_space_empty(plain):
    base = plain.with_factor_set(FactorSet(2048, (16.0,) * 16))
    with pytest.raises(ValueError, match="largest factor 16 leaves candidates up to 4"):
        make_problem(base, 8192, space="critical")
    make_problem(base, 8192)


def test_an_upper_over_the_configurations_bound_is_refused_before_the_search(plain, extended):
    assert make_problem(plain, 2048, upper=16.0).space.max_step == 1500
    with pytest.raises(ValueError, match=r"upper 16.5 admits .*; give at most 16"):
        make_problem(plain, 2048, upper=16.5)
    with pytest.raises(ValueError, match="upper 17 admits"):
        make_problem(extended, 256, upper=17)


def test_recovery_in_the_critical_space_is_refused(extended):
    with pytest.raises(ValueError, match="only extends"):
        make_problem(extended, 256, space="critical")


def test_an_unknown_space_is_refused(plain):
    with pytest.raises(ValueError, match="space 'critcal' is unknown; choose one of floored, full"):
        make_problem(plain, 2048, space="critcal")


def test_a_window_longer_than_every_period_has_no_critical_dimension():
    with pytest.raises(ValueError, match="none is critical"):
        make_problem(identity_config(100.0, 8, 4096), 8192, space="critical")
