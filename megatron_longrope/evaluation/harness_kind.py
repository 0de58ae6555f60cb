"""What the kinds of evaluation that go through lm-evaluation-harness share."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.kind import (
    MODEL_COLUMNS,
    NUMBER,
    TEXT,
    Row,
    Section,
)
from megatron_longrope.evaluation.options import EvaluationOptions
from megatron_longrope.evaluation.series import Rows, distinct, joined, span, split_repeats
from megatron_longrope.evaluation.table import Column, Table, Value
from megatron_longrope.lengths import parse_length
from megatron_longrope.options import flag, parse_positive

if TYPE_CHECKING:
    from megatron_longrope.data.tokenizer import Tokenizer
    from megatron_longrope.evaluation.harness_tasks import LoadedTask, TaskSpec
    from megatron_longrope.evaluation.session import Plan
    from megatron_longrope.evaluation.targets import NamedModel, Target

_LOW_IS_GOOD = ("ppl", "perplexity", "loss", "bits", "byte", "brier", "nll")
_OF_HUNDRED = ("bleu", "chrf")  # metrics from 0 to 100
_NOTE = (
    "Under a value: its standard error, the number of questions, and of its requests how many lost "
    "their beginning. Accuracies are percentages. The best of each column is marked, whether or "
    "not the standard errors explain the difference."
)

REQUIRED = {"task": TEXT, "metric": TEXT, "value": NUMBER}
"""Fields of every record."""

NUMBERS = {"value": math.nan, "stderr": None, "metrics": math.nan}
"""See :attr:`.Kind.numbers`."""

SETTINGS = (
    "limit", "window", "max_length", "long_prompts", "seed", "tokenizer_sha256", "metadata",
    "requests_sha256",
)  # fmt: skip
"""Fields by which a model may have several records of a benchmark."""

COLUMNS = (
    *MODEL_COLUMNS, "task", "num_fewshot", "metric", *SETTINGS, "value", "higher_is_better",
    "stderr", "samples", "truncated", "requests", "shortest", "longest", "lm_eval_version",
    "seconds",
)  # fmt: skip
"""Of the CSV."""


@dataclass(frozen=True, kw_only=True)
class HarnessOptions(EvaluationOptions):
    """What `longrope eval short` and `longrope eval tasks` are both told."""

    GROUP: ClassVar[str] = "benchmarks"

    lengths: Sequence[int] = flag((), hidden=True)  # prompts are as long as they are

    tokenizer: str | None = flag(None, metavar="T")
    """the models' tokenizer (default: of a single --hf)"""
    include_path: str | None = flag(None, metavar="DIR")
    """directory with YAML files of tasks of your own"""
    limit: float | None = flag(None, type=float, metavar="K")
    """only the first K questions of each task, or a share below 1: for trials, no result"""
    max_length: int | None = flag(None, type=parse_length, metavar="N")
    """longest prompt in tokens, at most and by default the window"""
    batch_size: int = flag(8, type=parse_positive, metavar="B")
    """rows of a forward pass, fewer of rows beyond the original window"""
    seed: int = flag(1234, type=int)
    """of few-shot examples and of what tasks draw by numpy or torch (default: 1234,
    lm-evaluation-harness's own, which seeds Python's random with 0)"""
    allow_download: bool = flag(False)
    """let data sets be fetched from the Hub"""


