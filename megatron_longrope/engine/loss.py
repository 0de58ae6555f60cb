"""Token losses from hidden states, without `[sequence, vocabulary]` logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
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
        logits = F.linear(hidden[span], weight).float()
        if real_tokens < logits.shape[-1]:
            logits[:, real_tokens:] = float("-inf")
        yield span, logits


def token_nll(model: nn.Module, hidden: Tensor, labels: Tensor, real_tokens: int) -> Tensor:
    """Negative log-likelihood of each label: `[n, h], [n] -> [n]`, fp32, in nats."""
    result = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
    parallel = model.pg_collection.tp.size() > 1
    for span, logits in logits_by_chunk(model, hidden, real_tokens):
        if parallel:
            result[span] = vocab_parallel_cross_entropy(logits, labels[span])
        else:
            result[span] = F.cross_entropy(logits, labels[span], reduction="none")
    return result


def map_logits(
    model: nn.Module, hidden: Tensor, real_tokens: int, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """Concatenate `function(logits)` over the chunks."""
    return torch.cat(
        [function(logits) for _, logits in logits_by_chunk(model, hidden, real_tokens)]
    )
