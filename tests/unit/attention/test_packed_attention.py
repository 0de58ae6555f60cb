"""Packed documents on one process: each as if it were alone, with every kernel."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("megatron.core")

from attention_cases import (
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
from fake_flash_attn import flash_attn_varlen_func
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_longrope.attention import (
    FlashCoreAttention,
    SdpaCoreAttention,
    documents,
    varlen,
)

CLASSES = [SdpaCoreAttention, FlashCoreAttention]
pytestmark = pytest.mark.usefixtures("flash_in_fp64")


@st.composite
def packs(draw) -> Pack:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    paddings = draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    rows = [length + padding for length, padding in zip(lengths, paddings, strict=True)]
    if draw(st.booleans()):
        rows = lengths
    return Pack(tuple(lengths), tuple(rows), tail=draw(st.integers(0, 3)))


@pytest.mark.one_release
@pytest.mark.parametrize("cls", CLASSES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pack=packs(), groups=st.sampled_from([4, 2, 1]), causal=st.booleans(), scaled=st.booleans())
def test_a_pack_equals_each_document_alone_with_gradients(cls, pack, groups, causal, scaled):
    mask_type = AttnMaskType.padding_causal if causal else AttnMaskType.no_mask
    module = core_attention(with_scale(cls) if scaled else cls, mask_type=mask_type)
    batch = random_batch(pack.total, groups=groups)
    ours = output_and_gradients(lambda *qkv: module(*qkv, packed_seq_params=pack.params()), *batch)
    scale_of = tokens_scale if scaled else None
    theirs = output_and_gradients(
        lambda *qkv: (
            packed_reference(*qkv, pack, scale_of=scale_of, causal=causal)
            + sum(x.sum() for x in qkv) * 0.0
        ),  # a pack of padding alone has gradients, too
        *batch,
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("cls", CLASSES)
def test_queries_and_keys_of_a_document_may_differ_in_number(cls):
    query, key, value, _ = random_batch(3, keys=12, groups=2)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=torch.tensor([0, 1, 3]),
        cu_seqlens_kv=torch.tensor([0, 7, 12]),
    )
    ours = core_attention(cls)(query, key, value, packed_seq_params=packed)
    theirs = [
        reference(query[:1], key[:7], value[:7]),
        reference(query[1:], key[7:], value[7:]),
    ]
    assert_same([ours], [torch.cat(theirs)])


def test_a_cu_seqlens_of_fixed_size_is_filled_with_its_last_entry():
    *qkv, _ = random_batch(9)
    packed = Pack.tight(4, 5).params()
    packed.cu_seqlens_q = packed.cu_seqlens_kv = torch.tensor([0, 4, 9, 9, 9])
    ours = core_attention()(*qkv, packed_seq_params=packed)
    assert_same([ours], [packed_reference(*qkv, Pack.tight(4, 5))])


def test_the_scale_of_a_document_follows_its_padded_length_as_rope_does():
    *qkv, _ = random_batch(16)
    seen = []
    cls = type("Seen", (SdpaCoreAttention,), {"document_scale": staticmethod(seen.append)})
    with pytest.raises(TypeError):  # append returns no factor
        core_attention(cls)(*qkv, packed_seq_params=Pack((5, 6), (8, 8)).params())
    assert seen == [8]


def test_no_kernel_call_covers_more_than_one_document(monkeypatch):
    shapes = []
    sdpa = F.scaled_dot_product_attention

    def recorded(query, key, *args, **options):
        shapes.append((query.shape[2], key.shape[2], options["attn_mask"]))
        return sdpa(query, key, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    pack = Pack((5, 0, 7), (6, 2, 7))
    core_attention()(*random_batch(pack.total)[:3], packed_seq_params=pack.params())
    assert shapes == [(5, 5, None), (7, 7, None)]


def test_flash_takes_a_whole_pack_in_one_call_for_each_scale(flash_in_fp64):
    pack = Pack((5, 3, 7, 2), (6, 4, 7, 4), tail=1)
    batch = random_batch(pack.total)[:3]
    core_attention(FlashCoreAttention)(*batch, packed_seq_params=pack.params())
    assert flash_in_fp64.calls == {"flash_attn_varlen_func": 1}
    scale = staticmethod(lambda rows: 1.0 + (rows > 4))
    mixed = type("Mixed", (FlashCoreAttention,), {"document_scale": scale})
    core_attention(mixed)(*batch, packed_seq_params=pack.params())
    assert flash_in_fp64.calls == {"flash_attn_varlen_func": 3}


def test_the_offsets_of_a_pack_are_read_once_for_all_layers(monkeypatch):
    read = []
    stock = documents._differences
    monkeypatch.setattr(documents, "_differences", lambda *a: read.append(a) or stock(*a))
    packed = Pack.tight(4, 5).params()
    batch = random_batch(9)[:3]
    for _ in range(3):
        core_attention()(*batch, packed_seq_params=packed)
    assert len(read) == 1
    packed.cu_seqlens_q[1] = 3  # in place, as a captured graph's inputs change
    core_attention()(*batch, packed_seq_params=packed)
    assert len(read) == 2


def test_torchs_kernel_for_documents_of_any_lengths_gets_them_in_one_call(monkeypatch):
    """A stand-in with its signature: the kernel itself needs CUDA (tests/gpu)."""
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        calls.append(options.pop("enable_gqa"))
        scale, window = options.pop("scale"), options.pop("window_size")
        assert not options and window == (-1, 0) and cu_seq_q is cu_seq_k
        return flash_attn_varlen_func(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, scale, True
        )

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "fits", lambda *_: True)
    pack = Pack((5, 3, 7), (6, 4, 7), tail=1)
    *qkv, _ = random_batch(pack.total, groups=2)
    ours = core_attention()(*qkv, packed_seq_params=pack.params())
    assert_same([ours], [packed_reference(*qkv, pack)])
    assert calls == [True]


def test_dropout_acts_within_a_pack_in_training_only():
    pack = Pack.tight(20, 30)
    *qkv, _ = random_batch(pack.total)
    module = core_attention(attention_dropout=0.5)
    expected = packed_reference(*qkv, pack)
    assert not torch.allclose(module(*qkv, packed_seq_params=pack.params()), expected)
    assert_same([module.eval()(*qkv, packed_seq_params=pack.params())], [expected])


# Refusals


def refusal(packed, rows=8, cp_size=1, **options) -> str:
    group = SimpleNamespace(size=lambda: cp_size, rank=lambda: 0)
    module = core_attention(pg_collection=SimpleNamespace(cp=group))
    *qkv, _ = random_batch(rows, **options)
    with pytest.raises(ValueError) as error:
        module(*qkv, packed_seq_params=packed)
    return str(error.value)


def packed_params(queries, padded=None, keys=None) -> PackedSeqParams:
    tensors = [None if offsets is None else torch.tensor(offsets) for offsets in (queries, padded)]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=tensors[0],
        cu_seqlens_q_padded=tensors[1],
        cu_seqlens_kv=tensors[0] if keys is None else torch.tensor(keys),
        cu_seqlens_kv_padded=tensors[1],
    )


def test_a_pack_of_several_rows_is_refused():
    assert refusal(packed_params([0, 8]), batch=2) == (
        "packed sequences came with a micro batch of 2; packing puts all documents into one row: "
        "use --micro-batch-size 1"
    )


def test_a_document_that_does_not_split_over_the_ranks_is_refused():
    assert refusal(packed_params([0, 4, 14, 22, 30]), cp_size=2) == (
        "packed document 1: sequence length 10 is not divisible by 2 x context parallel size "
        "2 = 4; use 12 or another context parallel size"
    )


def test_more_tokens_than_the_batch_holds_are_refused():
    assert refusal(packed_params([0, 4, 12]), rows=8) == (
        "the documents of the pack have 12 tokens but the batch 8; let cu_seqlens count the tokens "
        "of all context-parallel ranks"
    )


@pytest.mark.parametrize("offsets", [[1, 8], [0, 5, 3, 8], [[0, 4, 8]]])
def test_offsets_that_make_no_sense_are_refused(offsets):
    assert refusal(packed_params(offsets)) == (
        f"cu_seqlens_q is {offsets}; give one row that starts at 0 and never decreases"
    )


def test_a_pack_without_offsets_is_refused():
    assert refusal(packed_params(None)) == (
        "packed sequences came without cu_seqlens_q; set it in PackedSeqParams"
    )


def test_more_tokens_than_rows_are_refused():
    assert refusal(packed_params([0, 5, 8], padded=[0, 4, 8])) == (
        "document 0 has 5 tokens in cu_seqlens_q but 4 rows in cu_seqlens_q_padded; "
        "a document needs a row for each token"
    )


def test_offsets_of_other_documents_are_refused():
    assert refusal(packed_params([0, 4, 8], padded=[0, 8])) == (
        "cu_seqlens_q has 2 documents and cu_seqlens_q_padded 1; "
        "describe the same documents in both"
    )
    assert refusal(packed_params([0, 4, 8], keys=[0, 8])) == (
        "cu_seqlens_q has 2 documents and cu_seqlens_kv 1; give queries and keys the same documents"
    )


def test_decoding_under_context_parallelism_is_refused():
    assert refusal(packed_params([0, 4], keys=[0, 8]), rows=2, keys=4, cp_size=2) == (
        "queries of lengths (4,) and keys of lengths (8,) cannot share context parallel size 2; "
        "decode without context parallelism"
    )
