"""Sentence ends by nltk's Punkt, trained on the very texts: nothing is downloaded.

Punkt (Kiss and Strunk 2006) learns from unmarked text which periods belong to abbreviations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_longrope.errors import LongRopeError

# Bounds time and memory of the training.
_MAX_CHARACTERS = 1_000_000

# nltk allows one scan of a text 5 s of wall clock, in which a whole book may not be done, nor, on a
# busy machine, 50,000 characters of dots with spaces between them.
_PIECE = 10_000


def train_splitter(texts: Sequence[str]) -> Any:
    """Learn abbreviations, frequent sentence starters and collocations of `texts`.

    Every text has an equal share of a million characters, from its beginning; what a short one
    leaves goes to those behind it. The same texts give the same splitter in every process.

    Args:
        texts (Sequence[str]): At best the ones to be split.

    Returns:
        PunktSentenceTokenizer: The splitter.

    Raises:
        LongRopeError: There is no text.
    """
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer

    trainer = PunktTrainer()
    left, used = _MAX_CHARACTERS, 0
    for index, text in enumerate(texts):
        taken = min(left // (len(texts) - index), len(text))
        left -= taken
        for piece in _pieces(text[:taken]):
            if not piece.isspace():
                trainer.train(piece, finalize=False)
                used += len(piece)
    if not used:
        raise LongRopeError(
            f"{len(texts)} texts hold no word to learn sentence ends from; give documents with text"
        )
    return PunktSentenceTokenizer(trainer.get_params())


def iterate_sentence_ends(text: str, splitter: Any) -> Iterator[int]:
    """Yield offsets, in characters, behind whose character a new sentence may begin.

    The character before each is the last of a sentence, the one behind it is white space, and
    further text follows: neither end of the text is among them.

    Args:
        text (str): Without white space at its ends.
        splitter (PunktSentenceTokenizer): From :func:`train_splitter`.
    """
    start = 0
    for piece in _pieces(text):
        # All at once, as nltk's clock also runs while whoever asked is at work.
        spans = list(splitter.span_tokenize(piece))
        yield from (start + end for _, end in spans[:-1] if piece[end].isspace())
        start += len(piece)


def _pieces(text: str) -> Iterator[str]:
    """Parts of bounded length, cut at white space where there is some."""
    start = 0
    while start < len(text):
        end = min(start + _PIECE, len(text))
        if end < len(text):
            while end > start and not text[end].isspace():
                end -= 1
            end = end if end > start else start + _PIECE
        yield text[start:end]
        start = end
