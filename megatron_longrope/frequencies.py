"""The formula: every rotary frequency, angle and attention factor of this package comes from here.

Notation of the paper (arXiv 2402.13753, section 2 and equation 3): dimension i of d/2 rotates token
n by n / beta_i with beta_i = base^(2i/d). A rescale factor lambda_i slows it to
n / (lambda_i beta_i) for every position n >= n_hat; the first n_hat start tokens keep the original
rotation.

Only torch is needed here. Positions and frequencies are fp64: at position 2^21 an fp32 product is
off by 0.1 to 0.3 rad, which fp64 reduced modulo 2 pi brings below 1e-6 rad.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_longrope.errors import LongRopeError

ATTENTION_FACTOR_POLICIES = ("su", "yarn", "none")


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


def attention_factor(policy: str, factor: float, original_max_position_embeddings: int) -> float:
    """Multiplier of q and k that offsets the entropy growth of longer windows.

    `su` is sqrt(1 + ln s / ln L) (the LongRoPE release and transformers), `yarn` 0.1 ln s + 1,
    `none` 1. Every policy gives 1.0 for s <= 1. The attention logits get the square of it.

    Raises:
        LongRopeError: Unknown policy.
    """
    if policy not in ATTENTION_FACTOR_POLICIES:
        raise LongRopeError(
            f"attention factor policy {policy!r} is unknown; "
            f"choose one of {', '.join(ATTENTION_FACTOR_POLICIES)}"
        )
    if policy == "none" or factor <= 1.0:
        return 1.0
    if policy == "yarn":
        return 0.1 * math.log(factor) + 1.0
    return math.sqrt(1.0 + math.log(factor) / math.log(original_max_position_embeddings))


def softmax_scale(factor: float, head_dim: int) -> float:
    """Return the softmax scale that carries an attention factor: q and k each get it."""
    return factor**2 / math.sqrt(head_dim)


def carries_factor(scale: float, factor: float, head_dim: int) -> bool:
    """Return whether a softmax scale is the one that carries the attention factor."""
    return math.isclose(scale, softmax_scale(factor, head_dim), rel_tol=1e-9)


def angles(
    positions: Tensor,
    rotary_base: float,
    rotary_dim: int,
    rescale_factors: Tensor | None = None,
) -> Tensor:
    """Rotation angles of LongRoPE (equation 3), exact to 1e-6 rad at any practical position.

    Takes fp64 scratch, so that :mod:`.rotary_table` asks for some positions at a time.

    Args:
        positions (Tensor): `[s]`, integer token positions.
        rescale_factors (Tensor, optional): `[rotary_dim / 2]`, lambda_i. None is stock RoPE.

    Returns:
        Tensor: `[s, rotary_dim / 2]`, fp32 angles in [-pi, pi], on `positions`' device.
    """
    device = positions.device
    rescaled = inv_freq(rotary_base, rotary_dim).to(device)
    if rescale_factors is not None:
        rescaled = rescaled / rescale_factors.to(device=device, dtype=torch.float64)
    # [s] x [d/2] -> [s, d/2]
    exact = torch.outer(positions.to(torch.float64), rescaled)
    # Reduced before the cast: fp32 holds 1e-7 near zero but only 0.1 near 2^21.
    exact -= torch.round(exact / (2 * math.pi)) * (2 * math.pi)
    return exact.to(torch.float32)
