"""Replicas around a store: what one sees of another that has ended or failed."""

import pytest
import torch.distributed as dist

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
