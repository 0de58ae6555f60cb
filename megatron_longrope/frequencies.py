"""The formula: every rotary frequency, factor vector and angle of this package comes from here.

Notation of the paper (arXiv 2402.13753, section 2 and equation 3): dimension i of d/2 rotates token
n by n / beta_i with beta_i = base^(2i/d). A rescale factor lambda_i slows it to
n / (lambda_i beta_i) for every position n >= n_hat; the first n_hat start tokens keep the original
rotation.

Only torch is needed here. Positions and frequencies are fp64: at position 2^21 an fp32 product is
off by 0.1 to 0.3 rad, which fp64 reduced modulo 2 pi brings below 1e-6 rad.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ATTENTION_FACTOR_POLICIES = ("su", "yarn", "none")

# Rows computed at once: bounds the fp64 scratch at 32 MiB for d = 128.
_ROWS_PER_BLOCK = 65536


def inv_freq(rotary_base: float, rotary_dim: int) -> Tensor:
    """Base inverse frequencies 1 / beta_i of RoPE.

    Args:
        rotary_base (float): Base of the geometric progression (HF `rope_theta`).
        rotary_dim (int): Number of rotated dimensions d of a head; even.

    Returns:
        Tensor: `[rotary_dim / 2]`, fp64.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return 1.0 / float(rotary_base) ** exponents


