"""Attention and rotary tables on real gloo groups equal one process."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("megatron.core")

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longrope import attention as attention_module
from megatron_longrope.attention import SdpaCoreAttention
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.context_parallel import shard, unshard, zigzag_positions
from megatron_longrope.rotary import LongRopeRotaryEmbedding

pytestmark = pytest.mark.slow

WORLD = 4
LENGTH = 48
HEADS, HEAD_DIM = 4, 8
CASES = {  # name: (key-value heads, width of a value, mask)
    "as many key heads as query heads": (4, 8, AttnMaskType.causal),
    "grouped queries": (2, 8, AttnMaskType.causal),
    "one key head, narrow values": (1, 5, AttnMaskType.causal),
    "no mask": (2, 8, AttnMaskType.no_mask),
}
FACTORS = LongRopeConfig(
    rotary_base=10000.0,
    rotary_dim=HEAD_DIM,
    original_max_position_embeddings=16,
    factor_sets=(
        FactorSet(16, (1.0, 1.0, 1.1, 1.2)),
        FactorSet(64, (1.0, 1.7, 2.3, 3.9), num_start_tokens=3),
    ),
)


def core_attention(mask_type, cp_group=None) -> SdpaCoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    groups = SimpleNamespace(cp=cp_group)
    return SdpaCoreAttention(config, 1, mask_type, "self", pg_collection=groups)


def whole_tensors(groups, value_dim):
    """q, k, v and the gradient of the output, for the whole sequence."""
    generator = torch.Generator().manual_seed(groups)
    shapes = [
        (LENGTH, 2, HEADS, HEAD_DIM),
        (LENGTH, 2, groups, HEAD_DIM),
        (LENGTH, 2, groups, value_dim),
        (LENGTH, 2, HEADS * value_dim),
    ]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def output_and_gradients(module, query, key, value, output_gradient):
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = module(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, output_gradient)]


def run_rank(rank: int, directory: str) -> None:
    """One of four processes: two groups of two, then one group of four."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD
    )
    masks = []
    sdpa = attention_module.F.scaled_dot_product_attention

    def recorded(*args, **options):
        mask = options["attn_mask"]
        masks.append(None if mask is None else tuple(mask.shape))
        return sdpa(*args, **options)

    attention_module.F.scaled_dot_product_attention = recorded
    results = {}
    for cp_size in (2, 4):
        groups = [
            dist.new_group(list(range(first, first + cp_size)))
            for first in range(0, WORLD, cp_size)
        ]
        group = groups[rank // cp_size]
        for name, (kv_heads, value_dim, mask_type) in CASES.items():
            parts = [
                shard(tensor, group.rank(), cp_size, dim=0)
                for tensor in whole_tensors(kv_heads, value_dim)
            ]
            masks.clear()
            tensors = output_and_gradients(core_attention(mask_type, group), *parts)
            results[cp_size, name] = {"tensors": tensors, "masks": list(masks)}
        rotary = LongRopeRotaryEmbedding(FACTORS, HEAD_DIM, cp_group=group)
        results[cp_size, "rotary"] = rotary(LENGTH)
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank computed, in rank order."""
    directory = tmp_path_factory.mktemp("gloo")
    # The fork server imports torch and megatron-core once for all ranks.
    mp.get_context("forkserver").set_forkserver_preload(["megatron_longrope.attention"])
    mp.start_processes(run_rank, args=(str(directory),), nprocs=WORLD, start_method="forkserver")
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_output_and_gradients_equal_one_process(ranks, cp_size, name):
    kv_heads, value_dim, mask_type = CASES[name]
    expected = output_and_gradients(core_attention(mask_type), *whole_tensors(kv_heads, value_dim))
    for first in range(0, WORLD, cp_size):  # every group of the world computes the same
        of_ranks = [result[cp_size, name]["tensors"] for result in ranks[first : first + cp_size]]
        for theirs, *parts in zip(expected, *of_ranks, strict=True):
            assert parts[0].shape[0] == LENGTH // cp_size
            torch.testing.assert_close(unshard(parts, 0), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_no_mask_is_larger_than_one_tile(ranks, cp_size):
    for result in ranks:
        for name, (_, _, mask_type) in CASES.items():
            masks = result[cp_size, name]["masks"]
            if mask_type is AttnMaskType.no_mask:
                assert masks == [None]
                continue
            assert len(masks) == 2  # one call for each chunk of the rank
            for mask in masks:
                assert mask is None or (mask[0] == LENGTH // (2 * cp_size) and mask[1] <= LENGTH)
    # The first chunk of rank 0 sees itself alone and needs no mask at all.
    assert ranks[0][cp_size, "grouped queries"]["masks"][0] is None


@pytest.mark.parametrize("cp_size", [2, 4])
def test_rotary_tables_are_the_zigzag_rows_of_the_whole_table(ranks, cp_size):
    whole = LongRopeRotaryEmbedding(FACTORS, HEAD_DIM)(LENGTH)
    for rank, result in enumerate(ranks):
        rows = zigzag_positions(LENGTH, rank % cp_size, cp_size)
        assert torch.equal(result[cp_size, "rotary"], whole[rows])
