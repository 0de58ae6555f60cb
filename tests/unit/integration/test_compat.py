"""Symbols know what the plugin relies on, and every tested release has it."""

import functools
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_longrope.integration import compat
from megatron_longrope.integration.compat import Symbol

pytest.importorskip("megatron.core")


@pytest.fixture
def fits(monkeypatch):
    """A symbol whose function has the given parameters, compared with what we rely on."""
    module = ModuleType("made_up_module")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def compare(function, *parameters):
        module.function = function
        return Symbol(module.__name__, "function", parameters).misfit()

    return compare


@pytest.mark.skipif(
    "LONGROPE_EXPECT_MEGATRON" not in os.environ, reason="LONGROPE_EXPECT_MEGATRON is not set"
)
def test_the_release_under_test_is_the_one_that_is_imported():
    from megatron.core.datasets import helpers_cpp

    expected = os.environ["LONGROPE_EXPECT_MEGATRON"]
    assert compat.megatron_version() == expected
    core, training = map(compat.megatron_location, ("megatron.core", "megatron.training"))
    assert core == training
    assert helpers_cpp.__file__.startswith(str(core))


def test_the_version_is_the_releases_without_a_commit(monkeypatch):
    monkeypatch.setattr("megatron.core.__version__", "0.18.2+5b836fd")
    assert compat.megatron_version() == "0.18.2"
    assert compat.is_tested()


# Parameters


def test_parameters_that_are_as_expected_fit(fits):
    assert fits(lambda: None) is None
    assert fits(lambda a, b=1: None, "a", "b") is None


def test_a_parameter_that_is_gone_does_not_fit(fits):
    assert fits(lambda a: None, "a", "b", "c") == "has no parameter 'b', 'c' any more"


def test_another_order_does_not_fit(fits):
    assert fits(lambda b, a: None, "a", "b") == "takes 'b', 'a' in another order"


def test_an_unknown_parameter_must_be_optional_unless_it_is_passed_on(fits):
    assert fits(lambda a, b: None, "a") == "requires 'b', which the plugin does not know"
    assert fits(lambda a, b=1: None, "a") is None
    assert fits(lambda a, b: None, "a", ...) is None
    assert fits(lambda a, *rest, **options: None, "a") is None


def test_a_hooked_function_answers_with_the_originals_parameters(fits):
    def original(a, b):
        return a, b

    @functools.wraps(original)
    def hooked(*rest, **options):
        return original(*rest, **options)

    assert fits(hooked, "a", "b") is None


def test_the_plugins_own_classes_take_what_megatrons_do():
    import inspect

    from megatron_longrope.attention import SdpaCoreAttention
    from megatron_longrope.integration import chunked_loss
    from megatron_longrope.rotary import LongRopeRotaryEmbedding

    ours = {
        "RotaryEmbedding": LongRopeRotaryEmbedding,
        "DotProductAttention": SdpaCoreAttention,
        "ColumnParallelLinear": SimpleNamespace(forward=chunked_loss._deferring_forward),
    }
    for symbol in compat.stand_in_symbols():
        class_name, method = symbol.name.split(".")
        taken = list(inspect.signature(getattr(ours[class_name], method)).parameters)
        expected = [name for name in symbol.parameters if name is not ...]
        assert taken[1 : len(expected)] == expected[1:]  # the first is the object


# The multiplier of cos and sin


@pytest.fixture
def restored():
    holder, attribute = compat.CONCENTRATION.owner()
    original = getattr(holder, attribute)
    yield
    setattr(holder, attribute, original)


def test_a_layer_that_keeps_its_multiplier_gets_it_directly():
    layer = SimpleNamespace(_yarn_concentration_factor=1.0, config=SimpleNamespace())
    compat.set_cos_sin_factor(layer, 1.25)
    assert layer._yarn_concentration_factor == compat.cos_sin_factor(layer) == 1.25
    assert vars(layer.config) == {}


def test_a_layer_that_asks_in_every_pass_is_answered_by_its_config(restored):
    layer, other = (SimpleNamespace(config=SimpleNamespace()) for _ in range(2))
    compat.set_cos_sin_factor(layer, 1.1)
    compat.set_cos_sin_factor(layer, 1.25)
    assert compat.cos_sin_factor(layer) == 1.25
    assert compat.cos_sin_factor(other) == 1.0


def test_the_answer_survives_a_hook_that_is_put_around_it_or_removed(restored):
    holder, attribute = compat.CONCENTRATION.owner()
    original = getattr(holder, attribute)
    layer = SimpleNamespace(config=SimpleNamespace())
    setattr(holder, attribute, functools.wraps(original)(lambda config: original(config)))
    compat.set_cos_sin_factor(layer, 1.25)
    setattr(holder, attribute, original)  # the hook takes ours away with it
    compat.set_cos_sin_factor(layer, 1.5)
    assert compat.cos_sin_factor(layer) == 1.5
