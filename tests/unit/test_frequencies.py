"""The formula against transformers, megatron-core and the papers' identities."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.frequencies import (
    angles,
    attention_factor,
    inv_freq,
    inv_freq_fp32,
)
from megatron_longrope.methods import (
    base_change_factors,
    dynamic_ntk_factors,
    linear_factors,
    named_factors,
    ntk_factors,
    yarn_factors,
)

# (rotary base, rotary dim): LLaMA2, LLaMA3, Phi-like 96, a partially rotated small head.
GEOMETRIES = [(10000.0, 128), (500000.0, 128), (10000.0, 96), (1000000.0, 32)]


def longrope_factors(rotary_dim: int, ratio: float = 512.0) -> torch.Tensor:
    """A non-decreasing vector in [1, ratio] whose values are no powers of two."""
    steps = torch.linspace(0, 1, rotary_dim // 2, dtype=torch.float64)
    return 1.0 + (ratio - 1.0) * steps**3


def llama_config(rotary_base: float, rotary_dim: int, rope: dict, max_position: int = 131072):
    """A transformers LlamaConfig with one head of `rotary_dim`."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        hidden_size=rotary_dim,
        num_attention_heads=1,
        head_dim=rotary_dim,
        max_position_embeddings=max_position,
        rope_parameters={"rope_theta": rotary_base, **rope},
    )


def theirs_from_transformers(rope_type: str, config, **kwargs):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", **kwargs)


# transformers


@pytest.mark.parametrize(("base", "dim"), GEOMETRIES)
def test_longrope_inverse_frequencies_equal_transformers_bit_for_bit_in_both_windows(base, dim):
    short, long = longrope_factors(dim, 3.0), longrope_factors(dim, 37.7)
    config = llama_config(
        base,
        dim,
        {
            "rope_type": "longrope",
            "short_factor": short.tolist(),
            "long_factor": long.tolist(),
            "original_max_position_embeddings": 4096,
            "factor": 32.0,
        },
    )
    for length, factors in ((None, short), (1, short), (4096, short), (4097, long), (131072, long)):
        theirs, their_scale = theirs_from_transformers("longrope", config, seq_len=length)
        assert torch.equal(inv_freq_fp32(base, dim, factors), theirs)
        assert attention_factor("su", 32.0, 4096) == their_scale


@pytest.mark.parametrize(
    ("base", "dim", "original", "factor"),
    [
        (10000.0, 128, 4096, 2.0),
        (10000.0, 128, 4096, 32.0),
        (500000.0, 128, 8192, 16.0),
        (1000000.0, 64, 32768, 4.0),
    ],
)
def test_yarn_inverse_frequencies_equal_transformers(base, dim, original, factor):
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    config = llama_config(base, dim, rope, int(original * factor))
    theirs, their_scale = theirs_from_transformers("yarn", config)
    factors = torch.tensor(yarn_factors(dim, factor, base, original), dtype=torch.float64)
    torch.testing.assert_close(inv_freq_fp32(base, dim, factors), theirs, rtol=1e-6, atol=0)
    assert attention_factor("yarn", factor, original) == their_scale


# megatron-core


