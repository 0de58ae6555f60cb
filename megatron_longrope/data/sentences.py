"""Sentence ends by nltk's Punkt, trained on the very texts: nothing is downloaded.

Punkt (Kiss and Strunk 2006) learns from unmarked text which periods belong to abbreviations. A
blank line ends a sentence too, which gives lists, headings and source code their places.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from megatron_longrope.errors import LongRopeError

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")

# nltk allows one scan of a text 5 s of wall clock, in which a whole book may not be done, nor, on a
# busy machine, 50,000 characters of dots with spaces between them.
_PIECE = 10_000


class Splitter(Protocol):
    """What is needed of a `PunktSentenceTokenizer`."""

    def span_tokenize(self, text: str) -> Iterable[tuple[int, int]]:
        """Start and end of each sentence, in characters."""


def train_splitter(texts: Sequence[str], max_characters: int = 1_000_000) -> Splitter:
    """Learn abbreviations, frequent sentence starters and collocations of `texts`.

    Every text has an equal share of `max_characters`, from its beginning; what a short one leaves
    goes to those behind it. The same texts give the same splitter in every process.

    Args:
        texts (Sequence[str]): At best the ones to be split.
        max_characters (int): Bounds time and memory.

    Raises:
        LongRopeError: There is no text.
    """
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer

    trainer = PunktTrainer()
    left, used = max_characters, 0
    for index, text in enumerate(texts):
        taken = min(left // (len(texts) - index), len(text))
        left -= taken
        for start, stop in _pieces(text, 0, taken):
            if not text[start:stop].isspace():
                trainer.train(text[start:stop], finalize=False)
                used += stop - start
    if not used:
        raise LongRopeError(
            f"{len(texts)} texts hold no word to learn sentence ends from; give documents with text"
        )
    return PunktSentenceTokenizer(trainer.get_params())


def iterate_sentence_ends(text: str, splitter: Splitter) -> Iterator[int]:
    """Yield offsets, in characters, behind whose character a new sentence may begin.

    The character before each is the last of a sentence or of a paragraph, the one behind it is
    white space, and further text follows: neither end of the text is among them.
    """
    last_of_paragraph = None
    for start, stop in _paragraphs(text):
        if last_of_paragraph is not None:
            yield last_of_paragraph
        for first, behind in _pieces(text, start, stop):
            # All at once, as nltk's clock also runs while whoever asked is at work.
            spans = list(splitter.span_tokenize(text[first:behind]))
            for _, end in spans[:-1]:
                if text[first + end].isspace():
                    yield first + end
        last_of_paragraph = stop


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of what stands between blank lines, without the white space around it."""
    start = 0
    while start < len(text):
        found = _BLANK_LINE.search(text, start)
        stop = len(text) if found is None else found.start()
        paragraph = text[start:stop]
        if content := paragraph.strip():
            first = start + len(paragraph) - len(paragraph.lstrip())
            yield first, first + len(content)
        # A line break may end one blank line and begin the next.
        start = len(text) if found is None else found.end() - 1


def _pieces(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """`start` to `stop` in parts of bounded length, cut at white space where there is some."""
    while start < stop:
        end = min(start + _PIECE, stop)
        if end < stop:
            while end > start and not text[end].isspace():
                end -= 1
            end = end if end > start else start + _PIECE
        yield start, end
        start = end
