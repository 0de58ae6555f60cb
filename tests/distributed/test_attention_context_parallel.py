"""Attention and rotary tables on real gloo groups equal a plain softmax over whole documents."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launching import spawn

pytest.importorskip("megatron.core")

import fake_flash_attn
from attention_cases import (
    SCALE,
    Pack,
    core_attention,
    output_and_gradients,
    packed_reference,
    random_batch,
    reference,
    with_scale,
)
from megatron.core.transformer.enums import AttnMaskType
from torch.utils.checkpoint import checkpoint

from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention, flash
from megatron_longrope.context_parallel import shard, unshard

pytestmark = pytest.mark.slow

WORLD = 4
LENGTH = 48
CAUSAL, NO_MASK = AttnMaskType.causal, AttnMaskType.no_mask
SDPA, FLASH = SdpaCoreAttention, FlashCoreAttention
ONE = Pack.tight(LENGTH)
TIGHT = Pack.tight(16, 48, 8)
PADDED = Pack((13, 48, 1, 0), (16, 48, 8, 8))  # under CP 4 some ranks have padding alone
LONELY = Pack((2,), (16,))
CASES = {  # name: (class, packed, documents, key-value heads, width of a value, mask)
    "as many key heads as query heads": (SDPA, False, ONE, 4, 8, CAUSAL),
    "grouped queries": (SDPA, False, ONE, 2, 8, CAUSAL),
    "one key head, narrow values": (SDPA, False, ONE, 1, 5, CAUSAL),
    "no mask": (SDPA, False, ONE, 2, 8, NO_MASK),
    "document scale": (with_scale(SDPA), False, ONE, 2, 8, CAUSAL),
    "packed": (SDPA, True, TIGHT, 4, 8, CAUSAL),
    "packed, padding and scales": (with_scale(SDPA), True, PADDED, 2, 8, CAUSAL),
    "packed, no mask": (SDPA, True, PADDED, 2, 8, NO_MASK),
    "packed, ranks without tokens": (SDPA, True, LONELY, 2, 8, CAUSAL),
    "flash": (FLASH, False, ONE, 2, 8, CAUSAL),
    "flash packed, padding and scales": (with_scale(FLASH), True, PADDED, 2, 8, CAUSAL),
}


def batch_of(name):
    """q, k, v and the gradient of the output, for whole documents."""
    _, packed, pack, kv_heads, value_dim, _ = CASES[name]
    batch = None if packed else 2
    return random_batch(pack.total, groups=kv_heads, value_dim=value_dim, batch=batch)


def expected(name):
    """The output and the gradients of q, k and v, for whole documents, by a plain softmax."""
    cls, packed, pack, _, _, mask_type = CASES[name]
    scale_of = cls.document_scale
    causal = mask_type is CAUSAL

    def attend(*qkv):
        if packed:
            return packed_reference(*qkv, pack, scale_of=scale_of, causal=causal)
        return reference(*qkv, SCALE * (scale_of(LENGTH) if scale_of else 1.0), causal)

    return output_and_gradients(attend, *batch_of(name))


def shard_pack(tensor, pack, cp_rank, cp_size):
    return torch.cat(
        [shard(document, cp_rank, cp_size, dim=0) for document in tensor.split(pack.rows)]
    )


def unshard_pack(parts, pack):
    documents = [part.split([rows // len(parts) for rows in pack.rows]) for part in parts]
    return torch.cat([unshard(shards, 0) for shards in zip(*documents, strict=True)])


class Recorder:
    """What a rank asked of torch: masks of SDPA, all-gathers, rows sent to a neighbour."""

    def __init__(self):
        self.masks, self.gathers, self.sent = [], 0, []
        sdpa = torch.nn.functional.scaled_dot_product_attention
        gather, transfer = dist.all_gather, dist.batch_isend_irecv

        def recorded_sdpa(*args, **options):
            mask = options["attn_mask"]
            self.masks.append(None if mask is None else tuple(mask.shape))
            return sdpa(*args, **options)

        def recorded_gather(*args, **options):
            self.gathers += 1
            return gather(*args, **options)

        def recorded_transfer(operations):
            self.sent.append(operations[0].tensor.shape[1])
            return transfer(operations)

        torch.nn.functional.scaled_dot_product_attention = recorded_sdpa
        dist.all_gather = recorded_gather
        dist.batch_isend_irecv = recorded_transfer

    def take(self):
        taken = {"masks": self.masks, "gathers": self.gathers, "sent": self.sent}
        self.masks, self.gathers, self.sent = [], 0, []
        return taken


def run_case(name, group, recorder):
    cls, packed, pack, _, _, mask_type = CASES[name]
    module = core_attention(cls, mask_type=mask_type, pg_collection=SimpleNamespace(cp=group))
    batch = [shard_pack(x, pack, group.rank(), group.size()) for x in batch_of(name)]
    options = {"packed_seq_params": pack.params()} if packed else {}

    def attend(*qkv):
        return module(*qkv, **options)

    def checkpointed(*qkv):
        return checkpoint(attend, *qkv, use_reentrant=True)

    recorder.take()
    results = {"train": output_and_gradients(attend, *batch), "train calls": recorder.take()}
    results["recompute"] = output_and_gradients(checkpointed, *batch)
    module.eval()
    recorder.take()
    with torch.no_grad():
        results["ring"] = attend(*batch[:3])
        results["ring calls"] = recorder.take()
        if cls.kernel == "sdpa":
            results["ring fp32"] = attend(*(x.float() for x in batch[:3]))
        module.train()
        results["no ring"] = attend(*batch[:3])
    return results


def run_rank(rank: int, directory: str) -> None:
    """One of four processes: two groups of every other rank, then one group of four."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD
    )
    sys.modules["flash_attn"] = fake_flash_attn
    flash._DTYPES = (torch.float64,)
    recorder = Recorder()
    results = {}
    for cp_size in (2, 4):
        stride = WORLD // cp_size  # as with tensor parallelism, whose ranks are neighbours
        groups = [dist.new_group(list(range(first, WORLD, stride))) for first in range(stride)]
        group = groups[rank % stride]
        for name in CASES:
            results[cp_size, name] = run_case(name, group, recorder)
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank computed, in rank order."""
    directory = tmp_path_factory.mktemp("gloo")
    spawn(run_rank, (str(directory),), WORLD)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(WORLD)]


def whole(ranks, cp_size, name, key):
    """The tensors of each group of the world, put together: groups x tensors."""
    pack = CASES[name][2]
    stride = WORLD // cp_size
    for first in range(stride):
        of_ranks = [result[cp_size, name][key] for result in ranks[first::stride]]
        if isinstance(of_ranks[0], torch.Tensor):
            of_ranks = [[tensor] for tensor in of_ranks]
        for parts in zip(*of_ranks, strict=True):
            assert parts[0].shape[0] == pack.total // cp_size
        yield [unshard_pack(parts, pack) for parts in zip(*of_ranks, strict=True)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_output_and_gradients_equal_whole_documents(ranks, cp_size, name):
    theirs = expected(name)
    for ours in whole(ranks, cp_size, name, "train"):
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_the_ring_equals_whole_documents(ranks, cp_size, name):
    theirs = expected(name)[0]
    for (ours,) in whole(ranks, cp_size, name, "ring"):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if "flash" not in name:
        for (ours,) in whole(ranks, cp_size, name, "ring fp32"):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_recomputation_changes_no_bit(ranks, cp_size, name):
    for result in ranks:
        plain, recomputed = result[cp_size, name]["train"], result[cp_size, name]["recompute"]
        assert all(torch.equal(*pair) for pair in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_without_gradients_the_two_forms_agree_and_the_switch_chooses(ranks, cp_size, name):
    for result in ranks:
        case = result[cp_size, name]
        assert torch.equal(case["no ring"], case["train"][0])
        torch.testing.assert_close(case["ring"], case["no ring"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_training_gathers_once_and_the_ring_never(ranks, cp_size, name):
    rows = CASES[name][2].total // cp_size
    for result in ranks:
        calls = result[cp_size, name]["train calls"]
        assert (calls["gathers"], calls["sent"]) == (1, [])
        calls = result[cp_size, name]["ring calls"]
        assert (calls["gathers"], calls["sent"]) == (0, [rows] * (cp_size - 1))


@pytest.mark.parametrize("cp_size", [2, 4])
def test_no_mask_is_larger_than_one_tile(ranks, cp_size):
    for result in ranks:
        for name, (_, packed, _, _, _, mask_type) in CASES.items():
            assert result[cp_size, name]["ring calls"]["masks"] == []
            masks = result[cp_size, name]["train calls"]["masks"]
            if mask_type is NO_MASK:
                assert set(masks) == {None}
            elif not packed and "flash" not in name:
                assert len(masks) == 2  # one call for each chunk of the rank
                for mask in masks:
                    assert mask is None or (mask[0] == LENGTH // (2 * cp_size) <= mask[1] <= LENGTH)
    # The first chunk of rank 0 sees itself alone and needs no mask at all.
    assert ranks[0][cp_size, "grouped queries"]["train calls"]["masks"][0] is None


@pytest.mark.parametrize("cp_size", [2, 4])
def test_a_packs_masks_are_its_documents(ranks, cp_size):
    for result in ranks:
        for rows, columns in filter(None, result[cp_size, "packed"]["train calls"]["masks"]):
            assert rows in {length // (2 * cp_size) for length in TIGHT.lengths}
            assert columns <= max(TIGHT.lengths)
