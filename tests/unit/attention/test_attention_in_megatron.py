"""Packed documents through megatron-core's own `SelfAttention`, rotary embedding included."""

import pytest
import torch

pytest.importorskip("megatron.core")

from attention_cases import Pack, assert_same
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longrope.attention import SdpaCoreAttention
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.engine import process_groups
from megatron_longrope.rotary import LongRopeRotaryEmbedding

HIDDEN, HEADS, GROUPS, HEAD_DIM = 32, 4, 2, 8
PACKS = {
    "tight": Pack.tight(5, 12, 3),
    "padded": Pack((5, 12, 0, 3), (8, 12, 4, 4)),
}


@pytest.fixture(scope="module")
def layer():
    process_groups.initialize()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    torch.manual_seed(0)
    return SelfAttention(
        config,
        SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SdpaCoreAttention,
            linear_proj=RowParallelLinear,
        ),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


@pytest.fixture(scope="module")
def rotary():
    factors = FactorSet(64, (1.0, 1.3, 1.9, 2.7), num_start_tokens=2)
    config = LongRopeConfig(
        rotary_base=10000.0,
        rotary_dim=HEAD_DIM,
        original_max_position_embeddings=16,
        factor_sets=(factors,),
    )
    return LongRopeRotaryEmbedding(config, HEAD_DIM)


def output_and_gradient(layer, hidden, output_gradient, **options):
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden, attention_mask=None, **options)
    output.backward(output_gradient)
    return output.detach(), hidden.grad


@pytest.mark.parametrize("name", PACKS)
def test_a_pack_equals_each_document_alone(layer, rotary, name):
    pack = PACKS[name]
    generator = torch.Generator().manual_seed(1)
    hidden, gradient = torch.randn(2, pack.total, 1, HIDDEN, generator=generator)
    ours = output_and_gradient(
        layer,
        hidden,
        gradient,
        rotary_pos_emb=rotary(max(pack.rows), packed_seq=True),
        packed_seq_params=pack.params(),
    )
    assert ours[0].shape == (pack.total, 1, HIDDEN)
    for start, length, rows in zip(pack.starts, pack.lengths, pack.rows, strict=True):
        tokens, padding = slice(start, start + length), slice(start + length, start + rows)
        if length:
            alone = output_and_gradient(
                layer, hidden[tokens], gradient[tokens], rotary_pos_emb=rotary(length)
            )
            assert_same([x[tokens] for x in ours], alone, tolerance=2e-6)
        assert not any(x[padding].any() for x in ours)
