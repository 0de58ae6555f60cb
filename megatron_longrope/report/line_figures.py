"""Figures that compare models by perplexity, over the length and over the place in the window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from megatron_longrope.lengths import format_length
from megatron_longrope.report.axes import length_axis
from megatron_longrope.report.comparison import PerplexityGroup
from megatron_longrope.report.naming import Subject
from megatron_longrope.report.reading import is_finite
from megatron_longrope.report.style import (
    Drawing,
    Style,
    blank_figure,
    finish,
    label_ends,
    plot_line,
    score_axis,
    shorten,
    swatch,
)

_END_LABEL = 26  # characters that fit beside a line's end

SUBJECT_FIELDS = ("subject", "model", "label", "policy", "iteration")
"""First columns of every data file."""


def subject_cells(subject: Subject) -> tuple[Any, ...]:
    """The first columns of a subject's rows in a data file."""
    identity = subject.identity
    rest = (identity.model, identity.label, identity.policy, identity.iteration)
    return (subject.name, *("" if item is None else item for item in rest))


def draw_perplexity_group(
    group: PerplexityGroup, styles: Mapping[Subject, Style], original_length: int | None
) -> Drawing | None:
    """Perplexity against length, a line for each subject; None without a finite value."""
    lines = {
        subject: {length: value for length, value in row.items() if is_finite(value)}
        for subject, row in group.values().items()
    }
    lines = {subject: row for subject, row in lines.items() if row}
    if not lines:
        return None
    with _lines_figure(shorten(group.title, 90), 4.4, [styles[s] for s in lines]) as (
        figure,
        axes,
        beside,
    ):
        for subject, row in lines.items():
            plot_line(axes, list(row), list(row.values()), styles[subject], clip_on=False, zorder=3)
        score_axis(axes, [value for row in lines.values() for value in row.values()])
        axes.set_ylabel("Perplexity (lower is better)")
        lengths = sorted({length for row in lines.values() for length in row})
        length_axis(axes, lengths, original_length)
        if beside:
            label_ends(axes, [
                (row[max(row)], styles[s], s.name, max(row) == lengths[-1])
                for s, row in lines.items()
            ])  # fmt: skip
        rows = [
            (*subject_cells(subject), group.protocol, length, row["ppl_window_mean"],
             row.get("ppl_token_weighted", ""), row.get("requested_stride") or "",
             row.get("stride", ""), row.get("num_windows", ""), row.get("num_tokens", ""),
             row.get("sha256", ""))
            for subject, by_length in group.rows.items() for length, row in by_length.items()
        ]  # fmt: skip
        return finish(
            figure, group.name, _perplexity_caption(group),
            (*SUBJECT_FIELDS, "protocol", "length", "ppl_window_mean", "ppl_token_weighted",
             "requested_stride", "stride", "num_windows", "num_tokens", "sha256"), rows,
        )  # fmt: skip


def draw_positions(group: PerplexityGroup, styles: Mapping[Subject, Style]) -> Drawing | None:
    """Loss by the token's place in the window, at the longest length that has it."""
    having = [
        (length, subject)
        for subject, row in group.rows.items()
        for length, record in row.items()
        if any(is_finite(bucket["nll"]) for bucket in record.get("nll_by_position") or ())
    ]
    if not having:
        return None
    longest = max(length for length, _ in having)
    lines = {
        subject: _buckets(group.rows[subject][longest])
        for length, subject in having
        if length == longest
    }
    title = f"Loss by position in a window of {format_length(longest)}"
    with _lines_figure(title, 3.2, [styles[s] for s in lines]) as (figure, axes, beside):
        for subject, points in lines.items():
            plot_line(axes, *zip(*points, strict=True), styles[subject], clip_on=False, zorder=3)
        score_axis(axes, [value for points in lines.values() for _, value in points])
        axes.set_xlim(0, longest)
        axes.xaxis.set_major_locator(FixedLocator([longest * part / 8 for part in range(9)]))
        axes.xaxis.set_major_formatter(FuncFormatter(_position))
        axes.set(xlabel="Position in the window (tokens)", ylabel="Loss (nats per token)")
        if beside:
            far = max(points[-1][0] for points in lines.values())
            label_ends(axes, [
                (points[-1][1], styles[s], s.name, points[-1][0] == far)
                for s, points in lines.items()
            ])  # fmt: skip
        rows = [
            (*subject_cells(subject), longest, bucket["from"], bucket["nll"],
             bucket.get("tokens", ""))
            for subject in lines
            for bucket in group.rows[subject][longest]["nll_by_position"]
        ]  # fmt: skip
        return finish(
            figure, f"{group.name}_by_position",
            "Mean loss of the scored tokens in each part of the window, drawn at the part's "
            "middle. It falls where the model uses what stands before, and rises where positions "
            "are beyond it.",
            (*SUBJECT_FIELDS, "length", "from", "nll", "tokens"), rows,
        )  # fmt: skip


@contextmanager
def _lines_figure(
    title: str, height: float, styles: Sequence[Style]
) -> Iterator[tuple[Figure, Axes, bool]]:
    """A figure with one axes for lines, and whether their names fit beside their ends.

    Where they do not, a legend below the axes has them.
    """
    names = [style.label for style in styles]
    beside = len(names) <= height * 3.2 and max(map(len, names)) <= _END_LABEL
    columns = 3 if max(map(len, names)) <= 30 else 2 if max(map(len, names)) <= 48 else 1
    below = 0.0 if beside else 0.2 * math.ceil(len(names) / columns)
    with blank_figure(title, height + below) as figure:
        axes = figure.add_subplot()
        if not beside:
            figure.legend(
                handles=[swatch(style) for style in styles],
                labels=[shorten(name, 96) for name in names],
                loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5,
            )  # fmt: skip
        yield figure, axes, beside


def _position(value: float, _: Any) -> str:
    return format_length(round(value)) if value else "0"


def _buckets(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(middle of the part, loss) of each part of the window that has a finite loss."""
    buckets = sorted(record["nll_by_position"], key=lambda bucket: bucket["from"])
    ends = [bucket["from"] for bucket in buckets[1:]] + [record["length"]]
    return [
        ((bucket["from"] + end) / 2, bucket["nll"])
        for bucket, end in zip(buckets, ends, strict=True)
        if is_finite(bucket["nll"])
    ]


def _perplexity_caption(group: PerplexityGroup) -> str:
    protocols = {
        "truncated": "Protocol: truncated, one window at the start of each document.",
        "sliding": "Protocol: sliding windows over whole documents.",
        "sampled": "Protocol: sampled, windows that do not overlap and leave tokens between them.",
        "sampled and sliding": "Protocol: windows at one stride, sampled where they are shorter "
        "than it and sliding where they are longer.",
        "results.json": "Numbers as in results.json, which names no protocol.",
    }
    text = protocols.get(group.protocol, f"Protocol: {group.protocol}.")
    if group.detail:
        text += f" {group.detail[0].upper()}{group.detail[1:]}."
    if group.protocol != "results.json":
        text += " Drawn: exp of the unweighted mean over windows, the paper's number."
    lost = sum(not is_finite(value) for row in group.values().values() for value in row.values())
    if lost:
        text += f" {lost} value{'s are' if lost > 1 else ' is'} not finite and not drawn."
    return text
