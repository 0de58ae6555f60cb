"""Memory and time of generation, against the engine's own tensors and counts by hand."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_longrope.cli import main
from megatron_longrope.errors import LongRopeError
from megatron_longrope.lengths import PREFILL_TOKENS
from megatron_longrope.plan import Cluster
from megatron_longrope.plan.generation import GenerationPlan, rank_generation
from megatron_longrope.plan.hardware import GPUS, Gpu, parse_gpu
from megatron_longrope.plan.model import MODELS, Model

LLAMA3 = MODELS["llama3-8b"]


def planned(model=LLAMA3, length=131072, new=128, tensor=1, context=1, samples=1, **options):
    cluster = Cluster(**{"gpu": GPUS["h100"], "gpus": 8, **options})
    return GenerationPlan(model, length, new, samples, tensor, context, cluster)


def run(text: str) -> int:
    return main(["--debug", "plan", *text.split()])


def test_weights_and_cache_are_the_engines_own_tensors(megatron_runs):
    from megatron_longrope.engine import load_engine
    from megatron_longrope.engine.kv_cache import PinnedSequence

    engine = load_engine(megatron_runs["untied_gqa"].path, device="cpu", dtype=torch.bfloat16)
    expected = planned(Model.from_shape(engine.shape), 50, 10).memory
    sequence = PinnedSequence(engine.model, 50, 50)
    with torch.no_grad():
        sequence.advance(torch.zeros(1, 4, dtype=torch.int64))
    caches = [tensor for cache in sequence._caches.values() for tensor in cache._tensors]
    assert expected.cache == sum(tensor.nbytes for tensor in caches)
    assert expected.weights == sum(weight.nbytes for weight in engine.model.parameters())
    assert expected.rotary == sequence._angles.nbytes


def test_ranks_divide_the_cache_and_the_weights_as_counted_by_hand():
    alone, split = planned(), planned(tensor=2, context=4)
    assert alone.memory.cache == 2 * 2 * 32 * 131072 * 1024  # K and V, bf16, 8 heads of 128
    assert split.memory.cache == 2 * 2 * 32 * (131072 // 4 + 8) * 512
    assert split.memory.weights == pytest.approx(alone.memory.weights / 2, rel=0.001)
    assert alone.memory.weights == pytest.approx(2 * LLAMA3.parameters, rel=0.001)


def test_activations_stop_growing_with_the_prompt_and_shrink_with_ranks():
    sizes = [planned(length=n).memory.activations for n in (8192, PREFILL_TOKENS + 128, 2**20)]
    assert sizes[0] < sizes[1] == sizes[2]
    ranks = [planned(length=2**20, context=c).memory.activations for c in (2, 4, 8)]
    assert ranks == sorted(ranks, reverse=True)


def test_a_prompt_takes_its_operations_and_a_token_its_bytes():
    plan = planned(new=1, length=65537, mfu=0.5)
    h, f, q, k, n = 4096, 14336, 4096, 1024, 65536
    weights = 32 * (2 * h * q + 2 * h * k + 3 * h * f)
    assert plan.prefill_flops == 2 * n * weights + 2 * 32 * n**2 * q
    assert plan.prefill_seconds == pytest.approx(plan.prefill_flops / (0.5 * 989e12))
    read = plan.memory.weights + plan.memory.cache
    assert plan.token_seconds == pytest.approx(read / (0.6 * 3.35e12))
    many = replace(plan, samples=9, cluster=Cluster(GPUS["h100"], 4, mfu=0.5))
    assert many.seconds == pytest.approx(3 * (plan.prefill_seconds + plan.token_seconds))


def test_of_experts_a_token_reads_those_it_is_sent_to():
    plan = planned(MODELS["mixtral-8x7b"], gpu=GPUS["h200"])
    dense = plan.memory.weights + plan.memory.cache
    assert plan.token_seconds < 0.4 * dense / (0.6 * 4.8e12)


def test_layouts_that_fit_come_first_and_copies_are_taken_for_many_prompts():
    many = rank_generation(planned(samples=512))
    assert many[0].fits and many[0].copies == 8
    million = rank_generation(planned(length=2**20))
    assert million[0].fits and million[0].context * million[0].tensor > 1
    assert [plan.fits for plan in million] == sorted((p.fits for p in million), reverse=True)
    (fixed,) = rank_generation(planned(), {"tensor": 2, "context": 4})
    assert (fixed.tensor, fixed.context, fixed.copies) == (2, 4, 1)
    with pytest.raises(LongRopeError, match="no layout of 8 GPUs keeps the rules"):
        rank_generation(planned(), {"tensor": 3})


def test_the_command_says_what_generation_takes(capsys):
    given = "--model llama3-8b --length 1024k --gpus 8 --generate 128"
    assert run(f"{given} --all") == 0
    shown = capsys.readouterr().out
    for text in (
        "keys and values",
        "to read a prompt",
        "ms a new token",
        "--context-parallel-size",
    ):
        assert text in shown
    assert run(f"{given} --samples 500 --json") == 0
    found = json.loads(capsys.readouterr().out)
    parts = found["memory_gib"]
    assert parts["total"] == pytest.approx(sum(parts.values()) - parts["total"], abs=0.01)
    assert found["samples"] == 500 and found["fits"]


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ("4", "torchrun --nproc-per-node 4 "),
        ("16", "torchrun --nnodes 2 --nproc-per-node 8 "),
        ("8 --gpus-per-node 4", "torchrun --nnodes 2 --nproc-per-node 4 "),
    ],
)
def test_the_flags_start_as_many_processes_as_a_node_has_gpus(gpus, words, capsys):
    assert run(f"--model llama3-8b --length 128k --generate 128 --gpus {gpus}") == 0
    assert words in capsys.readouterr().out


def test_generation_that_does_not_fit_says_on_how_many_gpus_it_would(capsys):
    assert run("--model llama3-70b --length 128k --gpus 1 --generate 128") == 1
    shown = capsys.readouterr().out
    assert "does NOT fit" in shown and "What would fit:\n  4 GPUs (" in shown
    assert run("--model llama3-70b --length 128k --gpus 1 --generate 128 --json") == 1
    assert json.loads(capsys.readouterr().out)["would_fit"][0].startswith("4 GPUs (")


def test_layouts_that_the_engine_refuses_are_not_proposed():
    few_groups = replace(LLAMA3, num_attention_heads=16, num_query_groups=2)
    found = rank_generation(planned(few_groups, length=2**20))
    assert {plan.tensor for plan in found} == {1, 2}
    with pytest.raises(LongRopeError, match="tensor parallel the 2 query groups"):
        rank_generation(planned(few_groups), {"tensor": 4})


def test_what_would_fit_keeps_the_sizes_that_are_fixed(capsys):
    given = "--model llama3-70b --length 128k --gpus 1 --generate 128"
    assert run(f"{given} --tensor-model-parallel-size 1") == 1
    assert "nothing that was tried" in capsys.readouterr().out  # the weights of 70 B, on any GPU


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--gpu 312:80", "the bandwidth of GPU '312:80' is unknown"),
        ("--recompute full", "--recompute has no meaning with --generate; leave it out"),
        ("--length 128", "128 new tokens leave no prompt in 128 tokens"),
    ],
)
def test_what_generation_cannot_be_planned_with_is_refused(given, message):
    with pytest.raises(LongRopeError, match=message):
        run(f"--model llama3-8b --length 128k --gpus 8 --generate 128 {given}")


def test_a_gpu_may_be_given_with_its_bandwidth():
    assert parse_gpu("312:80:2.0") == Gpu("312:80:2.0", 312, 80, 2.0)
