"""What a finished search leaves: the configuration, its provenance, pictures and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_longrope import __version__
from megatron_longrope.integration.compat import megatron_version
from megatron_longrope.search.generations import Trial
from megatron_longrope.search.objective import Objective
from megatron_longrope.search.problem import SearchProblem
from megatron_longrope.search.racing import Race
from megatron_longrope.search.runner import SearchOutcome
from megatron_longrope.search.scoring import score_trial
from megatron_longrope.search.space import Candidate


def held_out_scores(
    problem: SearchProblem, winner: Candidate, objective: Objective
) -> dict[str, float | None]:
    """Perplexity of every seed and of the winner on other samples; None where scoring failed."""
    scores = {}
    for name, candidate in {**problem.seeds, "longrope": winner}.items():
        score = score_trial(Trial(0, candidate), problem, objective, Race("off")).score
        scores[name] = score if math.isfinite(score) else None
    return scores


def write(
    path: str | Path,
    problem: SearchProblem,
    outcome: SearchOutcome,
    origin: Mapping[str, Any],
    *,
    figures: bool = True,
) -> None:
    """The winner as a configuration, atomically, and figures with their CSV files beside it.

    Args:
        path (str | Path): `F.json`; figures go to the folder `F_figures`.
        origin (Mapping): Provenance of the factors.
    """
    path = Path(path)
    problem.config(outcome.candidate, origin).save(path)
    if figures:
        from megatron_longrope.search.pictures import draw_search_figures

        draw_search_figures(
            outcome.records,
            problem,
            outcome.candidate,
            path.with_name(f"{path.stem}_figures"),
            name=path.stem,
            seeds=outcome.seed_scores,
        )


def print_summary(
    path: str | Path,
    problem: SearchProblem,
    outcome: SearchOutcome,
    held_out: Mapping[str, float | None],
) -> None:
    """The winner against the starting points, on the search text and on held-out text."""
    length = problem.target_length
    config = problem.config(outcome.candidate)
    chosen = config.factor_set_for(length)
    print(
        f"{problem.stage} search to {length} tokens: perplexity {outcome.score:.4f} after "
        f"{outcome.num_evaluations} evaluations ({outcome.sample_forwards} sample-forwards, "
        f"{outcome.sample_forwards_saved} saved by racing, {outcome.num_failed} failed), "
        f"{chosen.num_start_tokens} start tokens, attention factor "
        f"{config.attention_factor_for(length):.6g}"
    )
    rows = {**outcome.seed_scores, "longrope": outcome.score}
    width = max(map(len, rows)) + 2
    print(f"{'':{width}}{'search text':>14}" + (f"{'held-out text':>16}" if held_out else ""))
    for name, score in rows.items():
        other = held_out.get(name)
        cell = "failed" if held_out and other is None else f"{other:.4f}" if held_out else ""
        print(f"{name:{width}}{score:14.4f}{cell:>16}" if cell else f"{name:{width}}{score:14.4f}")
    print(f"wrote {path}")


def versions() -> dict[str, str]:
    """Of what computed the scores."""
    return {
        "megatron_longrope": __version__,
        "megatron_core": megatron_version(),
        "torch": torch.__version__,
    }
