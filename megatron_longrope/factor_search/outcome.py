"""What a finished search leaves: the configuration, its provenance and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_longrope import __version__
from megatron_longrope.factor_search.generations import Trial
from megatron_longrope.factor_search.objective import PerplexityObjective
from megatron_longrope.factor_search.problem import SearchProblem
from megatron_longrope.factor_search.retrieval import RetrievalVerdict
from megatron_longrope.factor_search.runner import SearchOutcome
from megatron_longrope.factor_search.scoring import score_trial
from megatron_longrope.factor_search.space import Candidate, GivenFactors
from megatron_longrope.files import finite_json
from megatron_longrope.integration.compat import megatron_version


def scores_on(
    objective: PerplexityObjective,
    problem: SearchProblem,
    candidates: Mapping[str, Candidate | GivenFactors],
) -> dict[str, float | None]:
    """Perplexity of each candidate by its name; None where scoring failed."""
    scores = {}
    for name, item in candidates.items():
        score = score_trial(Trial(0, item), problem, objective).score
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
        origin (Mapping): Provenance of the factors; a number that is not finite becomes null.
    """
    problem.config(outcome.candidate, finite_json(origin)).save(path)


def export_notes(
    problem: SearchProblem, outcome: SearchOutcome, objective: PerplexityObjective
) -> list[str]:
    """What keeps the result from Hugging Face, and what it costs to do without; [] if nothing.

    Args:
        objective (PerplexityObjective): What the outcome's score is of.
    """
    config, original = (
        problem.config(outcome.candidate),
        problem.base.original_max_position_embeddings,
    )
    chosen, notes = config.factor_set_for(problem.target_length), []
    if chosen.effective_start_tokens:
        without = {"without": GivenFactors(chosen.rescale_factors)}
        scores = {"longrope": outcome.score, **scores_on(objective, problem, without)}
        notes.append(
            f"{chosen.num_start_tokens} start tokens cannot be exported to Hugging Face; `convert "
            f"to-hf --drop-start-tokens` leaves them out, at {cell(scores, 'without')} "
            f"instead of {cell(scores, 'longrope')} on the search text"
        )
    short, long = (config.attention_factor_for(n) for n in (original, problem.target_length))
    if not math.isclose(short, long):
        notes.append(
            f"attention factor {short:.6g} up to {original} tokens and {long:.6g} beyond cannot be "
            f"exported to Hugging Face, which holds one; --attention-factor {long!r} searches "
            "with it"
        )
    return notes


def print_summary(
    problem: SearchProblem,
    outcome: SearchOutcome,
    held_out: Mapping[str, float | None],
    verdict: RetrievalVerdict | None,
    asked_in: str,
    name: str = "perplexity",
) -> None:
    """Print the winner against the references: search text, held-out text, needle answers.

    Args:
        held_out (Mapping): Perplexities of :func:`scores_on`; empty without held-out text.
        verdict (RetrievalVerdict, optional): None where retrieval was not measured.
        asked_in (str): Which documents the needles were hidden in.
        name (str): What the score on the search text is.
    """
    length = problem.target_length
    config = problem.config(outcome.candidate)
    chosen = config.factor_set_for(length)
    print(
        f"{problem.stage} search to {length} tokens: {name} {outcome.score:.4f} after "
        f"{outcome.num_evaluations} evaluations ({outcome.sample_forwards} sample-forwards, "
        f"{outcome.sample_forwards_saved} saved by racing, {outcome.num_failed} failed), "
        f"{chosen.num_start_tokens} start tokens, attention factor "
        f"{config.attention_factor_for(length):.6g}"
    )
    searched = {**outcome.seed_scores, "longrope": outcome.score}
    columns = {"search text": searched, **({"held-out text": held_out} if held_out else {})}
    table = {title: {row: cell(scores, row) for row in scores} for title, scores in columns.items()}
    if verdict is not None:
        found = {**verdict.measured, "longrope": verdict.written}
        table["needle loss"] = {row: f"{item.loss:.4f}" for row, item in found.items()}
        table["answers"] = {row: f"{item.correct} of {item.trials}" for row, item in found.items()}
        print(f"needle loss and answers: of numbers hidden in {asked_in}")
    print(f"{'':12}" + "".join(f"{title:>16}" for title in table))
    for row in [*problem.references, "longrope"]:
        print(f"{row:12}" + "".join(f"{cells.get(row, '-'):>16}" for cells in table.values()))


def cell(scores: Mapping[str, float | None], name: str) -> str:
    """Return a score for people; that of a candidate that could not be scored is `failed`."""
    score = scores[name]
    return "failed" if score is None or not math.isfinite(score) else f"{score:.4f}"


def versions() -> dict[str, str]:
    """Of what computed the scores."""
    return {
        "megatron_longrope": __version__,
        "megatron_core": megatron_version(),
        "torch": torch.__version__,
    }
