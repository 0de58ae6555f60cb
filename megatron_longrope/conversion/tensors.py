"""Which Hugging Face tensors a checkpoint becomes, and each of them on demand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_longrope.checkpoint.layout import Layout
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.reader import MegatronCheckpoint
from megatron_longrope.conversion.families import Family
from megatron_longrope.conversion.finite import check_finite
from megatron_longrope.conversion.rules import TensorRule, dimensions
from megatron_longrope.errors import LongRopeError


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write; known before any data is read."""

    name: str
    """Hugging Face name."""

    shape: tuple[int, ...]
    """Shape to write."""

    dtype: torch.dtype
    """Dtype to write."""

    rule: TensorRule
    """Where it comes from."""

    part: int
    """Which of `rule.hf` it is."""

    layer: int | None
    """Layer of a stacked tensor."""

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource:
    """Plans the tensors of a model and loads them one at a time.

    Peak memory is one tensor of one layer (or the embedding) and its converted copy.

    Args:
        shape (ModelShape): Geometry; `vocab_size` is the number of rows to keep.
        dtype (torch.dtype, optional): Dtype to convert to. Defaults to each tensor's own.

    Raises:
        LongRopeError: The checkpoint lacks a tensor, holds one too many, or a shape is not as the
            arguments say.
    """

    def __init__(
        self,
        checkpoint: MegatronCheckpoint,
        family: Family,
        shape: ModelShape,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._shape = shape
        self._layout = Layout.of_checkpoint(checkpoint.keys())
        self._last: tuple[tuple[str, int | None], Tensor] | None = None
        rules = family.tensor_rules(shape)
        if self._layout.pattern != "*-" * shape.num_layers:
            raise LongRopeError(
                f"{checkpoint.directory}: its layers are {self._layout.pattern} (* attention, "
                "- MLP); a Hugging Face decoder has one MLP after each attention, "
                f"{shape.num_layers} times"
            )
        self._check_names(rules)
        self.plan = [planned for rule in rules for planned in self._planned(rule, dtype)]

    def load(self, planned: PlannedTensor) -> Tensor:
        """The tensor, contiguous, in the planned shape and dtype."""
        key = (planned.rule.disk, planned.layer)
        if self._last is None or self._last[0] != key:
            self._last = None  # free the previous one first
            self._last = (key, self._checkpoint.tensor(*self._layout.places[key]))
        value = split(self._last[1], planned.rule, self._shape)[planned.part]
        source = f"{self._checkpoint.directory}: {planned.rule.disk} (tensor {planned.name})"
        check_finite(source, value, planned.dtype)
        return value.to(planned.dtype).contiguous()

    def _check_names(self, rules: tuple[TensorRule, ...]) -> None:
        stored = {name for name, _ in self._layout.places}
        wanted = {rule.disk for rule in rules}
        for lacks, names in (
            ("lacks", wanted - stored),
            ("also holds", stored - wanted),
        ):
            if names:
                raise LongRopeError(
                    f"{self._checkpoint.directory}: {lacks} {', '.join(sorted(names)[:4])}; "
                    "the arguments describe a different model"
                )

    def _planned(self, rule: TensorRule, dtype: torch.dtype | None) -> list[PlannedTensor]:
        shape = self._shape
        layers: list[int | None] = list(range(shape.num_layers)) if rule.is_stacked else [None]
        name, index = self._layout.places[rule.disk, layers[0]]
        info = self._checkpoint.keys()[name]
        stored = info.shape if index is None else info.shape[1:]
        rows = part_rows(rule, shape)
        if rule.split == "experts":
            if stored[0] != shape.num_experts:
                raise LongRopeError(
                    f"{rule.disk} has {stored[0]} experts, the arguments say {shape.num_experts}"
                )
            stored = (stored[0] * stored[1], *stored[2:])
        if rule.split == "vocab" and stored[0] < shape.vocab_size:
            raise LongRopeError(
                f"{rule.disk} has {stored[0]} rows, fewer than the vocabulary's "
                f"{shape.vocab_size}; the tokenizer is not the one the model was trained with"
            )
        if rule.split != "vocab" and stored[0] != sum(rows):
            raise LongRopeError(f"{rule.disk} has {stored[0]} rows, the arguments say {sum(rows)}")
        return [
            PlannedTensor(
                name=name.format(layer=layer),
                shape=(rows[part], *stored[1:]),
                dtype=dtype or info.dtype,
                rule=rule,
                part=part,
                layer=layer,
            )
            for layer in layers
            for part, name in enumerate(rule.hf)
        ]


def part_rows(rule: TensorRule, shape: ModelShape) -> list[int]:
    """Rows of each Hugging Face tensor of a rule."""
    sizes = dimensions(shape)
    total = sizes[rule.dims[0]]
    if rule.split == "experts":
        total *= sizes[rule.dims[1]]
    if len(rule.hf) == 1:
        return [total]
    if rule.split == "qkv":
        kv = shape.num_query_groups * shape.head_dim
        return [total - 2 * kv, kv, kv]
    return [total // len(rule.hf)] * len(rule.hf)


def split(value: Tensor, rule: TensorRule, shape: ModelShape) -> list[Tensor]:
    """A Megatron tensor as Hugging Face has it.

    Args:
        value (Tensor): `[rows, ...]`, of one layer; `[experts, rows, ...]` of experts.

    Returns:
        list[Tensor]: One for each of `rule.hf`.
    """
    if rule.split == "vocab":
        return [value[: shape.vocab_size]]
    if rule.split == "qkv":
        # [(nh + 2 ng) hd, ...] -> [ng, nh / ng + 2, hd, ...] -> [nh hd, ...] and 2 x [ng hd, ...]
        rest = value.shape[1:]
        grouped = value.view(shape.num_query_groups, -1, shape.head_dim, *rest)
        queries = grouped.shape[1] - 2
        parts = [part.reshape(-1, *rest) for part in grouped.split([queries, 1, 1], dim=1)]
        return parts if len(rule.hf) == 3 else [torch.cat(parts)]
    if rule.split == "experts":
        value = value.flatten(0, 1)
    return list(value.chunk(len(rule.hf)))


def join(parts: list[Tensor], rule: TensorRule, shape: ModelShape) -> Tensor:
    """Inverse of :func:`split`; the vocabulary is padded with rows of zeros.

    Args:
        parts (list[Tensor]): One for each of `rule.hf`.

    Returns:
        Tensor: `[rows, ...]`, of one layer; `[experts, rows, ...]` of experts.
    """
    if rule.split == "vocab":
        rows = shape.padded_vocab_size - shape.vocab_size
        if rows == 0:  # spare a copy of the largest tensor
            return parts[0]
        return torch.cat([parts[0], parts[0].new_zeros(rows, shape.hidden_size)])
    if rule.split == "qkv":
        kv = shape.num_query_groups * shape.head_dim
        if len(parts) == 1:
            parts = list(parts[0].split([len(parts[0]) - 2 * kv, kv, kv]))
        # [nh hd, ...] and 2 x [ng hd, ...] -> [ng, nh / ng + 2, hd, ...] -> [(nh + 2 ng) hd, ...]
        rest = parts[0].shape[1:]
        grouped = [part.view(shape.num_query_groups, -1, shape.head_dim, *rest) for part in parts]
        return torch.cat(grouped, dim=1).view(-1, *rest)
    value = torch.cat(parts) if len(parts) > 1 else parts[0]
    return value.unflatten(0, (shape.num_experts, -1)) if rule.split == "experts" else value
