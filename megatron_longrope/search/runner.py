"""Run a search to its end: ask, score, journal, tell; resume where a crash left it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longrope.progress import Progress
from megatron_longrope.search.board import Board
from megatron_longrope.search.generations import Generation, GenerationalSearch
from megatron_longrope.search.journal import Evaluation
from megatron_longrope.search.ledger import Ledger, Team, opened
from megatron_longrope.search.objective import Objective
from megatron_longrope.search.problem import SearchProblem
from megatron_longrope.search.racing import Race
from megatron_longrope.search.scoring import score_trial
from megatron_longrope.search.space import Candidate
from megatron_longrope.search.telemetry import SearchStatus, Telemetry


@dataclass(frozen=True)
class SearchOutcome:
    """The winner of a search, and what it took."""

    candidate: Candidate
    """Best candidate."""

    score: float
    """Its perplexity on the search samples."""

    seed_scores: dict[str, float]
    """Perplexity of each named starting point that was scored."""

    num_evaluations: int
    """Trials, resumed ones included."""

    sample_forwards: int
    """Samples that went through the model for them."""

    sample_forwards_saved: int
    """Samples that racing made unnecessary."""

    num_failed: int
    """Trials without a score."""

    records: tuple[Evaluation, ...] = field(repr=False, compare=False, default=())
    """All evaluations, in the order of asking."""


@dataclass(frozen=True)
class SearchRun:
    """Where and how a search is run; says nothing about what it looks for."""

    journal: Path
    """One line per evaluation; see :class:`Journal`."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """What must not change between a run and its resumption."""

    race: Race = field(default_factory=Race)
    """When a candidate is given up."""

    resume: bool = False
    """Continue the journal, if there is one."""

    overwrite: bool = False
    """Discard the journal, if there is one."""

    team: Team = field(default_factory=Team)
    """Replicas that share the work."""

    tensorboard: Path | None = None
    """Directory for TensorBoard scalars."""


def run_search(
    search: GenerationalSearch,
    problem: SearchProblem,
    objective: Objective,
    run: SearchRun,
    *,
    label: str = "search",
) -> SearchOutcome:
    """Score what `search` asks for until it is done.

    Args:
        search (GenerationalSearch): A new one; the journal brings it up to date.
        problem (SearchProblem): What the candidates mean.
        objective (Objective): Scores a sample.
        run (SearchRun): Where and how.
        label (str): Of the progress line.

    Raises:
        ValueError: The journal exists and is not to be resumed, or belongs to other settings.
        RuntimeError: No candidate could be scored, or a replica died.
    """
    num_samples = objective.num_samples
    status = SearchStatus(num_samples)
    records: dict[int, Evaluation] = {}
    settings = {**run.settings, "racing": [run.race.rule, run.race.significance]}
    total = search.total_samples(num_samples)
    with (
        opened(
            run.journal, settings, problem, run.team, resume=run.resume, overwrite=run.overwrite
        ) as (ledger, board),
        Progress(total, label, "samples") as bar,
        Telemetry(run.tensorboard) as telemetry,
    ):
        while trials := search.trials():
            arrived = [record for trial in trials if (record := ledger.find(trial))]
            if not arrived:
                arrived = _work(trials, problem, objective, run.race, ledger, board)
            trials_by_index = {trial.index: trial for trial in trials}
            for record in sorted(arrived, key=lambda item: item.index):
                search.tell([trials_by_index[record.index].candidate], [record.score])
                done = status.sample_forwards + status.avoided
                status.add(record, trials_by_index[record.index].samples)
                records[record.index] = record
                resumed = len(records) <= ledger.num_resumed
                bar.update(
                    status.note(), status.sample_forwards + status.avoided - done, resumed=resumed
                )
                if not resumed:
                    telemetry.evaluated(record, status.best and status.best.score, status)
        bar.finish(status.note())
    candidate, score = search.best
    if not math.isfinite(score):
        raise RuntimeError(
            f"no candidate could be scored; see the error fields in {run.journal} for the reason"
        )
    return SearchOutcome(
        candidate,
        score,
        _named_scores(problem, records.values()),
        len(records),
        status.sample_forwards,
        status.avoided,
        status.failed,
        tuple(records[index] for index in sorted(records)),
    )


def _work(
    trials: Sequence, problem: SearchProblem, objective: Objective, race: Race,
    ledger: Ledger, board: Board,
) -> list[Evaluation]:  # fmt: skip
    """Score one trial, or wait for the other replicas; returns what is new."""
    arrived = [record for trial in trials if (record := board.fetch(trial.index))]
    if not arrived:
        trial = next((trial for trial in trials if board.claim(trial.index)), None)
        if trial is None:
            board.wait()
            return []
        rival = None
        if trial.rival is not None and (trial.certain or race.rule == "paired"):
            losses = ledger.losses(trial.rival)
            # A rival that was itself stopped has not got the samples to compare on.
            rival = losses if len(losses) == objective.num_samples else None
        record = score_trial(
            trial, problem, objective, race, known=ledger.losses(trial.candidate), rival=rival
        )
        board.publish(record)
        arrived = [record]
    for record in arrived:
        ledger.add(record)
    return arrived


def _named_scores(problem: SearchProblem, records) -> dict[str, float]:
    """Perplexity of the seeds, as far as all of their samples were scored."""
    scores = {
        (record.rescale_factors, record.num_start_tokens): record.score
        for record in records
        if record.stopped is None
    }
    named = {}
    for name, candidate in problem.seeds.items():
        target = problem.factor_set(candidate)
        score = scores.get((target.rescale_factors, target.num_start_tokens))
        if score is not None:
            named[name] = score
    return named


class SeedSearch(GenerationalSearch):
    """Scores given candidates, and that is all."""

    def __init__(self, space, candidates: Sequence[Candidate]) -> None:
        super().__init__(space)
        self._candidates = list(dict.fromkeys(candidates))
        self._advance()

    def total_samples(self, num_samples: int) -> int:
        """Sample-forwards of all candidates."""
        return num_samples * len(self._candidates)

    def _draw(self, number: int) -> Generation | None:
        return self._generation(self._candidates) if number == 0 else None


def choose_policy(
    problem: SearchProblem, policies: tuple[str, ...], objective: Objective, run: SearchRun
) -> tuple[str, dict[str, dict[str, float]]]:
    """Score the seeds under each attention-factor policy; the policy of the best seed wins.

    Returns:
        tuple: The policy, and the perplexity of every seed under every policy.
    """
    table: dict[str, dict[str, float]] = {}
    for policy in policies:
        variant = problem.with_attention(None, policy)
        path = run.journal.with_suffix(f".policy-{policy}.jsonl")
        part = SearchRun(path, run.settings, Race("off"), run.resume, run.overwrite, run.team)
        search = SeedSearch(problem.space, list(problem.seeds.values()))
        label = f"attention factor {policy}"
        table[policy] = run_search(search, variant, objective, part, label=label).seed_scores
    return min(policies, key=lambda policy: min(table[policy].values())), table
