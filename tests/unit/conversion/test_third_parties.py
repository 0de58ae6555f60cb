"""What other programs make of an exported folder.

lm-eval's command runs here, as a release test, transformers in test_readers.py. vLLM and llama.cpp
cannot: their sources say which fields they read (docs/conversion.md), and the tests compute what
they would from these alone.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import launching
import make_megatron_checkpoint as maker
import pytest
import transformers

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.conversion.to_hf import write_hf_folder

TASKS = Path(__file__).parents[2] / "helpers" / "harness_tasks"


@pytest.fixture(scope="module")
def exported(megatron_runs, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "hf"
    write_hf_folder(
        megatron_runs["untied_gqa"].path,
        path,
        longrope_config=maker.longrope_config(),
        tokenizer=data["tokenizer"],
    )
    return path


# lm-eval


@pytest.mark.slow
@pytest.mark.release  # in this process, test_ruler.py has lm-eval's model on such a folder
def test_lm_evals_own_command_runs_on_the_folder(exported, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    command = [
        "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={exported},dtype=float32,max_length={maker.ORIGINAL}",
        "--tasks", "tiny_endings", "--include_path", str(TASKS), "--device", "cpu",
        "--batch_size", "1", "--limit", "2", "--output_path", str(tmp_path / "results"),
    ]  # fmt: skip
    variables = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = launching.python(*command, directory=TASKS, variables=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (tmp_path / "results").rglob("results_*.json")
    assert "acc,none" in json.loads(result.read_text())["results"]["tiny_endings"]


# vLLM, by its source: get_rope, Phi3LongRoPEScaledRotaryEmbedding, _get_and_verify_max_len


def vllm_attention_factor(config):
    """What it multiplies cos and sin by, for the long factors."""
    rope = config.rope_parameters
    scale = config.max_position_embeddings / rope["original_max_position_embeddings"]
    original = math.log(rope["original_max_position_embeddings"])
    computed = math.sqrt(1 + math.log(scale) / original) if scale > 1 else 1.0
    return rope.get("long_mscale", computed), rope.get("short_mscale", computed)


@pytest.mark.parametrize("value", [None, 1.15, 1.0], ids=["formula", "searched", "none"])
def test_vllm_finds_factors_window_and_attention_factor(untied_gqa, config, tmp_path, value):
    formula = math.sqrt(1 + math.log(maker.TARGET / maker.ORIGINAL) / math.log(maker.ORIGINAL))
    config = replace(config, attention_factor=value or formula)
    write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=config)
    loaded = transformers.AutoConfig.from_pretrained(str(tmp_path / "hf"))
    rope = loaded.rope_parameters
    half = maker.HEAD_DIM // 2
    assert len(rope["short_factor"]) == len(rope["long_factor"]) == half
    assert rope["original_max_position_embeddings"] == maker.ORIGINAL  # where get_rope looks
    assert loaded.original_max_position_embeddings == maker.ORIGINAL  # where the engine looks
    assert rope["rope_theta"] == maker.BASE
    assert vllm_attention_factor(loaded) == pytest.approx(
        (config.attention_factor, config.attention_factor), rel=1e-6
    )
    assert ("long_mscale" in rope) is (value is not None)


# llama.cpp, by its source: conversion/phi.py and conversion/base.py


def test_llama_cpp_finds_what_its_phi3_converter_reads(untied_gqa, config, tmp_path):
    """Its converters of other architectures take no factor tensors along, so phi3 it is."""
    formula = math.sqrt(1 + math.log(maker.TARGET / maker.ORIGINAL) / math.log(maker.ORIGINAL))
    config = replace(config, attention_factor=formula)
    write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=config, family="phi3")
    values = transformers.AutoConfig.from_pretrained(str(tmp_path / "hf")).to_dict()
    rope = values["rope_parameters"]
    assert values["architectures"] == ["Phi3ForCausalLM"]
    assert values["sliding_window"] is None
    assert rope["rope_type"] == "longrope"
    assert rope["original_max_position_embeddings"] == maker.ORIGINAL
    # It derives the rotated dimensions from hidden_size, not from head_dim.
    rotated = int(rope.get("partial_rotary_factor", 1.0) * values["hidden_size"])
    rotated //= values["num_attention_heads"]
    assert len(rope["long_factor"]) == len(rope["short_factor"]) == rotated / 2
    # It does not read attention_factor: only the formula's value survives.
    scale = values["max_position_embeddings"] / maker.ORIGINAL
    computed = math.sqrt(1 + math.log(scale) / math.log(maker.ORIGINAL))
    assert LongRopeConfig.from_hf(values).attention_factor == pytest.approx(computed, rel=1e-6)
