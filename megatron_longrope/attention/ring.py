"""Context parallelism without gradients: blocks of keys and values travel around the ring.

A rank holds its own block and the one that arrives, never the whole sequence. Partial results are
merged by their logsumexp, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longrope.attention.documents import Documents

# (query, key, value, softmax scale, causal) -> (output [b, s, h, d_v], logsumexp [b, s, h])
Tile = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


def attend_ring(
    tile: Tile,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scales: Sequence[float],
    causal: bool,
    group: dist.ProcessGroup,
) -> Tensor:
    """Attention of this rank's queries over the documents of all ranks; no gradients.

    Arguments as :func:`.gathered.attend_gathered`, but that `tile` is attention of one tile, whole
    or causal and square.
    """
    rank, size = group.rank(), group.size()
    widths = (key.shape[-1], value.shape[-1])
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros(*query.shape[:3], widths[1], dtype=dtype)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    for source, block in _blocks(torch.cat((key, value), dim=-1), group):
        key, value = block.split(widths, dim=-1)
        start = 0
        for index, rows in enumerate(documents.rows):
            end = start + rows // size
            queries, keys = _visible(documents, index, rank, source, size, causal)
            if queries and keys:
                at, seen = _slice(queries, start), _slice(keys, start)
                part = tile(
                    query[:, at],
                    key[:, seen],
                    value[:, seen],
                    scales[index],
                    causal and source == rank,
                )
                merge(output[:, at], lse[:, at], *part)
            start = end
    return output.to(query.dtype)


def _visible(
    documents: Documents, index: int, rank: int, source: int, size: int, causal: bool
) -> tuple[range, range]:
    """Which of a rank's queries see which of a source rank's keys: one tile, in local rows.

    A rank holds chunks r and 2 cp - 1 - r. Its own block is causal as a whole, because local order
    is global order. Of a lower rank's block the lower chunk lies before all its queries and the
    upper one behind them; a higher rank's block lies between its two chunks.
    """
    chunk = documents.rows[index] // (2 * size)
    queries = range(documents.on_rank(rank, size).lengths[index])
    keys = range(documents.on_rank(source, size).lengths[index])
    if causal and source < rank:
        keys = keys[:chunk]
    elif causal and source > rank:
        queries = queries[chunk:]
    return queries, keys


def _slice(rows: range, start: int) -> slice:
    return slice(start + rows.start, start + rows.stop)


def merge(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a tile to what the same queries have seen: each weighs its share of the softmax sum.

    Args:
        output (Tensor): `[b, s, h, d_v]`, changed in place.
        lse (Tensor): `[b, s, h]`, changed in place.
        part (Tensor): `[b, s, h, d_v]`.
        part_lse (Tensor): `[b, s, h]`.
    """
    total = torch.logaddexp(lse, part_lse.to(lse.dtype))
    output *= torch.exp(lse - total)[..., None]
    output += part.to(output.dtype) * torch.exp(part_lse.to(lse.dtype) - total)[..., None]
    lse.copy_(total)


def _blocks(block: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Every rank's block, one after another, this rank's first: (rank, block).

    While the caller works on a block it is already on its way to the next rank and the following
    one arrives, so that a transfer costs time only where it is longer than the work.
    """
    rank, size = group.rank(), group.size()
    ranks = dist.get_process_group_ranks(group)
    block = block.contiguous()
    # Two buffers suffice: one is read and sent while the other is written.
    buffers = [torch.empty_like(block) for _ in range(min(2, size - 1))]
    for step in range(size):
        transfers, arriving = [], None
        if step < size - 1:
            arriving = buffers[step % 2]
            transfers = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, block, ranks[(rank + 1) % size], group),
                    dist.P2POp(dist.irecv, arriving, ranks[(rank - 1) % size], group),
                ]
            )
        yield (rank - step) % size, block
        for transfer in transfers:
            transfer.wait()
        block = arriving
