"""Figures of searches: rescale factors, progress and start tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.evaluation.table import format_ratio, format_score
from megatron_longrope.factor_search.journal import Evaluation, is_complete, is_failed
from megatron_longrope.lengths import format_length
from megatron_longrope.report.axes import panel_title, start_token_axis
from megatron_longrope.report.search_history import (
    SearchHistory,
    StartTokenCurve,
    read_history,
    reference_factors,
    start_token_curve,
)
from megatron_longrope.report.style import (
    LONGROPE,
    MUTED,
    Drawing,
    Style,
    finish,
    has_style,
    label_ends,
    panels,
    plot_line,
    score_axis,
    style_of,
    swatch,
)

_MARKS = ("Best so far", "Fully scored", "Scored in part", "Beyond the frame or failed")
"""Legend of the search progress, in order."""


def draw_search_figures(output: str | Path, journal: Path, target_length: int) -> list[Path]:
    """Draw the way to the factors that were found, these, and what start tokens did to perplexity.

    What the journal does not hold is not drawn: progress needs a candidate scored on every sample,
    the start-token curve needs one vector of factors scored with two different n_hat.

    Args:
        output (str | Path): `F.json`, which the search wrote; the files go to `F_figures`.
        journal (Path): Its evaluations.
        target_length (int): Window, in tokens, that was searched.

    Returns:
        list[Path]: `F_search_progress`, `F_rescale_factors` and `F_start_tokens`, each as .png and
            .csv, as far as they were drawn.
    """
    output = Path(output)
    history = read_history(output.stem, journal, output)
    config = LongRopeConfig.load(output)
    drawings = [draw_factors([(output.stem, config, config.factor_set_for(target_length))])]
    if any(map(is_complete, history.records)):
        drawings.insert(0, draw_search([history]))
    if curve := start_token_curve(history):
        drawings.append(draw_start_tokens([curve]))
    directory = output.with_name(f"{output.stem}_figures")
    return [
        path
        for drawing in drawings
        for path in drawing.save(directory, f"{output.stem}_{drawing.name}")
    ]


def draw_factors(sets: Sequence[tuple[str, LongRopeConfig, FactorSet]]) -> Drawing:
    """Draw rescale factors of each set against PI, NTK and YaRN at the same extension ratio."""
    rows: list[tuple[Any, ...]] = []
    used: dict[str, Style] = {}
    title = "Rescale factors by dimension"
    with panels(title, len(sets), "Dimension, fast to slow", "Rescale factor") as (figure, grid):
        for axes, (name, config, chosen) in zip(grid, sets, strict=True):
            ratio = chosen.max_length / config.original_max_position_embeddings
            curves = reference_factors(config, chosen.max_length)
            curves["longrope"] = chosen.rescale_factors
            every = max(1, config.rotary_dim // 2 // 8)
            for index, (method, values) in enumerate(curves.items()):
                style = LONGROPE if method == "longrope" else style_of(method)
                width = 2.0 if method == "longrope" else 1.4
                used[method] = style
                plot_line(
                    axes, range(len(values)), values, style, linewidth=width, clip_on=False,
                    markersize=4.2, markevery=(index * every // 4 % every, every), zorder=3 + index,
                )  # fmt: skip
                rows += [(name, chosen.max_length, method, i, v) for i, v in enumerate(values)]
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
        figure.legend(
            handles=[swatch(style) for style in used.values()],
            labels=[style.label for style in used.values()],
            loc="outside lower center", ncols=len(used), frameon=False,
        )  # fmt: skip
        return finish(
            figure, "rescale_factors",
            "A factor of 1 keeps a dimension's rotation, a factor of 2 halves its speed. "
            "PI, NTK and YaRN are drawn for the same extension ratio.",
            ("file", "max_length", "method", "dimension", "rescale_factor"), rows,
        )  # fmt: skip


def draw_search(histories: Sequence[SearchHistory]) -> Drawing:
    """Draw the best score after each evaluation of each search, with its known seeds."""
    rows: list[tuple[Any, ...]] = []
    used: dict[str, Line2D] = {}
    ylabel = _score_name(histories)
    with panels("Search progress", len(histories), "Evaluation", ylabel) as (figure, grid):
        for axes, history in zip(grid, histories, strict=True):
            best = history.best_scores
            rows += [
                (history.name, number, _finite(record.score), _finite(lowest), record.stopped or "",
                 record.num_start_tokens, forwards)
                for number, (record, lowest, forwards) in enumerate(
                    zip(history.records, best, history.sample_forwards, strict=True), start=1
                )
            ]  # fmt: skip
            first = next(value for value in best if math.isfinite(value))
            finite = [record.score for record in history.records if math.isfinite(record.score)]
            seeds = _shown(history.seeds)
            score_axis(axes, [first, best[-1], *seeds.values()], around=finite)
            count = max(len(best), 2)
            axes.set_xlim(1 - 0.012 * count, count)
            used |= _draw_candidates(axes, history.records)
            for method, score in seeds.items():
                seed = style_of(method)
                axes.axhline(score, color=seed.color, linestyle=seed.dashes, linewidth=1.3)
            used["Best so far"] = _draw_best(axes, best)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            named = [(best[-1], LONGROPE._replace(label="Best"))]
            named += [(score, style_of(method)) for method, score in seeds.items()]
            label_ends(axes, [
                (score, style._replace(marker=""), f"{style.label} {format_score(score)}", True)
                for score, style in named
            ])  # fmt: skip
            panel_title(axes, history.name, _search_detail(history))
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
    """Draw the score against the number of start tokens, the factors held fixed."""
    xlabel, ylabel = "Start tokens that keep their positions", _score_name(curves)
    rows: list[tuple[Any, ...]] = []
    with panels(f"{ylabel} by start tokens", len(curves), xlabel, ylabel) as (figure, grid):
        for axes, curve in zip(grid, curves, strict=True):
            counts, values = list(curve.points), list(curve.points.values())
            rows += [(curve.name, n, value, curve.num_samples) for n, value in curve.points.items()]
            score_axis(axes, values, bottom=0.2)
            start_token_axis(axes, counts, narrow=len(curves) > 1)
            if 0 in curve.points:
                axes.axhline(curve.points[0], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            plot_line(axes, counts, values, LONGROPE, clip_on=False, zorder=3)
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
            ("journal", "num_start_tokens", "score", "samples"), rows,
        )  # fmt: skip


def _score_name(drawn: Sequence[SearchHistory | StartTokenCurve]) -> str:
    return "Perplexity" if all(item.objective == "ppl" for item in drawn) else "Score"


def _draw_candidates(axes: Axes, records: Sequence[Evaluation]) -> dict[str, Line2D]:
    """Draw a light mark for each candidate; returns one artist of each kind by its legend label."""
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
    """Draw the running minimum as steps, with a dot at each improvement."""
    values = [value if math.isfinite(value) else math.nan for value in best]
    better = [
        index
        for index, value in enumerate(best)
        if value < (best[index - 1] if index else math.inf)
    ]
    (line,) = axes.step(
        range(1, len(best) + 1), values, where="post", color=LONGROPE.color, linewidth=2, zorder=4,
        marker="o", markevery=better, markersize=3.6 if len(better) <= 40 else 2.6, clip_on=False,
    )  # fmt: skip
    return line


def _shown(seeds: Mapping[str, float]) -> dict[str, float]:
    """Return the starting points with a style, and the best of the others, which can be dozens."""
    known = {name: score for name, score in seeds.items() if has_style(name)}
    others = {name: score for name, score in seeds.items() if name not in known}
    best = min(others, key=others.__getitem__, default=None)
    return known if best is None else {**known, best: others[best]}


def _search_detail(history: SearchHistory) -> str:
    failed = sum(map(is_failed, history.records))
    stopped = sum(record.stopped is not None for record in history.records)
    parts = [f"{len(history.records):,} evaluations"]
    parts += [f"{stopped:,} scored in part"] if stopped else []
    parts += [f"{failed:,} failed"] if failed else []
    return ", ".join(parts)


def _ring(axes: Axes, lowest: int, curve: StartTokenCurve) -> None:
    """Mark and name the lowest point; nothing can lie below it, so its label goes there."""
    score, counts = curve.points[lowest], list(curve.points)
    axes.plot(
        [lowest], [score], "o", color=LONGROPE.color, markerfacecolor="none",
        markersize=11, markeredgewidth=1.3, clip_on=False, zorder=4,
    )  # fmt: skip
    side = {counts[0]: "left", counts[-1]: "right"}.get(lowest, "center")
    axes.annotate(
        f"{format_score(score)} with {lowest}", (lowest, score), (0, -9), ha=side, va="top",
        textcoords="offset points", fontsize=8.5, fontweight="bold",
    )  # fmt: skip


def _curve_detail(curve: StartTokenCurve) -> str:
    values = f"{min(curve.factors):.3g} to {max(curve.factors):.3g}"
    whose = "of the best candidate" if curve.is_best else values
    return f"factors {whose}, {_samples(curve.num_samples)}"


def _samples(count: int) -> str:
    return f"{count} sample{'s' if count > 1 else ''}"


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else ""
