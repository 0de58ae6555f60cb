"""Model-parallel groups for the engine, with or without torchrun."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def initialize(tensor_parallel: int = 1, context_parallel: int = 1) -> None:
    """Join torchrun's processes, or be alone, and lay out TP x CP groups. Idempotent.

    Raises:
        ValueError: The number of processes is not TP x CP (or groups exist with another layout).
    """
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ:
            if backend == "nccl":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(backend)
        else:
            # One process needs no rendezvous, hence no port that could be taken.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    wanted = tensor_parallel * context_parallel
    if dist.get_world_size() != wanted:
        raise ValueError(
            f"{dist.get_world_size()} processes do not fit tensor parallel {tensor_parallel} x "
            f"context parallel {context_parallel} = {wanted}; start torchrun with "
            f"--nproc-per-node {wanted}"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel, context_parallel_size=context_parallel
        )
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    if sizes != (tensor_parallel, context_parallel):
        raise ValueError(
            f"this process already runs tensor x context parallel {sizes[0]} x {sizes[1]}; "
            f"it cannot also run {tensor_parallel} x {context_parallel}"
        )
