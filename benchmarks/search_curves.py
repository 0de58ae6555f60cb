"""What the runs of the search benchmark tell: forwards to reach a target, table, figure."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import measure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from megatron_longrope.evaluation.table import format_score
from megatron_longrope.report.style import (
    MUTED,
    Drawing,
    Style,
    blank_figure,
    finish,
    label_ends,
    plot_line,
    score_axis,
)

_HEADROOM = 1.06  # of the figure, above YaRN

Curve = list[tuple[int, float]]
"""(sample-forwards, perplexity), ascending; the perplexity holds until the next point."""

STYLES = {
    "released": Style("Released", "#D55E00", "s", (0, (5, 2))),
    "released_yarn": Style("Released, from YaRN", "#E69F00", "v", (0, (5, 2))),
    "evolution": Style("Evolution", "#0072B2", "o", "-"),
    "cma": Style("CMA-ES", "#009E73", "D", (0, (3, 1.5))),
    "cma_full": Style("CMA-ES, whole budget", "#009E73", "X", (0, (1, 1.2))),
}


@dataclass
class ArmRun:
    """What one seed of one arm did."""

    arm: str
    seed: int
    search: Curve = field(default_factory=list)
    """Best perplexity on the search text; a point for every improvement."""

    held_out: Curve = field(default_factory=list)
    """Perplexity of the best candidate on other documents; a point wherever it was looked at."""

    forwards: int = 0
    """Sample-forwards spent."""

    evaluations: int = 0
    """Candidates scored."""

    notes: dict[str, Any] = field(default_factory=dict)
    """Whatever else is worth knowing."""


def forwards_to_reach(curve: Curve, target: float) -> float:
    """Forwards of the first point from which on the curve stays at or below `target`.

    A held-out curve may touch the target by luck and leave it again; that does not count.

    Returns:
        float: Infinity when the curve ends above the target.
    """
    reached = math.inf
    for forwards, value in reversed(curve):
        if value > target:
            break
        reached = forwards
    return reached


def value_at(curve: Curve, forwards: int) -> float | None:
    """The curve's value after so many forwards; None before its first point."""
    place = bisect.bisect_right(curve, forwards, key=lambda point: point[0])
    return curve[place - 1][1] if place else None


def summarise(
    finished: Sequence[ArmRun], baseline: str, others: Sequence[str] = ()
) -> dict[str, Any]:
    """Targets, one row for each arm, and the ratio of the best of our arms.

    The target is what `baseline` ends with; without a run of it there is nothing to reach: targets
    and ratio are None then.

    Args:
        others (Sequence[str]): Arms that are not ours either.
    """
    arms = {
        arm: [t for t in finished if t.arm == arm] for arm in dict.fromkeys(t.arm for t in finished)
    }
    reference = arms.get(baseline, [])
    targets = {
        kind: statistics.median(getattr(run, kind)[-1][1] for run in reference)
        for kind in ("search", "held_out")
        if reference
    }
    budget = max((run.forwards for run in reference), default=0)
    rows = []
    for arm, runs in arms.items():
        row = {
            "arm": arm,
            "seeds": [run.seed for run in runs],
            "evaluations": [run.evaluations for run in runs],
            "forwards": [run.forwards for run in runs],
        }
        for kind in ("search", "held_out"):
            curves = [getattr(run, kind) for run in runs]
            row[f"final_{kind}_perplexity"] = _rounded(statistics.median(c[-1][1] for c in curves))
            row[f"final_{kind}_perplexities"] = [_rounded(curve[-1][1]) for curve in curves]
            if reference:
                reached = [forwards_to_reach(curve, targets[kind]) for curve in curves]
                median = statistics.median(reached)
                row[f"forwards_to_reach_{kind}"] = _finite(median)
                row[f"forwards_to_reach_{kind}_by_seed"] = list(map(_finite, reached))
                row[f"ratio_{kind}"] = _finite(median / budget)
        notes = [run.notes for run in runs]
        rows.append(row | ({"notes": notes} if any(notes) else {}))
    ratios = [
        row["ratio_held_out"]
        for row in rows
        if row["arm"] not in (baseline, *others) and row.get("ratio_held_out") is not None
    ]
    return {
        "ratio": min(ratios, default=None),
        "baseline_forwards": budget or None,
        "target_search_perplexity": _rounded(targets.get("search")),
        "target_held_out_perplexity": _rounded(targets.get("held_out")),
        "rows": rows,
    }


