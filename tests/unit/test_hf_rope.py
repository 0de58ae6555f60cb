"""The rotary geometry of a config.json: what is read, and what is refused by the names of keys."""

import copy
import math

import pytest
import torch

from megatron_longrope.checkpoint.hf.families import shape_from_hf_config
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.errors import LongRopeError
from megatron_longrope.frequencies import inv_freq_fp32
from megatron_longrope.hf_rope import read_hf_rope

SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.0, 1.5, 2.0, 4.0]
LISTS = {"short_factor": SHORT, "long_factor": LONG}
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
PHI3 = {**BASE, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
QWEN2 = {**BASE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def refusal(config):
    with pytest.raises(ValueError) as caught:
        read_hf_rope(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 50000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
        {"rope_theta": 50000.0, "rope_parameters": {"rope_theta": 50000.0}},
        {
            "original_max_position_embeddings": 32,
            "rope_scaling": {"rope_type": "longrope", **LISTS},
        },
        {  # a non-empty rope_scaling wins
            "rope_theta": 50000.0,
            "original_max_position_embeddings": 32,
            "rope_scaling": {"type": "longrope", "attention_factor": 1.5, **LISTS},
            "rope_parameters": {"rope_type": "default"},
        },
        {  # an empty one does not
            "rope_scaling": {},
            "rope_parameters": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 32,
                "factor": 3.0,
                **LISTS,
            },
        },
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_frequencies_and_attention_factor_are_those_of_transformers(model_type, rope):
    from transformers import LlamaConfig, MixtralConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {**BASE, "model_type": model_type, "head_dim": 8, **rope}
    kind = MixtralConfig if model_type == "mixtral" else LlamaConfig
    theirs = LlamaRotaryEmbedding(kind(**copy.deepcopy(config)))
    ours = read_hf_rope(config)
    if ours.rope_type == "default":
        assert torch.equal(theirs.inv_freq, inv_freq_fp32(ours.rope_theta, 8))
        return
    longrope = LongRopeConfig.from_hf(config, rotary_dim=8)
    assert longrope.attention_factor == theirs.attention_scaling
    for length in (32, 33, 128):
        theirs(torch.zeros(1), torch.arange(length)[None])
        factors = torch.tensor(longrope.factor_set_for(length).rescale_factors)
        assert torch.equal(theirs.inv_freq, inv_freq_fp32(longrope.rotary_base, 8, factors))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {**BASE, "rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0}},
            "rope_theta 10000.0 and rope_parameters.rope_theta 500000.0, of which",
        ),
        (
            {
                **BASE,
                "rope_scaling": {"rope_type": "longrope", **LISTS},
                "original_max_position_embeddings": 32,
                "rope_parameters": {"rope_theta": 500000.0},
            },
            "rope_parameters.rope_theta 500000.0 beside rope_scaling, for which transformers "
            "ignores all of rope_parameters and takes 10000; write rope_theta at the top",
        ),
        (
            {**BASE, "rope_scaling": {"rope_type": "longrope", "type": "linear", "factor": 2.0}},
            "rope_scaling.rope_type 'longrope' and rope_scaling.type 'linear'",
        ),
        (
            {
                **BASE,
                "original_max_position_embeddings": 32,
                "rope_scaling": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 64,
                    **LISTS,
                },
            },
            "original_max_position_embeddings 32 and "
            "rope_scaling.original_max_position_embeddings 64",
        ),
        (
            {
                **PHI3,
                "partial_rotary_factor": 1.0,
                "rope_parameters": {"partial_rotary_factor": 0.5},
            },
            "partial_rotary_factor 1.0 and rope_parameters.partial_rotary_factor 0.5",
        ),
        (
            {
                **PHI3,
                "rope_scaling": {
                    "type": "longrope",
                    "original_max_position_embeddings": 32,
                    **LISTS,
                },
            },
            "rope_scaling.original_max_position_embeddings 32, which transformers overwrites with "
            "4096, its default for phi3; write the key at the top",
        ),
        (
            {**BASE, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention, a RoPE for some of the layers",
        ),
        ({**BASE, "rope_scaling": "yarn"}, "rope_scaling = 'yarn'; it must be an object"),
        (
            {**BASE, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type 'dynamic'",
        ),
        ({**BASE, "rope_theta": "10000"}, "rope_theta is '10000'"),
    ],
)
def test_what_is_stated_twice_or_not_supported_is_refused_by_its_keys(config, sentence):
    assert sentence in refusal(config)


def test_rope_scaling_beside_rope_parameters_is_read():
    """transformers reads yarn here; plain RoPE's logits were off by 6.3."""
    rope = read_hf_rope(
        {
            **BASE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "rope_scaling": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 32,
                "beta_fast": 4,
                **LISTS,
            },
        }
    )
    assert (rope.rope_type, rope.holder) == ("longrope", "rope_scaling")
    assert "beta_fast" not in rope.parameters


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_the_old_names_of_longrope_in_phi3_are_read(name):
    config = {
        **PHI3,
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": name, **LISTS},
    }
    assert read_hf_rope(config).rope_type == "longrope"


