"""What RULER's samples are made of, from local files: essays, questions with documents, words."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.ruler.sentences import iterate_sentence_ends, train_splitter
from megatron_longrope.evaluation.ruler.tasks import Task
from megatron_longrope.evaluation.scored_documents import read_texts
from megatron_longrope.files import read_json

_FLAGS = {"essay": "--essays", "squad": "--squad", "hotpotqa": "--hotpotqa"}


@dataclass(frozen=True)
class Essays:
    """Running text, from which a haystack of any number of words is taken, repeated if need be."""

    sentences: Sequence[str]

    def first(self, num_words: int) -> list[str]:
        """Return the first sentences of that many words; the last one may be cut."""
        whole, rest = divmod(num_words, self._ends[-1])
        place = bisect_left(self._ends, rest)
        found = [*self.sentences] * whole + [*self.sentences[:place]]
        missing = rest - (self._ends[place - 1] if place else 0)
        return [*found, " ".join(self.sentences[place].split(" ")[:missing])] if missing else found

    @cached_property
    def _ends(self) -> list[int]:
        """Words up to the end of each sentence."""
        return [*accumulate(sentence.count(" ") + 1 for sentence in self.sentences)]


@dataclass(frozen=True)
class Question:
    """A question whose answer is in some of the documents."""

    text: str

    answers: tuple[str, ...]
    """Spellings, one of which suffices."""
    documents: tuple[int, ...]
    """Those that it was asked about."""
    related: tuple[int, ...] = ()
    """Those of the same article, which come before others."""


@dataclass(frozen=True)
class Questions:
    """Questions, and the documents of all of them."""

    documents: Sequence[str]
    items: Sequence[Question]


@dataclass(frozen=True)
class Words:
    """English words."""

    adjectives: Sequence[str]
    nouns: Sequence[str]

    all: Sequence[str]
    """Different words, sorted."""


@dataclass(frozen=True)
class Sources:
    """What the chosen tasks need; None for what they do not."""

    essays: Essays | None = None
    words: Words | None = None
    squad: Questions | None = None
    hotpotqa: Questions | None = None

    def sha256(self, task: Task) -> str:
        """Hash all that samples of a task are made of beside its wording."""
        digest = hashlib.sha256()
        if task.haystack == "essay":
            digest.update("\n".join(self.essays.sentences).encode())
        if task.needs_words:
            parts = (self.words.adjectives, self.words.nouns, self.words.all)
            digest.update(json.dumps([[*part] for part in parts]).encode())
        if task.data:
            found = getattr(self, task.data)
            digest.update(repr((found.documents, found.items)).encode())
        return digest.hexdigest()


def read_sources(
    tasks: Sequence[Task],
    essays: str | None,
    squad: str | None,
    hotpotqa: str | None,
    words: str | None,
) -> Sources:
    """Read what the tasks need; nothing is downloaded.

    Args:
        tasks (Sequence[Task]): To be made.
        essays (str, optional): Text file, JSON lines or a directory of them.
        squad (str, optional): JSON file in SQuAD 2.0's format.
        hotpotqa (str, optional): JSON file in HotpotQA's format.
        words (str, optional): File with a word on each line. Defaults to the lists of wonderwords.

    Raises:
        LongRopeError: Something that they need was not given, is damaged or empty.
    """
    given = {"essay": essays, "squad": squad, "hotpotqa": hotpotqa}
    for kind, path in given.items():
        in_need = [task.name for task in tasks if kind in (task.haystack, task.data)]
        if in_need and path is None:
            raise LongRopeError(
                f"{', '.join(in_need)} need{'s' if len(in_need) == 1 else ''} {_FLAGS[kind]}; give "
                "a local file, or leave out the task with --tasks"
            )
    needed = {task.haystack for task in tasks} | {task.data for task in tasks}
    return Sources(
        read_essays(essays) if "essay" in needed else None,
        read_words(words) if any(task.needs_words for task in tasks) else None,
        _read_json(squad, _squad, "SQuAD 2.0") if "squad" in needed else None,
        _read_json(hotpotqa, _hotpotqa, "HotpotQA") if "hotpotqa" in needed else None,
    )


def read_essays(path: str) -> Essays:
    """Read running text: white space becomes single spaces, as published.

    Sentences end where nltk's Punkt, trained on the very text, finds their end; RULER takes nltk's
    ready-made English model, which would have to be downloaded.

    Raises:
        LongRopeError: There is no text, or it cannot be read.
    """
    remedy = "call the key or column of the text `text`, or give files of plain text"
    texts = [document.text for document in read_texts(path, without_text=remedy)]
    splitter = train_splitter(texts)
    text = " ".join(" ".join(texts).split())
    ends = [0, *iterate_sentence_ends(text, splitter), len(text)]
    return Essays([text[a:b].strip() for a, b in pairwise(ends)])


def read_words(path: str | None) -> Words:
    """Read a list of words, or take those of wonderwords, from which RULER's are drawn.

    Raises:
        LongRopeError: The file has fewer than 40 words, or wonderwords is not installed.
    """
    if path is not None:
        try:
            words = sorted(set(Path(path).read_text(encoding="utf-8-sig").split()))
        except (OSError, UnicodeDecodeError) as error:
            raise LongRopeError(f"{path}: cannot be read as UTF-8 text: {error}") from None
        if len(words) < 40:
            raise LongRopeError(
                f"{path} has {len(words)} words, at least 40 are needed; give a file with a word "
                "on each line"
            )
        return Words(words, words, words)
    try:
        from wonderwords import RandomWord
    except ModuleNotFoundError:
        raise LongRopeError(
            "the words of needles and of cwe come from wonderwords, which is not installed; "
            "run `pip install wonderwords`, or give a file with --words"
        ) from None
    nouns, adjectives, verbs = (
        RandomWord().filter(include_categories=[kind]) for kind in ("noun", "adjective", "verb")
    )
    return Words(adjectives, nouns, sorted({*nouns, *adjectives, *verbs}))


def _read_json(path: str, parse: Callable[[Any], Questions], name: str) -> Questions:
    data = read_json(path)
    try:
        found = parse(data)
    except (ValueError, KeyError, TypeError) as error:
        raise LongRopeError(
            f"{path} is not in {name}'s format ({type(error).__name__}: {error}); give the JSON "
            "file as it is published"
        ) from None
    if not found.items:
        raise LongRopeError(f"{path} holds no question that can be answered; give another file")
    return found


def _squad(data: Any) -> Questions:
    articles = [[part["context"] for part in entry["paragraphs"]] for entry in data["data"]]
    places, documents = _numbered(text for texts in articles for text in texts)
    items = []
    for entry, texts in zip(data["data"], articles, strict=True):
        for paragraph in entry["paragraphs"]:
            own = places[paragraph["context"]]
            related = tuple(places[text] for text in texts if places[text] != own)
            items += [
                Question(
                    item["question"],
                    tuple(answer["text"] for answer in item["answers"]),
                    (own,),
                    related,
                )
                for item in paragraph["qas"]
                if not item.get("is_impossible", False)
            ]
    return Questions(documents, items)


def _hotpotqa(data: Any) -> Questions:
    texts = [[f"{title}\n{''.join(parts)}" for title, parts in item["context"]] for item in data]
    places, documents = _numbered(text for some in texts for text in some)
    items = [
        Question(item["question"], (item["answer"],), tuple(places[text] for text in some))
        for item, some in zip(data, texts, strict=True)
    ]
    return Questions(documents, items)


def _numbered(texts: Any) -> tuple[dict[str, int], list[str]]:
    documents = sorted(set(texts))
    return {text: place for place, text in enumerate(documents)}, documents
