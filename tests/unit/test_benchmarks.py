"""The benchmarks run and end with their result. How fast anything is, no test asserts."""

import json
from pathlib import Path

import launching
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.usefixtures("benchmark_results_stay")


def result_of(script: str, *options: str) -> dict:
    """The last line of a benchmark's output."""
    done = launching.python(BENCHMARKS / script, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == Path(script).stem
    assert result["ratio"] > 0
    assert {"cpu", "cores", "torch", "megatron-core", "date"} <= result["environment"].keys()
    return result


@pytest.mark.slow
def test_the_step_overhead_benchmark_ends_with_its_result():
    result = result_of("step_overhead.py", "--seq-length", "64", "--repeats", "2")
    (row,) = result["rows"]
    assert (row["seq_length"], row["ratio"]) == (64, result["ratio"])
    assert row["seconds"].keys() == {"stock", "plugin"}


@pytest.mark.slow
def test_the_data_benchmark_ends_with_its_result():
    result = result_of("data.py", "--megabytes", "0.4", "--repeats", "1", "--workers", "1")
    assert result["tokens"] > 50_000
    assert set(result["tokens_per_s"]) == {"ours", "megatron"}


@pytest.mark.slow
def test_the_passkey_benchmark_ends_with_its_result():
    result = result_of("passkey.py", "--lengths", "256", "--trials", "1")
    (row,) = result["rows"]
    assert (row["tokens"], row["ratio"]) == (256, result["ratio"])
    # Passes and verdicts are no matter of speed.
    assert row["forwards_per_trial"] == {"ours": 1, "released": 10, "cached": 10}
    assert row["tokens_reproduced"] == row["tokens_generated"] == 20
    assert result["verdicts_agree"]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda p: p.stem)
def test_a_stored_result_is_one_of_a_script_that_exists(path):
    result = json.loads(path.read_text())
    assert result["benchmark"] == path.stem
    assert (BENCHMARKS / f"{path.stem}.py").exists()
    # None: search.py reached nothing.
    assert result["ratio"] is None or result["ratio"] > 0
