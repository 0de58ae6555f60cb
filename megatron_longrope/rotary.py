"""`LongRopeRotaryEmbedding`: megatron-core's rotary module with LongRoPE angles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.context_parallel import check_divisible, zigzag_chunks
from megatron_longrope.errors import LongRopeError
from megatron_longrope.fused_rope import fused_rope_drops
from megatron_longrope.rotary_table import build_table
from megatron_longrope.selection import FactorSelection

if TYPE_CHECKING:
    from megatron_longrope.integration.settings import DocumentScale

_CACHED_TABLES = 2  # training and validation lengths; a table at 2048k and d = 128 is 1 GiB


class LongRopeRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding whose angles follow a :class:`LongRopeConfig`.

    A drop-in for megatron-core's `RotaryEmbedding`: the same constructor keywords (those that would
    scale positions a second time are refused), the same `forward` and the same result shape.
    Differences:

    - With context parallelism only this rank's rows are built, never the whole table.
    - Angles are exact to 1e-6 rad at any position. A factor set of all ones on plain RoPE is stock
      RoPE and keeps stock's own frequencies and fp32 product, so that it changes no bit of a
      training run; `hf_parity` uses the fp32 product of transformers for every set.
    - Factors may be swapped at any time; no table of the old factors survives.
    - Nothing is a parameter or buffer: bf16 wrapping cannot round it, checkpoints do not hold it.

    Args:
        config (LongRopeConfig): Factor sets.
        kv_channels (int): Head dimension.
        rotary_percent (float): Share of the head dimension that rotates.
        rotary_interleaved (bool): GPT-J pairing instead of two halves. Defaults to False.
        rotary_base (float, optional): Checked against the config's when given.
        cp_group (ProcessGroup, optional): Context-parallel group. Defaults to megatron-core's.
        mode (str): Which factor set a sequence uses; see :class:`.selection.FactorSelection`.
            Defaults to `auto`.
        run_length (int): Sequence length of a training run, which shorter sequences and packed
            documents share the set of. Defaults to 0, no run.
        hf_parity (bool): Reproduce transformers' fp32 angles: bit for bit those of its plain RoPE
            and of its longrope, to rounding those of a model that scales RoPE itself. Defaults to
            False.
        carried_attention_factor (float, optional): The attention factor that the model carries for
            the whole run; a sequence that needs another one is refused. Defaults to None: who owns
            the model sets it sequence by sequence.
        document_scale (DocumentScale, optional): Shared with attention that follows packed
            documents; it then also follows the capacity of a static inference context.
        factor_in_cos_sin (bool): `get_cos_sin` (flash decoding) multiplies by the attention factor,
            because nothing else does there. Defaults to False.

    Raises:
        LongRopeError: The config does not fit the model, or another scaling method is active.
    """

    def __init__(
        self,
        config: LongRopeConfig,
        kv_channels: int,
        rotary_percent: float = 1.0,
        rotary_interleaved: bool = False,
        seq_len_interpolation_factor: float | None = None,
        rotary_base: float | None = None,
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        use_cpu_initialization: bool = True,
        cp_group: torch.distributed.ProcessGroup | None = None,
        *,
        mode: str = "auto",
        run_length: int = 0,
        hf_parity: bool = False,
        carried_attention_factor: float | None = None,
        document_scale: DocumentScale | None = None,
        factor_in_cos_sin: bool = False,
    ) -> None:
        if seq_len_interpolation_factor is not None or rope_scaling:
            raise LongRopeError(
                "LongRoPE cannot be combined with --rotary-seq-len-interpolation-factor or "
                "--use-rope-scaling, which would scale positions twice; remove that flag"
            )
        rotary_base = config.rotary_base if rotary_base is None else rotary_base
        # Where stock computes its frequencies: a GPU's pow may round differently.
        super().__init__(
            kv_channels=kv_channels,
            rotary_percent=rotary_percent,
            rotary_interleaved=rotary_interleaved,
            rotary_base=rotary_base,
            use_cpu_initialization=use_cpu_initialization or not torch.cuda.is_available(),
            cp_group=cp_group,
        )
        self.rotary_dim = 2 * len(self.inv_freq)
        self.rotary_base = rotary_base
        self.selection = FactorSelection(config, mode, run_length)
        self.hf_parity = hf_parity
        self.carried_attention_factor = carried_attention_factor
        self._document_scale = document_scale
        self.factor_in_cos_sin = factor_in_cos_sin
        self.table_device: torch.device | None = None  # where tables live; None is this GPU, if any
        self._tables: dict[tuple, Tensor] = {}
        self._cos_sin: dict[tuple, tuple[Tensor, Tensor]] = {}
        # What the model last said about its batch; see get_rotary_seq_len.
        self._document_offsets: list[int] | None = None
        self._longest_request: int | None = None
        self.set_config(config)

    def set_config(self, config: LongRopeConfig) -> None:
        """Swap the factors; the next forward uses them.

        Raises:
            LongRopeError: The config's geometry differs from the model's.
        """
        if config.rotary_dim != self.rotary_dim:
            raise LongRopeError(
                f"rotary_dim {config.rotary_dim} of the LongRoPE config differs from the model's "
                f"{self.rotary_dim} (head dimension x rotary percent); use factors of this model"
            )
        if float(config.rotary_base) != float(self.rotary_base):
            raise LongRopeError(
                f"rotary_base {config.rotary_base} of the LongRoPE config differs from the model's "
                f"{self.rotary_base}; use factors that were searched for this base"
            )
        self.selection = replace(self.selection, config=config)
        self._tables.clear()
        self._cos_sin.clear()

    @property
    def config(self) -> LongRopeConfig:
        """Factor sets."""
        return self.selection.config

    @property
    def mode(self) -> str:
        """How a sequence chooses among them."""
        return self.selection.mode

    def factor_set(self, length: int) -> FactorSet:
        """The factor set that a sequence of `length` tokens uses under the current mode."""
        return self.selection.factor_set(length)

    def attention_factor(self, length: int) -> float:
        """Multiplier of q and k for a sequence of `length` tokens under the current mode."""
        return self.selection.attention_factor(length)

    def _fitting_set(self, length: int) -> FactorSet:
        """The factor set of a sequence, if the model's attention factor is that set's too."""
        carried, needed = self.carried_attention_factor, self.attention_factor(length)
        if self._document_scale is not None and self._document_scale.capacity is not None:
            carried = None  # attention follows the same length
        if carried is not None and not math.isclose(needed, carried, rel_tol=1e-9):
            raise LongRopeError(
                f"a sequence of {length} tokens needs attention factor {needed:.6g}, but this run "
                f"carries {carried:.6g}, that of {self.selection.run_length} tokens; set "
                "--seq-length to the longest sequence of the run"
            )
        return self.factor_set(length)

    @torch.inference_mode(False)  # it is kept: RL trains with what a rollout has asked for first
    def _table(self, chunks: Sequence[range], selected: FactorSet) -> Tensor:
        """Angles of the chunks' positions: `[s, 1, 1, d]`, fp32."""
        own = self.config.base_factors
        return build_table(
            chunks,
            rotary_base=self.rotary_base,
            rotary_dim=self.rotary_dim,
            # Start tokens cannot matter when nothing is rescaled.
            rescale_factors=own if selected.is_identity else self.config.plain_factors(selected),
            start_factors=own,
            num_start_tokens=selected.num_start_tokens,
            interleaved=self.rotary_interleaved,
            exact=not (self.hf_parity or (selected.is_identity and own is None)),
            stock_frequencies=None if self.hf_parity else self.inv_freq,
            device=self._device(),
        )

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles of positions offset ... offset + max_seq_len - 1: `[max_seq_len, d / 2]`, fp32."""
        emb = self.get_emb(max_seq_len, offset)[:, 0, 0]
        once = emb[:, 0::2] if self.rotary_interleaved else emb[:, : self.rotary_dim // 2]
        return once.contiguous()

    @torch.inference_mode(False)
    def get_cos_sin(self, max_seq_len: int, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each `[max_seq_len, d / 2]`, for the kernels of flash decoding.

        Only the last result is kept: GPTModel asks at every step, and always for one length.
        """
        if self._document_scale is not None:
            self._document_scale.capacity = None  # these kernels have one scale for all documents
        key = (max_seq_len, offset, *self._key())
        if key not in self._cos_sin:
            freqs = self.get_freqs_non_repeated(max_seq_len, offset)
            factor = self.attention_factor(offset + max_seq_len) if self.factor_in_cos_sin else 1.0
            self._cos_sin = {key: (torch.cos(freqs) * factor, torch.sin(freqs) * factor)}
        return self._cos_sin[key]

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles of the whole sequence: `[max_seq_len, 1, 1, d]`, fp32."""
        end = offset + max_seq_len
        return self._table([range(offset, end)], self._fitting_set(end))

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> Tensor:
        """Angles for attention.

        Args:
            max_seq_len (int): Global sequence length, over all context-parallel ranks.
            offset (int): First position. Defaults to 0.
            packed_seq (bool): Packed sequences take the whole table; attention slices it by
                document. In mixed mode, after :meth:`get_rotary_seq_len` has seen the pack, the
                table has a row for each of its tokens.
            cp_group (ProcessGroup, optional): Overrides the module's group.

        Returns:
            Tensor: `[max_seq_len / cp_size, 1, 1, d]` (zigzag rows of this rank), or for packed
            sequences `[max_seq_len, 1, 1, d]`, in mixed mode `[tokens of the pack, 1, 1, d]`; fp32.
        """
        if packed_seq and self.mode == "mixed" and self._document_offsets is not None:
            return self._document_table(self._document_offsets)
        group = self.cp_group if cp_group is None else cp_group
        cp_size, cp_rank = 1, 0
        if group is not None and not packed_seq and group.size() > 1:
            cp_size, cp_rank = group.size(), group.rank()
        length = offset + max_seq_len
        if self._longest_request is not None:
            # A dynamic batch has a row per token, and may have more of them than a sequence.
            length = min(length, self._longest_request)
        key = (max_seq_len, offset, length, cp_rank, cp_size, *self._key())
        if key not in self._tables:
            chunks = _chunks(max_seq_len, offset, cp_rank, cp_size)
            self._remember(key, self._table(chunks, self._fitting_set(length)))
        return self._tables[key]

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor,
        transformer_config: Any,
        packed_seq_params: Any = None,
        **options: Any,
    ) -> int:
        """megatron-core's; models call it right before `forward`, with what is in the batch.

        Raises:
            LongRopeError: The batch is one that the model would rotate otherwise than asked for.
        """
        self._check_fused_kernel(packed_seq_params, transformer_config)
        self._document_offsets = self._longest_request = None
        if self.mode == "mixed" and packed_seq_params is None and inference_context is None:
            raise LongRopeError(
                "--longrope-mode mixed got a batch that is not packed: the script does not pass "
                "packed_seq_params to the model; use one that does, such as Megatron-LM's "
                "pretrain_gpt.py, or another mode"
            )
        if inference_context is not None:
            self._longest_request = inference_context.max_sequence_length
        if self._document_scale is not None:
            # A dynamic batch has the run's softmax scale: its kernels take one for all requests.
            is_static = inference_context is not None and inference_context.is_static_batching()
            self._document_scale.capacity = self._longest_request if is_static else None
        if packed_seq_params is not None and self.mode == "mixed":
            offsets = packed_seq_params.cu_seqlens_q_padded
            if offsets is None:
                offsets = packed_seq_params.cu_seqlens_q
            self._document_offsets = offsets.tolist()
        return super().get_rotary_seq_len(
            inference_context,
            transformer,
            transformer_input,
            transformer_config,
            packed_seq_params,
            **options,
        )

    def _check_fused_kernel(self, packed_seq_params: Any, transformer_config: Any) -> None:
        """Refuse packs whose attention factor is lost: a script may pack without Megatron's flags.

        Those that the flags announce are refused before the model is built.
        """
        factor = self.carried_attention_factor if self.factor_in_cos_sin else None
        if (
            factor not in (None, 1.0)
            and getattr(packed_seq_params, "qkv_format", None) == "thd"
            and getattr(transformer_config, "apply_rope_fusion", False)
        ):
            raise LongRopeError(fused_rope_drops(factor))

    def _document_table(self, offsets: Sequence[int]) -> Tensor:
        """A row per token of the pack, each document with its own factor set.

        megatron-core reads a table with as many rows as the pack has tokens token by token.
        """
        parts = []
        for start, end in pairwise(offsets):
            selected = self.factor_set(end - start)
            key = ("document", selected.max_length, *self._key())
            if key not in self._tables or len(self._tables[key]) < end - start:
                rows = min(selected.max_length, max(self.selection.run_length, end - start))
                self._remember(key, self._table([range(rows)], selected))
            parts.append(self._tables[key][: end - start])
        return torch.cat(parts)

    def _key(self) -> tuple:
        """What a table depends on besides its positions and the factors."""
        return self.mode, self.selection.pinned_length, self.hf_parity, self._device()

    def _device(self) -> torch.device:
        if self.table_device is not None:
            return self.table_device
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _remember(self, key: tuple, table: Tensor) -> None:
        self._tables.pop(key, None)
        while len(self._tables) >= _CACHED_TABLES:
            self._tables.pop(next(iter(self._tables)))
        self._tables[key] = table

    def extra_repr(self) -> str:
        """Shown by print(model), so that a log proves which factors are in."""
        lengths = ", ".join(str(item.max_length) for item in self.config.factor_sets)
        return f"rotary_dim={self.rotary_dim}, factor sets up to [{lengths}], mode={self.mode}"


def _chunks(length: int, offset: int, cp_rank: int, cp_size: int) -> list[range]:
    """Positions of a context-parallel rank, contiguous chunk by chunk, in local order."""
    if cp_size == 1:
        return [range(offset, offset + length)]
    check_divisible(length, cp_size)
    size = length // (2 * cp_size)
    starts = (offset + index * size for index in zigzag_chunks(cp_rank, cp_size))
    return [range(start, start + size) for start in starts]
