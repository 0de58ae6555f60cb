"""Tasks of lm-evaluation-harness: short benchmarks in the original window, and at any length."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.harness_kind import (
    COLUMNS,
    NUMBERS,
    REQUIRED,
    SETTINGS,
    HarnessOptions,
    plan_tasks,
    task_sections,
)
from megatron_longrope.evaluation.kind import Kind, Row
from megatron_longrope.lengths import parse_length
from megatron_longrope.options import flag

if TYPE_CHECKING:
    from megatron_longrope.evaluation.session import Plan
    from megatron_longrope.evaluation.targets import NamedModel

_SHORT_SETTINGS = ("limit", "max_length", "seed", "tokenizer_sha256", "requests_sha256")


def _parse_metadata(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise LongRopeError(
            f"{text!r} is no JSON object; write for example "
            '\'{"max_seq_lengths": "64k"}\' as the README of the task says'
        )
    return value


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(HarnessOptions):
    """What `longrope eval short` is told."""

    GROUP: ClassVar[str] = "benchmarks"

    tasks: str = flag("paper", type=str, metavar="LIST")
    """NAME[:SHOTS[:METRIC]],... of lm-evaluation-harness or --include-path; `paper` is
    arc_challenge:25:acc_norm,hellaswag:10:acc_norm,mmlu:5:acc,truthfulqa_mc2:0:acc (default)"""


@dataclass(frozen=True, kw_only=True)
class TaskOptions(HarnessOptions):
    """What `longrope eval tasks` is told."""

    GROUP: ClassVar[str] = "benchmarks"

    tasks: str = flag(type=str, metavar="LIST")
    """NAME[:SHOTS[:METRIC]],... of lm-evaluation-harness or --include-path"""
    window: int | None = flag(None, type=parse_length, metavar="N")
    """give every sequence the factors of N tokens, such as 128k, and take no longer ones (default:
    each sequence those of its own length, prompt and answer; up to the longest factor set)"""
    long_prompts: str = flag("error", choices=("error", "truncate"))
    """prompts longer than the window: refuse to begin (default), or let them lose their beginning,
    which is counted in record, table and CSV"""
    metadata: Mapping[str, Any] | None = flag(None, type=_parse_metadata, metavar="JSON")
    """for tasks that make their data themselves, as lm-eval's own --metadata; the tokenizer is
    added"""


def _plan_short(options: BenchmarkOptions, models: Sequence[NamedModel]) -> Plan:
    from megatron_longrope.evaluation.targets import targets_at
    from megatron_longrope.selection import check_original_factors

    targets = targets_at(models, options.longrope_config)
    for target in targets:
        check_original_factors(target.config, "short benchmarks would measure long factors")
    return plan_tasks(
        options,
        models,
        targets,
        lambda target: target.config.original_max_position_embeddings,
        long_prompts="truncate",
    )


def _plan(options: TaskOptions, models: Sequence[NamedModel]) -> Plan:
    from megatron_longrope.evaluation.targets import targets_at

    lengths = [] if options.window is None else [options.window]
    return plan_tasks(
        options,
        models,
        targets_at(models, options.longrope_config, lengths),
        lambda _: options.window,
        long_prompts=options.long_prompts,
        metadata=options.metadata,
    )


def _summary(rows: Sequence[Row]) -> list[Row]:
    return [{name: row.get(name) for name in COLUMNS} for row in rows]


SHORT = Kind(
    "short",
    help="short benchmarks through lm-evaluation-harness",
    description="The paper's Open LLM leaderboard tasks, or any other of lm-evaluation-harness "
    "(pip install lm-eval), scored by the engine with the factors of the original window. Longer "
    "prompts lose their beginning, are counted and reported. Nothing is downloaded unless "
    "--allow-download is given.",
    options=BenchmarkOptions,
    plan=_plan_short,
    unit="requests",
    summary=_summary,
    key=("task", "num_fewshot", "metric", *_SHORT_SETTINGS),
    required=REQUIRED,
    numbers=NUMBERS,
    sections=lambda rows, _: task_sections(
        rows, "short_benchmarks", "Short benchmarks", _SHORT_SETTINGS
    ),
)

TASKS = Kind(
    "tasks",
    help="any task of lm-evaluation-harness, at any length",
    description="Tasks of lm-evaluation-harness (pip install lm-eval) by name, or your own, whose "
    "prompts may be longer than the original window. The engine scores and generates; what is "
    "asked is built before a weight is loaded. Nothing is downloaded unless --allow-download is "
    "given.",
    options=TaskOptions,
    plan=_plan,
    unit="requests",
    summary=_summary,
    key=("task", "num_fewshot", "metric", *SETTINGS),
    required=REQUIRED,
    numbers=NUMBERS,
    sections=lambda rows, _: task_sections(rows, "tasks", "Tasks", SETTINGS),
)
