import pytest

from megatron_longrope.config import FactorSet, identity_config
from megatron_longrope.search.problem import make_problem

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


def test_a_recovery_search_replaces_the_short_set_under_a_reduced_bound(extended):
    problem = make_problem(extended, 256)
    assert problem.stage == "recovery"
    assert problem.space.decode(problem.space.encode([99.0] * 16))[0] == (3.0,) * 16
    config = problem.config(problem.seeds["longest"])
    assert max(config.factor_set_for(256).rescale_factors) == 3.0
    assert config.factor_set_for(2048) == extended.factor_set_for(2048)


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
