"""Runs that others have published: they must fit where they ran, and take about as long.

Sources and what is not known about each run: docs/plan.md, which has the table of these rows.
"""

from dataclasses import replace

import pytest

from megatron_longrope.plan import MODELS, Cluster, Estimate, Layout, Training, rank
from megatron_longrope.plan.hardware import GPUS
from megatron_longrope.plan.layouts import problem
from megatron_longrope.plan.time import rates, step_flops, step_seconds

K = 1024
# NeMo ran matrix products in FP8; these are their rates as parts of the bf16 peak.
FP8 = {"h100": 0.77, "b200": 0.62}


def published(model, gpu, length, tensor, context, pipeline, data, batch=None, **layout):
    return Estimate(
        MODELS[model],
        Training(length * K, batch or data, loss_chunk=None),
        Layout(tensor, context, pipeline, data, **layout),
        GPUS[gpu],
    )


# (run, TFLOP/s per GPU as published)
NEMO = [
    (published("llama2-7b", "h100", 32, 2, 2, 1, 8), 610),
    (published("llama2-7b", "h100", 64, 4, 2, 1, 8), 574),
    (published("llama2-7b", "h100", 128, 4, 4, 1, 8), 555),
    (published("llama2-7b", "h100", 256, 4, 8, 1, 8), 549),
    (published("llama2-7b", "h100", 512, 8, 16, 1, 4), 549),
    (published("llama2-7b", "h100", 1024, 8, 32, 1, 4), 536),
    (published("llama3-8b", "b200", 256, 4, 4, 1, 4), 1590),
    (published("llama3-8b", "b200", 1024, 4, 16, 1, 4), 1608),
]
BRIDGE = [
    published("llama3-8b", "h100", 64, 4, 4, 2, 2, batch=512),
    published("llama3-8b", "h100", 128, 4, 8, 2, 1, batch=512),
]


@pytest.mark.parametrize("run", [run for run, _ in NEMO] + BRIDGE, ids=lambda run: run.short())
def test_a_published_layout_keeps_the_rules_and_fits_without_recomputation(run):
    assert problem(run.model, run.training, run.layout) is None
    assert run.fits, run.text()


@pytest.mark.parametrize(("run", "theirs"), NEMO, ids=[run.short() for run, _ in NEMO])
def test_the_rates_reproduce_nemos_published_throughput(run, theirs):
    flops = step_flops(run.model, run.training, run.layout)
    rate = FP8[run.gpu.name], rates(run.gpu)[1]
    seconds = step_seconds(flops, run.training, run.layout, run.gpu, rate)
    # NeMo counted the whole square of attention, of which causal attention computes half.
    ours = (flops.matmul + 2 * flops.attention) / seconds / run.layout.gpus / 1e12
    assert ours == pytest.approx(theirs, rel=0.06)


@pytest.mark.parametrize(("length", "theirs"), [(512, 2133), (700, 1603)])
def test_easycontext_on_eight_a100s_is_met_at_long_lengths(length, theirs):
    run = published("llama2-7b", "a100-80", length, 1, 8, 1, 1, recompute=("full",))
    assert 8 * run.tokens_per_second == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize(
    ("length", "gpus", "steps", "days"), [(128, 8, 400, 7), (256, 16, 600, 14)]
)
def test_the_papers_fine_tuning_fits_on_its_gpus_and_needs_no_more_time(length, gpus, steps, days):
    training = Training(length * K, 32, steps)
    best = rank(MODELS["llama2-7b"], training, Cluster(GPUS["a100-80"], gpus))[0]
    assert best.fits
    assert days / 4 < best.hours / 24 < days  # it ran at 16 to 20 % of the peak


def test_activations_are_those_of_the_published_table():
    """GiB at 256k, 7B: 1028 without recomputation, 64 with (128k: 514 and 32)."""
    for length, plain, full in ((128, 514, 32), (256, 1028, 64)):
        run = published("llama2-7b", "h100", length, 4, 8, 1, 1)
        ranks = 32
        kept = run.memory.activations * ranks / 2**30
        assert kept == pytest.approx(plain, rel=0.005)
        full_run = replace(run, layout=replace(run.layout, recompute=("full",)))
        assert full_run.memory.activations * ranks / 2**30 == pytest.approx(full, rel=0.005)
