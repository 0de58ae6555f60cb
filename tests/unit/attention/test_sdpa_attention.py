"""`SdpaCoreAttention` on one sequence and one process against a plain softmax in fp64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("megatron.core")

from attention_cases import (
    HEAD_DIM,
    HEADS,
    SCALE,
    assert_same,
    core_attention,
    output_and_gradients,
    random_batch,
    reference,
    tokens_scale,
    with_scale,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_longrope.attention import SdpaCoreAttention
from megatron_longrope.attention import sdpa as sdpa_module

OR_LOCAL = ", or --longrope-attention local"


def assert_equal_to_the_reference(module, batch, scale=SCALE, causal=True):
    theirs = output_and_gradients(lambda *qkv: reference(*qkv, scale, causal), *batch)
    assert_same(output_and_gradients(module, *batch), theirs)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_output_and_gradients_equal_a_causal_softmax_with_grouped_queries(groups):
    batch = random_batch(12, groups=groups, batch=2)
    assert core_attention()(*batch[:3]).shape == (12, 2, HEADS * HEAD_DIM)
    assert_equal_to_the_reference(core_attention(), batch)


@pytest.mark.parametrize("queries", [12, 1])
def test_the_document_scale_is_that_of_the_whole_sequence(queries):
    module = core_attention(with_scale(SdpaCoreAttention), softmax_scale=0.5)
    batch = random_batch(queries, keys=12, batch=2)
    assert_equal_to_the_reference(module, batch, scale=0.5 * tokens_scale(12))


def test_values_may_have_another_width_than_keys():
    assert_equal_to_the_reference(
        core_attention(), random_batch(12, groups=2, value_dim=5, batch=2)
    )


@pytest.mark.parametrize("queries", [1, 3, 11])
def test_fewer_queries_than_keys_are_the_last_ones_as_in_decoding(queries):
    batch = random_batch(queries, keys=12, groups=2, batch=2)
    assert_equal_to_the_reference(core_attention(), batch)


def test_padding_causal_is_causal_and_no_mask_sees_every_key():
    batch = random_batch(12, batch=2)
    causal = core_attention(mask_type=AttnMaskType.padding_causal)
    assert_equal_to_the_reference(causal, batch)
    full = core_attention(mask_type=AttnMaskType.no_mask)
    assert_equal_to_the_reference(full, batch, causal=False)


def test_the_mask_type_of_a_call_wins_over_the_modules():
    *qkv, _ = random_batch(12, batch=2)
    ours = core_attention()(*qkv, attn_mask_type=AttnMaskType.no_mask)
    assert_same([ours], [reference(*qkv, causal=False)])


def test_a_description_of_an_unpacked_batch_changes_nothing():
    *qkv, _ = random_batch(12, batch=2)
    ours = core_attention()(*qkv, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))
    assert_same([ours], [reference(*qkv)])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_output_is_contiguous_because_megatron_views_it(batch):
    *qkv, _ = random_batch(12, groups=2, batch=batch)
    assert core_attention()(*qkv).is_contiguous()


@pytest.mark.parametrize("cp_group", [None, SimpleNamespace(size=lambda: 1, rank=lambda: 0)])
def test_a_training_pass_holds_no_dense_mask(monkeypatch, cp_group):
    calls = []
    sdpa = F.scaled_dot_product_attention

    def recorded(*args, **options):
        calls.append((options["attn_mask"], options["is_causal"]))
        return sdpa(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    module = core_attention(pg_collection=SimpleNamespace(cp=cp_group))
    module(*random_batch(12, batch=2)[:3])
    assert calls == [(None, True)]


def test_several_new_tokens_after_cached_ones_without_a_mask_are_refused():
    query, key, value, _ = random_batch(8, batch=2)
    with pytest.raises(ValueError, match="3 new tokens came after 5 cached ones without a mask"):
        core_attention()(query[5:], key, value, attn_mask_type=AttnMaskType.no_mask)


def test_no_mask_on_the_cpu_is_larger_than_its_budget(monkeypatch):
    sizes = []
    sdpa = F.scaled_dot_product_attention

    def recorded(*args, **options):
        sizes.append(0 if options["attn_mask"] is None else options["attn_mask"].numel())
        return sdpa(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(sdpa_module, "_MASK", 40)
    assert_equal_to_the_reference(core_attention(), random_batch(11, keys=16, groups=2, batch=2))
    assert len(sizes) > 4 and max(sizes) <= 40


def test_dropout_acts_in_training_only():
    *qkv, _ = random_batch(12, batch=2)
    module = core_attention(attention_dropout=0.5)
    assert not torch.allclose(module(*qkv), reference(*qkv))
    assert_same([module.eval()(*qkv)], [reference(*qkv)])


def test_the_modules_state_is_empty_so_that_checkpoints_stay_compatible():
    assert not core_attention().state_dict()


# Sliding windows


def windowed(query, key, value, window):
    """A softmax over the last `window` keys of each query, the last query at the last key."""
    rows, columns, group = query.shape[0], key.shape[0], query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, 2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * SCALE
    at = torch.arange(columns - rows, columns)[:, None]
    keys = torch.arange(columns)
    hidden = (keys > at) | (keys <= at - window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


@pytest.mark.parametrize("queries", [21, 6, 1])
@pytest.mark.parametrize("window", [1, 5, 20, 40])
def test_a_sliding_window_sees_its_last_keys_in_bands_of_queries(monkeypatch, queries, window):
    monkeypatch.setattr(sdpa_module, "_BAND", 4)
    batch = random_batch(queries, keys=21, groups=2, batch=2)
    module = core_attention(config_options={"window_size": (window - 1, 0)})
    theirs = output_and_gradients(lambda *qkv: windowed(*qkv, window), *batch)
    assert_same(output_and_gradients(module, *batch), theirs)
    if queries == 1:  # static inference drops the mask of a single new token
        ours = module(*batch[:3], attn_mask_type=AttnMaskType.no_mask)
        assert_same([ours], [windowed(*batch[:3], window)])


def test_a_sliding_window_does_not_go_with_context_parallelism():
    two = SimpleNamespace(cp=SimpleNamespace(size=lambda: 2, rank=lambda: 0))
    with pytest.raises(ValueError, match=r"window_size \(8, 0\) with context parallelism"):
        core_attention(config_options={"window_size": (8, 0)}, pg_collection=two)


# Refusals


@pytest.mark.parametrize(
    "options, what, remedy",
    [
        ({"window_size": (128, 4)}, "window_size (128, 4)", ""),
        (
            {"window_size": (8, 0), "window_attn_skip_freq": 2},
            "window_size (8, 0) with window_attn_skip_freq 2",
            "",
        ),
        ({"softmax_type": "learnable"}, "softmax_type 'learnable'", OR_LOCAL),
    ],
)
def test_other_windows_and_attention_sinks_are_refused(options, what, remedy):
    with pytest.raises(ValueError) as error:
        core_attention(config_options=options)
    assert str(error.value) == (
        f"{what} is not supported by sdpa attention; use --transformer-impl transformer_engine"
        f"{remedy}"
    )


@pytest.mark.parametrize(
    "options, what, remedy",
    [
        ({"attention_bias": torch.zeros(1)}, "attention_bias", ""),
        ({"attn_mask_type": AttnMaskType.arbitrary}, "attention mask type arbitrary", OR_LOCAL),
        ({"packed_seq_params": PackedSeqParams(qkv_format="bshd")}, "qkv_format 'bshd'", ""),
        (
            {"packed_seq_params": PackedSeqParams(qkv_format="sbhd", local_cp_size=2)},
            "hybrid context parallelism, a group for each batch,",
            "",
        ),
    ],
)
def test_what_would_silently_change_the_result_is_refused(options, what, remedy):
    with pytest.raises(ValueError) as error:
        core_attention()(*random_batch(12, batch=2)[:3], **options)
    assert str(error.value) == (
        f"{what} is not supported by sdpa attention; use --transformer-impl transformer_engine"
        f"{remedy}"
    )


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError) as error:
        core_attention()(*random_batch(5, keys=4, batch=2)[:3])
    assert str(error.value) == (
        "document 0 has 5 queries but 4 keys, so that its first queries see nothing; "
        "give every query its own key"
    )
