"""One self-contained HTML page about a run, with figures and their data beside it.

    from megatron_longrope.evaluation.report import write_report
    write_report("runs/quickstart")  # results.json -> report.html, figures/*.png, figures/*.csv

The directory holds `results.json` and, at any depth, LongRoPE JSON files and `*.journal.jsonl`.
What was not measured is left out of the page; nothing is ever filled in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.evaluation.drawing import Drawing
from megatron_longrope.evaluation.figures import (
    draw_factors,
    draw_passkey,
    draw_perplexity,
    draw_search,
    draw_start_tokens,
    reference_factors,
)
from megatron_longrope.evaluation.page import render_page
from megatron_longrope.evaluation.results import (
    load_results,
    measured_lengths,
    summary_sentence,
    summary_table,
)
from megatron_longrope.evaluation.traces import (
    JournalRecord,
    SearchTrace,
    is_complete,
    read_records,
    start_token_curve,
)
from megatron_longrope.files import read_json, write_text_atomic

__all__ = [
    "find_factor_sets",
    "find_search_traces",
    "load_results",
    "summary_sentence",
    "summary_table",
    "write_report",
]

_LARGEST_JSON = 16 * 2**20
"""Bytes above which a JSON file is no LongRoPE file; tokenizers and weight indices can be huge."""
_SEEDS_SEARCHED = 64
"""Records at the start of a journal among which the published methods are looked for."""


def write_report(directory: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        directory (str | Path): Holds `results.json`.
        output (str | Path | None): The page, `report.html` in `directory` by default; the figures
            go to `figures/` beside it.

    Returns:
        Path: The page.

    Raises:
        ValueError: `results.json` is missing or malformed.
    """
    directory = Path(directory)
    results = load_results(directory)
    page = Path(output) if output is not None else directory / "report.html"
    if page.is_dir():
        raise ValueError(f"{page} is a directory; give the name of the HTML file to write")
    sets, notes = find_factor_sets(directory)
    traces = find_search_traces(directory, [config for _, config, _ in sets])
    drawings = _draw(results, sets, traces)
    for drawing in drawings:
        drawing.save(page.parent / "figures")
    name = directory.resolve().name
    text = render_page(name, summary_sentence(results), results, drawings, sets, notes)
    write_text_atomic(page, text)
    return page


def find_factor_sets(
    directory: str | Path,
) -> tuple[list[tuple[str, LongRopeConfig, FactorSet]], list[str]]:
    """Every different factor set below `directory`, and a note on each broken LongRoPE file.

    Sets that change nothing are left out; the name is the path within `directory`.
    """
    found: dict[tuple[Any, ...], tuple[str, LongRopeConfig, FactorSet]] = {}
    notes = []
    for path, name in _files(Path(directory), ".json"):
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
    for path, name in _files(Path(directory), ".journal.jsonl"):
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
    if sets:
        drawings.append(draw_factors(sets))
    if traces:
        drawings.append(draw_search(traces))
    if curves := [curve for trace in traces if (curve := start_token_curve(trace))]:
        drawings.append(draw_start_tokens(curves))
    if results["passkey"]:
        trials = results.get("passkey_trials")
        drawings.append(draw_passkey(results["passkey"], trials, original))
    return drawings


def _files(directory: Path, suffix: str) -> list[tuple[Path, str]]:
    """Files below `directory` with their relative names, sorted; symbolic links are not entered."""
    found = []
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = [item for item in subfolders if not item.startswith(".")]
        found += [Path(folder, item) for item in files if item.endswith(suffix)]
    return sorted(
        (path, path.relative_to(directory).as_posix()) for path in found if path.is_file()
    )


def _recognise(
    records: Sequence[JournalRecord], configs: Sequence[LongRopeConfig]
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
