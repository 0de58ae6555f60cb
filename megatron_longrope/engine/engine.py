"""`Engine`: token losses and predictions of a Megatron checkpoint under swappable factors."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_longrope.checkpoint.loader import load_into
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.reader import MegatronCheckpoint
from megatron_longrope.config import LongRopeConfig, identity_config
from megatron_longrope.context_parallel import check_divisible, shard, unshard
from megatron_longrope.engine import loss, process_groups
from megatron_longrope.engine.model import (
    build_model,
    default_device,
    set_attention_factor,
    vocab_range,
)


class Engine:
    """A model that stays in memory while factors come and go.

    Args:
        model (nn.Module): From :func:`.model.build_model`, weights in place.
        shape (ModelShape): The model's geometry.
    """

    def __init__(self, model: nn.Module, shape: ModelShape) -> None:
        self.model = model
        self.shape = shape
        self.device = next(model.parameters()).device
        self.cp_group = model.pg_collection.cp
        self._first_token, self._real_tokens = vocab_range(model, shape.vocab_size)

    @property
    def config(self) -> LongRopeConfig:
        """The factors in use."""
        return self.model.rotary_pos_emb.config

    def set_config(self, config: LongRopeConfig) -> None:
        """Swap the factors; costs nothing but the next rotary table.

        Raises:
            ValueError: The config is for another rotary geometry.
        """
        self.model.rotary_pos_emb.set_config(config)

    @torch.no_grad()
    def nll(self, tokens: Tensor) -> Tensor:
        """Negative log-likelihood of every token but the first, given those before it.

        The factor set and the attention factor are chosen by the full length n, the length that
        transformers would choose them by.

        Args:
            tokens (Tensor): `[b, n]`, int64, the same on every rank.

        Returns:
            Tensor: `[b, n - 1]`, fp32, in nats, on every rank, on the CPU.
        """
        batch, length = tokens.shape
        self._check_tokens(tokens)
        # The last position has no successor; its loss is computed and cut off, which keeps the
        # length divisible for context parallelism.
        labels = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1).to(self.device)
        labels = shard(labels, self.cp_group.rank(), self.cp_group.size(), dim=1)
        hidden = self._hidden(tokens)  # [b, n / cp, h]
        values = loss.token_nll(
            self.model, hidden.flatten(0, 1), labels.flatten(), self._real_tokens
        ).view(batch, -1)
        return self._whole(values)[:, : length - 1].cpu()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits `[b, n, vocab_size]`, fp32, for verification on short inputs; one process."""
        self._check_single_process("logits")
        self._check_tokens(tokens)
        hidden = self._hidden(tokens)
        flat = loss.map_logits(self.model, hidden.flatten(0, 1), self._real_tokens, lambda x: x)
        return flat[:, : self.shape.vocab_size].view(*tokens.shape, -1)

    @torch.no_grad()
    def predictions(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Greedy next tokens, teacher-forced: entry i is the most likely successor of token i.

        Args:
            tokens (Tensor): `[b, n]`, int64.
            start (int): Skip positions before it (their logits are not computed). Defaults to 0.

        Returns:
            Tensor: `[b, n - start]`, int64, on the CPU.
        """
        self._check_single_process("predictions")
        self._check_tokens(tokens)
        hidden = self._hidden(tokens)[:, start:]
        best = loss.map_logits(
            self.model, hidden.flatten(0, 1), self._real_tokens, lambda x: x.argmax(-1)
        )
        return best.view(tokens.shape[0], -1).cpu()

    def _hidden(self, tokens: Tensor) -> Tensor:
        """`[b, n] -> [b, n / cp, h]`, after the final norm."""
        length = tokens.shape[1]
        rotary = self.model.rotary_pos_emb
        set_attention_factor(self.model, rotary.attention_factor(length))
        rank, size = self.cp_group.rank(), self.cp_group.size()
        check_divisible(length, size)
        local = shard(tokens.to(self.device), rank, size, dim=1)
        # RoPE models read no position ids: the rotary module knows this rank's positions.
        hidden = self.model(input_ids=local, position_ids=None, attention_mask=None)
        return hidden.transpose(0, 1)  # [s, b, h] -> [b, s, h]

    def _whole(self, values: Tensor) -> Tensor:
        """Undo the zigzag: `[b, n / cp] -> [b, n]` on every rank."""
        if self.cp_group.size() == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.cp_group.size())]
        dist.all_gather(parts, values.contiguous(), group=self.cp_group)
        return unshard(parts, dim=1)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; expected [b, n] with n >= 2"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.shape.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.shape.vocab_size}; the data was made with another tokenizer"
            )

    def _check_single_process(self, what: str) -> None:
        sizes = self.cp_group.size(), self.model.pg_collection.tp.size()
        if max(sizes) > 1:
            raise ValueError(f"{what} run on one process; got context x tensor parallel {sizes}")


def load_engine(
    path: str | Path,
    *,
    longrope_config: LongRopeConfig | None = None,
    iteration: int | None = None,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    mode: str = "auto",
    hf_parity: bool = False,
) -> Engine:
    """Load a Megatron checkpoint for scoring.

    Args:
        path (str | Path): The `--save` directory of a run, or one of its iteration directories.
        longrope_config (LongRopeConfig, optional): Defaults to the checkpoint's own, else stock
            RoPE up to its max_position_embeddings.
        iteration (int, optional): Defaults to the latest.
        dtype (torch.dtype, optional): Defaults to fp32 on a CPU, the checkpoint's dtype on a GPU.
        device (optional): Defaults to this process' GPU, else the CPU.

    Raises:
        ValueError: The checkpoint is damaged, of another format, or does not fit the config.
    """
    checkpoint = MegatronCheckpoint.open(path, iteration)
    shape = checkpoint.shape
    config = longrope_config or checkpoint.longrope or default_config(shape)
    process_groups.initialize(tensor_parallel, context_parallel)
    model = build_model(
        shape,
        config,
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
        mode=mode,
        hf_parity=hf_parity,
    )
    tensor_group = model.pg_collection.tp
    load_into(model, checkpoint, tp_rank=tensor_group.rank(), tp_size=tensor_group.size())
    device = torch.device(device) if device is not None else default_device()
    model.rotary_pos_emb.table_device = device
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else shape.params_dtype
    return Engine(model.to(device=device, dtype=dtype), shape)


def default_config(shape: ModelShape) -> LongRopeConfig:
    """Stock RoPE for a checkpoint that stores no LongRoPE config."""
    return identity_config(shape.rotary_base, shape.rotary_dim, shape.max_position_embeddings)
