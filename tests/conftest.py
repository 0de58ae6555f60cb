import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Before torch is imported, here and in whatever the tests start: two test processes share the
# cores, and nothing here compiles, while importing the compiler takes seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import launching
import make_hybrid_checkpoint as hybrid_maker
import make_megatron_checkpoint as maker
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from shares import share_of

# A busy machine is no failure, and the same examples everywhere make a failure repeatable.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


# Which tests run, in which order, and what the last line says


def pytest_addoption(parser):
    parser.addoption(
        "--release",
        default="all",
        metavar="all|none|K/N",
        help="tests with the marker `release`: all (default), none, or the K-th of N equal shares",
    )


def pytest_configure(config):
    """Hide the GPU from tests that compare CPU tensors: all but those of tests/gpu."""
    if not any("tests/gpu" in str(argument) for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    marked = [item.nodeid for item in items if item.get_closest_marker("release")]
    try:
        unwanted = set(marked) - set(share_of(marked, config.getoption("release")))
    except ValueError as error:
        raise pytest.UsageError(f"--release {error}") from None
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in unwanted])
    items[:] = [item for item in items if item.nodeid not in unwanted]
    # xdist hands out files in this order (--no-loadscope-reorder): those that take longest come
    # first, so that no process is left alone with one of them at the end.
    # What starts real processes takes about ten times as long as what the fork server starts.
    costs = {"slow": 1, "real_process": 9}
    cost: Counter[Path] = Counter()
    for item in items:
        cost[item.path] += sum(costs.get(marker.name, 0) for marker in item.iter_markers())
    first = Path(__file__).parent / "integration"
    items.sort(key=lambda item: (not item.path.is_relative_to(first), -cost[item.path]))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """The last line of a run in several processes: how long it took, and which tests most of it."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("numprocesses", None) and reporter:
        seconds: Counter[str] = Counter()
        for report in (report for group in reporter.stats.values() for report in group):
            if hasattr(report, "duration") and hasattr(report, "nodeid"):
                seconds[report.nodeid] += report.duration
        slowest = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.most_common(10))
        minutes, rest = divmod(round(time.time() - _STARTED), 60)
        reporter.write_line(f"took {minutes} min {rest:02d} s; slowest tests: {slowest}")
    return result


_STARTED = time.time()


# What several files start from


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
