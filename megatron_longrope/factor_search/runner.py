"""Run a search to its end: ask, score, journal, tell; resume where a crash left it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.generations import GenerationalSearch, Trial
from megatron_longrope.factor_search.journal import (
    Evaluation,
    fresh_samples,
    is_complete,
    is_failed,
)
from megatron_longrope.factor_search.known_scores import KnownScores, Team, open_journal
from megatron_longrope.factor_search.objective import PerplexityObjective
from megatron_longrope.factor_search.problem import SearchProblem
from megatron_longrope.factor_search.scoring import score_trial
from megatron_longrope.factor_search.space import Candidate, GivenFactors
from megatron_longrope.factor_search.trial_queue import TrialQueue
from megatron_longrope.progress import Progress


@dataclass(frozen=True)
class SearchOutcome:
    """The winner of a search, and what it took."""

    candidate: Candidate | GivenFactors
    """Best candidate, or the reference that none of them beats."""
    score: float
    """Its perplexity on the search samples."""
    seed_scores: dict[str, float]
    """Perplexity of each named starting point and each reference that was scored."""
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
    racing: str = "exact"
    """`exact`: a candidate that cannot beat its incumbent, if it has one, is given up. `off`: none
    is."""
    resume: bool = False
    """Continue the journal, if there is one."""
    overwrite: bool = False
    """Discard the journal, if there is one."""
    team: Team = field(default_factory=Team)
    """Replicas that share the work."""


class SearchStatus:
    """Counts what a search has done and what racing has spared it.

    Args:
        num_samples (int): Samples behind a complete evaluation.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.evaluations = 0
        """Records counted, those replayed from a journal included."""
        self.sample_forwards = 0
        """Forward passes over one sample."""
        self.avoided = 0
        """Sample-forwards that racing made unnecessary."""
        self.failed = 0
        """Evaluations without a score."""
        self.best: Evaluation | None = None
        """The best record scored on every sample; None before the first."""
        self._counted: dict[Any, int] = {}

    @property
    def saving(self) -> float:
        """Part of all sample-forwards, done and avoided, that racing avoided."""
        return self.avoided / max(self.avoided + self.sample_forwards, 1)

    def add(self, record: Evaluation, wanted: int | None = None) -> None:
        """Count an evaluation; a promoted candidate's earlier samples are not counted again.

        Args:
            record (Evaluation): The evaluation.
            wanted (int, optional): Samples that it would have had without racing. Defaults to all.
        """
        self.evaluations += 1
        self.sample_forwards += fresh_samples(record, self._counted)
        if record.stopped == "exact":  # a budget of halving is meant to be spent in part only
            self.avoided += max((wanted or self.num_samples) - len(record.sample_nlls), 0)
        self.failed += is_failed(record)
        if is_complete(record) and (self.best is None or record.score < self.best.score):
            self.best = record

    def note(self) -> str:
        """`71 evaluations, best 12.3456 (n_hat 4), 118 sample-forwards saved (34 %), 1 failed`."""
        parts = [f"{self.evaluations:,} evaluation{'' if self.evaluations == 1 else 's'}"]
        if self.best is None:
            parts.append("no score yet")
        else:
            parts.append(f"best {self.best.score:.4f} (n_hat {self.best.num_start_tokens})")
        if self.avoided:
            plural = "s" if self.avoided > 1 else ""
            saved = f"{self.avoided:,} sample-forward{plural} saved"
            parts.append(f"{saved} ({100 * self.saving:.0f} %)")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        return ", ".join(parts)