def print_summary(
    summary: Mapping[str, Any], orientation: Mapping[str, Mapping[str, float]]
) -> None:
    """Two tables: the starting points, if there are any, and the arms."""
    if orientation:
        measure.print_table(
            ("start", "search ppl", "held-out ppl"),
            [
                (name, *(format_score(value[text]) for text in ("search", "held_out")))
                for name, value in orientation.items()
            ],
        )
        print()

    def reached(row: Mapping[str, Any], kind: str) -> tuple[str, str]:
        forwards, ratio = row.get(f"forwards_to_reach_{kind}"), row.get(f"ratio_{kind}")
        return ("-", "-") if forwards is None else (f"{forwards:.0f}", f"{ratio:.3f}")

    measure.print_table(
        (
            "arm", "seeds", "forwards", "search ppl", "held-out ppl",
            "to search target", "ratio", "to held-out target", "ratio",
        ),
        [
            (
                row["arm"],
                len(row["seeds"]),
                max(row["forwards"]),
                f"{row['final_search_perplexity']:.3f}",
                f"{row['final_held_out_perplexity']:.3f}",
                *reached(row, "search"),
                *reached(row, "held_out"),
            )
            for row in summary["rows"]
        ],
    )  # fmt: skip


def draw_curves(finished: Sequence[ArmRun], yarn: float | None = None) -> Drawing:
    """Held-out perplexity against sample-forwards: median over seeds, smallest and largest.

    Args:
        finished (Sequence[ArmRun]): All runs; those of an arm are drawn as one line.
        yarn (float, optional): YaRN's held-out perplexity, drawn for orientation.
    """
    title = "Held-out perplexity against the cost of the search"
    ceiling = _HEADROOM * yarn if yarn else math.inf
    with blank_figure(title, 4.4) as figure:
        axes = figure.add_subplot()
        ends, values, rows = [], [], []
        for arm, style in STYLES.items():
            runs = [run for run in finished if run.arm == arm]
            if not runs:
                continue
            band = _band([run.held_out for run in runs])
            # The frame is for what is about as good as YaRN; a curve enters it from above.
            band = [point for point in band if point[2] <= ceiling] or band[-1:]
            xs, low, middle, high = zip(*band, strict=True)
            axes.fill_between(xs, low, high, step="post", color=style.color, alpha=0.16, lw=0)
            every = max(1, len(xs) // 9)
            plot_line(
                axes, xs, middle, style, drawstyle="steps-post", markevery=every, clip_on=False,
                zorder=3,
            )  # fmt: skip
            ends.append((xs[-1], middle[-1], style))
            values += [value for value in (*low, *high) if value <= ceiling]
            rows += [(arm, t.seed, "held_out", *point) for t in runs for point in t.held_out]
            rows += [(arm, t.seed, "search", *point) for t in runs for point in t.search]
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        score_axis(axes, [*values, *([yarn] if yarn else [])])
        axes.set_xlabel("Sample-forwards (one window through the model)")
        axes.set_ylabel("Perplexity (lower is better)")
        if yarn:
            axes.axhline(yarn, color=MUTED, linewidth=0.9, zorder=1)
            axes.annotate(
                "YaRN", (1, yarn), (-4, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", color=MUTED, fontsize=8,
            )  # fmt: skip
        last = max((end[0] for end in ends), default=0)
        label_ends(axes, [(value, style, style.label, x == last) for x, value, style in ends])
        return finish(
            figure, "search",
            "The best candidate so far on documents that the search never saw: median over seeds, "
            "the band from the best seed to the worst. Curves begin where they come within 6 % of "
            "YaRN.",
            ("arm", "seed", "text", "sample_forwards", "perplexity"), rows,
        )  # fmt: skip


def _band(curves: Sequence[Curve]) -> list[tuple[int, float, float, float]]:
    """(forwards, smallest, median, largest) wherever every curve has a value."""
    band = []
    for forwards in sorted({point[0] for curve in curves for point in curve}):
        values = [value_at(curve, forwards) for curve in curves]
        if None not in values:
            band.append((forwards, min(values), statistics.median(values), max(values)))
    return band


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
