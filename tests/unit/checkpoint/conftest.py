"""A tiny checkpoint in Megatron's torch_dist layout, written with torch alone."""

import argparse
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.config import FactorSet, LongRopeConfig

LAYERS, HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCAB, PADDED = 2, 32, 48, 4, 2, 8, 50, 64


def arguments(**changes):
    values = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "group_query_attention": True,
        "num_query_groups": GROUPS,
        "kv_channels": HEAD_DIM,
        "vocab_size": VOCAB,
        "padded_vocab_size": PADDED,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": True,
        "swiglu": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "max_position_embeddings": 16,
        "seq_length": 16,
        "params_dtype": torch.float32,
    }
    return argparse.Namespace(**{**values, **changes})


def model_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = "decoder.layers."
    shapes = {
        "embedding.word_embeddings.weight": (PADDED, HIDDEN),
        f"{layers}self_attention.linear_qkv.weight": (
            LAYERS,
            (HEADS + 2 * GROUPS) * HEAD_DIM,
            HIDDEN,
        ),
        f"{layers}self_attention.linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
        f"{layers}self_attention.linear_proj.weight": (LAYERS, HIDDEN, HEADS * HEAD_DIM),
        f"{layers}mlp.linear_fc1.weight": (LAYERS, 2 * FFN, HIDDEN),
        f"{layers}mlp.linear_fc1.layer_norm_weight": (LAYERS, HIDDEN),
        f"{layers}mlp.linear_fc2.weight": (LAYERS, HIDDEN, FFN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        "output_layer.weight": (PADDED, HIDDEN),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def longrope_config():
    return LongRopeConfig(
        rotary_base=10000.0,
        rotary_dim=HEAD_DIM,
        original_max_position_embeddings=16,
        factor_sets=(
            FactorSet(16, (1.0, 1.0, 1.0, 1.0)),
            FactorSet(64, (1.0, 1.5, 2.5, 4.0), origin={"method": "search"}),
        ),
        attention_factor=1.1,
    )


@pytest.fixture
def tensors():
    return model_tensors()


@pytest.fixture
def make_checkpoint(tmp_path):
    """Writes `save/iter_0000003`; `common` replaces the state that holds the arguments."""

    def make(*, layout="0.19", tensors=None, common=None, **changes):
        save = tmp_path / "save"
        directory = save / "iter_0000003"
        if common is None:
            common = {"args": arguments(**changes), "iteration": 3, "checkpoint_version": 3.0}
        state = dict(model_tensors() if tensors is None else tensors)
        state["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(PADDED, HIDDEN)
        state["decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"] = {"unused": 1}
        if layout == "0.19":
            state["common_state/shard_0_1"] = [common]
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(state, checkpoint_id=directory, planner=planner, no_dist=True)
        if layout == "0.18":
            torch.save(common, directory / "common.pt")
        (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        (save / "latest_checkpointed_iteration.txt").write_text("3")
        return save

    return make


@pytest.fixture(name="arguments")
def arguments_read(make_checkpoint):
    """What torch_dist gives back of a run's arguments."""
    return lambda **changes: MegatronCheckpoint.open(make_checkpoint(**changes)).args


@pytest.fixture
def expected_longrope():
    return longrope_config()
