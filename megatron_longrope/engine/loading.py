"""Load an engine: checkpoint, process groups, model, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_longrope.checkpoint.loader import Checkpoint, load_into
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.opening import check_fits, model_config
from megatron_longrope.checkpoint.reader import MegatronCheckpoint
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.engine import process_groups
from megatron_longrope.engine.engine import Engine
from megatron_longrope.engine.kernels import core_attention
from megatron_longrope.engine.model import build_model, default_device
from megatron_longrope.options import Loading


def load_engine(
    source: str | Path | Checkpoint,
    *,
    longrope_config: LongRopeConfig | None = None,
    iteration: int | None = None,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    hf_parity: bool = False,
    attention: str = "auto",
    replicas: bool = False,
) -> Engine:
    """Load a checkpoint for scoring.

    Tensors go to the device one by one: the host holds one at a time, whatever the model's size.

    Args:
        source (str | Path | Checkpoint): The `--save` directory of a Megatron run, or one of its
            iteration directories; or an opened checkpoint, such as a
            :class:`megatron_longrope.checkpoint.hf.checkpoint.HfCheckpoint`.
        longrope_config (LongRopeConfig, optional): Defaults to the checkpoint's own, else stock
            RoPE up to its max_position_embeddings.
        iteration (int, optional): Defaults to the latest.
        tensor_parallel (int): Ranks that share a layer. Defaults to 1.
        context_parallel (int): Ranks that share a sequence. Defaults to 1.
        dtype (torch.dtype, optional): Defaults to fp32 on a CPU, the checkpoint's dtype on a GPU.
        device (optional): Defaults to this process' GPU, else the CPU.
        hf_parity (bool): transformers' arithmetic; see :class:`.LongRopeRotaryEmbedding`. Defaults
            to False.
        attention (str): `auto` takes a flash-attention package where one can run (CUDA, half
            precision), else torch SDPA; `sdpa` or `flash` insist. Defaults to "auto".
        replicas (bool): Accept a multiple of TP x CP processes, each TP x CP of which hold a copy
            of the model; :attr:`Engine.replica` tells which. Defaults to False.

    Raises:
        LongRopeError: The checkpoint is damaged, of another format, or does not fit the config; the
            number of processes does not fit; or flash-attn cannot run and was insisted on.
    """
    checkpoint = source
    if isinstance(source, str | Path):
        checkpoint = MegatronCheckpoint.open(source, iteration)
    shape = checkpoint.shape
    config = longrope_config or model_config(checkpoint)
    check_fits(config, shape, checkpoint.longrope)
    process_groups.initialize(tensor_parallel, context_parallel, replicas=replicas)
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(shape, device)
    model = build_model(
        shape,
        config,
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
        hf_parity=hf_parity,
        # Flash attention has no sliding windows here, see FlashCoreAttention.windows.
        core_attention=core_attention(
            "sdpa" if attention == "auto" and shape.sliding_window else attention, device, dtype
        ),
        device=device,
        dtype=dtype,
    )
    tensor_group = model.pg_collection.tp
    load_into(model, checkpoint, tp_rank=tensor_group.rank(), tp_size=tensor_group.size())
    model.rotary_pos_emb.table_device = device
    return Engine(model, shape)


def default_dtype(shape: ModelShape, device: torch.device | None = None) -> torch.dtype:
    """Return what weights are held in without `--dtype`: fp32 on a CPU, else the checkpoint's.

    Args:
        shape (ModelShape): Of the checkpoint.
        device (torch.device, optional): Defaults to this process' GPU, else the CPU.
    """
    device = device or default_device()
    return torch.float32 if device.type == "cpu" else shape.params_dtype


def load_engine_for(
    options: Loading,
    checkpoint: Checkpoint,
    config: LongRopeConfig | None = None,
    **more: Any,
) -> Engine:
    """Load an opened checkpoint as a command's options say; see :func:`load_engine`."""
    return load_engine(
        checkpoint,
        longrope_config=config,
        tensor_parallel=options.tensor_model_parallel_size,
        context_parallel=options.context_parallel_size,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        **more,
    )
