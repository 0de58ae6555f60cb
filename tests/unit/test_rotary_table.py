"""`build_table` against an fp64 formula of its own, mpmath and megatron-core."""

import math

import mpmath
import pytest
import torch
from angles import distance_on_the_circle
from fp32_angles import angles_fp32
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_longrope import rotary_table
from megatron_longrope.rotary_table import build_table

DIM = 16
FACTORS = (1.0, 1.1, 1.5, 2.7, 3.3, 4.9, 6.1, 7.7)
LLAMA_FACTORS = tuple(1.0 + 511.0 * (i / 63) ** 3 for i in range(64))


def table_of(*chunks: range, base=10000.0, dim=DIM, factors=FACTORS, **options) -> torch.Tensor:
    """`[s, d]`: the table without its two middle dimensions of one."""
    table = build_table(
        chunks,
        rotary_base=base,
        rotary_dim=dim,
        rescale_factors=factors,
        device="cpu",
        **options,
    )
    assert table.shape == (sum(map(len, chunks)), 1, 1, dim)
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    return table[:, 0, 0]


def fp64_angles(positions, base=10000.0, dim=DIM, factors=FACTORS, start_tokens=0):
    """Equation 3 of the paper, `[s, d/2]`; fp64 is exact to 1e-8 rad here."""
    positions = torch.tensor(positions, dtype=torch.float64)[:, None]
    beta = base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scale = torch.tensor(factors or (1.0,) * (dim // 2), dtype=torch.float64)
    slowed = positions / (scale * beta)
    return torch.where(positions < start_tokens, positions / beta, slowed)


def positions_of(chunks) -> list[int]:
    return [position for chunk in chunks for position in chunk]


starts = st.integers(0, 2**22 - 5000)
lengths = st.one_of(st.integers(0, 70), st.sampled_from([2047, 2048, 2049, 4100]))
chunk_lists = st.lists(st.builds(lambda a, n: range(a, a + n), starts, lengths), max_size=4)
factor_lists = st.none() | st.lists(
    st.floats(1.0, 1024.0), min_size=DIM // 2, max_size=DIM // 2
).map(sorted)


# Exact angles


@given(
    chunks=chunk_lists,
    factors=factor_lists,
    base=st.sampled_from([10000.0, 500000.0, 1e6]),
    start_tokens=st.one_of(st.integers(0, 2000), st.integers(0, 2**22)),
)
@example(chunks=[range(2**22 - 2000, 2**22 + 1)], factors=None, base=10000.0, start_tokens=0)
@example(chunks=[range(5), range(0)], factors=list(FACTORS), base=10000.0, start_tokens=3)
def test_any_row_is_within_a_microradian_of_the_formula(chunks, factors, base, start_tokens):
    ours = table_of(*chunks, base=base, factors=factors, num_start_tokens=start_tokens)
    first, second = ours.chunk(2, dim=-1)
    assert torch.equal(first, second)
    positions = positions_of(chunks)
    if positions:
        theirs = fp64_angles(positions, base, factors=factors, start_tokens=start_tokens)
        assert distance_on_the_circle(first, theirs) < 5e-7
        assert ours.abs().max().item() <= 2 * math.pi + 1e-6


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_the_last_rows_of_a_long_window_agree_with_mpmath(base):
    ends = (1, 2**18, 2**20, 2**21, 2**22)
    ours = table_of(
        *(range(end - 1, end + 1) for end in ends), base=base, dim=128, factors=LLAMA_FACTORS
    )
    positions = [position for end in ends for position in (end - 1, end)]
    with mpmath.workdps(40):
        turn = 2 * mpmath.pi
        for row, position in enumerate(positions):
            for i, factor in enumerate(LLAMA_FACTORS):
                beta = mpmath.mpf(base) ** (mpmath.mpf(2 * i) / 128)
                error = mpmath.mpf(ours[row, i].item()) - position / (mpmath.mpf(factor) * beta)
                error -= mpmath.nint(error / turn) * turn
                assert abs(error) < 5e-7, (position, i)


@given(
    chunks=chunk_lists,
    cuts=st.lists(st.integers(0, 4000), max_size=3),
    start_tokens=st.integers(0, 2**22),
    exact=st.booleans(),
)
def test_a_row_depends_on_its_position_alone(chunks, cuts, start_tokens, exact):
    options = {"num_start_tokens": start_tokens, "exact": exact}
    pieces = []
    for chunk in chunks:
        for cut in cuts:
            pieces.append(chunk[:cut])
            chunk = chunk[cut:]
        pieces.append(chunk)
    assert torch.equal(table_of(*pieces, **options), table_of(*chunks, **options))
    rows = [table_of(range(chunk.stop - 1, chunk.stop), **options) for chunk in chunks if chunk]
    lasts = [table_of(chunk, **options)[-1:] for chunk in chunks if chunk]
    assert all(torch.equal(row, last) for row, last in zip(rows, lasts, strict=True))


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_size_of_a_block_is_a_detail(monkeypatch, block):
    chunks = range(3, 150), range(2**20 - 70, 2**20 + 70)
    plain = table_of(*chunks, num_start_tokens=40, exact=False)
    monkeypatch.setattr(rotary_table, "_ROWS", block)
    exact = table_of(*chunks, num_start_tokens=40)[:, : DIM // 2]
    assert distance_on_the_circle(exact, fp64_angles(positions_of(chunks), start_tokens=40)) < 5e-7
    assert torch.equal(table_of(*chunks, num_start_tokens=40, exact=False), plain)


# Start tokens and layout


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("start_tokens", [1, 5, 512, 1500])
def test_start_tokens_keep_the_original_rotation_and_the_next_one_does_not(start_tokens, exact):
    chunks = range(0, 700), range(900, 2000)
    mixed = table_of(*chunks, num_start_tokens=start_tokens, exact=exact)
    original = table_of(*chunks, factors=None, exact=exact)
    rescaled = table_of(*chunks, exact=exact)
    kept = torch.tensor(positions_of(chunks)) < start_tokens
    assert torch.equal(mixed[kept], original[kept])
    assert torch.equal(mixed[~kept], rescaled[~kept])
    assert not torch.equal(original[~kept], rescaled[~kept])


@pytest.mark.parametrize("exact", [True, False])
def test_interleaved_pairs_stand_side_by_side(exact):
    chunks = range(1000, 1100), range(5000, 7100)
    options = {"num_start_tokens": 1050, "exact": exact}
    halves = table_of(*chunks, **options)
    pairs = table_of(*chunks, interleaved=True, **options)
    assert torch.equal(pairs[:, 0::2], halves[:, : DIM // 2])
    assert torch.equal(pairs[:, 1::2], halves[:, DIM // 2 :])


def test_no_chunks_give_no_rows():
    assert table_of().shape == (0, DIM)
    assert table_of(range(7, 7)).shape == (0, DIM)


# The plain fp32 product


@given(chunks=chunk_lists, factors=factor_lists, start_tokens=st.integers(0, 2**22))
def test_the_fp32_product_is_that_of_frequencies_bit_for_bit(chunks, factors, start_tokens):
    ours = table_of(*chunks, factors=factors, num_start_tokens=start_tokens, exact=False)
    theirs = angles_fp32(
        torch.tensor(positions_of(chunks), dtype=torch.int64),
        10000.0,
        DIM,
        None if factors is None else torch.tensor(factors, dtype=torch.float64),
        start_tokens,
    )
    assert torch.equal(ours, theirs.repeat(1, 2))


# Memory
class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation returns, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.storages[storage.data_ptr()] = storage.nbytes()
        return result


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_but_the_table_is_larger_than_a_mebibyte(exact):
    with Allocations() as seen:
        table = table_of(range(2**17), dim=128, factors=LLAMA_FACTORS, exact=exact)
    assert seen.storages.pop(table.data_ptr()) == 2**17 * 128 * 4
    assert max(seen.storages.values()) <= 2**20
