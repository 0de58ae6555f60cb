"""One self-contained HTML page about a run or several, with figures and their data beside it.

    from megatron_longrope.report.report import write_report
    write_report("runs/quickstart")  # results.json -> report.html, figures/*.png, figures/*.csv
    write_report(["runs/base", "runs/extended"], "comparison/report.html")  # ppl.jsonl, ... -> same

A directory holds `results.json` or, at any depth, the records of `longrope eval`; besides, LongRoPE
JSON files and `*.journal.jsonl`. What was not measured is left out; nothing is ever filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.files import read_json, write_text_atomic
from megatron_longrope.report.document import render_document, section
from megatron_longrope.report.measured_how import method_section, source_of
from megatron_longrope.report.page import factor_table, left_out, render_page
from megatron_longrope.report.reading import (
    KINDS,
    Measurements,
    files_below,
    read_measurements,
)
from megatron_longrope.report.results import (
    load_results,
    measured_lengths,
    summary_sentence,
    summary_table,
)
from megatron_longrope.report.search_figures import (
    draw_factors,
    draw_passkey,
    draw_perplexity,
    draw_search,
    draw_start_tokens,
    reference_factors,
)
from megatron_longrope.report.search_trace import (
    SearchTrace,
    start_token_curve,
)
from megatron_longrope.report.sections import sections_of
from megatron_longrope.report.style import Drawing
from megatron_longrope.report.tables import comparison_sentence, comparison_tables
from megatron_longrope.search.journal import Evaluation, is_complete, read_records

__all__ = [
    "find_factor_sets",
    "find_search_traces",
    "load_results",
    "report_tables",
    "summary_sentence",
    "summary_table",
    "write_report",
]

_LARGEST_JSON = 16 * 2**20
"""Bytes above which a JSON file is no LongRoPE file; tokenizers and weight indices can be huge."""
_SEEDS_SEARCHED = 64
"""Records at the start of a journal among which the published methods are looked for."""


def write_report(
    directories: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    measurements: Measurements | None = None,
) -> Path:
    """Write the report of a run, or of several models in comparison.

    Args:
        directories (str | Path | Sequence): One or several directories, each with `results.json`
            or, at any depth, the records of `longrope eval`.
        output (str | Path | None): The page; by default `report.html` in the directory if there is
            one, and where the program runs if there are several. The figures go to `figures/`
            beside it.
        measurements (Measurements, optional): Of these directories, if they have been read.

    Returns:
        Path: The page.

    Raises:
        ValueError: A directory is missing or has nothing to report, or a file in it is malformed.
    """
    folders = _listed(directories)
    page = Path(output) if output is not None else (
        folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    )  # fmt: skip
    if page.is_dir():
        raise ValueError(f"{page} is a directory; give the name of the HTML file to write")
    measurements = measurements or read_measurements(folders)
    sets, notes = _all_sets(folders)
    traces = _all_traces(folders, [config for _, config, _ in sets])
    name = ", ".join(folder.resolve().name for folder in folders)
    if len(folders) == 1 and measurements.results:
        (results,) = measurements.results
        parts, others = sections_of(measurements, ("needle", "short"))
        drawings = _draw(results, sets, traces)
        summary = summary_sentence(results)
        origin = source_of(measurements)
        text = render_page(name, summary, results, drawings, sets, notes, parts, origin)
    else:
        parts, others = sections_of(measurements, tuple(KINDS))
        drawings = _draw_searches(sets, traces)
        extras = {"rescale_factors": factor_table(sets)}
        parts += [section(drawing, extras.get(drawing.name, "")) for drawing in drawings]
        parts += [method_section(measurements), left_out(notes)]
        text = render_document(
            name, _about(measurements, name), comparison_sentence(measurements), parts,
            source_of(measurements),
        )  # fmt: skip
    for drawing in (*drawings, *others):
        drawing.save(page.parent / "figures")
    write_text_atomic(page, text)
    return page


def report_tables(
    directories: str | Path | Sequence[str | Path], *, measurements: Measurements | None = None
) -> str:
    """The report's tables as plain text.

    Raises:
        ValueError: As :func:`write_report`.
    """
    folders = _listed(directories)
    measurements = measurements or read_measurements(folders)
    if len(folders) > 1 or not measurements.results:
        return comparison_tables(measurements)
    rows = {kind: measurements.of(kind) for kind in ("needle", "short")}
    extra = comparison_tables(Measurements(measurements.subjects, rows))
    return "\n\n".join(part for part in (summary_table(measurements.results[0]), extra) if part)


def find_factor_sets(
    directory: str | Path,
) -> tuple[list[tuple[str, LongRopeConfig, FactorSet]], list[str]]:
    """Every different factor set below `directory`, and a note on each broken LongRoPE file.

    Sets that change nothing are left out; the name is the path within `directory`.
    """
    found: dict[tuple[Any, ...], tuple[str, LongRopeConfig, FactorSet]] = {}
    notes = []
    for path, name in files_below(Path(directory), ".json"):
        if path.stat().st_size > _LARGEST_JSON:
            continue
        try:
            content = read_json(path)
        except ValueError:
            continue
        if not isinstance(content, dict) or not {"schema", "factor_sets"} <= content.keys():
            continue
        try:
            config = LongRopeConfig.load(path)
        except ValueError as error:
            notes.append(f"{name} was left out: {str(error).removeprefix(f'{path}: ')}")
            continue
        for item in config.factor_sets:
            if not item.is_identity:
                key = (item.max_length, item.rescale_factors, item.num_start_tokens)
                found.setdefault((*key, config.original_max_position_embeddings),
                                 (name, config, item))  # fmt: skip
    return sorted(found.values(), key=lambda entry: (entry[2].max_length, entry[0])), notes


def find_search_traces(
    directory: str | Path, configs: Sequence[LongRopeConfig] = ()
) -> list[SearchTrace]:
    """Progress of every search journal below `directory` that scored a candidate completely.

    Lines that cannot be read are passed over. `configs` tell which geometry the seeds may have.
    """
    traces = []
    for path, name in files_below(Path(directory), ".journal.jsonl"):
        records = read_records(path)
        if any(map(is_complete, records)):
            first = sorted(records, key=lambda record: record.index)[:_SEEDS_SEARCHED]
            name = name.removesuffix(".journal.jsonl")
            traces.append(SearchTrace(name, records, _recognise(first, configs)))
    return traces


def _draw(
    results: Mapping[str, Any],
    sets: Sequence[tuple[str, LongRopeConfig, FactorSet]],
    traces: Sequence[SearchTrace],
) -> list[Drawing]:
    original = results.get("original_length")
    drawings = []
    if measured_lengths(results["perplexity"]):
        drawings.append(draw_perplexity(results["perplexity"], original))
    drawings += _draw_searches(sets, traces)
    if results["passkey"]:
        trials = results.get("passkey_trials")
        drawings.append(draw_passkey(results["passkey"], trials, original))
    return drawings


def _draw_searches(
    sets: Sequence[tuple[str, LongRopeConfig, FactorSet]], traces: Sequence[SearchTrace]
) -> list[Drawing]:
    drawings = []
    if sets:
        drawings.append(draw_factors(sets))
    if traces:
        drawings.append(draw_search(traces))
    if curves := [curve for trace in traces if (curve := start_token_curve(trace))]:
        drawings.append(draw_start_tokens(curves))
    return drawings


def _listed(directories: str | Path | Sequence[str | Path]) -> list[Path]:
    """The directories, each once."""
    one = isinstance(directories, str | Path)
    folders = [Path(directories)] if one else [Path(item) for item in directories]
    if not folders:
        raise ValueError("no directory to report on; give at least one")
    return list({folder.resolve(): folder for folder in folders}.values())


def _all_sets(
    folders: Sequence[Path],
) -> tuple[list[tuple[str, LongRopeConfig, FactorSet]], list[str]]:
    """Factor sets of all folders; with several folders the names say which."""
    sets, notes = [], []
    for folder in folders:
        found, broken = find_factor_sets(folder)
        prefix = _prefix(folder, folders)
        sets += [(f"{prefix}{name}", config, item) for name, config, item in found]
        notes += [f"{prefix}{note}" for note in broken]
    return sets, notes


def _all_traces(folders: Sequence[Path], configs: Sequence[LongRopeConfig]) -> list[SearchTrace]:
    return [
        replace(trace, name=_prefix(folder, folders) + trace.name)
        for folder in folders
        for trace in find_search_traces(folder, configs)
    ]


def _prefix(folder: Path, folders: Sequence[Path]) -> str:
    return f"{folder.resolve().name}/" if len(folders) > 1 else ""


def _about(measurements: Measurements, name: str) -> str:
    window = measurements.original_length
    return f"{name} \N{MIDDLE DOT} original window {window:,} tokens" if window else name


def _recognise(
    records: Sequence[Evaluation], configs: Sequence[LongRopeConfig]
) -> dict[tuple[float, ...], str]:
    """Factors of the records that are PI's, NTK's or YaRN's up to the search grid."""
    known = dict.fromkeys(
        (name, tuple(factors))
        for config in configs
        for item in config.factor_sets
        for name, factors in reference_factors(
            config, item.max_length / config.original_max_position_embeddings
        ).items()
    )
    found: dict[tuple[float, ...], str] = {}
    for name, factors in known:
        for values in (record.rescale_factors for record in records):
            if name not in found.values() and len(values) == len(factors) and all(
                abs(ours - theirs) <= 0.011 for ours, theirs in zip(values, factors, strict=True)
            ):  # fmt: skip
                found.setdefault(values, name)
    return found
