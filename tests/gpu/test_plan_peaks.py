"""The planned memory against the peak that a GPU measures; skipped without one.

A layer spec of Transformer Engine is what the formulas describe; where it is not installed the
local spec's extra tensors, which docs/plan.md lists, are added.
"""

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention
from megatron_longrope.engine import process_groups
from megatron_longrope.integration import compat
from megatron_longrope.integration.settings import flash_obstacle
from megatron_longrope.plan import Layout, Model, Training
from megatron_longrope.plan.memory import memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HAVE_TE = compat.transformer_engine_is_usable()
HAVE_FLASH = flash_obstacle() is None
MODEL = Model(8, 1024, 2816, 16, 4, 32000, 64)
RECOMPUTATION = {
    (): {},
    ("mlp",): {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    ("full",): {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@pytest.fixture(scope="module")
def one_rank():
    process_groups.initialize()  # which other files may have done
    model_parallel_cuda_manual_seed(1)


def spec():
    if HAVE_TE:
        return get_gpt_layer_with_transformer_engine_spec()
    found = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention = FlashCoreAttention if HAVE_FLASH else SdpaCoreAttention
    found.submodules.self_attention.submodules.core_attention = attention
    return found


def unfused(tokens: int, recompute: tuple[str, ...]) -> int:
    """Bytes that only the local spec keeps: docs/plan.md, "What was checked"."""
    if HAVE_TE:
        return 0
    layer = 2 * (MODEL.hidden_size + 1) + 4 * MODEL.head_dim
    layer += MODEL.hidden_size * ("mlp" in recompute)  # its norm is not part of the MLP
    return 2 * tokens * layer * (1 if recompute == ("full",) else MODEL.num_layers)


@pytest.mark.parametrize("recompute", RECOMPUTATION, ids=lambda kind: "+".join(kind) or "none")
@pytest.mark.parametrize("tokens", [8192, 32768])
def test_the_planned_memory_is_the_measured_peak_within_a_tenth(one_rank, tokens, recompute):
    config = TransformerConfig(
        num_layers=MODEL.num_layers,
        hidden_size=MODEL.hidden_size,
        ffn_hidden_size=MODEL.ffn_hidden_size,
        num_attention_heads=MODEL.num_attention_heads,
        num_query_groups=MODEL.num_query_groups,
        kv_channels=MODEL.head_dim,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=True,
        apply_rope_fusion=HAVE_TE,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        **RECOMPUTATION[recompute],
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = GPTModel(
        config,
        spec(),
        vocab_size=MODEL.rows(),
        max_sequence_length=tokens,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).cuda()
    model = Float16Module(config, model).train()
    # The fp32 gradient and Adam's state, as Megatron's optimizer allocates them.
    parameters = list(model.parameters())
    state = [torch.zeros(p.numel(), device="cuda") for p in parameters for _ in range(4)]
    ids = torch.randint(0, MODEL.vocab_size, (1, tokens), device="cuda")
    positions = torch.arange(tokens, device="cuda")[None]
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        loss = model(ids, positions, None, labels=ids).mean()
        loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    plan = memory(
        MODEL,
        Training(tokens, 1, loss_chunk=None),
        Layout(recompute=recompute),
    )
    # Gradients lie in parameters' own type beside the fp32 sums here; and the local spec's extra.
    expected = plan.allocated + 2 * MODEL.parameters + unfused(tokens, recompute)
    del state, model
    assert expected == pytest.approx(peak, rel=0.1), plan.gib()
