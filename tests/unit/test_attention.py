"""`SdpaCoreAttention` on one process against a naive softmax in fp64."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("megatron.core")

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longrope import attention as attention_module
from megatron_longrope.attention import SdpaCoreAttention

HEAD_DIM = 8


def core_attention(
    *, config_options=None, mask_type=AttnMaskType.causal, **options
) -> SdpaCoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        **(config_options or {}),
    )
    return SdpaCoreAttention(config, 1, mask_type, "self", **options)


def random_qkv(queries=12, keys=12, heads=4, groups=4, value_dim=HEAD_DIM, batch=2):
    generator = torch.Generator().manual_seed(queries * 1000 + keys + groups)

    def random(*shape):
        tensor = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return tensor.requires_grad_()

    return (
        random(queries, batch, heads, HEAD_DIM),
        random(keys, batch, groups, HEAD_DIM),
        random(keys, batch, groups, value_dim),
    )


def naive_attention(query, key, value, scale, causal=True):
    """One query at a time: softmax over the keys up to its own position."""
    s, _, h, _ = query.shape
    repeat = h // key.shape[2]
    rows = []
    for i in range(s):
        visible = key.shape[0] - s + i + 1 if causal else key.shape[0]
        heads = []
        for j in range(h):
            k, v = key[:visible, :, j // repeat], value[:visible, :, j // repeat]
            scores = (k * query[i, :, j]).sum(-1) * scale  # [keys, b]
            heads.append((torch.softmax(scores, dim=0)[..., None] * v).sum(0))
        rows.append(torch.cat(heads, dim=-1))  # [b, h * d_v]
    return torch.stack(rows)


def assert_same_with_gradients(module, tensors, expected):
    ours = module(*tensors)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    ours_grads = torch.autograd.grad((ours * weights).sum(), tensors)
    their_grads = torch.autograd.grad((expected * weights).sum(), tensors)
    for mine, theirs in zip(ours_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_output_and_gradients_equal_a_naive_causal_softmax_with_grouped_queries(groups):
    tensors = random_qkv(groups=groups)
    expected = naive_attention(*tensors, 1 / math.sqrt(HEAD_DIM))
    assert expected.shape == (12, 2, 4 * HEAD_DIM)
    assert_same_with_gradients(core_attention(), tensors, expected)


def test_the_softmax_scale_replaces_the_default():
    tensors = random_qkv()
    module = core_attention(softmax_scale=0.77)
    assert_same_with_gradients(module, tensors, naive_attention(*tensors, 0.77))


def test_values_may_have_another_width_than_keys():
    tensors = random_qkv(groups=2, value_dim=5)
    expected = naive_attention(*tensors, 1 / math.sqrt(HEAD_DIM))
    assert_same_with_gradients(core_attention(), tensors, expected)


@pytest.mark.parametrize("queries", [1, 3, 11])
def test_fewer_queries_than_keys_are_the_last_ones_as_in_decoding(queries):
    tensors = random_qkv(queries=queries, groups=2)
    expected = naive_attention(*tensors, 1 / math.sqrt(HEAD_DIM))
    assert_same_with_gradients(core_attention(), tensors, expected)


def test_decoding_token_by_token_equals_one_pass():
    query, key, value = random_qkv(groups=2)
    module = core_attention()
    whole = module(query, key, value)
    steps = [module(query[i : i + 1], key[: i + 1], value[: i + 1]) for i in range(len(query))]
    torch.testing.assert_close(torch.cat(steps), whole, rtol=1e-12, atol=1e-12)


def test_padding_causal_is_causal_and_no_mask_sees_every_key():
    tensors = random_qkv()
    scale = 1 / math.sqrt(HEAD_DIM)
    causal = core_attention(mask_type=AttnMaskType.padding_causal)
    assert_same_with_gradients(causal, tensors, naive_attention(*tensors, scale))
    full = core_attention(mask_type=AttnMaskType.no_mask)
    expected = naive_attention(*tensors, scale, causal=False)
    assert_same_with_gradients(full, tensors, expected)


def test_the_mask_type_of_a_call_wins_over_the_modules():
    tensors = random_qkv()
    module = core_attention(mask_type=AttnMaskType.causal)
    ours = module(*tensors, attn_mask_type=AttnMaskType.no_mask)
    expected = naive_attention(*tensors, 1 / math.sqrt(HEAD_DIM), causal=False)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cp_group", [None, SimpleNamespace(size=lambda: 1, rank=lambda: 0)])
def test_a_training_pass_holds_no_dense_mask(monkeypatch, cp_group):
    calls = []
    sdpa = F.scaled_dot_product_attention

    def recorded(*args, **options):
        calls.append((options["attn_mask"], options["is_causal"]))
        return sdpa(*args, **options)

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", recorded)
    module = core_attention(pg_collection=SimpleNamespace(cp=cp_group))
    module(*random_qkv())
    assert calls == [(None, True)]


def test_dropout_acts_in_training_only():
    tensors = random_qkv()
    module = core_attention(attention_dropout=0.5)
    expected = naive_attention(*tensors, 1 / math.sqrt(HEAD_DIM))
    assert not torch.allclose(module(*tensors), expected)
    torch.testing.assert_close(module.eval()(*tensors), expected, rtol=1e-12, atol=1e-12)


def test_the_modules_state_is_empty_so_that_checkpoints_stay_compatible():
    assert not core_attention().state_dict()


# Refusals


def test_sliding_windows_are_refused():
    with pytest.raises(ValueError) as error:
        core_attention(config_options={"window_size": (128, 0)})
    assert str(error.value) == (
        "window_size (128, 0) is not supported by sdpa attention; use --longrope-attention te"
    )


def test_attention_sinks_are_refused():
    with pytest.raises(ValueError) as error:
        core_attention(config_options={"softmax_type": "learnable"})
    assert str(error.value) == (
        "softmax_type 'learnable' is not supported by sdpa attention; use --longrope-attention te"
    )


def test_packed_sequences_are_refused():
    with pytest.raises(ValueError, match="packed sequences are not supported by sdpa attention"):
        core_attention()(*random_qkv(), packed_seq_params=object())


def test_an_attention_bias_is_refused():
    with pytest.raises(ValueError, match="attention_bias is not supported by sdpa attention"):
        core_attention()(*random_qkv(), attention_bias=torch.zeros(1))
