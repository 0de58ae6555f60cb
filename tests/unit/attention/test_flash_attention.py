"""`FlashCoreAttention` on functions with flash-attn's documented behaviour."""

import sys

import pytest
import torch

pytest.importorskip("megatron.core")

from attention_cases import (
    SCALE,
    Pack,
    assert_same,
    core_attention,
    output_and_gradients,
    packed_reference,
    random_batch,
    reference,
    tokens_scale,
    with_scale,
)

from megatron_longrope.attention import FlashCoreAttention


@pytest.mark.parametrize("queries", [12, 3, 1])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_output_and_gradients_equal_a_causal_softmax(flash_in_fp64, queries, groups):
    batch = random_batch(queries, keys=12, groups=groups, batch=2)
    ours = output_and_gradients(core_attention(FlashCoreAttention), *batch)
    assert_same(ours, output_and_gradients(reference, *batch))
    assert flash_in_fp64.calls == {"flash_attn_func": 1}


def test_one_document_takes_its_scale_in_the_call(flash_in_fp64):
    *qkv, _ = random_batch(12, batch=2)
    ours = core_attention(with_scale(FlashCoreAttention))(*qkv)
    assert_same([ours], [reference(*qkv, SCALE * tokens_scale(12))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(flash_attn, dtype):
    pack = Pack.tight(5, 7)
    qkv = [x.to(dtype) for x in random_batch(pack.total, groups=2)[:3]]
    module = core_attention(with_scale(FlashCoreAttention))
    output = module(*qkv, packed_seq_params=pack.params())
    assert output.dtype == dtype
    theirs = packed_reference(*qkv, pack, scale_of=tokens_scale)
    assert_same([output], [theirs], tolerance=4 * torch.finfo(dtype).eps)


def test_deterministic_mode_reaches_the_kernel(flash_in_fp64):
    module = core_attention(FlashCoreAttention, config_options={"deterministic_mode": True})
    module(*random_batch(12, batch=2)[:3])
    assert flash_in_fp64.calls == {"deterministic": 1}


def test_dropout_acts_in_training_only(flash_in_fp64):
    *qkv, _ = random_batch(12, batch=2)
    module = core_attention(FlashCoreAttention, attention_dropout=0.5)
    assert not torch.allclose(module(*qkv), reference(*qkv))
    assert_same([module.eval()(*qkv)], [reference(*qkv)])


def test_the_output_is_contiguous_because_megatron_views_it(flash_in_fp64):
    assert core_attention(FlashCoreAttention)(*random_batch(12, batch=2)[:3]).is_contiguous()


# Refusals


def test_without_a_package_the_error_says_why_for_each(monkeypatch):
    for name in ("flash_attn", "flash_attn_interface", "flash_attn_3"):
        monkeypatch.setitem(sys.modules, name, None)  # import raises ModuleNotFoundError
    with pytest.raises(ValueError) as error:
        core_attention(FlashCoreAttention)
    assert str(error.value).startswith(
        "flash-attn 2 cannot be used (import of flash_attn halted; None in sys.modules); "
        "flash-attn 3 cannot be used ("
    )


def test_a_release_with_another_causal_mask_is_refused(flash_attn, monkeypatch):
    monkeypatch.setattr(flash_attn, "__version__", "2.0.9.post1")
    with pytest.raises(ValueError, match=r"2\.0\.9\.post1 is older than 2\.1, which changed the c"):
        core_attention(FlashCoreAttention)


def test_single_precision_is_refused_and_never_falls_back(flash_attn):
    qkv = [x.float() for x in random_batch(12, batch=2)[:3]]
    with pytest.raises(ValueError) as error:
        core_attention(FlashCoreAttention)(*qkv)
    assert str(error.value) == (
        "flash attention computes in float16 or bfloat16, got torch.float32; "
        "train with --bf16 or use --longrope-attention sdpa"
    )
    assert not flash_attn.calls


def test_values_of_another_width_are_refused(flash_attn):
    qkv = [x.bfloat16() for x in random_batch(12, batch=2, value_dim=5)[:3]]
    with pytest.raises(ValueError) as error:
        core_attention(FlashCoreAttention)(*qkv)
    assert str(error.value) == (
        "flash attention needs keys and values of one width, got 8 and 5; "
        "use --longrope-attention sdpa"
    )


def test_its_refusals_name_it(flash_attn):
    with pytest.raises(ValueError) as error:
        core_attention(FlashCoreAttention, config_options={"window_size": (128, 0)})
    assert str(error.value) == (
        "window_size (128, 0) is not supported by flash attention; use --longrope-attention sdpa"
    )
    with pytest.raises(ValueError, match=r"\(128, 4\) is not .* use --transformer-impl t"):
        core_attention(FlashCoreAttention, config_options={"window_size": (128, 4)})
