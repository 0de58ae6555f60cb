"""`FlashCoreAttention`: the kernels of the flash-attn package in the same module."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from megatron_longrope.attention.sdpa import SdpaCoreAttention, dropout_rng

_DTYPES = (torch.float16, torch.bfloat16)


class FlashCoreAttention(SdpaCoreAttention):
    """:class:`SdpaCoreAttention` on flash-attn: CUDA, half precision, one call for a whole pack.

    Where documents have different softmax scales the queries carry the ratio, because the kernel
    takes one scale a call; in half precision that rounds the queries once more.

    Raises:
        ValueError: flash-attn 2.1 or later is not installed.
    """

    kernel: ClassVar[str] = "flash"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        try:
            from flash_attn import __version__, flash_attn_func, flash_attn_varlen_func
        except ImportError as error:
            raise ValueError(
                f"flash attention needs the flash-attn package, which cannot be imported ({error});"
                " install it (pip install megatron-longrope[flash]) or use "
                "--longrope-attention sdpa"
            ) from error
        # Before 2.1 a causal mask was aligned with the first key instead of the last.
        if tuple(int(part) for part in __version__.split(".")[:2]) < (2, 1):
            raise ValueError(
                f"flash-attn {__version__} is older than 2.1, which changed the alignment of causal"
                " masks; upgrade it or use --longrope-attention sdpa"
            )
        self._flash, self._flash_varlen = flash_attn_func, flash_attn_varlen_func
        # Absent before 2.4.1, hence passed on only when asked for.
        self._options = {"deterministic": True} if self.config.deterministic_mode else {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        """Attend; see :meth:`SdpaCoreAttention.forward`.

        Raises:
            ValueError: Not half precision, or values of another width than keys.
        """
        if query.dtype not in _DTYPES:
            raise ValueError(
                f"flash attention computes in float16 or bfloat16, got {query.dtype}; "
                "train with --bf16 or use --longrope-attention sdpa"
            )
        if key.shape[-1] != value.shape[-1]:
            raise ValueError(
                f"flash attention needs keys and values of one width, got {key.shape[-1]} and "
                f"{value.shape[-1]}; use --longrope-attention sdpa"
            )
        return super().forward(query, key, value, *args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int],
        scales: Sequence[float],
        causal: bool,
    ) -> Tensor:
        dropout = self._dropout()
        options = {"dropout_p": dropout, "causal": causal, **self._options}
        if len(scales) == 1:
            with dropout_rng(dropout):
                return self._flash(query, key, value, softmax_scale=scales[0], **options)
        if any(scale != scales[0] for scale in scales):
            query = torch.cat(
                [
                    part * (scale / scales[0])
                    for part, scale in zip(query.split(list(query_lengths), 1), scales, strict=True)
                ],
                dim=1,
            )
        with dropout_rng(dropout):
            # [1, t, h, d] -> [t, h, d] and back
            output = self._flash_varlen(
                query[0],
                key[0],
                value[0],
                _offsets(query_lengths, query.device),
                _offsets(key_lengths, query.device),
                max(query_lengths),
                max(key_lengths),
                softmax_scale=scales[0],
                **options,
            )
        return output[None]

    def _tile(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        output, lse, _ = self._flash(
            query, key, value, softmax_scale=scale, causal=causal, return_attn_probs=True
        )
        return output, lse.transpose(1, 2)  # [b, h, s] -> [b, s, h]


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