def inv_freq_fp32(
    rotary_base: float, rotary_dim: int, rescale_factors: Tensor | None = None
) -> Tensor:
    """Rescaled inverse frequencies with transformers' and megatron-core's fp32 rounding.

    Both compute `1 / (factor * base ** (i / d))` in fp32 (factor 1 for Megatron); repeating the
    very same operations is what makes parity bit for bit.

    Returns:
        Tensor: `[rotary_dim / 2]`, fp32.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    powers = rotary_base**exponents
    if rescale_factors is not None:
        powers = rescale_factors.to(torch.float32) * powers
    return 1.0 / powers


def linear_factors(rotary_dim: int, factor: float) -> list[float]:
    """Position interpolation (PI): every dimension is slowed by the extension ratio."""
    return [float(factor)] * (rotary_dim // 2)


def ntk_factors(rotary_dim: int, factor: float) -> list[float]:
    """NTK-aware interpolation: lambda_i = s^(2i / (d - 2)) (LongRoPE2 section 2.3).

    The fastest dimension keeps its frequency, the slowest one is slowed by s; the same as enlarging
    the rotary base to base * s^(d / (d - 2)).
    """
    if rotary_dim < 4:
        raise ValueError(
            f"rotary_dim {rotary_dim} is below 4, where NTK interpolation is undefined"
        )
    return [float(factor) ** (2 * i / (rotary_dim - 2)) for i in range(rotary_dim // 2)]


def dynamic_ntk_factors(rotary_dim: int, factor: float) -> list[float]:
    """Dynamic NTK at the end of its window, with transformers' rule for the current length.

    transformers enlarges the base by (s n / L - (s - 1))^(d / (d - 2)) for n tokens and a window of
    L; at n = s L that is NTK-aware interpolation by s^2 - s + 1.
    """
    return ntk_factors(rotary_dim, factor * factor - factor + 1.0)


def base_change_factors(
    rotary_dim: int,
    factor: float,
    rotary_base: float,
    window: int,
    *,
    rescale_factors: Sequence[float] | None = None,
) -> list[float]:
    """Base change (arXiv 2310.05209), the NTK baseline of LongRoPE2: lambda_i = s^(i / c).

    c is where a period fills the window once, so that this dimension is slowed by s and the slower
    ones by more: base' = base^(ln(s L / 2 pi) / ln(L / 2 pi)).

    Args:
        factor (float): Extension ratio s of the window.
        window (int): Tokens L that the model was trained with.
        rescale_factors (Sequence[float], optional): See :func:`yarn_factors`.

    Raises:
        ValueError: No dimension completes a period in the window.
    """
    critical = _dimension_with(1.0, rotary_dim, rotary_base, window, rescale_factors)
    if critical <= 0:
        raise ValueError(
            f"no dimension completes a period in a window of {window} tokens, so that a base "
            "change is undefined; use a longer window"
        )
    return [float(factor) ** (i / critical) for i in range(rotary_dim // 2)]


def yarn_factors(
    rotary_dim: int,
    factor: float,
    rotary_base: float,
    window: int,
    *,
    rescale_factors: Sequence[float] | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> list[float]:
    """YaRN "NTK-by-parts": interpolate inverse frequencies between PI and none (arXiv 2309.00071).

    A dimension with more than `beta_fast` rotations within the window is left alone, one with fewer
    than `beta_slow` is interpolated, and between them the *inverse frequencies* are mixed linearly:
    1 / lambda_i = ramp / s + (1 - ramp).

    Args:
        factor (float): Extension ratio s of the window.
        window (int): Tokens that the model was trained with.
        rescale_factors (Sequence[float], optional): `[rotary_dim / 2]`, the factors that it was
            trained with, which the result multiplies. Its rotations are those of the slowed
            frequencies: counted on the base's, a longer window would make nearly every dimension
            a fast one. Defaults to ones.
        beta_fast (float): Rotations in the window above which a dimension is kept.
        beta_slow (float): Rotations below which a dimension is fully interpolated.
        truncate (bool): Whether the ramp begins and ends at whole dimensions. Defaults to True.
    """
    geometry = (rotary_dim, rotary_base, window, rescale_factors)
    low, high = _dimension_with(beta_fast, *geometry), _dimension_with(beta_slow, *geometry)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    span = high - low if high != low else 0.001  # avoids a division by zero, as the reference does
    ramps = [min(max((i - low) / span, 0.0), 1.0) for i in range(rotary_dim // 2)]
    # Multiplied through by s, in the order that keeps both ends exact and rounding monotonic:
    # as written above, 1 / (1 / s) exceeds s for s = 49.
    return [factor / (factor - ramp * (factor - 1.0)) for ramp in ramps]


def _dimension_with(
    rotations: float,
    rotary_dim: int,
    rotary_base: float,
    window: int,
    rescale_factors: Sequence[float] | None,
) -> float:
    """Where, between the dimensions, a period fits so often into the window."""
    period = math.log(window / (rotations * 2 * math.pi))
    slowed = [math.log(value) for value in rescale_factors or ()]
    if not any(slowed):
        return rotary_dim * period / (2 * math.log(rotary_base))
    slope = 2 * math.log(rotary_base) / rotary_dim  # of the log period, from dimension to dimension
    periods = list(accumulate((log + slope * i for i, log in enumerate(slowed)), max))
    right = bisect_left(periods, period)
    if right == 0:
        return (period - periods[0]) / slope
    if right == len(periods):
        return right - 1 + (period - periods[-1]) / slope
    left = periods[right - 1]
    return right - 1 + (period - left) / (periods[right] - left)


METHODS = ("none", "pi", "ntk", "yarn", "dynamic-ntk", "base-ntk")
"""Names that :func:`named_factors` knows."""


def named_factors(
    name: str,
    rotary_dim: int,
    factor: float,
    rotary_base: float,
    window: int,
    rescale_factors: Sequence[float] | None = None,
) -> list[float]:
    """Factor vector of a published method, one of :data:`METHODS`.

    Args:
        factor (float): Extension ratio s of the window.
        window (int): Tokens that the model was trained with.
        rescale_factors (Sequence[float], optional): `[rotary_dim / 2]`, the factors that it was
            trained with; the result multiplies them. Defaults to ones.

    Raises:
        ValueError: The name is unknown or the extension ratio is below 1 or not finite.
    """
    if not 1 <= factor < math.inf:
        raise ValueError(
            f"extension ratio {factor} must be a finite number of at least 1; "
            "the target must not be shorter than the original window"
        )
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose {', '.join(METHODS)}")
    if name == "none":
        return [1.0] * (rotary_dim // 2)
    if name in ("yarn", "base-ntk"):
        counting = yarn_factors if name == "yarn" else base_change_factors
        return counting(rotary_dim, factor, rotary_base, window, rescale_factors=rescale_factors)
    of_ratio = {"pi": linear_factors, "ntk": ntk_factors, "dynamic-ntk": dynamic_ntk_factors}
    return of_ratio[name](rotary_dim, factor)


def attention_factor(policy: str, factor: float, original_max_position_embeddings: int) -> float:
    """Multiplier of q and k that offsets the entropy growth of longer windows.

    `su` is sqrt(1 + ln s / ln L) (the LongRoPE release and transformers), `yarn` 0.1 ln s + 1,
    `none` 1. Every policy gives 1.0 for s <= 1. The attention logits get the square of it.

    Raises:
        ValueError: Unknown policy.
    """
    if policy not in ATTENTION_FACTOR_POLICIES:
        raise ValueError(
            f"attention factor policy {policy!r} is unknown; "
            f"choose one of {', '.join(ATTENTION_FACTOR_POLICIES)}"
        )
    if policy == "none" or factor <= 1.0:
        return 1.0
    if policy == "yarn":
        return 0.1 * math.log(factor) + 1.0
    return math.sqrt(1.0 + math.log(factor) / math.log(original_max_position_embeddings))


def angles(
    positions: Tensor,
    rotary_base: float,
    rotary_dim: int,
    rescale_factors: Tensor | None = None,
    num_start_tokens: int = 0,
) -> Tensor:
    """Rotation angles of LongRoPE (equation 3), exact to 1e-6 rad at any practical position.

    Takes any positions, at the cost of fp64 scratch; :mod:`.rotary_table` makes the long tables of
    attention from a few of these angles.

    Args:
        positions (Tensor): `[s]`, integer token positions.
        rescale_factors (Tensor, optional): `[rotary_dim / 2]`, lambda_i. None is stock RoPE.
        num_start_tokens (int): n_hat; positions below it are not rescaled.

    Returns:
        Tensor: `[s, rotary_dim / 2]`, fp32 angles in [-pi, pi], on `positions`' device.
    """
    device = positions.device
    base = inv_freq(rotary_base, rotary_dim).to(device)
    rescaled = base
    if rescale_factors is not None:
        rescaled = base / rescale_factors.to(device=device, dtype=torch.float64)
    result = torch.empty(len(positions), rotary_dim // 2, dtype=torch.float32, device=device)
    for start in range(0, len(positions), _ROWS_PER_BLOCK):
        block = positions[start : start + _ROWS_PER_BLOCK]
        # [r] x [d/2] -> [r, d/2]
        exact = torch.outer(block.to(torch.float64), rescaled)
        if num_start_tokens > 0:
            kept = block < num_start_tokens
            exact[kept] = torch.outer(block[kept].to(torch.float64), base)
        # Reduced before the cast: fp32 holds 1e-7 near zero but only 0.1 near 2^21.
        exact -= torch.round(exact / (2 * math.pi)) * (2 * math.pi)
        result[start : start + len(block)] = exact
    return result


def angles_fp32(
    positions: Tensor,
    rotary_base: float,
    rotary_dim: int,
    rescale_factors: Tensor | None = None,
    num_start_tokens: int = 0,
) -> Tensor:
    """The plain fp32 product n * inv_freq of transformers and megatron-core, bit for bit.

    Returns:
        Tensor: `[s, rotary_dim / 2]`, fp32, not reduced.
    """
    device = positions.device
    rescaled = inv_freq_fp32(rotary_base, rotary_dim, rescale_factors).to(device)
    result = product_fp32(positions, rescaled)
    if num_start_tokens > 0:
        kept = positions < num_start_tokens
        base = inv_freq_fp32(rotary_base, rotary_dim).to(device)
        result[kept] = product_fp32(positions[kept], base)
    return result


def product_fp32(positions: Tensor, frequencies: Tensor, out: Tensor | None = None) -> Tensor:
    """The one operation behind :func:`angles_fp32`, for tables that place the columns themselves.

    Args:
        positions (Tensor): `[s]`, integer token positions.
        frequencies (Tensor): `[n]`, from :func:`inv_freq_fp32`, in the order of the columns.
        out (Tensor, optional): `[s, n]`, fp32; where to write.

    Returns:
        Tensor: `[s, n]`, fp32; `out` when given.
    """
    # [s, 1] x [n] -> [s, n]
    return torch.mul(positions.to(torch.float32)[:, None], frequencies, out=out)