@pytest.mark.parametrize("base", [10000, 10000.0, 500000, 1000000])
@pytest.mark.parametrize(("head_dim", "percent"), [(128, 1.0), (96, 1.0), (64, 0.5)])
def test_factors_of_one_equal_megatron_core_bit_for_bit(base, head_dim, percent):
    dim = int(head_dim * percent)
    module = pytest.importorskip("megatron.core.models.common.embeddings.rotary_pos_embedding")
    theirs = module.RotaryEmbedding(
        head_dim, percent, rotary_base=base, use_cpu_initialization=True
    )
    assert torch.equal(inv_freq_fp32(base, dim, torch.ones(dim // 2)), theirs.inv_freq)
    assert torch.equal(inv_freq_fp32(base, dim), theirs.inv_freq)


# Exact angles


def test_a_default_dtype_of_bfloat16_does_not_reach_the_angles():
    positions, factors = torch.tensor([7, 2**21 - 1]), longrope_factors(128)
    exact = angles(positions, 1e4, 128, factors)
    plain = inv_freq_fp32(1e4, 128, factors)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(angles(positions, 1e4, 128, factors), exact)
        assert torch.equal(inv_freq_fp32(1e4, 128, factors), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_base_inverse_frequencies_fall_from_one_to_just_above_the_inverse_base():
    ours = inv_freq(10000.0, 128)
    assert ours.dtype == torch.float64
    assert ours[0].item() == 1.0
    assert ours[32].item() == pytest.approx(0.01, rel=1e-15)
    assert ours[63].item() == pytest.approx(10000.0 ** (-126 / 128), rel=1e-15)


# Factor vectors


@pytest.mark.parametrize("dim", [4, 64, 128])
@pytest.mark.parametrize("factor", [1.0, 2.0, 32.0, 512.0])
def test_ntk_equals_enlarging_the_base(dim, factor):
    factors = torch.tensor(ntk_factors(dim, factor), dtype=torch.float64)
    enlarged = 10000.0 * factor ** (dim / (dim - 2))
    torch.testing.assert_close(
        inv_freq(10000.0, dim) / factors, inv_freq(enlarged, dim), rtol=1e-13, atol=0
    )


def test_ntk_keeps_the_fastest_dimension_and_slows_the_slowest_by_the_ratio():
    factors = ntk_factors(128, 32.0)
    assert (factors[0], factors[-1]) == (1.0, 32.0)


def test_ntk_is_refused_for_a_single_pair_of_dimensions():
    with pytest.raises(ValueError, match="rotary_dim 2 is below 4"):
        ntk_factors(2, 8.0)


def test_yarn_in_the_middle_of_the_ramp_mixes_inverse_frequencies_and_not_factors():
    # LLaMA2: the ramp runs from dimension 20 to 46, so that dimension 33 is its middle.
    factors = yarn_factors(128, 32.0, 10000.0, 4096)
    assert factors[20] == 1.0 < factors[21]
    assert factors[45] < 32.0 == factors[46]
    assert factors[33] == pytest.approx(1 / (0.5 / 32 + 0.5), rel=1e-15)
    assert factors[33] == pytest.approx(1.94, abs=1e-3)  # a mix of factors would give 16.5


@pytest.mark.parametrize("ratio", [49, 98, 103, 107])
def test_yarn_ends_exactly_on_the_ratio(ratio):
    factors = yarn_factors(128, ratio, 10000.0, 4096)
    assert (factors[0], factors[-1]) == (1.0, ratio)


def test_yarn_of_a_tuned_model_counts_the_rotations_of_its_slowed_frequencies():
    # What the authors fine-tuned LLaMA2 with (ft_la2_256k).
    tuned = LongRopeConfig.load("published:llama2-256k").factor_set_for(262144).rescale_factors
    window, ratio = 262144, 8.0
    rotations = [
        window / (2 * math.pi * factor * 10000.0 ** (i / 64)) for i, factor in enumerate(tuned)
    ]
    factors = yarn_factors(128, ratio, 10000.0, window, rescale_factors=tuned)
    # As in the initialisation that the authors' second search starts from (dim_mono_yarn_8x).
    assert factors[48:] == [8.0] * 16
    assert all(value == 8.0 for value, turns in zip(factors, rotations, strict=True) if turns < 1)
    assert all(value == 1.0 for value, turns in zip(factors, rotations, strict=True) if turns > 36)
    # The ramp between is YaRN's, linear in the dimension: from 28 (35.9 rotations) to 46 (0.93).
    assert factors[37] == pytest.approx(1 / (0.5 / 8 + 0.5), rel=1e-12)
    # On the base's frequencies nearly all dimensions would be fast in so long a window.
    assert max(yarn_factors(128, ratio, 10000.0, window)[:48]) < 1.9


def test_yarn_of_factors_that_are_all_one_is_yarn():
    plain = yarn_factors(128, 8.0, 500000.0, 8192)
    assert yarn_factors(128, 8.0, 500000.0, 8192, rescale_factors=[1.0] * 64) == plain
    # A uniform slowing by s in a window s times as long leaves every rotation as it was.
    slowed = yarn_factors(128, 8.0, 500000.0, 4 * 8192, rescale_factors=[4.0] * 64)
    assert slowed == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_dynamic_ntk_equals_transformers_at_the_end_of_its_window(factor):
    rope = {"rope_type": "dynamic", "factor": factor}
    config = llama_config(10000.0, 128, rope, 4096)
    theirs, _ = theirs_from_transformers("dynamic", config, seq_len=int(4096 * factor))
    factors = torch.tensor(dynamic_ntk_factors(128, factor), dtype=torch.float64)
    torch.testing.assert_close(inv_freq_fp32(10000.0, 128, factors), theirs, rtol=1e-6, atol=0)


def test_a_base_change_moves_the_critical_dimension_to_the_new_window():
    factors = torch.tensor(base_change_factors(128, 16.0, 500000.0, 8192), dtype=torch.float64)
    base = 500000.0 ** (math.log(16 * 8192 / (2 * math.pi)) / math.log(8192 / (2 * math.pi)))
    ours = inv_freq(500000.0, 128) / factors
    torch.testing.assert_close(ours, inv_freq(base, 128), rtol=1e-12, atol=0)
    # Where a period filled the window once, it now fills the longer one once.
    turns = 16 * 8192 * ours / (2 * math.pi)
    assert turns[34] > 1 > turns[35] and factors[34] < 16 < factors[35]
    with pytest.raises(ValueError, match="no dimension completes a period in a window of 4 tokens"):
        base_change_factors(128, 2.0, 10000.0, 4)


def test_yarn_with_equal_ramp_ends_switches_at_once():
    factors = yarn_factors(8, 4.0, 10000.0, 6, beta_fast=1.0, beta_slow=1.0)
    assert factors == [1.0, 4.0, 4.0, 4.0]


def test_position_interpolation_slows_every_dimension_by_the_ratio():
    assert linear_factors(8, 32) == [32.0] * 4


def test_no_interpolation_is_all_ones():
    assert named_factors("none", 8, 32.0, 1e4, 4096) == [1.0] * 4


def test_a_named_method_gives_the_vector_of_its_function():
    assert named_factors("pi", 64, 8.0, 1e4, 4096) == linear_factors(64, 8.0)
    assert named_factors("ntk", 64, 8.0, 1e4, 4096) == ntk_factors(64, 8.0)
    assert named_factors("yarn", 64, 8.0, 1e4, 4096) == yarn_factors(64, 8.0, 1e4, 4096)


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown method 'linear'; choose none, pi, ntk, yarn, dynamic"
    ):
        named_factors("linear", 64, 8.0, 1e4, 4096)


@pytest.mark.parametrize("name", ["none", "pi", "ntk", "yarn"])
@pytest.mark.parametrize("ratio", [0.5, math.nan, math.inf])
def test_an_extension_ratio_below_one_or_not_finite_is_refused(name, ratio):
    with pytest.raises(ValueError, match=f"extension ratio {ratio} must be a finite number"):
        named_factors(name, 64, ratio, 1e4, 4096)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["none", "pi", "ntk", "yarn"]),
    half=st.integers(2, 128),
    ratio=st.floats(1.0, 1024.0),
    base=st.floats(1.5, 1e8),
    window=st.integers(2, 2**20),
)
@example(name="yarn", half=64, ratio=49.0, base=10000.0, window=4096)  # 1 / (1 / 49) > 49
@example(name="yarn", half=64, ratio=1.0 + 2**-52, base=10000.0, window=4096)
@example(name="yarn", half=64, ratio=1.0 + 2**-50, base=500000.0, window=8192)
def test_every_named_vector_is_finite_non_decreasing_within_the_ratio_and_a_valid_set(
    name, half, ratio, base, window
):
    factors = named_factors(name, 2 * half, ratio, base, window)
    assert len(factors) == half
    assert all(math.isfinite(value) for value in factors)
    assert all(a <= b for a, b in pairwise(factors))
    assert factors[0] >= 1.0
    assert factors[-1] <= ratio
    target = math.ceil(window * ratio)
    LongRopeConfig(base, 2 * half, window, (FactorSet(target, tuple(factors)),))


# Attention factor


@pytest.mark.parametrize(
    ("ratio", "window", "expected"),
    [(32, 4096, 1.190238), (512, 4096, 1.322876), (16, 8192, 1.143544)],
)
def test_su_has_the_published_values(ratio, window, expected):
    assert attention_factor("su", ratio, window) == pytest.approx(expected, abs=5e-7)


def test_su_is_the_root_of_the_ratio_of_the_logarithms_of_both_windows():
    expected = math.sqrt(math.log(131072) / math.log(4096))
    assert attention_factor("su", 32, 4096) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("policy", ["su", "yarn", "none"])
@pytest.mark.parametrize("ratio", [0.25, 1, 1.0])
def test_every_policy_gives_one_without_an_extension(policy, ratio):
    assert attention_factor(policy, ratio, 4096) == 1.0


def test_an_unknown_attention_factor_policy_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'SU' is unknown; choose one of su, yarn, none"):
        attention_factor("SU", 32, 4096)
