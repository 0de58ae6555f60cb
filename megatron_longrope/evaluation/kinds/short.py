"""Short benchmarks of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_longrope.evaluation.kind import NUMBER, TEXT, Kind, Row, Section
from megatron_longrope.evaluation.options import EvaluationOptions, flag
from megatron_longrope.evaluation.series import Rows, distinct, joined, split_repeats
from megatron_longrope.evaluation.table import Column, Table, Value, format_score
from megatron_longrope.lengths import parse_length

if TYPE_CHECKING:
    from megatron_longrope.evaluation.session import Plan
    from megatron_longrope.evaluation.targets import NamedModel

_LOW_IS_GOOD = ("ppl", "perplexity", "loss", "bits", "byte", "brier", "nll")
_NOTE = (
    "Under a value: its standard error and the number of questions. Accuracies are percentages. "
    "The best of each column is marked, whether or not the standard errors explain the difference."
)


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(EvaluationOptions):
    """What `longrope eval short` is told."""

    GROUP: ClassVar[str] = "benchmarks"

    lengths: Sequence[int] = flag((), hidden=True)  # prompts are as long as they are

    tokenizer: str | None = flag(None, metavar="T")
    """the models' tokenizer (default: of --hf)"""

    tasks: str = flag("paper", metavar="LIST")
    """NAME[:SHOTS[:METRIC]],... of lm-evaluation-harness or --include-path; `paper` is
    arc_challenge:25:acc_norm,hellaswag:10:acc_norm,mmlu:5:acc,truthfulqa_mc2:0:acc (default)"""

    include_path: str | None = flag(None, metavar="DIR")
    """directory with YAML files of tasks of your own"""

    limit: float | None = flag(None, type=float, metavar="K")
    """only the first K questions of each task, or a share below 1: for trials, no result"""

    max_length: int | None = flag(None, type=parse_length, metavar="N")
    """longest prompt in tokens, at most and by default the original window; longer ones lose their
    beginning, are counted and reported"""

    batch_size: int = flag(8, type=int, metavar="B")
    """default: 8"""

    seed: int = flag(1234, type=int)
    """of few-shot examples"""

    allow_download: bool = flag(False)
    """let data sets be fetched from the Hub"""


def _plan(options: BenchmarkOptions, models: Sequence[NamedModel]) -> Plan:
    from megatron_longrope.data.tokenizer import load_tokenizer
    from megatron_longrope.evaluation.harness import (
        check_original_factors,
        check_tasks,
        harness_lm,
        parse_tasks,
        run_tasks,
    )
    from megatron_longrope.evaluation.session import Cell, Plan
    from megatron_longrope.evaluation.targets import (
        check_tokenizer_fits,
        prompt_tokenizer,
        targets_at,
    )

    specs = parse_tasks(options.tasks)
    targets = targets_at(models, options.longrope_config)
    for target in targets:
        check_original_factors(target.config, options.max_length)
    tokenizer = load_tokenizer(prompt_tokenizer(options.tokenizer, models))
    check_tokenizer_fits(tokenizer.vocab_size, f"tokenizer {tokenizer.path}", models)
    loaded = check_tasks(
        specs, include_path=options.include_path, allow_download=options.allow_download
    )
    tasks = {task.spec.name: task for task in loaded}

    def measure(engine, cell, on_task) -> Row:
        lm = harness_lm(
            engine,
            tokenizer,
            max_length=cell.fields["max_length"],
            batch_size=options.batch_size,
        )
        (record,) = run_tasks(
            lm,
            [tasks[cell.fields["task"]]],
            limit=options.limit,
            seed=options.seed,
            allow_download=options.allow_download,
        )
        on_task()
        return record

    cells = [
        Cell(
            target,
            {
                "task": task.spec.name,
                "num_fewshot": task.spec.num_fewshot,
                "metric": task.spec.metric,
                "limit": options.limit,
                "max_length": options.max_length or target.config.original_max_position_embeddings,
                "seed": options.seed,
                "tokenizer_sha256": tokenizer.sha256,
            },
        )
        for target in targets
        for task in loaded
    ]
    return Plan(cells, measure, shared=False)


def _sections(rows: Rows, window: int | None) -> list[Section]:
    """Return one table: a column for each benchmark, shots, metric and whatever else differs."""
    parts: dict[tuple, list] = defaultdict(list)
    for series, row in rows:
        parts[row["task"], row.get("num_fewshot"), row["metric"]].append((series, row))
    columns, cells = [], []
    for (task, shots, metric), pairs in parts.items():
        settings = ("limit", "max_length", "seed", "tokenizer_sha256")
        low = any(word in metric.lower() for word in _LOW_IS_GOOD)
        for detail, some in split_repeats(pairs, (), settings).items():
            below = joined(metric, "" if shots is None else f"{shots}-shot", detail)
            columns.append(Column(task, below, "lowest" if low else "highest", f"In {task}"))
            cells.append({series.name: _value(row, low=low) for series, row in some})
    names = dict.fromkeys(series.name for series, _ in rows)
    table = Table(
        "short_benchmarks", "Short benchmarks", columns,
        {name: [column.get(name) for column in cells] for name in names}, "value", _NOTE,
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
    }
    return [Section(table.title, [table], (), warnings, facts)]


def _value(row: Row, *, low: bool) -> Value:
    """Return value and standard error; shares of examples as percentages."""
    value, error = float(row["value"]), row.get("stderr")
    if not math.isfinite(value):
        return Value(format_score(value), value)
    scale, digits = (1.0, 3) if low or not 0 <= value <= 1 else (100.0, 1)
    below = [] if error is None else [f"\N{PLUS-MINUS SIGN} {scale * error:.{digits}f}"]
    if row.get("samples"):
        below.append(f"{row['samples']:,} questions")
    return Value(f"{scale * value:.{digits}f}", value, tuple(below))


_COLUMNS = (
    "model", "label", "task", "num_fewshot", "metric", "value", "stderr", "samples", "limit",
    "max_length", "lm_eval_version", "seconds",
)  # fmt: skip

SHORT = Kind(
    "short",
    help="short benchmarks through lm-evaluation-harness",
    description="The paper's Open LLM leaderboard tasks, or any other of lm-evaluation-harness "
    "(pip install lm-eval), scored by the engine with the factors of the original window. Nothing "
    "is downloaded unless --allow-download is given.",
    options=BenchmarkOptions,
    plan=_plan,
    unit="tasks",
    summary=lambda rows: [{name: row.get(name) for name in _COLUMNS} for row in rows],
    key=("task", "num_fewshot", "metric", "limit", "max_length", "seed", "tokenizer_sha256"),
    required={"task": TEXT, "metric": TEXT, "value": NUMBER},
    optional={"stderr": NUMBER},
    sections=_sections,
)
