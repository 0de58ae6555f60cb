"""The chunked loss on tensor-parallel ranks, and through `longrope pretrain`."""

from pathlib import Path
from unittest import mock

import pytest
import tiny_gpt
import tiny_training
import torch
import torch.distributed as dist
from launching import pretrain_command, spawn, train
from tiny_gpt import RUN, random_tokens

pytest.importorskip("megatron.training")


pytestmark = pytest.mark.slow

WORLD, CHUNK = 2, 10


# Megatron's model on two ranks


def model_step(loss_chunk: int | None, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Losses and gradients of one batch of a tensor-parallel GPTModel, all from one seed."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron_longrope.integration import chunked_loss, wrappers

    class Norm(torch.nn.RMSNorm):  # Megatron's own refuses sequence parallelism
        def __init__(self, config, hidden_size, eps=1e-5, **_):
            super().__init__(hidden_size, eps=eps)

    args = tiny_gpt.start_run()
    wrappers.activate(wrappers.Run(tiny_gpt.settings_of_run(), "sdpa", loss_chunk))
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    chunk = tiny_gpt.build(
        args,
        layers=1,
        model_options={"spec": TransformerBlockSubmodules(layer_specs=[spec], layer_norm=Norm)},
        tensor_model_parallel_size=WORLD,
        sequence_parallel=sequence_parallel,
    )
    assert chunked_loss.is_deferred(chunk) == (loss_chunk is not None)
    tiny_gpt.fill(chunk, seed=dist.get_rank())
    tokens, labels = random_tokens(2, RUN)
    losses = chunk(tokens, torch.arange(RUN)[None], None, labels=labels)
    # Sequence parallelism asks in its backward pass, where no torch function mode is active.
    with mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")):
        losses.mean().backward()
    return {"losses": losses.detach(), **{name: p.grad for name, p in chunk.named_parameters()}}


def worker(rank: int, directory: str) -> None:
    from megatron.core import parallel_state, tensor_parallel

    from megatron_longrope.integration import cpu_host

    cpu_host.prepare_environment()
    cpu_host.enable()
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=WORLD)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    results = {
        name: {
            "stock": model_step(None, sequence_parallel),
            "chunked": model_step(CHUNK, sequence_parallel),
        }
        for name, sequence_parallel in (("tensor", False), ("sequence", True))
    }
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What every rank computed, in rank order."""
    directory = Path(tmp_path_factory.mktemp("loss"))
    spawn(worker, (str(directory),), WORLD)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("layout", ["tensor", "sequence"])
def test_a_parallel_model_has_megatrons_losses_and_gradients(ranks, layout):
    for rank in ranks:
        ours, theirs = rank[layout]["chunked"], rank[layout]["stock"]
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


# Through Megatron's training loop


def test_five_steps_have_the_losses_and_gradient_norms_of_a_run_without_the_flag(tmp_path):
    """Tied weights on two ranks, loss per token."""
    flags = ["--tensor-model-parallel-size", "2", "--calculate-per-token-loss"]
    model = [*tiny_training.MODEL, *flags, "--train-iters", "5"]
    model.remove("--untie-embeddings-and-output-weights")
    with_flag = [*model, "--longrope-chunked-loss", "40"]
    ours = train([pretrain_command(with_flag, processes=2)], tmp_path / "ours")
    theirs = train([pretrain_command(model, processes=2)], tmp_path / "theirs")
    assert "loss in chunks of 40 tokens" in ours.log
    assert "loss in chunks" not in theirs.log
    assert len(ours.losses) == len(theirs.losses) == 5
    losses = [list(map(float, run.losses)) for run in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)
    norms = [list(map(float, run.gradient_norms)) for run in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], abs=1.1e-3)  # three digits are printed
