import pytest

from megatron_longrope.baselines import extended_config, extension
from megatron_longrope.config import FactorSet, identity_config
from megatron_longrope.factor_search.problem import make_problem
from megatron_longrope.frequencies import attention_factor
from megatron_longrope.methods import METHODS, ntk_factors, yarn_factors

PLAIN = identity_config(10000.0, 32, 256)


@pytest.mark.parametrize("method", METHODS)
def test_within_the_original_window_every_method_is_plain_rope(method):
    config = extended_config(method, PLAIN, 256, "su")
    assert [item.max_length for item in config.factor_sets] == [256]
    assert config.factor_sets[0].is_identity and config.attention_factor_for(256) == 1.0


def test_beyond_it_the_methods_factors_and_the_policy_apply():
    config = extended_config("ntk", PLAIN, 2048, "su")
    assert config.factor_set_for(2048).rescale_factors == tuple(ntk_factors(32, 8.0))
    assert config.factor_set_for(256).is_identity
    assert config.attention_factor_for(2048) == pytest.approx(1.1726, abs=1e-4)


@pytest.mark.parametrize("base", [1e4, 5e5, 5e6])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_valid_configuration_from_2x_to_512x(method, base):
    plain = identity_config(base, 128, 4096)
    for ratio in (2, 4, 8, 16, 32, 128, 512):
        assert extended_config(method, plain, 4096 * ratio).max_length == 4096 * ratio


def test_none_extends_the_window_without_rescaling():
    config = extended_config("none", PLAIN, 8192)
    assert config.factor_set_for(8192).is_identity and config.max_length == 8192


@pytest.fixture
def tuned():
    """A model that was tuned for 2048 tokens under YaRN's factors and the su attention factor."""
    factors = tuple(yarn_factors(32, 8.0, 10000.0, 256))
    return PLAIN.with_factor_set(FactorSet(2048, factors, num_start_tokens=4))


@pytest.mark.parametrize("method", METHODS)
def test_within_a_tuned_models_window_every_method_is_the_model(tuned, method):
    assert extended_config(method, tuned, 2048) == extended_config(method, tuned, 64) == tuned


def test_on_a_tuned_model_a_method_multiplies_the_factors_it_was_tuned_with(tuned):
    mine = tuned.factor_sets[-1].rescale_factors
    config = extended_config("pi", tuned, 8192)
    assert config.factor_sets[:2] == tuned.factor_sets
    assert config.factor_set_for(8192).rescale_factors == tuple(4.0 * value for value in mine)
    assert config.factor_set_for(8192).num_start_tokens == 4
    # What fewer than one rotation of the tuned frequencies fills, YaRN slows by the whole ratio.
    ratios = [
        a / b
        for a, b in zip(
            extended_config("yarn", tuned, 8192).factor_sets[-1].rescale_factors, mine, strict=True
        )
    ]
    rotations = [2048 / (6.283185307 * mine[i] * 10000.0 ** (i / 16)) for i in range(16)]
    assert all(ratio == 4.0 for ratio, turns in zip(ratios, rotations, strict=True) if turns < 1)
    assert ratios[0] == 1.0 and sum(turns < 1 for turns in rotations) >= 8


def test_yarn_has_its_own_temperature_and_the_others_have_none(tuned):
    own = {name: extended_config(name, PLAIN, 2048) for name in METHODS}
    assert own["yarn"].attention_factor_for(2048) == attention_factor("yarn", 8.0, 256)
    assert {own[name].attention_factor_for(2048) for name in METHODS if name != "yarn"} == {1.0}
    # On a tuned model they come on top of the value that it was tuned with.
    value = tuned.attention_factor_for(2048)
    assert extended_config("pi", tuned, 8192).attention_factor_for(8192) == value
    expected = value * attention_factor("yarn", 4.0, 256)
    assert extended_config("yarn", tuned, 8192).attention_factor_for(8192) == expected
    assert extended_config("yarn", tuned, 8192, "none").attention_factor_for(8192) == 1.0


def test_on_a_base_that_scales_rope_itself_rotations_are_those_of_its_own_frequencies():
    own = {"rope_type": "linear", "factor": 4.0}
    base = identity_config(10000.0, 32, 1024, own)
    # Slowed by 4 in 4 x 256 tokens, every dimension rotates as in 256 tokens of plain RoPE.
    expected = yarn_factors(32, 8.0, 10000.0, 256)
    assert extension("yarn", base, 8192).rescale_factors == pytest.approx(expected, rel=1e-12)
    assert make_problem(base, 8192, space="floored").space.floor_dimension == 7
