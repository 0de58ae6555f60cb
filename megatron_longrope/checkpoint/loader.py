"""Put a checkpoint's tensors into an in-memory megatron-core model, strictly, tensor by tensor.

Norms carry the fused names of Transformer Engine on disk, whatever spec the run used; a model of
the local spec names them differently in memory. :mod:`.layout` knows how, and the order of layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from megatron_longrope.checkpoint.layout import TensorLayout
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.reader import TensorInfo
from megatron_longrope.checkpoint.tensor_parallel import slice_of_rank
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.errors import LongRopeError

_VOCAB = ("embedding.word_embeddings.weight", "output_layer.weight")


class Checkpoint(Protocol):
    """What has the tensors of a Megatron checkpoint, wherever they come from."""

    directory: Path
    """Where it lies, for messages."""

    shape: ModelShape
    """Geometry of the model."""

    iteration: int
    """Training iteration; 0 where that means nothing."""

    longrope: LongRopeConfig | None
    """Factors that the model was trained with, None for stock RoPE."""

    def keys(self) -> dict[str, TensorInfo]:
        """Name, shape and dtype of every tensor."""

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """One tensor, or one layer of a tensor stacked over layers, on the CPU."""


def load_into(
    model: nn.Module, checkpoint: Checkpoint, *, tp_rank: int = 0, tp_size: int = 1
) -> int:
    """Fill every parameter of `model`, on its device and in its type.

    Peak extra memory is one layer's tensor, or the embedding, as the checkpoint stores it.

    Args:
        model (nn.Module): GPTModel or HybridModel of the local or the Transformer Engine spec,
            possibly wrapped. It need not be the class that the checkpoint was saved from.
        tp_rank (int): This process' tensor-parallel rank.
        tp_size (int): Tensor-parallel ranks the model is split over.

    Returns:
        int: Number of parameters (tensors) filled.

    Raises:
        LongRopeError: The model or the checkpoint has a tensor that the other lacks, or shapes
            differ.
    """
    parameters = dict(model.named_parameters())
    ours, theirs = TensorLayout.of_model(parameters), TensorLayout.of_checkpoint(checkpoint.keys())
    if ours.pattern != theirs.pattern:
        raise LongRopeError(
            f"{checkpoint.directory}: {_other_layers(theirs.pattern, ours.pattern)}"
        )
    if missing := [
        f"{name} (on disk: {address[0]})"
        for address, (name, _) in ours.places.items()
        if address not in theirs.places
    ]:
        raise LongRopeError(
            f"{checkpoint.directory}: lacks {_listed(missing)}, which the model has"
        )
    if unused := {place[0] for key, place in theirs.places.items() if key not in ours.places}:
        raise LongRopeError(
            f"{checkpoint.directory}: holds {_listed(sorted(unused))}, which the model lacks"
        )
    vocab_size = checkpoint.shape.vocab_size
    if tp_size > 1 and checkpoint.shape.num_query_groups % tp_size:
        raise LongRopeError(
            f"tensor parallel size {tp_size} does not divide the "
            f"{checkpoint.shape.num_query_groups} query groups; use a divisor"
        )
    for address, (name, _) in ours.places.items():
        disk = address[0]
        value = checkpoint.tensor(*theirs.places[address])
        for parameter, part in _parts(parameters, name, value, disk):
            target = parameter.detach()
            if disk in _VOCAB:
                part = _vocab_rows(part, len(target), vocab_size, tp_rank, tp_size, disk)
                target[len(part) :] = 0  # rows that pad the vocabulary
                target = target[: len(part)]
            elif tp_size > 1:
                part = slice_of_rank(part, disk, tp_rank, tp_size)
            if part.shape != target.shape:
                raise LongRopeError(
                    f"{disk} has shape {tuple(part.shape)} for tensor-parallel rank {tp_rank} of "
                    f"{tp_size}, the model expects {tuple(target.shape)}"
                )
            target.copy_(part)
    return len(parameters)


def _parts(
    parameters: dict[str, nn.Parameter], name: str, value: Tensor, disk: str
) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters that a tensor fills: one, or one of every expert."""
    if "{expert}" not in name:
        return [(parameters[name], value)]
    prefix, suffix = name.split("{expert}")
    count = sum(key.startswith(prefix) and key.endswith(suffix) for key in parameters)
    if len(value) != count:
        raise LongRopeError(f"{disk} has {len(value)} experts, the model {count}")
    return [(parameters[name.format(expert=i)], value[i]) for i in range(count)]


def _other_layers(theirs: str, ours: str) -> str:
    """How the layers of the checkpoint differ from the model's."""
    if all(pattern == "*-" * (len(pattern) // 2) for pattern in (theirs, ours)):
        return f"has {len(theirs) // 2} layers, the model {len(ours) // 2}"
    return (
        f"has the layers {theirs} (* attention, - MLP), the model {ours}; build the model with the "
        "checkpoint's --hybrid-layer-pattern"
    )


def _listed(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _vocab_rows(
    value: Tensor, rows: int, vocab_size: int, tp_rank: int, tp_size: int, name: str
) -> Tensor:
    """Rows of this rank; only true ones, since padding depends on the layout of each run."""
    if rows * tp_size < vocab_size:
        raise LongRopeError(
            f"{name}: the model has {rows * tp_size} rows, fewer than the vocabulary's {vocab_size}"
        )
    return value[:vocab_size][tp_rank * rows : (tp_rank + 1) * rows]
