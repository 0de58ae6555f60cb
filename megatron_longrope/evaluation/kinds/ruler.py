"""RULER: thirteen tasks of retrieval, tracing, counting and questions, at any length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_longrope.evaluation.figure import Bars, Grid
from megatron_longrope.evaluation.kind import COUNT, NUMBER, SHARE, Kind, Row, Section
from megatron_longrope.evaluation.options import (
    EvaluationOptions,
    parse_choices,
    tokenizer_flag,
)
from megatron_longrope.evaluation.ruler.tasks import TASKS
from megatron_longrope.evaluation.series import Rows, Series, distinct, joined, span, split_repeats
from megatron_longrope.evaluation.statistics import Tally
from megatron_longrope.evaluation.table import Column, Table, Value, length_column
from megatron_longrope.evaluation.trials import summary
from megatron_longrope.lengths import format_length
from megatron_longrope.options import bos_flag, flag, parse_positive

if TYPE_CHECKING:
    from megatron_longrope.evaluation.session import Plan
    from megatron_longrope.evaluation.targets import NamedModel

THRESHOLD = 85.6
"""Average of Llama2-7B at 4k in percent; at an effective length a model is above it."""

_PUBLISHED_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
_PUBLISHED = {
    "Phi3-mini, YaRN": (85.74, 78.68, 75.97, 65.22, 52.16, 39.37),
    "Phi3-mini, NTK": (91.34, 87.02, 80.57, 72.81, 61.91, 49.37),
    "Phi3-mini, LongRoPE": (88.40, 83.23, 79.46, 71.20, 64.63, 53.71),
    "Phi3-mini, LongRoPE2": (90.41, 87.22, 83.33, 76.51, 65.37, 58.81),
    "LLaMA3-8B, YaRN": (91.86, 87.87, 84.67, 68.80, 62.51, 49.39),
    "LLaMA3-8B, NTK": (94.38, 92.64, 91.93, 87.33, 79.26, 73.19),
    "LLaMA3-8B, LongRoPE": (94.60, 92.70, 91.01, 86.60, 81.23, 73.40),
    "LLaMA3-8B, LongRoPE2": (94.61, 93.68, 92.31, 90.49, 85.62, 82.03),
}
"""LongRoPE2 (arXiv 2502.20082), averages of the thirteen tasks, fine-tuned to 128k."""

_Scores = Mapping[Series, Mapping[int, Mapping[str, Tally]]]
"""Samples of each series, length and task."""


@dataclass(frozen=True, kw_only=True)
class RulerOptions(EvaluationOptions):
    """What `longrope eval ruler` is told."""

    GROUP: ClassVar[str] = "RULER"

    tokenizer: str | None = tokenizer_flag()
    bos: int | None = bos_flag()

    tasks: Sequence[str] = flag(tuple(TASKS), type=parse_choices(*TASKS), metavar="LIST")
    """of niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt, cwe, fwe,
    qa_1, qa_2 (default: all, of which an average is RULER's)"""
    samples: int = flag(500, type=parse_positive, metavar="K")
    """samples of each task and length (default: 500, as published)"""
    essays: str | None = flag(None, metavar="TEXT")
    """the haystack of five niah tasks: text files as `longrope data prepare` reads them
    (published: Paul Graham's essays); repeated where it is too short"""
    squad: str | None = flag(None, metavar="JSON")
    """questions of qa_1: SQuAD 2.0's dev-v2.0.json, or a file in its format"""
    hotpotqa: str | None = flag(None, metavar="JSON")
    """questions of qa_2: hotpot_dev_distractor_v1.json, or a file in its format"""
    words: str | None = flag(None, metavar="FILE")
    """words of needles and of cwe, one on each line (default: the lists of the package
    wonderwords, as published, enough for cwe up to some 128k)"""
    seed: int = flag(42, type=int)
    """of all samples"""


def _plan(options: RulerOptions, models: Sequence[NamedModel]) -> Plan:
    from megatron_longrope.evaluation.prompts import generated_text, open_prompts
    from megatron_longrope.evaluation.ruler.samples import Sampler
    from megatron_longrope.evaluation.ruler.sources import read_sources
    from megatron_longrope.evaluation.ruler.tasks import score

    prompts = open_prompts(options, models, generate=True)
    tasks = [TASKS[name] for name in options.tasks]
    sources = read_sources(tasks, options.essays, options.squad, options.hotpotqa, options.words)
    sampler = Sampler(prompts.tokenizer, sources, options.seed)
    for task in tasks:
        for length in options.lengths:
            sampler.check(task, length, options.samples)
        sampler.make(task, max(options.lengths), 0)  # for which words may be too few

    def measure(engine: Any, fields: Row) -> Row:
        task = TASKS[fields["task"]]
        sample, tokens = sampler.make(task, fields["length"], fields["sample"])
        text, num_new = generated_text(
            engine, prompts.tokenizer, tokens, task.num_new_tokens, fields["length"]
        )
        return {
            "score": score(task, text, sample.answers),
            "text": text,
            "answers": list(sample.answers),
            "num_tokens": len(tokens),
            "num_new_tokens": num_new,
        }

    hashes = {task.name: sources.sha256(task) for task in tasks}
    cells = [
        prompts.cell(
            target,
            {
                "task": name,
                "length": length,
                "sample": sample,
                "data_sha256": hashes[name],
            },
            TASKS[name].num_new_tokens,
        )
        for target in prompts.targets
        for length in options.lengths
        for name in options.tasks
        for sample in range(options.samples)
    ]
    return prompts.plan(cells, measure)


def _summary(rows: Sequence[Row]) -> list[Row]:
    return [
        {**names, "samples": tally.trials, "score": tally.share}
        for names, tally in summary(rows, ("eos", "data_sha256", "task", "length"), "score")
    ]


def _sections(rows: Rows, window: int | None) -> list[Section]:
    """Return a section for each seed, tokenizer or text where a model has several."""
    place = ("length", "task", "sample")
    settings = ("seed", "tokenizer_sha256", "bos", "eos", "data_sha256")
    parts = split_repeats(rows, place, settings)
    return [_section(number, *part, window) for number, part in enumerate(parts.items(), 1)]


def _section(number: int, words: str, rows: Rows, window: int | None) -> Section:
    name, title = "ruler" if number == 1 else f"ruler_{number}", joined("RULER", words)
    scores: dict[Series, dict[int, dict[str, Tally]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(Tally))
    )
    for series, row in rows:
        scores[series][row["length"]][row["task"]].add(row["score"], None)
    records = [row for _, row in rows]
    measured = [tasks for of_series in scores.values() for tasks in of_series.values()]
    missing = [task for task in TASKS if any(task not in tasks for tasks in measured)]
    warnings = (
        [f"Some averages lack {', '.join(missing)}: they are none of RULER's."] if missing else []
    )
    figures = [
        Grid(
            f"{name}_by_task", f"{title}, by task",
            "Score of each task and length; the darker, the higher.",
            {
                series: {(n, task): tally for n, tasks in of_series.items()
                         for task, tally in tasks.items()}
                for series, of_series in scores.items()
            },
            {task: TASKS[task].short_name for task in _present(scores)}, "Task",
        ),
        Bars(
            name, title, "Average over the tasks by length.",
            {
                series: {n: _average(tasks) for n, tasks in sorted(of_series.items())}
                for series, of_series in scores.items()
            },
            window,
        ),
    ]  # fmt: skip
    facts = {
        "samples of a task and length": span(
            [{"n": tally.trials} for tasks in measured for tally in tasks.values()], "n"),
        "seeds": distinct(records, "seed"),
        "tokens of the prompts": span(records, "num_tokens"),
    }  # fmt: skip
    tables = [_averages(name, title, scores, not missing), _by_task(name, title, scores)]
    return Section(title, tables, figures, warnings, facts)


def _averages(name: str, title: str, scores: _Scores, complete: bool) -> Table:
    """Return the averages by length with the effective length, published ones below them."""
    lengths = sorted({length for of_series in scores.values() for length in of_series})
    rows = {}
    for series, of_series in scores.items():
        found = {length: _average(tasks) for length, tasks in of_series.items()}
        values = [
            Value(_score(found[n]), found[n].share, (_of(len(of_series[n])),))
            if n in found
            else None
            for n in lengths
        ]
        rows[series.name] = [*values, _effective({n: 100 * t.share for n, t in found.items()})]
    note = (
        "Average of the tasks' scores in percent, the highest of each length is marked. Effective: "
        f"the longest measured length with an average above {THRESHOLD:g}."
    )
    if complete and set(lengths) & set(_PUBLISHED_LENGTHS):
        for model, averages in _PUBLISHED.items():
            found = dict(zip(_PUBLISHED_LENGTHS, averages, strict=True))
            rows[f"{model} (published)"] = [
                *(Value(f"{found[n]:.1f}") if n in found else None for n in lengths),
                _effective(found),
            ]
        note += " Published: LongRoPE2, of models extended to 128k, at 4k to 128k."
    columns = [length_column(n, None, "highest") for n in lengths]
    columns.append(Column("effective", is_text=True))
    return Table(name, title, columns, rows, note)


def _effective(percentages: Mapping[int, float]) -> Value:
    above = [length for length, percent in percentages.items() if percent > THRESHOLD]
    if above:
        return Value(format_length(max(above)))
    return Value(f"<{format_length(min(percentages))}")


def _by_task(name: str, title: str, scores: _Scores) -> Table:
    """Return a row for each task of each series."""
    lengths = sorted({length for of_series in scores.values() for length in of_series})
    rows = {
        task if len(scores) == 1 else f"{series.name}: {task}": [
            _of_task(of_series[n][task]) if task in of_series.get(n, ()) else None for n in lengths
        ]
        for series, of_series in scores.items()
        for task in _present({series: of_series})
    }
    columns = [length_column(n, None, "") for n in lengths]
    return Table(f"{name}_tasks", f"{title}, by task", columns, rows,
                 "Score in percent, the number of samples below.", "Task")  # fmt: skip


def _of_task(tally: Tally) -> Value:
    return Value(_score(tally), below=(f"of {tally.trials}",))


def _average(tasks: Mapping[str, Tally]) -> Tally:
    """Return the mean of the tasks' scores, each of which counts the same."""
    share = sum(tally.share for tally in tasks.values()) / len(tasks)
    count = sum(tally.trials for tally in tasks.values())
    return Tally(share * count, count, whole=False)


def _present(scores: _Scores) -> list[str]:
    found = {
        task for of_series in scores.values() for tasks in of_series.values() for task in tasks
    }
    return [task for task in TASKS if task in found]


def _score(tally: Tally) -> str:
    return f"{100 * tally.share:.1f}"


def _of(count: int) -> str:
    return f"{count} task{'s' if count > 1 else ''}"


RULER = Kind(
    "ruler",
    help="RULER's thirteen tasks, generated text, at any length",
    description="Needles, variables, word counts and questions in the wording and with the scores "
    "of RULER (arXiv 2404.06654). A prompt and its answer fit into each length; greedy decoding "
    "with a KV cache under the factors of that length. Nothing is downloaded.",
    options=RulerOptions,
    plan=_plan,
    unit="samples",
    summary=_summary,
    key=("task", "length", "sample", "seed", "tokenizer_sha256", "bos", "eos", "data_sha256"),
    required={
        "task": (lambda value: value in TASKS, "one of RULER's tasks"),
        "length": COUNT,
        "score": SHARE,
        "sample": NUMBER,
    },
    sections=_sections,
)
