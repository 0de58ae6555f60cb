"""Equal shares of the tests that not every run has."""

from __future__ import annotations

from collections.abc import Sequence


def share_of(names: Sequence[str], which: str) -> list[str]:
    """The names that were asked for.

    Args:
        names (Sequence[str]): In any order.
        which (str): `all`, `none`, or `K/N`: the K-th of N shares, which cover everything.

    Raises:
        ValueError: `which` is nothing of that.
    """
    if which in ("all", "none"):
        return list(names) if which == "all" else []
    share, _, shares = which.partition("/")
    if not (share.isdigit() and shares.isdigit() and 1 <= int(share) <= int(shares)):
        raise ValueError(f"{which!r}: give all, none, or K/N with 1 <= K <= N")
    # Dealt in turn: neighbours are alike, and the longest would else meet in one share.
    return sorted(names)[int(share) - 1 :: int(shares)]
