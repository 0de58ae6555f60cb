"""One self-contained HTML page about a run, with figures and their data beside it.

    from megatron_longrope.evaluation.report import write_report
    write_report("runs/quickstart")  # results.json -> report.html, figures/*.png, figures/*.csv

The directory holds `results.json` and, at any depth, LongRoPE JSON files and `*.journal.jsonl`.
What was not measured is left out of the page; nothing is ever filled in.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.evaluation.drawing import Drawing
from megatron_longrope.evaluation.figures import (
    SearchTrace,
    draw_factors,
    draw_passkey,
    draw_perplexity,
    draw_search,
    reference_factors,
)
from megatron_longrope.evaluation.page import render_page
from megatron_longrope.evaluation.results import (
    load_results,
    measured_lengths,
    summary_sentence,
    summary_table,
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
        figures = page.parent / "figures"
        figures.mkdir(parents=True, exist_ok=True)
        _write_bytes_atomic(figures / f"{drawing.name}.png", drawing.png)
        write_text_atomic(figures / f"{drawing.name}.csv", drawing.csv)
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
    """Progress of every search journal below `directory` that has a finite score.

    Lines that cannot be read are passed over. `configs` tell which geometry the seeds may have.
    """
    traces = []
    for path, name in _files(Path(directory), ".journal.jsonl"):
        records = _journal_records(path)
        scores = tuple(math.inf if score is None else score for _, score in records)
        if any(map(math.isfinite, scores)):
            seeds = _recognise_seeds(records[:_SEEDS_SEARCHED], configs)
            traces.append(SearchTrace(name.removesuffix(".journal.jsonl"), scores, seeds))
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


def _journal_records(path: Path) -> list[tuple[tuple[float, ...], float | None]]:
    """(rescale factors, score or None) of each readable record."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
            score = value["score"]
            score = float(score) if score is not None and math.isfinite(score) else None
            records.append((tuple(float(item) for item in value["rescale_factors"]), score))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # the header, a torn last line, or damage
    return records


def _recognise_seeds(
    records: Sequence[tuple[tuple[float, ...], float | None]], configs: Sequence[LongRopeConfig]
) -> dict[str, float]:
    """Scores of the records whose factors are PI's, NTK's or YaRN's up to the search grid."""
    known = dict.fromkeys(
        (name, tuple(factors))
        for config in configs
        for item in config.factor_sets
        for name, factors in reference_factors(
            config, item.max_length / config.original_max_position_embeddings
        ).items()
    )
    found: dict[str, float] = {}
    for name, factors in known:
        for values, score in records:
            if score is not None and len(values) == len(factors) and all(
                abs(ours - theirs) <= 0.011 for ours, theirs in zip(values, factors, strict=True)
            ):  # fmt: skip
                found.setdefault(name, score)
                break
    return found


def _write_bytes_atomic(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
