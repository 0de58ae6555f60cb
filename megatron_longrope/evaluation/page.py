"""The HTML page of a report: no scripts, no external resources, light, dark and print styles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from megatron_longrope import __version__
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.evaluation.drawing import (
    NEUTRALS,
    Drawing,
    format_ratio,
    format_score,
    style_of,
)
from megatron_longrope.evaluation.results import ABSENT, best_cells, measured_lengths
from megatron_longrope.lengths import format_length

_LIGHT = "--ink: #1b1d21; --muted: #5f6671; --grid: #e3e6ea; --paper: #fefefe; --accent: #0062a3;"
_DARK = "--ink: #e8eaed; --muted: #a2a9b4; --grid: #333941; --paper: #16191d; --accent: #6cb8ee;"
# The drawings carry the light colours, which paper and simple viewers keep.
_DARK_DRAWINGS = "\n".join(
    f'svg [style*="{kind}: {color}"] {{ {kind}: var({variable}) !important; }}'
    for color, variable in NEUTRALS.items()
    for kind in ("fill", "stroke")
)
_CSS = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{
:root {{ {_DARK} }}
{_DARK_DRAWINGS}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 54rem; padding: 3rem 1.5rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0; }}
h2 {{ font-size: 1.2rem; margin: 3rem 0 0.8rem; padding-top: 0.9rem;
  border-top: 1px solid var(--grid); }}
.run {{ color: var(--muted); margin: 0.3rem 0 0; }}
.summary {{ font-size: 1.15rem; line-height: 1.5; margin: 1.6rem 0 0; padding-left: 1rem;
  border-left: 3px solid var(--accent); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
table.wide {{ width: 100%; }}
th, td {{ padding: 0.42rem 0.7rem; text-align: right; vertical-align: baseline;
  border-bottom: 1px solid var(--grid); }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
th:last-child, td:last-child {{ padding-right: 0; }}
td.text, th.text {{ text-align: left; }}
thead th {{ font-weight: 600; vertical-align: bottom; border-bottom: 1.5px solid var(--muted); }}
tbody th {{ font-weight: 400; }}
small {{ display: block; font-size: 0.74rem; font-weight: 400; line-height: 1.3;
  color: var(--muted); }}
.absent, .note, figcaption {{ color: var(--muted); }}
.note, figcaption {{ font-size: 0.87rem; margin: 0.6rem 0 0; }}
figure {{ margin: 1.4rem 0 0; }}
figure svg {{ display: block; width: 100%; height: auto; }}
.facts {{ display: flex; flex-wrap: wrap; gap: 0 4rem; }}
.facts > div {{ flex: 1 1 18rem; }}
.bar {{ display: inline-block; height: 0.6rem; min-width: 1px; background: var(--accent); }}
td.track {{ width: 55%; text-align: left; }}
a {{ color: var(--accent); }}
footer {{ margin-top: 3.5rem; color: var(--muted); font-size: 0.87rem; }}
@page {{ margin: 18mm 16mm; }}
@media print {{
  :root {{ color-scheme: light; }}
  body {{ max-width: none; padding: 0; background: none; font-size: 9.5pt; }}
  h2 {{ break-after: avoid; margin-top: 2rem; }}
  figure, tr, .facts > div, .whole {{ break-inside: avoid; }}
  figure svg {{ width: 84%; }}
  .scroll {{ overflow: visible; }}
}}
"""

_FACTS = {
    "max_abs_logit_diff_short": "Largest logit difference, short window",
    "max_abs_logit_diff_long": "Largest logit difference, long window",
    "cp1_loss": "Loss on 1 context-parallel rank",
    "cp2_loss": "Loss on 2 context-parallel ranks",
}


def render_page(
    name: str,
    summary: str,
    results: Mapping[str, Any],
    drawings: Sequence[Drawing],
    sets: Sequence[tuple[str, LongRopeConfig, FactorSet]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        name (str): What was run; shown under the title.
        summary (str): The sentence at the top.
        results (Mapping): Checked results, see `results.check_results`.
        drawings (Sequence[Drawing]): Figures, whose PNG and CSV lie in `figures/` beside the page.
        sets (Sequence[tuple]): (file, configuration, factor set) of each set found.
        notes (Sequence[str]): What had to be left out, and why.
    """
    extras = {
        "perplexity": _perplexity_table(results),
        "rescale_factors": _factor_table(sets),
    }
    parts = [_section(drawing, extras.get(drawing.name, "")) for drawing in drawings]
    checks = [
        _facts("Conversion to Hugging Face", results["conversion"]),
        _facts("Context-parallel parity", _with_difference(results["cp_parity"])),
    ]
    parts += [f'<div class="facts">{"".join(checks)}</div>', _timings(results["seconds"])]
    setup = {**results["versions"]}
    if results.get("seed") is not None:
        setup["seed"] = results["seed"]
    parts.append(_facts("Versions and seed", setup))
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(f'<h2>Left out</h2>\n<ul class="note">{items}</ul>')
    window = results.get("original_length")
    about = f"{escape(name)} · original window {window:,} tokens" if window else escape(name)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}: context extension report</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>Context extension report</h1>
<p class="run">{about}</p>
<p class="summary">{escape(summary)}</p>
</header>
<main>
{_lines(parts)}
</main>
<footer>Written by megatron_longrope {escape(__version__)} from results.json.</footer>
</body>
</html>
"""


def _section(drawing: Drawing, extra: str) -> str:
    files = ", ".join(
        f'<a href="figures/{drawing.name}.{kind}">{kind.upper()}</a>' for kind in ("png", "csv")
    )
    return f"""<section>
<h2 id="{drawing.name}-title">{escape(drawing.title)}</h2>
{extra}
<figure>
{drawing.svg}
<figcaption>{escape(drawing.caption)} Files: {files}.</figcaption>
</figure>
</section>"""


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
    return _table("".join(head), body) + f'\n<p class="note">{note}</p>'


def _factor_table(sets: Sequence[tuple[str, LongRopeConfig, FactorSet]]) -> str:
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
    return _table(head, rows)


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    rows = [
        f'<th scope="row">{escape(label)}</th><td>{escape(value)}</td>'
        for label, value in _flatten(facts)
    ]
    return f"<div><h2>{title}</h2>\n{_table('', rows)}</div>" if rows else ""


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """(label, value) of every leaf; nested keys are joined."""
    for key, value in facts.items():
        label = prefix + _FACTS.get(key, str(key).replace("_", " "))
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{label}, ")
        elif isinstance(value, bool):
            yield label, "yes" if value else "no"
        elif isinstance(value, float):
            yield label, f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.6g}"
        elif isinstance(value, list | tuple):
            yield label, ", ".join(map(str, value))
        elif value is not None:
            yield label, str(value)


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
    return f'<section class="whole"><h2>Time</h2>\n{_table("", rows)}</section>'


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _table(head: str, rows: Sequence[str]) -> str:
    top = f"<thead><tr>{head}</tr></thead>\n" if head else ""
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table class="wide">\n{top}<tbody>\n{body}\n</tbody></table></div>'


def _lines(parts: Sequence[str]) -> str:
    return "\n".join(part for part in parts if part)
