"""Passkey retrieval (paper appendix A.1): find a number hidden in filler text.

The prompt is that of the paper's code, with as much filler as makes BOS, prompt and answer exactly
as long as asked for. A trial is scored in one of two ways:

* teacher-forced, one forward: the answer is part of the sequence, and each of its tokens must be
  the model's greedy choice, with no further digit chosen behind them;
* generated: at most :data:`MAX_NEW_TOKENS` greedy tokens, of whose text the first number counts.

The first is passed if and only if greedy decoding would write exactly the answer's tokens, as the
tokenizer spells them, and then no digit. What passes it therefore passes the second, which also
accepts other text before the number and other spellings of it (`007`, or `12` + `34` for `1234`):
generation is never the stricter one. Two things can part them: a tokenizer that joins the answer to
the prompt, which :func:`check_tokenizer` refuses, and arithmetic, where two tokens are as likely.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_longrope.data.tokenizer import Tokenizer, bos_prefix
from megatron_longrope.errors import LongRopeError

MAX_NEW_TOKENS = 10
"""Tokens that the paper's code generates."""

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""What the number is hidden in, many times with a space between; RULER's noise, too."""

_QUESTION = "What is the pass key? The pass key is"
_LARGEST_KEY = 50_000
# Both ends of each number of digits, and some between.
_CHECKED_KEYS = (
    *(1, 2, 9, 10, 47, 99, 100, 528, 999, 1000, 7391, 9999),
    *(10000, 12345, 31806, 48277, 49999, 50000),
)

_PERIOD = len(FILLER) + 1
_KEPT_PERIODS = 2  # of a stretch of filler, when it only stands for a longer one
# Characters that the filler may have more or less than expected, with those by which the key may
# move, likely ones first. Words that end at the same letters before and behind the key come in
# pairs, and an odd count then takes a shift.
_DETOURS = sorted(
    itertools.product(range(-_PERIOD, _PERIOD + 1), range(-2, 3)),
    key=lambda detour: abs(detour[0]) + 3 * abs(detour[1]),
)
_ROUNDS = 6  # encodings of a whole prompt before giving up
_TAIL = 4  # tokens before the answer that must not depend on what is far ahead of them


@dataclass(frozen=True)
class PasskeyTrial:
    """One prompt with its answer."""

    tokens: list[int]
    """BOS (where there is one), prompt and answer: exactly the length asked for, less `spare`."""
    num_answer_tokens: int
    """Tokens at the end that are the answer, those of the space before the number included."""
    key: int
    """The hidden number, 1 to 50,000."""
    depth: float
    """Share of the filler's characters that stand before the key, 0 to 1."""

    @property
    def answer(self) -> list[int]:
        """Return the answer's tokens."""
        return self.tokens[-self.num_answer_tokens :]

    @property
    def prompt_tokens(self) -> list[int]:
        """Return what generation starts from: everything before the answer."""
        return self.tokens[: -self.num_answer_tokens]


def prompt(key: int, num_characters: int, num_before: int) -> str:
    """Return the prompt of the paper's code, up to the question.

    Args:
        key (int): The hidden number.
        num_characters (int): Filler characters in total.
        num_before (int): How many of them stand before the key; the rest, which starts the same
            text anew, stands behind it.
    """
    information = f"The pass key is {key}. Remember it. {key} is the pass key."
    before, after = _filler(num_before), _filler(num_characters - num_before)
    return "\n".join([_TASK, before, information, after, _QUESTION])


