"""How a Megatron tensor is made of Hugging Face's, and the other way round."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_longrope.checkpoint.hf.rules import TensorRule, dimensions
from megatron_longrope.checkpoint.model_args import ModelShape


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
