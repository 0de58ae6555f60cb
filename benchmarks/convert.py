"""Conversion: seconds against copying the same bytes, and peak memory against loading everything.

    python benchmarks/convert.py            # a random Llama of 2.2 GiB in bf16; 12 GiB of disk
    python benchmarks/convert.py --quick    # 0.3 GiB
    python benchmarks/convert.py --gib 8 --directory /disk/to/measure

Claim: both directions cost little more than copying the checkpoint's bytes, and their memory does
not grow with the model: a process holds at most 1.5 GiB beside the largest tensor.

`to_hf` and `from_hf` are `write_hf_folder` and `write_checkpoint` without verification. `copy` is
`shutil.copyfile` and fsync for every file of the checkpoint. `load_all` converts the checkpoint as
scripts usually do: all tensors in a dict, then `safetensors.torch.save_file` and fsync. Each run is
a process of its own with one thread, and the arms take turns. Seconds begin after the imports and
end when the bytes are on the disk, for all arms. Before each run the inputs' pages are dropped from
the page cache, so all arms read from the disk (or from the cache of a virtual machine's host); what
is written lies on the same disk. Peaks are the processes' whole resident sets, libraries included:
pages of the page cache count in none, those of mapped files do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measure
import torch

ARMS = ("to_hf", "from_hf", "copy", "load_all")
HIDDEN, FFN, HEADS, VOCAB = 2048, 5632, 16, 32000
FULL_GIB, QUICK_GIB = 2.2, 0.3
SHARD_BYTES = 500_000_000  # several files at every size
ALLOWED_GIB = 1.5


def num_layers(gib: float) -> int:
    """Layers of the model of about so many GiB in bf16."""
    layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
    return max(1, round((gib * 2**30 - 4 * VOCAB * HIDDEN) / layer))


def make_inputs(directory: Path, layers: int) -> int:
    """A random Llama as `directory/hf` and `directory/megatron`; gives the bytes of its tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_longrope.conversion.from_hf import write_checkpoint

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory / "hf", max_shard_size=SHARD_BYTES)
    report = write_checkpoint(directory / "hf", directory / "megatron", max_shard_bytes=SHARD_BYTES)
    return report.num_bytes


def copy(source: Path, target: Path) -> None:
    """Every file, and then all of it on the disk."""
    for path in sorted(item for item in source.rglob("*") if item.is_file()):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
        sync(copied)


def load_all(source: Path, target: Path) -> None:
    """The whole model in memory, then one file."""
    from safetensors.torch import save_file

    from megatron_longrope.checkpoint import MegatronCheckpoint
    from megatron_longrope.checkpoint.hf.families import select_family
    from megatron_longrope.conversion.tensors import TensorSource

    checkpoint = MegatronCheckpoint.open(source)
    family = select_family(checkpoint.shape, checkpoint.args)
    tensors = TensorSource(checkpoint, family, checkpoint.shape)
    state = {item.name: tensors.load(item).clone() for item in tensors.plan}
    target.mkdir()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    sync(target / "model.safetensors")


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def arm(name: str, directory: Path, target: Path) -> Callable[[], Any]:
    """What is measured, imports done."""
    from megatron_longrope.conversion.from_hf import write_checkpoint
    from megatron_longrope.conversion.to_hf import write_hf_folder

    sizes = {"max_shard_bytes": SHARD_BYTES}
    return {
        "to_hf": lambda: write_hf_folder(
            directory / "megatron", target, longrope_config=None, **sizes
        ),
        "from_hf": lambda: write_checkpoint(directory / "hf", target, **sizes),
        "copy": lambda: copy(directory / "megatron", target),
        "load_all": lambda: load_all(directory / "megatron", target),
    }[name]


def run_arm(name: str, directory: Path) -> None:
    """In a process of its own: print seconds and the peak of the resident set."""
    torch.set_num_threads(1)
    target = directory / f"output_{name}"
    function = arm(name, directory, target)
    started = time.perf_counter()
    function()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_bytes": measure.resident_peak()}))


