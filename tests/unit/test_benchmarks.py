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


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda p: p.stem)
def test_a_stored_result_is_one_of_a_script_that_exists(path):
    result = json.loads(path.read_text())
    assert result["benchmark"] == path.stem
    assert (BENCHMARKS / f"{path.stem}.py").exists()
    assert result["ratio"] > 0