def make_trial(
    tokenizer: Tokenizer,
    length: int,
    *,
    depth: float | None,
    seed: int,
    trial: int,
    spare: int = 0,
) -> PasskeyTrial:
    """Make a prompt with its answer of exactly `length` tokens, the same wherever it is made.

    Args:
        tokenizer (Tokenizer): The model's.
        length (int): Tokens of BOS, prompt and answer.
        depth (float, optional): Share of filler before the key, 0 to 1; None draws it uniformly
            from [0, 1), as the paper's code does. An exact length may move the key by a few
            characters.
        seed (int): With length, depth and trial, decides key and random depth.
        trial (int): Number of the trial, from 0.
        spare (int): Tokens of `length` to leave free, for a generation that is to end within it;
            key and random depth stay those of the full length. Defaults to 0.

    Raises:
        LongRopeError: `length` is shorter than the prompt without filler or cannot be hit exactly,
            or the tokenizer fails :func:`check_tokenizer` for this key.
    """
    # One integer for each depth; a list that ends in 0 would seed like one without it.
    place = 1 if depth is None else 2 + round(depth * 2**31)
    rng = np.random.default_rng([seed, length, trial, place])
    key = int(rng.integers(1, _LARGEST_KEY + 1))
    share = float(rng.random()) if depth is None else depth
    special = bos_prefix(tokenizer.bos_id)
    prompts = _Prompts(tokenizer, key)
    reserved = len(special) + spare
    if length < prompts.minimum + reserved:
        raise LongRopeError(
            f"length {length} is too short for the passkey prompt; with this tokenizer give at "
            f"least {prompts.minimum + reserved} tokens"
        )
    before, after, ids = prompts.fit(length - reserved, share)
    shortened = prompt(key, _shortened(before) + _shortened(after), _shortened(before))
    tail = _answer_with_tail(tokenizer, shortened, key)
    if ids[-len(tail) :] != tail:
        raise LongRopeError(
            f"the tokenizer reads the end of a prompt of {length} tokens otherwise than that of a "
            "short one; use a tokenizer whose tokens depend on the text around them alone"
        )
    total = before + after
    return PasskeyTrial(
        tokens=special + ids,
        num_answer_tokens=len(tail) - _TAIL,
        key=key,
        depth=before / total if total else 0.0,
    )


def check_tokenizer(tokenizer: Tokenizer) -> str:
    """Make sure that teacher forcing would equal generation, before any model is loaded.

    Returns:
        str: How the tokenizer writes prompts and answers, in one line for whoever reads results.

    Raises:
        LongRopeError: For an answer of 1 to 5 digits, the tokens of prompt and answer do not start
            with those of the prompt, the answer's tokens do not decode to the number, or they leave
            no room for another within what is generated.
    """
    sizes, separate = [], []
    for key in _CHECKED_KEYS:
        answer = _answer_with_tail(tokenizer, prompt(key, 2 * _PERIOD, _PERIOD), key)[_TAIL:]
        sizes.append(len(answer))
        separate.append(not tokenizer.decode(answer[:1]).strip())
    spaces = {(True,): "always", (False,): "never"}.get(tuple(set(separate)), "sometimes")
    characters = _PERIOD / _Prompts(tokenizer, _LARGEST_KEY).tokens_per_period
    return (
        f"answers of {min(sizes)} to {max(sizes)} tokens, the space before the number {spaces} a "
        f"token of its own; {characters:.2f} characters of filler a token; prompt and answer split "
        "between tokens, so that teacher forcing equals generation"
    )


def is_retrieved(predicted: Sequence[int], trial: PasskeyTrial, tokenizer: Tokenizer) -> bool:
    """Return whether the greedy choice is right at every answer token and adds no digit.

    Args:
        predicted (Sequence[int]): `num_answer_tokens + 1` ids: the greedy choice at each answer
            token, given those before it, and the greedy successor of the last one.
        trial (PasskeyTrial): What was asked.
        tokenizer (Tokenizer): The one that made the trial.
    """
    *answer, following = map(int, predicted)
    assert len(answer) == trial.num_answer_tokens
    if answer != trial.answer:
        return False
    # Models may have more rows than the tokenizer has tokens; those have no text.
    if following >= tokenizer.vocab_size:
        return True
    return parse_answer(tokenizer.decode([*answer, following])) == trial.key


def parse_answer(text: str) -> int | None:
    """Return the first number in a text, None without one; the paper's code reads it so."""
    found = re.search(r"\d+", text)
    return int(found.group()) if found else None


