"""The planned memory against the peak that a GPU measures; skipped without one.

A layer spec of Transformer Engine is what the formulas describe; where it is not installed the
local spec's extra tensors, which docs/plan.md lists, are added.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
import device as gpu
from plan_peaks import MODEL, RECOMPUTATION, peak_of_a_step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recompute", RECOMPUTATION, ids=lambda kind: "+".join(kind) or "none")
@pytest.mark.parametrize("tokens", [8192, 32768])
def test_the_planned_memory_is_the_measured_peak_within_a_tenth(tokens, recompute):
    found = peak_of_a_step(MODEL, tokens, recompute, gpu.start(quick=False))
    assert found.planned == pytest.approx(found.measured, rel=0.1)
