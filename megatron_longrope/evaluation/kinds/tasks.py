"""Tasks of lm-evaluation-harness at any length."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.harness_kind import (
    COLUMNS,
    OPTIONAL,
    REQUIRED,
    HarnessOptions,
    plan_tasks,
    task_sections,
)
from megatron_longrope.evaluation.kind import COUNT, Kind
from megatron_longrope.evaluation.options import flag
from megatron_longrope.lengths import parse_length

if TYPE_CHECKING:
    from megatron_longrope.evaluation.session import Plan
    from megatron_longrope.evaluation.targets import NamedModel

_SETTINGS = (
    "limit", "window", "max_length", "long_prompts", "seed", "tokenizer_sha256", "requests_sha256",
)  # fmt: skip
_COLUMNS = (*COLUMNS, "window", "long_prompts", "requests", "shortest", "longest")


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
class TaskOptions(HarnessOptions):
    """What `longrope eval tasks` is told."""

    GROUP: ClassVar[str] = "benchmarks"

    tasks: str = flag(metavar="LIST")
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


def _plan(options: TaskOptions, models: Sequence[NamedModel]) -> Plan:
    from megatron_longrope.evaluation.targets import targets_at

    window, longest = options.window, options.max_length
    targets = targets_at(models, options.longrope_config, [n for n in (window, longest) if n])
    if window is not None and longest is not None and longest > window:
        raise LongRopeError(
            f"--max-length {longest} is beyond --window {window}; give one of them, or a shorter "
            "--max-length"
        )
    return plan_tasks(
        options,
        models,
        targets,
        lambda _: window,
        long_prompts=options.long_prompts,
        metadata=options.metadata,
        counted=True,
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
    summary=lambda rows: [{name: row.get(name) for name in _COLUMNS} for row in rows],
    key=("task", "num_fewshot", "metric", *_SETTINGS),
    required=REQUIRED,
    optional={**OPTIONAL, "requests": COUNT, "longest": COUNT},
    sections=lambda rows, _: task_sections(rows, "tasks", "Tasks", _SETTINGS),
)
