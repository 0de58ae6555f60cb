"""Samples of RULER's tasks, as long as a length allows, each from a seed of its own.

RULER draws all samples of a task in a row from one generator; here each has its own, so that any
process can make any sample. What is drawn is the same, the draws are others. Besides, questions'
documents are shuffled anew for every sample, where RULER shuffles each number of them one way.
"""

from __future__ import annotations

import math
import random
import string
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatron_longrope.data.tokenizer import Tokenizer, bos_prefix
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.passkey_prompt import FILLER
from megatron_longrope.evaluation.ruler.sources import Questions, Sources, Words
from megatron_longrope.evaluation.ruler.tasks import Task

_NEEDLE = "One of the special magic {what}s for {key} is: {value}."
_DEPTHS = [round(100 * index / 39) for index in range(40)]
"""Percentages of the sentences, behind which needles are put."""

_HOPS = 4  # assignments after the first
_SHORT = 4096  # tokens, below which words repeat less often
_EXAMPLE_TOKENS = 500  # at most, of the solved example in `vt`


@dataclass(frozen=True)
class Sample:
    """A prompt and what its answer must hold."""

    input: str
    """Task and text."""
    answer_prefix: str
    """How the answer begins, which the model continues."""
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return self.input + self.answer_prefix


@dataclass(frozen=True)
class _Draft:
    """What a sample is made of, at some size of its haystack."""

    task: Task
    length: int
    index: int
    size: int
    rng: random.Random
    sources: Sources
    example_size: int = 0
    """Noise of the solved example in `vt`."""

    def sample(self, answers: Iterable[str], before: str = "", **words: object) -> Sample:
        """Put words into the published wording."""
        prompt, prefix = self.task.wording
        return Sample(before + prompt.format(**words), prefix.format(**words), tuple(answers))


@dataclass
class Sampler:
    """Makes samples of any task, length (by the model's tokenizer) and number."""

    tokenizer: Tokenizer
    sources: Sources
    seed: int
    _sizes: dict[tuple[str, int], int] = field(default_factory=dict)

    def make(self, task: Task, length: int, index: int) -> tuple[Sample, list[int]]:
        """Return a sample, and its tokens with BOS before them: with the answer within `length`.

        Args:
            task (Task): Which task.
            length (int): Tokens of prompt and answer.
            index (int): Number of the sample, from 0; of a question's, which question.

        Raises:
            LongRopeError: The shortest sample is longer, or words or questions are too few.
        """
        least, room = self._least(task, index), length - task.num_new_tokens
        size = max(least, self._size(task, length))
        while True:
            sample, tokens = self._draw(task, length, index, size)
            if len(tokens) <= room:
                return sample, tokens
            if size == least:
                raise _too_long(task, length, len(tokens))
            excess = size * (len(tokens) - room) / len(tokens)
            size = max(least, size - max(1, math.ceil(excess)))

    def check(self, task: Task, length: int, samples: int) -> None:
        """Refuse a length that is too short for one of the first samples.

        Raises:
            LongRopeError: It is, or questions are too few.
        """
        for index in range(samples):
            _, tokens = self._draw(task, length, index, self._least(task, index))
            if len(tokens) > length - task.num_new_tokens:
                raise _too_long(task, length, len(tokens))
            # A question brings documents of its own; all else is about as long in every sample.
            if not task.data and 2 * len(tokens) < length:
                return

    def _size(self, task: Task, length: int) -> int:
        """Return the size of the haystack at which sample 0 fills a length."""
        if (task.name, length) not in self._sizes:
            room, words = length - task.num_new_tokens, self.sources.words
            most = len(words.all) if task.family == "cwe" else None
            size, used = largest_fit(
                lambda size: len(self._draw(task, length, 0, size)[1]),
                room,
                self._least(task, 0),
                most,
            )
            if used > room:
                raise _too_long(task, length, used)
            if size == most and used < 0.9 * room:
                raise LongRopeError(
                    f"{task.name} at {length} tokens needs more than {most:,} words; give a longer "
                    "list with --words, a word on each line, or leave out the task with --tasks"
                )
            self._sizes[task.name, length] = size
        return self._sizes[task.name, length]

    def _draw(self, task: Task, length: int, index: int, size: int) -> tuple[Sample, list[int]]:
        # A string seeds by its content, in every process alike.
        rng = random.Random(f"{self.seed} {task.name} {length} {index}")
        example = self._example_size(task) if task.family == "vt" else 0
        draft = _Draft(task, length, index, size, rng, self.sources, example)
        sample = _MAKERS[task.family](draft)
        front = bos_prefix(self.tokenizer.bos_id)
        return sample, [*front, *self.tokenizer.encode(sample.prompt)]

    def _example_size(self, task: Task) -> int:
        """Return the noise of the solved example in `vt`, at most 500 tokens as published."""
        if ("example", 0) not in self._sizes:
            self._sizes["example", 0], _ = largest_fit(
                lambda size: len(
                    self.tokenizer.encode(
                        _assignments(
                            _Draft(task, 0, 0, size, random.Random(self.seed), self.sources),
                            size,
                            letters=3,
                        ).prompt
                    )
                ),
                _EXAMPLE_TOKENS,
                _HOPS + 1,
            )
        return self._sizes["example", 0]

    def _least(self, task: Task, index: int) -> int:
        """Return the smallest haystack that holds what is to be found."""
        if task.family == "niah":
            return task.num_keys * task.num_values
        if task.family == "qa":
            return len(_question(getattr(self.sources, task.data), task, index).documents)
        return {"vt": _HOPS + 1, "cwe": 20, "fwe": 100}[task.family]


