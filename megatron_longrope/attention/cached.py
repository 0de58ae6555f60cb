"""Attention over keys that context-parallel ranks keep; no gradients.

While a sequence grows its keys stay where they are and the queries travel: a step has far fewer
queries than there are keys, and generating a token takes the same way as reading the prompt. Every
rank answers for its own keys, and the answers are merged by the logsumexp of their scores, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longrope.attention.ring import Tile, merge
from megatron_longrope.context_parallel import shard, unshard, zigzag_chunks

Part = tuple[slice, Tensor, Tensor, bool]
"""Rows of the queries, the keys `[b, t, g, d]` and values that they see, and whether causally."""


def attend_over_ranks(
    tile: Tile, query: Tensor, parts: Iterable[Part], scale: float, group: dist.ProcessGroup
) -> Tensor:
    """Attention of queries that every rank has over keys of which each rank has some.

    Args:
        tile (Tile): Attention of one tile, whole or causal and square.
        query (Tensor): `[b, s, h, d]`, the same on every rank.
        parts (Iterable[Part]): What the queries see of this rank's keys.
        scale (float): Softmax scale.
        group (ProcessGroup): Context-parallel group.

    Returns:
        Tensor: `[b, s, h, d_v]`, the same bits on every rank.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    output = None
    for rows, key, value, causal in parts:
        if output is None:
            output = query.new_zeros(*query.shape[:3], value.shape[-1], dtype=dtype)
        if key.shape[1] and query[:, rows].shape[1]:
            part = tile(query[:, rows], key, value, scale, causal)
            merge(output[:, rows], lse[:, rows], *part)
    assert output is not None
    parts_lse = [torch.empty_like(lse) for _ in range(group.size())]
    dist.all_gather(parts_lse, lse, group=group)
    # A rank without keys has a logsumexp of -inf, hence weight 0.
    output *= torch.exp(lse - torch.stack(parts_lse).logsumexp(0))[..., None]
    dist.all_reduce(output, group=group)
    return output.to(query.dtype)


def attend_sharded(
    tile: Tile,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    past: tuple[Tensor, Tensor],
    scale: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """Causal attention of a part of a sequence that is zigzag-sharded over the ranks.

    Args:
        tile (Tile): Attention of one tile, whole or causal and square.
        query (Tensor): `[b, s / cp, h, d]`.
        new (tuple[Tensor, Tensor]): Keys `[b, s / cp, g, d]` and values of the same tokens.
        past (tuple[Tensor, Tensor]): What this rank keeps of all earlier tokens.
        scale (float): Softmax scale.
        group (ProcessGroup): Context-parallel group.

    Returns:
        Tensor: `[b, s / cp, h, d_v]`.
    """
    rank, size = group.rank(), group.size()
    query = query.contiguous()
    queries = [torch.empty_like(query) for _ in range(size)]
    dist.all_gather(queries, query, group=group)
    whole = unshard(queries, dim=1)
    parts: list[Part] = [(slice(None), *past, False)]
    chunk = query.shape[1] // 2
    for index, (key, value) in zip(
        zigzag_chunks(rank, size), zip(*(x.split(chunk, dim=1) for x in new), strict=True),
        strict=True,
    ):  # fmt: skip
        start, end = index * chunk, (index + 1) * chunk
        parts += [(slice(start, end), key, value, True), (slice(end, None), key, value, False)]
    return shard(attend_over_ranks(tile, whole, parts, scale, group), rank, size, dim=1)
