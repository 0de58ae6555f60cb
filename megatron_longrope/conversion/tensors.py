"""Which Hugging Face tensors a checkpoint becomes, and each of them on demand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_longrope.checkpoint.layout import Layout
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.reader import MegatronCheckpoint
from megatron_longrope.conversion.families import Family, TensorRule


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
        ValueError: The checkpoint lacks a tensor, holds one too many, or a shape is not as the
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
            raise ValueError(
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
        value = _part(self._last[1], planned, self._shape)
        return value.to(planned.dtype).contiguous()

    def _check_names(self, rules: tuple[TensorRule, ...]) -> None:
        stored = {name for name, _ in self._layout.places}
        wanted = {rule.disk for rule in rules}
        for lacks, names in (
            ("lacks", wanted - stored),
            ("also holds", stored - wanted),
        ):
            if names:
                raise ValueError(
                    f"{self._checkpoint.directory}: {lacks} {', '.join(sorted(names)[:4])}; "
                    "the arguments describe a different model"
                )

    def _planned(self, rule: TensorRule, dtype: torch.dtype | None) -> list[PlannedTensor]:
        shape = self._shape
        layers: list[int | None] = list(range(shape.num_layers)) if rule.is_stacked else [None]
        name, index = self._layout.places[rule.disk, layers[0]]
        info = self._checkpoint.keys()[name]
        stored = info.shape if index is None else info.shape[1:]
        rows = _rows(rule, stored[0], shape)
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


def _rows(rule: TensorRule, stored: int, shape: ModelShape) -> list[int]:
    """Rows of each part of a tensor with `stored` rows."""
    if rule.split == "vocab":
        if stored < shape.vocab_size:
            raise ValueError(
                f"{rule.disk} has {stored} rows, fewer than the vocabulary's {shape.vocab_size}; "
                "the tokenizer is not the one the model was trained with"
            )
        return [shape.vocab_size]
    if rule.split == "qkv":
        kv = shape.num_query_groups * shape.head_dim
        rows = [shape.num_attention_heads * shape.head_dim, kv, kv]
    elif rule.split == "gate_up":
        rows = [shape.ffn_hidden_size, shape.ffn_hidden_size]
    else:
        return [stored]
    if sum(rows) != stored:
        raise ValueError(f"{rule.disk} has {stored} rows, the arguments say {sum(rows)}")
    return rows


def _part(value: Tensor, planned: PlannedTensor, shape: ModelShape) -> Tensor:
    if planned.rule.split == "vocab":
        return value[: shape.vocab_size]
    if planned.rule.split == "gate_up":
        return value.chunk(2, dim=0)[planned.part]
    if planned.rule.split == "qkv":
        # Group by group: the queries of the group, then its key, then its value.
        # [(nh + 2 ng) hd, ...] -> [ng, nh / ng + 2, hd, ...]
        groups, rest = shape.num_query_groups, value.shape[1:]
        heads = shape.num_attention_heads // groups
        grouped = value.view(groups, heads + 2, shape.head_dim, *rest)
        part = (slice(0, heads), slice(heads, heads + 1), slice(heads + 1, None))[planned.part]
        return grouped[:, part].reshape(-1, *rest)
    return value
