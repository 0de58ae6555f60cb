"""The conversion benchmark: what it concludes from its numbers, and that it runs."""

import sys
from pathlib import Path

import pytest
from test_benchmarks import result_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import convert as benchmark  # noqa: E402


def runs(**arms):
    """Runs of arms, given as (seconds of every run, peak in GiB)."""
    return {
        name: [{"seconds": value, "peak_bytes": peak * 2**30} for value in seconds]
        for name, (seconds, peak) in arms.items()
    }


def test_the_slower_direction_and_the_larger_peak_count():
    summary = benchmark.summarise(
        runs(
            to_hf=([2.0, 4.0, 3.0], 1),
            from_hf=([1.5, 3.0, 4.5], 2),
            copy=([1.0, 2.0, 3.0], 0.5),
            load_all=([9.0, 9.0, 9.0], 7),
        ),
        2**29,
    )
    assert summary["ratio"] == 2.0
    assert summary["ratio_quartiles"]["from_hf"] == [1.5, 1.5, 1.5]
    assert (summary["peak_gib"], summary["peak_gib_load_all"]) == (2, 7)
    assert summary["allowed_gib"] == 2.0
    assert summary["seconds"]["to_hf"] == 3.0


def test_a_size_is_a_number_of_layers():
    layer = 2 * (4 * 2048 * 2048 + 3 * 2048 * 5632)
    embeddings = 4 * 32000 * 2048
    assert benchmark.num_layers((embeddings + 7 * layer) / 2**30) == 7
    assert benchmark.num_layers(0.001) == 1
    assert benchmark.num_layers(benchmark.FULL_GIB) * layer + embeddings > 2 * 2**30


@pytest.mark.parametrize("options", [["--gib", "0"], ["--gib", "nan"], ["--repeats", "0"]])
def test_what_cannot_be_measured_is_refused(options, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(options)
    assert options[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.release  # it starts a process for every peak of memory
@pytest.mark.usefixtures("benchmark_results_stay")
def test_every_arm_runs_and_the_benchmark_ends_with_its_result(tmp_path):
    options = ("--gib", "0.1", "--repeats", "1", "--directory", tmp_path)
    result = result_of("convert.py", *options)
    assert set(result["runs"]) == set(benchmark.ARMS)
    # Memory is no matter of speed.
    assert 0 < result["peak_gib"] < result["allowed_gib"]
    assert result["peak_gib"] < result["peak_gib_load_all"]
    assert list(tmp_path.iterdir()) == []
