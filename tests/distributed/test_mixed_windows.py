"""Mixed-window training: every document of a pack trains as if it were alone in its own window."""

from pathlib import Path

import pytest
import tiny_gpt
import torch
import torch.distributed as dist
from launching import spawn
from tiny_gpt import ORIGINAL, RUN, random_tokens

pytest.importorskip("megatron.training")

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.context_parallel import shard_documents

pytestmark = pytest.mark.slow

LENGTHS = (16, 64, 32, 36, 4)  # divisible by 2 x CP; two are beyond the original window
CONFIG = LongRopeConfig(
    rotary_base=10000.0,
    rotary_dim=8,
    original_max_position_embeddings=ORIGINAL,
    factor_sets=(FactorSet(ORIGINAL, (1.0,) * 4), FactorSet(RUN, (1.0, 1.3, 1.7, 2.0))),
)


def build(mode: str):
    """A GPTModel as Megatron builds it in a run with these factors, the same weights every time."""
    from megatron.core import parallel_state

    size = parallel_state.get_context_parallel_world_size()
    how = {"dataloader_inter_document_masking": mode == "mixed", "context_parallel_size": size}
    args = tiny_gpt.start_run(CONFIG, longrope_mode=mode, **how)
    model = tiny_gpt.build(args)
    tiny_gpt.fill(model)
    return model


def each_document_alone() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses `[1, t]` and gradients: stock RoPE within the original window, the run's beyond."""
    models = {mode: build(mode) for mode in ("short", "auto")}
    losses = []
    documents = (tensor.split(LENGTHS, dim=1) for tensor in random_tokens(1, sum(LENGTHS)))
    for tokens, labels in zip(*documents, strict=True):
        length = tokens.shape[1]
        model = models["short" if length <= ORIGINAL else "auto"]
        losses.append(model(tokens, torch.arange(length)[None], None, labels=labels))
    losses = torch.cat(losses, dim=1)
    losses.sum().backward()
    short, long = (dict(model.named_parameters()) for model in models.values())
    return losses.detach(), {name: short[name].grad + long[name].grad for name in short}


def packed(rank: int, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This rank's losses of the mixed pack and the gradients over all ranks."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.utils import get_batch_on_this_cp_rank

    model = build("mixed")
    tokens, labels = random_tokens(1, sum(LENGTHS))
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    group = parallel_state.get_context_parallel_group()
    inputs = {"tokens": tokens, "labels": labels, "cu_seqlens": offsets[None]}
    inputs |= {"cu_seqlens_padded": None}
    try:
        inputs = get_batch_on_this_cp_rank(
            inputs, is_hybrid_cp=False, cp_group=group, use_per_sequence_balancing=True
        )
    except TypeError:  # before 0.19 scripts pack only for --sft, through Transformer Engine
        for name in ("tokens", "labels"):
            inputs[name] = shard_documents(inputs[name], offsets.tolist(), rank, size, dim=1)
    description = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
    )
    positions = torch.arange(inputs["tokens"].shape[1])[None]
    losses = model(
        inputs["tokens"],
        positions,
        None,
        labels=inputs["labels"],
        packed_seq_params=description,
    )
    losses.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    return losses.detach(), gradients


def worker(rank: int, size: int, directory: str) -> None:
    from megatron.core import parallel_state, tensor_parallel

    from megatron_longrope.integration import cpu_host

    cpu_host.prepare_environment()
    cpu_host.enable()
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store-{size}", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    results = {"packed": packed(rank, size)}
    if size == 1:
        results["alone"] = each_document_alone()
    torch.save(results, f"{directory}/{size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = Path(tmp_path_factory.mktemp("mixed"))
    for size in (1, 2):
        spawn(worker, (size, str(directory)), size)
    return {path.stem: torch.load(path) for path in directory.glob("*.pt")}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=name)


def test_a_mixed_pack_trains_like_each_document_alone_in_its_own_window(results):
    losses, gradients = results["1-0"]["packed"]
    expected, expected_gradients = results["1-0"]["alone"]
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert_same(gradients, expected_gradients)


def test_context_parallel_ranks_train_a_mixed_pack_like_one_process(results):
    expected, expected_gradients = results["1-0"]["packed"]
    offsets = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for rank in range(2):
        losses, gradients = results[f"2-{rank}"]["packed"]
        shard = shard_documents(expected, offsets, rank, 2, dim=1)
        torch.testing.assert_close(losses, shard, rtol=0, atol=1e-5)
        assert_same(gradients, expected_gradients)
