"""Models that scale RoPE already: their frequencies, their file, what factors do to them."""

import argparse
import inspect
import math

import pytest
import torch

from megatron_longrope.base_frequencies import base_factors, megatron_base_frequencies
from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
from megatron_longrope.factor_search.problem import make_problem
from megatron_longrope.frequencies import inv_freq
from megatron_longrope.rotary import LongRopeRotaryEmbedding

DIM, THETA = 64, 500000.0
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
BASES = [
    {"rope_type": "linear", "factor": 8.0},
    {"rope_type": "linear", "factor": 7.3},
    LLAMA3,
    {**LLAMA3, "factor": 32.0, "low_freq_factor": 0.5},
    YARN,
    {**YARN, "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
]


def hf_config(base):
    return {
        "model_type": "llama",
        "hidden_size": 4 * DIM,
        "num_attention_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": THETA,
        "rope_scaling": dict(base),
    }


@pytest.mark.parametrize("base", BASES, ids=lambda base: base["rope_type"])
def test_frequencies_and_attention_factor_are_those_of_transformers(base):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(LlamaConfig(**hf_config(base)))
    config = LongRopeConfig.from_hf(hf_config(base))
    assert (config.base_frequencies, config.rotary_dim) == (base, DIM)
    assert config.attention_factor_for(131072) == pytest.approx(theirs.attention_scaling, rel=1e-12)
    ours = inv_freq(THETA, DIM) / torch.tensor(config.base_factors, dtype=torch.float64)
    torch.testing.assert_close(ours.float(), theirs.inv_freq, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    "absent",
    [
        *({key: None} for key in ("truncate", "attention_factor", "beta_fast", "beta_slow")),
        {"beta_fast": 0, "beta_slow": 0.0},
        {"mscale": None, "mscale_all_dim": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 0},
    ],
    ids=str,
)
def test_a_null_or_zero_of_yarn_is_what_transformers_takes_it_for(absent):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(LlamaConfig(**hf_config({**YARN, **absent})))
    config = LongRopeConfig.from_hf(hf_config({**YARN, **absent}))
    kept = {key: value for key, value in absent.items() if value}
    kept |= {"truncate": False} if "truncate" in absent else {}
    assert config.base_frequencies == {**YARN, **kept}
    assert config.attention_factor_for(131072) == pytest.approx(theirs.attention_scaling, rel=1e-12)
    ours = inv_freq(THETA, DIM) / torch.tensor(config.base_factors, dtype=torch.float64)
    torch.testing.assert_close(ours.float(), theirs.inv_freq, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("stated", "window"), [(32768, 131072), (40960, 131072), (2**18, 2**18)])
def test_a_yarn_whose_factor_is_not_the_ratio_of_its_windows_keeps_it(recwarn, stated, window):
    """transformers 4.57 and 5 take the factor; cards of Qwen2.5 and Qwen3 state 32k and 40k."""
    read = LongRopeConfig.from_hf({**hf_config(YARN), "max_position_embeddings": stated})
    assert read.base_frequencies["factor"] == 4.0
    assert read.max_length == read.original_max_position_embeddings == window
    assert not recwarn


def test_a_linear_scaling_warns_of_which_window_it_takes():
    """Vicuna-16k states 4096 and 4, DeepSeek-Coder 16384 and 4: both read 16k."""
    stated = {**hf_config({"rope_type": "linear", "factor": 4.0}), "max_position_embeddings": 4096}
    with pytest.warns(match=r"scaling by 4, .*_embeddings 4096 .* --original-length 16384"):
        assert LongRopeConfig.from_hf(stated).max_length == 4096


def test_a_linear_scaling_by_one_warns_of_nothing(recwarn):
    LongRopeConfig.from_hf(hf_config({"rope_type": "linear", "factor": 1.0}))
    assert not recwarn


def test_megatrons_rope_scaling_is_llama3():
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    args = argparse.Namespace(rope_scaling=True, rope_scaling_factor=32.0)  # as Bridge has it
    theirs = RotaryEmbedding(
        DIM, 1.0, rotary_base=int(THETA), rope_scaling=True, rope_scaling_factor=32.0,
        use_cpu_initialization=True,
    )  # fmt: skip
    ours = base_factors(megatron_base_frequencies(args), THETA, DIM)
    ours = inv_freq(THETA, DIM) / torch.tensor(ours, dtype=torch.float64)
    torch.testing.assert_close(ours.float(), theirs.inv_freq, rtol=2e-6, atol=0)
    assert megatron_base_frequencies(argparse.Namespace(use_rope_scaling=False)) is None


def test_a_factor_that_megatron_lm_gives_to_no_model_is_warned_of(recwarn):
    args = argparse.Namespace(use_rope_scaling=True, rope_scaling_factor=8.0)
    assert megatron_base_frequencies(args)["factor"] == 8.0
    assert not recwarn
    args.rope_scaling_factor = 32.0
    with pytest.warns(match=r"rope_scaling_factor 32, .* pretrain_gpt\.py .* scales by 8 whatever"):
        assert megatron_base_frequencies(args)["factor"] == 32.0


@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "hybrid_override_pattern"])
def test_a_hybrid_model_is_plain_rope_whatever_use_rope_scaling_says(name):
    from megatron_longrope.integration.hybrid_spec import HybridModel

    assert "rope_scaling" not in inspect.signature(HybridModel.__init__).parameters
    args = argparse.Namespace(use_rope_scaling=True, **{name: "*-*-"})
    with pytest.warns(match=r"HybridModel .* does not scale RoPE .* taken as plain RoPE"):
        assert megatron_base_frequencies(args) is None


