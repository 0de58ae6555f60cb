"""Bytes by part: against Megatron's own estimate, against a measured layer, and what must hold."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_longrope.plan.layouts import FULL, Layout, Training, problem
from megatron_longrope.plan.memory import STAGES, Memory, memory, stage_memory
from megatron_longrope.plan.model import MODELS, Model
from megatron_longrope.plan.time import step_flops

LENGTH = 131072
TRAINING = Training(LENGTH, 32)
NAMES = [field.name for field in fields(Memory)]


def layout(tensor=1, context=1, pipeline=1, data=1, **more):
    return Layout(tensor, context, pipeline, data, **more)


# Megatron's own estimate

LAYOUTS = [
    layout(data=8),
    layout(8),
    layout(2, 4),
    layout(4, 2, data=2),
    layout(4, 8, 2, 1),
    layout(2, 2, 4, 2),
    layout(2, 1, 8, 8),  # fewer microbatches than stages
    layout(2, 2, data=2, distributed_optimizer=False),
]


def theirs(model: Model, training: Training, spread: Layout) -> SimpleNamespace:
    """Megatron's arguments. It knows no context parallelism, so the sequence is a rank's part and
    the ranks that share the optimizer's state are those of data and context parallelism."""
    return SimpleNamespace(
        num_layers=model.num_layers, hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size, num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups, group_query_attention=True,
        kv_channels=model.head_dim, swiglu=True, normalization="RMSNorm", add_bias_linear=False,
        num_experts=model.num_experts, moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_router_topk=model.moe_router_topk, moe_layer_freq=1, moe_latent_size=None,
        moe_shared_expert_intermediate_size=None, moe_shared_expert_gate=False,
        mtp_num_layers=None, multi_latent_attention=False, q_lora_rank=None,
        untie_embeddings_and_output_weights=model.untie_embeddings,
        padded_vocab_size=model.rows(spread.tensor) * spread.tensor,
        seq_length=training.length // spread.context, micro_batch_size=spread.micro_batch_size,
        tensor_model_parallel_size=spread.tensor, pipeline_model_parallel_size=spread.pipeline,
        virtual_pipeline_model_parallel_size=None, world_size=spread.gpus,
        data_parallel_size=spread.data * spread.context,
        expert_model_parallel_size=spread.expert, expert_tensor_parallel_size=spread.expert_tensor,
        use_distributed_optimizer=spread.distributed_optimizer,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b", "llama3.2-1b", "phi3-mini"])
@pytest.mark.parametrize("spread", LAYOUTS, ids=str)
def test_weights_gradients_and_optimizer_are_megatrons(name, spread):
    estimate = pytest.importorskip("megatron.training.theoretical_memory_usage")
    model = MODELS[name]
    if problem(model, TRAINING, spread):
        pytest.skip("the model does not divide")
    expected = estimate.compute_weight_and_optimizer_memory(theirs(model, TRAINING, spread))
    ours = stage_memory(model, TRAINING, spread, "first")
    state = ours.weights + ours.gradients + ours.optimizer
    # Megatron spreads the final norm over stages, a few KiB.
    assert state == pytest.approx(expected, abs=18 * model.hidden_size)


def test_experts_weights_gradients_and_optimizer_are_megatrons():
    estimate = pytest.importorskip("megatron.training.theoretical_memory_usage")
    model = MODELS["mixtral-8x7b"]
    for spread in (
        layout(8, expert_tensor=8),
        layout(4, 2, data=2, expert=8),
        layout(4, 4, 2, 2, expert=4, expert_tensor=2),
    ):
        assert problem(model, TRAINING, spread) is None
        expected = estimate.compute_weight_and_optimizer_memory(theirs(model, TRAINING, spread))
        ours = stage_memory(model, TRAINING, spread, "first")
        state = ours.weights + ours.gradients + ours.optimizer
        assert state == pytest.approx(expected, abs=18 * model.hidden_size)


@pytest.mark.parametrize("spread", [item for item in LAYOUTS if item.context > 1], ids=str)
def test_activations_are_megatrons_and_what_it_leaves_out(spread):
    """Of selective recomputation with sequence parallelism, multi-head attention and dropout."""
    estimate = pytest.importorskip("megatron.training.theoretical_memory_usage")
    model, training = MODELS["llama2-7b"], replace(TRAINING, loss_chunk=None, hidden_dropout=True)
    batches = spread.microbatches(training)
    args = theirs(model, training, spread)
    expected = estimate.compute_activation_memory(args, num_microbatches=batches)
    ours = stage_memory(model, training, spread, "first")
    tokens = training.length // spread.context
    # Its MLP has one input of the activation where a gated one has two, it has no sums of the
    # softmax, splits the token numbers over tensor-parallel ranks, and knows logits once, in fp32.
    heads, width = model.num_attention_heads, model.ffn_hidden_size
    under_way = min(spread.pipeline, batches)
    missing = model.num_layers // spread.pipeline * (2 * width + 4 * heads) // spread.tensor
    missing += 8 - 8 // spread.tensor
    expected += tokens * missing * under_way
    if spread.pipeline == 1:
        expected += 2 * tokens * model.rows(spread.tensor)
    assert ours.activations + ours.loss == pytest.approx(expected, rel=1e-9)


# A measured layer


@pytest.fixture(scope="module")
def layer_bytes():
    """Saves for its backward pass: bytes a token that a local-spec Megatron layer keeps."""
    pytest.importorskip("megatron.core")
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_longrope.attention import SdpaCoreAttention

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()

    def measure(model: Model, tokens: int, **options) -> float:
        config = TransformerConfig(
            num_layers=1, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads, kv_channels=model.head_dim,
            num_query_groups=model.num_query_groups, gated_linear_unit=True,
            activation_func=torch.nn.functional.silu, bias_activation_fusion=True,
            bias_dropout_fusion=False, apply_rope_fusion=False, add_bias_linear=False,
            normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0,
            use_cpu_initialization=True, **options,
        )  # fmt: skip
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
        layer = build_module(spec, config=config, layer_number=1)
        inputs = torch.randn(tokens, 1, model.hidden_size, requires_grad=True)
        weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = tensor  # alive, or its address would be used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(inputs, None, rotary_pos_emb=torch.randn(tokens, 1, 1, model.head_dim))
        sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
        return sum(sizes) / tokens

    return measure


@pytest.mark.parametrize(
    ("hidden", "ffn", "heads", "groups", "head_dim"),
    [(64, 160, 4, 2, 16), (64, 96, 4, 1, 32), (96, 256, 6, 6, 16)],
)
def test_a_layer_keeps_as_many_bytes_as_a_real_one(
    layer_bytes, hidden, ffn, heads, groups, head_dim
):
    model = Model(1, hidden, ffn, heads, groups, 128, head_dim)
    tokens = 64
    training = Training(tokens, 1, precision="fp32")
    ours = memory(model, training, layout(rope_fusion=False)).activations / tokens - 8
    # Without Transformer Engine there is more: the normalized rows and their scale of two norms.
    unfused = 4 * 2 * (hidden + 1)
    assert layer_bytes(model, tokens) == ours + unfused


def test_a_layer_that_recomputes_its_mlp_keeps_as_many_bytes_as_a_real_one(
    layer_bytes, monkeypatch
):
    from megatron.core.tensor_parallel import random

    # Random states are those of a GPU; a forward pass only stores them.
    monkeypatch.setattr(random, "_get_all_rng_states", lambda: None)
    model, tokens = Model(1, 64, 160, 4, 2, 128, 16), 64
    training = Training(tokens, 1, precision="fp32")
    spread = layout(recompute=("mlp",), rope_fusion=False)
    ours = memory(model, training, spread).activations / tokens - 8
    # As above; and the norm that Transformer Engine has inside of the MLP is outside here.
    unfused = 4 * (2 * (model.hidden_size + 1) + model.hidden_size)
    options = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    assert layer_bytes(model, tokens, **options) == ours + unfused


# What must hold

SIZES = st.sampled_from([1, 2, 4, 8])


@st.composite
def cases(draw):
    model = MODELS[draw(st.sampled_from(list(MODELS)))]
    experts = {}
    if model.num_experts is not None:
        experts = {"expert": draw(st.sampled_from([1, 2, 4])), "expert_tensor": 1}
    context = draw(SIZES)
    spread = layout(
        draw(st.sampled_from([1, 2, 4])), context, draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([1, 2])) * experts.get("expert", 1),
        recompute=draw(st.sampled_from([(), ("mlp",), ("moe",), ("core_attn",), FULL])),
        cp_comm_type=draw(st.sampled_from(["p2p", "all_gather", "gathered"])),
        **experts,
    )  # fmt: skip
    training = Training(
        draw(st.sampled_from([32768, 262144])),
        64,
        loss_chunk=draw(st.sampled_from([None, 1024])),
        precision=draw(st.sampled_from(["bf16", "fp32"])),
        hidden_dropout=draw(st.booleans()),
    )
    return model, training, spread


