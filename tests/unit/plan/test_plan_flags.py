"""Flags of a layout, and what a Megatron command trains."""

import shlex

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_longrope.plan import (
    MODELS,
    Cluster,
    Layout,
    NotCoveredError,
    Training,
    plan_command,
    rank,
)
from megatron_longrope.plan.flags import DEFAULT_CHUNK, UNCOVERED, parse, render
from megatron_longrope.plan.hardware import GPUS
from megatron_longrope.plan.layouts import FULL, layouts, problem

SEVEN_B = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 "
    "--vocab-size 32000 --swiglu --untie-embeddings-and-output-weights"
)
COMMAND = shlex.split(
    f"torchrun -m megatron_longrope pretrain pretrain_gpt.py {SEVEN_B} --seq-length 262144 "
    "--normalization RMSNorm --tensor-model-parallel-size 4 --context-parallel-size 8 --bf16 "
    "--sequence-parallel --use-distributed-optimizer --global-batch-size 32 --train-iters 600 "
    "--hidden-dropout 0 --longrope-config f.json --longrope-chunked-loss --lr 2e-5 --mock-data"
)


def model_words(model):
    words = [
        *("--num-layers", model.num_layers, "--hidden-size", model.hidden_size),
        *("--ffn-hidden-size", model.ffn_hidden_size, "--kv-channels", model.head_dim),
        *("--num-attention-heads", model.num_attention_heads, "--group-query-attention"),
        *("--num-query-groups", model.num_query_groups, "--vocab-size", model.vocab_size),
        "--swiglu",
    ]
    words += ["--untie-embeddings-and-output-weights"] * model.untie_embeddings
    words += ["--add-qkv-bias"] * model.add_qkv_bias + ["--qk-layernorm"] * model.qk_layernorm
    if model.num_experts is not None:
        words += ["--num-experts", model.num_experts, "--moe-router-topk", model.moe_router_topk]
        words += ["--moe-ffn-hidden-size", model.moe_ffn_hidden_size]
    return [str(word) for word in words]


@st.composite
def runs(draw):
    model = MODELS[draw(st.sampled_from(list(MODELS)))]
    tensor, context = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 8]))
    data, how = draw(st.sampled_from([1, 2, 4])), {}
    recompute = draw(st.sampled_from([(), ("mlp",), ("core_attn", "mlp"), FULL]))
    if recompute == FULL:
        how["recompute_method"] = draw(st.sampled_from(["uniform", "block"]))
        how["recompute_num_layers"] = draw(st.integers(1, 4))
    if model.num_experts is not None:
        how["expert"] = draw(st.sampled_from([1, data]))
        how["expert_tensor"] = draw(st.sampled_from([1, tensor]))
    if draw(st.booleans()):
        how["rope_fusion"] = False
    if context > 1:
        how["cp_comm_type"] = draw(st.sampled_from(["p2p", "all_gather", "a2a", "gathered"]))
    layout = Layout(
        tensor, context, draw(st.sampled_from([1, 2])), data,
        recompute=recompute,
        micro_batch_size=draw(st.sampled_from([1, 2])),
        sequence_parallel=tensor == 1 or draw(st.booleans()),
        distributed_optimizer=draw(st.booleans()),
        **how,
    )  # fmt: skip
    training = Training(
        draw(st.sampled_from([4096, 262144])), 32, 600,
        loss_chunk=draw(st.sampled_from([None, 1024, 4096])),
        precision=draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        half_gradients=draw(st.booleans()),
    )  # fmt: skip
    assume(problem(model, training, layout) is None)
    return model, training, layout


@given(runs())
def test_flags_read_back_are_the_layout_that_they_were_written_for_and_have_reasons(run):
    model, training, layout = run
    flags = render(layout, training, model)
    assert all(flag.reason for flag in flags)
    words = [word for flag in flags for word in flag.words]
    command = [*model_words(model), *words, "--train-iters", "600"]
    assert parse(command, layout.gpus) == (model, training, layout)


