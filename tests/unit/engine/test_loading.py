"""The engine's model is allocated once, in its type and on its device, and filled there."""

import pytest
import torch

pytest.importorskip("megatron.core")

import tiny_hf

from megatron_longrope.checkpoint import load_into
from megatron_longrope.checkpoint.hf.checkpoint import HfCheckpoint
from megatron_longrope.checkpoint.opening import model_config
from megatron_longrope.engine import load_engine
from megatron_longrope.engine.model import build_model


def test_a_bf16_model_equals_one_that_was_built_in_fp32_and_converted(tmp_path):
    tiny_hf.make_hf_folder(tmp_path, "llama", torch.bfloat16, tie_word_embeddings=True)
    checkpoint = HfCheckpoint(tmp_path)
    ours = load_engine(checkpoint, device="cpu", dtype=torch.bfloat16).model
    theirs = build_model(checkpoint.shape, model_config(checkpoint))
    load_into(theirs, checkpoint)
    theirs = dict(theirs.to(torch.bfloat16).named_parameters())
    assert {name for name, _ in ours.named_parameters()} == theirs.keys()
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, theirs[name]), name
