import argparse
import math

import pytest

from megatron_longrope.checkpoint.model_args import custom_softmax_scale

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16}


def scale_of(**values):
    return custom_softmax_scale(argparse.Namespace(**SHAPE, **values))


def test_a_run_without_a_softmax_scale_has_none():
    assert scale_of() is None and scale_of(softmax_scale=None) is None


def test_longropes_own_carrier_is_no_custom_scale():
    factor = 1.1726039
    scale = factor**2 / math.sqrt(16)
    assert scale_of(softmax_scale=scale, longrope_attention_factor=factor) is None


@pytest.mark.parametrize("factor", [None, 1.0, 1.2])
def test_any_other_scale_is_custom(factor):
    assert scale_of(softmax_scale=0.5, longrope_attention_factor=factor) == 0.5
