"""How the tensor-parallel ranks' parts of a tensor make up the whole, and which part is whose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_longrope.checkpoint.layered import Joined, LazyTensor
from megatron_longrope.errors import LongRopeError

# Column-parallel layers have their part of the output rows; the rows of qkv lie group by group.
_ROWS = re.compile(
    r"embedding\.word_embeddings\.weight|output_layer\.(weight|bias)"
    r"|.*\.linear_qkv\.(weight|bias)|.*\.linear_fc1\.(weight|bias)\d*"
)
_FC1 = re.compile(r".*\.linear_fc1\.(weight|bias)\d*")
# Row-parallel layers have their part of the input columns, and add their bias once.
_COLUMNS = re.compile(r".*\.(linear_proj\.weight|linear_fc2\.weight\d*)")
_WHOLE = re.compile(
    r".*(layernorm|norm|linear_qkv\.layer_norm_weight|linear_qkv\.layer_norm_bias"
    r"|linear_fc1\.layer_norm_weight|linear_fc1\.layer_norm_bias)(\.weight|\.bias)?"
    r"|embedding\.position_embeddings\.weight|.*\.(linear_proj|linear_fc2)\.bias\d*"
    r"|.*\.mlp\.router\.(weight|bias|expert_bias)|.*\.mlp\.shared_experts\.gate_weight"
)


class RankPart(LazyTensor, Protocol):
    """What one rank stored of a tensor."""

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Its rows from `start` up to `stop`."""


def join_ranks(name: str, parts: Sequence[RankPart], is_gated: bool) -> LazyTensor:
    """The whole of a tensor.

    Args:
        name (str): Its name in memory.
        parts (Sequence[RankPart]): What each rank stored, in the order of the ranks.
        is_gated (bool): Whether linear_fc1 holds the gate and the up projection.

    Raises:
        LongRopeError: The parts differ in shape, or it is not known how such parts fit together.
    """
    if len(parts) == 1:
        return parts[0]
    if others := [rank for rank, part in enumerate(parts) if part.info != parts[0].info]:
        raise LongRopeError(
            f"{name} is {parts[0].info.shape} on tensor-parallel rank 0 and "
            f"{parts[others[0]].info.shape} on rank {others[0]}; the files are damaged or of "
            "several checkpoints"
        )
    if is_gated and _FC1.fullmatch(name):
        # Each rank has its part of the gate, then its part of the up projection.
        rows = parts[0].info.shape[0]
        halves = ((0, rows // 2), (rows // 2, rows))
        return Joined(name, [part.rows(*half) for half in halves for part in parts], dim=0)
    if _ROWS.fullmatch(name):
        return Joined(name, parts, dim=0)
    if _COLUMNS.fullmatch(name):
        return Joined(name, parts, dim=1)
    if _WHOLE.fullmatch(name):
        return parts[0]
    raise LongRopeError(
        f"holds {name} in {len(parts)} tensor-parallel parts, and how those fit together is not "
        "known here; save the checkpoint with --ckpt-format torch_dist"
    )


def slice_of_rank(value: Tensor, name: str, rank: int, size: int) -> Tensor:
    """What one rank holds of a tensor that does not depend on the vocabulary.

    Args:
        value (Tensor): The whole; of one layer and, of experts, of one expert.
        name (str): Its name on disk, in a gated model: linear_fc1 holds the gate, then the up
            projection.
        rank (int): The tensor-parallel rank.
        size (int): Tensor-parallel ranks.
    """
    if _FC1.fullmatch(name):
        return torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
    if _ROWS.fullmatch(name):
        return value.chunk(size)[rank]
    return value.chunk(size, dim=1)[rank] if _COLUMNS.fullmatch(name) else value
