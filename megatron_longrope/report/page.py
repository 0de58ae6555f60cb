"""Write one self-contained HTML page of evaluations and searches, figures and data beside it.

    from megatron_longrope.report.page import write_report
    write_report("runs/quickstart")  # ppl.jsonl, ... -> report.html, figures/*.png, figures/*.csv
    write_report(["runs/base", "runs/extended"], "comparison/report.html")

A directory holds, at any depth, the records of `longrope eval` or the `*.journal.jsonl` of a
search; besides, LongRoPE JSON files and, at its top, `facts.json`. What was not measured is left
out; nothing is ever filled in. What there is to show of a kind of evaluation its own file says:
this page knows none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_longrope import __version__
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.kind import Section
from megatron_longrope.evaluation.kinds import KINDS
from megatron_longrope.evaluation.table import ABSENT, Column, Table, Value, format_ratio
from megatron_longrope.files import write_text_atomic
from megatron_longrope.lengths import format_length
from megatron_longrope.progress import format_duration
from megatron_longrope.report.expected import compare, read_expected
from megatron_longrope.report.figures import draw
from megatron_longrope.report.reading import (
    JOURNAL,
    Measurements,
    folder_names,
    folder_prefix,
    read_measurements,
)
from megatron_longrope.report.search_figures import draw_factors, draw_search, draw_start_tokens
from megatron_longrope.report.search_history import (
    NamedSet,
    SearchHistory,
    find_factor_sets,
    find_search_histories,
    start_token_curve,
)
from megatron_longrope.report.style import NEUTRALS, Drawing, series_styles

_SHORT_HASH = 12  # characters of a sha256 that are shown


@dataclass(frozen=True)
class _Drawn:
    """A section with its figures drawn."""

    title: str
    tables: Sequence[Table]
    drawings: Sequence[Drawing]
    warnings: Sequence[str] = ()


def write_report(
    directories: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    expected: str | Path | None = None,
) -> tuple[Path, str]:
    """Write the report of a run, or of several models in comparison.

    Args:
        directories (str | Path | Sequence): One or several directories, each with the records of
            `longrope eval` or the journal of a search at any depth.
        output (str | Path | None): The page; by default `report.html` in the directory if there is
            one, and where the program runs if there are several. `figures/` and `tables/` go beside
            it.
        expected (str | Path, optional): CSV file of published values to set beside ours.

    Returns:
        tuple[Path, str]: The page, and its tables as plain text.

    Raises:
        LongRopeError: A directory is missing or has nothing to report, or a file in it is
            malformed.
    """
    folders = _listed(directories)
    page = Path(output) if output is not None else (
        folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    )  # fmt: skip
    if page.is_dir():
        raise LongRopeError(f"{page} is a directory; give the name of the HTML file to write")
    measurements = read_measurements(folders)
    sets, histories, notes = _searches(folders)
    sections = sections_of(measurements, expected)
    drawn = [*_draw(sections, measurements), *_draw_searches(sets, histories)]
    for part in drawn:
        for drawing in part.drawings:
            drawing.save(page.parent / "figures")
        for table in part.tables:
            write_text_atomic(page.parent / "tables" / f"{table.name}.csv", table.csv())
    names = folder_names(folders)
    name = ", ".join(names[folder.resolve()] for folder in folders)
    window = measurements.window
    text = _template().render(
        name=name,
        about=f"{name} \N{MIDDLE DOT} original window {window:,} tokens" if window else name,
        sections=drawn,
        series=_series_table(measurements),
        facts=_all_facts(sections, measurements),
        notes=notes,
        origin=", ".join(f"{kind}.jsonl" for kind in measurements.rows) or f"*{JOURNAL}",
        version=__version__,
        neutrals=NEUTRALS,
        absent=ABSENT,
    )
    write_text_atomic(page, text)
    return page, "\n\n".join(section.text() for section in sections)


def sections_of(measurements: Measurements, expected: str | Path | None = None) -> list[Section]:
    """Return the sections of every kind that was measured, in the order of the page."""
    sections = [
        section
        for name, kind in KINDS.items()
        if name in measurements.rows
        for section in kind.sections(measurements.rows[name], measurements.window)
    ]
    if expected is not None:
        tables = [table for section in sections for table in section.tables]
        sections.append(compare(read_expected(expected), tables, Path(expected).name))
    return sections


def _template() -> Any:
    loader = PackageLoader("megatron_longrope.report", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    # Matplotlib wrote the SVG and escaped the text in it.
    environment.filters["svg"] = Markup
    return environment.get_template("page.html.j2")


def _draw(sections: Sequence[Section], measurements: Measurements) -> Iterator[_Drawn]:
    styles = series_styles(measurements.series)
    for section in sections:
        drawings = [draw(figure, styles) for figure in section.figures]
        yield _Drawn(section.title, section.tables, drawings, section.warnings)


def _draw_searches(
    sets: Sequence[NamedSet], histories: Sequence[SearchHistory]
) -> Iterator[_Drawn]:
    if sets:
        drawing = draw_factors(sets)
        yield _Drawn(drawing.title, [_factor_table(sets, drawing.title)], [drawing])
    curves = [curve for history in histories if (curve := start_token_curve(history))]
    for found, drawn_by in ((histories, draw_search), (curves, draw_start_tokens)):
        if found:
            drawing = drawn_by(found)
            yield _Drawn(drawing.title, [], [drawing])


def _factor_table(sets: Sequence[NamedSet], title: str) -> Table:
    rows = {}
    for name, config, item in sets:
        ratio = item.max_length / config.original_max_position_embeddings
        low, high = min(item.rescale_factors), max(item.rescale_factors)
        cells = (
            format_length(item.max_length), f"{format_ratio(ratio)}\N{MULTIPLICATION SIGN}",
            f"{low:.4g} to {high:.4g}", str(item.num_start_tokens),
            f"{config.attention_factor_for(item.max_length):.4f}",
        )  # fmt: skip
        several = sum(other == name for other, *_ in sets) > 1
        key = f"{name}, up to {cells[0]}" if several else name
        rows[key] = [Value(cell) for cell in cells]
    names = ("Up to", "Ratio", "Factors", "Start tokens", "Attention factor")
    return Table("rescale_factors", title, [*map(Column, names)], rows, corner="File")


def _series_table(measurements: Measurements) -> Table:
    """Return whose numbers these are: checkpoints, factor files, windows."""
    rows = {}
    for series in measurements.series:
        one = series.identity
        factors = one.config or one.factors or ABSENT
        cells = (
            one.checkpoint or one.model, one.iteration or ABSENT,
            f"{factors} ({one.policy})" if one.policy else factors,
            one.config_sha256[:_SHORT_HASH] or ABSENT,
            f"{series.original_length:,}" if series.original_length else ABSENT,
        )  # fmt: skip
        rows[series.name] = [Value(cell) for cell in cells]
    names = ("Checkpoint", "Iteration", "Factors", "sha256", "Window")
    columns = [Column(name, is_text=True) for name in names]
    note = "Window: tokens of pre-training."
    return Table("series", "Measured how", columns, rows, note=note, corner="Shown as")


def _all_facts(
    sections: Sequence[Section], measurements: Measurements
) -> dict[str, list[tuple[str, str]]]:
    """Return names and values by title: of the evaluations, then of the runs."""
    ours = [
        (f"{section.title}: {name}", value)
        for section in sections
        for name, value in section.facts.items()
        if value
    ]
    seconds = sum(row.get("seconds") or 0 for rows in measurements.rows.values() for _, row in rows)
    if seconds:
        ours.append(("Time of all measurements", format_duration(seconds)))
    facts = {"Data, seeds and versions": ours}
    return facts | {title: [*_flat(part)] for title, part in measurements.facts.items()}


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, value) of every leaf; nested names are joined."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}, ")
        elif isinstance(value, bool):
            yield f"{prefix}{key}", "yes" if value else "no"
        elif isinstance(value, float):
            shown = f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.6g}"
            yield f"{prefix}{key}", shown
        elif value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{key}", text


def _listed(directories: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the directories, each once."""
    one = isinstance(directories, str | Path)
    folders = [Path(directories)] if one else [Path(item) for item in directories]
    if not folders:
        raise LongRopeError("no directory to report on; give at least one")
    return list({folder.resolve(): folder for folder in folders}.values())


def _searches(
    folders: Sequence[Path],
) -> tuple[list[NamedSet], list[SearchHistory], list[str]]:
    """Return what searches left in all folders, and notes; of several folders names say which."""
    sets, histories, notes = [], [], []
    seen: set[Path] = set()  # of a folder within another, too, each file once
    for folder in folders:
        prefix = folder_prefix(folder, folders, "/")
        found, broken = find_factor_sets(folder, seen)
        searches, left_out = find_search_histories(folder, seen)
        sets += [(f"{prefix}{name}", config, item) for name, config, item in found]
        histories += [replace(history, name=f"{prefix}{history.name}") for history in searches]
        notes += [f"{prefix}{note}" for note in (*broken, *left_out)]
    return sets, histories, notes
