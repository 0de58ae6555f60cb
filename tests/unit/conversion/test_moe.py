"""Mixtures of experts: both ways without loss, and the same logits in all three codes."""

import argparse
import json
from dataclasses import replace

import launching
import make_megatron_checkpoint as maker
import make_moe_checkpoint as moe_maker
import pytest
import tiny_hf
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from launching import spawn
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    router_gating_linear,
    topk_routing_with_score_function,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_longrope.checkpoint import MegatronCheckpoint, ModelShape
from megatron_longrope.checkpoint.hf.checkpoint import HfCheckpoint
from megatron_longrope.checkpoint.hf.families import select_family, shape_from_hf_config
from megatron_longrope.checkpoint.hf.rules import MIXTRAL_EXPERTS, QWEN_EXPERTS
from megatron_longrope.checkpoint.hf.splits import join, part_rows, split
from megatron_longrope.conversion.from_hf import write_checkpoint
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.conversion.verify import random_tokens, verify_import
from megatron_longrope.engine import load_engine
from megatron_longrope.engine import mlp as mlp_module
from megatron_longrope.flops import forward_flops, layer_weights
from megatron_longrope.plan.hardware import parse_gpu
from megatron_longrope.plan.search_cost import SearchCost

ROUTING = ("num_local_experts", "num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef")
WIDTHS = ("intermediate_size", "moe_intermediate_size")
VOCAB = tiny_hf.GEOMETRY["vocab_size"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": tiny_hf.WINDOW // 4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.0, 4.0],
}
# Name of a case -> family and settings; the gates add up to 1 in all but one of them.
MODELS = {
    "mixtral": ("mixtral", {}),
    "mixtral_longrope": (
        "mixtral",
        {"num_experts_per_tok": 3, "rope_parameters": LONGROPE, "router_aux_loss_coef": 0.0},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts_per_tok": 3, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen3_moe_other_gates": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe_one_expert": ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    for name, (family, changes) in MODELS.items():
        tiny_hf.make_hf_folder(root / name, family, **changes)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def made_by_megatron(tmp_path_factory):
    """Checkpoints that megatron-core wrote, and the logits of its own forward pass."""
    directory = tmp_path_factory.mktemp("moe")
    done = launching.python(moe_maker.__file__, directory, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: (directory / name, torch.load(directory / f"{name}.pt"))
        for name in moe_maker.VARIANTS
    }


def transformers_logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_goes_to_megatron_and_back_bit_for_bit(folders, tmp_path, name):
    verified = write_checkpoint(
        folders[name],
        tmp_path / "megatron",
        check=lambda path: verify_import(path, folders[name], tolerance=1e-4),
    )
    assert verified.shape.num_experts == 4
    longrope = MegatronCheckpoint.open(tmp_path / "megatron").longrope
    report = write_hf_folder(tmp_path / "megatron", tmp_path / "back", longrope_config=longrope)
    assert report.family == config_of(folders[name])["model_type"]
    before = load_file(folders[name] / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for key in (*ROUTING, *WIDTHS):
        assert config_of(tmp_path / "back").get(key) == config_of(folders[name]).get(key)


@pytest.mark.parametrize("name", moe_maker.VARIANTS)
def test_a_checkpoint_of_megatron_computes_the_same_in_all_three_codes(
    made_by_megatron, tmp_path, name
):
    path, expected = made_by_megatron[name]
    expected = expected[..., : maker.VOCAB]
    tokens = random_tokens(maker.VOCAB, maker.SHORT_TOKENS, 0)
    ours = load_engine(path, device="cpu").logits(tokens)
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=0)
    report = write_hf_folder(path, tmp_path / "hf", longrope_config=None)
    assert report.family == {"stacked": "mixtral", "numbered": "qwen3_moe"}[name]
    theirs = transformers_logits(tmp_path / "hf", tokens)
    torch.testing.assert_close(theirs, expected, atol=5e-5, rtol=0)


def test_what_is_written_has_the_names_and_shapes_that_megatron_writes(made_by_megatron, tmp_path):
    path, _ = made_by_megatron["stacked"]
    write_hf_folder(path, tmp_path / "hf", longrope_config=None)
    write_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    theirs = MegatronCheckpoint.open(path).keys()
    ours = MegatronCheckpoint.open(tmp_path / "megatron").keys()
    # The norm before the router is stored once more, as models of Transformer Engine name it.
    norm = ours.pop("decoder.layers.pre_mlp_layernorm.weight")
    assert norm == ours["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
    assert ours == theirs


def test_a_checkpoint_of_the_transformer_engine_spec_differs_in_the_name_of_a_norm(folders):
    class OfTransformerEngine(HfCheckpoint):
        def keys(self):
            fused = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
            return {name: info for name, info in super().keys().items() if name != fused}

    tokens = random_tokens(VOCAB, 40, 0)
    engines = (
        load_engine(kind(folders["mixtral"]), device="cpu")
        for kind in (HfCheckpoint, OfTransformerEngine)
    )
    first, second = (engine.logits(tokens) for engine in engines)
    assert torch.equal(first, second)


@pytest.mark.parametrize("tokens_per_slice", [1, 7, 50])
@pytest.mark.parametrize("batch", [1, 2])
def test_slices_change_nothing_but_rounding(folders, monkeypatch, tokens_per_slice, batch):
    engine = load_engine(HfCheckpoint(folders["qwen3_moe"]), device="cpu")
    tokens = torch.cat([random_tokens(VOCAB, 60, seed) for seed in range(batch)])
    whole = engine.nll(tokens)
    seen = []
    for module in engine.model.modules():
        if isinstance(module, MLP):
            module.linear_fc1.register_forward_hook(lambda _, __, out: seen.append(len(out[0])))
    monkeypatch.setattr(mlp_module, "_TOKENS_PER_SLICE", tokens_per_slice)
    torch.testing.assert_close(engine.nll(tokens), whole, atol=1e-5, rtol=0)
    assert max(seen) <= max(tokens_per_slice, batch)
    assert sum(seen) == 3 * 2 * batch * 60  # three experts a token, two layers


@pytest.mark.parametrize("dtype", [None, "fp32", "fp64"])
def test_the_router_computes_in_the_dtype_of_its_run(made_by_megatron, dtype):
    checkpoint = MegatronCheckpoint.open(made_by_megatron["stacked"][0])
    args = argparse.Namespace(**{**vars(checkpoint.args), "moe_router_dtype": dtype})
    checkpoint.shape = ModelShape.from_args(args)
    engine = load_engine(checkpoint, device="cpu", dtype=torch.bfloat16)
    layer = next(module for module in engine.model.modules() if isinstance(module, MoELayer))
    seen = {}
    for expert in layer.experts.local_experts:
        expert.register_forward_hook(lambda expert, given, _: seen.update({expert: given[0]}))
    hidden = torch.randn(3000, 1, maker.HIDDEN, generator=torch.Generator().manual_seed(0))
    hidden = hidden.bfloat16()
    layer(hidden)
    wanted = {None: hidden.dtype, "fp32": torch.float32, "fp64": torch.float64}[dtype]
    logits = router_gating_linear(hidden[:, 0], layer.router.weight, None, wanted)
    _, chosen = topk_routing_with_score_function(logits, moe_maker.TOPK)
    for expert, rows in zip(layer.experts.local_experts, chosen.t(), strict=True):
        assert torch.equal(seen[expert], hidden[rows, 0])


def _of_rank(rank, folder, directory):
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    engine = load_engine(HfCheckpoint(folder), device="cpu", tensor_parallel=2)
    tokens = random_tokens(VOCAB, 60, 0)
    torch.save(engine.nll(tokens), directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_tensor_parallel_ranks_share_every_expert(folders, tmp_path):
    folder = folders["qwen3_moe"]
    spawn(_of_rank, (folder, tmp_path), 2)
    tokens = random_tokens(VOCAB, 60, 0)
    whole = load_engine(HfCheckpoint(folder), device="cpu").nll(tokens)
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(shared, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "wanted", "unwanted"),
    [
        ("mixtral", "--num-experts 4 --moe-ffn-hidden-size 48 --moe-router-topk 2", "pre-softmax"),
        ("mixtral", "load-balancing-type aux_loss --moe-aux-loss-coeff 0.001", "qk-layernorm"),
        ("mixtral_longrope", "load-balancing-type none --moe-aux-loss-coeff 0.0", "pre-softmax"),
        ("qwen3_moe", "--moe-ffn-hidden-size 16 --moe-router-topk 3", "pre-softmax"),
        ("qwen3_moe_other_gates", "--moe-router-pre-softmax", "None"),
    ],
)
def test_the_printed_flags_ask_for_the_routing(folders, tmp_path, name, wanted, unwanted):
    report = write_checkpoint(folders[name], tmp_path / "megatron")
    flags = " ".join(report.flags)
    assert wanted in flags and unwanted not in flags
    beside = " ".join(report.flags_beside_checkpoint_args)
    assert "--moe-aux-loss-coeff" in beside and "--num-experts" not in beside


ARGS = moe_maker.arguments(pre_softmax=False, qk_layernorm=False, listed=False)


@pytest.mark.parametrize(
    "change",
    [
        {"moe_layer_freq": 2},
        {"moe_layer_freq": [0, 1, 1]},
        {"moe_shared_expert_intermediate_size": 64},
        {"moe_latent_size": 16},
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_enable_expert_bias": True},
        {"moe_router_topk_scaling_factor": 2.5},
        {"moe_router_group_topk": 2},
        {"moe_router_load_balancing_type": "sinkhorn"},
        {"moe_expert_capacity_factor": 1.25},
        {"moe_apply_probs_on_input": True},
    ],
    ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)
def test_other_mixtures_are_refused_with_the_argument(change):
    args = argparse.Namespace(**{**vars(ARGS), **change})
    shape = ModelShape.from_args(args)
    with pytest.raises(ValueError, match=next(iter(change))):
        select_family(shape, args)
    checkpoint = argparse.Namespace(shape=shape, longrope=None)
    with pytest.raises(ValueError, match=next(iter(change))):
        load_engine(checkpoint, device="cpu")


def test_settings_that_leave_the_routing_alone_are_not_refused():
    fine = {
        "moe_layer_freq": [1] * maker.LAYERS,
        "moe_router_topk_scaling_factor": 1.0,
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2],
        "moe_grouped_gemm": True,
        "moe_z_loss_coeff": 1e-3,
        "moe_token_dispatcher_type": "alltoall",
    }
    args = argparse.Namespace(**{**vars(ARGS), **fine})
    shape = ModelShape.from_args(args)
    assert select_family(shape, args).name == "mixtral"
    assert shape.moe_aux_loss_coeff == 0.0


def test_a_dense_model_is_described_as_before():
    shape = ModelShape.from_args(maker.arguments(groups=2, untied=True))
    assert (shape.num_experts, shape.moe_router_topk, shape.other_moe) == (None, None, None)


def test_no_family_has_these_gates():
    shape = replace(ModelShape.from_args(ARGS), moe_normalized_gates=False)
    with pytest.raises(ValueError, match="num_experts = 4, moe_router_pre_softmax = True"):
        select_family(shape, ARGS)
    with pytest.raises(ValueError, match=r"qk_layernorm = False.*\(families: llama\)"):
        select_family(ModelShape.from_args(ARGS), ARGS, "llama")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2.*dense layers"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\].*dense layers"),
        ({"shared_expert_intermediate_size": 64}, "shared experts"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok = 1.*add up to 1"),
        ({"num_experts": 6}, "num_local_experts = 4 and 6 under another name"),
        ({"num_local_experts": None}, "lacks num_experts"),
    ],
)
def test_a_config_json_of_another_mixture_is_refused(folders, change, reason):
    config = {**config_of(folders["qwen3_moe"]), **change}
    with pytest.raises(ValueError, match=reason):
        shape_from_hf_config(config)


