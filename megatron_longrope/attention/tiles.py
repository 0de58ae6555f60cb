"""Attention of one tile with the logsumexp of its scores, which merging tiles needs; forward only.

torch's public `scaled_dot_product_attention` keeps the logsumexp to itself. Its flash kernels
return it; elsewhere a few rows at a time are computed with matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

_SCORES = 2**24  # fp32 scores that exist at once where no kernel fits: 64 MiB


def attend_tile(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one tile.

    Args:
        query (Tensor): `[b, s, h, d]`.
        key (Tensor): `[b, t, g, d]`, g divides h.
        value (Tensor): `[b, t, g, d_v]`.
        scale (float): Softmax scale.
        causal (bool): Query i sees keys 0 ... i; needs s == t.

    Returns:
        tuple[Tensor, Tensor]: Output `[b, s, h, d_v]` and logsumexp `[b, s, h]` of the scaled
        scores, in fp32 or better.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output, lse = _kernel(query, key, value, causal)(query, key, value, scale, causal)
    return output.transpose(1, 2), lse.transpose(1, 2)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]:
    """The fastest kernel that is right for these tensors, `[b, h, s, d]` each."""
    width = query.shape[-1]
    if width != value.shape[-1]:
        return _blockwise
    if query.device.type == "cpu" and hasattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"
    ):
        return _flash_cpu
    # Called directly, the operator does not pad heads to a multiple of 8, as torch's function does.
    if query.is_cuda and width % 8 == 0:
        grouped = query.shape[1] != key.shape[1]
        if can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, causal, grouped)):
            return _flash_cuda
    return _blockwise


def _flash_cuda(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    # This operator takes grouped heads as they are. By is_causal=True it aligns the last query with
    # the last key, unlike torch's function, which makes no difference in a square tile.
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, scale=scale
    )
    return output, lse


def _flash_cpu(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # Before torch 2.9 this kernel takes as many key heads as query heads: one member of each group
    # at a time, without a copy of the keys.
    members = query.shape[1] // key.shape[1]
    parts = [
        kernel(query[:, member::members], key, value, 0.0, causal, scale=scale)
        for member in range(members)
    ]
    if members == 1:
        return parts[0]
    outputs, lses = zip(*parts, strict=True)
    # members x [b, g, s, ...] -> [b, g, members, s, ...] -> [b, h, s, ...]
    return torch.stack(outputs, dim=2).flatten(1, 2), torch.stack(lses, dim=2).flatten(1, 2)


def _blockwise(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    groups, keys = key.shape[1:3]
    # In fp32, as the ring merges many of these by their logsumexps and would add up the rounding.
    dtype = torch.promote_types(query.dtype, torch.float32)
    key, value = key.to(dtype), value.to(dtype)
    output = query.new_empty(batch, heads, length, value.shape[-1], dtype=dtype)
    lse = query.new_empty(batch, heads, length, dtype=dtype)
    rows = max(1, _SCORES // (batch * heads * keys))
    for start in range(0, length, rows):
        part = query[:, :, start : start + rows].to(dtype)
        seen = start + part.shape[2] if causal else keys
        # The heads of a group share their keys: [b, h, r, d] -> [b, g, h / g * r, d]
        grouped = part.reshape(batch, groups, -1, part.shape[-1])
        scores = (grouped @ key[:, :, :seen].mT).mul_(scale)
        if causal:
            future = torch.ones(part.shape[2], seen, dtype=torch.bool, device=query.device)
            scores.view(batch, heads, -1, seen).masked_fill_(future.triu_(start + 1), -torch.inf)
        total = torch.logsumexp(scores, dim=-1, keepdim=True)
        result = torch.exp(scores.sub_(total)) @ value[:, :, :seen]
        # [b, g, h / g * r, ...] -> [b, h, r, ...]
        output[:, :, start : start + rows] = result.view(batch, heads, -1, result.shape[-1])
        lse[:, :, start : start + rows] = total.view(batch, heads, -1)
    return output, lse
