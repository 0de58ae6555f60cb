"""Needle retrieval in real documents: numbers hidden between sentences, asked for at the end.

Three tasks in the manner of RULER (arXiv 2404.06654), in words of our own: `single` hides one
number; `multi_key` hides several, each of another object, and asks for one; `multi_query` hides
several and asks for some of them in one question. A sample is scored in one teacher-forced forward:
by recall, and by the perplexity of the numbers' tokens alone (LongRoPE2, arXiv 2502.20082).

Samples are put together from tokens (see :mod:`megatron_longrope.evaluation.haystack`), so that
each is exactly as long as asked for with the answer at its end. The document is cut to what fits
by tokens, wherever in a sentence that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_longrope.data.answers import encode_within, question_and_answer
from megatron_longrope.data.sentences import Splitter
from megatron_longrope.data.sources import Document
from megatron_longrope.data.tokenizer import Tokenizer, bos_prefix
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.haystack import NeedleDocument
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


def prepare_documents(
    documents: Sequence[Document],
    splitter: Splitter,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    *,
    tasks: Sequence[str] = TASKS,
    num_needles: int = 4,
    num_queries: int = 2,
    limit: int = 10,
) -> list[NeedleDocument]:
    """Encode the first `limit` documents of at least as many tokens as the largest length.

    All lengths are thus measured in the same documents. Whatever samples may be refused for shows
    here, before a model is loaded: one of each task and length is made of each document, and those
    of which one cannot be made are passed over.

    Args:
        documents (Sequence[Document]): In order of preference.
        splitter (Splitter): At best trained on their texts.
        tokenizer (Tokenizer): The model's.
        lengths (Sequence[int]): Tokens of the samples to be made.
        tasks (Sequence[str]): Some of :data:`TASKS`.
        num_needles (int): See :func:`make_sample`.
        num_queries (int): See :func:`make_sample`.
        limit (int): Most documents to use; each is encoded up to the largest length.

    Raises:
        LongRopeError: No document is long enough, or none of the long ones makes every sample; the
            last refusal is raised.
    """
    if limit < 1:
        raise LongRopeError(f"limit is {limit!r}; at least 1 document is needed")
    need, longest, refusal = max(lengths), 0, None
    usable: list[NeedleDocument] = []
    for document in documents:
        # A token stands for at least a byte: what is far too short need not be encoded.
        if len(document.text.encode()) < need:
            continue
        encoded = NeedleDocument.encode(document.text, splitter, tokenizer, need, document.id)
        longest = max(longest, len(encoded.tokens))
        if len(encoded.tokens) < need:
            continue
        try:
            for task in tasks:
                for length in lengths:
                    make_sample(
                        *(task, encoded, tokenizer, length),
                        **{"bos_id": tokenizer.bos_id, "depth": 0.5, "seed": 0, "trial": 0},
                        **{"num_needles": num_needles, "num_queries": num_queries},
                    )
        except ValueError as error:
            refusal = error  # too few places between sentences, for one; others may do
            continue
        usable.append(encoded)
        if len(usable) == limit:
            break
    if not usable and refusal is not None:
        raise refusal
    if not usable:
        found = f"the longest has {longest}" if longest else "all have fewer bytes"
        raise LongRopeError(
            f"none of {len(documents)} documents has the {need} tokens that the largest length "
            f"needs ({found}); give longer documents or shorter lengths"
        )
    return usable


def make_sample(
    task: str,
    document: NeedleDocument,
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

    Needles stand between two sentences or before the first, no two at one place. The first one
    asked for stands at the place nearest to `depth`, the others at random.

    Args:
        task (str): One of :data:`TASKS`.
        document (NeedleDocument): Of `length` tokens or more, which is always enough.
        tokenizer (Tokenizer): The one that encoded it.
        length (int): Tokens of the sample, BOS and answer included.
        bos_id (int, optional): First token; None for none.
        depth (float): 0 (before the document's text) to 1 (at the last place of what fits).
        seed (int): With task, length, depth and trial, decides objects, numbers and places.
        trial (int): Number of the trial, from 0.
        num_needles (int): Needles of `multi_key` and `multi_query`, at least 2; `single` has one.
        num_queries (int): Numbers that `multi_query` asks for, 2 to `num_needles`.

    Raises:
        LongRopeError: An argument is out of its range; the document has too few tokens or places
            between sentences; the tokenizer merges question and answer or loses digits.
    """
    _check(task, depth, num_needles, num_queries)
    count = 1 if task == "single" else num_needles
    asked = num_queries if task == "multi_query" else 1
    # One integer for each depth; a list that ends in 0 would seed like one without it.
    rng = np.random.default_rng([seed, trial, length, TASKS.index(task), 1 + round(depth * 2**31)])
    keys, values = draw_keys(count, rng)

    front = bos_prefix(bos_id)
    begin = [*front, *tokenizer.encode(INSTRUCTION)]
    asked_for = question_text(keys[:asked])
    question, answer, spans = question_and_answer(tokenizer, asked_for, values[:asked])
    needles = [needle_text(*pair) for pair in zip(keys, values, strict=True)]
    ways = [
        {form: encode_within(tokenizer, form.format(needle)) for form in set(document.forms)}
        for needle in needles
    ]
    # A needle may have a token more at one place than at another. Places are chosen as if all were
    # of the longest kind; what that leaves over goes to the document's end.
    sizes = [sorted(map(len, way.values())) for way in ways]
    space = length - len(begin) - len(question) - len(answer)
    room = space - sum(size[-1] for size in sizes)
    most = space - sum(size[0] for size in sizes)
    chosen = _choose(document, room, most, length, depth, count, rng)
    inserted = [ways[j][document.forms[place]] for j, place in enumerate(chosen)]
    used = space - sum(map(len, inserted))

    text, positions = _insert(document.tokens[:used], document.places[chosen], inserted)
    positions = [len(begin) + position for position in positions]
    parts = [begin, *text, question, answer]
    ids = np.concatenate([np.asarray(part, np.int64) for part in parts])
    assert len(ids) == length, (len(ids), length)
    for needle, at, own in zip(needles, positions, inserted, strict=True):
        around = ids[max(at - _BESIDE, len(front)) : at + len(own) + _BESIDE]
        _check_readable(tokenizer, needle, around.tolist())
    return NeedleSample(
        tokens=torch.from_numpy(ids)[None],
        num_answer_tokens=len(answer),
        spans=spans,
        keys=keys,
        values=values,
        positions=tuple(positions),
        depths=tuple(int(document.places[place]) / used for place in chosen),
    )


