"""When to stop scoring a candidate: as soon as it certainly cannot matter to the search.

Samples are scored in a fixed order. After each forward pass a candidate is compared with its
incumbent, which it must beat to matter: the evolution's last survivor when its generation was
drawn. In CMA-ES nobody races, because its regression learns from every score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def losing_bound(losses: Sequence[float], incumbent: Sequence[float]) -> float | None:
    """Bound the mean loss of a candidate that has lost, after some of its samples.

    Losses are not negative, so a candidate whose sum has passed its incumbent's whole sum has lost.

    Args:
        losses (Sequence[float]): The candidate's so far, in nats, not negative.
        incumbent (Sequence[float]): The incumbent's losses on all samples, in the same order.

    Returns:
        float | None: A lower bound of its mean over all samples, above the incumbent's. None while
        it is in the race; a candidate with all its samples is never out.
    """
    total = math.fsum(losses)
    if len(losses) >= len(incumbent) or total <= math.fsum(incumbent):
        return None
    return total / len(incumbent)
