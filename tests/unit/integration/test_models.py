"""Models that Megatron builds with the hooks in place equal a plain fp64 decoder, in every format.

One process without CUDA; what runs on several is in tests/distributed.
"""

import importlib
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_gpt
import torch
from tiny_gpt import (
    ATTENTION_FACTOR,
    HEAD_DIM,
    ORIGINAL,
    RUN,
    build,
    decoder,
    fill,
    random_tokens,
    start_run,
)

pytest.importorskip("megatron.training")

from megatron.core.packed_seq_params import PackedSeqParams

from megatron_longrope.integration import compat
from megatron_longrope.rotary import LongRopeRotaryEmbedding

pytestmark = pytest.mark.usefixtures("megatron")

EXACT = {"rtol": 0.0, "atol": 1e-5}  # fp32 against fp64; another rotation is off by 1e-2 or more
PLAIN = HEAD_DIM**-0.5  # softmax scale without an attention factor
CARRIERS = ["softmax", "rope"]


@pytest.fixture
def cuda_answers(monkeypatch):
    """The two questions that recomputation and inference ask of CUDA, answered for the CPU."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    monkeypatch.setattr(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    monkeypatch.setattr(random, "_set_cuda_rng_state", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1])[None]


def logits(model, tokens, **options):
    return model(tokens, positions(tokens), None, **options)


def attentions(model) -> list:
    return [layer.self_attention for layer in model.decoder.layers]


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), **EXACT)


def assert_gradients(model, weights):
    for name, parameter in model.named_parameters():
        expected = weights[name].grad.float()
        allowed = 1e-5 * expected.abs().max().item() + 1e-6
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=allowed, msg=name)


# The sequence format, every variant of the model

VARIANTS = {  # name: Megatron's arguments, TransformerConfig, the reference's rotation
    "whole heads by the softmax scale": ({}, {}, {}),
    "whole heads by cos and sin": ({"longrope_attention_factor_carrier": "rope"}, {}, {}),
    "half of each head": ({"rotary_percent": 0.5}, {}, {"rotary_dim": 4}),
    "interleaved pairs": ({}, {"rotary_interleaved": True}, {"interleaved": True}),
    "interleaved pairs in half of each head": (
        {"rotary_percent": 0.5},
        {"rotary_interleaved": True},
        {"rotary_dim": 4, "interleaved": True},
    ),
    "normalized queries and keys": ({}, {"qk_layernorm": True}, {}),
    "normalized queries and keys by cos and sin": (
        {"longrope_attention_factor_carrier": "rope"},
        {"qk_layernorm": True},
        {},
    ),
    "a layer without RoPE": ({"no_rope_freq": 2}, {}, {"unrotated_layers": (1,)}),
    "biases": ({}, {"add_bias_linear": True}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_equal_the_reference(name):
    arguments, options, rotation = VARIANTS[name]
    model = build(start_run(**arguments), **options)
    weights, reference = fill(model), decoder(**rotation)
    tokens, labels = random_tokens(2, RUN)
    assert_equal(logits(model, tokens), reference.logits(weights, tokens))
    logits(model, tokens, labels=labels).sum().backward()
    reference.losses(weights, tokens, labels).sum().backward()
    assert_gradients(model, weights)


def test_the_tolerance_tells_other_rotations_apart():
    weights = fill(build(start_run()))
    tokens, _ = random_tokens(2, RUN)
    ours = decoder().logits(weights, tokens)
    stock = replace(tiny_gpt.rope(), factors=(1.0,) * 4)
    for other in (
        decoder(attention_factor=ATTENTION_FACTOR**0.5),
        decoder(num_start_tokens=0),
        decoder(interleaved=True),
        replace(decoder(), rope=stock),
    ):
        assert (other.logits(weights, tokens) - ours).abs().max() > 1e-2


def test_a_shorter_batch_keeps_the_factors_of_the_run():
    model = build(start_run())
    weights = fill(model)
    tokens, _ = random_tokens(1, ORIGINAL - 8)
    assert_equal(logits(model, tokens), decoder().logits(weights, tokens))


# The attention factor


def concentration(layer) -> float:
    """The multiplier of cos and sin; megatron-core reads it at construction from 0.19 on."""
    holder, name = compat.CONCENTRATION.owner()
    return getattr(layer, "_yarn_concentration_factor", getattr(holder, name)(layer.config))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_exactly_one_carrier_is_active(carrier):
    model = build(start_run(longrope_attention_factor_carrier=carrier))
    by_softmax = carrier == "softmax"
    scale = PLAIN * ATTENTION_FACTOR**2
    assert model.config.softmax_scale == (pytest.approx(scale) if by_softmax else None)
    assert model.rotary_pos_emb.factor_in_cos_sin is not by_softmax
    for layer in attentions(model):
        assert concentration(layer) == (1.0 if by_softmax else ATTENTION_FACTOR)
        assert layer.core_attention.softmax_scale == pytest.approx(scale if by_softmax else PLAIN)
        # What inference kernels take instead of the config's; None lets them take 1 / sqrt(d).
        expected = pytest.approx(scale) if by_softmax else None
        assert getattr(layer, "softmax_scale", None) == expected


def test_a_config_that_a_script_built_without_the_softmax_scale_is_refused():
    args = tiny_gpt.start_run()
    with pytest.raises(ValueError, match=r"has softmax_scale None, and the attention factor needs"):
        tiny_gpt.build(args, softmax_scale=None)


# Packed documents

LENGTHS = (24, 40, 9)


def pack(lengths, rows=None) -> PackedSeqParams:
    """megatron-core's description of documents, each in `rows` rows of the batch."""
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    padded = None
    if rows is not None:
        padded = torch.tensor([0, *torch.tensor(rows).cumsum(0)], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max(rows or lengths),
        max_seqlen_kv=max(rows or lengths),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_train_like_each_document_alone(name):
    arguments, options, rotation = VARIANTS[name]
    model = build(start_run(**arguments), **options)
    weights, reference = fill(model), decoder(**rotation)
    tokens, labels = random_tokens(1, sum(LENGTHS))
    ours = logits(model, tokens, labels=labels, packed_seq_params=pack(LENGTHS))
    theirs = reference.packed_losses(weights, tokens, labels, LENGTHS)
    assert_equal(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    assert_gradients(model, weights)


@pytest.mark.parametrize("lengths", [(RUN,), (RUN, 0, 0), (ORIGINAL, ORIGINAL), (1, 2, 61)])
def test_positions_restart_whatever_the_lengths_of_the_documents(lengths):
    model = build(start_run())
    weights = fill(model)
    tokens, labels = random_tokens(1, sum(lengths))
    ours = logits(model, tokens, labels=labels, packed_seq_params=pack(lengths))
    used = tuple(length for length in lengths if length)
    assert_equal(ours, decoder().packed_losses(weights, tokens, labels, used))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_padding_between_packed_documents_changes_nothing(carrier):
    model = build(start_run(longrope_attention_factor_carrier=carrier))
    weights = fill(model)
    rows = (28, 40, 12)
    tokens, labels = random_tokens(1, sum(rows))
    ours = logits(model, tokens, labels=labels, packed_seq_params=pack(LENGTHS, rows))
    for index, (length, start) in enumerate(zip(LENGTHS, (0, 28, 68), strict=True)):
        document = slice(start, start + length)
        theirs = decoder().losses(weights, tokens[:, document], labels[:, document])
        torch.testing.assert_close(
            ours[:, document], theirs.float(), **EXACT, msg=f"document {index}"
        )


def test_a_pack_whose_attention_factor_the_fused_kernel_would_drop_is_refused(monkeypatch):
    from megatron.core.models.common.embeddings import rope_utils

    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)

    def kernel(t, cu_seqlens, freqs, **options):
        """Transformer Engine's: no multiplier of cos and sin."""
        return rope_utils._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_group=group)

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", kernel)
    tokens, labels = random_tokens(1, sum(LENGTHS))

    def fused(carrier):
        """A script that packs without any flag of Megatron's, and leaves the fusion on."""
        model = build(start_run(longrope_attention_factor_carrier=carrier))
        model.config.apply_rope_fusion = True
        weights = fill(model)
        packed = logits(model, tokens, labels=labels, packed_seq_params=pack(LENGTHS))
        return packed, decoder().packed_losses(weights, tokens, labels, LENGTHS)

    assert_equal(*fused("softmax"))
    with pytest.raises(ValueError) as error:
        fused("rope")
    assert str(error.value) == (
        "attention factor 1.2 on cos and sin is ignored by the fused RoPE kernel for packed "
        "sequences; add --no-rope-fusion"
    )


