"""Numbers of a running search: counted once, shown in one line."""

import math
from types import SimpleNamespace

from megatron_longrope.factor_search.runner import SearchStatus


def record(index, score, *, samples=5, stopped=None, start_tokens=0, factors=None):
    return SimpleNamespace(
        index=index,
        rescale_factors=factors or (1.0 + index, 9.0),
        num_start_tokens=start_tokens,
        score=score,
        sample_nlls=(2.5,) * samples,
        seconds=1.5,
        stopped=stopped,
        error=None if math.isfinite(score) else "OutOfMemoryError",
    )


def test_the_note_says_best_saving_and_failures():
    status = SearchStatus(5)
    assert status.note() == "0 evaluations, no score yet"
    status.add(record(0, 12.34561, start_tokens=4))
    assert status.note() == "1 evaluation, best 12.3456 (n_hat 4)"
    status.add(record(1, 13.0, samples=4, stopped="exact"))
    saving = "best 12.3456 (n_hat 4), 1 sample-forward saved (10 %)"
    assert status.note() == f"2 evaluations, {saving}"
    status.add(record(2, 14.0, samples=1, stopped="exact"))
    status.add(record(3, math.inf, samples=0))
    saving = "best 12.3456 (n_hat 4), 5 sample-forwards saved (33 %)"
    assert status.note() == f"4 evaluations, {saving}, 1 failed"


def test_only_complete_evaluations_become_the_best():
    status = SearchStatus(5)
    status.add(record(0, 9.0, samples=2, stopped="budget"))
    assert status.best is None
    status.add(record(1, 12.0))
    status.add(record(2, 11.0, samples=3, stopped="exact"))
    assert status.best.score == 12.0


def test_a_budget_is_no_saving_by_racing_and_an_infinite_bound_no_failure():
    status = SearchStatus(5)
    status.add(record(0, 9.0, samples=2, stopped="budget"))
    status.add(record(1, math.inf, samples=3, stopped="exact"))
    assert (status.sample_forwards, status.avoided, status.failed) == (5, 2, 0)
    assert status.saving == 2 / 7
    status.add(record(2, 9.9, samples=1, stopped="exact"), wanted=2)
    assert status.avoided == 3


def test_samples_of_a_promoted_candidate_are_counted_once():
    status = SearchStatus(5)
    status.add(record(0, 9.0, samples=2, stopped="budget", factors=(1.0, 2.0)))
    status.add(record(1, 9.5, samples=5, factors=(1.0, 2.0)))
    assert (status.evaluations, status.sample_forwards) == (2, 5)
