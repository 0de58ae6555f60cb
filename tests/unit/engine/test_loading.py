"""The engine's model is allocated once, in its type and on its device, and filled there."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import engine_loading

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def test_a_bf16_model_equals_one_that_was_built_in_fp32_and_converted(tmp_path):
    size = engine_loading.make_checkpoint(tmp_path, TINY)
    ours, theirs = (
        dict(engine_loading.load(arm, tmp_path).named_parameters()) for arm in ("ours", "convert")
    )
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, theirs[name]), name
    assert sum(2 * parameter.numel() for parameter in ours.values()) >= size
