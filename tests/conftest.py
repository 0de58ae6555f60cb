import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Before torch is imported, here and in whatever the tests start: two test processes share the
# cores, and nothing here compiles, while importing the compiler takes seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import make_hybrid_checkpoint as hybrid_maker
import make_megatron_checkpoint as maker
import pytest
import torch
from hypothesis import settings

import megatron_longrope

# A busy machine is no failure, and the same examples everywhere make a failure repeatable.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left_behind():
    """Modules find the process as they expect it: Megatron's groups outlive what made them."""
    yield
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.destroy_model_parallel()
        # Recomputation restores the random states, and thereby declares an empty set complete.
        tensor_parallel.get_cuda_rng_tracker().reset()
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class MegatronRun:
    """A checkpoint that megatron-core wrote and what its model computed."""

    path: Path
    logits: dict[str, torch.Tensor]


def _make(script: str, *arguments: str) -> None:
    """Run a maker of checkpoints, which needs a process of its own."""
    package = Path(megatron_longrope.__file__).parents[1]
    paths = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, script, *arguments, str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def megatron_runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("megatron")
    _make(maker.__file__, str(directory))
    return {
        name: MegatronRun(directory / name, torch.load(directory / f"{name}.pt"))
        for name in maker.VARIANTS
    }


@pytest.fixture(scope="session")
def hybrid_runs(tmp_path_factory, megatron_runs):
    """HybridModel checkpoints and their logits; `same` has the weights of `untied_gqa`."""
    directory = tmp_path_factory.mktemp("hybrid")
    _make(hybrid_maker.__file__, str(directory), str(megatron_runs["untied_gqa"].path))
    return {
        name: (directory / name, torch.load(directory / f"{name}.pt"))
        for name in hybrid_maker.VARIANTS
    }


@pytest.fixture(params=list(maker.VARIANTS))
def run(request, megatron_runs):
    return megatron_runs[request.param]


@pytest.fixture
def untied_gqa(megatron_runs):
    return megatron_runs["untied_gqa"]


@pytest.fixture
def config():
    return maker.longrope_config()
