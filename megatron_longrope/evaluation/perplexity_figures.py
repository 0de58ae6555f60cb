"""Figures of perplexity: by sequence length, and by the token's place in the window."""

from __future__ import annotations

from collections import defaultdict

from megatron_longrope.evaluation.figure import Lines
from megatron_longrope.evaluation.kind import Row
from megatron_longrope.evaluation.series import Series
from megatron_longrope.evaluation.statistics import is_finite
from megatron_longrope.lengths import format_length

MEANS = {
    "ppl_window_mean": "exp of the unweighted mean over windows, the paper's number",
    "ppl_token_weighted": "exp of the mean over tokens",
}
"""Fields of a record that hold a mean, and what each is."""

ByLength = dict[Series, dict[int, Row]]
"""Of each series its record at each length."""


def curves(name: str, title: str, rows: ByLength, mean: str, window: int | None) -> Lines | None:
    """Return perplexity against length; nothing without a finite value."""
    lines = {
        series: {length: row[mean] for length, row in by.items() if is_finite(row[mean])}
        for series, by in rows.items()
    }
    lost = sum(len(rows[series]) - len(line) for series, line in lines.items())
    lines = {series: line for series, line in lines.items() if line}
    if not lines:
        return None
    caption = f"Drawn: {MEANS[mean]}."
    if lost:
        caption += f" {lost} value{'s are' if lost > 1 else ' is'} not finite and not drawn."
    header = (
        "length", "protocol", "ppl_window_mean", "ppl_token_weighted", "requested_stride", "stride",
        "num_windows", "num_tokens", "sha256",
    )  # fmt: skip
    data = [
        (series, [row.get(field, "") for field in header])
        for series, by in rows.items()
        for row in by.values()
    ]
    return Lines(name, title, caption, lines, "Sequence length (tokens)",
                 "Perplexity (lower is better)", True, window, header, data)  # fmt: skip


def by_position(name: str, rows: ByLength) -> Lines | None:
    """Return loss by the token's place in the window, at the longest length that has it."""
    having: dict[int, dict[Series, Row]] = defaultdict(dict)
    for series, by in rows.items():
        for length, row in by.items():
            if any(is_finite(bucket["nll"]) for bucket in row.get("nll_by_position") or ()):
                having[length][series] = row
    if not having:
        return None
    longest = max(having)
    data = [
        (series, (longest, bucket["from"], bucket["nll"], bucket.get("tokens", "")))
        for series, row in having[longest].items()
        for bucket in row["nll_by_position"]
    ]
    return Lines(
        f"{name}_by_position",
        f"Loss by position in a window of {format_length(longest)}",
        "Mean loss of the scored tokens in each part of the window, drawn at the part's middle. It "
        "falls where the model uses what stands before, and rises where positions are beyond it.",
        {series: _middles(row) for series, row in having[longest].items()},
        "Position in the window (tokens)",
        "Loss (nats per token)",
        False,
        longest,
        ("length", "from", "nll", "tokens"),
        data,
    )


def _middles(row: Row) -> dict[float, float]:
    """Return the finite loss of each part of the window by the part's middle."""
    buckets = sorted(row["nll_by_position"], key=lambda bucket: bucket["from"])
    ends = [bucket["from"] for bucket in buckets[1:]] + [row["length"]]
    return {
        (bucket["from"] + end) / 2: bucket["nll"]
        for bucket, end in zip(buckets, ends, strict=True)
        if is_finite(bucket["nll"])
    }
