"""Context parallelism for training: every rank gathers keys and values once, then attends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longrope.attention.documents import (
    Documents,
    padded_rows,
    padding_alone,
    token_rows,
)
from megatron_longrope.context_parallel import zigzag_chunks

# (query, key, value, query lengths, key lengths, softmax scales, causal) -> output
Attend = Callable[
    [Tensor, Tensor, Tensor, Sequence[int], Sequence[int], Sequence[float], bool], Tensor
]


def attend_gathered(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scales: Sequence[float],
    causal: bool,
    group: dist.ProcessGroup,
) -> Tensor:
    """Attention of this rank's queries over the documents of all ranks, with gradients.

    Args:
        attend (Attend): Attention over documents back to back, the last query at the last key.
        query (Tensor): `[b, rows / cp, h, d]`, each document zigzag-sharded.
        key (Tensor): `[b, rows / cp, g, d]`.
        value (Tensor): `[b, rows / cp, g, d_v]`.
        documents (Documents): Whole documents.
        scales (Sequence[float]): Softmax scale of each document.
        causal (bool): Whether a query sees no later key.
        group (ProcessGroup): Context-parallel group.

    Returns:
        Tensor: `[b, rows / cp, h, d_v]`.
    """
    rank, size = group.rank(), group.size()
    widths = (key.shape[-1], value.shape[-1])
    # One collective for both, however many documents there are.
    parts = _AllGather.apply(torch.cat((key, value), dim=-1), group)
    chunks: dict[tuple[int, int], Tensor] = {}  # (document, chunk): its tokens
    for source, part in enumerate(parts):
        for (document, half), tokens in _split(part, documents.halves(source, size)).items():
            chunks[document, zigzag_chunks(source, size)[half]] = tokens
    mine = documents.halves(rank, size)
    outputs: dict[tuple[int, int], Tensor] = {}
    queries = _split(query, mine)
    # A chunk sees everything up to its own end: the lower one the beginning of what the upper one
    # does. Of one document both are then the same memory.
    ends = [chunk + 1 if causal else 2 * size for chunk in zigzag_chunks(rank, size)]
    seen = [
        _concatenate([chunks[document, index] for index in range(ends[1])])
        for document in range(len(documents.rows))
    ]
    for half, end in enumerate(ends):
        rows = {at: tokens for at, tokens in queries.items() if at[1] == half and tokens.shape[1]}
        if not rows:
            continue
        keys = [seen[at][:, : end * documents.rows[at] // (2 * size)] for at, _ in rows]
        output = attend(
            _concatenate(list(rows.values())),
            *_concatenate(keys).split(widths, dim=-1),
            [tokens.shape[1] for tokens in rows.values()],
            [tokens.shape[1] for tokens in keys],
            [scales[document] for document, _ in rows],
            causal,
        )
        pieces = output.split([tokens.shape[1] for tokens in rows.values()], dim=1)
        outputs.update(zip(rows, pieces, strict=True))
    if not outputs:
        # A rank of padding alone must still join the collective of the backward pass.
        return padding_alone(query, widths[1], parts[0])
    tokens = _concatenate([outputs[at] for at in sorted(outputs)])
    return padded_rows(tokens, mine, query.shape[1])


def _split(tensor: Tensor, halves: Documents) -> dict[tuple[int, int], Tensor]:
    """Tokens of each half: `[b, rows / cp, ...] -> {(document, half): [b, tokens, ...]}`."""
    pieces = token_rows(tensor, halves).split(list(halves.lengths), dim=1)
    return {divmod(index, 2): piece for index, piece in enumerate(pieces)}


def _concatenate(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class _AllGather(torch.autograd.Function):
    """Gather every rank's tensor; the gradient of a part is the sum over ranks of its gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group = group
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor, group=group)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        stacked = torch.stack(gradients)
        if stacked.is_cuda:
            mine = torch.empty_like(gradients[0])
            dist.reduce_scatter_tensor(mine, stacked, group=ctx.group)
            return mine, None
        dist.all_reduce(stacked, group=ctx.group)  # gloo has no reduce-scatter on every release
        return stacked[ctx.group.rank()], None
