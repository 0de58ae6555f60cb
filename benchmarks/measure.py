"""What every benchmark shares: interleaved timing, peak memory, the machine, the result line."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_longrope.files import write_json_atomic

RESULTS = Path(__file__).parent / "results"


def sample_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warmup: int = 1,
    prepare: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, the functions taking turns so that a busy machine hits them alike.

    Every other round runs in reverse order, because whoever comes second finds other caches. What
    a function returns is freed after its clock has stopped.

    Args:
        functions (Mapping[str, Callable]): By name.
        repeats (int): Calls of each that count.
        warmup (int): Rounds before them that do not. Defaults to 1.
        prepare (Callable, optional): Runs before every call, outside the clock.
        clock (Callable): Defaults to wall time. `time.process_time` counts what this process
            computed, which other work on the machine disturbs less; use it with one thread, for
            waiting threads count too.

    Returns:
        dict[str, list[float]]: `repeats` seconds by name; equal indices ran side by side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, repeats):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            if prepare is not None:
                prepare()
            gc.collect()
            start = clock()
            result = functions[name]()
            elapsed = clock() - start
            del result
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def paired_ratios(ours: Sequence[float], baseline: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios of neighbouring calls; the second is their median.

    A slow minute of the machine hits both calls of a pair; how far the quartiles are apart tells
    how much noise is left.
    """
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    if len(ratios) < 2:
        return (ratios[0],) * 3
    first, second, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return first, second, third


def peak_growth(function: Callable[[], Any]) -> int:
    """Bytes by which this process' peak resident memory exceeds what it held before the call.

    Trustworthy in a process that has done little else: memory that was freed but not returned to
    the system would be used again unseen.
    """
    gc.collect()
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux: the peak since the process began, in bytes on macOS
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kept = function()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        del kept
        return (after - before) * (1 if sys.platform == "darwin" else 1024)

    def field(name: str) -> int:
        line = next(row for row in status.read_text().splitlines() if row.startswith(name + ":"))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    before = field("VmRSS")
    kept = function()
    after = field("VmHWM")
    del kept
    return after - before


def environment() -> dict[str, Any]:
    """The machine, the versions and the date, for whoever reads the result later."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": _version("megatron-core"),
        "date": datetime.date.today().isoformat(),
    }


def print_environment() -> None:
    """The header of a benchmark's output."""
    print(", ".join(f"{name} {value}" for name, value in environment().items()), flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns aligned to the right; numbers come formatted."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def finish(name: str, ratio: float, *, full_run: bool, **rest: Any) -> None:
    """Print the result as the last line; a full run also replaces `results/NAME.json`.

    Args:
        name (str): Of the benchmark.
        ratio (float): Ours / baseline; `rest` says of what.
        full_run (bool): False for `--quick` and runs with other sizes: they are no evidence.
    """
    result = {"benchmark": name, "ratio": ratio, **rest, "environment": environment()}
    if full_run:
        write_json_atomic(RESULTS / f"{name}.json", result)
    sys.stderr.flush()
    print(json.dumps(result, allow_nan=False), flush=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