def test_a_longrope_that_transformers_4_57_reads_otherwise_is_warned_of(recwarn):
    rope = {"rope_type": "longrope", **LISTS}
    top = {**BASE, "original_max_position_embeddings": 64}
    inside = {**rope, "original_max_position_embeddings": 64}
    ours = math.sqrt(1 + math.log(32) / math.log(64))
    for config in (
        {**top, "rope_scaling": rope},
        {**top, "rope_scaling": {**rope, "factor": 2.0}},
        {**top, "rope_scaling": {**inside, "factor": 32.0, "attention_factor": ours}},
        {**BASE, "rope_parameters": {**inside, "factor": 32.0}},  # which 4.57 does not read
        {**BASE, "rope_scaling": {**rope, "original_max_position_embeddings": 128}},
        {**PHI3, "original_max_position_embeddings": 64, "rope_scaling": {**rope, "factor": 32.0}},
    ):
        LongRopeConfig.from_hf(config, rotary_dim=8)
    assert not recwarn
    factor = rf"factor 32, .* factor {ours:g} here .* 4\.57 takes 1\.08012, .* = 2; .* {ours!r}$"
    with pytest.warns(match=rf"rope_scaling\.{factor}"):
        found = LongRopeConfig.from_hf({**top, "rope_scaling": {**rope, "factor": 32.0}}, 8)
    assert found.attention_factor == ours
    alone = "original_max_position_embeddings 64 in rope_scaling alone, .* 4.57 .*_embeddings 128"
    with pytest.warns(match=alone + r"; for one model .* at the top as well$"):
        LongRopeConfig.from_hf({**BASE, "rope_scaling": {**inside, "attention_factor": 1.2}}, 8)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe", "seed_oss"])
def test_a_head_is_as_wide_as_transformers_takes_it_where_the_file_does_not_say(model_type):
    from transformers import AutoConfig

    config = {**BASE, "model_type": model_type, "rope_theta": 1e6}
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    theirs = AutoConfig.for_model(**config)
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert LongRopeConfig.from_hf({**config, "rope_scaling": scaling}).rotary_dim == width


def test_a_factor_of_zero_is_refused():
    rope = {"rope_type": "longrope", "factor": 0, **LISTS}
    with pytest.raises(ValueError, match="factor is 0"):
        LongRopeConfig.from_hf(
            {**BASE, "original_max_position_embeddings": 64, "rope_scaling": rope}, rotary_dim=8
        )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": "4"}, "hidden_size is '4'; it must be an integer"),
        ({"hidden_size": None}, "config.json (lacks hidden_size|has no head_dim)"),
        ({"num_attention_heads": [4]}, r"num_attention_heads is \[4\]; it must be an integer"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings is 'x'; it must be an integer"),
        ({"sliding_window": "x"}, "sliding_window is 'x'; it must be an integer"),
        ({"head_dim": {"a": 1}}, "head_dim is {'a': 1}; it must be an integer"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling.rope_type .*yarn.* supported types"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_by_its_key(changes, sentence):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = BASE | {"model_type": "mistral", "sliding_window": 16, "rope_scaling": yarn} | changes
    with pytest.raises(LongRopeError, match=sentence):
        shape_from_hf_config(config)
    if "sliding_window" not in changes:  # which no factors depend on
        with pytest.raises(LongRopeError, match=sentence):
            LongRopeConfig.from_hf(config)


# Sliding windows


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_window_in_use_but_not_stated_is_transformers_default(model_type):
    config = {**QWEN2, "model_type": model_type, "max_position_embeddings": 8192}
    extra = {"moe_intermediate_size": 8, "num_experts": 4, "head_dim": 8}
    config |= {**extra, "use_sliding_window": True, "max_window_layers": 0}
    with pytest.raises(ValueError, match="sliding_window = 4096 and max_position_embeddings"):
        shape_from_hf_config(config)
    assert shape_from_hf_config({**config, "sliding_window": None}).num_layers == 2
    assert shape_from_hf_config({**config, "use_sliding_window": False}).num_layers == 2


@pytest.mark.parametrize(
    "full", [{"max_window_layers": 2}, {}, {"layer_types": ["full_attention"] * 2}]
)
def test_a_window_that_no_layer_has_is_full_attention(full):
    config = {**QWEN2, "use_sliding_window": True, "sliding_window": 16, **full}
    assert shape_from_hf_config(config).num_layers == 2
    some = {"max_window_layers": 1, "layer_types": None}
    if "layer_types" in full:
        some = {"layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(ValueError, match="sliding_window = 16"):
        shape_from_hf_config({**config, **some})


@pytest.mark.parametrize(
    ("model_type", "switches"),
    [
        ("mistral", {"use_sliding_window": False}),
        ("mixtral", {"max_window_layers": 2}),
        ("phi3", {"use_sliding_window": False, "max_window_layers": 2}),
        ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 2}),
    ],
)
def test_a_switch_that_the_type_does_not_have_leaves_the_window_in_use(model_type, switches):
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_local_experts": 4}
    config = {**BASE, **experts, "model_type": model_type, "sliding_window": 16, **switches}
    with pytest.raises(ValueError, match="sliding_window = 16 and max_position_embeddings = 128"):
        shape_from_hf_config(config)


def test_a_model_without_the_biases_of_its_type_is_refused():
    with pytest.raises(ValueError, match=r"attention_bias = False; .* without it, only .* = True"):
        shape_from_hf_config({**BASE, "model_type": "seed_oss", "attention_bias": False})
