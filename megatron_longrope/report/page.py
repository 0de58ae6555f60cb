"""The page about one run, from its `results.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.lengths import format_length
from megatron_longrope.report.document import facts_table, render_document, section, table
from megatron_longrope.report.results import ABSENT, best_cells, measured_lengths
from megatron_longrope.report.style import Drawing, format_ratio, format_score, style_of


def render_page(
    name: str,
    summary: str,
    results: Mapping[str, Any],
    drawings: Sequence[Drawing],
    sets: Sequence[tuple[str, LongRopeConfig, FactorSet]] = (),
    notes: Sequence[str] = (),
    extra_parts: Sequence[str] = (),
    origin: str = "results.json",
) -> str:
    """The whole page.

    Args:
        name (str): What was run; shown under the title.
        summary (str): The sentence at the top.
        results (Mapping): Checked results, see `results.check_results`.
        drawings (Sequence[Drawing]): Figures, whose PNG and CSV lie in `figures/` beside the page.
        sets (Sequence[tuple]): (file, configuration, factor set) of each set found.
        notes (Sequence[str]): What had to be left out, and why.
        extra_parts (Sequence[str]): HTML of further sections.
        origin (str): Files that the numbers come from.
    """
    extras = {
        "perplexity": _perplexity_table(results),
        "rescale_factors": factor_table(sets),
    }
    parts = [section(drawing, extras.get(drawing.name, "")) for drawing in drawings]
    checks = [
        facts_table("Conversion to Hugging Face", results["conversion"]),
        facts_table("Context-parallel parity", _with_difference(results["cp_parity"])),
    ]
    parts += [f'<div class="facts">{"".join(checks)}</div>', _timings(results["seconds"])]
    setup = {**results["versions"]}
    if results.get("seed") is not None:
        setup["seed"] = results["seed"]
    parts.append(facts_table("Versions and seed", setup))
    parts += [*extra_parts, left_out(notes)]
    window = results.get("original_length")
    about = f"{name} · original window {window:,} tokens" if window else name
    return render_document(name, about, summary, parts, origin)


def _perplexity_table(results: Mapping[str, Any]) -> str:
    perplexity, original = results["perplexity"], results.get("original_length")
    policies = results["attention_factor_policy"]
    best = best_cells(perplexity)
    lengths = measured_lengths(perplexity)
    head = ['<th scope="col">Method</th>']
    for length in lengths:
        times = f"<small>{format_ratio(length / original)}&times;</small>" if original else ""
        head.append(f'<th scope="col">{format_length(length)}{times}</th>')
    body = []
    for method, row in perplexity.items():
        cells = [f'<th scope="row">{escape(style_of(method).label)}</th>']
        for length in lengths:
            if length not in row:
                cells.append(f'<td class="absent">{ABSENT}</td>')
                continue
            shown = format_score(row[length])
            shown = f"<b>{shown}</b>" if (method, length) in best else shown
            policy = policies.get(method, {}).get(length)
            shown += f"<small>{escape(policy)}</small>" if policy else ""
            cells.append(f"<td>{shown}</td>")
        body.append("".join(cells))
    note = "Perplexity; the lowest of each length is bold."
    if original:
        note += " Under each length: its ratio to the original window."
    if any(policies.values()):
        note += " Under a value: the attention factor policy that gave it."
    return table("".join(head), body) + f'\n<p class="note">{note}</p>'


def factor_table(sets: Sequence[tuple[str, LongRopeConfig, FactorSet]]) -> str:
    """What the factor sets hold, a row for each (file, configuration, factor set)."""
    names = ("Up to", "Ratio", "Factors", "Start tokens", "Attention factor")
    head = '<th scope="col">File</th>' + "".join(f'<th scope="col">{item}</th>' for item in names)
    rows = []
    for name, config, item in sets:
        ratio = item.max_length / config.original_max_position_embeddings
        low, high = min(item.rescale_factors), max(item.rescale_factors)
        cells = (
            format_length(item.max_length),
            f"{format_ratio(ratio)}&times;",
            f"{low:.4g} to {high:.4g}",
            item.num_start_tokens,
            f"{config.attention_factor_for(item.max_length):.4f}",
        )
        rows.append(
            f'<th scope="row">{escape(name)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)
        )
    return table(head, rows)


def left_out(notes: Sequence[str]) -> str:
    """A section of what had to be left out; nothing if there are no notes."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<h2>Left out</h2>\n<ul class="note">{items}</ul>' if notes else ""


def _with_difference(parity: Mapping[str, float]) -> dict[str, float]:
    facts = dict(parity)
    if {"cp1_loss", "cp2_loss"} <= facts.keys():
        facts["Difference"] = abs(facts["cp1_loss"] - facts["cp2_loss"])
    return facts


def _timings(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    longest, total = max(seconds.values()) or 1.0, sum(seconds.values())
    rows = [
        f'<th scope="row">{escape(stage.replace("_", " "))}</th><td>{_duration(value)}</td>'
        '<td class="track">'
        f'<span class="bar" style="width: {100 * value / longest:.1f}%"></span></td>'
        for stage, value in seconds.items()
    ]
    rows.append(f'<th scope="row"><b>Total</b></th><td><b>{_duration(total)}</b></td><td></td>')
    return f'<section class="whole"><h2>Time</h2>\n{table("", rows)}</section>'


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
