"""What a search has scored so far, from memory, from the journal, from other replicas."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.generations import Trial
from megatron_longrope.factor_search.journal import Evaluation, Journal, is_failed
from megatron_longrope.factor_search.problem import SearchProblem
from megatron_longrope.factor_search.space import Candidate
from megatron_longrope.factor_search.trial_queue import SharedTrialQueue, TrialQueue

Key = tuple[tuple[float, ...], int]
"""Factors and start tokens."""


class KnownScores:
    """Evaluations by trial, and the losses known of each candidate.

    Args:
        problem (SearchProblem): Says which factors a candidate stands for.
        records (Sequence[Evaluation]): From a journal.
    """

    def __init__(self, problem: SearchProblem, records: Sequence[Evaluation] = ()) -> None:
        self._problem = problem
        self._by_index: dict[int, Evaluation] = {}
        self._losses: dict[Key, tuple[float, ...]] = {}
        for record in records:
            self.add(record)
        self.num_resumed = len(self._by_index)

    def add(self, record: Evaluation) -> None:
        """Remember an evaluation."""
        self._by_index[record.index] = record
        self.add_losses(record)

    def add_losses(self, record: Evaluation) -> None:
        """Remember the losses of an evaluation, which may be another search's."""
        key = record.rescale_factors, record.num_start_tokens
        if record.error is None and len(record.sample_nlls) > len(self._losses.get(key, ())):
            self._losses[key] = record.sample_nlls

    def find(self, trial: Trial) -> Evaluation | None:
        """The trial's evaluation, if there is one.

        Raises:
            LongRopeError: The trial of that index was another candidate, or its scoring was stopped
                where this search needs the score.
        """
        record = self._by_index.get(trial.index)
        if record is None:
            return None
        if (record.rescale_factors, record.num_start_tokens) != self._key(trial.candidate):
            raise LongRopeError(
                f"evaluation {trial.index}, of the journal or of another replica, is not the "
                "candidate that this search asks for; it comes from another release of this "
                "package or of numpy and scipy: go on with that one on every node, or discard the "
                "journal with --overwrite"
            )
        if record.stopped == "exact" and trial.incumbent is None:
            raise LongRopeError(
                f"evaluation {trial.index} of the journal was stopped early, as CMA-ES did "
                "in earlier releases, and what came after it may be due to that: discard the "
                "journal with --overwrite, or go on with the release that began it"
            )
        return record

    def losses(self, candidate: Candidate) -> tuple[float, ...]:
        """Losses of the candidate's first samples, as far as they are known."""
        return self._losses.get(self._key(candidate), ())

    def _key(self, candidate: Candidate) -> Key:
        target = self._problem.factor_set(candidate)
        return target.rescale_factors, target.num_start_tokens


@dataclass(frozen=True)
class Team:
    """The replicas that share a search."""

    index: int = 0
    """This one; replica 0 writes the journal."""
    count: int = 1
    """How many there are."""
    store: dist.Store | None = None
    """What they share; None for a single one."""


@contextlib.contextmanager
def open_journal(
    path: Path,
    settings: Mapping[str, Any],
    problem: SearchProblem,
    team: Team,
    *,
    resume: bool,
    overwrite: bool,
    retry_failed: bool = False,
) -> Iterator[tuple[KnownScores, TrialQueue]]:
    """The journal of a search on replica 0, and what it holds on every replica.

    Args:
        retry_failed (bool): Hold back evaluations without a score. Defaults to False.

    Raises:
        LongRopeError: The journal exists and is not to be resumed, or belongs to other settings; on
            every replica.
    """

    def held(journal: Journal) -> list[Evaluation]:
        return [item for item in journal.records if not (retry_failed and is_failed(item))]

    if team.store is None or team.count == 1:
        with Journal(path, settings, resume=resume, overwrite=overwrite) as journal:
            yield KnownScores(problem, held(journal)), TrialQueue(journal.append)
        return
    store = dist.PrefixStore(str(path), team.store)
    with contextlib.ExitStack() as stack:
        write = None
        if team.index == 0:
            try:
                journal = stack.enter_context(
                    Journal(path, settings, resume=resume, overwrite=overwrite)
                )
            except ValueError as error:
                store.set("journal", json.dumps({"error": str(error)}))
                raise
            write = journal.append
            records = [record.to_dict() for record in held(journal)]
            store.set("journal", json.dumps({"records": records}))
        # Not `get`, which gives up after the store's timeout: a long journal takes its time.
        while not store.check(["journal"]):
            time.sleep(0.05)
        found = json.loads(store.get("journal"))
        if "error" in found:
            raise LongRopeError(found["error"])
        scores = KnownScores(problem, [Evaluation.from_dict(item) for item in found["records"]])
        queue = SharedTrialQueue(store, team.index, team.count, write)
        try:
            yield scores, queue
        except BaseException:
            queue.close(done=False)
            raise
        queue.close(done=True)