# Half precision


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision_wrapping_rounds_no_angle(dtype, allowed, carrier):
    from megatron.core.transformer.module import Float16Module

    args = start_run(longrope_attention_factor_carrier=carrier)
    half = {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16}
    model = build(args, params_dtype=dtype, **half)
    inv_freq = model.rotary_pos_emb.inv_freq.clone()
    weights = fill(model)  # the rounded ones
    wrapped = Float16Module(model.config, model)
    rotary = wrapped.module.rotary_pos_emb
    assert type(rotary) is LongRopeRotaryEmbedding
    assert not list(rotary.parameters()) + list(rotary.buffers())
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, inv_freq)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    tokens, _ = random_tokens(2, RUN)
    ours = logits(wrapped, tokens)
    assert ours.dtype == torch.float32
    table = rotary(RUN)
    assert table.dtype == torch.float32
    errors = table[:, 0, 0, :4].double() - tiny_gpt.rope().angles(RUN)
    turns = (errors / (2 * math.pi)).round()
    assert (errors - 2 * math.pi * turns).abs().max() < 1e-6
    torch.testing.assert_close(
        ours, decoder().logits(weights, tokens).float(), rtol=0, atol=allowed
    )


# Activation recompute

RECOMPUTE = {  # name: TransformerConfig, forward passes of two layers' attention and MLP
    "full, uniform": (
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        (4, 4),
    ),
    "full, one layer": (
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        (3, 3),
    ),
    "core attention": (
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        (4, 2),
    ),
    # Other modules drop their output, for which megatron-core needs Transformer Engine.
    "MLP": ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, (2, 4)),
}