@given(cases(), st.sampled_from(["tensor", "context", "pipeline"]), st.sampled_from(STAGES))
def test_no_part_grows_when_more_gpus_share_it(case, name, stage):
    model, training, spread = case
    larger = replace(spread, **{name: 2 * getattr(spread, name)})
    assume(problem(model, training, spread) is None)
    assume(problem(model, training, larger) is None)
    # Without context parallelism there is nothing to bring together.
    skipped = {"kv"} if name == "context" and spread.context == 1 else set()
    before = stage_memory(model, training, spread, stage)
    after = stage_memory(model, training, larger, stage)
    # A pipeline holds the inputs of as many microbatches as it has stages.
    tokens = training.length // spread.context
    inputs = 2 * spread.pipeline * tokens * (8 + training.hidden_dropout * model.hidden_size)
    slack = {"activations": inputs if name == "pipeline" else 0}
    for part in NAMES:
        if part not in skipped:
            assert getattr(after, part) <= getattr(before, part) + slack.get(part, 0), part


@given(cases())
def test_recomputation_and_the_chunked_loss_only_save(case):
    model, training, spread = case
    kept = [
        memory(model, training, replace(spread, recompute=kind)).activations
        for kind in ((), ("mlp" if model.num_experts is None else "moe",), FULL)
    ]
    assert kept[0] > kept[1] > kept[2]
    whole = stage_memory(model, replace(training, loss_chunk=None), spread, "last").loss
    chunk = stage_memory(model, replace(training, loss_chunk=1024), spread, "last").loss
    half = training.precision != "fp32"
    tokens = training.length // spread.context - 1024
    rows = model.rows(spread.tensor)
    saved = (6 if half else 4) * tokens * rows - 4 * model.hidden_size * rows
    assert whole - chunk == saved


