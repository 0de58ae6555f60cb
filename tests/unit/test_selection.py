"""Which factor set a length uses, mode by mode."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.selection import MODES, FactorSelection

CONFIG = LongRopeConfig(
    rotary_base=10000.0,
    rotary_dim=4,
    original_max_position_embeddings=64,
    factor_sets=(
        FactorSet(32, (1.0, 1.0)),
        FactorSet(64, (1.0, 1.1)),
        FactorSet(128, (1.0, 2.0)),
        FactorSet(512, (1.0, 8.0)),
    ),
)


def chosen(mode: str, length: int, run_length: int = 0) -> int:
    return FactorSelection(CONFIG, mode, run_length).factor_set(length).max_length


@pytest.mark.parametrize(
    ("mode", "length", "run_length", "expected"),
    [
        ("auto", 20, 0, 32),
        ("auto", 65, 0, 128),
        ("auto", 20, 128, 128),  # a short packed document of a run at 128 tokens
        ("auto", 200, 128, 512),  # inference beyond the run's window
        ("long", 20, 0, 512),
        ("short", 4096, 0, 64),
        ("mixed", 20, 128, 64),  # the original window's set, also below a recovered short one
        ("mixed", 64, 128, 64),
        ("mixed", 65, 128, 128),
        ("mixed", 65, 512, 512),
    ],
)
def test_each_mode_chooses_its_set(mode, length, run_length, expected):
    assert chosen(mode, length, run_length) == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_pinned_length_chooses_in_every_mode_and_for_every_length(mode):
    pinned = FactorSelection(CONFIG, mode, 512, pinned_length=100)
    assert {pinned.factor_set(length).max_length for length in (20, 64, 512)} == {128}


@given(length=st.integers(1, 512), run_length=st.integers(0, 512))
def test_a_run_never_switches_sets_below_its_own_length(length, run_length):
    if length <= run_length:
        assert chosen("auto", length, run_length) == chosen("auto", run_length, run_length)


@pytest.mark.parametrize("mode", ["auto", "long", "mixed"])
def test_a_length_beyond_every_set_is_refused(mode):
    with pytest.raises(ValueError, match="sequence length 513 exceeds 512, the max_length"):
        chosen(mode, 513)


@pytest.mark.parametrize("mode", MODES)
def test_the_attention_factor_is_that_of_the_chosen_set(mode):
    selection = FactorSelection(CONFIG, mode, 128)
    for length in (20, 64, 128):
        expected = CONFIG.attention_factor_for(selection.factor_set(length).max_length)
        assert selection.attention_factor(length) == expected


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="mode 'other' is unknown; choose one of auto, long, sh"):
        FactorSelection(CONFIG, "other")