def test_megatrons_own_parser_knows_every_flag():
    arguments = pytest.importorskip("megatron.training.arguments")
    import argparse

    from megatron_longrope.integration.arguments import add_longrope_args

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_longrope_args(arguments.add_megatron_arguments(parser))
    layout = Layout(2, 2, 1, 2, expert=2, recompute=("moe",))
    for model, spread in (
        (MODELS["mixtral-8x7b"], layout),
        (MODELS["llama2-7b"], Layout(2, 2, recompute=FULL)),
    ):
        words = [w for f in render(spread, Training(8192), model) for w in f.words]
        args, unknown = parser.parse_known_args(words)
        assert not unknown
        known = {name for action in parser._actions for name in action.option_strings}
        assert {f"--{name}" for name in UNCOVERED} <= known
        assert args.context_parallel_size == 2 and args.longrope_chunked_loss == 1024


def test_fused_rope_that_cannot_index_the_tokens_is_named_and_left_out():
    seven, training = MODELS["llama2-7b"], Training(262144)
    for context in (1, 2):
        found = layouts(seven, training, context, 8, {"context": context})
        assert {layout.rope_fusion for layout in found} == {context == 2}
    command = shlex.split(f"{SEVEN_B} --bf16 --hidden-dropout 0 --train-iters 9")

    def length(tokens):
        return [*command, "--seq-length", str(tokens)]

    plan_command(length(174762), gpus=1)  # x 12288 values of q, k and v: 2^31 - 8192
    with pytest.raises(ValueError, match=r"32-bit offsets, and 174763 tokens a rank x 12288 value"):
        plan_command(length(174763), gpus=1)
    plan_command([*length(174763), "--no-rope-fusion"], gpus=1)
    plan_command([*length(174763), "--transformer-impl", "local"], gpus=1)
    plan_command([*length(174763), "--transformer-impl=local"], gpus=1)
    with pytest.raises(ValueError, match="32-bit offsets"):  # a folder's name is no implementation
        plan_command([*length(174763), "--load", "local"], gpus=1)


def test_the_chunk_without_a_number_is_the_plugins():
    from megatron_longrope import training_loss

    assert DEFAULT_CHUNK == training_loss.DEFAULT_CHUNK


def test_a_whole_command_is_read_and_what_does_not_matter_passed_over():
    estimate = plan_command(COMMAND, gpu="h100", gpus=64)
    assert estimate.model == MODELS["llama2-7b"]
    assert estimate.layout == Layout(4, 8, 1, 2)
    assert estimate.training == Training(262144, 32, 600, 1024)
    assert estimate.fits and estimate.hours > 0
    assert not plan_command(COMMAND, gpu="989:40", gpus=64).fits


def test_every_communication_that_is_read_is_written():
    for kind in ("p2p", "all_gather", "a2a", "a2a+p2p"):
        found = plan_command([*COMMAND, "--cp-comm-type", kind], gpus=64).as_dict()
        assert f"--cp-comm-type {kind}" in " ".join(map(str, found["flags"]))


def test_what_is_missing_is_megatrons_default():
    model, training, layout = parse(
        shlex.split("--num-layers 2 --hidden-size 4096 --num-attention-heads 32 --swiglu "
        "--group-query-attention --vocab-size 100 --seq-length 512 --train-samples 10"),
        4,
    )  # fmt: skip
    assert model.ffn_hidden_size == 10880  # Megatron's, no power of two
    assert (model.num_query_groups, model.untie_embeddings) == (1, False)
    assert training == Training(512, 4, 2, None, "fp32", hidden_dropout=True)
    assert (layout.data, layout.distributed_optimizer, layout.recompute) == (4, False, ())


def test_selective_recomputation_without_modules_is_attentions():
    for words in ("--recompute-activations", "--recompute-granularity selective"):
        assert parse([*COMMAND, *words.split()], 32)[2].recompute == ("core_attn",)


@pytest.mark.parametrize(
    ("layout", "flag", "words"),
    [
        (Layout(recompute=("mlp",)), "--recompute-modules", "attention is kept"),
        (Layout(recompute=("core_attn",)), "--recompute-modules", "computed again"),
        (Layout(recompute=("moe",)), "--recompute-granularity", "what was asked for"),
        (Layout(recompute=FULL), "--recompute-method", "keeps the inputs of groups"),
        (
            Layout(recompute=FULL, recompute_method="block"),
            "--recompute-method",
            "keeps the other layers whole",
        ),
    ],
)
def test_a_recomputation_is_called_what_it_is(layout, flag, words):
    flags = render(layout, Training(8192), MODELS["llama2-7b"])
    assert words in {flag.words[0]: flag.reason for flag in flags}[flag]


