"""Short benchmarks: the preset of lm-evaluation-harness' tasks inside the original window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_longrope.evaluation.harness_kind import (
    COLUMNS,
    OPTIONAL,
    REQUIRED,
    HarnessOptions,
    plan_tasks,
    task_sections,
)
from megatron_longrope.evaluation.kind import Kind
from megatron_longrope.evaluation.options import flag

if TYPE_CHECKING:
    from megatron_longrope.evaluation.session import Plan
    from megatron_longrope.evaluation.targets import NamedModel

_SETTINGS = ("limit", "max_length", "seed", "tokenizer_sha256", "include_sha256")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(HarnessOptions):
    """What `longrope eval short` is told."""

    GROUP: ClassVar[str] = "benchmarks"

    tasks: str = flag("paper", metavar="LIST")
    """NAME[:SHOTS[:METRIC]],... of lm-evaluation-harness or --include-path; `paper` is
    arc_challenge:25:acc_norm,hellaswag:10:acc_norm,mmlu:5:acc,truthfulqa_mc2:0:acc (default)"""


def _plan(options: BenchmarkOptions, models: Sequence[NamedModel]) -> Plan:
    from megatron_longrope.evaluation.harness import check_original_factors
    from megatron_longrope.evaluation.targets import targets_at

    targets = targets_at(models, options.longrope_config)
    for target in targets:
        check_original_factors(target.config, options.max_length)
    return plan_tasks(
        options, models, targets, lambda target: target.config.original_max_position_embeddings
    )


SHORT = Kind(
    "short",
    help="short benchmarks through lm-evaluation-harness",
    description="The paper's Open LLM leaderboard tasks, or any other of lm-evaluation-harness "
    "(pip install lm-eval), scored by the engine with the factors of the original window. Longer "
    "prompts lose their beginning, are counted and reported. Nothing is downloaded unless "
    "--allow-download is given.",
    options=BenchmarkOptions,
    plan=_plan,
    unit="tasks",
    summary=lambda rows: [{name: row.get(name) for name in COLUMNS} for row in rows],
    key=("task", "num_fewshot", "metric", *_SETTINGS),
    required=REQUIRED,
    optional=OPTIONAL,
    sections=lambda rows, _: task_sections(rows, "short_benchmarks", "Short benchmarks", _SETTINGS),
)
