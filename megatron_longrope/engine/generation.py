"""Generation with a key/value cache under one factor set per sequence.

A key is rotated once, by the factors of the moment, and then stays in the cache. If a sequence
changed its factor set where it outgrows a window, new queries would meet keys of another rotation
and the model would compute something that no factors describe. The factor set and the attention
factor are therefore pinned before the first token, by the length that the sequence may grow to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longrope.config_rules import check_int
from megatron_longrope.engine import loss
from megatron_longrope.engine.engine import Engine
from megatron_longrope.engine.kv_cache import PinnedSequence
from megatron_longrope.engine.model import vocab_range
from megatron_longrope.errors import LongRopeError

PREFILL_TOKENS = 2**15
"""Tokens of a prompt that are read at once, all rows and all ranks together."""


@torch.no_grad()
def generate(
    engine: Engine,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    factor_length: int | None = None,
    eos_ids: Collection[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """Continue prompts of equal length greedily: of equally likely tokens the lowest is taken.

    Every rank of a copy of the model returns the same tokens; copies may generate different ones.
    The cache takes 2 * attention layers * (n + max_new_tokens) / cp * b * groups / tp * head_dim
    values of the model's dtype. Logits exist for the last position alone.

    Args:
        engine (Engine): The model; its factors are those of its config at the moment of the call.
        tokens (Tensor): `[b, n]`, int64, prompts without padding, n >= 2.
        max_new_tokens (int): Most tokens that a row may get.
        factor_length (int, optional): Choose the factor set and the attention factor of a sequence
            of that many tokens. Defaults to n + max_new_tokens, the least that is allowed.
        eos_ids (Collection[int]): Tokens that end a row. Defaults to none.
        stop (Callable, optional): Called with a row's new tokens after each one; True ends the row.
            Must answer alike on all ranks of a copy.
        prefill_chunk (int, optional): Read the prompt that many tokens at a time, to bound the
            memory of activations. Defaults to :data:`PREFILL_TOKENS`, divided among the rows.

    Returns:
        list[list[int]]: New tokens of each row, up to and including the one that ended it.

    Raises:
        LongRopeError: An argument outside its range, tokens outside the vocabulary, or a length
            that no factor set covers.
    """
    engine._check_tokens(tokens)
    check_int("max_new_tokens", max_new_tokens, 1)
    if prefill_chunk is not None:
        check_int("prefill_chunk", prefill_chunk, 1)
    batch, length = tokens.shape
    total = length + max_new_tokens
    first_token, real_tokens = vocab_range(engine.model, engine.shape.vocab_size)
    sequence = PinnedSequence(engine.model, total, _pinned_length(total, factor_length))
    chunk_length = prefill_chunk or max(1, PREFILL_TOKENS // batch)
    for chunk in tokens.to(engine.device).split(chunk_length, dim=1):
        hidden = sequence.advance(chunk)
    rows: list[list[int]] = [[] for _ in range(batch)]
    running = list(range(batch))
    for position in range(length, total):
        # Ended rows go along, unrecorded, until the last one ends.
        chosen = loss.greedy_tokens(engine.model, hidden, real_tokens, first_token)
        chosen = _agreed(engine, chosen)
        for row, token in enumerate(chosen.tolist()):
            if row in running:
                rows[row].append(token)
                if token in eos_ids or (stop is not None and stop(rows[row])):
                    running.remove(row)
        if not running or position == total - 1:
            break
        hidden = sequence.advance(chosen[:, None])
    return rows


def _agreed(engine: Engine, chosen: Tensor) -> Tensor:
    """`[b]`: the first context-parallel rank's choice.

    All compute the same; should one round otherwise, they would go different ways from here.
    """
    group = engine.cp_group
    if group.size() == 1:
        return chosen
    dist.broadcast(chosen, dist.get_process_group_ranks(group)[0], group=group)
    return chosen


def _pinned_length(total: int, factor_length: int | None) -> int:
    if factor_length is None:
        return total
    if factor_length < total:
        raise LongRopeError(
            f"factor_length {factor_length} is below the {total} tokens that prompt and new tokens "
            "may come to; raise it or lower max_new_tokens"
        )
    return factor_length
