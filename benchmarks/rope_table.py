"""Build a rank's rotary table: seconds and peak memory, against stock megatron-core.

    python benchmarks/rope_table.py            # 256k, 1M and 2M positions
    python benchmarks/rope_table.py --quick    # 256k positions

Claim: on N context-parallel ranks a rank needs at most 1/N of stock's peak memory and is no slower.
Stock builds the table of the whole sequence in two steps and then cuts the rank's rows out; the
plugin writes only those rows, once. Its angles are exact besides (stock's fp32 product is off by
0.1 to 0.3 rad at 2M positions). `plugin, ones` is the table of a factor set of ones, which keeps
stock's own product bit for bit.

On the CPU, in fp32, head dimension 128. Seconds: the arms take turns in one process. Peak memory:
growth of the resident set of a fresh process for each number. A rank of a context-parallel group is
an object with a rank and a size, which is all that stock and plugin ask of it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
from megatron_longrope.integration import cpu_host
from megatron_longrope.methods import yarn_factors
from megatron_longrope.rotary import LongRopeRotaryEmbedding

HEAD_DIM = 128
ROTARY_BASE = 10000.0
WINDOW = 4096
LENGTHS = (2**18, 2**20, 2**21)
QUICK_LENGTHS = (2**18,)
REPEATS = 15
QUICK_REPEATS = 5
CP_SIZES = (1, 8)
ARMS = ("stock", "plugin", "plugin, ones")
MIB = 2**20


@dataclass(frozen=True)
class FirstRank:
    """Rank 0's view of a context-parallel group."""

    cp_size: int

    def size(self) -> int:
        """Number of ranks."""
        return self.cp_size

    def rank(self) -> int:
        """This rank."""
        return 0


class Arm:
    """One way to build the table, called as a model's forward calls it.

    Args:
        name (str): One of `ARMS`.
        length (int): Positions of the whole sequence.
        cp_size (int): Ranks that share it.
    """

    def __init__(self, name: str, length: int, cp_size: int) -> None:
        self.length = length
        self.config = None
        group: Any = FirstRank(cp_size)
        if name == "stock":
            self.rotary = RotaryEmbedding(
                HEAD_DIM,
                1.0,
                rotary_base=ROTARY_BASE,
                use_cpu_initialization=True,
                cp_group=group,
            )
            return
        self.config = identity_config(ROTARY_BASE, HEAD_DIM, length)
        if name == "plugin":
            factors = tuple(yarn_factors(HEAD_DIM, length / WINDOW, ROTARY_BASE, WINDOW))
            self.config = LongRopeConfig(
                ROTARY_BASE, HEAD_DIM, WINDOW, (FactorSet(length, factors),)
            )
        self.rotary = LongRopeRotaryEmbedding(self.config, HEAD_DIM, cp_group=group)

    def build(self) -> torch.Tensor:
        """The table `[length / cp_size, 1, 1, d]`; built only if :meth:`forget` came before."""
        return self.rotary(self.length)

    def forget(self) -> None:
        """Drop what the module has cached."""
        if self.config is None:
            RotaryEmbedding.forward.cache_clear()
        else:
            self.rotary.set_config(self.config)


def seconds_of(length: int, cp_size: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every build, by arm."""
    arms = {name: Arm(name, length, cp_size) for name in ARMS}

    def forget() -> None:
        for arm in arms.values():
            arm.forget()

    return measure.sample_interleaved(
        {name: arm.build for name, arm in arms.items()}, repeats, prepare=forget
    )


def peak_of(name: str, length: int, cp_size: int) -> int:
    """Bytes of peak memory that one build needs, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--peak", name, str(length), str(cp_size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def print_peak(name: str, length: int, cp_size: int) -> None:
    """The other side of :func:`peak_of`."""
    Arm(name, 2 * WINDOW, cp_size).build()  # loads the code that the build runs
    print(measure.peak_growth(Arm(name, length, cp_size).build))


def compare(length: int, cp_size: int, repeats: int) -> dict[str, Any]:
    """One row of the result."""
    seconds = seconds_of(length, cp_size, repeats)
    peaks = {name: peak_of(name, length, cp_size) for name in ARMS}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "positions": length,
        "cp_size": cp_size,
        "seconds": {name: round(value, 6) for name, value in medians.items()},
        "fastest_seconds": {name: round(min(values), 6) for name, values in seconds.items()},
        "peak_mib": {name: round(value / MIB, 1) for name, value in peaks.items()},
        "time_ratio": round(medians["plugin"] / medians["stock"], 4),
        "time_ratio_ones": round(medians["plugin, ones"] / medians["stock"], 4),
        "memory_ratio": round(peaks["plugin"] / peaks["stock"], 4),
    }


def main() -> None:
    """Measure, print a table and the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the shortest length, few repeats")
    parser.add_argument("--lengths", type=int, nargs="+", help="positions, multiples of 16")
    parser.add_argument("--repeats", type=int, help="builds of each arm that are timed")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cpu_host.enable()
    if options.peak:
        name, length, cp_size = options.peak
        print_peak(name, int(length), int(cp_size))
        return
    lengths = options.lengths or (QUICK_LENGTHS if options.quick else LENGTHS)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    measure.print_environment()
    rows = []
    for length in lengths:
        for cp_size in CP_SIZES:
            rows.append(compare(length, cp_size, repeats))
            print(f"{length} positions, CP {cp_size}: done", file=sys.stderr, flush=True)
    measure.print_table(
        ("positions", "CP", *(f"{name} ms" for name in ARMS), *(f"{name} MiB" for name in ARMS)),
        [
            (
                row["positions"],
                row["cp_size"],
                *(f"{1e3 * row['seconds'][name]:.1f}" for name in ARMS),
                *(f"{row['peak_mib'][name]:.1f}" for name in ARMS),
            )
            for row in rows
        ],
    )
    measure.finish(
        "rope_table",
        max(row["time_ratio"] for row in rows),
        full_run=not (options.quick or options.lengths or options.repeats),
        ratio_of="median seconds to build a rank's table, plugin / stock, worst row",
        time_ratio_cp1=max(row["time_ratio"] for row in rows if row["cp_size"] == 1),
        time_ratio_cp8=max(row["time_ratio"] for row in rows if row["cp_size"] == 8),
        memory_ratio_cp1=max(row["memory_ratio"] for row in rows if row["cp_size"] == 1),
        memory_ratio_cp8=max(row["memory_ratio"] for row in rows if row["cp_size"] == 8),
        head_dim=HEAD_DIM,
        repeats=repeats,
        rows=rows,
    )


if __name__ == "__main__":
    main()
