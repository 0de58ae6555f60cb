"""Short benchmarks of lm-evaluation-harness."""

from __future__ import annotations

from megatron_longrope.evaluation.kind import NUMBER, TEXT, Kind

SHORT = Kind(
    "short",
    key=("task", "num_fewshot", "metric", "limit", "max_length", "seed", "tokenizer_sha256"),
    required={"task": TEXT, "metric": TEXT, "value": NUMBER},
    optional={"stderr": NUMBER},
)
