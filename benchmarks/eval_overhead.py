"""Score a candidate: seconds beyond the model's own forward pass, and peak memory by length.

    python benchmarks/eval_overhead.py            # 8k and 16k tokens, memory from 16k to 48k
    python benchmarks/eval_overhead.py --quick    # 8k tokens, a smaller model, memory up to 20k

Claims: swapping the factors and scoring costs less than 1 % over the forward pass at 8k tokens and
above; memory grows linearly with the length.

Seconds: `candidate` is what a search does, `Engine.set_config` with factors that the engine has not
seen last and `Engine.nll`; `forward` is the same model's forward pass and chunked loss on tokens,
labels and a rotary table that are ready. The arms take turns in one process, on one thread; the
ratio is the median over neighbouring calls, in CPU seconds of the process. What the candidate does
besides (checks, swap, rotary table, labels) is also timed by itself: `added_share` is that over the
forward pass, without the noise of two long calls.

Memory: growth of the peak of the resident set in a fresh process for each length, while it scores
one candidate; the slope is that of the least-squares line through all lengths, and
`linearity_error` the largest distance of a measurement from the line, relative to the measurement.
The lengths are those at which attention, not the slices of MLP and logits, has the peak. Two layers
are enough, because a layer's memory is freed before the next one; wide ones, so that the peak is
large against what the process holds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Megatron decorates small functions with torch.compile, which costs minutes on a CPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import measure
import torch
from torch import Tensor

from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.engine import Engine, loss, process_groups
from megatron_longrope.engine.model import build_model
from megatron_longrope.integration import cpu_host
from megatron_longrope.methods import yarn_factors

ROTARY_BASE = 10000.0
EXTENSION = 8  # the original window is an eighth of the sequence
WARM_UP = 512  # tokens that load all code before memory is measured


@dataclass(frozen=True)
class Geometry:
    """Size of a Llama-type model."""

    num_layers: int = 4
    hidden_size: int = 256
    ffn_hidden_size: int = 688
    num_heads: int = 4
    num_groups: int = 4
    vocab_size: int = 32000


@dataclass(frozen=True)
class Plan:
    """What one run of this script measures."""

    geometry: Geometry
    repeats: dict[int, int]  # tokens: calls of each arm that are timed
    memory_lengths: tuple[int, ...]


FULL = Plan(Geometry(), {8192: 15, 16384: 9}, (16384, 24576, 32768, 49152))
QUICK = Plan(Geometry(num_layers=2, vocab_size=8192), {8192: 5}, (12288, 16384, 20480))
MEMORY_GEOMETRY = Geometry(
    num_layers=2, hidden_size=512, ffn_hidden_size=1376, num_heads=8, num_groups=8, vocab_size=8192
)


def factors(geometry: Geometry, length: int, scale: float) -> LongRopeConfig:
    """A candidate: YaRN's factors for `scale`."""
    head_dim = geometry.hidden_size // geometry.num_heads
    window = length // EXTENSION
    chosen = tuple(yarn_factors(head_dim, scale, ROTARY_BASE, window))
    return LongRopeConfig(ROTARY_BASE, head_dim, window, (FactorSet(length, chosen),))


def make_engine(geometry: Geometry, length: int) -> Engine:
    """An engine with random weights, as it would come out of a checkpoint."""
    shape = ModelShape(
        num_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        ffn_hidden_size=geometry.ffn_hidden_size,
        num_attention_heads=geometry.num_heads,
        num_query_groups=geometry.num_groups,
        head_dim=geometry.hidden_size // geometry.num_heads,
        vocab_size=geometry.vocab_size,
        padded_vocab_size=geometry.vocab_size,
        norm_epsilon=1e-5,
        rotary_base=ROTARY_BASE,
        rotary_percent=1.0,
        rotary_interleaved=False,
        untie_embeddings=True,
        qk_layernorm=False,
        add_qkv_bias=False,
        add_bias_linear=False,
        swiglu=True,
        normalization="RMSNorm",
        max_position_embeddings=length // EXTENSION,
        seq_length=length // EXTENSION,
        params_dtype=torch.float32,
    )
    process_groups.initialize()
    model = build_model(shape, factors(geometry, length, EXTENSION))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            torch.nn.init.ones_(parameter)
    return Engine(model, shape)


