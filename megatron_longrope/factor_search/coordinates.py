"""Moves in the space of factors: a smooth family around a candidate, and single factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression

from megatron_longrope.factor_search.space import Candidate, SearchSpace

_PRIOR_LENGTH = 0.1  # of the prior's correlation, in units of the number of factors
_PRIOR_VARIANCE = 0.99  # share of the prior that the coordinates cover
_FLAT = 0.25  # deviation of a factor that its seed leaves at 1, relative to the largest one's


class Coordinates:
    """A smooth family of factor vectors around a candidate.

    log lambda = log lambda_0 + B x, where the covariance B B^T is squared-exponential in the
    dimension index and its deviation follows log lambda_0: fast dimensions, which every good seed
    leaves near 1, move least. Results are made non-decreasing by isotonic regression, the nearest
    monotone vector in the least-squares sense.

    Args:
        space (SearchSpace): Bounds and grid.
        start (Candidate): x = 0.
    """

    def __init__(self, space: SearchSpace, start: Candidate) -> None:
        self._space, self.start = space, start
        self._genes = np.asarray(space.genes(start))
        factors = np.asarray(space.decode(start)[0])
        self._logs = np.log(factors[self._genes])
        # A space that extends nothing says only by its bound how large a factor may become.
        reach = space.scale if space.scale > 1 else space.upper
        largest = max(self._logs.max(), math.log(reach))
        deviation = largest * _FLAT + (1 - _FLAT) * self._logs
        length = max(1.0, _PRIOR_LENGTH * len(self._genes))
        distance = (self._genes[:, None] - self._genes[None, :]) / length
        values, vectors = np.linalg.eigh(np.exp(-0.5 * distance**2))
        values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
        share = np.cumsum(values) / values.sum()
        count = int(np.searchsorted(share, _PRIOR_VARIANCE)) + 1
        # The sign of an eigenvector is the library's choice; the trajectory must not depend on it.
        signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
        basis = vectors * signs * np.sqrt(values)
        self._basis = deviation[:, None] * basis[:, :count]
        self.size = count
        """Number of coordinates."""
        self.widest = float((np.abs(self._basis) * factors[self._genes, None]).max())
        """How far the most sensitive factor moves with a coordinate, to first order."""

    def candidate(self, point: np.ndarray) -> Candidate:
        """The grid point nearest to coordinates `[size]`."""
        logs = isotonic_regression(self._logs + self._basis @ point).x
        return self._space.with_factors(self.start, self._genes, np.exp(logs))


def moved_candidate(
    space: SearchSpace, candidate: Candidate, moves: Sequence[tuple[int, float]]
) -> Candidate:
    """The candidate with some factors multiplied by exp(step); neighbours in the way move along.

    Args:
        moves (Sequence): `(gene, step)` pairs.
    """
    genes = np.asarray(space.genes(candidate))
    logs = np.log(np.asarray(space.decode(candidate)[0])[genes])
    for gene, step in moves:
        at = int(np.searchsorted(genes, gene))
        logs[at] += step
        if len(moves) == 1 and step > 0:
            logs[at:] = np.maximum(logs[at:], logs[at])
        elif len(moves) == 1:
            logs[: at + 1] = np.minimum(logs[: at + 1], logs[at])
    return space.with_factors(candidate, genes, np.exp(isotonic_regression(logs).x))
