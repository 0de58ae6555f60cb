"""Published scaling methods: their factors, and what they are called and look like everywhere.

A method is one entry of :data:`METHODS`; `--baselines`, searches' starting points, tables and
figures all read it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_longrope.errors import LongRopeError


@dataclass(frozen=True)
class Method:
    """A published method."""

    label: str
    """What tables and figures call it."""
    look: str
    """One of :data:`megatron_longrope.report.style.LOOKS`, the same in every figure."""
    factors: Callable[[int, float, float, int, Sequence[float] | None], list[float]]
    """Factors of (rotary_dim, extension ratio, rotary base, window, factors of the window)."""
    policy: str = "none"
    """Attention-factor policy that belongs to it."""


def linear_factors(rotary_dim: int, factor: float) -> list[float]:
    """Position interpolation (PI): every dimension is slowed by the extension ratio."""
    return [float(factor)] * (rotary_dim // 2)


def ntk_factors(rotary_dim: int, factor: float) -> list[float]:
    """NTK-aware interpolation: lambda_i = s^(2i / (d - 2)) (LongRoPE2 section 2.3).

    The fastest dimension keeps its frequency, the slowest one is slowed by s; the same as enlarging
    the rotary base to base * s^(d / (d - 2)).
    """
    if rotary_dim < 4:
        raise LongRopeError(
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
        LongRopeError: No dimension completes a period in the window.
    """
    critical = _dimension_with(1.0, rotary_dim, rotary_base, window, rescale_factors)
    if critical <= 0:
        raise LongRopeError(
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


METHODS = {
    "none": Method("No extension", "ink", lambda dim, factor, *_: linear_factors(dim, 1.0)),
    "pi": Method("PI", "orange", lambda dim, factor, *_: linear_factors(dim, factor)),
    "ntk": Method("NTK", "sky", lambda dim, factor, *_: ntk_factors(dim, factor)),
    "yarn": Method(
        "YaRN",
        "green",
        lambda dim, factor, base, window, given: yarn_factors(
            dim, factor, base, window, rescale_factors=given
        ),
        "yarn",
    ),
    "dynamic-ntk": Method(
        "Dynamic NTK", "purple", lambda dim, factor, *_: dynamic_ntk_factors(dim, factor)
    ),
    "base-ntk": Method(
        "NTK by base",
        "vermilion",
        lambda dim, factor, base, window, given: base_change_factors(
            dim, factor, base, window, rescale_factors=given
        ),
    ),
}
"""Methods by name, in the order in which they are listed."""


def method(name: str) -> Method:
    """Return a method by name.

    Raises:
        LongRopeError: There is none of this name.
    """
    if name not in METHODS:
        raise LongRopeError(f"unknown method {name!r}; choose {', '.join(METHODS)}")
    return METHODS[name]


def named_factors(
    name: str,
    rotary_dim: int,
    factor: float,
    rotary_base: float,
    window: int,
    rescale_factors: Sequence[float] | None = None,
) -> list[float]:
    """Return the factor vector of one of :data:`METHODS`.

    Args:
        name (str): Its key.
        rotary_dim (int): Rotated dimensions of a head.
        factor (float): Extension ratio s of the window.
        rotary_base (float): Base of the frequencies.
        window (int): Tokens that the model was trained with.
        rescale_factors (Sequence[float], optional): `[rotary_dim / 2]`, the factors that it was
            trained with; the result multiplies them. Defaults to ones.

    Raises:
        LongRopeError: The name is unknown or the extension ratio is below 1 or not finite.
    """
    if not 1 <= factor < math.inf:
        raise LongRopeError(
            f"extension ratio {factor} must be a finite number of at least 1; "
            "the target must not be shorter than the original window"
        )
    return method(name).factors(rotary_dim, factor, rotary_base, window, rescale_factors)
