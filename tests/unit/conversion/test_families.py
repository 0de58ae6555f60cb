import argparse
from dataclasses import replace

import make_megatron_checkpoint as maker
import pytest
import torch

from megatron_longrope.checkpoint import ModelShape
from megatron_longrope.checkpoint.hf.families import (
    FAMILIES,
    dtype_named,
    select_family,
    shape_from_hf_config,
    to_hf_config,
)

ARGS = maker.arguments(groups=2, untied=True)
SHAPE = ModelShape.from_args(ARGS)
EXPERTS = {
    "num_experts": 8,
    "moe_ffn_hidden_size": SHAPE.ffn_hidden_size,  # mixtral has one width
    "moe_router_topk": 2,
    "moe_normalized_gates": True,
    "moe_aux_loss_coeff": 0.02,
}


def test_llama_is_the_default_and_mistral_can_be_asked_for():
    assert select_family(SHAPE, ARGS).name == "llama"
    assert select_family(SHAPE, ARGS, "mistral").architecture == "MistralForCausalLM"
    with pytest.raises(ValueError, match="'gpt-j' is unknown; choose one of llama, mistral"):
        select_family(SHAPE, ARGS, "gpt-j")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"multi_latent_attention": True}, "multi-latent"),
        ({"swiglu": False}, "swiglu = False.*SwiGLU"),
        ({"normalization": "LayerNorm"}, "RMSNorm"),
        ({"add_bias_linear": True}, "biases"),
        ({"layernorm_zero_centered_gamma": True}, "zero-centred"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type = 'yarn'"),
        ({"rotary_interleaved": True}, "interleaved"),
    ],
)
def test_what_no_family_has_is_refused_with_the_argument(change, reason):
    args = argparse.Namespace(**{**vars(ARGS), **change})
    with pytest.raises(ValueError, match=reason):
        select_family(ModelShape.from_args(args), args)


def test_biases_and_norms_choose_the_family():
    assert select_family(replace(SHAPE, add_qkv_bias=True), ARGS).name == "qwen2"
    assert select_family(replace(SHAPE, qk_layernorm=True), ARGS).name == "qwen3"
    with pytest.raises(ValueError, match="add_qkv_bias = True and qk_layernorm = True"):
        select_family(replace(SHAPE, add_qkv_bias=True, qk_layernorm=True), ARGS)
    assert select_family(replace(SHAPE, **EXPERTS), ARGS).name == "mixtral"
    assert select_family(replace(SHAPE, **EXPERTS, qk_layernorm=True), ARGS).name == "qwen3_moe"
    with pytest.raises(ValueError, match="no supported family has add_qkv_bias = True"):
        select_family(replace(SHAPE, add_qkv_bias=True), ARGS, "llama")


def test_partly_rotated_heads_are_phi3s():
    partial = replace(SHAPE, rotary_percent=0.75)
    assert select_family(partial, ARGS).name == "phi3"
    with pytest.raises(ValueError, match=r"rotary_percent = 0.75 \(families: llama\)"):
        select_family(partial, ARGS, "llama")
    assert to_hf_config(partial, FAMILIES["phi3"], torch.float32)["partial_rotary_factor"] == 0.75


def test_heads_of_another_width_than_their_part_are_not_phi3s():
    """Whose config.json transformers checks by hidden_size / heads."""
    free = replace(SHAPE, head_dim=2 * SHAPE.head_dim)
    assert select_family(free, ARGS).name == "llama"
    width = 2 * SHAPE.head_dim
    with pytest.raises(ValueError, match=rf"kv_channels = {width} ..* \(families: phi3\)"):
        select_family(free, ARGS, "phi3")


def test_a_sliding_window_is_mistrals():
    windowed = replace(SHAPE, sliding_window=128)
    assert select_family(windowed, ARGS).name == "mistral"
    with pytest.raises(ValueError, match=r"a window of 128 tokens \(families: qwen2\)"):
        select_family(replace(windowed, add_qkv_bias=True), ARGS, "qwen2")
    assert to_hf_config(windowed, FAMILIES["mistral"], torch.float32)["sliding_window"] == 128


def test_a_converted_checkpoint_goes_back_to_its_family():
    args = argparse.Namespace(**vars(ARGS), longrope_hf_family="phi3")
    assert select_family(SHAPE, args).name == "phi3"
    assert select_family(SHAPE, args, "llama").name == "llama"


def test_a_hidden_size_that_heads_do_not_divide_is_no_llamas():
    shape = replace(SHAPE, hidden_size=66)
    assert select_family(shape, ARGS).name == "mistral"
    with pytest.raises(ValueError, match=r"hidden_size = 66 \(no multiple .* \(families: llama\)"):
        select_family(shape, ARGS, "llama")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@pytest.mark.parametrize("untied", [True, False])
def test_the_shape_comes_back_from_config_json(family, untied):
    shape = replace(
        SHAPE,
        padded_vocab_size=SHAPE.vocab_size,
        untie_embeddings=untied,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_layernorm,
        **(EXPERTS if family.experts else {}),
    )
    config = to_hf_config(shape, family, torch.float32)
    assert shape_from_hf_config(config) == shape


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="dtype 'int8' is not supported"):
        dtype_named("int8")
