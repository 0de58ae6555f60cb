"""Replicas around a store: what one sees of another that has ended or failed."""

import contextlib
import json
import threading

import pytest
import torch.distributed as dist
from synthetic_search import Synthetic, small_problem

from megatron_longrope.factor_search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.factor_search.journal import Evaluation
from megatron_longrope.factor_search.known_scores import Team
from megatron_longrope.factor_search.runner import SearchRun, run_search
from megatron_longrope.factor_search.trial_queue import SharedTrialQueue


@pytest.fixture
def queues():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    yield [SharedTrialQueue(store, index, 2) for index, store in enumerate((server, client))]


def test_a_replica_that_has_failed_ends_the_others_at_once(queues):
    first, second = queues
    assert second.claim(0)  # and never publishes it
    first.wait()
    second.close(done=False)
    with pytest.raises(RuntimeError, match="replica 1 of 2 has failed"):
        first.wait()
    first.close(done=False)


def test_a_replica_that_has_ended_is_not_taken_for_dead(queues):
    first, second = queues
    second.close(done=True)
    first.wait()
    first.close(done=True)


def test_a_replica_that_dies_while_it_publishes_does_not_stop_the_journal(monkeypatch):
    store, journaled = dist.TCPStore("127.0.0.1", 0, is_master=True), []
    first = SharedTrialQueue(store, 0, 2, lambda record: journaled.append(record.index))
    dying = SharedTrialQueue(store.clone(), 1, 2)
    first.publish(Evaluation((1.0,), 0, 2.0, (0.7,), index=4))

    class DiesAfter:
        """Lets so many changes of the store through."""

        def __init__(self, steps):
            self.steps = steps

        def __getattr__(self, name):
            self.steps -= 1
            if self.steps < 0:
                raise KeyboardInterrupt
            return getattr(store, name)

    for steps in range(3):
        monkeypatch.setattr(dying, "_store", DiesAfter(steps))
        with contextlib.suppress(KeyboardInterrupt):
            dying.publish(Evaluation((1.0,), 0, 2.0, (0.7,), index=10 + steps))
        first.publish(Evaluation((1.0,), 0, 2.0, (0.7,), index=5 + steps))
    closing = threading.Thread(target=first.close, args=(False,), daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    dying.close(done=False)
    assert journaled == [4, 5, 6, 12, 7]  # in the order of publishing


def test_another_replicas_result_of_another_candidate_is_refused(tmp_path):
    problem, parameters = small_problem(), EvolutionParameters(8, 4, 4, max_iterations=1)

    def search(seed):
        return EvolutionSearch(problem.space, parameters, list(problem.seeds.values()), seed)

    other = SearchRun(tmp_path / "2.jsonl")
    theirs = run_search(search(2), problem, Synthetic(), other).records[7]
    store, path = dist.TCPStore("127.0.0.1", 0, is_master=True), tmp_path / "1.jsonl"
    shared = dist.PrefixStore(str(path), store)
    shared.set("record/7", json.dumps(theirs.to_dict()))
    with pytest.raises(ValueError, match="evaluation 7, of the journal or of another replica, is"):
        run_search(search(1), problem, Synthetic(), SearchRun(path, team=Team(0, 2, store)))
