"""`LongRopeRotaryEmbedding`: megatron-core's rotary module with LongRoPE angles."""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.context_parallel import zigzag_positions
from megatron_longrope.frequencies import angles, angles_fp32

MODES = ("auto", "long", "short")
_CACHED_TABLES = 2  # training and validation lengths; a table at 2048k and d = 128 is 1 GiB


class LongRopeRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding whose angles follow a :class:`LongRopeConfig`.

    A drop-in for megatron-core's `RotaryEmbedding`: the same constructor keywords (those that would
    scale positions a second time are refused), the same `forward` and the same result shape.
    Differences:

    - With context parallelism only this rank's rows are built, never the whole table.
    - Angles are exact to 1e-6 rad at any position. A factor set of all ones is stock RoPE and keeps
      stock's own fp32 product, so that it changes no bit of a training run; `hf_parity` uses the
      fp32 product of transformers for every set.
    - Factors may be swapped at any time; no table of the old factors survives.
    - Nothing is a parameter or buffer: bf16 wrapping cannot round it, checkpoints do not hold it.

    Args:
        config (LongRopeConfig): Factor sets.
        kv_channels (int): Head dimension.
        rotary_percent (float): Share of the head dimension that rotates.
        rotary_interleaved (bool): GPT-J pairing instead of two halves. Defaults to False.
        rotary_base (float, optional): Checked against the config's when given.
        cp_group (ProcessGroup, optional): Context-parallel group. Defaults to megatron-core's.
        mode (str): `auto` chooses the factor set by sequence length, `long` always takes the
            largest set, `short` always the original window's. Defaults to `auto`.
        hf_parity (bool): Reproduce transformers' fp32 angles bit for bit. Defaults to False.

    Raises:
        ValueError: The config does not fit the model, or another scaling method is active.
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
        hf_parity: bool = False,
    ) -> None:
        if seq_len_interpolation_factor is not None or rope_scaling:
            raise ValueError(
                "LongRoPE cannot be combined with --rotary-seq-len-interpolation-factor or "
                "--use-rope-scaling, which would scale positions twice; remove that flag"
            )
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
        # CPU initialisation keeps the base class away from CUDA; tables choose their own device.
        super().__init__(
            kv_channels=kv_channels,
            rotary_percent=rotary_percent,
            rotary_interleaved=rotary_interleaved,
            rotary_base=config.rotary_base if rotary_base is None else rotary_base,
            use_cpu_initialization=True,
            cp_group=cp_group,
        )
        self.rotary_dim = 2 * len(self.inv_freq)
        self.rotary_base = config.rotary_base if rotary_base is None else rotary_base
        self.mode = mode
        self.hf_parity = hf_parity
        self._tables: dict[tuple, Tensor] = {}
        self.set_config(config)

    @classmethod
    def from_rotary(
        cls, rotary: RotaryEmbedding, config: LongRopeConfig, **options
    ) -> LongRopeRotaryEmbedding:
        """Build the replacement of a model's existing rotary module.

        Raises:
            ValueError: The config does not fit the module, or the module scales positions itself.
        """
        replacement = cls(
            config,
            kv_channels=2 * len(rotary.inv_freq),
            rotary_interleaved=rotary.rotary_interleaved,
            seq_len_interpolation_factor=rotary.seq_len_interpolation_factor,
            cp_group=rotary.cp_group,
            **options,
        )
        # The module does not remember its base or scaling: its frequencies must tell.
        theirs = rotary.inv_freq.to(device="cpu", dtype=torch.float32)
        if not torch.allclose(theirs, replacement.inv_freq.cpu(), rtol=1e-4, atol=0.0):
            raise ValueError(
                "the model's rotary frequencies are not those of rotary_base "
                f"{config.rotary_base}: it has another base or --use-rope-scaling; use factors "
                "that were searched for it"
            )
        return replacement

    def set_config(self, config: LongRopeConfig) -> None:
        """Swap the factors; the next forward uses them.

        Raises:
            ValueError: The config's geometry differs from the model's.
        """
        if config.rotary_dim != self.rotary_dim:
            raise ValueError(
                f"rotary_dim {config.rotary_dim} of the LongRoPE config differs from the model's "
                f"{self.rotary_dim} (head dimension x rotary percent); use factors of this model"
            )
        if float(config.rotary_base) != float(self.rotary_base):
            raise ValueError(
                f"rotary_base {config.rotary_base} of the LongRoPE config differs from the model's "
                f"{self.rotary_base}; use factors that were searched for this base"
            )
        self.config = config
        self._tables.clear()

    def factor_set(self, length: int) -> FactorSet:
        """The factor set that a sequence of `length` tokens uses under the current mode."""
        if self.mode == "short":
            return self.config.factor_set_for(self.config.original_max_position_embeddings)
        selected = self.config.factor_set_for(length)  # raises beyond the largest set
        return self.config.factor_sets[-1] if self.mode == "long" else selected

    def attention_factor(self, length: int) -> float:
        """Multiplier of q and k for a sequence of `length` tokens under the current mode."""
        return self.config.attention_factor_for(self.factor_set(length).max_length)

    def _angles(self, positions: Tensor, length: int) -> Tensor:
        selected = self.factor_set(length)
        if selected.is_identity:
            # Start tokens cannot matter when nothing is rescaled.
            return angles_fp32(positions, self.rotary_base, self.rotary_dim)
        compute = angles_fp32 if self.hf_parity else angles
        return compute(
            positions,
            self.rotary_base,
            self.rotary_dim,
            torch.tensor(selected.rescale_factors, dtype=torch.float64, device=positions.device),
            selected.num_start_tokens,
        )

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles of positions offset ... offset + max_seq_len - 1: `[max_seq_len, d / 2]`, fp32."""
        positions = torch.arange(offset, offset + max_seq_len, device=_table_device())
        return self._angles(positions, offset + max_seq_len)

    def get_cos_sin(self, max_seq_len: int, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each `[max_seq_len, d / 2]`; the attention factor is not in them."""
        freqs = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cos(freqs), torch.sin(freqs)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles of the whole sequence: `[max_seq_len, 1, 1, d]`, fp32."""
        return self._repeat(self.get_freqs_non_repeated(max_seq_len, offset))

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
                document.
            cp_group (ProcessGroup, optional): Overrides the module's group.

        Returns:
            Tensor: `[max_seq_len / cp_size, 1, 1, d]` (zigzag rows of this rank), or
            `[max_seq_len, 1, 1, d]` for packed sequences; fp32.
        """
        group = self.cp_group if cp_group is None else cp_group
        cp_size, cp_rank = 1, 0
        if group is not None and not packed_seq and group.size() > 1:
            cp_size, cp_rank = group.size(), group.rank()
        device = _table_device()
        key = (max_seq_len, offset, cp_rank, cp_size, self.mode, self.hf_parity, device)
        if key not in self._tables:
            positions = zigzag_positions(max_seq_len, cp_rank, cp_size, device) + offset
            table = self._repeat(self._angles(positions, offset + max_seq_len))
            while len(self._tables) >= _CACHED_TABLES:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = table
        return self._tables[key]

    def _repeat(self, freqs: Tensor) -> Tensor:
        """Give both members of a rotated pair their angle: `[s, d / 2] -> [s, 1, 1, d]`."""
        if self.rotary_interleaved:
            emb = freqs.repeat_interleave(2, dim=-1)
        else:
            emb = torch.cat((freqs, freqs), dim=-1)
        return emb[:, None, None, :]

    def extra_repr(self) -> str:
        """Shown by print(model), so that a log proves which factors are in."""
        lengths = ", ".join(str(item.max_length) for item in self.config.factor_sets)
        return f"rotary_dim={self.rotary_dim}, factor sets up to [{lengths}], mode={self.mode}"


def _table_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
