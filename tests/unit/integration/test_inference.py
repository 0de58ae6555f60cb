"""Megatron's inference paths give the reference's logits, whatever carries the attention factor.

Static contexts run as they are. Dynamic contexts and flash decoding need CUDA kernels: here
megatron-core's own code calls plain-torch functions in their place.
"""

from dataclasses import replace

import pytest
import tiny_gpt
import torch
from tiny_gpt import (
    ATTENTION_FACTOR,
    HEAD_DIM,
    RUN,
    build,
    decoder,
    fill,
    random_tokens,
    start_run,
)

pytest.importorskip("megatron.training")

import fake_inference
from fake_inference import DynamicContext, inference_mode
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_longrope.config import FactorSet
from megatron_longrope.integration import compat

PLAIN = HEAD_DIM**-0.5  # softmax scale without an attention factor
SCALED = PLAIN * ATTENTION_FACTOR**2
PROMPT = 20
BEFORE_0_19 = compat.megatron_version().startswith(("0.17.", "0.18."))
VARIANTS = {  # name: Megatron's arguments, TransformerConfig, the reference's rotation
    "softmax": ({}, {}, {}),
    "rope": ({"longrope_attention_factor_carrier": "rope"}, {}, {}),
    "half of each head": ({"rotary_percent": 0.5}, {}, {"rotary_dim": 4}),
    "interleaved": ({}, {"rotary_interleaved": True}, {"interleaved": True}),
}


@pytest.fixture(autouse=True)
def kernels_for_the_cpu(monkeypatch, megatron):
    fake_inference.install(monkeypatch)
    with torch.no_grad():
        yield


def static_logits(model, tokens, context) -> torch.Tensor:
    """`[b, s]`: a prompt, then token by token; logits after the prompt and after each token."""
    outputs = []
    with inference_mode():
        for start, end in [(0, PROMPT), *((n, n + 1) for n in range(PROMPT, tokens.shape[1]))]:
            outputs.append(
                model(
                    tokens[:, start:end],
                    torch.arange(start, end)[None],
                    None,
                    inference_context=context,
                    runtime_gather_output=True,
                )
            )
            context.increment_sequence_len_offset(end - start)
            context.enable_decode_mode()
    assert all(output.shape[1] == 1 for output in outputs)  # the last token's
    return torch.cat(outputs, dim=1)


def dynamic_logits(model, documents, context, steps) -> list[torch.Tensor]:
    """Logits of every token of requests that run together: prompts, then `steps` tokens each."""
    prompts = [len(document) - steps for document in documents]
    outputs = [[] for _ in documents]
    with inference_mode():
        for counts in [prompts] + [[1] * len(documents)] * steps:
            context.schedule(counts)
            spans = [slice(h - c, h) for h, c in zip(context.held, counts, strict=True)]
            ours = model(
                torch.cat([d[span] for d, span in zip(documents, spans, strict=True)])[None],
                context.token_to_pos_ids[None],
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
            for output, part in zip(outputs, ours[0].split(counts), strict=True):
                output.append(part)
    return [torch.cat(parts) for parts in outputs]


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-5)


# Static contexts


@pytest.mark.parametrize("name", VARIANTS)
def test_static_decoding_continues_the_full_forward_pass(name):
    arguments, options, rotation = VARIANTS[name]
    model = build(start_run(**arguments), **options).eval()
    weights = fill(model)
    tokens, _ = random_tokens(2, RUN - 8)
    ours = static_logits(model, tokens, StaticInferenceContext(2, RUN))
    assert_equal(ours, decoder(**rotation).logits(weights, tokens)[:, PROMPT - 1 :])


@pytest.mark.parametrize("flash_decode", [False, True])
def test_a_context_that_needs_another_attention_factor_is_refused(flash_decode):
    config = replace(tiny_gpt.longrope_config(), attention_factor=None)
    config = config.with_factor_set(FactorSet(2 * RUN, (1.0, 1.5, 2.5, 4.0)))
    model = build(start_run(config, flash_decode=flash_decode)).eval()
    tokens, _ = random_tokens(1, PROMPT + 1)
    assert static_logits(model, tokens[:, :PROMPT], StaticInferenceContext(1, RUN)).isfinite().all()
    longer = StaticInferenceContext(1, RUN + 1)
    with pytest.raises(ValueError, match="a sequence of 65 tokens needs attention factor"):
        static_logits(model, tokens, longer)
    beyond = StaticInferenceContext(1, 2 * RUN + 1)
    with pytest.raises(ValueError, match="exceeds 128, the max_length of the largest factor set"):
        static_logits(model, tokens, beyond)


@pytest.mark.parametrize(("capacity", "mode"), [(RUN, "auto"), (tiny_gpt.ORIGINAL, "short")])
def test_in_mixed_windows_the_capacity_decides_angles_and_softmax_scale(capacity, mode):
    config = replace(tiny_gpt.longrope_config(), attention_factor=None)
    model = build(start_run(config, longrope_mode="mixed", dataloader_inter_document_masking=True))
    weights = fill(model.eval())
    tokens, _ = random_tokens(2, capacity - 4)
    ours = static_logits(model, tokens, StaticInferenceContext(2, capacity))
    factor = config.attention_factor_for(capacity)
    rotation = {"attention_factor": factor}
    if mode == "short":
        rotation |= {"num_start_tokens": 0}
    reference = decoder(**rotation)
    if mode == "short":
        reference = replace(reference, rope=replace(reference.rope, factors=(1.0,) * 4))
    assert_equal(ours, reference.logits(weights, tokens)[:, PROMPT - 1 :])