@pytest.mark.parametrize("packed", [False, True], ids=["sequence", "packed"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_recomputation_changes_no_bit_of_losses_and_gradients(cuda_answers, carrier, packed):
    args = start_run(longrope_attention_factor_carrier=carrier)
    tokens, labels = random_tokens(1, sum(LENGTHS)) if packed else random_tokens(2, RUN)

    def train(**recompute):
        model = build(args, **recompute).train()
        fill(model)
        calls = Counter()
        for layer in model.decoder.layers:
            for module in (layer.self_attention.core_attention, layer.mlp):
                module.register_forward_hook(lambda m, *_: calls.update([type(m)]))
        options = {"packed_seq_params": pack(LENGTHS)} if packed else {}
        losses = logits(model, tokens, labels=labels, **options)
        losses.sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return [losses.detach(), *gradients], tuple(calls.values())

    plain, calls = train()
    assert calls == (2, 2)
    for name, (recompute, expected) in RECOMPUTE.items():
        ours, calls = train(**recompute)
        assert calls == expected, name
        assert all(torch.equal(*pair) for pair in zip(ours, plain, strict=True)), name


# Multi-token prediction


@pytest.mark.parametrize("lengths", [(RUN,), LENGTHS], ids=["sequence", "packed"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_multi_token_prediction_rotates_as_the_decoder_does(cuda_answers, carrier, lengths):
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )

    args = start_run(longrope_attention_factor_carrier=carrier)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    config = tiny_gpt.transformer_config(args, mtp_num_layers=1)
    options = {"spec": spec, "mtp_block_spec": get_gpt_mtp_block_spec(config, spec, False)}
    model = build(args, model_options=options, mtp_num_layers=1)
    weights = fill(model)
    seen = []
    model.mtp.register_forward_hook(lambda module, given, output: seen.append(output))
    tokens, labels = random_tokens(1, sum(lengths))
    packed = {"packed_seq_params": pack(lengths)} if len(lengths) > 1 else {}
    ours = logits(model, tokens, labels=labels, **packed)
    assert_equal(ours, decoder().packed_losses(weights, tokens, labels, lengths))
    _, predicted = seen[0][:, 0].chunk(2)  # [2 s, h]: the decoder's rows, then the layer's
    for ours, document in zip(predicted.split(lengths), tokens[0].split(lengths), strict=True):
        assert_equal(ours, decoder().multi_token_hidden(weights, document))
