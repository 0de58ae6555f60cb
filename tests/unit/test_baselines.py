import pytest

from megatron_longrope.baselines import METHODS, baseline_config
from megatron_longrope.frequencies import ntk_factors


@pytest.mark.parametrize("method", METHODS)
def test_within_the_original_window_every_method_is_plain_rope(method):
    config = baseline_config(method, 10000.0, 32, 256, 256, "su")
    assert [item.max_length for item in config.factor_sets] == [256]
    assert config.factor_sets[0].is_identity and config.attention_factor_for(256) == 1.0


def test_beyond_it_the_methods_factors_and_the_policy_apply():
    config = baseline_config("ntk", 10000.0, 32, 256, 2048, "su")
    assert config.factor_set_for(2048).rescale_factors == tuple(ntk_factors(32, 8.0))
    assert config.factor_set_for(256).is_identity
    assert config.attention_factor_for(2048) == pytest.approx(1.1726, abs=1e-4)


def test_none_extends_the_window_without_rescaling():
    config = baseline_config("none", 10000.0, 32, 256, 8192)
    assert config.factor_set_for(8192).is_identity and config.max_length == 8192


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown method 'alibi'"):
        baseline_config("alibi", 10000.0, 32, 256, 2048)
