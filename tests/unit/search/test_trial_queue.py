"""Replicas around a store: what one sees of another that has ended or failed."""

import json

import pytest
import torch.distributed as dist
from synthetic_search import Synthetic, small_problem

from megatron_longrope.factor_search.evolution import EvolutionParameters, EvolutionSearch
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
