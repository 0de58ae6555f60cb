"""Put a checkpoint's tensors into an in-memory megatron-core GPTModel, strictly, tensor by tensor.

On disk the layers are stacked on dimension 0 and norms carry the fused names of Transformer Engine,
whatever spec the run used; a model of the local spec names its norms differently in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_longrope.checkpoint.reader import MegatronCheckpoint

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LOCAL_TO_DISK = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}
_VOCAB = ("embedding.word_embeddings.weight", "output_layer.weight")


def load_into(
    model: nn.Module, checkpoint: MegatronCheckpoint, *, tp_rank: int = 0, tp_size: int = 1
) -> int:
    """Fill every parameter of `model`; peak extra memory is one layer's tensor.

    Args:
        model (nn.Module): GPTModel of the local or the Transformer Engine spec, possibly wrapped.
        tp_rank (int): This process' tensor-parallel rank.
        tp_size (int): Tensor-parallel ranks the model is split over.

    Returns:
        int: Number of parameters (tensors) filled.

    Raises:
        ValueError: The model or the checkpoint has a tensor that the other lacks, or shapes differ.
    """
    stored = checkpoint.keys()
    plan: list[tuple[Tensor, str, int | None]] = []
    layers_seen: dict[str, int] = {}
    missing = []
    for name, parameter in model.named_parameters():
        disk, layer = disk_name(name)
        if disk not in stored:
            missing.append(f"{name} (on disk: {disk})")
            continue
        plan.append((parameter, disk, layer))
        layers_seen[disk] = max(layers_seen.get(disk, 0), 1 if layer is None else layer + 1)
    if missing:
        raise ValueError(f"{checkpoint.directory}: lacks {_listed(missing)}, which the model has")
    if unused := sorted(stored.keys() - layers_seen.keys()):
        raise ValueError(f"{checkpoint.directory}: holds {_listed(unused)}, which the model lacks")
    for _, disk, layer in plan:
        if layer is not None and stored[disk].shape[0] != layers_seen[disk]:
            raise ValueError(
                f"{checkpoint.directory}: {disk} has {stored[disk].shape[0]} layers, "
                f"the model {layers_seen[disk]}"
            )
    vocab_size = checkpoint.shape.vocab_size
    if tp_size > 1 and checkpoint.shape.num_query_groups % tp_size:
        raise ValueError(
            f"tensor parallel size {tp_size} does not divide the "
            f"{checkpoint.shape.num_query_groups} query groups; use a divisor"
        )
    for parameter, disk, layer in plan:
        value = checkpoint.tensor(disk, layer)
        if disk in _VOCAB:
            value = _vocab_rows(value, parameter.shape[0], vocab_size, tp_rank, tp_size, disk)
        elif tp_size > 1:
            value = _tensor_parallel_slice(value, disk, tp_rank, tp_size)
        if value.shape != parameter.shape:
            raise ValueError(
                f"{disk} has shape {tuple(value.shape)} for tensor-parallel rank {tp_rank} of "
                f"{tp_size}, the model expects {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(value)
    return len(plan)


def disk_name(name: str) -> tuple[str, int | None]:
    """Name on disk and layer index of an in-memory parameter of either spec."""
    while name.startswith("module."):  # DDP and Float16Module wrappers
        name = name.removeprefix("module.")
    match = _LAYER.fullmatch(name)
    if not match:
        return name, None
    rest = match[2]
    return f"decoder.layers.{_LOCAL_TO_DISK.get(rest, rest)}", int(match[1])


def _listed(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _vocab_rows(
    value: Tensor, rows: int, vocab_size: int, tp_rank: int, tp_size: int, name: str
) -> Tensor:
    """Rows of this rank; only true ones, since padding depends on the layout of each run."""
    if rows * tp_size < vocab_size:
        raise ValueError(
            f"{name}: the model has {rows * tp_size} rows, fewer than the vocabulary's {vocab_size}"
        )
    result = value.new_zeros(rows, *value.shape[1:])
    part = value[:vocab_size][tp_rank * rows : (tp_rank + 1) * rows]
    result[: len(part)] = part
    return result


def _rows(value: Tensor, rank: int, size: int) -> Tensor:
    return value.chunk(size, dim=0)[rank]


def _columns(value: Tensor, rank: int, size: int) -> Tensor:
    return value.chunk(size, dim=1)[rank]


def _gate_and_up(value: Tensor, rank: int, size: int) -> Tensor:
    """[2f, ...] holds [gate; up]; every rank has its part of both."""
    return torch.cat([_rows(half, rank, size) for half in value.chunk(2, dim=0)])


# The rows of qkv lie group by group, so a contiguous part is a set of whole query groups.
_SLICES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "linear_qkv.weight": _rows,
    "linear_qkv.bias": _rows,
    "linear_proj.weight": _columns,
    "linear_fc1.weight": _gate_and_up,
    "linear_fc1.bias": _gate_and_up,
    "linear_fc2.weight": _columns,
}


def _tensor_parallel_slice(value: Tensor, name: str, rank: int, size: int) -> Tensor:
    for suffix, cut in _SLICES.items():
        if name.endswith(suffix):
            return cut(value, rank, size)
    return value
