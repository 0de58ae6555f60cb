"""What benchmarks share: timing in turns, peak memory, a random model, machine, result line."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.files import write_json_atomic
from megatron_longrope.methods import yarn_factors

RESULTS = Path(__file__).parent / "results"
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    # A fixed threshold: glibc would raise it, keep what is freed, and hide it from the peak.
    "MALLOC_MMAP_THRESHOLD_": str(2**18),
}
"""Environment of a process whose peaks are measured: what it frees is gone."""

ROTARY_BASE = 10000.0
EXTENSION = 8  # of the random Llama's original window
HEAD_DIM = 64


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
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    before = resident_peak()
    kept = function()
    after = resident_peak()
    del kept
    return after - before


def resident_peak() -> int:
    """Most bytes of this process' resident set since it began."""
    if sys.platform == "linux":  # getrusage would count what the parent held when it forked
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def in_own_process(script: str, *words: object, env: Mapping[str, str]) -> dict[str, Any]:
    """Run a script and return the JSON object on its last line.

    Args:
        script (str): Path.
        words (object): Its arguments.
        env (Mapping[str, str]): On top of this process' environment.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Geometry:
    """Size of a Llama-type model with heads of `HEAD_DIM` dimensions."""

    num_layers: int
    hidden_size: int
    vocab_size: int


def write_llama(
    directory: Path, geometry: Geometry, longest: int, *, room: int = 0, seed: int = 0, **more: Any
) -> None:
    """Write a random Llama with LongRoPE factors as an HF folder.

    Args:
        directory (Path): The folder.
        geometry (Geometry): Size of the model.
        longest (int): Tokens, `EXTENSION` times the original window.
        room (int): Tokens that its window has beyond them.
        seed (int): Of the weights.
        more: Further keys of its `config.json`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    window = longest // EXTENSION
    factors = tuple(yarn_factors(HEAD_DIM, EXTENSION, ROTARY_BASE, window))
    sets = (FactorSet(window, (1.0,) * (HEAD_DIM // 2)), FactorSet(longest + room, factors))
    # transformers has one attention factor for both windows.
    longrope = LongRopeConfig(ROTARY_BASE, HEAD_DIM, window, sets, attention_factor=1.1)
    config = LlamaConfig(
        **longrope.to_hf(),
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.hidden_size * 43 // 16,  # Llama-2-7B's proportion
        num_hidden_layers=geometry.num_layers,
        num_attention_heads=geometry.hidden_size // HEAD_DIM,
        # Far from uniform predictions: rounding would decide which token is the most likely, and
        # every model would have the perplexity V.
        initializer_range=0.1,
        **more,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)


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