def run_search(
    search: GenerationalSearch,
    problem: SearchProblem,
    objective: PerplexityObjective,
    run: SearchRun,
    *,
    label: str = "search",
    references: Sequence[GivenFactors] = (),
) -> SearchOutcome:
    """Score `references`, then what `search` asks for until it is done.

    Args:
        search (GenerationalSearch): A new one; the journal brings it up to date.
        problem (SearchProblem): What the candidates mean.
        objective (PerplexityObjective): What a trial is scored on.
        run (SearchRun): Where and how.
        label (str): Of the progress line.
        references (Sequence[GivenFactors]): Scored before the search, all samples of each: what
            they scored costs nothing in it, and the winner must beat them.

    Raises:
        LongRopeError: The journal exists and is not to be resumed, or belongs to other settings.
        LongRopeError: No candidate, or none of the references, could be scored, or a replica died.
        LongRopeError: The journal holds more than the search asks for.
    """
    status = SearchStatus(objective.num_samples)
    records: dict[int, Evaluation] = {}
    total = search.total_samples(objective.num_samples)
    with open_journal(
        run.journal, {**run.settings, "racing": run.racing}, problem, run.team,
        resume=run.resume, overwrite=run.overwrite,
    ) as (scores, queue):  # fmt: skip
        given = []
        if references:
            given = _score_references(references, problem, objective, scores, queue)
            if not any(map(is_complete, given)):
                raise _without_score(run)
        with Progress(total, label, "samples") as bar:
            while trials := search.trials():
                arrived = [record for trial in trials if (record := scores.find(trial))]
                if not arrived:
                    _score_next(trials, problem, objective, run.racing, scores, queue)
                    continue  # and find there whether it is what was asked for
                trials_by_index = {trial.index: trial for trial in trials}
                for record in sorted(arrived, key=lambda item: item.index):
                    search.tell(trials_by_index[record.index].candidate, record.score)
                    done = status.sample_forwards + status.avoided
                    status.add(record, trials_by_index[record.index].samples)
                    records[record.index] = record
                    bar.update(
                        status.note(),
                        status.sample_forwards + status.avoided - done,
                        resumed=len(records) <= scores.num_resumed,
                    )
            bar.finish(status.note())
    # With patience, what was asked ahead may be beyond the end.
    if scores.num_resumed > len(records) and not search.has_patience:
        raise LongRopeError(
            f"{run.journal} holds {scores.num_resumed} evaluations and this search ends after "
            f"{len(records)}; give it the budget that it was begun with, or a larger one"
        )
    return _outcome(search, problem, run, given, records, status)


def _outcome(
    search: GenerationalSearch, problem: SearchProblem, run: SearchRun,
    given: Sequence[Evaluation], records: Mapping[int, Evaluation], status: SearchStatus,
) -> SearchOutcome:  # fmt: skip
    """Choose the best of what was searched and of the references.

    Raises:
        LongRopeError: No candidate could be scored.
    """
    candidate, score = search.best
    seed_scores = _named_scores(problem, [*given, *records.values()])
    for name, reference in problem.references.items():
        if seed_scores.get(name, math.inf) < score:
            candidate, score = reference, seed_scores[name]
    if not math.isfinite(score):
        raise _without_score(run)
    return SearchOutcome(
        candidate,
        score,
        seed_scores,
        len(records),
        status.sample_forwards,
        status.avoided,
        status.failed,
        tuple(records[index] for index in sorted(records)),
    )


def _without_score(run: SearchRun) -> LongRopeError:
    return LongRopeError(
        f"no candidate could be scored; see the error fields in {run.journal} for the reason; "
        "once it is gone (out of memory: with a larger --context-parallel-size or "
        "--tensor-model-parallel-size) run the same command with --resume"
    )


def _score_references(
    references: Sequence[GivenFactors], problem: SearchProblem, objective: PerplexityObjective,
    scores: KnownScores, queue: TrialQueue,
) -> list[Evaluation]:  # fmt: skip
    """Score given factors, as trials -1, -2, ... of the search's journal."""
    waiting = [Trial(~number, item) for number, item in enumerate(references)]
    status, found, resumed = SearchStatus(objective.num_samples), list[Evaluation](), True
    with Progress(len(waiting) * objective.num_samples, "references", "samples") as bar:
        while waiting:
            for trial in list(waiting):
                if record := scores.find(trial):
                    waiting.remove(trial)
                    found.append(record)
                    status.add(record)
                    bar.update(status.note(), objective.num_samples, resumed=resumed)
            if waiting:
                _score_next(waiting, problem, objective, "off", scores, queue)
            resumed = False
    return found


def _score_next(
    trials: Sequence[Trial], problem: SearchProblem, objective: PerplexityObjective,
    racing: str, scores: KnownScores, queue: TrialQueue,
) -> None:  # fmt: skip
    """Add another replica's results to `scores`, or else that of one trial; or wait for either."""
    arrived = [record for trial in trials if (record := queue.fetch(trial.index))]
    for record in arrived:
        scores.add(record)
    if arrived:
        return
    trial = next((trial for trial in trials if queue.claim(trial.index)), None)
    if trial is None:
        queue.wait()
        return
    incumbent = None
    if trial.incumbent is not None and racing == "exact":
        incumbent = scores.losses(trial.incumbent)
    known = scores.losses(trial.candidate)
    record = score_trial(trial, problem, objective, known=known, incumbent=incumbent)
    queue.publish(record)
    scores.add(record)


def _named_scores(problem: SearchProblem, records: Iterable[Evaluation]) -> dict[str, float]:
    """Perplexity of seeds and references, as far as all of their samples were scored."""
    scores = {
        (record.rescale_factors, record.num_start_tokens): record.score
        for record in records
        if record.stopped is None
    }
    named = {}
    for name, candidate in {**problem.seeds, **problem.references}.items():
        target = problem.factor_set(candidate)
        score = scores.get((target.rescale_factors, target.num_start_tokens))
        if score is not None:
            named[name] = score
    return named
