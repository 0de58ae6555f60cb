"""A rank that runs out of memory ends the job: its replica waits for it in a layer's collective."""

import pytest
import torch
import torch.distributed as dist

from megatron_longrope.factor_search.replicas import Replica

TOKENS = torch.zeros(1, 4, dtype=torch.int64)
FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
]


class Broken:
    """An engine whose forward pass fails."""

    replica = (0, 1)

    def __init__(self, failure):
        self.failure = failure

    def nll(self, tokens, start=0):
        raise self.failure


@pytest.fixture
def orders(monkeypatch):
    """What went over the replica's group: for a follower, what it receives."""
    sent = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda *_, **__: "group")

    def broadcast(order, src, group):
        if order == [None]:
            order[0] = ("nll", TOKENS)
        sent.append(order[0][0])

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    return sent


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_ends_every_rank_with_one_sentence(monkeypatch, orders, rank, failure):
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    replica = Replica(Broken(failure), 2)
    with pytest.raises(RuntimeError) as error:
        replica.nll(TOKENS) if replica.is_leader else replica.serve()
    sentence = str(error.value)
    assert sentence.startswith(f"rank {rank} ran out of memory in a forward pass that its replica")
    assert "start the job again with --resume" in sentence and "\n" not in sentence
    # Nobody is there to hear that the search is over: the others wait in a layer.
    replica.close()
    assert orders == ["nll"]


def test_a_replica_of_one_rank_leaves_the_failure_to_its_caller(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(torch.OutOfMemoryError):
        Replica(Broken(FAILURES[0]), 1).nll(TOKENS)


def test_other_failures_pass_through_and_leave_nobody_waiting_for_an_order(monkeypatch, orders):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    replica = Replica(Broken(ValueError("token id 9 is outside the vocabulary")), 2)
    with pytest.raises(ValueError, match="token id 9"):
        replica.nll(TOKENS)
    replica.close()
    assert orders == ["nll"]
