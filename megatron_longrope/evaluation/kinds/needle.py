"""Needle retrieval: numbers hidden between the sentences of real documents."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from megatron_longrope.evaluation import trials
from megatron_longrope.evaluation.kind import SHARE, TEXT, Kind, Section
from megatron_longrope.evaluation.series import Rows, joined, split_repeats
from megatron_longrope.evaluation.statistics import Tally, perplexity_of
from megatron_longrope.evaluation.table import Value, format_score

TASKS = ("single", "multi_key", "multi_query")
"""What can be asked: one needle, one among others, several at once."""


def _sections(rows: Rows, window: int | None) -> list[Section]:
    """Return a section for each task, and its numbers of needles and queries where they differ."""
    parts: dict[tuple[str, str], list] = defaultdict(list)
    for series, row in rows:
        needles, queries = row.get("num_needles"), row.get("num_queries")
        detail = "" if needles is None else f"{needles} needle{'s' if needles != 1 else ''}"
        detail += f", {queries} queries" if queries not in (None, 1) else ""
        parts[row["task"], detail].append((series, row))
    several = Counter(task for task, _ in parts)
    order = {task: place for place, task in enumerate(TASKS)}
    sections = []
    for task, detail in sorted(parts, key=lambda part: (order.get(part[0], len(order)), part)):
        # Documents are a sample like trials, and pooled; prompts of two tokenizers are not.
        place = ("length", "requested_depth", "seed", "trial", "document_sha256")
        some = parts[task, detail]
        for more, part in split_repeats(some, place, ("tokenizer_sha256", "requested_bos")).items():
            words = joined(task, detail if several[task] > 1 else "", more)
            sections.append(_section(words, part, window))
    return sections


def _section(words: str, rows: Rows, window: int | None) -> Section:
    found = trials.count(rows, "recall")
    slug = "".join(c if c.isascii() and c.isalnum() else "_" for c in words)
    name, words = f"needle_{slug}", words.replace("_", " ")
    title = f"Needle retrieval, {words}"
    tables = [
        trials.table(
            found, _recall, name=name, title=title, quantity="needle recall",
            note="Recall: share of the asked values found; the highest of each length is marked. "
            "Under it: trials.",
        )
    ]  # fmt: skip
    if found.have_losses:
        tables.append(trials.table(
            found, _perplexity, name=f"{name}_perplexity", title=f"Needle perplexity, {words}",
            quantity="needle perplexity", best="lowest",
            note="exp of the mean loss over the tokens of the values; the lowest of each length is "
            "marked.",
        ))  # fmt: skip
    return trials.section(
        found, rows, name=name, title=title, what="Recall", tables=tables, window=window
    )


def _recall(tally: Tally) -> Value:
    return Value(trials.percent(tally.share), tally.share, (f"{tally.trials}",))


def _perplexity(tally: Tally) -> Value:
    # Every needle trial has a loss; one that was not finite is null in the record.
    value = math.inf if tally.nll is None else perplexity_of(tally.nll)
    return Value(format_score(value), value)


NEEDLE = Kind(
    "needle",
    key=(
        "task", "length", "requested_depth", "seed", "trial", "num_needles", "num_queries",
        "document_sha256", "tokenizer_sha256", "requested_bos",
    ),
    required={**trials.REQUIRED, "task": TEXT, "recall": SHARE},
    optional=trials.OPTIONAL,
    sections=_sections,
)  # fmt: skip
