"""Needles, questions and answers as tokens put together, so that scoring equals generation."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from megatron_longrope.data.tokenizer import Tokenizer
from megatron_longrope.errors import LongRopeError

# How far, in tokens, a needle may move to the end of a line or sentence.
_SEARCHED = 64


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


def question_and_answer(
    tokenizer: Tokenizer, text: str, values: Sequence[int]
) -> tuple[list[int], list[int], tuple[slice, ...]]:
    """Return the tokens of a question, of its answer, and of each number in it.

    Args:
        tokenizer (Tokenizer): Of the text before the question.
        text (str): The question, up to where the first number follows.
        values (Sequence[int]): What is answered; commas stand between them.

    Raises:
        LongRopeError: The tokenizer merges the question with the answer, or a number with what
            follows it, so that scoring would not equal generation; or it does not keep the digits.
    """
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


def cut_document(document: np.ndarray, what: str, length: int, beside: int) -> list[int]:
    """As many tokens of a document as fit into a sample of `length` beside those of the prompt.

    Raises:
        LongRopeError: The length leaves no room, or the document does not fill it.
    """
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
    return document[: length - beside].tolist()


def needle_place(
    text: list[int], depth: float, tokenizer: Tokenizer, taken: Collection[int] = ()
) -> int:
    """Number of tokens before a needle: the nearest end of a line, else of a sentence, else exact.

    Args:
        text (list[int]): Tokens of the document.
        depth (float): 0 (before the text) to 1 (behind it).
        tokenizer (Tokenizer): The one that made them.
        taken (Collection[int]): Ends where other needles stand. Defaults to none.
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
