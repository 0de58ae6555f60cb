"""Rotary tables written once: the rows that a rank needs, straight into the tensor it keeps.

A table of s positions is 4 s d bytes (1 GiB at 2048k and d = 128); no intermediate has its size.
:mod:`.frequencies` owns the formula; this module only decides where it is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_longrope.frequencies import angles, inv_freq_fp32

_ROWS = 2048  # computed at once: 1 MiB of fp64 scratch at d = 128, which stays in a core's cache


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
        chunks (Sequence[range]): Contiguous positions, in row order. A context-parallel rank
            has two.
        rotary_base (float): Base of the geometric progression.
        rotary_dim (int): Number of rotated dimensions d of a head; even.
        rescale_factors (Sequence[float], optional): lambda_i, d / 2 of them. None is stock RoPE.
        start_factors (Sequence[float], optional): The same for the start tokens. Defaults to None,
            stock RoPE.
        num_start_tokens (int): n_hat; positions below it take `start_factors`. Defaults to 0.
        interleaved (bool): An angle stands in neighbouring columns 2 i and 2 i + 1 instead of in
            columns i and d / 2 + i. Defaults to False.
        exact (bool): Angles within 1e-6 rad (modulo 2 pi) at any position up to 2^22, in
            [-pi, pi]. Otherwise the plain fp32 product, bit for bit. Defaults to True.
        stock_frequencies (Tensor, optional): `[d / 2]`, fp32: what the model's own module rotates
            by, for the plain product of positions that are not rescaled. Defaults to the formula.
        device (torch.device | str): Of the table.

    Returns:
        Tensor: `[sum of the chunks' lengths, 1, 1, rotary_dim]`, fp32.
    """
    length = sum(len(chunk) for chunk in chunks)
    table = torch.empty(length, 1, 1, rotary_dim, dtype=torch.float32, device=device)

    def angles_of(positions: Tensor, rescaled: bool) -> Tensor:
        given = rescale_factors if rescaled else start_factors
        lambdas = None if given is None else torch.tensor(given, dtype=torch.float64, device="cpu")
        if exact:
            return angles(positions, rotary_base, rotary_dim, lambdas)
        # The product that megatron-core and transformers compute.
        frequencies = stock_frequencies if lambdas is None else None
        if frequencies is None:
            frequencies = inv_freq_fp32(rotary_base, rotary_dim, lambdas)
        return positions.to(torch.float32)[:, None] * frequencies.to(table.device)

    rows = table[:, 0, 0]  # [s, 1, 1, d] -> [s, d], a view
    for chunk in chunks:
        boundary = min(max(num_start_tokens, chunk.start), chunk.stop)
        for part, rescaled in (
            (range(chunk.start, boundary), False),
            (range(boundary, chunk.stop), True),
        ):
            for start in part[::_ROWS]:
                stop = min(start + _ROWS, part.stop)
                positions = torch.arange(start, stop, device=table.device)
                rows[: len(positions)] = _pair(angles_of(positions, rescaled), interleaved)
                rows = rows[len(positions) :]
    return table


def _pair(values: Tensor, interleaved: bool) -> Tensor:
    """Give both members of a rotated pair their value: `[..., d/2] -> [..., d]`."""
    if interleaved:
        return values.repeat_interleave(2, dim=-1)
    return torch.cat((values, values), dim=-1)
