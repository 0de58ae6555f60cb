"""What a finished search leaves: the configuration, its provenance and a table."""

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
from megatron_longrope.search.space import Candidate, GivenFactors


def scores_on(
    objective: Objective, problem: SearchProblem, winner: Candidate | GivenFactors
) -> dict[str, float | None]:
    """Perplexity of the references and of the winner; None where scoring failed."""
    scores = {}
    for name, item in {**problem.references, "longrope": winner}.items():
        score = score_trial(Trial(0, item), problem, objective, Race("off")).score
        scores[name] = score if math.isfinite(score) else None
    return scores


def write(
    path: str | Path,
    problem: SearchProblem,
    outcome: SearchOutcome,
    origin: Mapping[str, Any],
) -> None:
    """Write the winner as a configuration, atomically.

    Args:
        path (str | Path): `F.json`.
        origin (Mapping): Provenance of the factors.
    """
    problem.config(outcome.candidate, origin).save(path)


def print_summary(
    path: str | Path,
    problem: SearchProblem,
    outcome: SearchOutcome,
    held_out: Mapping[str, float | None],
) -> None:
    """The winner against the published methods, on the search text and on held-out text.

    Args:
        held_out (Mapping): Perplexities of :func:`scores_on`; empty without held-out text.
    """
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
    searched = {**outcome.seed_scores, "longrope": outcome.score}
    columns = {"search text": searched, **({"held-out text": held_out} if held_out else {})}
    print(f"{'':12}" + "".join(f"{title:>16}" for title in columns))
    for name in [*problem.references, "longrope"]:
        cells = (f"{_cell(scores, name):>16}" for scores in columns.values())
        print(f"{name:12}" + "".join(cells))
    print(f"wrote {path}")


def _cell(scores: Mapping[str, float | None], name: str) -> str:
    if name not in scores:
        return "-"
    score = scores[name]
    return "failed" if score is None or not math.isfinite(score) else f"{score:.4f}"


def versions() -> dict[str, str]:
    """Of what computed the scores."""
    return {
        "megatron_longrope": __version__,
        "megatron_core": megatron_version(),
        "torch": torch.__version__,
    }
