"""Documents as tokens with the places between their sentences, for needles to be put in.

Parts of a needle sample are encoded separately, yet as if each stood within a text
(:func:`encode_within`). The tokens of A followed by those of B then decode to A followed by B:
byte-level and sentencepiece tokens each spell a fixed piece of text, whatever comes next. All that
can differ from encoding A and B at once is which tokens spell the seam, and seams are laid where
the tokenizer ends a token anyway, before or behind a line break.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import chain

import numpy as np

from megatron_longrope.data.answers import encode_within
from megatron_longrope.data.sentences import Splitter, iterate_sentence_ends
from megatron_longrope.data.tokenizer import Tokenizer
from megatron_longrope.errors import LongRopeError

# The white space that a needle brings along: behind a sentence on its line, behind one that ends
# its line, and at the beginning of a line. The text around it goes on as it did.
_INLINE, _NEXT_LINE, _LINE_START = " {}", "\n{}", "{}\n"

_SPACE = re.compile(r"\s*")

# Any two sentences do, to see where a tokenizer cuts the white space between them.
_BEFORE, _BEHIND = " It was over.", "Then it began."


@dataclass(frozen=True, eq=False)
class NeedleDocument:
    """One document, encoded once for all samples that are made of it."""

    name: str
    """What errors call it."""
    tokens: np.ndarray
    """`[n]`, int64, without special tokens."""
    places: np.ndarray
    """`[p]`, int64: how many tokens stand before each place, increasing from 0."""
    forms: tuple[str, ...]
    """`p` patterns of a needle, one for each place: `{}` with white space on one side."""

    @classmethod
    def encode(
        cls, text: str, splitter: Splitter, tokenizer: Tokenizer, max_tokens: int, name: str
    ) -> NeedleDocument:
        """Encode the sentences of `text` until there are `max_tokens` tokens, or all of them.

        White space around the text is left out. Its beginning is a place, its end is none.

        Raises:
            LongRopeError: The text is empty, or the tokenizer fails :func:`encode_within`.
        """
        text = text.strip()
        if not text:
            raise LongRopeError(f"document {name} is empty; give one that holds text")
        ids: list[int] = []
        places, forms, seams, done = [0], [_LINE_START], {}, 0
        for end in chain(iterate_sentence_ends(text, splitter), [len(text)]):
            gap = _SPACE.match(text, end).group()
            if gap not in seams:
                seams[gap] = _seam(tokenizer, gap)
            cut, form = seams[gap]
            ids += encode_within(tokenizer, text[done : end + cut])
            done = end + cut
            if len(ids) >= max_tokens or done == len(text):
                break
            places.append(len(ids))
            forms.append(form)
        return cls(name, np.array(ids, np.int64), np.array(places, np.int64), tuple(forms))

    def sha256(self, length: int) -> str:
        """Hash of all that samples of up to `length` tokens can depend on, however much is encoded.

        That includes the places, and with them what the splitter was trained on.
        """
        count = int((self.places < length).sum())
        digest = hashlib.sha256(repr((count, self.forms[:count])).encode())
        digest.update(self.places[:count].tobytes())
        digest.update(self.tokens[:length].tobytes())
        return digest.hexdigest()


def _seam(tokenizer: Tokenizer, gap: str) -> tuple[int, str]:
    """How much of the white space between two sentences goes with the first, and a needle's form.

    None, where the tokenizer agrees; else all up to the last line break, for tokenizers that merge
    a full stop with the line breaks behind it.
    """
    behind_break = gap.rfind("\n") + 1
    if behind_break:
        whole = encode_within(tokenizer, _BEFORE + gap + _BEHIND)
        for cut, form in ((0, _NEXT_LINE), (behind_break, _LINE_START)):
            first = encode_within(tokenizer, _BEFORE + gap[:cut])
            if first + encode_within(tokenizer, gap[cut:] + _BEHIND) == whole:
                return cut, form
        return 0, _NEXT_LINE
    return 0, _INLINE
