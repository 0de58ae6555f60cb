"""`FlashCoreAttention`: the kernels of a flash-attention package in the same module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_longrope.attention import flash_kernels
from megatron_longrope.attention.documents import offsets_on
from megatron_longrope.attention.sdpa import SdpaCoreAttention, dropout_rng
from megatron_longrope.errors import LongRopeError

_DTYPES = (torch.float16, torch.bfloat16)


class FlashCoreAttention(SdpaCoreAttention):
    """:class:`SdpaCoreAttention` on flash-attn: CUDA, half precision, one call for a whole pack.

    Raises:
        LongRopeError: No package of :mod:`.flash_kernels` can run here.
    """

    kernel: ClassVar[str] = "flash"
    windows: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernels = flash_kernels.find(flash_kernels.capability(), self.attention_dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
        """Attend; see :meth:`SdpaCoreAttention.forward`.

        Raises:
            LongRopeError: Not half precision, or values of another width than keys.
        """
        if query.dtype not in _DTYPES:
            raise LongRopeError(
                f"flash attention computes in float16 or bfloat16, got {query.dtype}; "
                "train with --bf16 or use --longrope-attention sdpa"
            )
        if key.shape[-1] != value.shape[-1]:
            raise LongRopeError(
                f"flash attention needs keys and values of one width, got {key.shape[-1]} and "
                f"{value.shape[-1]}; use --longrope-attention sdpa"
            )
        return super().forward(query, key, value, *args, **kwargs)

    def _attend_documents(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int],
        scale: float,
        causal: bool,
    ) -> Tensor:
        dropout = self._dropout()
        options = {
            "softmax_scale": scale,
            "causal": causal,
            "dropout_p": dropout,
            "deterministic": self.config.deterministic_mode,
        }
        with dropout_rng(dropout):
            if len(query_lengths) == 1:
                return self.kernels.attend(query, key, value, **options)
            # [1, t, h, d] -> [t, h, d] and back
            output = self.kernels.attend_pack(
                query[0],
                key[0],
                value[0],
                (offsets_on(query.device, query_lengths), offsets_on(query.device, key_lengths)),
                (max(query_lengths), max(key_lengths)),
                **options,
            )
        return output[None]

    def _tile(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        output, lse = self.kernels.attend_with_lse(query, key, value, scale, causal)
        return output, lse.transpose(1, 2)  # [b, h, s] -> [b, s, h]