def test_transformers_4_and_5_name_the_number_of_experts_differently(folders):
    config = config_of(folders["qwen3_moe"])
    shape = shape_from_hf_config(config)
    config["num_experts"] = config.pop("num_local_experts")
    assert shape_from_hf_config(config) == shape


def test_mixtral_has_another_default_for_the_rotary_base(folders):
    config = config_of(folders["mixtral"])
    del config["rope_parameters"]
    assert shape_from_hf_config(config).rotary_base == 1e6
    config["rope_parameters"] = {"rope_theta": 500.0, "rope_type": "default"}
    assert shape_from_hf_config(config).rotary_base == 500.0


def test_another_number_of_experts_than_the_arguments_say_is_refused(made_by_megatron, tmp_path):
    path, _ = made_by_megatron["stacked"]
    checkpoint = MegatronCheckpoint.open(path)
    checkpoint.shape = replace(checkpoint.shape, num_experts=2)
    with pytest.raises(ValueError, match=r"router.weight has shape \(4, 64\).*expects \(2, 64\)"):
        load_engine(checkpoint, device="cpu")


SIZES = st.integers(1, 4)


@given(SIZES, SIZES, SIZES, st.sampled_from(MIXTRAL_EXPERTS[2:] + QWEN_EXPERTS[2:]))
def test_experts_come_apart_and_together_again(experts, ffn, hidden, rule):
    base = ModelShape.from_args(ARGS)
    shape = replace(base, num_experts=experts, moe_ffn_hidden_size=ffn, hidden_size=hidden)
    rule = rule.of_experts(experts)
    rows = part_rows(rule, shape)
    columns = hidden if "fc1" in rule.disk else ffn
    parts = [torch.randn(count, columns) for count in rows]
    value = join(parts, rule, shape)
    assert value.shape == (experts, sum(rows) // experts, columns)
    again = split(value, rule, shape)
    assert all(torch.equal(*pair) for pair in zip(parts, again, strict=True))
    assert len(set(rule.hf)) == len(rule.hf) == len(parts)


def test_mixtral_8x7b_has_its_published_numbers_of_weights():
    shape = replace(
        ModelShape.from_args(ARGS),
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        num_experts=8,
        moe_ffn_hidden_size=14336,
        moe_router_topk=2,
        vocab_size=32000,
        padded_vocab_size=32000,
    )
    embeddings = 2 * 32000 * 4096
    assert sum(layer_weights(shape)) + embeddings == pytest.approx(46.7e9, rel=1e-3)
    assert sum(layer_weights(shape, active=True)) + embeddings == pytest.approx(12.9e9, rel=2e-3)
    products, _ = forward_flops(shape, 1)
    assert products == 2 * (sum(layer_weights(shape, active=True)) + 32000 * 4096)
    cost = SearchCost(
        shape, target_length=4096, samples=1, evaluations=1, gpu=parse_gpu("h100"), batch=1
    )
    assert cost.memory["weights"] == pytest.approx(2 * 46.7e9, rel=1e-3)
    assert not cost.fits
