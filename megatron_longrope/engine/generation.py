"""Generation with a key/value cache under one factor set per sequence.

A key is rotated once, by the factors of the moment, and then stays in the cache. If a sequence
changed its factor set where it outgrows a window, new queries would meet keys of another rotation
and the model would compute something that no factors describe. The factor set and the attention
factor are therefore pinned before the first token, by the length that the sequence may grow to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

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
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_ids: Collection[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """Continue prompts of equal length, greedily or by sampling.

    Every rank of a copy of the model returns the same tokens; copies may generate different ones.
    The cache takes 2 * attention layers * (n + max_new_tokens) / cp * b * groups / tp * head_dim
    values of the model's dtype. Logits exist for the last position alone.

    Args:
        engine (Engine): The model; its factors are those of its config at the moment of the call.
        tokens (Tensor): `[b, n]`, int64, prompts without padding, n >= 2.
        max_new_tokens (int): Most tokens that a row may get.
        factor_length (int, optional): Choose the factor set and the attention factor of a sequence
            of that many tokens. Defaults to n + max_new_tokens, the least that is allowed.
        temperature (float): Divisor of the logits; 0 takes the most likely token, of equally likely
            ones the lowest. Defaults to 0.
        top_k (int, optional): Sample among the k most likely tokens.
        top_p (float, optional): Sample among the fewest most likely tokens that together have at
            least this probability (nucleus), after top_k. Neither ever excludes the most likely
            token, so that at temperature 0 they change nothing.
        seed (int): Row i draws with seed + i, hence as a batch of its own would. Defaults to 0.
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
    choose = _chooser(engine, batch, temperature, top_k, top_p, seed)
    sequence = PinnedSequence(engine.model, total, _pinned_length(total, factor_length))
    chunk_length = prefill_chunk or max(1, PREFILL_TOKENS // batch)
    for chunk in tokens.to(engine.device).split(chunk_length, dim=1):
        hidden = sequence.advance(chunk)
    rows: list[list[int]] = [[] for _ in range(batch)]
    running = list(range(batch))
    for position in range(length, total):
        # Ended rows go along, unrecorded, until the last one ends.
        chosen = _agreed(engine, choose(hidden))
        for row, token in enumerate(chosen.tolist()):
            if row in running:
                rows[row].append(token)
                if token in eos_ids or (stop is not None and stop(rows[row])):
                    running.remove(row)
        if not running or position == total - 1:
            break
        hidden = sequence.advance(chosen[:, None].to(engine.device))
    return rows


# The next token


@dataclass(frozen=True)
class _Sampling:
    """How a token is drawn from logits, on the CPU: a seed then means the same on any device."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generators: tuple[torch.Generator, ...]
    """One for each row."""

    def __call__(self, logits: Tensor) -> Tensor:
        """`[b, vocabulary] -> [b]`, int64."""
        rows = zip(logits.cpu(), self.generators, strict=True)
        return torch.stack([self._draw(*row) for row in rows])

    def _draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Invert the cumulative distribution of the tokens in their order of likelihood."""
        # fp64: rounding of the sum over a large vocabulary decides no draw. Stable: of equals the
        # lowest token comes first, as in greedy decoding.
        values, tokens = logits.double().sort(descending=True, stable=True)
        values = values[: self.top_k]
        # The largest becomes 0 first: a tiny temperature must not make infinities of all.
        reached = ((values - values[0]) / self.temperature).softmax(0).cumsum(0)
        if self.top_p is not None:
            reached = reached[: int(torch.searchsorted(reached, self.top_p)) + 1]
        point = torch.rand((), generator=generator, dtype=torch.float64) * reached[-1]
        return tokens[torch.searchsorted(reached, point, right=True)]


def _chooser(
    engine: Engine,
    batch: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Callable[[Tensor], Tensor]:
    """The function from hidden states to next tokens, `[b, h] -> [b]`, alike on all ranks."""
    first_token, real_tokens = vocab_range(engine.model, engine.shape.vocab_size)
    _check_sampling(temperature, top_k, top_p)
    check_int("seed", seed, 0)
    if temperature == 0:
        return lambda hidden: loss.greedy_tokens(engine.model, hidden, real_tokens, first_token)
    generators = tuple(torch.Generator().manual_seed(seed + row) for row in range(batch))
    draw = _Sampling(temperature, top_k, top_p, generators)
    return lambda hidden: draw(_whole_logits(engine, hidden, real_tokens))


def _whole_logits(engine: Engine, hidden: Tensor, real_tokens: int) -> Tensor:
    """`[b, h] -> [b, vocabulary]`, fp32, the same bits on every tensor-parallel rank."""
    logits = loss.map_logits(engine.model, hidden, real_tokens, lambda part: part)
    group = engine.model.pg_collection.tp
    if group.size() > 1:
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(parts, logits.contiguous(), group=group)
        logits = torch.cat(parts, dim=-1)
    return logits[:, : engine.shape.vocab_size]


def _agreed(engine: Engine, chosen: Tensor) -> Tensor:
    """`[b]`: the first context-parallel rank's choice.

    All compute the same; should one round otherwise, they would go different ways from here.
    """
    group = engine.cp_group
    if group.size() == 1:
        return chosen
    chosen = chosen.to(engine.device)
    dist.broadcast(chosen, dist.get_process_group_ranks(group)[0], group=group)
    return chosen


# What is refused


def _pinned_length(total: int, factor_length: int | None) -> int:
    if factor_length is None:
        return total
    if factor_length < total:
        raise LongRopeError(
            f"factor_length {factor_length} is below the {total} tokens that prompt and new tokens "
            "may come to; raise it or lower max_new_tokens"
        )
    return factor_length


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise LongRopeError(
            f"temperature is {temperature}; give a finite number from 0, which is greedy, upwards"
        )
    if top_k is not None:
        check_int("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise LongRopeError(f"top_p is {top_p}; give a probability above 0 and up to 1")
