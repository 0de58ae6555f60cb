"""lm-evaluation-harness' requests as tokens; imports lm_eval, so import it where that is wanted.

Scores must equal those of lm-eval's own `hf` model on the exported checkpoint, hence its rules:
where BOS goes, how context and continuation are split, and that of a request which is too long the
beginning is cut off, where that is wanted at all.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_longrope.data.tokenizer import Tokenizer
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.harness_generation import Decoding, Prompt, packed
from megatron_longrope.local_folder import LOCAL_ONLY
from megatron_longrope.ranks import rank

_MAX_NEW_TOKENS = 256  # where a task names no limit, as in lm-eval


@dataclass(frozen=True)
class Scored:
    """Tokens, the last few of which are scored."""

    data: bytes
    """Context and continuation, packed."""
    num_scored: int
    """Tokens of the continuation."""

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: the last one is only predicted."""
        return len(self.data) // 4 - 1


@dataclass(frozen=True)
class Question:
    """A context with several continuations of one token, such as the letters of MMLU."""

    context: bytes
    """Model input, packed."""
    candidates: tuple[int, ...]
    """Token ids."""

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads."""
        return len(self.context) // 4

    @property
    def rows(self) -> list[Scored]:
        """The same as single requests."""
        return [Scored(self.context + packed([token]), 1) for token in self.candidates]


class RequestReader(TemplateLM):
    """A model as lm-evaluation-harness knows it, but for the answers, which subclasses give.

    The names of special tokens in a text are ordinary text, as everywhere in this package. BOS
    stands before every context where the Hugging Face tokenizer puts it by itself; of a
    sentencepiece model where it has one, as in the folders that `longrope convert to-hf` writes.

    Args:
        tokenizer (Tokenizer): The model's.
        max_length (int): Longest model input in tokens.
        long_prompts (str): `truncate` cuts off the beginning of what is longer than `max_length`
            and counts it, `error` refuses it. Defaults to "truncate", lm-eval's way.

    Raises:
        LongRopeError: The tokenizer has neither BOS nor EOS.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, *, long_prompts: str = "truncate"
    ) -> None:
        super().__init__()
        if tokenizer.bos_id is None and tokenizer.eos_id is None:
            raise LongRopeError(
                f"the tokenizer {tokenizer.path} has neither BOS nor EOS, so that nothing "
                "can stand before the first token; use the tokenizer of the model"
            )
        self._text = tokenizer  # `tokenizer` is where lm-eval looks for one of transformers
        self.max_length, self._long_prompts = max_length, long_prompts
        self._add_bos = _adds_bos(tokenizer)
        self.num_truncated = 0
        """Requests so far that lost their beginning."""

    def likelihoods(self, rows: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Log-likelihood of each row's continuation, in nats, and whether it is the greedy one."""
        raise NotImplementedError

    def continuations(self, prompts: Sequence[Prompt]) -> list[str]:
        """The text after each prompt."""
        raise NotImplementedError

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
        return self.continuations(prompts)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        before = self.num_truncated
        rows = [self._scored(context, continuation) for _, context, continuation in requests]
        self._report_truncated(before, len(rows))
        return self.likelihoods(rows)

    def _scored(self, context: list[int], continuation: list[int]) -> Scored:
        if not 1 <= len(continuation) <= self.max_length:
            raise LongRopeError(
                f"a continuation has {len(continuation)} tokens; it must have from 1 to the "
                f"{self.max_length} that fit into the window: choose another task or a longer "
                "maximum length"
            )
        # The last token is only predicted, it is no model input.
        kept = self._fitting(context + continuation, self.max_length + 1, 0)
        return Scored(packed(kept), len(continuation))

    def _prompt(self, index: int, context: str, arguments: Mapping[str, Any]) -> Prompt:
        decoding = Decoding.from_arguments(arguments, _MAX_NEW_TOKENS)
        new = decoding.max_new_tokens
        room = self.max_length - new
        if room < 1 or new < 1:
            raise LongRopeError(
                f"{new} new tokens must be at least 1 and leave room for a prompt in the window of "
                f"{self.max_length}; set the task's max_gen_toks"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        return Prompt(index, packed(self._fitting(tokens, room, new)), decoding)

    def _fitting(self, tokens: list[int], room: int, new: int) -> list[int]:
        """The last `room` tokens.

        Raises:
            LongRopeError: There are more, and they are not to be cut off.
        """
        if len(tokens) <= room:
            return tokens
        if self._long_prompts == "error":
            raise LongRopeError(
                f"a prompt with its answer has {len(tokens) + new:,} tokens, more than the window "
                f"of {self.max_length:,}; give factors or a window that reach further, or "
                "--long-prompts truncate, which cuts off its beginning and counts it"
            )
        self.num_truncated += 1
        return tokens[-room:]

    def _report_truncated(self, before: int, total: int) -> None:
        lost = self.num_truncated - before
        if lost and rank() == 0:
            warnings.warn(
                f"{lost} of {total} requests are longer than the window of {self.max_length} tokens"
                " and lost their beginning, as lm-eval prescribes; use fewer few-shot examples or a"
                " longer window",
                stacklevel=3,
            )


class RequestCounter(RequestReader):
    """What a task will ask, before there is a model."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, **options: Any) -> None:
        super().__init__(tokenizer, max_length, **options)
        self.lengths: Counter[int] = Counter()
        """How many different requests have how many tokens, answers included."""

        self.num_new_tokens = 0
        """Most tokens that a request may generate."""

        self._digest = hashlib.sha256()

    def _report_truncated(self, before: int, total: int) -> None:
        """Leave it to the model, which reads the same requests."""

    def add_definition(self, definition: bytes) -> None:
        """Hash how answers are scored; see :func:`.harness_definition.definition`."""
        self._digest.update(definition)

    def add_document(self, document: Any) -> None:
        """Hash what requests are made of: the right answer is read from it, not from them."""
        self._digest.update(json.dumps(document, sort_keys=True, default=str).encode())

    @property
    def sha256(self) -> str:
        """Hash of the definition, documents and requests that were added, in their order."""
        return self._digest.hexdigest()

    def likelihoods(self, rows: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Count the forward passes, as :class:`.harness_model.EngineLM` makes them."""
        for row in rows:
            self._digest.update(row.data + packed([row.num_scored]))
        for some in questions_of(rows):
            self.lengths.update(item.num_inputs for item in some)
        return [(0.0, False)] * len(rows)

    def continuations(self, prompts: Sequence[Prompt]) -> list[str]:
        """Count the prompts."""
        for prompt in prompts:
            what = prompt.data + repr((prompt.decoding, self._text.end_ids)).encode()
            self._digest.update(what)
            self.lengths[prompt.total] += 1
            self.num_new_tokens = max(self.num_new_tokens, prompt.decoding.max_new_tokens)
        return [""] * len(prompts)


def questions_of(rows: Sequence[Scored]) -> tuple[list[Question], list[Scored]]:
    """Different requests, those that differ in their last token alone put together.

    Longest first, as neighbours share a batch: what does not fit in memory fails at once.
    """
    candidates: dict[bytes, set[int]] = {}
    for row in rows:
        if row.num_scored == 1 and row.num_inputs > 1:
            last = array("i", row.data[-4:])[0]
            candidates.setdefault(row.data[:-4], set()).add(last)
    questions = [Question(c, tuple(sorted(ids))) for c, ids in candidates.items() if len(ids) > 1]
    together = {row for question in questions for row in question.rows}
    others = set(rows) - together
    return (
        sorted(questions, key=lambda question: (-question.num_inputs, question.context)),
        sorted(others, key=lambda row: (-row.num_inputs, row.data, row.num_scored)),
    )


def _adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether transformers would put BOS before a text, which is what lm-eval's hf model does."""
    if not Path(tokenizer.path).is_dir():
        return tokenizer.bos_id is not None
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.path, **LOCAL_ONLY)
    return theirs.encode("a")[:1] == [tokenizer.bos_id]
