"""The CUDA kernels behind core attention in half precision, by their error against fp64.

The allowed error is what torch's own attention makes on the same half inputs, document by document:
single elements of a gradient lie far from fp64 where scores are large, whatever the kernel.
"""

import pytest
import torch

pytest.importorskip("megatron.core")

from attention_cases import (
    SCALE,
    Pack,
    core_attention,
    output_and_gradients,
    packed_reference,
    random_batch,
    reference,
    relative_errors,
    stock_attention,
    tokens_scale,
    with_scale,
)

from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention, flash_kernels, tiles

pytestmark = pytest.mark.gpu
CLASSES = [SdpaCoreAttention, FlashCoreAttention]
HALF = [torch.bfloat16, torch.float16]
SCALES = [None, 1.5 * SCALE]  # by the document's length, or the run's, with its attention factor
DEVICE = "cuda"


def module_of(cls, scale):
    """With a softmax scale for all documents, or one by each document's length."""
    if cls.kernel == "flash":
        try:
            flash_kernels.find(flash_kernels.capability())
        except ValueError as error:
            pytest.skip(str(error))
    if scale is None:
        return core_attention(with_scale(cls))
    return core_attention(cls, softmax_scale=scale)


def on_gpu(batch, dtype):
    return [x.to(DEVICE, dtype) for x in batch]


def assert_as_near_as_stock(ours, stock, exact):
    errors, allowed = (relative_errors(values, exact) for values in (ours, stock))
    for name, error, limit in zip(["output", "dq", "dk", "dv"], errors, allowed, strict=True):
        assert error <= 2 * limit + 1e-3, f"{name}: {error:.2e} against {limit:.2e}"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_a_pack_equals_each_document_alone_with_gradients(cls, dtype, scale, groups):
    pack = Pack((70, 0, 33), (72, 8, 40), tail=4)
    module = module_of(cls, scale)
    batch = on_gpu(random_batch(pack.total, groups=groups), dtype)
    options = {"scale_of": tokens_scale} if scale is None else {"plain": scale}
    packed = pack.params()
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        setattr(packed, name, getattr(packed, name).to(DEVICE))
    ours = output_and_gradients(lambda *qkv: module(*qkv, packed_seq_params=packed), *batch)
    stock = output_and_gradients(
        lambda *qkv: packed_reference(*qkv, pack, **options, attention=stock_attention),
        *batch,
    )
    exact = output_and_gradients(
        lambda *qkv: packed_reference(*qkv, pack, **options),
        *(x.double().cpu() for x in batch),
    )
    assert_as_near_as_stock(ours, stock, exact)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("queries", [64, 16, 1])
def test_the_last_query_stands_at_the_last_key(cls, dtype, scale, queries):
    batch = on_gpu(random_batch(queries, keys=64, groups=2, batch=2), dtype)
    ours = output_and_gradients(module_of(cls, scale), *batch)
    scale = scale or SCALE * tokens_scale(64)
    stock = output_and_gradients(lambda *qkv: stock_attention(*qkv, scale), *batch)
    exact = output_and_gradients(
        lambda *qkv: reference(*qkv, scale), *(x.double().cpu() for x in batch)
    )
    assert_as_near_as_stock(ours, stock, exact)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_of_the_ring(groups, causal, dtype):
    query, key, value, _ = (x.to(DEVICE) for x in random_batch(64, groups=groups, batch=2))
    # [s, b, h, d] -> [b, s, h, d]
    tensors = [x.to(dtype).transpose(0, 1) for x in (query, key, value)]
    heads_first = [x.transpose(1, 2) for x in tensors]
    expected = tiles._flash_cuda if dtype == torch.bfloat16 else tiles._blockwise
    assert tiles._kernel(*heads_first, causal) is expected
    ours = tiles.attend_tile(*tensors, SCALE, causal)
    exact = tiles._blockwise(*(x.double() for x in heads_first), SCALE, causal)
    assert ours[1].dtype == torch.float32
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    errors = relative_errors(ours, [x.transpose(1, 2).cpu() for x in exact])
    assert max(errors) <= limit
