"""Token losses from hidden states, without `[sequence, vocabulary]` logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor, nn

# fp32 logits alive at once, per rank: 16 Mi values are 64 MiB.
_LOGITS_PER_CHUNK = 1 << 24


def logits_by_chunk(
    model: nn.Module, hidden: Tensor, real_tokens: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield `(rows, logits)` with fp32 logits `[rows, vocab / tp]` of consecutive rows.

    Rows of the vocabulary that only pad it for tensor parallelism get -inf: they are no tokens, and
    exported models do not have them.

    Args:
        hidden (Tensor): `[n, h]`, after the final norm.
        real_tokens (int): How many of this rank's output rows are tokens.
    """
    weight = (
        model.shared_embedding_or_output_weight()
        if model.share_embeddings_and_output_weights
        else model.output_layer.weight
    )
    rows = max(1, _LOGITS_PER_CHUNK // weight.shape[0])
    for start in range(0, len(hidden), rows):
        span = slice(start, min(start + rows, len(hidden)))
        # bf16 keeps 8 bits: a loss near 10 nats would be off by up to 0.03.
        logits = F.linear(hidden[span], weight).float()
        if real_tokens < logits.shape[-1]:
            logits[:, real_tokens:] = float("-inf")
        yield span, logits


def token_nll(model: nn.Module, hidden: Tensor, labels: Tensor, real_tokens: int) -> Tensor:
    """Negative log-likelihood of each label: `[n, h], [n] -> [n]`, fp32, in nats."""
    chunks = logits_by_chunk(model, hidden, real_tokens)
    return torch.cat([_nll(model, logits, labels[span]) for span, logits in chunks])


def greedy_tokens(model: nn.Module, hidden: Tensor, real_tokens: int, first_token: int) -> Tensor:
    """Most likely next token of each row: `[n, h] -> [n]`, int64, the same on every rank.

    Args:
        real_tokens (int): How many of this rank's output rows are tokens.
        first_token (int): Token id of the first of them.
    """
    return map_logits(
        model, hidden, real_tokens, lambda logits: _greedy(model, logits, first_token)
    )


def token_nll_and_greedy(
    model: nn.Module, hidden: Tensor, labels: Tensor, real_tokens: int, first_token: int
) -> tuple[Tensor, Tensor]:
    """Both of the above from the same logits."""
    nll, greedy = [], []
    for span, logits in logits_by_chunk(model, hidden, real_tokens):
        greedy.append(_greedy(model, logits, first_token))  # first: Megatron's loss overwrites
        nll.append(_nll(model, logits, labels[span]))
    return torch.cat(nll), torch.cat(greedy)


def _nll(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    if model.pg_collection.tp.size() > 1:
        return vocab_parallel_cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="none")


def _greedy(model: nn.Module, logits: Tensor, first_token: int) -> Tensor:
    """`[rows, vocab / tp] -> [rows]`; of equal logits the rank with the lowest tokens wins."""
    group = model.pg_collection.tp
    best, ids = logits.max(dim=-1)
    if group.size() == 1:
        return ids
    ids = ids + first_token
    bests = [torch.empty_like(best) for _ in range(group.size())]
    candidates = [torch.empty_like(ids) for _ in range(group.size())]
    dist.all_gather(bests, best, group=group)
    dist.all_gather(candidates, ids, group=group)
    for other, theirs in zip(bests[1:], candidates[1:], strict=True):
        better = other > bests[0]
        bests[0] = torch.where(better, other, bests[0])
        candidates[0] = torch.where(better, theirs, candidates[0])
    return candidates[0]


def map_logits(
    model: nn.Module, hidden: Tensor, real_tokens: int, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """Concatenate `function(logits)` over the chunks."""
    return torch.cat(
        [function(logits) for _, logits in logits_by_chunk(model, hidden, real_tokens)]
    )
