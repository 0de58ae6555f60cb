"""Memory of attention under context parallelism; tests/distributed has what it computes."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron_longrope.attention.documents import Documents
from megatron_longrope.attention.gathered import attend_gathered

TOKENS, SIZE = 64, 4


@dataclass
class Group:
    """One process that plays a rank of several."""

    index: int

    def rank(self):
        return self.index

    def size(self):
        return SIZE


@pytest.mark.parametrize("rank", range(SIZE))
@pytest.mark.parametrize("causal", [True, False])
def test_a_rank_has_one_copy_of_the_keys_and_values_that_it_sees(monkeypatch, rank, causal):
    monkeypatch.setattr(  # all ranks' parts are as this one's
        dist, "all_gather", lambda parts, tensor, group: [part.copy_(tensor) for part in parts]
    )
    given = []

    def attend(query, key, value, *_):
        given.extend((key, value))
        return query

    batch = [torch.randn(1, TOKENS // SIZE, 2, 8, requires_grad=True) for _ in range(3)]
    attend_gathered(attend, *batch, Documents.whole(TOKENS), [1.0], causal, Group(rank))
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in given}
    chunks = 2 * SIZE - rank if causal else 2 * SIZE  # to the end of the rank's upper one
    whole = 4 * 2 * TOKENS * 2 * 8
    assert sum(sizes.values()) == whole * chunks // (2 * SIZE)
