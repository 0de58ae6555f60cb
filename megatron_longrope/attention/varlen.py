"""torch's attention for documents of any lengths in one kernel call (torch 2.11, CUDA)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_longrope.attention.documents import offsets_on

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

_HALF = (torch.float16, torch.bfloat16)
_WANTED = {"scale", "window_size", "enable_gqa"}  # the first release had none of them


def is_available() -> bool:
    """True when this torch has it, with everything that is needed of it."""
    return varlen_attn is not None and inspect.signature(varlen_attn).parameters.keys() >= _WANTED


def fits(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """True when the kernel takes these tensors, `[1, t, h, d]` each, and nothing is to drop."""
    return (
        query.is_cuda
        and query.dtype in _HALF
        and dropout == 0.0
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
        and is_available()
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    causal: bool,
) -> Tensor:
    """Attention within documents back to back; see :meth:`.sdpa.SdpaCoreAttention._attend`."""
    offsets = offsets_on(query.device, query_lengths)
    # One tensor for both where they are equal: cuDNN's kernel only then trusts a causal mask.
    is_square = list(query_lengths) == list(key_lengths)
    output = varlen_attn(
        query[0],
        key[0],
        value[0],
        offsets,
        offsets if is_square else offsets_on(query.device, key_lengths),
        max(query_lengths),
        max(key_lengths),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output[None]
