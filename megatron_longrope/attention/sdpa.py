"""`SdpaCoreAttention`: torch's scaled dot-product attention in megatron-core's layer specs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_longrope.attention import varlen
from megatron_longrope.attention.documents import (
    Documents,
    check_queries_see_keys,
    documents_of,
    padded_rows,
    padding_alone,
    token_rows,
)
from megatron_longrope.attention.gathered import attend_gathered
from megatron_longrope.attention.ring import attend_ring
from megatron_longrope.attention.tiles import attend_tile
from megatron_longrope.errors import LongRopeError

# Elements of a mask on the CPU, whose kernel turns it into floats: 64 MiB.
_MASK = 2**24
# Queries of a sliding window that share a call: each call sees a window of keys more than these.
_BAND = 1024
_TE = "--transformer-impl transformer_engine"
_TE_OR_LOCAL = f"{_TE}, or --longrope-attention local"
_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class SdpaCoreAttention(MegatronModule):
    """Scaled dot-product attention for the `core_attention` slot of a megatron-core layer spec.

    Causal attention over one sequence or over packed documents that do not see one another, with
    grouped queries and context parallelism, on CPU and CUDA, forward and backward. A pack is one
    kernel call for each softmax scale in it where torch has a kernel for documents of any lengths
    (CUDA, half precision), else a call for each document, and never a mask over the pack.

    Under context parallelism keys and values are gathered for training and travel around a ring
    when neither gradients nor training mode are on. The two differ by rounding. A checkpointed
    forward pass is in training mode and hence takes the form of its recomputation.

    Args:
        config (TransformerConfig): megatron-core configuration.
        layer_number (int): Accepted for interface compatibility.
        attn_mask_type (AttnMaskType): `causal`, `padding_causal` or `no_mask`.
        attention_type (str): `self` or `cross`.
        attention_dropout (float, optional): Overrides the config's.
        softmax_scale (float, optional): Defaults to 1 / sqrt(head_dim). LongRoPE's attention factor
            m rides here as m^2 / sqrt(head_dim).
        cp_comm_type (str, optional): Accepted for interface compatibility.
        pg_collection (ProcessGroupCollection, optional): Supplies the context-parallel group.

    A sliding window (`window_size` (W - 1, 0): a query sees W keys, its own included) acts in every
    layer. It costs bands of keys instead of a mask over the sequence, and does not go with context
    parallelism.

    Raises:
        LongRopeError: A feature that would silently change the result, such as attention sinks.
    """

    kernel: ClassVar[str] = "sdpa"
    """The value of `--longrope-attention` that selects this class."""

    document_scale: ClassVar[Callable[[int], float] | None] = None
    """Multiplier of the softmax scale for a document of that many tokens; subclasses set it to a
    staticmethod. Padding counts, as it does where RoPE is applied, so that one length decides both.
    A batch that is not packed is one document of its global length."""

    windows: ClassVar[bool] = True
    """Whether sliding windows are supported."""

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
        left, right = config.window_size or (-1, 0)
        skipped = getattr(config, "window_attn_skip_freq", None)
        if right != 0 or (left >= 0 and skipped is not None):
            raise self._unsupported(
                f"window_size {config.window_size}"
                f"{'' if skipped is None else f' with window_attn_skip_freq {skipped}'}"
            )
        self.window = None if left < 0 else left + 1
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise self._unsupported(f"softmax_type {config.softmax_type!r}", _TE_OR_LOCAL)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.softmax_scale = (
            1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        )
        self.attention_dropout = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        self.cp_group = getattr(pg_collection, "cp", None)
        if self.cp_group is None:
            self.cp_group = parallel_state.get_context_parallel_group(check_initialized=False)
        if self.window is not None and self._cp_size() > 1:
            raise self._unsupported(f"window_size {config.window_size} with context parallelism")
        if self.window is not None and not self.windows:
            raise self._unsupported(
                f"window_size {config.window_size}", "--longrope-attention sdpa"
            )

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
            query (Tensor): `[s / cp, b, h, d]`, zigzag order under context parallelism. Packed:
                `[t / cp, h, d]`, every document in its own zigzag order.
            key (Tensor): `[s / cp, b, g, d]` or `[t / cp, g, d]`, g divides h.
            value (Tensor): `[s / cp, b, g, d_v]` or `[t / cp, g, d_v]`.
            attention_mask (Tensor, optional): Ignored: the mask is causal by construction.
            attn_mask_type (AttnMaskType, optional): Overrides the module's.
            attention_bias (Tensor, optional): Refused.
            packed_seq_params (PackedSeqParams, optional): Documents of a pack (`thd`).

        Returns:
            Tensor: `[s / cp, b, h * d_v]`, or `[t / cp, h * d_v]` with zeros in padding rows.

        Raises:
            LongRopeError: Something that would silently change the result.
        """
        if attention_bias is not None:
            raise self._unsupported("attention_bias")
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        causal = mask_type in _CAUSAL
        if not causal and mask_type is not AttnMaskType.no_mask:
            raise self._unsupported(f"attention mask type {mask_type.name}", _TE_OR_LOCAL)
        packed = self._is_packed(packed_seq_params)
        drops_mask = self.attention_type == "self" and not causal and not packed
        if drops_mask and 1 < query.shape[0] < key.shape[0]:
            # Static inference drops the mask after the prompt, which is right for one token only.
            raise LongRopeError(
                f"{query.shape[0]} new tokens came after {key.shape[0] - query.shape[0]} cached "
                "ones without a mask, so that they would see each other's future; decode one token "
                "at a time"
            )
        if packed and query.dim() != 3:
            raise LongRopeError(
                f"packed sequences came with a micro batch of {query.shape[1]}; packing puts all "
                "documents into one row: use --micro-batch-size 1"
            )
        # [t, h, d] or [s, b, h, d] -> [b, s, h, d]
        query, key, value = (x[None] if packed else x.transpose(0, 1) for x in (query, key, value))
        queries, keys = documents_of(
            packed_seq_params if packed else None, query.shape[1], key.shape[1], self._cp_size()
        )
        if causal:
            check_queries_see_keys(queries, keys)
        output = self._attend_all(query, key, value, queries, keys, causal)
        # [b, s, h, d_v] -> [t, h * d_v] or [s, b, h * d_v]; Megatron's next layer takes a view.
        output = (output[0] if packed else output.transpose(0, 1)).flatten(-2)
        return output.contiguous()

    def _attend_all(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        queries: Documents,
        keys: Documents,
        causal: bool,
    ) -> Tensor:
        """Choose the form: `[b, s / cp, ...] -> [b, s / cp, h, d_v]`, padding included."""
        if not any(queries.lengths):
            return padding_alone(query, value.shape[-1], key, value)
        scales = [self._scale_of(rows) for rows in keys.rows]
        if self._cp_size() > 1:
            if not torch.is_grad_enabled() and not self.training:
                form, kernel = attend_ring, self._tile
            else:
                form, kernel = attend_gathered, self._attend
            return form(kernel, query, key, value, keys, scales, causal, self.cp_group)
        output = self._attend(
            token_rows(query, queries),
            token_rows(key, keys),
            token_rows(value, keys),
            queries.lengths,
            keys.lengths,
            scales,
            causal,
        )
        return padded_rows(output, queries, query.shape[1])

    def _cp_size(self) -> int:
        return 1 if self.cp_group is None else self.cp_group.size()

    def _is_packed(self, packed: PackedSeqParams | None) -> bool:
        """Whether the batch is a pack, after a look at what else the description asks for."""
        if packed is None:
            return False
        if packed.qkv_format not in (None, "sbhd", "thd"):
            raise self._unsupported(f"qkv_format {packed.qkv_format!r}")
        if packed.local_cp_size not in (None, self._cp_size()) or (
            packed.cp_group is not None and packed.cp_group is not self.cp_group
        ):
            raise self._unsupported("hybrid context parallelism, a group for each batch,")
        return packed.qkv_format == "thd"

    def _scale_of(self, length: int) -> float:
        factor = 1.0 if self.document_scale is None else self.document_scale(length)
        return self.softmax_scale * factor

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
        """Attention within documents that lie back to back, with gradients.

        Args:
            query (Tensor): `[b, sum of query_lengths, h, d]`.
            key (Tensor): `[b, sum of key_lengths, g, d]`.
            value (Tensor): `[b, sum of key_lengths, g, d_v]`.
            query_lengths (Sequence[int]): Queries of each document, the last at its last key.
            key_lengths (Sequence[int]): Keys of each document.
            scales (Sequence[float]): Softmax scale of each document.
            causal (bool): Whether a query sees no later key.

        Returns:
            Tensor: `[b, sum of query_lengths, h, d_v]`.
        """
        first, *others = dict.fromkeys(scales)
        lengths = (query_lengths, key_lengths, key_lengths)
        if not others:
            return self._attend_documents(query, key, value, *lengths[:2], first, causal)
        # A kernel takes one scale a call: mixed windows have two.
        parts = [
            tensor.split(list(counts), dim=1)
            for tensor, counts in zip((query, key, value), lengths, strict=True)
        ]
        outputs: list[Tensor] = list(parts[0])
        for scale in (first, *others):
            chosen = [index for index, own in enumerate(scales) if own == scale]
            output = self._attend_documents(
                *(torch.cat([pieces[i] for i in chosen], dim=1) for pieces in parts),
                *([counts[i] for i in chosen] for counts in lengths[:2]),
                scale,
                causal,
            )
            pieces = output.split([query_lengths[i] for i in chosen], dim=1)
            for index, piece in zip(chosen, pieces, strict=True):
                outputs[index] = piece
        return torch.cat(outputs, dim=1)

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
        """As :meth:`_attend`, for documents with one softmax scale."""
        by_varlen = self.window is None and len(query_lengths) > 1
        if by_varlen and varlen.fits(query, key, value, self._dropout()):
            return varlen.attend(query, key, value, query_lengths, key_lengths, scale, causal)
        outputs = [
            self._attend_document(*document, scale, causal)
            for document in zip(
                query.split(list(query_lengths), dim=1),
                key.split(list(key_lengths), dim=1),
                value.split(list(key_lengths), dim=1),
                strict=True,
            )
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend_document(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> Tensor:
        rows, columns = query.shape[1], key.shape[1]
        if rows == 0:
            return query.new_zeros(*query.shape[:3], value.shape[-1])
        if self.window is not None and columns > self.window:
            return self._attend_band(query, key, value, scale)
        causal = causal and rows > 1  # a single query is the last one and sees every key
        mask = None
        if causal and rows != columns:
            if query.is_cuda:
                # No mask in memory: torch calls aten's flash operator with is_causal=True, by which
                # that aligns the last query with the last key, and with grouped heads as they are.
                mask = causal_lower_right(rows, columns)
            elif rows * columns <= _MASK:
                mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
            else:
                half = rows // 2
                seen = columns - rows + half
                first = (query[:, :half], key[:, :seen], value[:, :seen])
                parts = (first, (query[:, half:], key, value))
                outputs = [self._attend_document(*part, scale, causal) for part in parts]
                return torch.cat(outputs, dim=1)
        return self._kernel(query, key, value, scale, mask, causal and rows == columns)

    def _attend_band(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Causal attention within the sliding window; the last query stands at the last key."""
        assert self.window is not None
        outputs, before = [], key.shape[1] - query.shape[1]
        for start in range(0, query.shape[1], _BAND):
            rows = query[:, start : start + _BAND]
            # Positions, counted in keys: queries first to last, keys lowest to last.
            first = before + start
            last = first + rows.shape[1] - 1
            lowest = max(0, first - self.window + 1)
            at = torch.arange(first, last + 1, device=query.device)[:, None]
            keys = torch.arange(lowest, last + 1, device=query.device)
            band = (keys <= at) & (keys > at - self.window)  # [rows, keys]
            seen = slice(lowest, last + 1)
            outputs.append(self._kernel(rows, key[:, seen], value[:, seen], scale, band, False))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _kernel(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """One call of torch's attention: `[b, s, h, d] -> [b, s, h, d_v]`."""
        dropout = self._dropout()
        with dropout_rng(dropout):
            output = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return output.transpose(1, 2)

    def _tile(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """One tile of the ring and its logsumexp; see :func:`.tiles.attend_tile`."""
        return attend_tile(query, key, value, scale, causal)

    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _unsupported(self, what: str, remedy: str = _TE) -> LongRopeError:
        return LongRopeError(f"{what} is not supported by {self.kernel} attention; use {remedy}")


def dropout_rng(dropout: float) -> contextlib.AbstractContextManager:
    """Megatron's model-parallel random state: tensor-parallel ranks drop different heads."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    # An empty tracker may call itself initialized, after a recomputation restored nothing.
    if dropout > 0.0 and "model-parallel-rng" in tracker.get_states():
        return tracker.fork()
    return contextlib.nullcontext()
