"""The CUDA kernels behind core attention, in half precision, against a plain softmax in fp64."""

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

from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention, tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLASSES = [SdpaCoreAttention, FlashCoreAttention]


def module_of(cls):
    if cls.kernel == "flash":
        pytest.importorskip("flash_attn")
    return core_attention(with_scale(cls))


def on_gpu(batch):
    return [x.to("cuda", torch.bfloat16) for x in batch]


def assert_near(ours, theirs):
    assert_same([x.double().cpu() for x in ours], theirs, tolerance=3e-2)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_a_pack_equals_each_document_alone_with_gradients(cls, groups):
    pack = Pack((70, 0, 33), (72, 8, 40), tail=4)
    module = module_of(cls)
    batch = on_gpu(random_batch(pack.total, groups=groups))
    packed = pack.params()
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        setattr(packed, name, getattr(packed, name).cuda())
    ours = output_and_gradients(lambda *qkv: module(*qkv, packed_seq_params=packed), *batch)
    theirs = output_and_gradients(
        lambda *qkv: packed_reference(*qkv, pack, scale_of=tokens_scale),
        *(x.double().cpu() for x in batch),
    )
    assert_near(ours, theirs)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("queries", [64, 16, 1])
def test_the_last_query_stands_at_the_last_key(cls, queries):
    batch = on_gpu(random_batch(queries, keys=64, groups=2, batch=2))
    ours = output_and_gradients(module_of(cls), *batch)
    theirs = output_and_gradients(
        lambda *qkv: reference(*qkv, SCALE * tokens_scale(64)), *(x.double().cpu() for x in batch)
    )
    assert_near(ours, theirs)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_of_the_ring(groups, causal, dtype):
    query, key, value, _ = (x.cuda() for x in random_batch(64, groups=groups, batch=2))
    # [s, b, h, d] -> [b, s, h, d]
    tensors = [x.to(dtype).transpose(0, 1) for x in (query, key, value)]
    heads_first = [x.transpose(1, 2) for x in tensors]
    expected = tiles._flash_cuda if dtype == torch.bfloat16 else tiles._blockwise
    assert tiles._kernel(*heads_first, causal) is expected
    ours = tiles.attend_tile(*tensors, SCALE, causal)
    exact = tiles._blockwise(*(x.double() for x in heads_first), SCALE, causal)
    assert ours[1].dtype == torch.float32
    for mine, theirs in zip(ours, exact, strict=True):
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            mine.double(), theirs.transpose(1, 2), rtol=tolerance, atol=tolerance
        )