def plan_tasks(
    options: Any,
    models: Sequence[NamedModel],
    targets: Sequence[Target],
    window_of: Callable[[Target], int | None],
    *,
    long_prompts: str,
    metadata: Mapping[str, Any] | None = None,
) -> Plan:
    """Make a cell of each target and task; its requests are built before a weight is loaded.

    Args:
        options (HarnessOptions): With a list of `tasks`.
        models (Sequence[NamedModel]): What is measured.
        targets (Sequence[Target]): Under which factors.
        window_of (Callable): The length whose factors a target's sequences get; None for their own.
        long_prompts (str): See :class:`.harness_requests.RequestReader`.
        metadata (Mapping, optional): See :func:`.harness_tasks.check_tasks`; the tokenizer is
            added.

    Raises:
        LongRopeError: A number is out of its range; or tasks, their data, tokenizer or factors are
            missing or do not fit.
    """
    from megatron_longrope.evaluation.harness import count_requests, measure_task
    from megatron_longrope.evaluation.harness_tasks import parse_tasks
    from megatron_longrope.evaluation.session import Cell, Plan

    specs = parse_tasks(options.tasks)
    longest = [window_of(target) or target.config.max_length for target in targets]
    _check(options, min(longest))
    tokenizer, tasks = _load(options, models, specs, metadata)
    asked = {"limit": options.limit, "seed": options.seed, "allow_download": options.allow_download}

    @cache
    def requests(task: str, max_length: int) -> Any:
        return count_requests(
            tokenizer, tasks[task], max_length, long_prompts=long_prompts, **asked
        )

    def cell_of(target: Target, window: int, name: str) -> Cell:
        spec, max_length = tasks[name].spec, options.max_length or window
        found = requests(name, max_length)
        fields = {
            "task": name,
            "num_fewshot": spec.num_fewshot,
            "metric": spec.metric,
            "limit": options.limit,
            "max_length": max_length,
            "seed": options.seed,
            "tokenizer_sha256": tokenizer.sha256,
            "window": window_of(target) or "by length",
            "long_prompts": long_prompts,
            "metadata": None if metadata is None else json.dumps(metadata, sort_keys=True),
            "requests_sha256": found.sha256,
        }
        return Cell(target, fields, found.lengths, found.num_new_tokens)

    def measure(engine: Any, cell: Cell, on_task: Callable[..., None], _: Any) -> Row:
        from megatron_longrope.evaluation.harness_model import EngineLM

        window = window_of(cell.target)
        lm = EngineLM(
            engine,
            tokenizer,
            window=window,
            max_length=cell.fields["max_length"],
            batch_size=options.batch_size,
            long_prompts=long_prompts,
        )
        record = measure_task(lm, tasks[cell.fields["task"]], **asked)
        on_task(count=cell.num_forwards)
        return record | _lengths(cell, window)

    cells = [
        cell_of(target, window, name)
        for target, window in zip(targets, longest, strict=True)
        for name in tasks
    ]
    return Plan(cells, measure, shared=False)


def _check(options: Any, window: int) -> None:
    """Refuse numbers that are out of their range; the window is the shortest of all targets."""
    limit, max_length = options.limit, options.max_length
    if limit is not None and not 0 < limit < math.inf:
        raise LongRopeError(f"--limit {limit:g} leaves no question; give a number above 0")
    if not 0 <= options.seed < 2**32:
        raise LongRopeError(f"--seed {options.seed} must be from 0 to {2**32 - 1}")
    if max_length is not None and not 2 <= max_length <= window:
        raise LongRopeError(
            f"--max-length {max_length} must be from 2 to the window of {window} tokens; leave it "
            "out to use the window"
        )


def _load(
    options: Any,
    models: Sequence[NamedModel],
    specs: Sequence[TaskSpec],
    metadata: Mapping[str, Any] | None,
) -> tuple[Tokenizer, dict[str, LoadedTask]]:
    """Load the tokenizer, which must be the models', and the tasks by their names."""
    from megatron_longrope.data.tokenizer import load_tokenizer
    from megatron_longrope.evaluation.harness_tasks import check_tasks
    from megatron_longrope.evaluation.targets import check_tokenizer_fits, prompt_tokenizer

    tokenizer = load_tokenizer(prompt_tokenizer(options.tokenizer, models))
    what = f"tokenizer {tokenizer.path}"
    check_tokenizer_fits(tokenizer.vocab_size, tokenizer, what, models)
    loaded = check_tasks(
        specs,
        include_path=options.include_path,
        metadata=None if metadata is None else {"tokenizer": str(tokenizer.path), **metadata},
        seed=options.seed,
        allow_download=options.allow_download,
    )
    return tokenizer, {task.spec.name: task for task in loaded}