@pytest.mark.parametrize("base", BASES, ids=lambda base: base["rope_type"])
def test_the_file_holds_the_base_in_schema_2_and_plain_rope_stays_schema_1(base, tmp_path):
    config = identity_config(THETA, DIM, 131072, base)
    config.save(tmp_path / "two.json")
    assert config.to_dict()["schema"] == 2
    assert LongRopeConfig.load(tmp_path / "two.json") == config
    plain = identity_config(THETA, DIM, 131072)
    assert plain.to_dict()["schema"] == 1
    assert "base_frequencies" not in plain.to_dict()
    with pytest.raises(ValueError, match="unknown key 'base_frequencies'"):
        LongRopeConfig.from_dict({**plain.to_dict(), "base_frequencies": base})


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "must be one of linear, llama3, yarn"),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks the key 'high_freq_factor'"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "above low_freq_factor 1.0"),
        ({**YARN, "factor": "4"}, "base_frequencies.factor is '4'"),
        ({**YARN, "truncate": 1}, "truncate is 1; it must be true or false"),
        ({**YARN, "beta": 1}, "unknown key 'beta'"),
        ("yarn", "base_frequencies is 'yarn'; it must be an object"),
    ],
)
def test_a_description_that_is_not_complete_is_refused(base, sentence):
    with pytest.raises(ValueError, match=sentence):
        identity_config(THETA, DIM, 131072, base)


def test_a_config_json_that_lacks_a_value_is_refused_by_its_key():
    with pytest.raises(ValueError, match=r"config.json's rope_scaling lacks the key 'factor'"):
        LongRopeConfig.from_hf(hf_config({"rope_type": "linear"}))


def test_the_rotary_module_multiplies_factors_with_the_base():
    ones, twos = (1.0,) * (DIM // 2), (2.0,) * (DIM // 2)
    config = identity_config(THETA, DIM, 128, LLAMA3).with_factor_set(FactorSet(256, twos, 4))
    rotary = LongRopeRotaryEmbedding(config, DIM, rotary_base=THETA)
    base = inv_freq(THETA, DIM) / torch.tensor(config.base_factors, dtype=torch.float64)
    for length, factor, start in ((100, 1.0, 0), (200, 2.0, 4)):
        positions = torch.arange(length, dtype=torch.float64)
        expected = torch.outer(positions, base / factor)
        expected[:start] = torch.outer(positions[:start], base)  # start tokens keep the model's own
        angles = rotary(length)[:, 0, 0, : DIM // 2].double()
        difference = torch.remainder(angles - expected + math.pi, 2 * math.pi) - math.pi
        assert difference.abs().max() < 1e-6
    assert config.plain_factors(config.factor_sets[0]) == config.base_factors
    assert config.factor_sets[0].rescale_factors == ones


def test_an_extension_keeps_the_attention_factor_of_the_base():
    yarn = identity_config(THETA, DIM, 131072, YARN)
    own = 0.1 * math.log(4.0) + 1.0
    longer = yarn.with_factor_set(FactorSet(262144, (2.0,) * (DIM // 2)))
    assert yarn.attention_factor_for(131072) == own
    ratio = math.sqrt(1 + math.log(2) / math.log(131072))
    assert longer.attention_factor_for(262144) == pytest.approx(own * ratio, rel=1e-12)
    assert longer.attention_factor_by("none", 262144) == own


def test_a_search_extends_the_scaled_model():
    problem = make_problem(identity_config(THETA, DIM, 131072, LLAMA3), 262144)
    assert problem.stage == "first"
    found = problem.config(problem.seeds["pi"])
    assert found.base_frequencies == LLAMA3
    assert found.max_length == 262144