def largest_fit(
    tokens_of: Callable[[int], int], room: int, least: int, most: int | None = None
) -> tuple[int, int]:
    """Find a size that fills a room to half a percent, or the largest that fits; and its tokens.

    Secant steps, halving after one too far: encoding a million tokens takes seconds.

    Args:
        tokens_of (Callable): Tokens of a size; about linear.
        room (int): Most tokens.
        least (int): Smallest size, which is returned even where it does not fit.
        most (int, optional): Largest size.
    """
    size, used = least, tokens_of(least)
    above = most + 1 if most else None
    slope, too_far = used / size, False
    while used < room - room // 200 and (above is None or above - size > 1):
        guess = size + max(1, int((room - used) / slope))
        if above is None:
            guess = max(guess, 2 * size)  # the first slope counts the wording, too
        else:
            guess = (size + above) // 2 if too_far else min(guess, above - 1)
        tokens = tokens_of(guess)
        too_far = tokens > room
        slope = max((tokens - used) / (guess - size), slope / 10)
        if too_far:
            above = guess
        else:
            size, used = guess, tokens
    return size, used


def _needles(draft: _Draft) -> Sample:
    task, rng, words = draft.task, draft.rng, draft.sources.words
    keys = _different(task.num_keys, lambda: _key(task, rng, words))
    values = _different(task.num_keys * task.num_values, lambda: _value(task, rng))
    per_key = [
        values[place * task.num_values : (place + 1) * task.num_values]
        for place in range(task.num_keys)
    ]
    needles = [
        _NEEDLE.format(what=task.values, key=key, value=value)
        for key, some in zip(keys, per_key, strict=True)
        for value in some
    ]
    rng.shuffle(needles)
    if task.haystack == "essay":
        text = " ".join(_between_sentences(draft.sources.essays.first(draft.size), needles, rng))
    else:
        lines = (
            [FILLER] * draft.size
            if task.haystack == "noise"
            else [_other_needle(task, rng, words, keys) for _ in range(draft.size)]
        )
        places = sorted(rng.sample(range(draft.size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        text = "\n".join(lines)
    asked = rng.sample(range(task.num_keys), task.num_queries)
    *others, last = (keys[place] for place in asked)
    query = f"{', '.join(others)}, and {last}" if others else last
    return draft.sample(
        [value for place in asked for value in per_key[place]],
        what=task.values,
        context=text,
        query=query,
    )


def _between_sentences(
    sentences: Sequence[str], needles: Sequence[str], rng: random.Random
) -> list[str]:
    """Put needles at different published depths, in order."""
    depths = sorted(rng.sample(_DEPTHS, len(needles)))
    places = [len(sentences) * depth // 100 for depth in depths]
    found: list[str] = []
    for start, stop, needle in zip([0, *places], places, needles, strict=False):
        found += [*sentences[start:stop], needle]
    return [*found, *sentences[places[-1] :]]


def _other_needle(task: Task, rng: random.Random, words: Words | None, keys: Sequence[str]) -> str:
    key = _key(task, rng, words)
    while key in keys:
        key = _key(task, rng, words)
    return _NEEDLE.format(what=task.values, key=key, value=_value(task, rng))


def _key(task: Task, rng: random.Random, words: Words | None) -> str:
    if task.keys == "uuids":
        return _uuid(rng)
    return f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"


def _value(task: Task, rng: random.Random) -> str:
    return _uuid(rng) if task.values == "uuid" else str(rng.randint(1_000_000, 9_999_999))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _different(count: int, draw: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return [*found]


def _variables(draft: _Draft) -> Sample:
    """A chain of assignments, behind an example of the same with its answer."""
    example = _assignments(draft, draft.example_size, letters=3)
    solved = f"{example.prompt} {' '.join(example.answers)}\n\n"
    sample = _assignments(draft, draft.size, letters=5)
    return Sample(solved + sample.input, sample.answer_prefix, sample.answers)


def _assignments(draft: _Draft, size: int, letters: int) -> Sample:
    rng = draft.rng
    names = _different(_HOPS + 1, lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)))
    value = str(rng.randrange(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {b} = VAR {a} " for a, b in pairwise(names)]
    lines = [FILLER] * size
    places = sorted(rng.sample(range(size), len(chain)))
    for index, (place, assignment) in enumerate(zip(places, chain, strict=True)):
        lines.insert(place + index, assignment)
    return draft.sample(names, context="\n".join(lines), query=value, count=len(names))


def _common_words(draft: _Draft) -> Sample:
    rng, words = draft.rng, draft.sources.words.all
    long = draft.length >= _SHORT
    listed, common = _word_list(rng, words, *((40, 10, 3) if long else (20, 3, 1)))
    example = draft.sample(common, context=listed)
    answer = " ".join(f"{place}. {word}" for place, word in enumerate(common, 1))
    listed, common = _word_list(rng, words, draft.size, *((30, 3) if long else (6, 1)))
    return draft.sample(common, f"{example.prompt} {answer}\n", context=listed)


def _word_list(
    rng: random.Random, words: Sequence[str], count: int, often: int, seldom: int
) -> tuple[str, list[str]]:
    """Number a shuffled list in which ten words stand more often than the others."""
    drawn = rng.sample(words, count)
    common, others = drawn[:10], drawn[10:]
    listed = common * often + others * seldom
    rng.shuffle(listed)
    return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1)), common


def _frequent_words(draft: _Draft) -> Sample:
    """Coded words whose frequencies fall by Zipf's law, squared; the most frequent is noise."""
    rng = draft.rng
    count = (draft.length - draft.task.num_new_tokens) // 50
    coded = _different(max(4, count), lambda: "".join(rng.choices(string.ascii_lowercase, k=6)))
    coded[0] = "..."
    total = math.pi**2 / 6  # zeta(2)
    text = [
        word for rank, word in enumerate(coded, 1) for _ in range(int(draft.size / rank**2 / total))
    ]
    rng.shuffle(text)
    return draft.sample(coded[1:4], context=" ".join(text))


def _documents(draft: _Draft) -> Sample:
    """The documents of a question among others, those of the same article first.

    Where there are too few, others repeat; without others those of the article, or its own.
    """
    rng, found = draft.rng, getattr(draft.sources, draft.task.data)
    question = _question(found, draft.task, draft.index)
    wanted = draft.size - len(question.documents)
    if wanted <= len(question.related):
        others = rng.sample(question.related, wanted)
    else:
        taken = {*question.documents, *question.related}
        rest = [place for place in range(len(found.documents)) if place not in taken]
        rest = rest or [*(question.related or question.documents)]
        wanted -= len(question.related)
        rounds, more = divmod(wanted, len(rest))
        others = [*question.related, *rest * rounds, *rng.sample(rest, more)]
    places = [*question.documents, *others]
    rng.shuffle(places)
    text = "\n\n".join(
        f"Document {number}:\n{found.documents[place]}" for number, place in enumerate(places, 1)
    )
    return draft.sample(question.answers, context=text, query=question.text)


def _question(questions: Questions, task: Task, index: int):
    if index >= len(questions.items):
        raise LongRopeError(
            f"{task.name} has {len(questions.items)} questions, fewer than sample {index + 1} "
            "needs; lower --samples or give a larger file"
        )
    return questions.items[index]


def _too_long(task: Task, length: int, tokens: int) -> LongRopeError:
    return LongRopeError(
        f"a sample of {task.name} has at least {tokens} tokens and {task.num_new_tokens} for its "
        f"answer, more than {length}; give longer --lengths, or leave out the task with --tasks"
    )


_MAKERS: dict[str, Callable[[_Draft], Sample]] = {
    "niah": _needles,
    "vt": _variables,
    "cwe": _common_words,
    "fwe": _frequent_words,
    "qa": _documents,
}
"""By family."""
