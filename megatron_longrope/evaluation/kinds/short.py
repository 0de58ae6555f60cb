"""Short benchmarks of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections import defaultdict

from megatron_longrope.evaluation.kind import NUMBER, TEXT, Kind, Row, Section
from megatron_longrope.evaluation.series import Rows, distinct, joined, split_repeats
from megatron_longrope.evaluation.table import Column, Table, Value, format_score

_LOW_IS_GOOD = ("ppl", "perplexity", "loss", "bits", "byte", "brier", "nll")
_NOTE = (
    "Under a value: its standard error. Accuracies are percentages. The best of each column is "
    "marked, whether or not the standard errors explain the difference."
)


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
    below = () if error is None else (f"\N{PLUS-MINUS SIGN} {scale * error:.{digits}f}",)
    return Value(f"{scale * value:.{digits}f}", value, below)


SHORT = Kind(
    "short",
    key=("task", "num_fewshot", "metric", "limit", "max_length", "seed", "tokenizer_sha256"),
    required={"task": TEXT, "metric": TEXT, "value": NUMBER},
    optional={"stderr": NUMBER},
    sections=_sections,
)
