"""Figures of a finished search, each a PNG with the CSV behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longrope.evaluation.figures import draw_factors, draw_search, draw_start_tokens
from megatron_longrope.evaluation.traces import SearchTrace, is_complete, start_token_curve
from megatron_longrope.search.problem import SearchProblem
from megatron_longrope.search.space import Candidate


def draw_search_figures(
    records: Sequence[Any],
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
