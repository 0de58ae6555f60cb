"""The figures of a report: perplexity, rescale factors, search, start tokens and passkey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.evaluation.statistics import wilson_interval
from megatron_longrope.frequencies import named_factors
from megatron_longrope.lengths import format_length
from megatron_longrope.report.axes import length_axis, note_above, panel_title, start_token_axis
from megatron_longrope.report.search_trace import (
    SearchTrace,
    StartTokenCurve,
    start_token_curve,
)
from megatron_longrope.report.style import (
    INK,
    METHODS,
    MUTED,
    PAPER,
    Drawing,
    blank_figure,
    finish,
    format_ratio,
    format_score,
    has_style,
    label_ends,
    method_legend,
    panels,
    plot_line,
    score_axis,
    style_of,
)
from megatron_longrope.search.journal import Evaluation, is_complete, is_failed
from megatron_longrope.search.problem import SearchProblem
from megatron_longrope.search.space import Candidate

_MARKS = ("Best so far", "Fully scored", "Scored in part", "Beyond the frame or failed")
"""Legend of the search progress, in order."""


def draw_perplexity(
    perplexity: Mapping[str, Mapping[int, float]], original_length: int | None
) -> Drawing:
    """Perplexity against length, one line for each method that has values."""
    shown = {method: dict(sorted(row.items())) for method, row in perplexity.items() if row}
    lengths = sorted({length for row in shown.values() for length in row})
    with blank_figure("Perplexity by sequence length", 4.4) as figure:
        axes = figure.add_subplot()
        for method, row in shown.items():
            plot_line(
                axes, list(row), list(row.values()), style_of(method), clip_on=False, zorder=3
            )
        score_axis(axes, [value for row in shown.values() for value in row.values()])
        axes.set_ylabel("Perplexity (lower is better)")
        length_axis(axes, lengths, original_length)
        ends = [(row[max(row)], style_of(method)) for method, row in shown.items()]
        reach = [max(row) == lengths[-1] for row in shown.values()]
        label_ends(axes, [(*end, end[1].label, far) for end, far in zip(ends, reach, strict=True)])
        rows = [
            (method, length, value)
            for method, row in shown.items()
            for length, value in row.items()
        ]
        return finish(
            figure, "perplexity",
            "Lines to the right of the original window are extrapolation or extension. "
            "Labels stand in the order in which the lines end.",
            ("method", "length", "perplexity"), rows,
        )  # fmt: skip


def draw_search_figures(
    records: Sequence[Evaluation],
    problem: SearchProblem,
    winner: Candidate,
    directory: str | Path,
    *,
    name: str,
    seeds: Mapping[str, float] | None = None,
) -> list[Path]:
    """Draw the way to the winner, its factors, and what start tokens did to perplexity.

    What the records do not hold is not drawn: progress needs a candidate scored on every sample,
    the start-token curve needs one vector of factors scored with two different n_hat.

    Args:
        records (Sequence): The journal's evaluations, in any order.
        problem (SearchProblem): What was searched.
        winner (Candidate): The result.
        directory (str | Path): Where the files go; made if it does not exist.
        name (str): What the search is called; the files start with it.
        seeds (Mapping, optional): Perplexity of each named starting point. Defaults to what the
            records say of the problem's seeds.

    Returns:
        list[Path]: `<name>_search_progress`, `<name>_rescale_factors` and `<name>_start_tokens`,
            each as .png and .csv, as far as they were drawn.
    """
    names: dict[tuple[float, ...], str] = {}
    for seed, candidate in problem.seeds.items():
        names.setdefault(problem.factor_set(candidate).rescale_factors, seed)
    trace = SearchTrace(name, records, names, seeds)
    config = problem.config(winner)
    drawings = [draw_factors([(name, config, config.factor_set_for(problem.target_length))])]
    if any(map(is_complete, trace.records)):
        drawings.insert(0, draw_search([trace]))
    if curve := start_token_curve(trace):
        drawings.append(draw_start_tokens([curve]))
    return [
        path for drawing in drawings for path in drawing.save(directory, f"{name}_{drawing.name}")
    ]


def draw_factors(sets: Sequence[tuple[str, LongRopeConfig, FactorSet]]) -> Drawing:
    """Rescale factors of each set against PI, NTK and YaRN at the same extension ratio."""
    rows: list[tuple[Any, ...]] = []
    used: dict[str, None] = {}
    title = "Rescale factors by dimension"
    with panels(title, len(sets), "Dimension, fast to slow", "Rescale factor") as (figure, grid):
        for axes, (name, config, chosen) in zip(grid, sets, strict=True):
            ratio = chosen.max_length / config.original_max_position_embeddings
            curves = {**reference_factors(config, ratio), "longrope_search": chosen.rescale_factors}
            every = max(1, config.rotary_dim // 2 // 8)
            for index, (method, values) in enumerate(curves.items()):
                style = style_of(method)
                width = 2.0 if method == "longrope_search" else 1.4
                plot_line(
                    axes, range(len(values)), values, style, linewidth=width, clip_on=False,
                    markersize=4.2, markevery=(index * every // 4 % every, every), zorder=3 + index,
                )  # fmt: skip
                origin = "longrope" if method == "longrope_search" else method
                rows += [(name, chosen.max_length, origin, i, v) for i, v in enumerate(values)]
            used |= dict.fromkeys(curves)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_ylim(bottom=min(0.94, *axes.get_ylim()))
            detail = f"up to {format_length(chosen.max_length)} tokens "
            detail += f"({format_ratio(ratio)}\N{MULTIPLICATION SIGN})"
            if chosen.num_start_tokens:
                detail += f", {chosen.num_start_tokens} start tokens"
            panel_title(axes, name, detail)
        method_legend(figure, used, {"longrope_search": "LongRoPE"})
        return finish(
            figure, "rescale_factors",
            "A factor of 1 keeps a dimension's rotation, a factor of 2 halves its speed. "
            "PI, NTK and YaRN are drawn for the same extension ratio.",
            ("file", "max_length", "method", "dimension", "rescale_factor"), rows,
        )  # fmt: skip


def draw_search(traces: Sequence[SearchTrace]) -> Drawing:
    """Best score after each evaluation of each search, with the scores of its known seeds."""
    rows: list[tuple[Any, ...]] = []
    used: dict[str, Line2D] = {}
    with panels("Search progress", len(traces), "Evaluation", "Perplexity") as (figure, grid):
        for axes, trace in zip(grid, traces, strict=True):
            best = trace.best_scores
            rows += [
                (trace.name, number, _finite(record.score), _finite(lowest), record.stopped or "",
                 record.num_start_tokens, forwards)
                for number, (record, lowest, forwards) in enumerate(
                    zip(trace.records, best, trace.sample_forwards, strict=True), start=1
                )
            ]  # fmt: skip
            first = next(value for value in best if math.isfinite(value))
            finite = [record.score for record in trace.records if math.isfinite(record.score)]
            seeds = _shown(trace.seeds)
            score_axis(axes, [first, best[-1], *seeds.values()], around=finite)
            count = max(len(best), 2)
            axes.set_xlim(1 - 0.012 * count, count)
            used |= _draw_candidates(axes, trace.records)
            for method, score in seeds.items():
                seed = style_of(method)
                axes.axhline(score, color=seed.color, linestyle=seed.dashes, linewidth=1.3)
            used["Best so far"] = _draw_best(axes, best)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            named = [(best[-1], METHODS["longrope_search"]._replace(label="Best"))]
            named += [(score, style_of(method)) for method, score in seeds.items()]
            label_ends(axes, [
                (score, style._replace(marker=""), f"{style.label} {format_score(score)}", True)
                for score, style in named
            ])  # fmt: skip
            panel_title(axes, trace.name, _search_detail(trace))
        order = [label for label in _MARKS if label in used]
        figure.legend(
            handles=[used[label] for label in order], labels=order, loc="outside lower center",
            ncols=len(order), frameon=False, numpoints=1,
        )  # fmt: skip
        return finish(
            figure, "search_progress",
            "The line is the best candidate so far among those scored on every sample. Those "
            "scored in part have an estimate or a bound, which never counts as best. Triangles at "
            "the top edge are beyond the frame or failed. Named lines are starting "
            "points: the published methods, and the best of the others.",
            ("journal", "evaluation", "score", "best_score", "stopped", "num_start_tokens",
             "sample_forwards"), rows,
        )  # fmt: skip


def draw_start_tokens(curves: Sequence[StartTokenCurve]) -> Drawing:
    """Perplexity against the number of start tokens, the factors held fixed."""
    style = METHODS["longrope_search"]
    xlabel, ylabel = "Start tokens that keep their positions", "Perplexity"
    rows: list[tuple[Any, ...]] = []
    with panels("Perplexity by start tokens", len(curves), xlabel, ylabel) as (figure, grid):
        for axes, curve in zip(grid, curves, strict=True):
            counts, values = list(curve.points), list(curve.points.values())
            rows += [(curve.name, n, value, curve.num_samples) for n, value in curve.points.items()]
            score_axis(axes, values, bottom=0.2)
            start_token_axis(axes, counts, narrow=len(curves) > 1)
            if 0 in curve.points:
                axes.axhline(curve.points[0], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            plot_line(axes, counts, values, style, clip_on=False, zorder=3)
            lowest = min(curve.points, key=curve.points.__getitem__)
            _ring(axes, lowest, curve)
            panel_title(axes, curve.name, _curve_detail(curve))
        samples = sorted({curve.num_samples for curve in curves})
        many = _samples(samples[0])
        if len(samples) > 1:
            many = f"{samples[0]} to {samples[-1]} samples, the same ones within a panel"
        return finish(
            figure, "start_tokens",
            f"Each point is the same rescale factors with another number of start tokens, over "
            f"{many}. The ring marks the lowest, the dashed line no start tokens.",
            ("journal", "num_start_tokens", "perplexity", "samples"), rows,
        )  # fmt: skip


def draw_passkey(
    passkey: Mapping[int, float], trials: int | None, original_length: int | None
) -> Drawing:
    """Passkey accuracy as one bar for each length, with 95 % Wilson intervals."""
    lengths = sorted(passkey)
    values = [passkey[length] for length in lengths]
    places = range(len(lengths))
    count = f", {trials} trials per length" if trials else ""
    with blank_figure(f"Passkey retrieval{count}", 3.3) as figure:
        axes = figure.add_subplot()
        axes.bar(places, values, width=0.62, color=METHODS["longrope_search"].color, zorder=2)
        bounds = [wilson_interval(v, trials) if trials else (v, v) for v in values]
        for place, value, (low, high) in zip(places, values, bounds, strict=True):
            if trials:
                axes.plot([place, place], [low, high], color=PAPER, linewidth=3.4, zorder=3)
                axes.plot([place, place], [low, high], color=INK, linewidth=1.3, zorder=4)
            axes.annotate(f"{value:.0%}", (place, max(value, high)), (0, 4), ha="center",
                          textcoords="offset points", fontweight="bold")  # fmt: skip
        within = sum(length <= original_length for length in lengths) if original_length else 0
        if within:
            axes.axvline(within - 0.5, color=MUTED, linewidth=0.9, zorder=1)
            note_above(axes, within - 0.5, "original window ends")
        axes.set_xticks(places, [format_length(length) for length in lengths])
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.7, len(lengths) - 0.3)
        axes.set_ylim(0, 1.12)
        axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set(xlabel="Sequence length (tokens)", ylabel="Keys retrieved")
        bars = " Thin bars are 95 % Wilson intervals." if trials else ""
        return finish(
            figure, "passkey",
            f"Share of hidden keys that the model repeated exactly{count}.{bars}",
            ("length", "accuracy", "trials"),
            [(length, passkey[length], trials or "") for length in lengths],
        )  # fmt: skip


def reference_factors(config: LongRopeConfig, ratio: float) -> dict[str, list[float]]:
    """Factors of PI, NTK and YaRN for the geometry; none where the ratio extends nothing."""
    if ratio <= 1 or config.rotary_dim < 4:
        return {}
    geometry = (config.rotary_base, config.original_max_position_embeddings)
    return {
        name: named_factors(name, config.rotary_dim, ratio, *geometry)
        for name in ("pi", "ntk", "yarn")
    }


def _draw_candidates(axes: Axes, records: Sequence[Evaluation]) -> dict[str, Line2D]:
    """A light mark for each candidate; returns one artist of each kind by its legend label."""
    top = axes.get_ylim()[1]
    size, alpha = (3.4, 0.5) if len(records) <= 300 else (2.2, 0.38)
    kinds: dict[str, list[tuple[int, float]]] = {label: [] for label in _MARKS[1:]}
    for number, record in enumerate(records, start=1):
        if record.score > top:
            kinds["Beyond the frame or failed"].append((number, top))
        else:
            label = "Fully scored" if record.stopped is None else "Scored in part"
            kinds[label].append((number, record.score))
    marks = {
        "Fully scored": {"marker": "o", "markeredgewidth": 0},
        "Scored in part": {"marker": "x", "markeredgewidth": 0.8},
        "Beyond the frame or failed": {"marker": "^", "markeredgewidth": 0},
    }
    return {
        label: axes.plot(
            *zip(*points, strict=True), linestyle="", color=MUTED, markersize=size, alpha=alpha,
            clip_on=False, **marks[label],
        )[0]
        for label, points in kinds.items() if points  # one without points would break the layout
    }  # fmt: skip


def _draw_best(axes: Axes, best: Sequence[float]) -> Line2D:
    """The running minimum as steps, with a dot at each improvement."""
    values = [value if math.isfinite(value) else math.nan for value in best]
    better = [
        index
        for index, value in enumerate(best)
        if value < (best[index - 1] if index else math.inf)
    ]
    style = METHODS["longrope_search"]
    (line,) = axes.step(
        range(1, len(best) + 1), values, where="post", color=style.color, linewidth=2, zorder=4,
        marker="o", markevery=better, markersize=3.6 if len(better) <= 40 else 2.6, clip_on=False,
    )  # fmt: skip
    return line


def _shown(seeds: Mapping[str, float]) -> dict[str, float]:
    """The starting points with a style, and the best of the others, which can be dozens."""
    known = {name: score for name, score in seeds.items() if has_style(name)}
    others = {name: score for name, score in seeds.items() if name not in known}
    best = min(others, key=others.__getitem__, default=None)
    return known if best is None else {**known, best: others[best]}


def _search_detail(trace: SearchTrace) -> str:
    failed = sum(map(is_failed, trace.records))
    stopped = sum(record.stopped is not None for record in trace.records)
    parts = [f"{len(trace.records):,} evaluations"]
    parts += [f"{stopped:,} scored in part"] if stopped else []
    parts += [f"{failed:,} failed"] if failed else []
    return ", ".join(parts)


def _ring(axes: Axes, lowest: int, curve: StartTokenCurve) -> None:
    """Mark and name the lowest point; nothing can lie below it, so its label goes there."""
    score, counts = curve.points[lowest], list(curve.points)
    axes.plot(
        [lowest], [score], "o", color=METHODS["longrope_search"].color, markerfacecolor="none",
        markersize=11, markeredgewidth=1.3, clip_on=False, zorder=4,
    )  # fmt: skip
    side = {counts[0]: "left", counts[-1]: "right"}.get(lowest, "center")
    axes.annotate(
        f"{format_score(score)} with {lowest}", (lowest, score), (0, -9), ha=side, va="top",
        textcoords="offset points", fontsize=8.5, fontweight="bold",
    )  # fmt: skip


def _curve_detail(curve: StartTokenCurve) -> str:
    if curve.whose == "best":
        whose = "factors of the best candidate"
    elif curve.whose is not None:
        whose = f"factors of {style_of(curve.whose).label}"
    else:
        whose = f"factors {min(curve.factors):.3g} to {max(curve.factors):.3g}"
    return f"{whose}, {_samples(curve.num_samples)}"


def _samples(count: int) -> str:
    return f"{count} sample{'s' if count > 1 else ''}"


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else ""
