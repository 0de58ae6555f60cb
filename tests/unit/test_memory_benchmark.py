"""Perplexity's memory benchmark: what it concludes from its numbers, and that it runs."""

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_benchmarks import result_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from measure import in_own_process  # noqa: E402
from ppl_memory import AGREEMENT, WARM_UP, parse, summarise  # noqa: E402


def rows(ours, theirs, lengths=(1000, 2000, 3000), ppl=(50.0, 50.0)):
    """Measurements on two lines, given as (bytes per token, bytes besides)."""
    return [
        {"arm": arm, "tokens": n, "peak_bytes": slope * n + offset, "ppl": value}
        for n in lengths
        for (arm, (slope, offset)), value in zip(
            {"ours": ours, "theirs": theirs}.items(), ppl, strict=True
        )
    ]


@given(
    ours=st.integers(1, 10**6),
    theirs=st.integers(1, 10**6),
    offsets=st.tuples(*[st.integers(0, 10**9)] * 2),
)
def test_the_ratio_is_that_of_the_slopes_whatever_the_offsets_are(ours, theirs, offsets):
    summary = summarise(rows((ours, offsets[0]), (theirs, offsets[1])))
    assert summary["ratio"] == pytest.approx(ours / theirs, abs=1e-4, rel=1e-3)
    assert summary["slope_bytes_per_token"] == {"ours": ours, "theirs": theirs}
    assert max(summary["linearity_error"].values()) == 0
    peaks = 1000 * ours + offsets[0], 1000 * theirs + offsets[1]
    assert summary["peak_ratio"]["1000"] == pytest.approx(peaks[0] / peaks[1], abs=1e-4)


def test_a_bend_shows_in_the_linearity_error():
    bent = rows((10, 0), (100, 0))
    bent[-2]["peak_bytes"] *= 2  # ours at 3000 tokens
    error = summarise(bent)["linearity_error"]
    assert error["ours"] > 0.1
    assert error["theirs"] == 0


@pytest.mark.parametrize("theirs", [50.0 * (1 + 2 * AGREEMENT), math.nan, math.inf])
def test_perplexities_that_differ_are_not_the_same_work(theirs):
    with pytest.raises(RuntimeError, match="not the same work"):
        summarise(rows((1, 0), (10, 0), ppl=(50.0, theirs)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--lengths", "2048"], "a line needs two different lengths"),
        (["--lengths", "2048", "2048"], "a line needs two different lengths"),
        (["--lengths", str(WARM_UP), "2048"], "within the warm-up"),
        (["--hidden-size", "100"], "--hidden-size 100 is no multiple of 64"),
    ],
    ids=["one length", "the same twice", "too short", "half a head"],
)
def test_what_cannot_be_measured_is_refused(options, sentence, capsys):
    with pytest.raises(SystemExit):
        parse(options)
    assert sentence in capsys.readouterr().err


def test_a_measurement_that_fails_says_why(tmp_path):
    script = tmp_path / "arm.py"  # a process, as it is what fails
    script.write_text("raise SystemExit('the disk is full')")
    with pytest.raises(RuntimeError, match="the disk is full"):
        in_own_process(str(script), "copy", env={})


@pytest.mark.slow
@pytest.mark.release  # it starts a process for every peak of memory
@pytest.mark.usefixtures("benchmark_results_stay")
def test_both_arms_do_the_same_work_and_the_benchmark_ends_with_its_result():
    tiny = ("--lengths", "1024", "2048", "--hidden-size", "64", "--vocab-size", "4096")
    result = result_of("ppl_memory.py", *tiny)
    assert {(row["arm"], row["tokens"]) for row in result["peaks"]} == {
        (arm, length) for arm in ("ours", "theirs") for length in (1024, 2048)
    }
    assert 0 < result["ppl_relative_difference"] < AGREEMENT
    assert all(row["ppl"] > 4096 for row in result["peaks"])  # far from uniform predictions
    # Memory is no matter of speed: transformers holds logits and their log-softmax.
    assert result["slope_bytes_per_token"]["theirs"] == pytest.approx(8 * 4096, rel=0.05)
