"""Intervals for proportions, and perplexity."""

from __future__ import annotations

import math


def wilson_interval(accuracy: float, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927), sensible at 0 and at 1."""
    z = 1.959964
    center = (accuracy + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = accuracy * (1 - accuracy) / trials + z * z / (4 * trials * trials)
    half = z * math.sqrt(spread) / (1 + z * z / trials)
    return max(center - half, 0.0), min(center + half, 1.0)


def perplexity_of(nll: float) -> float:
    """exp of a mean loss in nats; infinite above 700, where fp64 has no number for it."""
    return math.inf if nll >= 700 else math.exp(nll)
