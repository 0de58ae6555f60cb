"""Needle retrieval in real documents: numbers hidden between lines, asked for at the end.

Three tasks in the manner of RULER (arXiv 2404.06654), in words of our own: `single` hides one
number; `multi_key` hides several, each of another object, and asks for one; `multi_query` hides
several and asks for some of them in one question. A sample is scored in one teacher-forced forward:
by recall, and by the perplexity of the numbers' tokens alone (LongRoPE2, arXiv 2502.20082).

Samples are put together from tokens, so that each is exactly as long as asked for with the answer
at its end. The document is cut to what fits by tokens, wherever in a sentence that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_longrope.data.needle_prompt import make_needle_prompt
from megatron_longrope.data.tokenizer import Tokenizer, bos_prefix
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.needle_text import (
    INSTRUCTION,
    NUM_KEYS,
    TASKS,
    draw_keys,
    needle_text,
    question_text,
)

_BESIDE = 8  # tokens on either side, with which a needle must decode to itself


@dataclass(frozen=True, eq=False)
class NeedleSample:
    """One document with its needles, the question and the answer."""

    tokens: Tensor
    """`[1, length]`, int64: BOS if any, instruction, document with needles, question and answer."""
    num_answer_tokens: int
    """Tokens at the end that are the answer: numbers, and the spaces and commas before them."""
    spans: tuple[slice, ...]
    """For each number asked for, its tokens among the answer's."""
    keys: tuple[str, ...]
    """Objects of all needles; those asked for come first, in the order of the question."""
    values: tuple[int, ...]
    """Their numbers."""
    positions: tuple[int, ...]
    """Index of each needle's first token in `tokens[0]`."""
    depths: tuple[float, ...]
    """Where each needle stands: the share of the document's tokens that come before it."""


def make_sample(
    task: str,
    document: np.ndarray,
    tokenizer: Tokenizer,
    length: int,
    *,
    bos_id: int | None,
    depth: float,
    seed: int,
    trial: int,
    num_needles: int = 4,
    num_queries: int = 2,
) -> NeedleSample:
    """Hide numbers in a document and ask for some; the arguments alone decide everything.

    Needles stand on lines of their own, where :func:`.hide` puts them: the first one asked
    for at `depth`, the others at random.

    Args:
        task (str): One of :data:`TASKS`.
        document (np.ndarray): Token ids, int64 [n], without special tokens; `length` of them are
            always enough.
        tokenizer (Tokenizer): The one that made them.
        length (int): Tokens of the sample, BOS and answer included.
        bos_id (int, optional): First token; None for none.
        depth (float): 0 (before the document's text) to 1 (behind it).
        seed (int): With task, length, depth and trial, decides objects, numbers and places.
        trial (int): Number of the trial, from 0.
        num_needles (int): Needles of `multi_key` and `multi_query`, at least 2; `single` has one.
        num_queries (int): Numbers that `multi_query` asks for, 2 to `num_needles`.

    Raises:
        LongRopeError: An argument is out of its range; the document has too few tokens; the
            tokenizer merges question and answer or loses digits.
    """
    _check(task, num_needles, num_queries)
    count = 1 if task == "single" else num_needles
    asked = num_queries if task == "multi_query" else 1
    # One integer for each depth; a list that ends in 0 would seed like one without it.
    rng = np.random.default_rng([seed, trial, length, TASKS.index(task), 1 + round(depth * 2**31)])
    keys, values = draw_keys(count, rng)
    needles = [needle_text(*pair) for pair in zip(keys, values, strict=True)]
    prompt = make_needle_prompt(
        document,
        "the document",
        tokenizer,
        length,
        bos_id=bos_id,
        instruction=INSTRUCTION,
        needles=needles,
        depths=[depth, *rng.random(count - 1)],
        question=question_text(keys[:asked]),
        values=values[:asked],
    )
    for needle, at in zip(needles, prompt.needles, strict=True):
        first = max(at.start - _BESIDE, len(bos_prefix(bos_id)))
        _check_readable(tokenizer, needle.strip(), prompt.ids[first : at.stop + _BESIDE])
    return NeedleSample(
        tokens=torch.tensor([prompt.ids]),
        num_answer_tokens=prompt.num_answer_tokens,
        spans=prompt.spans,
        keys=keys,
        values=values,
        positions=tuple(at.start for at in prompt.needles),
        depths=prompt.depths,
    )


def _check_readable(tokenizer: Tokenizer, needle: str, around: list[int]) -> None:
    """Refuse a tokenizer that reads something else where a needle was written."""
    if needle not in (read := tokenizer.decode(around)):
        raise LongRopeError(
            f"the tokenizer {tokenizer.path} reads {read!r} where {needle!r} was written; use one "
            "that keeps text as it is"
        )


def score(
    sample: NeedleSample, predicted: Sequence[int], nll: Sequence[float]
) -> tuple[float, float]:
    """Compare what a model answered with what was hidden.

    The forward is teacher-forced: every token is judged with the right ones before it, so in
    `multi_query` the second number is judged with the first one given.

    Args:
        sample (NeedleSample): What was asked.
        predicted (Sequence[int]): Greedy choice at each answer token; the successor of the last
            one may follow and is not looked at.
        nll (Sequence[float]): Nats of each answer token.

    Returns:
        tuple[float, float]: Recall, the share of the numbers asked for whose every token is the
        greedy choice; and mean nats over their tokens, of which needle perplexity is exp.
    """
    count = sample.num_answer_tokens
    assert len(predicted) in (count, count + 1) and len(nll) == count
    answer = sample.tokens[0, -count:].tolist()
    right = [list(predicted[span]) == answer[span] for span in sample.spans]
    losses = np.concatenate([nll[span] for span in sample.spans])
    return sum(right) / len(right), float(losses.mean())


def _check(task: str, needles: int, queries: int) -> None:
    if task != "single" and not 2 <= needles <= NUM_KEYS:
        raise LongRopeError(f"num_needles is {needles!r}; {task} takes 2 to {NUM_KEYS}")
    if task == "multi_query" and not 2 <= queries <= needles:
        raise LongRopeError(f"num_queries is {queries!r}; it must be 2 to num_needles ({needles})")
