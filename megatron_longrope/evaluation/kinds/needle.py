"""Needle retrieval: numbers hidden between the lines of real documents."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation import trials
from megatron_longrope.evaluation.kind import SHARE, TEXT, Kind, Row, Section
from megatron_longrope.evaluation.needle_text import TASKS
from megatron_longrope.evaluation.options import (
    EvaluationOptions,
    depths_flag,
    parse_choices,
    seed_flag,
    text_key_flag,
    tokenizer_flag,
    trials_flag,
)
from megatron_longrope.evaluation.series import Rows, joined, split_repeats
from megatron_longrope.evaluation.statistics import Tally, perplexity_of
from megatron_longrope.evaluation.table import Value, format_score
from megatron_longrope.options import bos_flag, flag, parse_positive

if TYPE_CHECKING:
    from megatron_longrope.evaluation.session import Plan
    from megatron_longrope.evaluation.targets import NamedModel


@dataclass(frozen=True, kw_only=True)
class NeedleOptions(EvaluationOptions):
    """What `longrope eval needle` is told."""

    GROUP: ClassVar[str] = "needles"

    data: str = flag(metavar="PREFIX|TEXT")
    """documents: a prepared set, or text as `longrope data prepare` reads it: .txt, .jsonl (.gz,
    .zst), .parquet, or a directory"""
    text_key: str = text_key_flag()
    tokenizer: str | None = tokenizer_flag()
    bos: int | None = bos_flag()

    tasks: Sequence[str] = flag(TASKS, type=parse_choices(*TASKS), metavar="LIST")
    """single,multi_key,multi_query (default: all)"""
    num_documents: int = flag(10, type=parse_positive, metavar="K")
    """the first K documents that fill the longest length, in turn; a longer one may choose
    others"""
    num_needles: int = flag(4, type=int, metavar="K")
    """in multi_key and multi_query"""
    num_queries: int = flag(2, type=int, metavar="Q")
    """asked for in multi_query"""
    depths: Sequence[float] = depths_flag("5")
    trials: int = trials_flag("task, length and depth")
    seed: int = seed_flag()


def _plan(options: NeedleOptions, models: Sequence[NamedModel]) -> Plan:
    from megatron_longrope.evaluation import needle_sample
    from megatron_longrope.evaluation.prompts import open_prompts
    from megatron_longrope.evaluation.scored_documents import read_scored_documents

    if None in options.depths:
        raise LongRopeError("--depths random is for passkey; give a number of depths or a list")
    prompts = open_prompts(options, models)
    documents = read_scored_documents(
        options.data,
        prompts.tokenizer.path,
        max(options.lengths),
        options.num_documents,
        options.bos,
        options.text_key,
        least=1,
    )

    def sample_of(task: str, length: int, depth: float, trial: int) -> needle_sample.NeedleSample:
        return needle_sample.make_sample(
            task,
            documents.tokens[trial % len(documents.tokens)],
            prompts.tokenizer,
            length,
            bos_id=prompts.tokenizer.bos_id,
            depth=depth,
            seed=options.seed,
            trial=trial,
            num_needles=options.num_needles,
            num_queries=options.num_queries,
        )

    # Whatever one may be refused for, such as its place in its document, shows before a model is
    # loaded; making a sample takes a fraction of its forward pass.
    for sample in product(options.tasks, options.lengths, options.depths, range(options.trials)):
        sample_of(*sample)

    def measure(engine: Any, fields: Row) -> Row:
        names = ("task", "length", "requested_depth", "trial")
        sample = sample_of(*(fields[name] for name in names))
        answer = engine.answer(sample.tokens, sample.num_answer_tokens)
        recall, nll = needle_sample.score(sample, answer.predicted, answer.nll)
        return {
            "depth": sample.depths[0],
            "depths": list(sample.depths),
            "recall": recall,
            "nll": nll,
            "num_tokens": sample.tokens.shape[1],
        }

    cells = [
        prompts.cell(
            target,
            {
                "task": task,
                "length": length,
                "requested_depth": depth,
                "trial": trial,
                "num_needles": 1 if task == "single" else options.num_needles,
                "num_queries": options.num_queries if task == "multi_query" else 1,
                "sources": f"{options.data}:{len(documents.tokens)}",
                "documents_sha256": documents.sha256,
            },
        )
        for target in prompts.targets
        for length in options.lengths
        for task in options.tasks
        for depth in options.depths
        for trial in range(options.trials)
    ]
    return prompts.plan(cells, measure)


def _summary(rows: Sequence[Row]) -> list[Row]:
    names = ("task", "num_needles", "num_queries", "length", "requested_depth")
    found = trials.summary(rows, names, "recall")
    return [
        {
            **names,
            "trials": tally.trials,
            "recall": tally.share,
            "nll": tally.nll,
            "needle_ppl": _perplexity(tally).rank,
        }
        for names, tally in found
    ]


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
        place = ("length", "requested_depth", "seed", "trial", "documents_sha256")
        some = parts[task, detail]
        for more, part in split_repeats(some, place, ("tokenizer_sha256", "bos")).items():
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
            found, _recall, name=name, title=title,
            note="Recall: share of the asked values found; the highest of each length is marked. "
            "Under it: trials.",
        )
    ]  # fmt: skip
    if found.have_losses:
        tables.append(trials.table(
            found, _perplexity, name=f"{name}_perplexity", title=f"Needle perplexity, {words}",
            best="lowest",
            note="exp of the mean loss over the tokens of the values; the lowest of each length is "
            "marked.",
        ))  # fmt: skip
    return trials.section(
        found, rows, name=name, title=title, what="Recall", tables=tables, window=window
    )


def _recall(tally: Tally) -> Value:
    return Value(trials.percent(tally.share), tally.share, (f"{tally.trials}",))


def _perplexity(tally: Tally) -> Value:
    # Every needle trial has a loss; one that was not finite is null in old records.
    value = math.inf if tally.nll is None else perplexity_of(tally.nll)
    return Value(format_score(value), value)


NEEDLE = Kind(
    "needle",
    help="numbers hidden between the lines of real documents",
    description="Retrieval in real text, in the manner of RULER: one needle, one among others, "
    "several asked for at once; with the perplexity of the answers alone (LongRoPE2).",
    options=NeedleOptions,
    plan=_plan,
    unit="trials",
    summary=_summary,
    key=(
        "task", "length", "requested_depth", "seed", "trial", "num_needles", "num_queries",
        "documents_sha256", "tokenizer_sha256", "bos",
    ),
    required={**trials.REQUIRED, "task": TEXT, "recall": SHARE, "documents_sha256": TEXT},
    numbers=trials.NUMBERS,
    sections=_sections,
)  # fmt: skip