def random_tokens(geometry: Geometry, length: int) -> Tensor:
    """`[1, length]`, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(geometry.vocab_size, (1, length), generator=generator)


def arms(geometry: Geometry, length: int) -> dict[str, Callable[[], Any]]:
    """The two ways to the losses of one sequence, and what only one of them does."""
    engine, tokens = make_engine(geometry, length), random_tokens(geometry, length)
    # Never the factors of the call before: each candidate needs a rotary table of its own.
    candidates = itertools.cycle(factors(geometry, length, scale) for scale in (8.0, 7.5, 7.0))
    labels = tokens[0, 1:]
    rotary = engine.model.rotary_pos_emb

    @torch.no_grad()
    def forward() -> Tensor:
        hidden = engine.model(input_ids=tokens, position_ids=None, attention_mask=None)
        return loss.token_nll(engine.model, hidden[:-1, 0], labels, geometry.vocab_size)

    def candidate() -> Tensor:
        engine.set_config(next(candidates))
        return engine.nll(tokens)

    @torch.no_grad()
    def added() -> Tensor:
        # A candidate without its model and its output layer.
        model, token_nll = engine.model.forward, loss.token_nll
        nothing = torch.zeros(length, 1, 1)
        engine.model.forward = lambda **_: rotary(length) is None or nothing
        loss.token_nll = lambda model, hidden, labels, real_tokens: hidden[:, 0]
        try:
            return candidate()
        finally:
            engine.model.forward, loss.token_nll = model, token_nll

    candidate()  # the table that `forward` finds
    return {"forward": forward, "candidate": candidate, "added": added}


def compare(geometry: Geometry, length: int, repeats: int) -> dict[str, Any]:
    """One row of the result."""
    functions = arms(geometry, length)
    added = functions.pop("added")
    samples = measure.sample_interleaved(functions, repeats, clock=time.process_time)
    samples |= measure.sample_interleaved({"added": added}, 21, clock=time.process_time)
    quartiles = measure.paired_ratios(samples["candidate"], samples["forward"])
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "tokens": length,
        "repeats": repeats,
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "ratio": round(quartiles[1], 4),
        "ratio_quartiles": [round(value, 4) for value in quartiles],
        "added_share": round(seconds["added"] / seconds["forward"], 6),
    }


def peak_of(geometry: Geometry, length: int) -> int:
    """Bytes of peak memory that scoring one candidate needs, in a process of its own."""
    numbers = map(str, (*asdict(geometry).values(), length))
    command = [sys.executable, str(Path(__file__)), "--peak", *numbers]
    # A fixed threshold: glibc would raise it, keep what is freed, and hide it from the peak.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def print_peak(geometry: Geometry, length: int) -> None:
    """The other side of :func:`peak_of`."""
    engine, tokens = make_engine(geometry, length), random_tokens(geometry, length)
    engine.nll(tokens[:, :WARM_UP])
    engine.set_config(factors(geometry, length, 7.5))
    print(measure.peak_growth(lambda: engine.nll(tokens)))


def line_through(lengths: Sequence[int], peaks: Sequence[int]) -> dict[str, Any]:
    """Slope, offset and linearity of peak memory over length."""
    slope, offset = statistics.linear_regression(lengths, peaks)
    errors = [abs(slope * n + offset - peak) / peak for n, peak in zip(lengths, peaks, strict=True)]
    return {
        "bytes_per_token": round(slope),
        "offset_mib": round(offset / 2**20, 1),
        "linearity_error": round(max(errors), 4),
        "peak_mib": {str(n): round(p / 2**20, 1) for n, p in zip(lengths, peaks, strict=True)},
    }


def main() -> None:
    """Measure, print a table and the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, few repeats")
    parser.add_argument("--tokens", type=int, help="this length alone, a multiple of 8")
    parser.add_argument("--repeats", type=int, help="calls of each arm that are timed")
    parser.add_argument(
        "--memory-lengths", type=int, nargs="+", metavar="N", help="two lengths or more"
    )
    parser.add_argument("--peak", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cpu_host.enable()
    if options.peak:
        *numbers, length = options.peak
        print_peak(Geometry(*numbers), length)
        return
    torch.set_num_threads(1)
    plan = QUICK if options.quick or options.tokens else FULL
    repeats = plan.repeats if options.tokens is None else {options.tokens: QUICK.repeats[8192]}
    memory_lengths = options.memory_lengths or plan.memory_lengths
    measure.print_environment()
    rows = []
    for length, count in repeats.items():
        rows.append(compare(plan.geometry, length, options.repeats or count))
        print(f"{length} tokens: seconds done", file=sys.stderr, flush=True)
    peaks = []
    for length in memory_lengths:
        peaks.append(peak_of(MEMORY_GEOMETRY, length))
        print(f"{length} tokens: memory done", file=sys.stderr, flush=True)
    memory = line_through(memory_lengths, peaks)
    measure.print_table(
        ("tokens", "forward s", "candidate s", "ratio", "quartiles", "added ms", "added share"),
        [
            (
                row["tokens"],
                f"{row['seconds']['forward']:.3f}",
                f"{row['seconds']['candidate']:.3f}",
                f"{row['ratio']:.4f}",
                "{} - {}".format(*(f"{row['ratio_quartiles'][i]:.4f}" for i in (0, 2))),
                f"{1e3 * row['seconds']['added']:.2f}",
                f"{100 * row['added_share']:.3f} %",
            )
            for row in rows
        ],
    )
    measure.print_table(
        ("tokens", "peak MiB"), [(n, memory["peak_mib"][str(n)]) for n in memory_lengths]
    )
    print(
        f"{memory['bytes_per_token']} bytes per token, {memory['offset_mib']} MiB besides; "
        f"off the line by at most {100 * memory['linearity_error']:.1f} %"
    )
    changed = options.tokens or options.repeats or options.memory_lengths
    measure.finish(
        "eval_overhead",
        max(row["ratio"] for row in rows),
        full_run=not (options.quick or changed),
        ratio_of="CPU seconds to score a candidate, candidate / the model's forward pass with its "
        "loss, median over neighbouring calls, worst length",
        added_share=max(row["added_share"] for row in rows),
        geometry=asdict(plan.geometry),
        memory_geometry=asdict(MEMORY_GEOMETRY),
        dtype="float32",
        rows=rows,
        memory=memory,
    )


if __name__ == "__main__":
    main()
