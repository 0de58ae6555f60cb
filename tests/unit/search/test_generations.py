"""What both algorithms keep to: one trajectory for a seed, whatever the order of the scores."""

import math

import numpy as np
import pytest
import test_cma
import test_evolution
from test_cma import objective, published, run

from megatron_longrope.factor_search.cma import CmaSearch
from megatron_longrope.factor_search.evolution import EvolutionSearch
from megatron_longrope.factor_search.space import SearchSpace

SPACE = SearchSpace(16, 8.0)
SCORE = objective(SPACE)


@pytest.fixture(params=[(CmaSearch, test_cma.SMALL), (EvolutionSearch, test_evolution.SMALL)])
def new_search(request):
    kind, sizes = request.param
    return lambda rng_seed=1, **shared: kind(SPACE, sizes, published(SPACE), rng_seed, **shared)


def test_the_same_seed_gives_the_same_trajectory_and_leaves_numpys_state_alone(new_search):
    before = np.random.get_state()[1].tolist()
    first = run(new_search(3), SCORE)
    assert np.random.get_state()[1].tolist() == before
    assert first == run(new_search(3), SCORE)
    assert first != run(new_search(4), SCORE)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_the_order_in_which_scores_arrive_changes_nothing(new_search, lookahead):
    def scored(pick):
        search = new_search(lookahead=lookahead)
        asked = {}
        while trials := search.trials():
            trial = pick(trials)
            asked[trial.index] = trial
            search.tell(trial.candidate, SCORE(*SPACE.decode(trial.candidate)))
        return [asked[index] for index in range(len(asked))], search._ranked()

    assert scored(lambda trials: trials[0]) == scored(lambda trials: trials[-1])


def test_a_search_where_everything_fails_still_ends(new_search):
    search = new_search()
    assert run(search, lambda *_: math.nan) and search.best[1] == math.inf
