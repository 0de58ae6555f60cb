"""What a comparison was measured on and how: checkpoints, factor files, data, seeds, versions."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from megatron_longrope.report.comparison import distinct, perplexity_groups
from megatron_longrope.report.document import facts_table, row_head, table
from megatron_longrope.report.reading import Measurements
from megatron_longrope.report.results import ABSENT

_SHORT_HASH = 12
"""Characters of a sha256 that are shown."""


def method_section(measurements: Measurements) -> str:
    """What was measured and how: checkpoints, factor files, protocols, data, seeds, versions."""
    names = ("Shown as", "Checkpoint", "Iteration", "Factors", "sha256", "Window")
    head = "".join(f'<th scope="col" class="text">{name}</th>' for name in names)
    body = []
    for subject in measurements.subjects:
        identity = subject.identity
        factors = identity.config or identity.label or ABSENT
        factors = "the checkpoint's own" if factors == "checkpoint" else factors
        if identity.policy:
            factors += f" ({identity.policy})"
        window = f"{subject.original_length:,}" if subject.original_length else ABSENT
        cells = (
            identity.checkpoint or identity.model, identity.iteration or ABSENT, factors,
            identity.config_sha256[:_SHORT_HASH] or ABSENT, window,
        )  # fmt: skip
        values = (f'<td class="text">{escape(cell)}</td>' for cell in cells)
        body.append(row_head(subject.name) + "".join(values))
    text = f"<section>\n<h2>Measured how</h2>\n{table(head, body)}"
    text += '<p class="note">Window: tokens of pre-training.</p>\n</section>'
    return text + facts_table("Data, seeds and versions", _facts(measurements))


def source_of(measurements: Measurements) -> str:
    """Names of the files that the numbers come from."""
    names = ["results.json"] if measurements.results else []
    names += [
        f"{kind}.jsonl"
        for kind, rows in measurements.rows.items()
        if any("kind" in row for _, row in rows)
    ]
    return ", ".join(names)


def _facts(measurements: Measurements) -> dict[str, Any]:
    rows = {kind: [row for _, row in measurements.of(kind)] for kind in measurements.rows}
    facts: dict[str, Any] = {}
    for group in perplexity_groups(measurements):
        name = f"Perplexity, {group.protocol}" + (f", {group.detail}" if group.detail else "")
        some = [row for by_length in group.rows.values() for row in by_length.values()]
        tokens = [row["num_tokens"] for row in some if "num_tokens" in row]
        values = {
            "sources": distinct(some, "sources"),
            "strides used": distinct(some, "stride") if group.protocol != "truncated" else [],
            "scored tokens": _span(tokens),
            "windows": _span([row["num_windows"] for row in some if "num_windows" in row]),
        }
        facts |= {f"{name}: {key}": value for key, value in values.items() if value}
    for kind, name in (("passkey", "Passkey"), ("needle", "Needle")):
        values = {
            "scoring": distinct(rows.get(kind, ()), "scoring"),
            "tasks": distinct(rows.get(kind, ()), "task"),
            "seeds": distinct(rows.get(kind, ()), "seed"),
            "tokens of the prompts": _span(
                [row["num_tokens"] for row in rows.get(kind, ()) if "num_tokens" in row]
            ),
        }
        facts |= {f"{name}: {key}": value for key, value in values.items() if value}
    values = {
        "lm-evaluation-harness": distinct(rows.get("short", ()), "lm_eval_version"),
        "longest input": distinct(rows.get("short", ()), "max_length"),
        "examples": distinct(rows.get("short", ()), "samples"),
    }
    facts |= {f"Short benchmarks: {key}": value for key, value in values.items() if value}
    for results in measurements.results:
        facts |= {f"results.json: {key}": value for key, value in results["versions"].items()}
        if results.get("seed") is not None:
            facts["results.json: seed"] = results["seed"]
    seconds = sum(row.get("seconds") or 0 for some in rows.values() for row in some)
    if seconds:
        facts["Time of all measurements, hours"] = f"{seconds / 3600:.2f}"
    return facts


def _span(values: Sequence[int]) -> str:
    """`10`, or `10 to 2,000` where they differ; empty without values."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