def _check_readable(tokenizer: Tokenizer, needle: str, around: list[int]) -> None:
    """Refuse a tokenizer that reads something else where a needle was written."""
    if needle not in (read := tokenizer.decode(around)):
        raise LongRopeError(
            f"the tokenizer {tokenizer.path} reads {read!r} where {needle!r} was written; use one "
            "that keeps text as it is"
        )


def _insert(
    tokens: np.ndarray, places: np.ndarray, needles: Sequence[Sequence[int]]
) -> tuple[list[Sequence[int] | np.ndarray], list[int]]:
    """Put each needle before the token of its place; return the parts, and where needles begin."""
    parts: list[Sequence[int] | np.ndarray] = []
    positions, size, done = [0] * len(needles), 0, 0
    for j in np.argsort(places).tolist():
        here = int(places[j])
        positions[j] = size + here - done
        size = positions[j] + len(needles[j])
        parts += [tokens[done:here], needles[j]]
        done = here
    return [*parts, tokens[done:]], positions


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


def _choose(
    document: NeedleDocument,
    room: int,
    most: int,
    length: int,
    depth: float,
    count: int,
    rng: np.random.Generator,
) -> list[int]:
    """Indices of `count` places within the first `room` tokens, the one nearest to depth first."""
    if room < 1:
        raise LongRopeError(
            f"length {length} is too short for a needle sample, which needs {length - room} tokens "
            f"besides the document; give at least {length - room + 1}"
        )
    if len(document.tokens) < most:
        raise LongRopeError(
            f"document {document.name} has {len(document.tokens)} tokens; a needle sample of "
            f"{length} tokens needs {most} of a document: give longer documents or a shorter length"
        )
    places = document.places[document.places <= room]
    if len(places) < count:
        raise LongRopeError(
            f"document {document.name} has {len(places)} places between sentences in its first "
            f"{room} tokens, too few for {count} needles; give prose, or code with blank lines, a "
            "greater length or fewer needles"
        )
    nearest = int(np.abs(places - depth * room).argmin())
    others = np.delete(np.arange(len(places)), nearest)
    return [nearest, *rng.choice(others, count - 1, replace=False).tolist()]


def _check(task: str, depth: float, needles: int, queries: int) -> None:
    if task not in TASKS:
        raise LongRopeError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    if not 0 <= depth <= 1:
        raise LongRopeError(f"depth is {depth!r}; it must be between 0 and 1")
    if task != "single" and not 2 <= needles <= NUM_KEYS:
        raise LongRopeError(f"num_needles is {needles!r}; {task} takes 2 to {NUM_KEYS}")
    if task == "multi_query" and not 2 <= queries <= needles:
        raise LongRopeError(f"num_queries is {queries!r}; it must be 2 to num_needles ({needles})")
