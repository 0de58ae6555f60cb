"""What a search extends, by its options and what the model carries."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_longrope.checkpoint.opening import model_config
from megatron_longrope.config import FactorSet, identity_config
from megatron_longrope.factor_search.base import base_of
from megatron_longrope.factor_search.options import SearchOptions

SHAPE = SimpleNamespace(rotary_base=10000.0, rotary_dim=32, max_position_embeddings=4096)
LINEAR = {"rope_type": "linear", "factor": 4.0}
SCALED = identity_config(10000.0, 32, 4096, LINEAR)
TUNED = SCALED.with_factor_set(FactorSet(8192, (2.0,) * 16))


def model(stored=None):
    return SimpleNamespace(shape=SHAPE, longrope=stored, directory="model")


def base(stored=None, **options):
    given = {"load": "model", "data": "x", "output": "y.json", "target_length": 65536, **options}
    return base_of(SearchOptions(**given), model(stored))


@pytest.mark.parametrize("base_config", [None, "none"])
@pytest.mark.parametrize("own", [None, LINEAR])
def test_the_window_of_a_model_without_factors_can_be_given(own, base_config):
    """Vicuna-16k states 4096, its window before the linear scaling."""
    stored = own and SCALED
    longer = identity_config(10000.0, 32, 16384, own)
    assert base(stored, base_config=base_config, original_length=16384) == longer
    assert base(stored, base_config=base_config) == identity_config(10000.0, 32, 4096, own)
    assert model_config(model(stored), 16384) == longer


def test_another_window_than_that_of_the_models_factors_is_refused():
    with pytest.raises(ValueError, match="--original-length 16384 contradicts the factors of mo"):
        base(TUNED, original_length=16384)
    given = base(TUNED, base_config="none", original_length=16384)
    assert given == identity_config(10000.0, 32, 16384, LINEAR)


@pytest.mark.parametrize("stored", [None, SCALED])
def test_a_base_for_another_window_than_a_model_without_factors_has_is_a_warning(stored, tmp_path):
    path, own = str(tmp_path / "factors.json"), stored and LINEAR
    identity_config(10000.0, 32, 8192, own).save(path)
    with pytest.warns(UserWarning, match=f"{path} .* window of 8192 tokens, that of model is 4096"):
        base(stored, base_config=path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base(stored, base_config=path, original_length=8192)
        base(TUNED.with_factor_set(FactorSet(16384, (4.0,) * 16)), base_config=path)
        identity_config(10000.0, 32, 4096, own).save(path)
        base(stored, base_config=path)


@pytest.mark.parametrize("stored", [None, SCALED, TUNED], ids=["plain", "scaled", "factors"])
def test_only_factors_are_announced_as_the_models_own_factors(stored, capsys):
    base(stored)
    printed = capsys.readouterr().out
    if stored is TUNED:
        assert printed.startswith("the base is the model's own factors, for 4096, 8192 tokens (")
        assert printed.endswith("; --base-config none would leave them out\n")
    else:
        assert printed == ""
    base(stored, base_config="none")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (identity_config(10000.0, 64, 4096, LINEAR), "has rotary_dim 64, the model has 32"),
        (identity_config(5e5, 32, 4096, LINEAR), "has rotary_base 500000, the model has 10000"),
        (identity_config(10000.0, 32, 4096), "multiplies plain RoPE, the model has RoPE scaled by"),
    ],
)
def test_another_models_factors_are_no_base(other, message, tmp_path):
    path = str(tmp_path / "factors.json")
    TUNED.save(path)
    of_a_list = replace(TUNED, base_frequencies=None)  # which says nothing of what it multiplies
    assert base(SCALED, base_config=path) == base(of_a_list, base_config=path) == TUNED
    other.save(path)
    with pytest.raises(ValueError, match=message):
        base(SCALED, base_config=path)
