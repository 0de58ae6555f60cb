"""Where documents and their zigzag chunks lie."""

import pytest
import torch

pytest.importorskip("megatron.core")

from hypothesis import given
from hypothesis import strategies as st

from megatron_longrope.attention.documents import Documents, padded_rows, token_rows
from megatron_longrope.attention.ring import _visible
from megatron_longrope.context_parallel import zigzag_positions


def test_padding_lies_in_the_last_chunks():
    documents = Documents((5, 8), (8, 8))
    assert documents.halves(0, 2) == Documents((2, 0, 2, 2), (2, 2, 2, 2))
    assert documents.halves(1, 2) == Documents((2, 1, 2, 2), (2, 2, 2, 2))
    assert documents.on_rank(0, 2) == Documents((2, 4), (4, 4))
    assert documents.on_rank(1, 2) == Documents((3, 4), (4, 4))


def test_rows_of_tokens_and_padding():
    documents = Documents((2, 0, 1), (3, 1, 1))
    rows = torch.arange(1, 8)[None, :, None]
    tokens = token_rows(rows, documents)
    assert tokens.flatten().tolist() == [1, 2, 5]
    assert padded_rows(tokens, documents, 7).flatten().tolist() == [1, 2, 0, 0, 5, 0, 0]


@st.composite
def shards(draw):
    size = draw(st.integers(1, 4))
    rows = 2 * size * draw(st.integers(1, 3))
    return size, Documents((draw(st.integers(0, rows)),), (rows,))


@given(shards())
def test_a_ranks_tokens_are_the_first_rows_of_its_part(shard):
    size, documents = shard
    for rank in range(size):
        positions = zigzag_positions(documents.rows[0], rank, size).tolist()
        is_token = [position < documents.lengths[0] for position in positions]
        assert is_token == sorted(is_token, reverse=True)
        assert documents.on_rank(rank, size).lengths == (sum(is_token),)


@given(shards(), st.booleans())
def test_the_tiles_of_the_ring_are_exactly_the_visible_pairs(shard, causal):
    size, documents = shard
    for rank in range(size):
        positions = [zigzag_positions(documents.rows[0], r, size).tolist() for r in range(size)]
        seen = set()
        for source in range(size):
            queries, keys = _visible(documents, 0, rank, source, size, causal)
            diagonal = causal and source == rank
            assert not diagonal or queries == keys
            pairs = {
                (positions[rank][row], positions[source][column])
                for row in queries
                for column in keys
                if not diagonal or column <= row
            }
            assert not pairs & seen
            seen |= pairs
        tokens = range(documents.lengths[0])
        mine = [position for position in positions[rank] if position in tokens]
        assert seen == {(q, k) for q in mine for k in tokens if not causal or k <= q}
