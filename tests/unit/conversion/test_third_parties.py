"""What other programs make of an exported folder.

transformers and lm-eval run. vLLM and llama.cpp cannot run here: their sources say which fields
they read (docs/conversion.md), and the tests compute what they would from these fields alone.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import launching
import make_megatron_checkpoint as maker
import numpy as np
import pytest
import torch
import transformers
from search_data import make_search_data

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.conversion.tokenizer import write_tokenizer
from megatron_longrope.engine import load_engine
from megatron_longrope.evaluation.perplexity import perplexity

TASKS = Path(__file__).parents[2] / "helpers" / "harness_tasks"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_search_data(tmp_path_factory.mktemp("data"))


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


@pytest.fixture(scope="module")
def model(exported):
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(exported), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def engine(megatron_runs):
    return load_engine(
        megatron_runs["untied_gqa"].path,
        longrope_config=maker.longrope_config(),
        dtype=torch.float32,
        hf_parity=True,
    )


# transformers


@pytest.mark.parametrize("length", [20, 100], ids=["short", "long"])
def test_transformers_generates_what_the_engine_generates(model, engine, length):
    """Greedily, and without leaving the window of one factor set."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(maker.VOCAB, (1, length), generator=generator)
    theirs = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, length:]
    ours, tokens = [], prompt
    for _ in range(12):
        following = engine.logits(tokens)[0, -1, : maker.VOCAB].argmax()
        ours.append(int(following))
        tokens = torch.cat([tokens, following.view(1, 1)], dim=1)
    assert theirs.tolist() == ours


@pytest.mark.parametrize("length", [64, 200])
def test_its_perplexity_is_the_engines(model, engine, length):
    rng = np.random.default_rng(length)
    documents = [rng.integers(3, maker.VOCAB, length) for _ in range(3)]

    def theirs(tokens):
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")[
            None
        ]

    first, second = (
        perplexity(nll, documents, 1, length).ppl_window_mean for nll in (engine.nll, theirs)
    )
    assert first == pytest.approx(second, rel=1e-5)


def test_both_generations_of_transformers_find_the_same_factors(exported):
    """4.57 reads rope_scaling, rope_theta and the original window at the top; 5.x one dict."""
    written = json.loads((exported / "config.json").read_text())
    new = written["rope_parameters"]
    old = written["rope_scaling"] | {"rope_theta": written["rope_theta"]}
    assert old == new
    assert written["original_max_position_embeddings"] == new["original_max_position_embeddings"]
    assert new["rope_type"] == "longrope"
    assert new["factor"] == written["max_position_embeddings"] / maker.ORIGINAL
    loaded = transformers.AutoConfig.from_pretrained(str(exported))
    for key in ("short_factor", "long_factor", "attention_factor", "rope_theta"):
        assert loaded.rope_parameters[key] == new[key]


# lm-eval


@pytest.mark.slow
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


def test_the_tokenizer_does_not_cut_the_window_short(data, tmp_path):
    """vLLM takes the smaller of model_max_length and max_position_embeddings."""
    source = tmp_path / "source"
    tokenizer = transformers.AutoTokenizer.from_pretrained(data["tokenizer"])
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(str(source))
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tmp_path / "out", 256)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["model_max_length"] == 256
    (tmp_path / "shorter").mkdir()
    write_tokenizer(source, tmp_path / "shorter", 32)
    written = json.loads((tmp_path / "shorter" / "tokenizer_config.json").read_text())
    assert written["model_max_length"] == 64


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
