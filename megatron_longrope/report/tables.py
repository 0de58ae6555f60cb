"""A comparison in a sentence and as plain text for the terminal."""

from __future__ import annotations

import math

from megatron_longrope.lengths import format_length
from megatron_longrope.report.comparison import (
    RetrievalGroup,
    benchmark_table,
    best_of,
    needle_groups,
    passkey_groups,
    perplexity_groups,
)
from megatron_longrope.report.reading import Measurements, is_finite
from megatron_longrope.report.results import ABSENT, summary_sentence, text_table
from megatron_longrope.report.style import format_score, shorten

_LONGEST_TEXT = 44
"""Characters of a name in a table of the terminal."""


def comparison_sentence(measurements: Measurements) -> str:
    """What the measurements say, in one sentence about the first kind that there is."""
    identities = [subject.identity for subject in measurements.subjects]
    models = {identity.model for identity in identities}
    things = "models" if len(models) == len(identities) else "models and factors"
    things = "sets of factors" if len(models) == 1 else things
    for group in perplexity_groups(measurements):
        values = {
            subject.name: {n: value for n, value in row.items() if is_finite(value)}
            for subject, row in group.values().items()
        }
        if not any(values.values()):
            continue
        if group.apart:
            return (
                f"Perplexities of {len(values)} {things} in {len(group.lengths)} lengths; not all "
                "of them were measured on the same tokens, so that no one is the lowest."
            )
        results = {"perplexity": values, "original_length": measurements.original_length}
        return summary_sentence(results, things)
    for name, groups in (
        ("passkey retrieval", passkey_groups(measurements)),
        ("needle recall", needle_groups(measurements)),
    ):
        for group in groups:
            return _retrieval_sentence(name, group)
    columns, rows = benchmark_table(measurements)
    models_text = f"{len(rows)} model{'s' if len(rows) != 1 else ''}"
    return f"{len(columns)} short benchmark{'s' if len(columns) != 1 else ''} of {models_text}."


def comparison_tables(measurements: Measurements) -> str:
    """Every table of the report as plain text; the best of a column gets a star."""
    blocks = []
    for group in perplexity_groups(measurements):
        title = ", ".join(part for part in ("Perplexity", group.protocol, group.detail) if part)
        shown = {
            subject.name: {n: (value, _score(value)) for n, value in row.items()}
            for subject, row in group.values().items()
        }
        blocks.append(_block(title, group.lengths, shown, lowest=True, without=group.apart))
        if group.warning:
            blocks[-1] += f"\n{group.warning}"
    for name, groups in (
        ("Passkey", passkey_groups(measurements)),
        ("Needle recall", needle_groups(measurements)),
    ):
        for group in groups:
            shown = {
                subject.name: {n: (t.share, f"{100 * t.share:.0f} %") for n, t in row.items()}
                for subject, row in group.by_length.items()
            }
            kind = group.kind.replace("_", " ")
            blocks.append(_block(f"{name}, {kind}", group.lengths, shown, lowest=False))
    columns, rows = benchmark_table(measurements)
    if columns:
        table = [["Short benchmarks", *(column.task for column in columns)]]
        for subject, row in rows.items():
            cells = (f"{row[c]['value']:.4f}" if c in row else ABSENT for c in columns)
            table.append([shorten(subject.name, _LONGEST_TEXT), *cells])
        blocks.append("\n".join(text_table(table)))
    return "\n\n".join(blocks)


def _block(
    title: str,
    lengths: list[int],
    shown: dict[str, dict[int, tuple[float, str]]],
    *,
    lowest: bool,
    without: list[int] | None = None,
) -> str:
    """One table; lengths in `without` have no best."""
    rows = [["", *(f"{format_length(length)} " for length in lengths)]]
    best = {
        length: best_of(
            {name: row[length][0] for name, row in shown.items() if length in row}, lowest=lowest
        )
        for length in lengths
        if length not in (without or ())
    }
    for name, row in shown.items():
        cells = [
            row[n][1] + ("*" if name in best.get(n, ()) else " ") if n in row else f"{ABSENT} "
            for n in lengths
        ]
        rows.append([shorten(name, _LONGEST_TEXT), *cells])
    lines = [title, *text_table(rows)]
    if any(best.values()):
        lines.append(f"* {'lowest' if lowest else 'highest'} of its column")
    return "\n".join(lines)


def _retrieval_sentence(name: str, group: RetrievalGroup) -> str:
    counts = {n: sum(n in row for row in group.by_length.values()) for n in group.lengths}
    length = max(n for n, count in counts.items() if count == max(counts.values()))
    column = {s.name: row[length].share for s, row in group.by_length.items() if length in row}
    highest = max(column.values())
    best = [subject for subject, share in column.items() if share == highest]
    whose = best[0] if len(best) == 1 else f"{len(best)} of {len(column)}"
    verb = "reaches" if len(best) == 1 else "reach"
    return f"At {length:,} tokens {whose} {verb} {highest:.0%} in {name}, the most measured there."


def _score(value: float) -> str:
    return format_score(value) if math.isfinite(value) else str(value)
