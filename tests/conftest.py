import os
from collections import Counter
from pathlib import Path

# Before torch is imported, here and in whatever the tests start: two test processes share the
# cores, and nothing here compiles, while importing the compiler takes seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest
from hypothesis import settings
from shares import share_of

# A busy machine is no failure, and the same examples everywhere make a failure repeatable.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


# Which tests run, in which order


def pytest_addoption(parser):
    parser.addoption(
        "--release",
        default="none",
        metavar="all|none|K/N",
        help="tests with the marker `release`: all, none (default), or the K-th of N equal shares",
    )


def pytest_configure(config):
    """Hide the GPU from tests that compare CPU tensors: all but those of tests/gpu."""
    gpu, here = Path(__file__).parent / "gpu", config.invocation_params.dir
    paths = [(here / str(argument).partition("::")[0]).resolve() for argument in config.args]
    if not any(path.is_relative_to(gpu.resolve()) for path in paths):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The process that only hands out files to others would import torch for nothing.
    if not config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("shared_fixtures")


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
