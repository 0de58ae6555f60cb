"""The engine's model is allocated once, in its type and on its device, and filled there."""

import pytest
import torch

pytest.importorskip("megatron.core")

from transformers import LlamaConfig, LlamaForCausalLM

from megatron_longrope.checkpoint import load_into
from megatron_longrope.checkpoint.hf.checkpoint import HfCheckpoint
from megatron_longrope.checkpoint.opening import model_config
from megatron_longrope.engine import load_engine
from megatron_longrope.engine.model import build_model


def test_a_bf16_model_equals_one_that_was_built_in_fp32_and_converted(tmp_path):
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = HfCheckpoint(tmp_path)
    ours = load_engine(checkpoint, device="cpu", dtype=torch.bfloat16).model
    theirs = build_model(checkpoint.shape, model_config(checkpoint))
    load_into(theirs, checkpoint)
    theirs = dict(theirs.to(torch.bfloat16).named_parameters())
    assert {name for name, _ in ours.named_parameters()} == theirs.keys()
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, theirs[name]), name
