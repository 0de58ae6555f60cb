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
from megatron_longrope.engine.kernels import core_attention
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

    @property
    def replica(self) -> tuple[int, int]:
        """Index of this process' copy of the model, and how many there are."""
        return process_groups.replica()

    @torch.no_grad()
    def nll(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Negative log-likelihood of every token behind `start`, given those before it.

        The factor set and the attention factor are chosen by the full length n, the length that
        transformers would choose them by.

        Args:
            tokens (Tensor): `[b, n]`, int64, the same on every rank of this copy of the model.
            start (int): Leave out the losses of tokens at positions up to it; without context
                parallelism their logits are not computed either. Defaults to 0.

        Returns:
            Tensor: `[b, n - 1 - start]`, fp32, in nats, on every rank, on the CPU.

        Raises:
            ValueError: Tokens outside the vocabulary, a length that no factor set covers or that
                does not split over the context-parallel ranks, or nothing behind `start`.
        """
        batch, length = tokens.shape
        self._check_tokens(tokens)
        if not 0 <= start < length - 1:
            raise ValueError(
                f"start {start} leaves no token to score; with {length} tokens it must be from 0 to"
                f" {length - 2}"
            )
        hidden = self._hidden(tokens)  # [n / cp, b, h]
        if self.cp_group.size() == 1:
            hidden, labels, first = hidden[start:-1], tokens[:, start + 1 :], 0
        else:
            # The ranks' parts must stay alike, so that unneeded losses are computed and cut off:
            # those before `start`, and that of the last position, which has no successor.
            labels, first = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1), start
            labels = shard(labels, self.cp_group.rank(), self.cp_group.size(), dim=1)
        values = loss.token_nll(
            self.model,
            hidden.flatten(0, 1),
            labels.to(self.device).t().flatten(),  # [b, n] -> [n b], as the hidden states lie
            self._real_tokens,
        )
        values = self._whole(values.view(-1, batch).t().contiguous())  # [n b] -> [b, n]
        return values[:, first : first + length - 1 - start].cpu()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits `[b, n, vocab_size]`, fp32, for verification on short inputs; one process."""
        self._check_single_process("logits")
        self._check_tokens(tokens)
        hidden = self._hidden(tokens).transpose(0, 1)
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
        hidden = self._hidden(tokens).transpose(0, 1)[:, start:]
        best = loss.map_logits(
            self.model, hidden.flatten(0, 1), self._real_tokens, lambda x: x.argmax(-1)
        )
        return best.view(tokens.shape[0], -1).cpu()

    def _hidden(self, tokens: Tensor) -> Tensor:
        """`[b, n] -> [n / cp, b, h]`, after the final norm."""
        length = tokens.shape[1]
        rotary = self.model.rotary_pos_emb
        set_attention_factor(self.model, rotary.attention_factor(length))
        rank, size = self.cp_group.rank(), self.cp_group.size()
        check_divisible(length, size)
        local = shard(tokens.to(self.device), rank, size, dim=1)
        # RoPE models read no position ids: the rotary module knows this rank's positions.
        return self.model(input_ids=local, position_ids=None, attention_mask=None)

    def _whole(self, values: Tensor) -> Tensor:
        """Undo the zigzag: `[b, n / cp] -> [b, n]` on every rank."""
        if self.cp_group.size() == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.cp_group.size())]
        dist.all_gather(parts, values, group=self.cp_group)
        return unshard(parts, dim=1)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; expected [b, n] with n >= 2"
            )
        low, high = (int(value) for value in torch.aminmax(tokens))
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
    attention: str = "auto",
    replicas: bool = False,
) -> Engine:
    """Load a Megatron checkpoint for scoring.

    Args:
        path (str | Path): The `--save` directory of a run, or one of its iteration directories.
        longrope_config (LongRopeConfig, optional): Defaults to the checkpoint's own, else stock
            RoPE up to its max_position_embeddings.
        iteration (int, optional): Defaults to the latest.
        tensor_parallel (int): Ranks that share a layer. Defaults to 1.
        context_parallel (int): Ranks that share a sequence. Defaults to 1.
        dtype (torch.dtype, optional): Defaults to fp32 on a CPU, the checkpoint's dtype on a GPU.
        device (optional): Defaults to this process' GPU, else the CPU.
        mode (str): How a sequence chooses its factor set. Defaults to "auto".
        hf_parity (bool): transformers' arithmetic, bit for bit. Defaults to False.
        attention (str): `auto` takes flash-attn where it is installed and can run (CUDA, half
            precision), else torch SDPA; `sdpa` or `flash` insist. Defaults to "auto".
        replicas (bool): Accept a multiple of TP x CP processes, each TP x CP of which hold a copy
            of the model; :attr:`Engine.replica` tells which. Defaults to False.

    Raises:
        ValueError: The checkpoint is damaged, of another format, or does not fit the config; the
            number of processes does not fit; or flash-attn cannot run and was insisted on.
    """
    checkpoint = MegatronCheckpoint.open(path, iteration)
    shape = checkpoint.shape
    config = longrope_config or checkpoint.longrope or default_config(shape)
    process_groups.initialize(tensor_parallel, context_parallel, replicas=replicas)
    device = torch.device(device) if device is not None else default_device()
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else shape.params_dtype
    model = build_model(
        shape,
        config,
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
        mode=mode,
        hf_parity=hf_parity,
        core_attention=core_attention(attention, device, dtype),
    )
    tensor_group = model.pg_collection.tp
    load_into(model, checkpoint, tp_rank=tensor_group.rank(), tp_size=tensor_group.size())
    model.rotary_pos_emb.table_device = device
    return Engine(model.to(device=device, dtype=dtype), shape)


def default_config(shape: ModelShape) -> LongRopeConfig:
    """Stock RoPE for a checkpoint that stores no LongRoPE config."""
    return identity_config(shape.rotary_base, shape.rotary_dim, shape.max_position_embeddings)
