"""The shell of a report's page: no scripts, no external resources, light, dark, print styles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from megatron_longrope import __version__
from megatron_longrope.report.results import ABSENT
from megatron_longrope.report.style import NEUTRALS, Drawing

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
.warning {{ font-size: 0.87rem; margin: 0.9rem 0; padding: 0.5rem 0.8rem;
  border: 1px solid var(--muted); border-left-width: 4px; }}
h3 {{ font-size: 1rem; margin: 1.8rem 0 0.4rem; }}
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
  h2, h3 {{ break-after: avoid; }}
  h2 {{ margin-top: 2rem; }}
  figure, tr, .facts > div, .whole, .warning {{ break-inside: avoid; }}
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


def render_document(name: str, about: str, summary: str, parts: Sequence[str], origin: str) -> str:
    """The page around its sections.

    Args:
        name (str): What was run, for the window's title.
        about (str): The line under the title.
        summary (str): The sentence at the top.
        parts (Sequence[str]): HTML of the sections; empty ones are left out.
        origin (str): Files that the numbers come from.
    """
    joined = "\n".join(part for part in parts if part)
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
<p class="run">{escape(about)}</p>
<p class="summary">{escape(summary)}</p>
</header>
<main>
{joined}
</main>
<footer>Written by megatron_longrope {escape(__version__)} from {escape(origin)}.</footer>
</body>
</html>
"""


def figure(drawing: Drawing) -> str:
    """A drawing with its caption and the links to its files."""
    files = ", ".join(
        f'<a href="figures/{drawing.name}.{kind}">{kind.upper()}</a>' for kind in ("png", "csv")
    )
    return f"""<figure>
{drawing.svg}
<figcaption>{escape(drawing.caption)} Files: {files}.</figcaption>
</figure>"""


def section(drawing: Drawing, extra: str = "", *, level: int = 2) -> str:
    """A drawing under its title, `extra` HTML between them; below level 2 a part of a section."""
    text = f"""<h{level} id="{drawing.name}-title">{escape(drawing.title)}</h{level}>
{extra}
{figure(drawing)}"""
    return f"<section>\n{text}\n</section>" if level == 2 else text


def facts_table(title: str, facts: Mapping[str, Any]) -> str:
    """A section of labels and values; nothing if there are none."""
    rows = [
        f'<th scope="row">{escape(label)}</th><td>{escape(value)}</td>'
        for label, value in _flatten(facts)
    ]
    return f"<div><h2>{title}</h2>\n{table('', rows)}</div>" if rows else ""


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


def table(head: str, rows: Sequence[str]) -> str:
    """A table from the HTML of its head's cells and of each row's cells."""
    top = f"<thead><tr>{head}</tr></thead>\n" if head else ""
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table class="wide">\n{top}<tbody>\n{body}\n</tbody></table></div>'


def warning_box(text: str) -> str:
    """A note that must not be overlooked."""
    return f'<p class="warning">{escape(text)}</p>\n'


def head_cell(name: str, below: str = "") -> str:
    """A column's head; `below` is HTML."""
    small = f"<small>{below}</small>" if below else ""
    return f'<th scope="col">{escape(name)}{small}</th>'


def row_head(name: str) -> str:
    """A row's head."""
    return f'<th scope="row">{escape(name)}</th>'


def value_cell(text: str, below: str, *, bold: bool = False) -> str:
    """`text` and `below` are HTML; each line of `below` stands by itself."""
    text = f"<b>{text}</b>" if bold else text
    return f"<td>{text}{''.join(f'<small>{line}</small>' for line in below.splitlines())}</td>"


def absent_cell() -> str:
    """Stands for what was not measured."""
    return f'<td class="absent">{ABSENT}</td>'
