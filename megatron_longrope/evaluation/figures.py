"""The figures of a report: perplexity, rescale factors, search progress and passkey accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.evaluation.drawing import (
    INK,
    METHODS,
    MUTED,
    PAPER,
    Drawing,
    blank_figure,
    finish,
    format_ratio,
    format_score,
    label_ends,
    length_axis,
    method_legend,
    note_above,
    panel_title,
    panels,
    plot_line,
    score_axis,
    style_of,
)
from megatron_longrope.evaluation.statistics import wilson_interval
from megatron_longrope.frequencies import named_factors
from megatron_longrope.lengths import format_length


@dataclass(frozen=True)
class SearchTrace:
    """What a search journal tells about the progress of its search."""

    name: str
    scores: tuple[float, ...]
    """One per evaluation, in order; infinity when it failed."""

    seeds: Mapping[str, float]
    """Score of each published method (`pi`, `ntk`, `yarn`) found among the starting points."""


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
    used: dict[str, None] = {"longrope_search": None}
    with panels("Search progress", len(traces), "Evaluation", "Perplexity") as (figure, grid):
        for axes, trace in zip(grid, traces, strict=True):
            best = _running_minimum(trace.scores)
            xs = range(1, len(best) + 1)
            rows += [
                (trace.name, *row)
                for row in zip(xs, map(_finite, trace.scores), map(_finite, best), strict=True)
            ]
            first = next(value for value in best if math.isfinite(value))
            score_axis(axes, [first, best[-1], *trace.seeds.values()], around=list(trace.scores))
            top = axes.get_ylim()[1]
            inside = [(x, y) for x, y in zip(xs, trace.scores, strict=True) if y <= top]
            above = [x for x, y in zip(xs, trace.scores, strict=True) if y > top]
            axes.plot(*zip(*inside, strict=True), ".", color=MUTED, markersize=3.2, alpha=0.5)
            if above:  # an empty artist without clipping would break the layout
                axes.plot(above, [top] * len(above), "^", color=MUTED, markersize=3.2, alpha=0.5,
                          clip_on=False)  # fmt: skip
            style = METHODS["longrope_search"]
            axes.step(xs, best, where="post", color=style.color, linewidth=2, zorder=4)
            for method, score in trace.seeds.items():
                seed = style_of(method)
                axes.axhline(score, color=seed.color, linestyle=seed.dashes, linewidth=1.3)
            used |= dict.fromkeys(trace.seeds)
            axes.set_xlim(1, max(len(best), 2))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            detail = f"best of {len(best)}: {format_score(best[-1])}"
            if trace.seeds:
                method = min(trace.seeds, key=trace.seeds.__getitem__)
                detail += f"; {METHODS[method].label}: {format_score(trace.seeds[method])}"
            panel_title(axes, trace.name, detail)
        method_legend(figure, used, {"longrope_search": "Best so far"}, markers=False)
        return finish(
            figure, "search_progress",
            "The line is the best candidate so far, each dot one candidate; triangles at the top "
            "edge are candidates beyond the frame or failed. Dashed lines are the published "
            "methods among the starting points.",
            ("journal", "evaluation", "score", "best_score"), rows,
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


def _running_minimum(scores: Sequence[float]) -> list[float]:
    best = math.inf
    return [best := min(best, score) for score in scores]


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else ""
