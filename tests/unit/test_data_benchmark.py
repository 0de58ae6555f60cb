"""The data benchmark runs and ends with its result. How fast anything is, no test asserts."""

import pytest
from test_benchmarks import result_of


@pytest.mark.slow
def test_the_data_benchmark_ends_with_its_result():
    result = result_of("data.py", "--megabytes", "0.4", "--repeats", "1", "--workers", "1")
    assert result["tokens"] > 50_000
    assert set(result["tokens_per_s"]) == {"ours", "megatron"}
