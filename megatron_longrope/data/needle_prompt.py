"""Needles, questions and answers as tokens put together, so that scoring equals generation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_longrope.data.tokenizer import Tokenizer, bos_prefix
from megatron_longrope.errors import LongRopeError

# How far, in tokens, a needle may move to the end of a line or sentence.
_SEARCHED = 64


@dataclass(frozen=True)
class NeedlePrompt:
    """A document with needles in it, and the question about them, as tokens."""

    ids: list[int]
    """BOS if any, instruction, document with needles, question and answer."""
    text: slice
    """Of `ids`: the document with the needles."""
    needles: tuple[slice, ...]
    """Of `ids`: each needle."""
    depths: tuple[float, ...]
    """Where each needle stands: the share of the document's tokens that come before it."""
    num_answer_tokens: int
    """Tokens at the end that are the answer: numbers, and the spaces and commas before them."""
    spans: tuple[slice, ...]
    """For each number asked for, its tokens among the answer's."""


def make_needle_prompt(
    document: np.ndarray,
    what: str,
    tokenizer: Tokenizer,
    length: int,
    *,
    bos_id: int | None,
    instruction: str,
    needles: Sequence[str],
    depths: Sequence[float],
    question: str,
    values: Sequence[int],
) -> NeedlePrompt:
    """Put needles into as much of a document as fits, and ask for numbers that they hold.

    A needle stands where a line (failing that, a sentence) of the document ends within 64 tokens
    of its depth, else at the depth itself; no two stand at the same end.

    Args:
        document (np.ndarray): Token ids, int64 [n], without special tokens; the first are used.
        what (str): What the document is called where it is refused.
        tokenizer (Tokenizer): The one that made it.
        length (int): Tokens in all, BOS and answer included.
        bos_id (int, optional): First token; None for none.
        instruction (str): Stands before the document.
        needles (Sequence[str]): Texts to hide.
        depths (Sequence[float]): Of each needle, 0 (before the document's text) to 1 (behind it).
        question (str): The question, up to where the first number follows.
        values (Sequence[int]): What is answered; commas stand between them.

    Raises:
        LongRopeError: The length leaves no room; the document is too short or of another
            tokenizer; or the tokenizer merges question and answer, or loses digits.
    """
    asked, answer, spans = _question_and_answer(tokenizer, question, values)
    before = [*bos_prefix(bos_id), *tokenizer.encode(instruction)]
    own = [encode_within(tokenizer, needle) for needle in needles]
    beside = sum(map(len, [before, *own, asked, answer]))
    text = _cut(document, what, tokenizer, length, beside)
    places: list[int] = []
    for depth in depths:
        places.append(_place(text, depth, tokenizer, places))
    ids, done, found = [*before], 0, [slice(0)] * len(own)
    for j in np.argsort(places).tolist():
        ids += text[done : places[j]]
        found[j], done = slice(len(ids), len(ids) + len(own[j])), places[j]
        ids += own[j]
    ids += text[done:]
    return NeedlePrompt(
        ids=[*ids, *asked, *answer],
        text=slice(len(before), len(ids)),
        needles=tuple(found),
        depths=tuple(place / len(text) for place in places),
        num_answer_tokens=len(answer),
        spans=spans,
    )


def encode_within(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text` as it is spelled behind other text.

    Some tokenizers put a space before whatever they encode (sentencepiece's dummy prefix). It
    belongs to the beginning of a sequence; here it would be a space too many.

    Raises:
        LongRopeError: `text` is merged with whatever is put before it.
    """
    # A letter or a full stop before white space, the end of a line before all else: what most
    # tokenizers keep apart.
    anchors = ("a", ".", "\n") if text[:1].isspace() else ("\n", ".", "a")
    for anchor in anchors:
        before, both = tokenizer.encode(anchor), tokenizer.encode(anchor + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    raise LongRopeError(
        f"the tokenizer {tokenizer.path} merges {text[:40]!r} with whatever stands before it, so "
        "that samples cannot be put together from tokens; use a tokenizer with stable prefixes"
    )


def _question_and_answer(
    tokenizer: Tokenizer, text: str, values: Sequence[int]
) -> tuple[list[int], list[int], tuple[slice, ...]]:
    """Return the tokens of a question, of its answer, and of each number in the answer."""
    question = encode_within(tokenizer, text)
    ids, spans = question, []
    for value in values:
        lead = f"{text}," if spans else text
        text = f"{lead} {value}"
        before, whole = encode_within(tokenizer, lead), encode_within(tokenizer, text)
        if before[: len(ids)] != ids or whole[: len(before)] != before:
            raise LongRopeError(
                f"the tokenizer {tokenizer.path} merges the end of {lead[-40:]!r} with what "
                "follows, so that scoring would not equal generation; use a tokenizer with stable "
                "prefixes"
            )
        first = len(before)
        # The space before a number is no part of it, where it is a token of its own.
        while first < len(whole) and not tokenizer.decode(whole[first : first + 1]).strip():
            first += 1
        read = tokenizer.decode(whole[first:]).strip()
        if read != str(value):
            raise LongRopeError(
                f"the tokenizer {tokenizer.path} reads {read!r} where the answer {value} was "
                "written; use a tokenizer that keeps digits"
            )
        spans.append(slice(first - len(question), len(whole) - len(question)))
        ids = whole
    return question, ids[len(question) :], tuple(spans)


def _cut(
    document: np.ndarray, what: str, tokenizer: Tokenizer, length: int, beside: int
) -> list[int]:
    """As many tokens of a document as fit into a sample of `length` beside those of the prompt."""
    if length <= beside:
        raise LongRopeError(
            f"length {length} is too short for a needle sample, which needs {beside} tokens "
            f"besides the document; give at least {beside + 1}"
        )
    if len(document) < length - beside:
        raise LongRopeError(
            f"{what} has {len(document)} tokens; a needle sample of {length} tokens "
            f"needs {length - beside} of a document: give longer documents or a shorter length"
        )
    text = document[: length - beside].tolist()
    if max(text) >= tokenizer.vocab_size:
        raise LongRopeError(
            f"{what} holds token {max(text)}, the tokenizer has {tokenizer.vocab_size}; "
            "give the tokenizer that the documents were made with"
        )
    return text


def _place(text: list[int], depth: float, tokenizer: Tokenizer, taken: Collection[int]) -> int:
    """Number of tokens before a needle: the nearest end of a line, else of a sentence, else exact.

    Ends in `taken`, where other needles stand, do not count.
    """
    exact = round(depth * len(text))
    low, high = max(exact - _SEARCHED, 0), min(exact + _SEARCHED, len(text))
    nearest_first = sorted(range(low, high + 1), key=lambda place: (abs(place - exact), place))
    for ends in (_ends_line, _ends_sentence):
        for place in nearest_first:
            if place not in taken and ends(text, place, tokenizer):
                return place
    return exact


def _ends_line(text: list[int], place: int, tokenizer: Tokenizer) -> bool:
    # Both ends of the text count, so that depths 0 and 1 are exact.
    if place in (0, len(text)):
        return True
    return tokenizer.decode(text[place - 1 : place]).endswith("\n")


def _ends_sentence(text: list[int], place: int, tokenizer: Tokenizer) -> bool:
    last = tokenizer.decode(text[place - 1 : place])
    if not last.endswith((".", "!", "?")):
        return False
    # Decoded together, as some tokenizers drop a token's leading space when it stands alone.
    return tokenizer.decode(text[place - 1 : place + 1])[len(last) :][:1].isspace()
