"""RULER's thirteen tasks: the published wording, room for answers, and scores (arXiv 2404.06654).

Wording and numbers are those of NVIDIA/RULER at c3f5e3b. lm-evaluation-harness 0.4.13 words the
answer of `vt` as "assgined", as RULER once did, and shows `cwe` without its example.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x1f]")

_ONE_NEEDLE = (
    "A special magic {what} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {what} afterwards.\n{context}\nWhat is the special magic {what} for "
    "{query} mentioned in the provided text?",
    " The special magic {what} for {query} mentioned in the provided text is",
)
_NEEDLES = (
    "Some special magic {what}s are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {what}s afterwards.\n{context}\nWhat are all the special magic "
    "{what}s for {query} mentioned in the provided text?",
    " The special magic {what}s for {query} mentioned in the provided text are",
)
_VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {query}, they are: ",
)
_COMMON_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
_FREQUENT_WORDS = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the "
    "above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
_QUESTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}",
    " Answer:",
)


@dataclass(frozen=True)
class Task:
    """One of the thirteen."""

    name: str
    """As published."""
    family: str
    """`niah`, `vt`, `cwe`, `fwe` or `qa`."""
    wording: tuple[str, str]
    """Prompt, and how the answer begins."""
    num_new_tokens: int
    """Room for the answer, which counts as a part of the length."""
    haystack: str = ""
    """Of needles: `noise`, `essay`, or `needle` for other needles."""
    keys: str = "words"
    """What a needle is asked for by: `words` or `uuids`."""
    values: str = "number"
    """What a needle holds: `number` or `uuid`."""
    num_keys: int = 1
    num_values: int = 1
    """Of each key."""
    num_queries: int = 1
    """Keys asked for."""
    data: str = ""
    """Of questions: `squad` or `hotpotqa`."""

    @property
    def needs_words(self) -> bool:
        """Whether samples hold English words beside their text."""
        return self.family == "cwe" or (self.family == "niah" and self.keys == "words")

    @property
    def short_name(self) -> str:
        """The name beside a row of a figure."""
        return self.name.removeprefix("niah_").replace("_", " ")


def _niah(name: str, haystack: str, wording: tuple[str, str] = _ONE_NEEDLE, **more) -> Task:
    return Task(f"niah_{name}", "niah", wording, 128, haystack, **more)


TASKS = {
    task.name: task
    for task in (
        _niah("single_1", "noise"),
        _niah("single_2", "essay"),
        _niah("single_3", "essay", values="uuid"),
        _niah("multikey_1", "essay", num_keys=4),
        _niah("multikey_2", "needle"),
        _niah("multikey_3", "needle", keys="uuids", values="uuid"),
        _niah("multivalue", "essay", _NEEDLES, num_values=4),
        _niah("multiquery", "essay", _NEEDLES, num_keys=4, num_queries=4),
        Task("vt", "vt", _VARIABLES, 30),
        Task("cwe", "cwe", _COMMON_WORDS, 120),
        Task("fwe", "fwe", _FREQUENT_WORDS, 50),
        Task("qa_1", "qa", _QUESTION, 32, data="squad"),
        Task("qa_2", "qa", _QUESTION, 32, data="hotpotqa"),
    )
}
"""By name, in the published order."""


def score(task: Task, text: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that a text holds; of a question's, whether it holds any.

    RULER's `string_match_all` and `string_match_part`, upper and lower case alike. lm-eval 0.4.13
    counts for questions the share of the spellings that the text holds, which is never more.

    Args:
        task (Task): Says which.
        text (str): What the model wrote behind the prompt.
        answers (Sequence[str]): What is looked for.
    """
    text = _CONTROL.sub("\n", text.strip()).strip().lower()
    found = [answer.lower() in text for answer in answers]
    return float(any(found)) if task.family == "qa" else sum(found) / len(found)
