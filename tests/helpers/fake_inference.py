"""What Megatron's inference paths need CUDA for, in plain torch: kernels and a paged cache.

The kernels follow the documentation of flash-attn 2 and flashinfer; `scales` collects the softmax
scales that callers passed.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from torch import Tensor

scales: list[float | None] = []


def install(monkeypatch) -> None:
    """Put the kernels where megatron-core imports them, and the CPU where it asks for a device."""
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import attention

    scales.clear()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(rope_utils, "apply_rotary_emb_flash", rotate)
    monkeypatch.setattr(attention, "is_fa_min_version", lambda *_: True)
    monkeypatch.setattr(attention, "rearrange", lambda x, _: x.flatten(2))  # einops' 's b (h d)'
    monkeypatch.setattr(attention, "flash_attn_with_kvcache", attend_with_cache)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", attend_paged)
    fused = SimpleNamespace(rope=SimpleNamespace(apply_rope_with_cos_sin_cache=rotate_fused))
    monkeypatch.setattr(dynamic_context, "flashinfer", fused, raising=False)


def inference_mode():
    """megatron-core's mark that an engine runs the model; 0.17 takes eval mode for it."""
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:
        return contextlib.nullcontext()
    return InferenceMode.active()


# flash_attn.layers.rotary and flashinfer.rope


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`[b, s, h, d]` by the rows of `[s, rotary_dim / 2]`."""
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def rotate_fused(positions, query, key, head_size, cos_sin_cache, is_neox):
    """flashinfer's: `[n, h d]`; the cache holds cosines, then sines."""
    cos, sin = cos_sin_cache[positions].chunk(2, dim=-1)
    return tuple(
        rotate(x.view(1, len(x), -1, head_size), cos, sin, not is_neox).view_as(x)
        for x in (query, key)
    )


# flash_attn


def attend_with_cache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    rotary_interleaved=True,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    block_table=None,
    num_splits=0,
):
    """`[b, s, h, d]` new queries after `cache_seqlens`; new keys, if any, join the cache."""
    scales.append(softmax_scale)
    outputs = []
    for row, end in enumerate(cache_seqlens.tolist()):
        cache = row if block_table is None else int(block_table[row, 0])
        query = q[row]
        if k is not None:
            start, end = end, end + len(query)
            key = k[row]
            if rotary_cos is not None:
                cos, sin = rotary_cos[start:end], rotary_sin[start:end]
                query, key = (
                    rotate(x[None], cos, sin, rotary_interleaved)[0] for x in (query, key)
                )
            k_cache[cache, start:end], v_cache[cache, start:end] = key, v[row]
        outputs.append(_attend(query, k_cache[cache, :end], v_cache[cache, :end], softmax_scale))
    return torch.stack(outputs)


def attend_paged(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    block_table=None,
    return_attn_probs=False,
):
    """`[t, h, d]` queries of several requests, whose keys lie in the blocks of the table."""
    assert causal and not return_attn_probs
    scales.append(softmax_scale)
    counts = cu_seqlens_k.diff().tolist()
    queries = q.split(cu_seqlens_q.diff().tolist())
    blocks = block_table[:, 0].tolist()
    return torch.cat(
        [
            _attend(query, k[block, :count], v[block, :count], softmax_scale)
            for query, block, count in zip(queries, blocks, counts, strict=True)
        ]
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal, the last query at the last key: `[s, h, d]` and `[t, g, d]`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    seen = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


class DynamicContext(DynamicInferenceContext):
    """megatron-core's dynamic context around a cache of one block for each request.

    Rotation is megatron-core's own; the constructor, the scheduler and the Triton kernels that fill
    the cache, which need CUDA, are replaced.
    """

    def __init__(self, requests: int, max_sequence_length: int, *, fused_rope: bool = False):
        self.config = SimpleNamespace(materialize_only_last_token_logits=False)
        self.max_sequence_length = max_sequence_length
        self.use_flashinfer_fused_rope = fused_rope
        self.num_speculative_tokens = 0
        self.held = [0] * requests
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}

    def schedule(self, counts: list[int]) -> None:
        """The next step brings that many tokens of each request."""
        self.counts, self.held = counts, [a + b for a, b in zip(self.held, counts, strict=True)]
        positions = [torch.arange(h - c, h) for h, c in zip(self.held, counts, strict=True)]
        self.requests = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self.token_to_pos_ids = self.token_to_position_in_request = torch.cat(positions)
        self.gpu_view = self  # where the tensors lie from 0.18 on
        self.padded_active_token_count = sum(counts)

    def is_decode_only(self) -> bool:
        return set(self.counts) == {1}

    def using_cuda_graph_this_step(self) -> bool:
        return False

    def append_key_value_cache(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        shape = (len(self.held), self.max_sequence_length, *key.shape[-2:])
        keys, values = self.cache.setdefault(
            layer_number, (key.new_zeros(shape), key.new_zeros(shape))
        )
        keys[self.requests, self.token_to_pos_ids] = key.squeeze(1)
        values[self.requests, self.token_to_pos_ids] = value.squeeze(1)

    def key_value_cache(self, layer_number: int) -> tuple[Tensor, Tensor, Tensor]:
        return *self.cache[layer_number], torch.arange(len(self.held), dtype=torch.int32)[:, None]

    def cu_query_lengths(self) -> tuple[Tensor, int]:
        return _offsets(self.counts), max(self.counts)

    def cu_kv_lengths(self) -> tuple[Tensor, Tensor, int]:
        return _offsets(self.held), torch.tensor(self.held, dtype=torch.int32), max(self.held)


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
