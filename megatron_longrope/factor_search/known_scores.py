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
        self.num_resumed = sum(index >= 0 for index in self._by_index)

    def add(self, record: Evaluation) -> None:
        """Remember an evaluation."""
        self._by_index[record.index] = record
        key = record.rescale_factors, record.num_start_tokens
        if record.error is None and len(record.sample_nlls) > len(self._losses.get(key, ())):
            self._losses[key] = record.sample_nlls

    def find(self, trial: Trial) -> Evaluation | None:
        """The trial's evaluation, if there is one.

        Raises:
            LongRopeError: The trial of that index was another candidate.
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
) -> Iterator[tuple[KnownScores, TrialQueue]]:
    """The journal of a search on replica 0, and what it holds on every replica.

    References without a score are held back, to be scored again, until a trial of the search is
    recorded: from then on it depends on what it was told of them.

    Raises:
        LongRopeError: The journal exists and is not to be resumed, or belongs to other settings; on
            every replica.
    """

    def held(journal: Journal) -> list[Evaluation]:
        begun = any(item.index >= 0 for item in journal.records)
        return [item for item in journal.records if begun or not is_failed(item)]

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