def test_a_dynamic_context_that_needs_another_scale_than_the_run_is_refused_in_mixed_windows():
    config = replace(tiny_gpt.longrope_config(), attention_factor=None)
    model = build(start_run(config, longrope_mode="mixed", dataloader_inter_document_masking=True))
    documents = [random_tokens(1, 9)[0][0]]
    with pytest.raises(ValueError, match="a sequence of 32 tokens needs attention factor 1, but"):
        dynamic_logits(model.eval(), documents, DynamicContext(1, tiny_gpt.ORIGINAL), steps=1)


# Flash decoding


@pytest.mark.parametrize("name", VARIANTS)
def test_flash_decoding_continues_the_full_forward_pass(name):
    arguments, options, rotation = VARIANTS[name]
    if name == "softmax":  # is refused; auto takes rope
        arguments = {"longrope_attention_factor_carrier": "auto"}
    args = start_run(flash_decode=True, **arguments)
    assert tiny_gpt.settings_of_run().carrier == "rope"
    model = build(args, **options).eval()
    weights = fill(model)
    tokens, _ = random_tokens(2, RUN - 8)
    ours = static_logits(model, tokens, StaticInferenceContext(2, RUN))
    assert_equal(ours, decoder(**rotation).logits(weights, tokens)[:, PROMPT - 1 :])
    # Two layers for each token behind the prompt, and Megatron passes no scale.
    assert fake_inference.scales == [None] * 2 * (tokens.shape[1] - PROMPT)
    # GPTModel asks for cos and sin at every step.
    rotary = model.rotary_pos_emb
    assert rotary.get_cos_sin(RUN)[0] is rotary.get_cos_sin(RUN)[0]


@pytest.mark.parametrize(("carrier", "factor"), [("softmax", 1.0), ("rope", ATTENTION_FACTOR)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_cos_and_sin_hold_the_attention_factor_exactly_when_they_carry_it(
    carrier, factor, interleaved
):
    args = start_run(longrope_attention_factor_carrier=carrier)
    model = build(args, rotary_interleaved=interleaved)
    cos, sin = model.rotary_pos_emb.get_cos_sin(RUN)
    assert cos.shape == sin.shape == (RUN, HEAD_DIM // 2)
    assert cos.dtype == sin.dtype == torch.float32
    angles = tiny_gpt.rope().angles(RUN)
    for ours, theirs in ((cos, angles.cos()), (sin, angles.sin())):
        torch.testing.assert_close(ours.double(), theirs * factor, rtol=0, atol=1e-6)


# Dynamic batching


@pytest.mark.parametrize("fused_rope", [False, True], ids=["unfused", "flashinfer"])
@pytest.mark.parametrize("name", VARIANTS)
def test_dynamic_batching_gives_each_request_its_logits(name, fused_rope):
    arguments, options, rotation = VARIANTS[name]
    model = build(start_run(**arguments), **options).eval()
    weights = fill(model)
    documents = [random_tokens(1, length, seed=length)[0][0] for length in (25, 38)]
    context = DynamicContext(2, RUN, fused_rope=fused_rope)
    if BEFORE_0_19:
        with pytest.raises(ValueError, match="drops the attention factor when it decodes"):
            dynamic_logits(model, documents, context, steps=6)
        return
    ours = dynamic_logits(model, documents, context, steps=6)
    for output, document in zip(ours, documents, strict=True):
        assert_equal(output, decoder(**rotation).logits(weights, document[None])[0])
    by_softmax = tiny_gpt.settings_of_run().carrier == "softmax"
    # Two layers, a step for the prompts and six for the rest.
    assert fake_inference.scales == pytest.approx([SCALED if by_softmax else PLAIN] * 14)


@pytest.mark.parametrize("fused_rope", [False, True], ids=["unfused", "flashinfer"])
@pytest.mark.parametrize(
    ("lengths", "steps"),
    [((25, 38), 6), ((RUN, RUN), 1)],  # together more tokens than a sequence may have
)
def test_dynamic_batching_without_an_attention_factor_runs_in_every_release(
    lengths, steps, fused_rope
):
    config = replace(tiny_gpt.longrope_config(), attention_factor=1.0)
    model = build(start_run(config)).eval()
    weights = fill(model)
    documents = [random_tokens(1, length, seed)[0][0] for seed, length in enumerate(lengths)]
    context = DynamicContext(2, RUN, fused_rope=fused_rope)
    ours = dynamic_logits(model, documents, context, steps=steps)
    for output, document in zip(ours, documents, strict=True):
        assert_equal(output, decoder(attention_factor=1.0).logits(weights, document[None])[0])
