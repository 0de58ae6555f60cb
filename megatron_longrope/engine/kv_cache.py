"""Keys and values of growing sequences, whole or spread over context-parallel ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.transformer.attention import Attention
from torch import Tensor, nn

from megatron_longrope.attention.cached import Part, attend_over_ranks, attend_sharded
from megatron_longrope.context_parallel import shard
from megatron_longrope.engine.model import set_attention_factor

_Attend = Callable[..., Tensor]


class _LayerCache:
    """What a rank keeps of one attention layer, with room for the rest.

    Args:
        room (int): Tokens, at most.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._tensors: list[Tensor] = []  # keys and values, each [room, b, g / tp, d]
        self._count = 0

    def append(self, *new: Tensor) -> None:
        """Keep `[n, b, g / tp, d]` keys and values."""
        if not self._tensors:
            self._tensors = [part.new_empty(self._room, *part.shape[1:]) for part in new]
        for tensor, part in zip(self._tensors, new, strict=True):
            tensor[self._count : self._count + len(part)] = part
        self._count += len(new[0])

    def kept(self) -> list[Tensor]:
        """Keys and values so far."""
        return [tensor[: self._count] for tensor in self._tensors]


class PinnedSequence:
    """Sequences that grow, their keys and values, and the factors that all of them are under.

    Attention's own `forward` is exchanged, and the attention factor is in place, during a forward
    pass only, so that whoever uses the engine between two of them, or after one that failed, finds
    it as usual.

    Under context parallelism a rank keeps the keys of 1 / cp of the tokens. The prompt is read
    zigzag-sharded; the last token of every step, and what does not split evenly, is computed by all
    ranks alike, and its keys go to the rank that has the fewest.

    Args:
        model (nn.Module): The engine's model.
        total (int): Tokens that there is room for.
        factor_length (int): Length whose factors apply, from first to last token.
    """

    def __init__(self, model: nn.Module, total: int, factor_length: int) -> None:
        rotary = model.rotary_pos_emb
        self._model = model
        self._group = model.pg_collection.cp
        self._total = total
        self._attention_factor = rotary.attention_factor(factor_length)
        # As for a pack: the whole table [total, 1, 1, d], also where ranks share a sequence.
        self._angles = rotary(factor_length, packed_seq=True)[:total]
        self._caches: dict[nn.Module, _LayerCache] = {}
        self._seen = 0
        self._kept = [0] * self._group.size()  # tokens on each rank

    def advance(self, tokens: Tensor) -> Tensor:
        """Append tokens: `[b, n] -> [b, h]`, the last one's hidden state after the final norm."""
        assert self._seen + tokens.shape[1] <= self._total
        set_attention_factor(self._model, self._attention_factor)
        rank, size = self._group.rank(), self._group.size()
        if size == 1:
            hidden = self._forward(tokens, self._attend_alone)
        else:
            count = (tokens.shape[1] - 1) // (2 * size) * (2 * size)
            if count:
                self._forward(tokens[:, :count], self._attend_sharded, rank, size)
                self._kept = [kept + count // size for kept in self._kept]
            owner = self._kept.index(min(self._kept))
            hidden = self._forward(tokens[:, count:], partial(self._attend_alike, owner == rank))
            self._kept[owner] += tokens.shape[1] - count
        return hidden[-1].clone()  # a view would keep the hidden states of the whole prompt

    def _forward(self, tokens: Tensor, attend: _Attend, rank: int = 0, size: int = 1) -> Tensor:
        """`[b, n] -> [n / size, b, h]`: the hidden states of this rank's part."""
        end = self._seen + tokens.shape[1]
        angles = shard(self._angles[self._seen : end], rank, size, dim=0)
        with self._attending(attend):
            hidden = self._model.decoder(
                hidden_states=self._model.embedding(
                    input_ids=shard(tokens, rank, size, dim=1), position_ids=None
                ),
                attention_mask=None,
                rotary_pos_emb=angles,
            )
        self._seen = end
        return hidden

    @contextlib.contextmanager
    def _attending(self, attend: _Attend) -> Iterator[None]:
        """Let every attention layer see all keys and values so far."""
        cores = [
            layer.self_attention.core_attention
            for layer in self._model.decoder.layers
            if isinstance(layer.self_attention, Attention)  # else an MLP of HybridModel
        ]
        # On the instance: a hook before `forward` could not keep it from Megatron's own
        # context parallelism, which knows no keys of earlier tokens.
        before = [vars(core).get("forward") for core in cores]
        try:
            for core in cores:
                core.forward = partial(attend, core, core.forward)
            yield
        finally:
            for core, forward in zip(cores, before, strict=True):
                del core.forward
                if forward is not None:
                    core.forward = forward

    def _cache(self, core: nn.Module) -> _LayerCache:
        if core not in self._caches:
            size = self._group.size()
            # The rank with the fewest takes at most 2 cp tokens, which bounds the difference.
            room = self._total if size == 1 else self._total // size + 2 * size
            self._caches[core] = _LayerCache(min(room, self._total))
        return self._caches[core]

    def _attend_alone(
        self, core: nn.Module, forward: _Attend, query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, **options: object,
    ) -> Tensor:  # fmt: skip
        cache = self._cache(core)
        cache.append(key, value)
        # Queries stand at the last keys, which is how causal attention aligns them.
        return forward(query, *cache.kept(), mask, **options)

    def _attend_sharded(
        self, core: nn.Module, _: _Attend, query: Tensor, key: Tensor, value: Tensor,
        *__: object, **___: object,
    ) -> Tensor:  # fmt: skip
        cache = self._cache(core)
        new = (_batch_first(key), _batch_first(value))
        past = tuple(map(_batch_first, cache.kept())) or tuple(part[:, :0] for part in new)
        output = attend_sharded(
            core._tile, _batch_first(query), new, past, core.softmax_scale, self._group
        )
        cache.append(key, value)
        return _joined_heads(output)

    def _attend_alike(
        self, is_owner: bool, core: nn.Module, _: _Attend, query: Tensor, key: Tensor,
        value: Tensor, *__: object, **___: object,
    ) -> Tensor:  # fmt: skip
        cache = self._cache(core)
        query, *new = map(_batch_first, (query, key, value))
        past = list(map(_batch_first, cache.kept())) or [part[:, :0] for part in new]
        parts: list[Part] = [(slice(None), past[0], past[1], False)]
        if is_owner:
            parts.append((slice(None), new[0], new[1], True))
            cache.append(key, value)
        output = attend_over_ranks(core._tile, query, parts, core.softmax_scale, self._group)
        return _joined_heads(output)


def _batch_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)


def _joined_heads(output: Tensor) -> Tensor:
    """`[b, s, h, d] -> [s, b, h * d]`, as core attention returns it."""
    return torch.flatten(output.transpose(0, 1), -2).contiguous()