def test_block_recomputation_keeps_the_other_layers():
    model = MODELS["llama2-7b"]

    def kept(count):
        how = {"recompute_method": "block", "recompute_num_layers": count}
        return memory(model, TRAINING, layout(8, recompute=FULL, **how)).activations

    none = memory(model, TRAINING, layout(8)).activations
    uniform = memory(model, TRAINING, layout(8, recompute=FULL)).activations
    assert kept(32) == uniform and kept(0) == none
    assert kept(16) == (none + uniform) // 2


def test_our_own_attention_keeps_keys_and_values_of_all_ranks_unless_it_is_recomputed():
    model, size = MODELS["llama2-7b"], 8
    pair = 2 * 2 * model.key() * LENGTH  # bytes of all keys and values of a layer
    ring, own = (
        memory(model, TRAINING, layout(1, size, cp_comm_type=kind)).kv
        for kind in ("p2p", "gathered")
    )
    assert ring < pair
    assert own == (model.num_layers + 3) * pair
    for recompute in (FULL, ("core_attn",), ("mlp", "core_attn")):
        again = layout(1, size, cp_comm_type="gathered", recompute=recompute)
        assert memory(model, TRAINING, again).kv < 5 * pair
    kept = layout(1, size, cp_comm_type="gathered", recompute=("mlp",))
    assert memory(model, TRAINING, kept).kv == own
    block = {"recompute": FULL, "recompute_method": "block", "recompute_num_layers": 8}
    most = memory(model, TRAINING, layout(1, size, cp_comm_type="gathered", **block)).kv
    assert 24 * pair < most < 30 * pair  # of 32 layers


def test_values_keep_the_projection_of_all_ranks_where_there_are_fewer_groups():
    model = replace(MODELS["qwen2.5-7b"], num_attention_heads=32)  # 4 groups
    assert model.key(4) == model.key(8) == model.head_dim
    kept = {
        (size, groups): memory(
            replace(model, num_query_groups=groups), TRAINING, layout(size)
        ).activations
        for size, groups in ((8, 4), (8, 8))
    }
    # A rank has a head of each either way, but the first a view of what all of them projected.
    width = 32 + 2 * 4 - (4 + 2)
    more = 2 * LENGTH * model.num_layers * width * model.head_dim
    assert kept[8, 4] - kept[8, 8] == more


@pytest.mark.parametrize(("name", "module"), [("llama2-7b", "moe"), ("mixtral-8x7b", "mlp")])
def test_a_module_that_the_model_does_not_have_is_not_recomputed(name, module):
    model, spread = MODELS[name], layout(8, recompute=(module,))
    assert memory(model, TRAINING, spread) == memory(model, TRAINING, layout(8))
    assert step_flops(model, TRAINING, spread) == step_flops(model, TRAINING, layout(8))


def test_sequences_of_a_microbatch_share_the_rotary_table():
    model, larger = MODELS["llama2-7b"], {"micro_batch_size": 4, "rope_fusion": False}
    one, four = (memory(model, TRAINING, layout(**how)) for how in ({}, larger))
    assert one.rotary == four.rotary
    angles = 4 * 2 * LENGTH * model.rotary_dim * model.num_layers
    assert four.activations == 4 * one.activations + angles


@pytest.mark.parametrize(
    ("training", "bytes_each"),
    [
        ({}, (2, 4, 12)),
        ({"half_gradients": True}, (2, 2, 16)),
        ({"precision": "fp16"}, (2, 2, 16)),
        ({"precision": "fp32"}, (4, 4, 8)),
    ],
)
def test_bytes_of_a_parameter_follow_the_precision(training, bytes_each):
    model = MODELS["llama2-7b"]
    parts = memory(model, Training(LENGTH, 32, **training), layout())
    ours = (parts.weights, parts.gradients, parts.optimizer)
    assert ours == tuple(size * model.parameters for size in bytes_each)
