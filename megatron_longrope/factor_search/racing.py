"""When to stop scoring a candidate: as soon as it cannot matter to the search.

Samples are scored in a fixed order. After each forward pass a candidate is compared with its
incumbent, which it must beat to matter (for the evolution: the last survivor when its generation
was drawn; for CMA-ES: the median of a generation), on the samples both have been scored on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from megatron_longrope.errors import LongRopeError

RULES = ("exact", "paired", "off")


@dataclass(frozen=True)
class Race:
    """A rule for stopping early."""

    rule: str = "exact"
    """`exact`: losses are not negative, so a candidate whose sum has passed the incumbent's whole
    sum has lost; nothing changes in the result. `paired`: also when a one-sided paired t-test on
    the differences says so, which the search may pay for with a lost candidate now and then. `off`:
    score every sample."""
    significance: float = 0.05
    """Of the paired test, each time it looks."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise LongRopeError(f"racing rule {self.rule!r} is unknown; choose {', '.join(RULES)}")
        if not 0 < self.significance < 0.5:
            raise LongRopeError(
                f"significance is {self.significance!r}; it must lie between 0 and 0.5"
            )

    def lost(self, losses: Sequence[float], incumbent: Sequence[float]) -> tuple[str, float] | None:
        """Whether a candidate is out after some of its samples.

        Args:
            losses (Sequence[float]): Its losses so far, in nats, not negative.
            incumbent (Sequence[float]): The incumbent's losses on all samples, in the same order.

        Returns:
            tuple[str, float] | None: The rule that stops it and the mean loss to report for it,
            never below the incumbent's: a lower bound (`exact`) or an estimate (`paired`). None
            while it is in the race; a candidate with all its samples is never out.
        """
        if self.rule == "off" or len(losses) >= len(incumbent):
            return None
        total = math.fsum(losses)
        whole = math.fsum(incumbent)
        if total > whole:
            return "exact", total / len(incumbent)
        if self.rule == "paired" and len(losses) >= 2:
            differences = [a - b for a, b in zip(losses, incumbent, strict=False)]
            mean = math.fsum(differences) / len(differences)
            if mean > 0 and mean > self._margin(differences, mean):
                return "paired", whole / len(incumbent) + mean
        return None

    def _margin(self, differences: Sequence[float], mean: float) -> float:
        """What a mean difference must exceed to be no accident: t * s / sqrt(n)."""
        count = len(differences)
        variance = math.fsum((value - mean) ** 2 for value in differences) / (count - 1)
        quantile = float(stdtrit(count - 1, 1 - self.significance))
        return quantile * math.sqrt(variance / count)
