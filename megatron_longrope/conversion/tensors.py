"""Which Hugging Face tensors a checkpoint becomes, and each of them on demand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_longrope.checkpoint.hf.families import Family
from megatron_longrope.checkpoint.hf.finite import check_finite
from megatron_longrope.checkpoint.hf.rules import TensorRule
from megatron_longrope.checkpoint.hf.splits import part_rows, split
from megatron_longrope.checkpoint.layout import TensorLayout
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.reader import MegatronCheckpoint
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
        self._layout = TensorLayout.of_checkpoint(checkpoint.keys())
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
        layers = rule.layers(shape.num_layers)
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
