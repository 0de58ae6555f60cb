"""Model-parallel groups for the engine, with or without torchrun."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_longrope.errors import LongRopeError
from megatron_longrope.ranks import require_alone

PATIENCE = timedelta(days=30)
"""How long a rank waits for another that is in a forward pass of its own. Collectives of layers
have shorter timeouts, so that a job that hangs ends."""


def initialize(
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    *,
    replicas: bool = False,
    alone: bool = False,
) -> None:
    """Join torchrun's processes, or be alone, and lay out TP x CP groups. Idempotent.

    Args:
        tensor_parallel (int): Ranks that share a layer. Defaults to 1.
        context_parallel (int): Ranks that share a sequence. Defaults to 1.
        replicas (bool): Take any multiple of TP x CP processes. Each block of TP x CP neighbouring
            ranks holds a whole model; see :func:`replica`. Defaults to False.
        alone (bool): Wait for no other process, whatever the environment says of ranks. Defaults to
            False.

    Raises:
        LongRopeError: The number of processes does not fit, RANK is missing, or groups exist with
            another layout.
    """
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ and not alone:
            if backend == "nccl":  # which binds the rank to the device that is current
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(backend)
        else:
            if not alone:
                require_alone()
            # One process needs no rendezvous, hence no port that could be taken.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    _check_world(dist.get_world_size(), tensor_parallel, context_parallel, replicas)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel, context_parallel_size=context_parallel
        )
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    if sizes != (tensor_parallel, context_parallel):
        raise LongRopeError(
            f"this process already runs tensor x context parallel {sizes[0]} x {sizes[1]}; "
            f"it cannot also run {tensor_parallel} x {context_parallel}"
        )


def replica() -> tuple[int, int]:
    """Index of this process' copy of the model, rank // (TP x CP), and how many copies there are.

    Megatron orders ranks by tensor, then context, then data parallelism; a copy is a rank of the
    latter. (0, 1) before :func:`initialize`.
    """
    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )


def gather_from_replicas(value: Any) -> list[Any]:
    """Every copy's value, in the order of the copies, on every rank.

    Args:
        value (Any): Something small that pickles; the same on all ranks of this copy.
    """
    count = replica()[1]
    if count == 1:
        return [value]
    return from_every_rank(value)[:: dist.get_world_size() // count]


def from_every_rank(value: Any) -> list[Any]:
    """Every rank's value, in their order, on every rank.

    Args:
        value (Any): Something small that pickles.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient_group(dist.group.WORLD))
    return values


def from_first_rank(value: Any) -> Any:
    """Rank 0's value on every rank: decisions that must not differ.

    Args:
        value (Any): Something small that pickles.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_patient_group(dist.group.WORLD))
    return values[0]


@lru_cache(maxsize=1)
def _patient_group(world: Any) -> Any:
    """Return the group over which ranks exchange results; all of them come to the first exchange.

    Gloo: results are no work for a GPU, and NCCL's watchdog ends a job after ten minutes.

    Args:
        world (ProcessGroup): Torch's, of which there may be another after this one is destroyed.
    """
    return dist.new_group(timeout=PATIENCE, backend="gloo")


def _check_world(world: int, tensor_parallel: int, context_parallel: int, replicas: bool) -> None:
    model = tensor_parallel * context_parallel
    layout = f"tensor parallel {tensor_parallel} x context parallel {context_parallel} = {model}"
    if replicas and world % model:
        raise LongRopeError(
            f"{world} processes do not fit copies of {layout}; start torchrun with a number of "
            f"processes that is a multiple of {model}"
        )
    if not replicas and world != model:
        raise LongRopeError(
            f"{world} processes do not fit {layout}; start torchrun with --nproc-per-node {model}"
        )
