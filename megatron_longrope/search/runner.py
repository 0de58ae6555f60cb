"""Run a search to its end: ask, score, journal, tell; resume where a crash left it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.progress import Progress
from megatron_longrope.ranks import rank
from megatron_longrope.search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.search.journal import Evaluation, Journal
from megatron_longrope.search.problem import SearchProblem
from megatron_longrope.search.space import Candidate

Objective = Callable[[LongRopeConfig], Evaluation]


@dataclass(frozen=True)
class SearchOutcome:
    """The winner of a search."""

    candidate: Candidate
    """Best candidate."""

    score: float
    """Its perplexity on the search samples."""

    num_evaluations: int
    """Scored candidates, resumed ones included."""

    seed_scores: dict[str, float]
    """Perplexity of each named starting point."""


class Ledger:
    """Scores candidates once: from memory, else from the objective, into the journal.

    With several model-parallel ranks every rank runs the same search on the same scores; rank 0
    alone owns the file and shares what it held.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        problem: SearchProblem,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        self._problem = problem
        self._journal = None
        held: list[Any] = [None, None]
        if rank() == 0:
            try:
                self._journal = Journal(path, dict(settings), resume=resume, overwrite=overwrite)
                held[0] = list(self._journal.records)
            except ValueError as error:
                held[1] = str(error)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(held)
        if held[1]:
            raise ValueError(held[1])
        self._known = {
            (record.rescale_factors, record.num_start_tokens): record for record in held[0]
        }
        self.num_resumed = len(self._known)

    def score(self, candidate: Candidate, objective: Objective) -> Evaluation:
        """The candidate's evaluation."""
        target = self._problem.factor_set(candidate)
        key = (target.rescale_factors, target.num_start_tokens)
        if key not in self._known:
            self.record(objective(self._problem.config(candidate)))
        return self._known[key]

    def record(self, evaluation: Evaluation) -> None:
        """Keep an evaluation, unless it is there already."""
        key = (evaluation.rescale_factors, evaluation.num_start_tokens)
        if key in self._known:
            return
        if self._journal is not None:
            self._journal.append(evaluation)
        self._known[key] = evaluation

    def close(self) -> None:
        """Release the file."""
        if self._journal is not None:
            self._journal.close()


def choose_policy(
    problem: SearchProblem,
    policies: tuple[str, ...],
    objective: Objective,
    journal_path: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
) -> tuple[str, dict[str, dict[str, float]]]:
    """Score the seeds under each attention-factor policy; the policy of the best seed wins.

    Returns:
        tuple: The policy, and the perplexity of every seed under every policy.
    """
    table: dict[str, dict[str, float]] = {}
    with Progress(len(policies) * len(problem.seeds), "attention factor", "seeds") as progress:
        for policy in policies:
            variant = problem.with_attention(None, policy)
            path = journal_path.with_suffix(f".policy-{policy}.jsonl")
            ledger = Ledger(path, settings, variant, resume=resume, overwrite=overwrite)
            with contextlib.closing(ledger):
                table[policy] = {}
                for name, candidate in problem.seeds.items():
                    table[policy][name] = ledger.score(candidate, objective).score
                    progress.update(f"{policy} {name} {table[policy][name]:.3f}")
    return min(policies, key=lambda policy: min(table[policy].values())), table


def run_evolution(
    problem: SearchProblem,
    parameters: EvolutionParameters,
    objective: Objective,
    journal_path: Path,
    settings: Mapping[str, Any],
    *,
    seed: int = 0,
    max_evaluations: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> SearchOutcome:
    """Algorithm 1 of the paper on `problem`.

    Args:
        journal_path (Path): One line per evaluation; see :class:`Journal`.
        settings (Mapping): What must not change between a run and its resumption.
        seed (int): Of the random choices.
        max_evaluations (int, optional): Stop early. Defaults to the whole budget.

    Raises:
        ValueError: The journal exists and is not to be resumed, or belongs to other settings.
        RuntimeError: No candidate could be scored.
    """
    search = EvolutionSearch(
        problem.space,
        parameters,
        list(problem.seeds.values()),
        seed,
        max_evaluations=max_evaluations,
    )
    ledger = Ledger(journal_path, settings, problem, resume=resume, overwrite=overwrite)
    with contextlib.closing(ledger), Progress(search.total_evaluations, "search", "evals") as bar:
        while not search.done:
            generation = search.ask()
            if not generation:
                break  # the space is exhausted
            for candidate in generation:
                evaluation = ledger.score(candidate, objective)
                search.tell([candidate], [evaluation.score])
                bar.update(f"best {search.best[1]:.4f}, iteration {search.iteration}")
        seed_scores = {
            name: ledger.score(candidate, objective).score
            for name, candidate in problem.seeds.items()
        }
    candidate, score = search.best
    if score == float("inf"):
        raise RuntimeError(
            f"no candidate could be scored; see the error fields in {journal_path} for the reason"
        )
    return SearchOutcome(candidate, score, search.num_evaluations, seed_scores)
