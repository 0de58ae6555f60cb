"""Divide forward passes among copies of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


def share[Unit, Result](
    units: Sequence[Unit], score: Callable[[Unit], Result]
) -> Iterator[tuple[Unit, Result]]:
    """Yield every unit with its score, in order, on every rank; each copy scores its share.

    Copies work in rounds of one unit each and exchange results after a round, so that every result
    so far can be recorded before the next. Put units of equal cost next to each other: a copy waits
    for the slowest of its round.

    Args:
        units (Sequence): The same on every rank.
        score (Callable): Called on all ranks of one copy; its result must be small and pickle.
    """
    from megatron_longrope.engine.process_groups import gather_from_replicas, replica

    index, count = replica()
    for first in range(0, len(units), count):
        here = units[first : first + count]
        result = score(here[index]) if index < len(here) else None
        yield from zip(here, gather_from_replicas(result), strict=False)  # the last round is short