def _lengths(cell: Any, window: int | None) -> Row:
    """Return how many requests a cell has, of which lengths, under which factor sets."""
    config, sets = cell.target.config, Counter()
    for length, count in cell.forwards.items():
        sets[config.factor_set_for(window or length).max_length] += count
    return {
        "requests": sum(sets.values()),
        "shortest": min(cell.forwards),
        "longest": max(cell.forwards),
        "factor_sets": {str(reach): sets[reach] for reach in sorted(sets)},
    }


def task_sections(rows: Rows, name: str, title: str, settings: Sequence[str]) -> list[Section]:
    """Return one table: a column for each benchmark, shots, metric and whatever else differs.

    Args:
        rows (Rows): Records.
        name (str): File name of the table.
        title (str): Its title.
        settings (Sequence[str]): Fields by which a model may have several records of a benchmark.
    """
    parts: dict[tuple, list] = defaultdict(list)
    for series, row in rows:
        parts[row["task"], row.get("num_fewshot"), row["metric"]].append((series, row))
    columns, cells = [], []
    for (task, shots, metric), pairs in parts.items():
        low = _is_low_good(metric, [row for _, row in pairs])
        percent = not low and _are_shares(metric, [float(row["value"]) for _, row in pairs])
        for detail, some in split_repeats(pairs, (), settings).items():
            below = joined(metric, "" if shots is None else f"{shots}-shot", detail)
            columns.append(Column(task, below, "lowest" if low else "highest"))
            cells.append({series.name: _value(row, percent=percent) for series, row in some})
    names = dict.fromkeys(series.name for series, _ in rows)
    table = Table(
        name, title, columns,
        {name: [column.get(name) for column in cells] for name in names}, _NOTE,
    )  # fmt: skip
    records = [row for _, row in rows]
    warnings = []
    if limits := distinct(records, "limit"):
        warnings.append(f"Some of these were run on a limited number of examples (limit {limits}): "
                        "they are no benchmark scores.")  # fmt: skip
    if cut := sorted({row["task"] for row in records if row.get("truncated")}):
        warnings.append(f"Inputs of {', '.join(cut)} were longer than the model takes and lost "
                        "their beginning.")  # fmt: skip
    facts = {
        "lm-evaluation-harness": distinct(records, "lm_eval_version"),
        "longest input": distinct(records, "max_length"),
        "examples": distinct(records, "samples"),
        "factors": distinct(records, "window"),
        "tokens of the longest request": span(records, "longest"),
    }
    return [Section(table.title, [table], (), warnings, facts)]


def _is_low_good(metric: str, records: Sequence[Row]) -> bool:
    """Return what the harness says; by the name where it says nothing or its tasks disagree."""
    found = {row.get("higher_is_better") for row in records} - {None}
    if len(found) == 1:
        return found == {False}
    return any(word in metric.lower() for word in _LOW_IS_GOOD)


def _are_shares(metric: str, values: Sequence[float]) -> bool:
    """Return whether all of a column are from 0 to 1; a lost model has that on any scale."""
    name = metric.lower()
    if any(word in name for word in _OF_HUNDRED) and not name.endswith("_acc"):
        return False
    return all(0 <= value <= 1 for value in values if math.isfinite(value))


def _value(row: Row, *, percent: bool) -> Value:
    """Return value and standard error, in percent or as they are."""
    value, error = float(row["value"]), row.get("stderr")
    if not math.isfinite(value):
        return Value("not finite", value)
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    below = [] if error is None else [f"\N{PLUS-MINUS SIGN} {scale * error:.{digits}f}"]
    if row.get("samples"):
        below.append(f"{row['samples']:,} questions")
    if row.get("truncated"):
        below.append(f"{row['truncated']:,} truncated")
    return Value(f"{scale * value:.{digits}f}", value, tuple(below))
