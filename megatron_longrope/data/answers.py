"""Questions and answers as tokens to be put together, so that scoring equals generation."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_longrope.data.tokenizer import Tokenizer
from megatron_longrope.errors import LongRopeError


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
