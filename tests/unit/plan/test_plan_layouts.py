"""Which layouts there are, and which is recommended."""

from dataclasses import replace

import pytest

from megatron_longrope.plan import MODELS, Cluster, Layout, Training, rank, remedies
from megatron_longrope.plan.hardware import GPUS
from megatron_longrope.plan.layouts import FULL, layouts, problem, traffic

H100 = GPUS["h100"]
LLAMA, QWEN, MIXTRAL = (MODELS[name] for name in ("llama2-7b", "qwen2.5-7b", "mixtral-8x7b"))
TRAINING = Training(262144)


def best(model, length, gpus, fixed=None, **training):
    return rank(model, Training(length, **training), Cluster(H100, gpus), fixed)[0]


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        (QWEN, Layout(tensor=8), "tensor parallel 8 does not divide the 28 heads"),
        (LLAMA, Layout(pipeline=5), "5 does not divide the 32 layers"),
        (LLAMA, Layout(context=3), "no multiple of 2 x context parallel = 6"),
        (LLAMA, Layout(data=5), "5 data-parallel ranks of 1 sequences do not divide the batch"),
        (LLAMA, Layout(8, 8, cp_comm_type="a2a"), "a2a needs context parallel 8 to divide"),
        (MIXTRAL, Layout(data=48, expert=3), "expert parallel 3 does not divide the 8 experts"),
        (MIXTRAL, Layout(data=12, expert=8), "1 does not divide the 12 ranks of a stage"),
    ],
)
def test_a_layout_that_megatron_would_refuse_is_named_with_its_rule(model, layout, message):
    assert message in problem(model, TRAINING, layout)


def test_fewer_key_heads_than_ranks_are_a_layout_where_megatron_copies_them():
    model = replace(QWEN, num_attention_heads=32, num_query_groups=4)
    assert problem(model, TRAINING, Layout(tensor=8)) is None
    assert problem(replace(model, num_query_groups=6), TRAINING, Layout(tensor=4)) is not None


@pytest.mark.parametrize(
    "model",
    [pytest.param(LLAMA, id="heads"), pytest.param(MODELS["llama3-8b"], id="groups")],
)
def test_megatrons_configuration_accepts_every_layout(model):
    config = pytest.importorskip("megatron.core.transformer.transformer_config")
    import torch

    found = layouts(model, TRAINING, 64, 8, {})
    for tensor, context, pipeline in {(i.tensor, i.context, i.pipeline) for i in found}:
        config.TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            pipeline_model_parallel_size=pipeline,
            pipeline_dtype=torch.bfloat16,
            sequence_parallel=tensor > 1,
        )


def test_every_layout_uses_all_gpus_once():
    found = list(layouts(LLAMA, TRAINING, 32, 8, {}))
    assert found and len(set(found)) == len(found)
    assert {layout.gpus for layout in found} == {32}
    assert all(problem(LLAMA, TRAINING, layout) is None for layout in found)


def test_fewer_gpus_recompute_first_mlps_then_layers():
    chosen = [best(LLAMA, 262144, gpus).layout.recompute for gpus in (64, 16, 8)]
    assert chosen == [(), ("mlp",), FULL]


def test_a_pipeline_is_no_choice_where_its_bubble_buys_nothing():
    assert best(LLAMA, 262144, 64).layout.pipeline == 1


def test_among_equally_fast_layouts_the_one_that_sends_least_comes_first():
    cluster = Cluster(H100, 64)
    fitting = [item for item in rank(LLAMA, TRAINING, cluster) if item.fits]
    first = fitting[0]
    equal = [item for item in fitting if f"{item.hours:.3g}" == f"{first.hours:.3g}"]
    assert len(equal) > 1
    sent = [traffic(LLAMA, TRAINING, item.layout) for item in equal]
    assert sent == sorted(sent)


@pytest.mark.parametrize(
    ("model", "layout"), [(LLAMA, Layout(1, 8)), (MIXTRAL, Layout(data=8, expert=8))]
)
def test_a_sequence_or_experts_across_nodes_count_more_than_within_one(model, layout):
    near, far = (traffic(model, TRAINING, layout, gpus_per_node=size) for size in (8, 4))
    assert far > 5 * near


def test_gradients_of_experts_are_sent_to_those_that_hold_the_same():
    spread = replace(TRAINING, length=8)  # hardly any activations
    alone, all_of_them = (traffic(MIXTRAL, spread, Layout(data=8, expert=n)) for n in (8, 1))
    assert alone < all_of_them / 10


def test_the_ring_is_chosen_where_heads_do_not_divide():
    fixed = {"tensor": 8, "context": 8}
    assert best(LLAMA, 262144, 64, fixed).layout.cp_comm_type == "p2p"
    assert best(LLAMA, 262144, 64, {"tensor": 4, "context": 8}).layout.cp_comm_type == "a2a"


def test_experts_that_do_not_fit_beside_one_another_are_spread():
    chosen = best(MIXTRAL, 262144, 32)
    assert chosen.fits and chosen.layout.expert > 1


def test_what_is_fixed_is_not_chosen():
    fixed = {"tensor": 4, "context": 2, "pipeline": 2, "recompute": FULL}
    chosen = best(LLAMA, 262144, 32, fixed).layout
    assert {name: getattr(chosen, name) for name in fixed} == fixed


def test_sizes_that_do_not_divide_the_gpus_are_refused_with_the_rule():
    with pytest.raises(ValueError, match=r"parallel = 3 does not divide the GPUs\); change"):
        best(LLAMA, 262144, 8, {"tensor": 3})
    with pytest.raises(ValueError, match=r"context parallel = 6"):
        best(LLAMA, 262144, 3, {"context": 3})


def test_what_does_not_fit_comes_with_changes_that_each_would():
    cluster = Cluster(H100, 4)
    fixed = {"recompute": ()}
    training = replace(TRAINING, loss_chunk=None)
    first = rank(MODELS["llama3-8b"], training, cluster, fixed)[0]
    assert not first.fits
    assert first.memory.largest == "activations"
    advice = remedies(first, cluster, fixed)
    assert any(line.startswith("32 GPUs") for line in advice)
    again = rank(MODELS["llama3-8b"], training, Cluster(H100, 32), fixed)[0]
    assert again.fits
    assert not rank(MODELS["llama3-8b"], training, Cluster(H100, 16), fixed)[0].fits


def test_recomputation_that_was_ruled_out_is_offered():
    cluster, fixed = Cluster(H100, 8), {"recompute": ()}
    first = rank(LLAMA, TRAINING, cluster, fixed)[0]
    assert not first.fits
    assert any(
        "leaving the recomputation to choose" in line for line in remedies(first, cluster, fixed)
    )


def test_a_larger_gpu_is_offered():
    cluster = Cluster(H100, 2)
    first = rank(LLAMA, Training(131072), cluster)[0]
    assert not first.fits
    assert any(
        line.startswith("GPUs of 141 GiB, such as h200") for line in remedies(first, cluster)
    )
