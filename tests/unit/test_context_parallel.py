"""Zigzag sharding, in literal integers."""

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longrope.config import FactorSet, identity_config
from megatron_longrope.context_parallel import (
    check_divisible,
    padding,
    shard,
    shard_documents,
    unshard,
    zigzag_chunks,
    zigzag_positions,
)
from megatron_longrope.selection import FactorSelection


@pytest.mark.parametrize(
    ("length", "cp_size", "expected"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (8, 2, [[0, 1, 6, 7], [2, 3, 4, 5]]),
        (4, 2, [[0, 3], [1, 2]]),
        (12, 3, [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]),
        (
            16,
            4,
            [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]],
        ),
    ],
)
def test_each_rank_holds_one_early_and_one_late_chunk(length, cp_size, expected):
    assert [zigzag_positions(length, rank, cp_size).tolist() for rank in range(cp_size)] == expected


def test_chunk_indices_of_four_ranks():
    assert [zigzag_chunks(rank, 4) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]


def test_positions_are_integers_so_that_none_is_rounded():
    assert zigzag_positions(8, 1, 2).dtype == torch.int64
    assert zigzag_positions(8, 0, 1).dtype == torch.int64


@settings(deadline=None)
@given(
    cp_size=st.integers(1, 6),
    chunk=st.integers(1, 5),
    dim=st.integers(0, 2),
    others=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_unshard_undoes_shard_on_any_dimension(cp_size, chunk, dim, others):
    shape = list(others)
    shape.insert(dim, 2 * cp_size * chunk)
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [shard(whole, rank, cp_size, dim) for rank in range(cp_size)]
    assert all(part.shape[dim] == 2 * chunk for part in parts)
    assert torch.equal(unshard(parts, dim), whole)


@settings(deadline=None)
@given(cp_size=st.integers(1, 8), chunk=st.integers(1, 9))
def test_shard_of_positions_is_zigzag_positions_and_covers_every_position_once(cp_size, chunk):
    length = 2 * cp_size * chunk
    rows = [zigzag_positions(length, rank, cp_size) for rank in range(cp_size)]
    for rank, row in enumerate(rows):
        assert torch.equal(shard(torch.arange(length), rank, cp_size, 0), row)
    assert torch.cat(rows).sort().values.tolist() == list(range(length))


@settings(deadline=None)
@given(cp_size=st.integers(2, 8), chunk=st.integers(1, 9))
def test_every_rank_has_the_same_amount_of_causal_attention(cp_size, chunk):
    length = 2 * cp_size * chunk
    work = {int(zigzag_positions(length, rank, cp_size).sum()) for rank in range(cp_size)}
    assert len(work) == 1


def test_an_indivisible_length_is_refused_with_the_next_length_that_fits():
    message = (
        "sequence length 130 is not divisible by 2 x context parallel size 4 = 8; "
        "use 136 or another context parallel size"
    )
    for call in (
        lambda: check_divisible(130, 4),
        lambda: zigzag_positions(130, 0, 4),
        lambda: shard(torch.zeros(2, 130), 0, 4, dim=1),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


def test_a_length_is_padded_unless_it_would_take_another_factor_set():
    config = identity_config(10000.0, 16, 64).with_factor_set(FactorSet(255, (4.0,) * 8))
    selection = FactorSelection(config)
    assert [padding(selection, length, 2) for length in (61, 64, 250)] == [3, 0, 2]
    assert padding(selection, 255, 1) == 0
    with pytest.raises(ValueError, match="sequence length 255 is not divisible"):
        padding(selection, 255, 2)
    config = identity_config(10000.0, 16, 63).with_factor_set(FactorSet(256, (4.0,) * 8))
    with pytest.raises(ValueError, match="sequence length 62 is not divisible"):
        padding(FactorSelection(config), 62, 2)
    assert padding(FactorSelection(config, pinned_length=256), 62, 2) == 2


def test_one_rank_takes_any_length():
    check_divisible(7, 1)
    assert zigzag_positions(7, 0, 1).tolist() == list(range(7))
    whole = torch.arange(7)
    assert shard(whole, 0, 1, 0) is whole
    assert unshard([whole], 0) is whole


@settings(deadline=None)
@given(cp_size=st.integers(1, 4), chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_packed_documents_are_each_sharded_by_themselves(cp_size, chunks):
    lengths = [2 * cp_size * chunk for chunk in chunks]
    offsets = [0, *accumulate(lengths)]
    batch = torch.arange(3 * offsets[-1]).view(3, -1)
    for rank in range(cp_size):
        ours = shard_documents(batch, offsets, rank, cp_size, dim=1)
        alone = [
            shard(batch[:, start:end], rank, cp_size, dim=1) for start, end in pairwise(offsets)
        ]
        assert torch.equal(ours, torch.cat(alone, dim=1))


def test_a_packed_document_that_does_not_split_is_named():
    with pytest.raises(ValueError, match="packed document 1: sequence length 6 is not divisible"):
        shard_documents(torch.arange(14), [0, 8, 14], 0, 2, dim=0)
