import math
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_longrope.evaluation import passes as passes_module
from megatron_longrope.evaluation.passes import Passes, discard
from megatron_longrope.evaluation.perplexity import (
    perplexity,
    planned_windows,
    protocol_of,
    random_places,
    windows,
)
from megatron_longrope.evaluation.records import Records
from megatron_longrope.evaluation.statistics import ratio_interval


@given(num_tokens=st.integers(1, 300), window=st.integers(2, 80))
def test_the_truncated_form_is_one_window_of_the_first_tokens(num_tokens, window):
    assert scored_tokens(num_tokens, window, None) == list(range(min(num_tokens, window - 1)))
    assert protocol_of(window, None) == "truncated"


@given(data=st.data(), num_tokens=st.integers(1, 300), window=st.integers(2, 80))
def test_without_bos_every_token_but_the_first_is_scored_once(data, num_tokens, window):
    stride = data.draw(st.integers(1, window - 1))
    assert scored_tokens(num_tokens, window, stride, bos=False) == list(range(1, num_tokens))
    first = list(range(1, min(num_tokens, window)))
    assert scored_tokens(num_tokens, window, None, bos=False) == first


def scored_tokens(num_tokens, window, stride, bos=True):
    scored = []
    for span in windows(num_tokens, window, stride, bos=bos):
        assert 0 <= span.start < span.end <= num_tokens
        assert span.end - span.start <= window - bos  # BOS takes one place
        assert 1 <= span.num_scored <= span.end - span.start - (not bos)
        scored += range(span.end - span.num_scored, span.end)
    return scored


@given(num_tokens=st.integers(1, 200), window=st.integers(2, 50), stride=st.integers(1, 90))
def test_windows_are_those_of_the_authors_loop(num_tokens, window, stride):
    """Reference 1.1: the loop over starts, and how many last tokens of each window count."""
    expected, previous_end = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + window - 1, num_tokens)
        expected.append((begin, end, min(end - previous_end, end - begin)))
        previous_end = end
        if end == num_tokens:
            break
    ours = [(w.start, w.end, w.num_scored) for w in windows(num_tokens, window, stride)]
    assert ours == expected
    assert protocol_of(window, stride) == ("sliding" if stride < window else "sampled")


@pytest.mark.parametrize("places", [None, [(0, 5)]])
def test_a_window_of_one_token_is_refused(places):
    with pytest.raises(ValueError, match="a window of 1 token predicts none; give at least 2"):
        planned_windows([100], 1, None, places=places)


def position_nll(tokens):
    """A model whose loss at a token is the token's place in the window."""
    length = tokens.shape[1]
    return torch.arange(1, length, dtype=torch.float32)[None].expand(len(tokens), -1)


def test_the_papers_number_is_the_unweighted_mean_over_windows():
    document = np.arange(10)
    result = perplexity(position_nll, [document], bos_id=0, length=5, stride=2)
    # windows of 4 tokens at 0, 2, 4, 6: the first scores 1..4, the others their last two (3, 4)
    assert result.num_windows == 4 and result.num_tokens == 10
    assert result.ppl_window_mean == pytest.approx(math.exp((2.5 + 3.5 * 3) / 4))
    assert result.ppl_token_weighted == pytest.approx(math.exp((10 + 7 * 3) / 10))
    assert result.protocol == "sliding" and result.stride == 2
    assert result.nll_per_document == pytest.approx([(2.5 + 3.5 * 3) / 4])
    assert result.nll_per_document_token_weighted == pytest.approx([(10 + 7 * 3) / 10])


def test_the_truncated_form_scores_the_first_window_with_bos_in_front():
    seen = []

    def nll(tokens):
        seen.append(tokens[0].tolist())
        return position_nll(tokens)

    result = perplexity(nll, [np.arange(10, 30), np.arange(40, 60)], bos_id=1, length=5)
    assert seen == [[1, 10, 11, 12, 13], [1, 40, 41, 42, 43]]
    assert result.protocol == "truncated" and result.num_windows == 2
    assert result.nll_per_document == [2.5, 2.5]


def test_a_run_that_is_killed_goes_on_at_the_window(tmp_path, monkeypatch):
    monkeypatch.setattr(passes_module, "_INTERVAL", 0.0)
    documents = [np.arange(10, 30), np.arange(40, 60)]
    seen, counted = [], []

    def nll(tokens, last=99):
        if len(seen) == last:
            raise KeyboardInterrupt
        seen.append(tokens)
        return position_nll(tokens) * math.pi

    def measured(cell, nll):
        place = Records(tmp_path / "ppl.jsonl", ("name",)), {"name": cell}
        passes = Passes(*place)
        result = asdict(perplexity(
            nll, documents, 1, 7, stride=4, passes=passes,
            on_window=lambda count=1, resumed=False: counted.append((count, resumed)),
        ))  # fmt: skip
        assert result.pop("seconds") > 0
        discard(*place)
        return result

    with pytest.raises(KeyboardInterrupt):
        measured("a", partial(nll, last=3))
    whole = measured("another cell", nll)
    seen.clear()
    counted.clear()
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    assert measured("a", nll) == whole
    assert len(seen) == whole["num_windows"] - 3 and counted[:2] == [(3, True), (1, False)]
    assert not [*tmp_path.iterdir()]
    file.write_bytes(b"\0\n" + kept)  # damaged by a loss of power: measured anew
    assert measured("a", nll) == whole


