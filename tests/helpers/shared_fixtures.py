"""What several files start from; tests/conftest.py makes it a plugin of every test process."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import launching
import make_hybrid_checkpoint as hybrid_maker
import make_megatron_checkpoint as maker
import pytest
import torch
from filelock import FileLock


@pytest.fixture(scope="module", autouse=True)
def environment_stays_as_it_was():
    """What Megatron's CPU host and others set for a process would reach the modules that follow."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


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


def _make(script: str, *arguments: object) -> None:
    """Run a maker of checkpoints, which needs a process of its own."""
    done = launching.python(script, *arguments, torch.get_num_threads())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A directory of the given name that one of the test processes fills, for all of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of the whole run

    def get(name, fill):
        directory = root / name
        with FileLock(root / f"{name}.lock"):
            if not (root / f"{name}.done").exists():
                shutil.rmtree(directory, ignore_errors=True)  # of a process that failed
                directory.mkdir()
                fill(directory)
                (root / f"{name}.done").touch()
        return directory

    return get


@pytest.fixture(scope="session")
def megatron_runs(made_once):
    directory = made_once("megatron", lambda path: _make(maker.__file__, str(path)))
    return {
        name: MegatronRun(directory / name, torch.load(directory / f"{name}.pt"))
        for name in maker.VARIANTS
    }


@pytest.fixture(scope="session")
def hybrid_runs(made_once, megatron_runs):
    """HybridModel checkpoints and their logits; `same` has the weights of `untied_gqa`."""
    gpt = str(megatron_runs["untied_gqa"].path)
    directory = made_once("hybrid", lambda path: _make(hybrid_maker.__file__, str(path), gpt))
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


@pytest.fixture(scope="session")
def data(made_once):
    """Prefixes of the sets `search` and `heldout`, and their tokenizer: to be read, not changed."""
    from search_data import make_search_data, search_data_in  # imports transformers

    return search_data_in(made_once("search_data", make_search_data))


@pytest.fixture
def benchmark_results_stay():
    """Whoever changes what benchmarks/results holds fails."""
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    before = {path: path.read_bytes() for path in results.iterdir()}
    yield
    assert {path: path.read_bytes() for path in results.iterdir()} == before


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever loads weights fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("megatron_longrope.engine.loading.load_into", refuse)