def drop_cache(directory: Path) -> None:
    """Make the next reader of the inputs go to the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()  # pages that are not yet written stay
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_all(directory: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Runs of every arm, which take turns; every other round in reverse order."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for turn in range(repeats):
        for name in ARMS[:: -1 if turn % 2 else 1]:
            drop_cache(directory)
            found = measure.in_own_process(
                __file__, "--arm", name, directory, env={"OMP_NUM_THREADS": "1"}
            )
            runs[name].append(found)
            shutil.rmtree(directory / f"output_{name}")
    return runs


def summarise(runs: dict[str, list[dict[str, float]]], largest_bytes: int) -> dict[str, Any]:
    """Ratios of neighbouring runs' seconds, and peaks.

    Args:
        runs (dict): From :func:`measure_all`.
        largest_bytes (int): Size of the largest tensor.
    """
    seconds = {name: [run["seconds"] for run in runs[name]] for name in ARMS}
    peaks = {name: max(run["peak_bytes"] for run in runs[name]) / 2**30 for name in ARMS}
    quartiles = {
        name: [round(value, 3) for value in measure.paired_ratios(seconds[name], seconds["copy"])]
        for name in ("to_hf", "from_hf", "load_all")
    }
    peak = max(peaks["to_hf"], peaks["from_hf"])
    return {
        "ratio": max(quartiles["to_hf"][1], quartiles["from_hf"][1]),
        "ratio_quartiles": quartiles,
        "peak_gib": round(peak, 3),
        "peak_gib_load_all": round(peaks["load_all"], 3),
        "allowed_gib": round(ALLOWED_GIB + largest_bytes / 2**30, 3),
        "seconds": {name: round(statistics.median(seconds[name]), 3) for name in ARMS},
        "peaks_gib": {name: round(value, 3) for name, value in peaks.items()},
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; refuses what cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_GIB} GiB, fewer repeats")
    parser.add_argument("--gib", type=float, help=f"size of the model (default: {FULL_GIB})")
    parser.add_argument("--repeats", type=int, help="runs of every arm (default: 5; quick: 2)")
    parser.add_argument("--directory", help="where to work (default: the temporary directory)")
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.gib is not None and not options.gib > 0:
        parser.error(f"--gib {options.gib} must be above 0")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    return options


def main() -> None:
    """Measure, print a table and the result."""
    options = parse()
    if options.arm:
        run_arm(options.arm[0], Path(options.arm[1]))
        return
    torch.set_num_threads(1)
    layers = num_layers(options.gib or (QUICK_GIB if options.quick else FULL_GIB))
    repeats = options.repeats or (2 if options.quick else 5)
    measure.print_environment()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        num_bytes = make_inputs(directory, layers)
        runs = measure_all(directory, repeats)
    summary = summarise(runs, 2 * VOCAB * HIDDEN)
    measure.print_table(
        ("arm", "seconds", "MB/s", "/ copy", "peak GiB"),
        [
            (
                name,
                f"{summary['seconds'][name]:.2f}",
                f"{num_bytes / summary['seconds'][name] / 1e6:.0f}",
                f"{summary['ratio_quartiles'].get(name, [1, 1, 1])[1]:.2f}",
                f"{summary['peaks_gib'][name]:.2f}",
            )
            for name in ARMS
        ],
    )
    changed = options.gib or options.repeats or options.directory
    measure.finish(
        "convert",
        summary.pop("ratio"),
        full_run=not (options.quick or changed),
        ratio_of="seconds to convert, the slower direction / to copy the checkpoint's files",
        **summary,
        num_bytes=num_bytes,
        num_layers=layers,
        page_cache="inputs dropped before every run",
        repeats=repeats,
        runs=runs,
        transformers=version("transformers"),
    )


if __name__ == "__main__":
    main()