def test_without_bos_windows_are_the_text_alone():
    seen = []

    def nll(tokens):
        seen.append(tokens[0].tolist())
        return position_nll(tokens)

    result = perplexity(nll, [np.arange(10, 30)], bos_id=None, length=5, stride=4)
    assert seen[:2] == [[10, 11, 12, 13, 14], [14, 15, 16, 17, 18]] and seen[-1] == [26, 27, 28, 29]
    assert result.num_tokens == 19


def test_position_buckets_hold_every_scored_token():
    result = perplexity(position_nll, [np.arange(100)], bos_id=0, length=17)
    assert sum(item["tokens"] for item in result.nll_by_position) == 16
    assert [item["from"] for item in result.nll_by_position] == list(range(0, 16, 2))


@given(num_tokens=st.integers(20, 60), stride=st.integers(1, 30))
def test_a_position_bucket_begins_at_the_first_position_that_falls_into_it(num_tokens, stride):
    result = perplexity(position_nll, [np.arange(num_tokens)], 0, length=14, stride=stride)
    starts = [item["from"] for item in result.nll_by_position]
    for item, following in zip(result.nll_by_position, [*starts[1:], 13], strict=True):
        # The toy loss at position p (from 0) is p + 1.
        assert item["from"] + 1 <= item["nll"] <= following


def test_the_hash_is_of_every_scored_token():
    texts = [np.arange(9) + (np.arange(9) == place) for place in range(9)]
    hashes = [perplexity(position_nll, [text], 0, 8).sha256 for text in texts]
    assert hashes[7] == hashes[8]  # seven tokens stand behind BOS
    assert len(set(hashes)) == 8


def test_a_loss_without_a_finite_perplexity_is_infinite_not_an_error():
    result = perplexity(lambda t: torch.full((1, t.shape[1] - 1), 800.0), [np.arange(9)], 0, 8)
    assert result.ppl_window_mean == math.inf


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    window=st.integers(2, 30),
    bos=st.booleans(),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_random_windows_lie_in_their_documents_and_none_comes_twice(
    lengths, window, bos, seed, data
):
    possible = [
        (k, start) for k, n in enumerate(lengths) for start in range(n - (window - bos) + 1)
    ]
    if not possible:
        with pytest.raises(ValueError, match="documents have from 1 to 0"):
            random_places(lengths, window, 1, seed, bos=bos)
        return
    count = data.draw(st.integers(1, len(possible)))
    places = random_places(lengths, window, count, seed, bos=bos)
    assert len(set(places)) == count and places == sorted(places) and set(places) <= set(possible)
    assert places == random_places(lengths, window, count, seed, bos=bos)
    assert sorted(random_places(lengths, window, len(possible), seed, bos=bos)) == possible


def test_random_windows_begin_at_the_same_places_at_every_length():
    seen = []

    def nll(tokens):
        seen.append(tokens[0].tolist())
        return position_nll(tokens)

    places = [(0, 3), (1, 0)]
    for length in (3, 5):
        result = perplexity(nll, [np.arange(10, 30), np.arange(40, 60)], 1, length, places=places)
        assert result.protocol == "random" and result.num_tokens == 2 * (length - 1)
    assert seen == [[1, 13, 14], [1, 40, 41], [1, 13, 14, 15, 16], [1, 40, 41, 42, 43]]


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    """Documents of one to nine windows whose losses hang together."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(600):
        windows_of = rng.integers(1, 10, 30)
        sums = [n * rng.normal(3.0, 0.5) + rng.normal(0, 0.2, n).sum() for n in windows_of]
        low, high = ratio_interval(sums, windows_of.tolist())
        covered += low < 3.0 < high
    assert 0.92 < covered / 600 < 0.97


def test_documents_are_the_units_of_both_means_and_intervals():
    """Many windows of few documents do not make them narrower than the documents allow."""
    from scipy import stats

    def nll(tokens):
        return position_nll(tokens) + tokens[0, 1] // 100

    # Windows of 4 tokens, of which the last of the others hold 2 and 1.
    documents = [np.arange(20), np.arange(100, 106), np.arange(200, 213)]
    found = perplexity(nll, documents, 0, 5, stride=4)
    assert found.nll_per_document == [2.5, 3.0, 4.125]
    assert found.nll_per_document_token_weighted == pytest.approx([2.5, 19 / 6, 57 / 13])
    for mean, interval, sums, counts in (
        (found.ppl_window_mean, found.ppl_window_mean_interval, [12.5, 6.0, 16.5], [5, 2, 4]),
        (found.ppl_token_weighted, found.ppl_token_weighted_interval, [50, 19, 57], [20, 6, 13]),
    ):
        expected = sum(sums) / sum(counts)
        error = stats.sem(np.array(sums) - expected * np.array(counts)) / np.mean(counts)
        assert math.log(mean) == pytest.approx(expected)
        assert np.log(interval) == pytest.approx(stats.t.interval(0.95, 2, expected, error))
    one = perplexity(nll, documents[:1], 0, 5, stride=4)
    assert one.ppl_window_mean_interval is one.ppl_token_weighted_interval is None
