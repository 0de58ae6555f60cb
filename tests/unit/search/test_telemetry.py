"""Numbers of a running search: counted once, shown in one line, written once per step."""

import importlib.util
import math
from types import SimpleNamespace

import pytest

from megatron_longrope.factor_search.telemetry import SearchStatus, Telemetry

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


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


def scalars(directory):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {
        tag: [(item.step, item.value) for item in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def write(directory, records, resumed=()):
    status = SearchStatus(5)
    for item in resumed:
        status.add(item)
    with Telemetry(directory) as telemetry:
        for item in records:
            status.add(item)
            telemetry.evaluated(item, status)


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


@needs_tensorboard
def test_each_evaluation_is_one_step_of_each_scalar(tmp_path):
    write(
        tmp_path,
        [
            record(0, math.inf, samples=0),
            record(1, 12.0),
            record(2, 13.0, samples=2, stopped="exact"),
        ],
    )
    shown = scalars(tmp_path)
    assert shown["search/best_perplexity"] == [(2, 12.0), (3, 12.0)]
    assert shown["search/perplexity"] == [(2, 12.0)]
    assert shown["search/perplexity_stopped_early"] == [(3, 13.0)]
    assert shown["search/evaluations"] == [(1, 1), (2, 2), (3, 3)]
    assert shown["search/sample_forwards"] == [(1, 0), (2, 5), (3, 7)]
    assert shown["search/saving_by_racing"][-1] == (3, pytest.approx(0.3))
    assert shown["search/seconds_per_evaluation"] == [(1, 1.5), (2, 1.5), (3, 1.5)]
    assert shown["search/failed"] == [(1, 1), (2, 1), (3, 1)]


@needs_tensorboard
def test_resuming_shows_no_step_twice(tmp_path):
    records = [record(index, 20.0 - index) for index in range(6)]
    write(tmp_path, records[:4])
    write(tmp_path, records[2:], resumed=records[:2])  # the journal lost two of the four
    assert scalars(tmp_path)["search/perplexity"] == [(i + 1, 20.0 - i) for i in range(6)]


@needs_tensorboard
def test_starting_again_replaces_what_was_there(tmp_path):
    write(tmp_path, [record(index, 20.0) for index in range(4)])
    write(tmp_path, [record(0, 15.0)])
    assert scalars(tmp_path)["search/perplexity"] == [(1, 15.0)]


@needs_tensorboard
def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write(tmp_path / "events", [record(0, 12.0)])
    assert not (tmp_path / "events").exists()
