"""HybridModel, Megatron's successor of GPTModel, under the engine and from the plugin's spec."""

import math
import sys
from dataclasses import replace

import make_hybrid_checkpoint as hybrid_maker
import make_megatron_checkpoint as maker
import pytest
import torch

from megatron_longrope.attention import SdpaCoreAttention
from megatron_longrope.checkpoint import MegatronCheckpoint, load_into
from megatron_longrope.conversion.verify import random_tokens
from megatron_longrope.engine import load_engine, process_groups
from megatron_longrope.engine.model import build_model
from megatron_longrope.integration import compat, hybrid_spec


def load(path, **options):
    return load_engine(path, longrope_config=maker.longrope_config(), device="cpu", **options)


@pytest.fixture(scope="module")
def gpt(megatron_runs):
    return load(megatron_runs["untied_gqa"].path)


@pytest.fixture(scope="module")
def hybrid(hybrid_runs):
    return load(hybrid_runs["same"][0])


def assert_same_model(ours, theirs):
    for length in (maker.SHORT_TOKENS, maker.LONG_TOKENS):
        tokens = random_tokens(maker.VOCAB, length, 1)
        torch.testing.assert_close(ours.logits(tokens), theirs.logits(tokens), atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.nll(tokens), theirs.nll(tokens), atol=1e-6, rtol=0)


# Checkpoints


def test_a_hybrid_checkpoint_numbers_its_layers_and_stacks_nothing(hybrid_runs):
    checkpoint = MegatronCheckpoint.open(hybrid_runs["same"][0])
    keys = checkpoint.keys()
    assert keys["decoder.layers.4.self_attention.linear_qkv.layer_norm_weight"].shape == (64,)
    assert keys["decoder.layers.5.mlp.linear_fc1.weight"].shape == (2 * maker.FFN, maker.HIDDEN)
    assert "decoder.final_norm.weight" in keys
    assert checkpoint.args.num_layers == 6
    assert checkpoint.shape.num_layers == maker.LAYERS  # as GPTModel counts them
    assert checkpoint.shape.hybrid_layer_pattern == "*-*-*-"


@pytest.mark.parametrize("name", list(hybrid_maker.VARIANTS))
def test_logits_equal_those_of_megatrons_own_model(hybrid_runs, name):
    path, theirs = hybrid_runs[name]
    tokens = random_tokens(maker.VOCAB, maker.LONG_TOKENS, 0)
    ours = load(path, hf_parity=True).logits(tokens)
    torch.testing.assert_close(ours, theirs["long"][..., : maker.VOCAB], atol=1e-5, rtol=0)


def test_the_same_weights_in_both_model_classes_are_the_same_model(gpt, hybrid):
    assert type(gpt.model).__name__ == "GPTModel"
    assert len(hybrid.model.decoder.layers) == 2 * len(gpt.model.decoder.layers)
    assert_same_model(hybrid, gpt)


def test_without_gpt_model_its_checkpoints_run_in_hybrid_model(gpt, megatron_runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.models.gpt", None)
    engine = load(megatron_runs["untied_gqa"].path)
    assert type(engine.model) is hybrid_spec.HybridModel
    assert_same_model(engine, gpt)


def test_a_hybrid_checkpoint_loads_into_gpt_model(gpt, hybrid_runs):
    model = build_model(gpt.shape, maker.longrope_config())
    load_into(model, MegatronCheckpoint.open(hybrid_runs["same"][0]))
    for ours, theirs in zip(model.parameters(), gpt.model.parameters(), strict=True):
        rows = maker.VOCAB if len(ours) == maker.PADDED else None  # the rest is padding
        assert torch.equal(ours[:rows], theirs[:rows])


def test_layers_in_another_order_are_refused(hybrid, hybrid_runs):
    other = MegatronCheckpoint.open(hybrid_runs["other"][0])
    with pytest.raises(ValueError, match=r"has the layers -\*\*--\* .* the model \*-\*-\*-; build"):
        load_into(hybrid.model, other)


# The attention factor


@pytest.mark.parametrize("hf_parity", [False, True])
def test_the_attention_factor_reaches_every_attention_layer(hybrid_runs, hf_parity):
    engine = load(hybrid_runs["other"][0], hf_parity=hf_parity)
    engine.nll(random_tokens(maker.VOCAB, maker.LONG_TOKENS, 2))
    layers = [layer.self_attention for layer in engine.model.decoder.layers]
    attention = [layer for layer, letter in zip(layers, "-**--*", strict=True) if letter == "*"]
    for layer in attention:
        by_softmax = math.sqrt(layer.core_attention.softmax_scale * math.sqrt(maker.HEAD_DIM))
        by_rope = compat.cos_sin_factor(layer)
        assert (by_softmax if hf_parity else by_rope) == pytest.approx(1.0)
        assert by_softmax * by_rope == pytest.approx(maker.longrope_config().attention_factor)


# What does not run


@pytest.mark.parametrize(("pattern", "letter"), [("M-*-", "M"), ("*-/*-", "/")])
def test_other_kinds_of_layers_are_refused_by_name(hybrid, pattern, letter):
    shape = replace(hybrid.shape, hybrid_layer_pattern=pattern)
    with pytest.raises(ValueError, match=f"has '{letter}'; without Transformer Engine only "):
        build_model(shape, maker.longrope_config())


def test_interleaved_pairs_in_a_hybrid_model_are_refused(hybrid):
    shape = replace(hybrid.shape, rotary_interleaved=True)
    with pytest.raises(ValueError, match="HybridModel with --rotary-interleaved"):
        build_model(shape, maker.longrope_config())


# The spec


@pytest.fixture
def build():
    process_groups.initialize()
    return lambda **settings: hybrid_maker.build("*-", 2, True, **settings)


def test_the_spec_takes_the_core_attention_of_the_moment_from_megatron(build, monkeypatch):
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    def core_attention(model):
        return type(model.decoder.layers[0].self_attention.core_attention)

    assert core_attention(build()) is DotProductAttention
    monkeypatch.setattr(LocalSpecProvider, "core_attention", lambda self: SdpaCoreAttention)
    assert core_attention(build()) is SdpaCoreAttention


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_every_norm_is_torchs_own(build, normalization):
    model = build(normalization=normalization, qk_layernorm=True)
    attention, mlp = model.decoder.layers
    norms = [
        attention.input_layernorm,
        attention.self_attention.q_layernorm,
        attention.self_attention.k_layernorm,
        mlp.pre_mlp_layernorm,
        model.decoder.final_norm,
    ]
    assert {type(norm) for norm in norms} == {getattr(torch.nn, normalization)}


def test_the_spec_refuses_layers_that_it_lacks(build):
    with pytest.raises(ValueError, match="the hybrid layer pattern has 'M'"):
        hybrid_maker.build("M*-", 2, True)
    with pytest.raises(ValueError, match="multi-token prediction"):
        build(mtp_num_layers=1)
