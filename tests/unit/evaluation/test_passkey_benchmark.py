"""The passkey benchmark runs and ends with its result. How fast anything is, no test asserts."""

import json
from pathlib import Path

import launching
import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks/passkey.py"


@pytest.mark.slow
def test_the_passkey_benchmark_ends_with_its_result():
    done = launching.python(SCRIPT, "--lengths", "256", "--trials", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    (row,) = result["rows"]
    assert (result["benchmark"], row["tokens"]) == ("passkey", 256)
    assert result["ratio"] == row["ratio"] > 0
    # Passes and verdicts are no matter of speed.
    assert row["forwards_per_trial"] == {"ours": 1, "released": 10, "cached": 10}
    assert row["tokens_reproduced"] == row["tokens_generated"] == 20
    assert result["verdicts_agree"]
