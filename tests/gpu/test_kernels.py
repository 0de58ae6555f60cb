"""What only a GPU can show: fused RoPE, half precision; skipped without one.

Each result is compared with the same computation in fp32 or fp64 on plain torch operations.
"""

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.integration import compat
from megatron_longrope.methods import yarn_factors
from megatron_longrope.rotary import LongRopeRotaryEmbedding

pytestmark = pytest.mark.gpu
needs_te = pytest.mark.skipif(
    not compat.transformer_engine_is_usable(), reason="Transformer Engine cannot be imported"
)

HEAD_DIM, HEADS, GROUPS, ORIGINAL, LENGTH = 64, 8, 2, 256, 2048
CONFIG = LongRopeConfig(
    rotary_base=10000.0,
    rotary_dim=HEAD_DIM,
    original_max_position_embeddings=ORIGINAL,
    factor_sets=(
        FactorSet(ORIGINAL, (1.0,) * (HEAD_DIM // 2)),
        FactorSet(LENGTH, tuple(yarn_factors(HEAD_DIM, LENGTH / ORIGINAL, 10000.0, ORIGINAL))),
    ),
)
DOCUMENTS = (512, 256, 1024, 256)


class OneRank:
    """A context-parallel group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def table(device: str = "cuda") -> torch.Tensor:
    rotary = LongRopeRotaryEmbedding(CONFIG, HEAD_DIM, cp_group=OneRank())
    rotary.table_device = torch.device(device)
    return rotary(LENGTH)


def random(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)


def rotate(tensor: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate halves in fp32: `[s, ..., d]` by angles `[s, d]`."""
    angles = angles.view(len(angles), *(1,) * (tensor.dim() - 2), -1).float()
    first, second = tensor.float().chunk(2, dim=-1)
    return tensor.float() * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


def offsets(lengths=DOCUMENTS) -> torch.Tensor:
    ends = torch.tensor(lengths).cumsum(0)
    return torch.cat((torch.zeros(1), ends)).to(torch.int32).cuda()


def test_a_table_on_the_gpu_equals_the_cpus():
    torch.testing.assert_close(table().cpu(), table("cpu"), rtol=0, atol=1e-6)


@needs_te
def test_fused_rope_rotates_by_our_table():
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        apply_rope_fusion=True,
    )
    query = random(LENGTH, 2, HEADS, HEAD_DIM)
    ours = rope_utils.apply_rotary_pos_emb(query, table(), config, cp_group=OneRank())
    torch.testing.assert_close(ours.float(), rotate(query, table()[:, 0, 0]), rtol=0, atol=0.04)


@needs_te
def test_fused_rope_of_packed_documents_starts_every_document_at_position_0():
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        apply_rope_fusion=True,
    )
    query = random(sum(DOCUMENTS), HEADS, HEAD_DIM)
    angles = table()
    ours = rope_utils.apply_rotary_pos_emb(
        query, angles, config, cu_seqlens=offsets(), cp_group=OneRank()
    )
    rows = torch.cat([angles[:length, 0, 0] for length in DOCUMENTS])
    torch.testing.assert_close(ours.float(), rotate(query, rows), rtol=0, atol=0.04)


def test_the_engine_scores_in_bf16_nearly_as_in_fp32(untied_gqa):
    from megatron_longrope.engine import load_engine

    tokens = torch.arange(160)[None] % 250
    half, full = (
        load_engine(untied_gqa.path, dtype=dtype).nll(tokens)
        for dtype in (torch.bfloat16, torch.float32)
    )
    torch.testing.assert_close(half, full, rtol=0, atol=0.1)
