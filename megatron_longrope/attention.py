"""Core attention without Transformer Engine: torch SDPA, causal, grouped queries, context parallel.

megatron-core's own local attention builds `[b, h, s, s]` scores and refuses context parallelism;
Transformer Engine needs CUDA. `SdpaCoreAttention` fits the same slot of a layer spec, runs on CPU
and CUDA, forward and backward, and never holds a mask larger than one `[s / 2cp, s]` tile.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_longrope.context_parallel import unshard, zigzag_chunks


class SdpaCoreAttention(MegatronModule):
    """Scaled dot-product attention for the `core_attention` slot of a megatron-core layer spec.

    Args:
        config (TransformerConfig): megatron-core configuration.
        layer_number (int): Accepted for interface compatibility.
        attn_mask_type (AttnMaskType): `causal` or `no_mask`.
        attention_type (str): Accepted for interface compatibility.
        attention_dropout (float, optional): Overrides the config's.
        softmax_scale (float, optional): Defaults to 1 / sqrt(head_dim). LongRoPE's attention factor
            m rides here as m^2 / sqrt(head_dim).
        cp_comm_type (str, optional): Accepted for interface compatibility; keys and values are
            always all-gathered.
        pg_collection (ProcessGroupCollection, optional): Supplies the context-parallel group.

    Raises:
        ValueError: A feature that would silently change the result: sliding windows, sinks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        if config.window_size is not None:
            raise ValueError(
                f"window_size {config.window_size} is not supported by sdpa attention; "
                "use --longrope-attention te"
            )
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise ValueError(
                f"softmax_type {config.softmax_type!r} is not supported by sdpa attention; "
                "use --longrope-attention te"
            )
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = (
            1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        )
        self.attention_dropout = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        self.cp_group = getattr(pg_collection, "cp", None)
        if self.cp_group is None:
            self.cp_group = parallel_state.get_context_parallel_group(check_initialized=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query (Tensor): `[s / cp, b, h, d]`, zigzag order under context parallelism.
            key (Tensor): `[s / cp, b, g, d]`, g divides h.
            value (Tensor): `[s / cp, b, g, d_v]`.
            attention_mask (Tensor, optional): Ignored: the mask is causal by construction.

        Returns:
            Tensor: `[s / cp, b, h * d_v]`.
        """
        if packed_seq_params is not None:
            raise ValueError(
                "packed sequences are not supported by sdpa attention; use --longrope-attention te"
            )
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by sdpa attention")
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        # [s, b, h, d] -> [b, h, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        cp_size = 1 if self.cp_group is None else self.cp_group.size()
        if cp_size == 1:
            output = self._attend(query, key, value, causal)
        else:
            output = self._attend_zigzag(query, key, value, causal)
        # [b, h, s, d] -> [s, b, h * d]
        return output.permute(2, 0, 1, 3).flatten(2)

    def _attend_zigzag(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        """Gather keys and values, then attend chunk by chunk: one tile is alive at a time."""
        # [b, g, s / cp, d] -> [b, g, s, d]
        key, value = (unshard(_AllGather.apply(x, self.cp_group), dim=2) for x in (key, value))
        if not causal:
            return self._attend(query, key, value, causal=False)
        chunk = query.shape[2] // 2
        chunks = zigzag_chunks(self.cp_group.rank(), self.cp_group.size())
        outputs = []
        for part, index in zip(query.split(chunk, dim=2), chunks, strict=True):
            end = (index + 1) * chunk  # a chunk sees everything up to its own end
            outputs.append(self._attend(part, key[:, :, :end], value[:, :, :end], causal=True))
        return torch.cat(outputs, dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        """SDPA; the last query is aligned with the last key when there are fewer queries."""
        rows, columns = query.shape[2], key.shape[2]
        mask = None
        if causal and rows != columns:
            if query.is_cuda:
                mask = causal_lower_right(rows, columns)  # flash kernels, no mask in memory
            else:
                mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        dropout = self.attention_dropout if self.training else 0.0
        with _dropout_rng(dropout):
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and rows == columns,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )


def _dropout_rng(dropout: float) -> contextlib.AbstractContextManager:
    """Megatron's model-parallel random state: tensor-parallel ranks drop different heads."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    if dropout > 0.0 and tracker.is_initialized():
        return tracker.fork()
    return contextlib.nullcontext()


class _AllGather(torch.autograd.Function):
    """Gather every rank's tensor; the gradient of a part is the sum over ranks of its gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group = group
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor, group=group)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        stacked = torch.stack(gradients)
        if stacked.is_cuda:
            mine = torch.empty_like(gradients[0])
            dist.reduce_scatter_tensor(mine, stacked, group=ctx.group)
            return mine, None
        dist.all_reduce(stacked, group=ctx.group)  # gloo has no reduce-scatter on every release
        return stacked[ctx.group.rank()], None