class _Prompts:
    """Prompts for one key, with their number of tokens by characters of filler.

    Filler repeats itself, and so do its tokens: a prompt of millions of characters has as many
    tokens as one without most of its periods, plus a constant for each period left out. The search
    for an exact count runs on such short prompts, and encodes the long one to confirm.
    """

    def __init__(self, tokenizer: Tokenizer, key: int) -> None:
        self._tokenizer = tokenizer
        self._key = key
        self._counts: dict[tuple[int, int], int] = {}
        shorter, longer = (len(self._encode(periods * _PERIOD, 0)) for periods in (2, 6))
        self.tokens_per_period = (longer - shorter) / 4
        if longer <= shorter:
            raise LongRopeError(
                f"the tokenizer reads English of any length as {longer} tokens; use another"
            )
        self.minimum = self._count(0, 0)

    def fit(self, target: int, share: float) -> tuple[int, int, list[int]]:
        """Find how many characters before and behind the key make `target` tokens."""
        aim = target
        for _ in range(_ROUNDS):
            place = self._search(aim, share)
            if place is None:
                break
            ids = self._encode(*place)
            if len(ids) == target:
                return *place, ids
            aim += target - len(ids)  # tokens that the short prompts did not foresee
        raise LongRopeError(
            f"found no passkey prompt of exactly {target} tokens besides BOS at depth {share:.3f}; "
            "this tokenizer skips that number: take another length or depth"
        )

    def _search(self, aim: int, share: float) -> tuple[int, int] | None:
        """Find the nearest split whose expected number of tokens is `aim`."""
        rate = self.tokens_per_period / _PERIOD
        total = 0
        for _ in range(_ROUNDS):
            before = round(share * total)
            step = round((aim - self._count(before, total - before)) / rate)
            if not step:
                break
            total = max(total + step, 0)
        for growth, shift in _DETOURS:
            size = total + growth
            before = round(share * size) + shift
            if 0 <= before <= size and self._count(before, size - before) == aim:
                return before, size - before
        return None

    def _count(self, before: int, after: int) -> int:
        """Count the expected tokens of prompt and answer."""
        kept = _shortened(before), _shortened(after)
        if kept not in self._counts:
            self._counts[kept] = len(self._encode(*kept))
        left_out = (before + after - sum(kept)) // _PERIOD
        return self._counts[kept] + round(left_out * self.tokens_per_period)

    def _encode(self, before: int, after: int) -> list[int]:
        text = prompt(self._key, before + after, before)
        return self._tokenizer.encode(f"{text} {self._key}")


def _answer_with_tail(tokenizer: Tokenizer, text: str, key: int) -> list[int]:
    """Return the prompt's last tokens and all of the answer's, checked."""
    ids, whole = tokenizer.encode(text), tokenizer.encode(f"{text} {key}")
    if whole[: len(ids)] != ids:
        raise LongRopeError(
            f"the tokenizer merges the end of the prompt with the answer {key}, so that teacher "
            "forcing would not equal generation; use a tokenizer with stable prefixes"
        )
    answer = whole[len(ids) :]
    if tokenizer.decode(answer).strip() != str(key):
        raise LongRopeError(
            f"the tokenizer reads {tokenizer.decode(answer)!r} where the answer {key} was written, "
            "so that no output could be right; use a tokenizer that keeps digits"
        )
    if len(answer) >= MAX_NEW_TOKENS:
        raise LongRopeError(
            f"the tokenizer writes the answer {key} in {len(answer)} tokens, of which generation "
            f"allows {MAX_NEW_TOKENS - 1} and one behind them; use a tokenizer with digits"
        )
    return whole[len(ids) - _TAIL :]


def _filler(num_characters: int) -> str:
    return (f"{FILLER} " * (num_characters // _PERIOD + 1))[:num_characters]


def _shortened(num_characters: int) -> int:
    """Count filler that ends alike, after at most :data:`_KEPT_PERIODS` whole periods."""
    periods, rest = divmod(num_characters, _PERIOD)
    return min(periods, _KEPT_PERIODS) * _PERIOD + rest
