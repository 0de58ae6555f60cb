"""Zigzag sharding of a sequence over context-parallel ranks; pure functions, no process group.

A sequence is cut into 2 * cp_size chunks and rank r holds chunks r and 2 * cp_size - 1 - r, so that
every rank has the same amount of causal attention. megatron-core shards tokens this way; positions
and rotary tables must follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_longrope.errors import LongRopeError

if TYPE_CHECKING:
    from megatron_longrope.selection import FactorSelection


def check_divisible(length: int, cp_size: int) -> None:
    """Refuse a length that does not split into zigzag chunks.

    Raises:
        LongRopeError: `length` is no multiple of 2 * cp_size.
    """
    if cp_size > 1 and length % (2 * cp_size):
        rounded = -(-length // (2 * cp_size)) * 2 * cp_size
        raise LongRopeError(
            f"sequence length {length} is not divisible by 2 x context parallel size "
            f"{cp_size} = {2 * cp_size}; use {rounded} or another context parallel size"
        )


def padding(selection: FactorSelection, length: int, cp_size: int) -> int:
    """Tokens to put behind a sequence so that it splits into zigzag chunks; no token sees those.

    Raises:
        LongRopeError: The longer sequence would take another factor set.
    """
    missing = -length % (2 * cp_size) if cp_size > 1 else 0
    if missing and not selection.pinned_length:
        padded, longest = length + missing, selection.config.max_length
        if padded > longest or selection.factor_set(length) is not selection.factor_set(padded):
            check_divisible(length, cp_size)
    return missing


def check_documents(lengths: Iterable[int], cp_size: int) -> None:
    """Refuse packed documents, each of which is split by itself, as :func:`check_divisible` does.

    Raises:
        LongRopeError: A length is no multiple of 2 * cp_size.
    """
    for index, length in enumerate(lengths):
        try:
            check_divisible(length, cp_size)
        except ValueError as error:
            raise LongRopeError(f"packed document {index}: {error}") from None


def zigzag_chunks(cp_rank: int, cp_size: int) -> tuple[int, int]:
    """Indices of the two chunks, out of 2 * cp_size, that `cp_rank` holds."""
    return cp_rank, 2 * cp_size - 1 - cp_rank


def zigzag_positions(
    length: int, cp_rank: int, cp_size: int, device: torch.device | str | None = None
) -> Tensor:
    """Global positions of the tokens that `cp_rank` holds, in local order.

    Returns:
        Tensor: `[length / cp_size]`, int64.
    """
    return shard(torch.arange(length, device=device), cp_rank, cp_size, dim=0)


def shard(tensor: Tensor, cp_rank: int, cp_size: int, dim: int) -> Tensor:
    """This rank's part of a whole sequence along `dim`: `[..., s, ...] -> [..., s / cp, ...]`."""
    if cp_size == 1:
        return tensor
    check_divisible(tensor.shape[dim], cp_size)
    chunks = tensor.chunk(2 * cp_size, dim=dim)
    return torch.cat([chunks[index] for index in zigzag_chunks(cp_rank, cp_size)], dim=dim)


def unshard(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Whole sequence from every rank's part, rank order: the inverse of :func:`shard`."""
    cp_size = len(parts)
    if cp_size == 1:
        return parts[0]
    chunks: dict[int, Tensor] = {}
    for cp_rank, part in enumerate(parts):
        chunks |= zip(zigzag_chunks(cp_rank, cp_size), part.chunk(2, dim=dim), strict=True)
    return torch.cat([chunks[index] for index in sorted(chunks)], dim=dim)


def shard_documents(
    tensor: Tensor, cu_seqlens: Sequence[int], cp_rank: int, cp_size: int, dim: int
) -> Tensor:
    """This rank's part of packed documents, each split by itself along `dim`.

    Args:
        tensor (Tensor): `[..., t, ...]`, documents one after the other.
        cu_seqlens (Sequence[int]): Offsets of the documents in `t`, from 0 to t.
        cp_rank (int): Rank in the context-parallel group.
        cp_size (int): Size of that group.
        dim (int): Dimension of the tokens.

    Raises:
        LongRopeError: A document is no multiple of 2 * cp_size.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    check_documents(lengths, cp_size)
    return torch.cat(
        [shard(part, cp_rank, cp_size, dim) for part in tensor.split(lengths, dim=dim)], dim=dim
    )
