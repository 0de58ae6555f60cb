"""A guess at scores that were not computed: Gaussian-process regression on those that were.

Evaluations cost minutes and hours, the regression milliseconds, and the ranking of near candidates
is easy to guess: it pays to draw many candidates and to score the most promising ones.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist

_LENGTHS = (2.0, 4.0, 8.0, 16.0, 32.0)  # in spreads of the data
_NOISES = (0.03, 0.1, 0.3)  # variance of what the regression does not explain, of all variance
_FLOOR = 0.03  # smallest spread: a logarithm that hardly varies in the data is not blown up
_CLIPPED = 0.8  # quantile: how bad the worst candidates are tells nothing about the good ones
_POINTS = 400  # at most, the best ones: the cost is cubic


class Surrogate:
    """Squared-exponential Gaussian process with the likeliest of a few length scales.

    Args:
        points (np.ndarray): `[n, d]`, logarithms of rescale factors.
        losses (np.ndarray): `[n]`, finite.
    """

    def __init__(self, points: np.ndarray, losses: np.ndarray) -> None:
        order = np.argsort(losses, kind="stable")[:_POINTS]
        points, losses = points[order], losses[order]
        losses = np.minimum(losses, np.quantile(losses, _CLIPPED))
        self._mean, self._deviation = losses.mean(), losses.std() + 1e-12
        self._spread = points.std(axis=0) + _FLOOR
        self._points = points / self._spread
        target = (losses - self._mean) / self._deviation
        distances = cdist(self._points, self._points, "sqeuclidean")
        _, self._length, self._weights = max(
            (_fit(distances, target, length, noise) for length in _LENGTHS for noise in _NOISES),
            key=lambda fit: fit[0],
        )

    def predict(self, points: np.ndarray) -> np.ndarray:
        """Expected losses of `[m, d]` points: `[m]`.

        Rounded far above what two machines' linear algebra differs by, so that all replicas and a
        resumed search rank alike.
        """
        distances = cdist(points / self._spread, self._points, "sqeuclidean")
        kernel = np.exp(-0.5 * distances / self._length**2)
        return np.round(self._mean + self._deviation * (kernel @ self._weights), 7)


def _fit(
    distances: np.ndarray, target: np.ndarray, length: float, noise: float
) -> tuple[float, float, np.ndarray]:
    """Log likelihood (up to a constant), length scale and weights."""
    kernel = np.exp(-0.5 * distances / length**2)
    kernel[np.diag_indices_from(kernel)] += noise
    factor = cho_factor(kernel, lower=True)
    weights = cho_solve(factor, target)
    likelihood = -0.5 * float(target @ weights) - float(np.log(np.diag(factor[0])).sum())
    return likelihood, length, weights
