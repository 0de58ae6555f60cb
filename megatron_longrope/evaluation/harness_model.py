"""lm-evaluation-harness' view of an engine; imports lm_eval, so import it where that is wanted.

Scores must equal those of lm-eval's own `hf` model on the exported checkpoint, hence its rules:
where BOS goes, how context and continuation are split, and that of a request which is too long the
beginning is cut off. Every rank runs the harness on the same requests and takes part in scoring.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_longrope.data.tokenizer import Tokenizer
from megatron_longrope.engine import Engine
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.harness_generation import (
    Decoding,
    Prompt,
    chunks,
    continuations,
    generation_batches,
)
from megatron_longrope.evaluation.harness_tasks import check_original_factors
from megatron_longrope.evaluation.sharing import share
from megatron_longrope.local_folder import LOCAL_ONLY
from megatron_longrope.progress import Progress
from megatron_longrope.ranks import rank

_PADDING = 0  # any token: causal attention keeps what is to the right from being seen


@dataclass(frozen=True)
class Scored:
    """Tokens, the last few of which are scored."""

    tokens: tuple[int, ...]
    """Context and continuation."""

    num_scored: int
    """Tokens of the continuation."""


@dataclass(frozen=True)
class Question:
    """A context with several continuations of one token, such as the letters of MMLU."""

    context: tuple[int, ...]
    """Model input."""

    candidates: tuple[int, ...]
    """Token ids."""

    @property
    def rows(self) -> list[Scored]:
        """The same as single requests."""
        return [Scored((*self.context, token), 1) for token in self.candidates]


class EngineLM(TemplateLM):
    """An :class:`Engine` that lm-evaluation-harness can question.

    Every sequence is scored with the factor set of the original window, whatever its length and
    padding: short benchmarks ask what extending the window did to the model within the old one.
    The names of special tokens in a text are ordinary text, as everywhere in this package.

    Args:
        engine (Engine): Its copies of the model, if there are several, divide the requests.
        tokenizer (Tokenizer): The model's.
        max_length (int, optional): Longest model input in tokens. Defaults to the original window.
        batch_size (int): Rows of a forward pass. Defaults to 8.
        add_bos (bool, optional): Put BOS before every context. Defaults to what the Hugging Face
            tokenizer does by itself; for a sentencepiece model to whether it has a BOS, as in the
            folders that `longrope convert to-hf` writes.
        max_gen_toks (int): New tokens where a task names no limit. Defaults to 256, lm-eval's.
        seed (int): Of tasks that sample. Defaults to 0.

    Raises:
        LongRopeError: The factors of the original window cannot be used, `max_length` is beyond it,
            or the tokenizer has neither BOS nor EOS.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        add_bos: bool | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise LongRopeError(f"batch size {batch_size} must be at least 1")
        if tokenizer.bos_id is None and tokenizer.eos_id is None:
            raise LongRopeError(
                f"the tokenizer {tokenizer.path} has neither BOS nor EOS, so that nothing "
                "can stand before the first token; use the tokenizer of the model"
            )
        self.engine = engine
        self._text = tokenizer  # `tokenizer` is where lm-eval looks for one of transformers
        self._max_length, self.batch_size = max_length, batch_size
        self._add_bos = adds_bos(tokenizer) if add_bos is None else add_bos
        if self._add_bos and tokenizer.bos_id is None:
            raise LongRopeError(
                f"the tokenizer {tokenizer.path} has no BOS to add; leave add_bos off"
            )
        self.max_gen_toks, self._seed = max_gen_toks, seed
        self.num_truncated = 0
        """Requests so far that lost their beginning."""
        self._check_factors()

    @property
    def max_length(self) -> int:
        """Longest model input, in tokens."""
        return self._max_length or self.engine.config.original_max_position_embeddings

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text without context."""
        return self._text.eos_id if self._text.bos_id is None else self._text.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, after BOS if the model is used with one.

        Args:
            add_special_tokens (bool, optional): Insist on BOS or on none.
        """
        bos = self._add_bos if add_special_tokens is None else add_special_tokens
        start = [self._text.bos_id] if bos and self._text.bos_id is not None else []
        return start + self._text.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, in nats, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)  # progress is shown per forward

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in nats, in windows side by side."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((("", text), *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop sequence, EOS or a number of tokens."""
        before = self.num_truncated
        prompts = [self._prompt(index, *request.args) for index, request in enumerate(requests)]
        self._report_truncated(before, len(requests))
        batches = generation_batches(prompts, self.batch_size)
        texts = [""] * len(prompts)

        def score(batch: Sequence[Prompt]) -> list[str]:
            return continuations(self.engine, self._text, batch, self._seed)

        with self._original_factors(), Progress(len(prompts), "generation", "requests") as progress:
            for batch, found in share(batches, score):
                for prompt, text in zip(batch, found, strict=True):
                    texts[prompt.index] = text
                progress.update(count=len(batch))
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        before = self.num_truncated
        rows = [self._scored(context, continuation) for _, context, continuation in requests]
        self._report_truncated(before, len(rows))
        questions, others = _questions(rows)
        found: dict[Scored, tuple[float, bool]] = {}
        total = len(questions) + len(others)
        with self._original_factors(), Progress(total, "likelihoods", "passes") as progress:
            for batch, answers in share(chunks(questions, self.batch_size), self._choose):
                for question, results in zip(batch, answers, strict=True):
                    found.update(zip(question.rows, results, strict=True))
                progress.update(count=len(batch))
            for batch, results in share(chunks(others, self.batch_size), self._score):
                found.update(zip(batch, results, strict=True))
                progress.update(count=len(batch))
        return [found[row] for row in rows]

    def _scored(self, context: list[int], continuation: list[int]) -> Scored:
        if not 1 <= len(continuation) <= self.max_length:
            raise LongRopeError(
                f"a continuation has {len(continuation)} tokens; it must have from 1 to the "
                f"{self.max_length} that fit into the window: choose another task or a longer "
                "maximum length"
            )
        tokens = context + continuation
        # The last token is only predicted, it is no model input.
        self.num_truncated += len(tokens) > self.max_length + 1
        return Scored(tuple(tokens[-(self.max_length + 1) :]), len(continuation))

    def _choose(self, questions: Sequence[Question]) -> list[list[tuple[float, bool]]]:
        """Score the candidates of a batch of questions in one forward pass."""
        tokens = _padded([question.context for question in questions])
        positions = torch.tensor([len(question.context) - 1 for question in questions])
        most = max(len(question.candidates) for question in questions)
        candidates = torch.full((len(questions), most), _PADDING, dtype=torch.int64)
        for row, question in zip(candidates, questions, strict=True):
            row[: len(question.candidates)] = torch.tensor(question.candidates)
        nll, greedy = self.engine.choices(tokens, positions, candidates)
        return [
            [(-float(loss), token == choice) for loss, token in zip(losses, ids, strict=False)]
            for losses, ids, choice in zip(
                nll, (question.candidates for question in questions), greedy.tolist(), strict=True
            )
        ]

    def _score(self, rows: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Score a batch in one forward pass."""
        tokens = _padded([row.tokens for row in rows])
        start = min(len(row.tokens) - row.num_scored for row in rows) - 1
        nll, greedy = self.engine.score(tokens, start)  # each [b, width - 1 - start]
        results = []
        for row, losses, choices in zip(rows, nll, greedy, strict=True):
            end = len(row.tokens) - 1 - start
            span = slice(end - row.num_scored, end)
            is_greedy = choices[span].tolist() == list(row.tokens[-row.num_scored :])
            results.append((-float(losses[span].double().sum()), is_greedy))
        return results

    def _prompt(self, index: int, context: str, arguments: Mapping[str, Any]) -> Prompt:
        decoding = Decoding.from_arguments(arguments, self.max_gen_toks)
        room = self.max_length - decoding.max_new_tokens
        if room < 1 or decoding.max_new_tokens < 1:
            raise LongRopeError(
                f"{decoding.max_new_tokens} new tokens must be at least 1 and leave room for a "
                f"prompt in the window of {self.max_length}; set the task's max_gen_toks"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self.num_truncated += len(tokens) > room
        return Prompt(index, tuple(tokens[-room:]), decoding)

    def _report_truncated(self, before: int, total: int) -> None:
        lost = self.num_truncated - before
        if lost and rank() == 0:
            warnings.warn(
                f"{lost} of {total} requests are longer than the window of {self.max_length} tokens"
                " and lost their beginning, as lm-eval prescribes; use fewer few-shot examples",
                stacklevel=3,
            )

    def _check_factors(self) -> None:
        """Refuse factors that do not belong to the original window."""
        if self.engine.model.rotary_pos_emb.mode == "long":
            raise LongRopeError(
                "the engine uses the largest factor set for every length (mode long), but short "
                "benchmarks are for the factors of the original window; load it with mode auto"
            )
        check_original_factors(self.engine.config, self._max_length)

    @contextmanager
    def _original_factors(self) -> Iterator[None]:
        """Pin the original window's factor set.

        The token that is only predicted, and padding, may make a row longer than the window, which
        must not change what its real tokens see.
        """
        self._check_factors()
        rotary = self.engine.model.rotary_pos_emb
        selection = rotary.selection
        rotary.selection = replace(selection, mode="short")
        try:
            yield
        finally:
            rotary.selection = selection


def _questions(rows: Sequence[Scored]) -> tuple[list[Question], list[Scored]]:
    """Different requests, those that differ in their last token alone put together.

    Longest first, as neighbours share a batch: what does not fit in memory fails at once.
    """
    candidates: dict[tuple[int, ...], set[int]] = {}
    for row in rows:
        if row.num_scored == 1 and len(row.tokens) > 2:
            candidates.setdefault(row.tokens[:-1], set()).add(row.tokens[-1])
    questions = [Question(c, tuple(sorted(ids))) for c, ids in candidates.items() if len(ids) > 1]
    together = {row for question in questions for row in question.rows}
    others = set(rows) - together
    return (
        sorted(questions, key=lambda question: (-len(question.context), question.context)),
        sorted(others, key=lambda row: (-len(row.tokens), row.tokens, row.num_scored)),
    )


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[b, longest]`, padded behind."""
    tokens = torch.full((len(rows), max(map(len, rows))), _PADDING, dtype=torch.int64)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = torch.tensor(row)
    return tokens


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether transformers would put BOS before a text, which is what lm-eval's hf model does."""
    if not Path(tokenizer.path).is_dir():
        return tokenizer.bos_id is not None
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.path, **LOCAL_ONLY)
    return theirs.encode("a")[:1] == [tokenizer.bos_id]
