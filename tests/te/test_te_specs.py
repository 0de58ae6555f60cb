"""What Megatron builds from Transformer Engine's layer specs in a run with factors.

For `make test-te`, which compiles Transformer Engine on a machine without a GPU. Its kernels are
CUDA's, so that nothing is computed here: what it was given is looked at, module by module.
"""

import math
from unittest import mock

import pytest
import tiny_gpt
import torch
import torch.distributed as dist

pytest.importorskip("megatron.training")
try:
    import transformer_engine.pytorch as te
except (ImportError, OSError, RuntimeError) as error:
    pytest.skip(f"Transformer Engine: {error}; `make test-te`", allow_module_level=True)

from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

from megatron_longrope.engine import process_groups
from megatron_longrope.integration import compat, hooks, wrappers
from megatron_longrope.integration.attention_choice import attention_from_args
from megatron_longrope.integration.model_check import check_models
from megatron_longrope.integration.settings import settings_from_args
from megatron_longrope.rotary import LongRopeRotaryEmbedding

LAYERS = 2


@pytest.fixture(autouse=True)
def megatron():
    """Process groups of one rank; every symbol as it was when the test ends."""
    process_groups.initialize()
    yield
    hooks.remove()


def start_run(**changes):
    """A run with factors whose attention is Transformer Engine's."""
    args = tiny_gpt.run_arguments(**changes)
    settings = settings_from_args(args, tiny_gpt.longrope_config(), "te")
    hooks.apply()
    wrappers.activate(wrappers.Run(settings, "te"))
    return args


def build(args, **changes):
    spec = get_gpt_layer_with_transformer_engine_spec()
    with mock.patch.object(torch.cuda, "is_available", lambda: True):  # its modules insist
        return tiny_gpt.build(args, model_options={"spec": spec}, layers=LAYERS, **changes)


def core_attentions(model):
    return [layer.self_attention.core_attention for layer in model.decoder.layers]


def test_the_plugin_finds_transformer_engine():
    assert compat.transformer_engine_is_usable()
    args = tiny_gpt.run_arguments(transformer_impl="transformer_engine")
    assert attention_from_args(args) == "te"


def test_every_layer_keeps_transformer_engines_attention_and_linear_layers():
    model = build(start_run())
    for layer, attention in zip(model.decoder.layers, core_attentions(model), strict=True):
        assert isinstance(attention, te.DotProductAttention)
        assert isinstance(layer.self_attention.linear_qkv, te.LayerNormLinear)
        assert isinstance(layer.mlp.linear_fc1, te.LayerNormLinear)
    check_models([model], "te", has_factors=True)


def test_its_softmax_scale_is_the_square_of_the_attention_factor_over_the_root_of_the_head():
    wanted = tiny_gpt.ATTENTION_FACTOR**2 / math.sqrt(tiny_gpt.HEAD_DIM)
    for attention in core_attentions(build(start_run())):
        assert attention.softmax_scale == pytest.approx(wanted, rel=1e-12)
        # Its three implementations were each given the value when they were built.
        for kernel in (
            attention.flash_attention,
            attention.fused_attention,
            attention.unfused_attention,
        ):
            assert kernel.softmax_scale == pytest.approx(wanted, rel=1e-12)


def test_with_the_factor_on_cos_and_sin_its_softmax_scale_is_stock():
    model = build(start_run(longrope_attention_factor_carrier="rope"))
    for attention in core_attentions(model):
        assert attention.softmax_scale == pytest.approx(1 / math.sqrt(tiny_gpt.HEAD_DIM))
    factors = [compat.cos_sin_factor(layer.self_attention) for layer in model.decoder.layers]
    assert factors == [tiny_gpt.ATTENTION_FACTOR] * LAYERS


def test_the_rotary_module_is_ours_and_gives_the_angles_of_the_factors():
    model = build(start_run())
    assert isinstance(model.rotary_pos_emb, LongRopeRotaryEmbedding)
    angles = model.rotary_pos_emb(tiny_gpt.RUN)  # [s, 1, 1, d]
    half = tiny_gpt.HEAD_DIM // 2
    slowed = torch.tensor(tiny_gpt.FACTORS[tiny_gpt.HEAD_DIM], dtype=torch.float64)
    exponents = torch.arange(half, dtype=torch.float64) / half
    wanted = (tiny_gpt.RUN - 1) / (slowed * 10000.0**exponents)
    turned = angles[-1, 0, 0, :half].double() - wanted
    torch.testing.assert_close(turned.cos(), torch.ones(half, dtype=torch.float64))


def test_without_factors_the_model_is_stock():
    hooks.apply()
    wrappers.activate(wrappers.Run(None, "te"))
    model = build(tiny_gpt.run_arguments(longrope_config=None))
    assert type(model.rotary_pos_emb).__module__.startswith("megatron.core")
    for attention in core_attentions(model):
        assert attention.softmax_scale == pytest.approx(1 / math.sqrt(tiny_gpt.HEAD_DIM))


@pytest.fixture
def two_context_parallel_ranks(monkeypatch):
    """Groups of two ranks of which only this one exists: nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    parallel_state.initialize_model_parallel(
        context_parallel_size=2,
        create_gloo_process_groups=False,  # gloo would talk to the rank that is not there
    )
    # Megatron makes a CUDA stream for it where there is none yet.
    monkeypatch.setattr(TEDotProductAttention, "cp_stream", object())
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["p2p", "all_gather", "a2a"])
def test_context_parallelism_reaches_it_with_the_group_and_the_kind(
    two_context_parallel_ranks, kind
):
    model = build(start_run(context_parallel_size=2), cp_comm_type=kind)
    for attention in core_attentions(model):
        assert attention.cp_group is parallel_state.get_context_parallel_group()
        assert attention.cp_global_ranks == [0, 1]
        assert attention.cp_comm_type == kind
        assert attention.softmax_scale == pytest.approx(
            tiny_gpt.ATTENTION_FACTOR**2 / math.sqrt(tiny_gpt.HEAD_DIM)
        )
