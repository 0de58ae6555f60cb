"""Intervals for proportions, perplexity, and trials counted once for every table and figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


def wilson_interval(accuracy: float, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927), sensible at 0 and at 1."""
    z = 1.959964
    center = (accuracy + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = accuracy * (1 - accuracy) / trials + z * z / (4 * trials * trials)
    half = z * math.sqrt(spread) / (1 + z * z / trials)
    return max(center - half, 0.0), min(center + half, 1.0)


def ratio_interval(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of a mean over what clusters, such as documents, hold.

    The mean is sum(sums) / sum(weights), as clusters may hold different numbers of values. Its
    variance is the linearised one of a ratio (Cochran 1977, section 6.4) and the interval
    Student's, with a degree of freedom less than there are clusters. Where all weigh the same it is
    the textbook interval of the clusters' mean.

    Args:
        sums (Sequence[float]): Sum of the values of each cluster.
        weights (Sequence[float]): Number of values of each cluster, above 0.

    Returns:
        tuple[float, float], optional: None for a single cluster, which tells nothing of others.
    """
    from scipy.special import stdtrit

    count, weight = len(sums), sum(weights)
    if count < 2:
        return None
    mean = sum(sums) / weight
    squares = sum((value - mean * n) ** 2 for value, n in zip(sums, weights, strict=True))
    half = float(stdtrit(count - 1, 0.975)) * math.sqrt(squares * count / (count - 1)) / weight
    return mean - half, mean + half


def perplexity_of(nll: float) -> float:
    """Return exp of a mean loss in nats; infinite above 700, where fp64 has no number for it."""
    return math.inf if nll >= 700 else math.exp(nll)


def is_finite(value: Any) -> bool:
    """Return whether it is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class Tally:
    """Trials of one cell of a table or figure."""

    hits: float = 0.0
    """Sum of what the trials found, each from 0 to 1."""
    trials: int = 0

    whole: bool = True
    """Whether every trial found all or nothing, as an interval for proportions supposes."""
    nlls: list[float] = field(default_factory=list)
    """Mean loss over the answer's tokens of each trial, in nats."""

    @property
    def share(self) -> float:
        """What was found, from 0 to 1."""
        return self.hits / self.trials

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval, where trials found all or nothing."""
        return wilson_interval(self.share, self.trials) if self.whole else None

    @property
    def nll(self) -> float | None:
        """Mean over the trials, in nats per token of the answer; None unless all have a loss."""
        return sum(self.nlls) / self.trials if len(self.nlls) == self.trials else None

    def add(self, found: float, nll: float | None) -> None:
        """Count a trial."""
        self.hits, self.trials = self.hits + found, self.trials + 1
        self.whole = self.whole and found in (0.0, 1.0)
        if nll is not None:
            self.nlls.append(nll)
