"""`Engine`: token losses and predictions of a Megatron checkpoint under swappable factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.context_parallel import (
    check_divisible,
    padding,
    shard,
    unshard,
    zigzag_positions,
)
from megatron_longrope.engine import loss, process_groups
from megatron_longrope.engine.model import (
    set_attention_factor,
    vocab_range,
)
from megatron_longrope.errors import LongRopeError


@dataclass(frozen=True)
class Answer:
    """What the model makes of the last tokens of a sequence."""

    predicted: list[int]
    """The greedy choice in place of each answer token, and behind the last one."""
    nll: list[float]
    """Loss of each answer token, in nats."""


class Engine:
    """A model that stays in memory while factors come and go.

    Args:
        model (nn.Module): From :func:`.model.build_model`, weights in place.
        shape (ModelShape): The model's geometry.
    """

    def __init__(self, model: nn.Module, shape: ModelShape) -> None:
        self.model = model
        self.shape = shape
        self.device = next(model.parameters()).device
        self.cp_group = model.pg_collection.cp
        self._first_token, self._real_tokens = vocab_range(model, shape.vocab_size)

    @property
    def config(self) -> LongRopeConfig:
        """The factors in use."""
        return self.model.rotary_pos_emb.config

    def set_config(self, config: LongRopeConfig) -> None:
        """Swap the factors; costs nothing but the next rotary table.

        Raises:
            LongRopeError: The config is for another rotary geometry.
        """
        self.model.rotary_pos_emb.set_config(config)

    @contextmanager
    def pinned(self, length: int) -> Iterator[None]:
        """Use the factors of a sequence of `length` tokens for every sequence, whatever its own.

        Raises:
            LongRopeError: No factor set covers that length.
        """
        rotary = self.model.rotary_pos_emb
        before = rotary.selection
        rotary.selection = replace(before, pinned_length=length)
        try:
            rotary.factor_set(length)
            yield
        finally:
            rotary.selection = before

    @property
    def replica(self) -> tuple[int, int]:
        """Index of this process' copy of the model, and how many there are."""
        return process_groups.replica()

    @torch.no_grad()
    def nll(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Negative log-likelihood of every token behind `start`, given those before it.

        The factor set and the attention factor are chosen by the full length n, the length that
        transformers would choose them by.

        Args:
            tokens (Tensor): `[b, n]`, int64, the same on every rank of this copy of the model.
            start (int): Leave out the losses of tokens at positions up to it; their logits are not
                computed either, unless context parallelism makes the rest longer than a rank's
                part. Defaults to 0.

        Returns:
            Tensor: `[b, n - 1 - start]`, fp32, in nats, on every rank, on the CPU.

        Raises:
            LongRopeError: Tokens outside the vocabulary, a length that no factor set covers, or
                nothing behind `start`; under context parallelism also a length that ends a factor
                set and does not split over the ranks (others are padded).
        """
        (values,) = self._of_positions(
            tokens,
            start,
            tokens.shape[-1] - 1,
            lambda hidden, labels: (loss.token_nll(self.model, hidden, labels, self._real_tokens),),
        )
        return values

    @torch.no_grad()
    def score(self, tokens: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Losses as :meth:`nll` gives them, and what greedy decoding would have chosen instead.

        Returns:
            tuple[Tensor, Tensor]: Losses `[b, n - 1 - start]` and the most likely token
            `[b, n - 1 - start]` at the same places.
        """
        return tuple(self._nll_and_greedy(tokens, start, tokens.shape[-1] - 1))

    @torch.no_grad()
    def answer(self, tokens: Tensor, num_answer_tokens: int) -> Answer:
        """Score the last tokens of a sequence as an answer to what precedes them.

        One teacher-forced forward pass, whatever the length of the answer.

        Args:
            tokens (Tensor): `[1, n]`, int64: prompt and answer.
            num_answer_tokens (int): How many of them are the answer.

        Raises:
            LongRopeError: More than one sequence, or no prompt; else as :meth:`nll`.
        """
        if tokens.shape[0] != 1 or not 1 <= num_answer_tokens < tokens.shape[1]:
            raise LongRopeError(
                f"an answer of {num_answer_tokens} tokens in tokens of shape {tuple(tokens.shape)}:"
                " give [1, n] with at least one token before the answer"
            )
        length = tokens.shape[1]
        # The last token is followed by nothing: its loss is cut off, what would follow it is kept.
        nll, greedy = self._nll_and_greedy(tokens, length - 1 - num_answer_tokens, length)
        return Answer(greedy[0].tolist(), nll[0, :-1].tolist())

    @torch.no_grad()
    def choices(
        self, tokens: Tensor, positions: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses of several possible successors of one token in each sequence.

        One forward pass for all candidates, and logits of one position of each sequence.

        Args:
            tokens (Tensor): `[b, n]`, int64.
            positions (Tensor): `[b]`, int64: index of the token whose successor is chosen.
            candidates (Tensor): `[b, k]`, int64: token ids.

        Returns:
            tuple[Tensor, Tensor]: Losses `[b, k]`, fp32, in nats, and the most likely of all tokens
            `[b]`, on every rank, on the CPU.

        Raises:
            LongRopeError: Tokens or candidates outside the vocabulary, or positions outside the
                sequence; else as :meth:`nll`.
        """
        self._check_tokens(tokens)
        self._check_ids(candidates)
        first, last = (int(value) for value in torch.aminmax(positions))
        if first < 0 or last >= tokens.shape[1]:
            raise LongRopeError(
                f"position {first if first < 0 else last} is outside the sequences of "
                f"{tokens.shape[1]} tokens; positions count from 0"
            )
        tokens, positions = self._padded(tokens), positions.to(self.device)
        hidden = self._hidden(tokens)  # [n / cp, b, h]
        rank, size = self.cp_group.rank(), self.cp_group.size()
        local = zigzag_positions(tokens.shape[1], rank, size, hidden.device)
        place, row = (local[:, None] == positions).nonzero(as_tuple=True)
        rows = hidden.new_zeros(hidden.shape[1:])
        rows[row] = hidden[place, row]
        if size > 1:
            dist.all_reduce(rows, group=self.cp_group)  # each row comes from one rank
        losses = [
            loss.token_nll(self.model, rows, column, self._real_tokens)
            for column in candidates.to(self.device).t()
        ]
        greedy = loss.greedy_tokens(self.model, rows, self._real_tokens, self._first_token)
        return torch.stack(losses, dim=1).cpu(), greedy.cpu()

    @torch.no_grad()
    def logits(self, tokens: Tensor, count: int | None = None) -> Tensor:
        """Logits `[b, count, vocab_size]` of the last tokens, fp32, for verification; one process.

        Args:
            tokens (Tensor): `[b, n]`, int64.
            count (int, optional): Of how many. Defaults to all.
        """
        self._check_single_process("logits")
        self._check_tokens(tokens)
        hidden = self._hidden(tokens)[-(count or tokens.shape[1]) :].transpose(0, 1)
        flat = loss.map_logits(self.model, hidden.flatten(0, 1), self._real_tokens, lambda x: x)
        return flat[:, : self.shape.vocab_size].view(*hidden.shape[:2], -1)

    def _nll_and_greedy(self, tokens: Tensor, start: int, stop: int) -> list[Tensor]:
        return self._of_positions(
            tokens,
            start,
            stop,
            lambda hidden, labels: loss.token_nll_and_greedy(
                self.model, hidden, labels, self._real_tokens, self._first_token
            ),
        )

    def _of_positions(
        self,
        tokens: Tensor,
        start: int,
        stop: int,
        function: Callable[[Tensor, Tensor], Sequence[Tensor]],
    ) -> list[Tensor]:
        """Results of `function(hidden [r, h], labels [r]) -> [r], ...` from `start` up to `stop`.

        The label of the last position, which has no successor, is the first token.

        Returns:
            list[Tensor]: Each `[b, stop - start]`, on every rank, on the CPU.
        """
        self._check_tokens(tokens)
        batch, length = tokens.shape
        if not 0 <= start < stop:
            raise LongRopeError(
                f"start {start} leaves no token to score; with {length} tokens it must be from 0 to"
                f" {stop - 1}"
            )
        tokens = self._padded(tokens)
        length = tokens.shape[1]
        hidden = self._hidden(tokens)  # [n / cp, b, h]
        labels = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
        rank, size = self.cp_group.rank(), self.cp_group.size()
        apart = stop - start > length // size and size > 1
        if apart:  # the ranks' parts must stay alike: some rows too many are computed and cut off
            labels = shard(labels, rank, size, dim=1)
        else:
            hidden, labels = self._slice(hidden, start, stop, length), labels[:, start:stop]
        results = function(
            hidden.flatten(0, 1),
            labels.to(self.device).t().flatten(),  # [b, n] -> [n b], as the hidden states lie
        )
        results = [values.view(-1, batch).t().contiguous() for values in results]  # [n b] -> [b, n]
        if apart:
            results = [self._whole(values)[:, start:stop] for values in results]
        return [values.cpu() for values in results]

    def _padded(self, tokens: Tensor) -> Tensor:
        """`tokens` with as many behind them as context parallelism needs."""
        selection = self.model.rotary_pos_emb.selection
        missing = padding(selection, tokens.shape[1], self.cp_group.size())
        return F.pad(tokens, (0, missing)) if missing else tokens

    def _slice(self, hidden: Tensor, start: int, stop: int, length: int) -> Tensor:
        """`[n / cp, b, h] -> [stop - start, b, h]`, on every rank."""
        rank, size = self.cp_group.rank(), self.cp_group.size()
        if size == 1:
            return hidden[start:stop]
        rows = hidden.new_zeros(stop - start, *hidden.shape[1:])
        positions = zigzag_positions(length, rank, size, hidden.device)
        ours = (positions >= start) & (positions < stop)
        rows[positions[ours] - start] = hidden[ours]
        dist.all_reduce(rows, group=self.cp_group)  # each row comes from one rank
        return rows

    def _hidden(self, tokens: Tensor) -> Tensor:
        """`[b, n] -> [n / cp, b, h]`, after the final norm."""
        length = tokens.shape[1]
        rotary = self.model.rotary_pos_emb
        set_attention_factor(self.model, rotary.attention_factor(length))
        rank, size = self.cp_group.rank(), self.cp_group.size()
        check_divisible(length, size)
        local = shard(tokens.to(self.device), rank, size, dim=1)
        # RoPE models read no position ids: the rotary module knows this rank's positions.
        return self.model(input_ids=local, position_ids=None, attention_mask=None)

    def _whole(self, values: Tensor) -> Tensor:
        """Undo the zigzag: `[b, n / cp] -> [b, n]` on every rank."""
        if self.cp_group.size() == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.cp_group.size())]
        dist.all_gather(parts, values, group=self.cp_group)
        return unshard(parts, dim=1)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise LongRopeError(
                f"tokens have shape {tuple(tokens.shape)}; expected [b, n] with n >= 2"
            )
        self._check_ids(tokens)

    def _check_ids(self, tokens: Tensor) -> None:
        low, high = (int(value) for value in torch.aminmax(tokens))
        if low < 0 or high >= self.shape.vocab_size:
            raise LongRopeError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.shape.vocab_size}; the data was made with another tokenizer"
            )

    def _check_single_process(self, what: str) -> None:
        sizes = self.cp_group.size(), self.model.pg_collection.tp.size()
        if max(sizes) > 1:
            raise LongRopeError(f"{what} run on one process; got context x tensor parallel {sizes}")
