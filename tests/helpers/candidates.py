"""What every candidate of a space keeps to, and all candidates of a small one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement

from megatron_longrope.factor_search.space import Candidate, SearchSpace


def check_candidate(space: SearchSpace, candidate: Candidate) -> None:
    """Number, order and bounds of the steps, and that the candidate is canonical."""
    steps = candidate.steps
    assert len(steps) == space.num_factors and list(steps) == sorted(steps)
    assert all(space.lowest(gene) <= k <= space.max_step for gene, k in enumerate(steps))
    assert 0 <= candidate.start_index < space.num_choices
    assert space.canonical(candidate) == candidate


def all_candidates(space: SearchSpace) -> Iterator[Candidate]:
    """Every candidate once."""
    levels = range(space.min_step, space.max_step + 1)
    for steps in combinations_with_replacement(levels, space.num_factors):
        for start_index in range(space.num_choices):
            candidate = Candidate(steps, start_index)
            is_high = all(k >= space.lowest(gene) for gene, k in enumerate(steps))
            if is_high and space.canonical(candidate) == candidate:
                yield candidate
