"""The surrogate ranks what it has not seen, whatever the data look like."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longrope.factor_search.surrogate import Surrogate


def bowl(points):
    return 3.7 + ((points - 0.4) ** 2 * np.linspace(0.2, 3.0, points.shape[1])).mean(axis=1)


@pytest.mark.parametrize("dimensions", [4, 16, 64])
def test_near_candidates_are_ranked_by_what_a_few_dozen_scores_tell(dimensions):
    rng = np.random.default_rng(0)
    points = 0.5 + 0.2 * rng.standard_normal((80, dimensions))
    losses = bowl(points) + 0.001 * rng.standard_normal(80)
    model = Surrogate(points[:50], losses[:50])
    expected, real = model.predict(points[50:]), bowl(points[50:])
    ranks = [np.argsort(np.argsort(values)) for values in (expected, real)]
    assert np.corrcoef(*ranks)[0, 1] > (0.6 if dimensions <= 16 else 0.2)


def test_a_few_disasters_do_not_spoil_the_guess_about_the_rest():
    rng = np.random.default_rng(1)
    points = 0.5 + 0.2 * rng.standard_normal((70, 8))
    losses = bowl(points)
    losses[:5] = 11.0
    model = Surrogate(points[:40], losses[:40])
    expected = model.predict(points[40:])
    assert np.corrcoef(expected, losses[40:])[0, 1] > 0.6


@given(
    count=st.integers(2, 30),
    dimensions=st.integers(1, 8),
    seed=st.integers(0, 1000),
    flat=st.booleans(),
)
def test_any_data_give_finite_guesses(count, dimensions, seed, flat):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((count, dimensions))
    points[count // 2 :] = points[: count - count // 2]  # twice the same
    losses = np.full(count, 4.0) if flat else rng.uniform(3, 12, count)
    expected = Surrogate(points, losses).predict(rng.standard_normal((5, dimensions)))
    assert np.isfinite(expected).all()


def test_a_guess_far_from_all_data_is_their_mean():
    points = np.random.default_rng(2).standard_normal((30, 3))
    losses = bowl(points)
    model = Surrogate(points, losses)
    expected = model.predict(np.full((1, 3), 1e4))[0]
    assert losses.min() < expected < losses.max()
