"""lm-evaluation-harness' view of an engine; imports lm_eval, so import it where that is wanted.

Every rank runs the harness on the same requests and takes part in scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from megatron_longrope.data.tokenizer import Tokenizer
from megatron_longrope.engine import Engine
from megatron_longrope.evaluation.harness_generation import (
    Prompt,
    continuations,
    generation_batches,
    unpacked,
)
from megatron_longrope.evaluation.harness_requests import (
    Question,
    RequestReader,
    Scored,
    questions_of,
)
from megatron_longrope.evaluation.sharing import share
from megatron_longrope.progress import Progress

_PADDING = 0  # any token: causal attention keeps what is to the right from being seen


class EngineLM(RequestReader):
    """An :class:`Engine` that lm-evaluation-harness can question.

    A sequence gets the factor set that covers the tokens which the model reads, prompt and answer;
    or, with `window`, always the one that covers that window: short benchmarks ask what extending a
    model did to it within its old window.

    Args:
        engine (Engine): Its copies of the model, if there are several, divide the requests.
        tokenizer (Tokenizer): The model's.
        window (int, optional): Length whose factors every sequence gets. Defaults to its own.
        max_length (int, optional): Longest model input in tokens. Defaults to the window, without
            one to what the factors cover.
        batch_size (int): Rows of a forward pass; of rows beyond the original window fewer, so that
            no pass has more tokens than so many of its length. Defaults to 8.
        options: As :class:`RequestReader`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        window: int | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, max_length or window or engine.config.max_length, **options)
        self.engine, self.batch_size = engine, batch_size
        self._window = window

    def likelihoods(self, rows: Sequence[Scored]) -> list[tuple[float, bool]]:
        """See :meth:`RequestReader.likelihoods`."""
        questions, others = questions_of(rows)
        found: dict[Scored, tuple[float, bool]] = {}
        with Progress(len(questions) + len(others), "likelihoods", "passes") as progress:
            for batch, answers in share(self._batches(questions), self._choose):
                for question, results in zip(batch, answers, strict=True):
                    found.update(zip(question.rows, results, strict=True))
                progress.update(count=len(batch))
            for batch, results in share(self._batches(others), self._score):
                found.update(zip(batch, results, strict=True))
                progress.update(count=len(batch))
        return [found[row] for row in rows]

    def continuations(self, prompts: Sequence[Prompt]) -> list[str]:
        """See :meth:`RequestReader.continuations`."""
        texts = [""] * len(prompts)

        def write(batch: Sequence[Prompt]) -> list[str]:
            # Not the reach of its factor set: a table of angles has as many rows.
            length = self._window or batch[0].total
            return continuations(self.engine, self._text, batch, length)

        batches = generation_batches(prompts, self._rows_at_once)
        with Progress(len(prompts), "generation", "requests") as progress:
            for batch, found in share(batches, write):
                for prompt, text in zip(batch, found, strict=True):
                    texts[prompt.index] = text
                progress.update(count=len(batch))
        return texts

    def _factor_length(self, length: int) -> int:
        """The length whose factors a sequence of `length` tokens gets."""
        return self._window or self.engine.config.factor_set_for(length).max_length

    def _rows_at_once(self, length: int) -> int:
        """Rows of `length` tokens in a forward pass."""
        tokens = self.batch_size * self.engine.config.original_max_position_embeddings
        return max(1, min(self.batch_size, tokens // length))

    def _batches[Item: (Question, Scored)](self, items: Sequence[Item]) -> list[list[Item]]:
        """Neighbours under the same factors; the first of a batch is its longest."""
        batches: list[list[Item]] = []
        for _, group in groupby(items, lambda item: self._factor_length(item.num_inputs)):
            room = 0
            for item in group:
                if room == 0:
                    batches.append([])
                    room = self._rows_at_once(item.num_inputs)
                batches[-1].append(item)
                room -= 1
        return batches

    def _choose(self, questions: Sequence[Question]) -> list[list[tuple[float, bool]]]:
        """Score the candidates of a batch of questions in one forward pass."""
        tokens = _padded([question.context for question in questions])
        positions = torch.tensor([question.num_inputs - 1 for question in questions])
        most = max(len(question.candidates) for question in questions)
        candidates = torch.full((len(questions), most), _PADDING, dtype=torch.int64)
        for row, question in zip(candidates, questions, strict=True):
            row[: len(question.candidates)] = torch.tensor(question.candidates)
        with self.engine.pinned(self._factor_length(questions[0].num_inputs)):
            nll, greedy = self.engine.choices(tokens, positions, candidates)
        return [
            [(-float(loss), token == choice) for loss, token in zip(losses, ids, strict=False)]
            for losses, ids, choice in zip(
                nll, (question.candidates for question in questions), greedy.tolist(), strict=True
            )
        ]

    def _score(self, rows: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Score a batch in one forward pass."""
        tokens = _padded([row.data for row in rows])
        start = min(row.num_inputs - row.num_scored for row in rows)
        # The token that is only predicted, and padding, may make a row longer than the window,
        # which must not change what its real tokens see: the factors are pinned.
        with self.engine.pinned(self._factor_length(rows[0].num_inputs)):
            nll, greedy = self.engine.score(tokens, start)  # each [b, width - 1 - start]
        results = []
        for row, own, losses, choices in zip(rows, tokens, nll, greedy, strict=True):
            end = row.num_inputs - start
            span = slice(end - row.num_scored, end)
            labels = own[row.num_inputs + 1 - row.num_scored : row.num_inputs + 1]
            is_greedy = torch.equal(choices[span], labels)
            results.append((-float(losses[span].double().sum()), is_greedy))
        return results


def _padded(rows: Sequence[bytes]) -> torch.Tensor:
    """`[b, longest]`, padded behind."""
    tokens = [unpacked(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=_PADDING)
