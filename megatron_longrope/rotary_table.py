"""Rotary tables written once: the rows that a rank needs, straight into the tensor it keeps.

A table of s positions is 4 s d bytes (1 GiB at 2048k and d = 128), so that building it is bound by
memory: one pass over the result and no intermediate of its size is all there is to gain.
:mod:`.frequencies` owns the formula; this module only decides where it is evaluated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_longrope.errors import LongRopeError
from megatron_longrope.frequencies import angles, inv_freq_fp32

# An exact angle is the sum of that of a multiple of this many positions and that of an offset below
# it. Offsets (256 KiB at d = 128) stay in a core's cache; multiples take 2 MiB at 2^21 positions.
_BLOCK = 512
# Rows of an fp32 product whose positions (1 MiB) exist at once. Few and long: every product ends in
# a barrier of all threads, which a busy machine makes expensive.
_ROWS = 131072

# Writes the rows of contiguous positions: (rows [r, d], positions).
_Writer = Callable[[Tensor, range], None]


def build_table(
    chunks: Sequence[range],
    *,
    rotary_base: float,
    rotary_dim: int,
    rescale_factors: Sequence[float] | None,
    start_factors: Sequence[float] | None = None,
    num_start_tokens: int = 0,
    interleaved: bool = False,
    exact: bool = True,
    stock_frequencies: Tensor | None = None,
    device: torch.device | str,
) -> Tensor:
    """Angles of the chunks' positions, in the layout that megatron-core's attention reads.

    A row depends on its position alone, bit for bit, never on the chunks around it.

    Args:
        chunks (Sequence[range]): Contiguous positions (step 1), in row order. A context-parallel
            rank has two.
        rotary_base (float): Base of the geometric progression.
        rotary_dim (int): Number of rotated dimensions d of a head; even.
        rescale_factors (Sequence[float], optional): lambda_i, d / 2 of them. None is stock RoPE.
        start_factors (Sequence[float], optional): The same for the start tokens. Defaults to None,
            stock RoPE.
        num_start_tokens (int): n_hat; positions below it take `start_factors`. Defaults to 0.
        interleaved (bool): An angle stands in neighbouring columns 2 i and 2 i + 1 instead of in
            columns i and d / 2 + i. Defaults to False.
        exact (bool): Angles within 1e-6 rad (modulo 2 pi) at any position up to 2^22, in
            [-2 pi, 2 pi]. Otherwise the plain fp32 product, bit for bit. Defaults to True.
        stock_frequencies (Tensor, optional): `[d / 2]`, fp32: what the model's own module rotates
            by, for the plain product of positions that are not rescaled. Defaults to the formula.
        device (torch.device | str): Of the table.

    Returns:
        Tensor: `[sum of the chunks' lengths, 1, 1, rotary_dim]`, fp32.

    Raises:
        LongRopeError: A chunk is not contiguous.
    """
    for chunk in chunks:
        if chunk.step != 1:
            raise LongRopeError(
                f"{chunk} has step {chunk.step}; a chunk's positions are contiguous"
            )
    length = sum(len(chunk) for chunk in chunks)
    table = torch.empty(length, 1, 1, rotary_dim, dtype=torch.float32, device=device)

    @functools.cache
    def writer(rescaled: bool) -> _Writer:
        given = rescale_factors if rescaled else start_factors
        lambdas = None if given is None else torch.tensor(given, dtype=torch.float64, device="cpu")
        if exact:
            return _exact_writer(rotary_base, rotary_dim, lambdas, interleaved, table.device)
        frequencies = stock_frequencies if lambdas is None else None
        if frequencies is None:
            frequencies = inv_freq_fp32(rotary_base, rotary_dim, lambdas)
        return _fp32_writer(frequencies, interleaved, table.device)

    rows = table[:, 0, 0]  # [s, 1, 1, d] -> [s, d], a view
    for chunk in chunks:
        boundary = min(max(num_start_tokens, chunk.start), chunk.stop)
        for part, rescaled in (
            (range(chunk.start, boundary), False),
            (range(boundary, chunk.stop), True),
        ):
            if part:
                writer(rescaled)(rows[: len(part)], part)
                rows = rows[len(part) :]
    return table


def _exact_writer(
    rotary_base: float,
    rotary_dim: int,
    factors: Tensor | None,
    interleaved: bool,
    device: torch.device,
) -> _Writer:
    """Angle addition: position = block * _BLOCK + offset, one broadcast sum of two small tables.

    Both summands come reduced from fp64 to fp32 values in [-pi, pi], each rounded by at most half
    a unit in the last place below 4: 2^-23 = 1.2e-7. Their sum, below 8, is rounded by at most
    2^-22 = 2.4e-7. Together with fp64's own error (below 1e-8 at 2^22) that is at most 4.9e-7 rad.
    """

    def summands(positions: Tensor) -> Tensor:
        # [n] -> [n, d/2] -> [n, d]
        return _pair(angles(positions, rotary_base, rotary_dim, factors), interleaved)

    offsets = summands(torch.arange(_BLOCK, device=device))

    def write(rows: Tensor, part: range) -> None:
        first = part.start // _BLOCK
        blocks = summands(torch.arange(first, -(-part.stop // _BLOCK), device=device) * _BLOCK)
        start = part.start
        while start < part.stop:  # the rest of a block, whole blocks, the beginning of a block
            offset = start % _BLOCK
            count = 1 if offset else max((part.stop - start) // _BLOCK, 1)
            stop = min(start - offset + count * _BLOCK, part.stop)
            index = start // _BLOCK - first
            target = rows[start - part.start : stop - part.start]
            torch.add(
                blocks[index : index + count, None],  # [count, 1, d]
                offsets[offset : offset + (stop - start) // count],  # [rows of a block, d]
                out=target.view(count, -1, rotary_dim),
            )
            start = stop

    return write


def _fp32_writer(frequencies: Tensor, interleaved: bool, device: torch.device) -> _Writer:
    """The product that megatron-core and transformers compute, without all positions at once."""
    frequencies = _pair(frequencies, interleaved).to(device)

    def write(rows: Tensor, part: range) -> None:
        for start in range(part.start, part.stop, _ROWS):
            positions = torch.arange(start, min(start + _ROWS, part.stop), device=device)
            row = start - part.start
            # [r, 1] x [d] -> [r, d]
            torch.mul(
                positions.to(torch.float32)[:, None],
                frequencies,
                out=rows[row : row + len(positions)],
            )

    return write


def _pair(values: Tensor, interleaved: bool) -> Tensor:
    """Give both members of a rotated pair their value: `[..., d/2] -> [..., d]`."""
    if interleaved:
        return values.repeat_interleave(2, dim=-1)
    return torch.cat((values, values), dim=-1)
