"""Genetic operators of both searches: pure functions of candidates and an explicit generator.

The paper's monotonic constraint lambda_i <= lambda_{i+1} (section 3.2) holds by construction: genes
are drawn between their neighbours or repaired with a running maximum. No sample is rejected for
breaking it, so every function ends after a bounded amount of work in any space.

In LongRoPE2's space the factors before `space.first_gene` are no genes: they keep the lowest step,
so that they never push up those that count. Every function returns canonical candidates.
"""

from __future__ import annotations

from collections.abc import Set
from itertools import accumulate

import numpy as np

from megatron_longrope.factor_search.space import Candidate, SearchSpace

MUTATION_PROB = 0.3
"""p of section 4.1."""

_UNIQUE_TRIES = 20


def mutate(
    candidate: Candidate,
    space: SearchSpace,
    rng: np.random.Generator,
    prob: float = MUTATION_PROB,
) -> Candidate:
    """Mutation_with_mono_constraint of algorithm 1: redraw each gene with probability `prob`.

    From the first factor to the last, a redrawn k_i is uniform on [k_{i-1}, k_{i+1}]: the *updated*
    left neighbour and the parent's right neighbour, the space's bounds at the two ends. The
    start-token count (LongRoPE2: the critical dimension) changes with the same probability to any
    other choice.
    """
    parent = candidate.steps
    changes = rng.random(space.num_factors) < prob
    draws = rng.random(space.num_factors)
    steps = list(parent)
    first = space.first_gene(candidate.start_index)
    for i in map(int, np.flatnonzero(changes[first:]) + first):
        low = max(steps[i - 1] if i else space.min_step, space.lowest(i))
        high = parent[i + 1] if i + 1 < len(parent) else space.max_step
        steps[i] = low + int(draws[i] * (high - low + 1))
    start_index = candidate.start_index
    if space.num_choices > 1 and rng.random() < prob:
        shift = int(rng.integers(1, space.num_choices))
        start_index = (start_index + shift) % space.num_choices
    return space.canonical(Candidate(tuple(steps), start_index))


def crossover(
    a: Candidate, b: Candidate, space: SearchSpace, rng: np.random.Generator
) -> Candidate:
    """Crossover_with_mono_constraint of algorithm 1: every gene from either parent, then repaired.

    A running maximum restores the constraint; it stays within the bounds, as both parents do.
    """
    from_a = rng.random(space.num_factors) < 0.5
    mixed = [x if take else y for x, y, take in zip(a.steps, b.steps, from_a, strict=True)]
    start_index = a.start_index if rng.random() < 0.5 else b.start_index
    first = space.first_gene(start_index)
    mixed[:first] = [space.min_step] * first
    return space.canonical(Candidate(tuple(accumulate(mixed, max)), start_index))


def random_candidate(space: SearchSpace, rng: np.random.Generator) -> Candidate:
    """A uniform draw: first a choice (start tokens or critical dimension), then its genes; what
    falls below a floor is raised to it."""
    start_index = int(rng.integers(space.num_choices))
    first = space.first_gene(start_index)
    genes, levels = space.num_factors - first, space.max_step - space.min_step
    # Stars and bars: d distinct values below K + d, sorted, minus 0 .. d-1, are d values of 0 .. K.
    picks = np.sort(rng.choice(levels + genes, genes, replace=False)) - np.arange(genes)
    steps = [space.min_step] * first + (picks + space.min_step).tolist()
    steps = [max(k, space.lowest(gene)) for gene, k in enumerate(steps)]
    return space.canonical(Candidate(tuple(steps), start_index))


def unique(
    child: Candidate,
    space: SearchSpace,
    rng: np.random.Generator,
    seen: Set[Candidate],
    prob: float = MUTATION_PROB,
) -> Candidate | None:
    """`child`, or one near it that is not in `seen`; None where the space seems used up.

    Mutates up to 20 times with a probability that rises from `prob` to 1, then draws up to 20
    candidates from anywhere, which fails in spaces of a few dozen candidates at most.
    """
    for attempt in range(_UNIQUE_TRIES):
        if child not in seen:
            return child
        child = mutate(child, space, rng, prob + (1.0 - prob) * attempt / (_UNIQUE_TRIES - 1))
    for _ in range(_UNIQUE_TRIES):
        if child not in seen:
            return child
        child = random_candidate(space, rng)
    return None if child in seen else child