@pytest.mark.parametrize("name", UNCOVERED)
def test_a_flag_that_the_formulas_do_not_cover_is_refused(name):
    message = f"has --{name}, which the plan's formulas do not cover"
    for words in ([f"--{name}", "2"], [f"--{name}=2"]):
        with pytest.raises(NotCoveredError, match=message):
            plan_command([*COMMAND, *words], gpus=32)


def test_what_the_formulas_do_not_cover_may_be_given_where_it_has_no_effect():
    words = ["--moe-layer-freq", "1", "--mtp-num-layers=0"]
    assert plan_command([*COMMAND, *words], gpus=32).hours == plan_command(COMMAND, gpus=32).hours


def test_tensor_parallelism_beyond_a_node_is_estimated_where_it_is_asked_for():
    command = [*COMMAND, "--tensor-model-parallel-size", "16", "--context-parallel-size", "1"]
    assert plan_command(command, gpus=16).layout == Layout(16)
    fixed = rank(MODELS["llama2-7b"], Training(8192), Cluster(GPUS["h100"], 16), {"tensor": 16})
    assert fixed[0].layout.tensor == 16


def test_the_local_implementation_means_our_own_attention():
    local = [*COMMAND, "--transformer-impl", "local"]
    assert parse(local, 32)[2].cp_comm_type == "gathered"
    assert parse([*local, "--longrope-attention", "te"], 32)[2].cp_comm_type == "p2p"


def test_the_vocabulary_is_the_flags_or_the_tokenizers(tmp_path):
    without = [word for word in COMMAND if word not in ("--vocab-size", "32000")]
    with pytest.raises(ValueError, match="no --vocab-size, which memory and hours depend on"):
        parse(without, 32)

    from train_tokenizer import train_sentencepiece

    path = tmp_path / "tokenizer.model"
    train_sentencepiece(["the quick brown fox jumps over the lazy dog " * 20], path, 290)
    assert parse([*without, "--tokenizer-model", str(path)], 32)[0].vocab_size == 290


def test_a_model_that_stands_in_the_checkpoint_is_read_from_it(untied_gqa, tmp_path):
    words = shlex.split("--use-checkpoint-args --seq-length 128 --train-iters 2")
    there = [
        *words,
        "--load",
        str(tmp_path / "none"),
        "--pretrained-checkpoint",
        str(untied_gqa.path),
    ]
    assert parse(there, 1)[0].num_query_groups < parse(there, 1)[0].num_attention_heads
    with pytest.raises(ValueError, match="which is not there; give the model's flags"):
        parse([*words, "--load", str(tmp_path / "none")], 1)


@pytest.mark.parametrize(
    ("change", "gpus", "message"),
    [
        ("--num-layers many", 32, r"does not parse \(argument --num-layers: 'many' is not a"),
        ("--micro-batch-size 0", 32, "argument --micro-batch-size: '0' is not a positive integer"),
        (
            "--num-experts 8 --expert-model-parallel-size 0",
            32,
            "argument --expert-model-parallel-size: '0' is not a positive",
        ),
        ("--cp-comm-type magic", 32, r"does not parse \(argument --cp-comm-type: invalid choice"),
        ("", 20, "20 GPUs are no multiple of the command's tensor x context x pipeline .* 32"),
        (
            "--tensor-model-parallel-size 3",
            24,
            "Megatron would refuse the command: tensor parallel 3",
        ),
        ("--recompute-granularity full", 32, "has no --recompute-num-layers"),
    ],
)
def test_a_command_that_cannot_be_estimated_is_refused_in_a_sentence(change, gpus, message):
    with pytest.raises(ValueError, match=message):
        plan_command([*COMMAND, *change.split()], gpu="h100", gpus=gpus)


def test_a_model_without_gated_mlps_is_refused():
    with pytest.raises(NotCoveredError, match="no --swiglu"):
        plan_command([word for word in COMMAND if word != "--swiglu"], gpus=32)


def test_a_missing_flag_is_named():
    for flag in ("--num-layers", "--seq-length", "--train-iters"):
        at = COMMAND.index(flag)
        with pytest.raises(ValueError, match=f"has no {flag}"):
            plan_command(COMMAND[:at] + COMMAND[at + 2 :], gpus=32)
