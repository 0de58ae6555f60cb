"""Perplexity at one window: peak memory by length, ours against transformers' plain forward pass.

    python benchmarks/ppl_memory.py            # 12k to 24k tokens; transformers needs 6 GiB
    python benchmarks/ppl_memory.py --quick    # 12k and 14k tokens

Claim: with a vocabulary of 32,000 a token of the window costs at most a tenth of the memory.

`ours` is `load_engine` and `perplexity` on one document, the truncated form; `theirs` is what the
released evaluation scripts do, `model(input_ids, labels=...)` with BOS in front, here without a
cache, with SDPA, under `no_grad`. Both load the same random Llama in fp32, with the same LongRoPE
factors, from an HF folder and from the Megatron checkpoint that `convert from-hf` makes of it, and
their perplexities must agree: it is the same work.

Each number is the growth of the resident set's peak in a fresh process that has loaded the weights,
touched all of them and scored a short window; the arms take turns, one thread each. The same malloc
settings hold for both: one arena, and blocks of 256 KiB and more straight from the system, so that
what is freed is gone. The slope is that of the least-squares line through all lengths. It consists
of, with vocabulary V, hidden size h and head dimension d in fp32,

    theirs   8 V          logits and, beside them, their log-softmax: 256,000 bytes of a token
    ours     40 h + 12 d  hidden states, queries, keys and values of the layer at work, and the
                          rotary table; logits exist some rows at a time, 64 MiB, and enter the
                          offset. With as many key heads as query heads.

So the ratio is about 5 h / V, a matter of this geometry: wide models hold more hidden state. In
fp32 and for h = 4096 the same formulas say 0.64; `--hidden-size` measures others. The lengths are
those at which attention has our peak; where the slices of logits have it, the slope would be lower
still (see docs/scoring.md). Two layers are enough, because a layer's memory is freed before the
next one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Megatron decorates small functions with torch.compile, which costs minutes on a CPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import measure
import numpy as np
import torch
from measure import HEAD_DIM, MALLOC, Geometry

from megatron_longrope.conversion.from_hf import write_checkpoint
from megatron_longrope.engine import load_engine
from megatron_longrope.evaluation.perplexity import perplexity
from megatron_longrope.local_folder import LOCAL_ONLY

ARMS = ("ours", "theirs")
GEOMETRY = Geometry(num_layers=2, hidden_size=512, vocab_size=32000)
BOS = 1
WARM_UP = 512  # tokens that load all code before memory is measured
AGREEMENT = 1e-4  # largest relative difference of the perplexities
FULL = (12288, 16384, 20480, 24576)
QUICK = (12288, 14336)


def make_checkpoints(directory: Path, geometry: Geometry, longest: int) -> None:
    """A random Llama as `directory/theirs` (HF folder) and `directory/ours` (Megatron)."""
    measure.write_llama(directory / "theirs", geometry, longest, bos_token_id=BOS)
    write_checkpoint(directory / "theirs", directory / "ours")


def scorer(arm: str, directory: Path) -> tuple[torch.nn.Module, Callable[[np.ndarray], float]]:
    """A loaded model, and its perplexity of a document (token ids without BOS)."""
    if arm == "ours":
        engine = load_engine(directory / "ours", dtype=torch.float32)

        def score(document: np.ndarray) -> float:
            return perplexity(engine.nll, [document], BOS, len(document) + 1).ppl_window_mean

        return engine.model, score

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory / "theirs", dtype=torch.float32, attn_implementation="sdpa", **LOCAL_ONLY
    ).eval()

    @torch.no_grad()
    def score(document: np.ndarray) -> float:
        tokens = torch.from_numpy(np.concatenate(([BOS], document)))[None]
        return float(model(tokens, labels=tokens, use_cache=False).loss.double().exp())

    return model, score


def print_peak(arm: str, directory: Path, length: int) -> None:
    """The other side of :func:`peak_of`."""
    torch.set_num_threads(1)
    model, score = scorer(arm, directory)
    for parameter in model.parameters():
        parameter.sum()  # weights that lie in a mapped file become resident now, not later
    vocab_size = next(p for p in model.parameters() if p.dim() == 2).shape[0]
    generator = np.random.default_rng(length)
    score(generator.integers(vocab_size, size=WARM_UP - 1))
    document = generator.integers(vocab_size, size=length - 1)
    found: list[float] = []
    peak = measure.peak_growth(lambda: found.append(score(document)))
    print(json.dumps({"peak_bytes": peak, "ppl": found[0]}))


def peak_of(arm: str, directory: Path, length: int) -> dict[str, Any]:
    """Peak memory and perplexity of one arm at one length, from a process of its own."""
    found = measure.in_own_process(__file__, "--peak", arm, directory, length, env=MALLOC)
    return {"arm": arm, "tokens": length, **found}


def measure_peaks(directory: Path, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """One row per arm and length; every other length begins with the other arm."""
    rows = []
    for turn, length in enumerate(lengths):
        for arm in ARMS[:: -1 if turn % 2 else 1]:
            rows.append(peak_of(arm, directory, length))
            print(f"{arm}, {length} tokens: done", file=sys.stderr, flush=True)
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Slopes, offsets, linearity and agreement of the rows of :func:`measure_peaks`.

    Raises:
        RuntimeError: The perplexities differ, so that the arms did not do the same work.
    """
    by_arm = {arm: {row["tokens"]: row for row in rows if row["arm"] == arm} for arm in ARMS}
    lengths = sorted(by_arm["ours"])
    difference = max(
        abs(by_arm["ours"][n]["ppl"] / by_arm["theirs"][n]["ppl"] - 1) for n in lengths
    )
    # Written so that NaN fails.
    if not difference <= AGREEMENT:
        raise RuntimeError(f"the perplexities differ by {difference:.1e}; it is not the same work")
    lines = {}
    for arm in ARMS:
        peaks = [by_arm[arm][n]["peak_bytes"] for n in lengths]
        slope, offset = statistics.linear_regression(lengths, peaks)
        errors = [abs(slope * n + offset - p) / p for n, p in zip(lengths, peaks, strict=True)]
        lines[arm] = slope, offset, max(errors)
    return {
        "ratio": round(lines["ours"][0] / lines["theirs"][0], 4),
        "slope_bytes_per_token": {arm: round(slope) for arm, (slope, _, _) in lines.items()},
        "offset_mib": {arm: round(offset / 2**20, 1) for arm, (_, offset, _) in lines.items()},
        "linearity_error": {arm: round(error, 4) for arm, (_, _, error) in lines.items()},
        "peak_ratio": {
            str(n): round(by_arm["ours"][n]["peak_bytes"] / by_arm["theirs"][n]["peak_bytes"], 4)
            for n in lengths
        },
        "ppl_relative_difference": difference,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; refuses what cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two lengths")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="two or more")
    parser.add_argument("--hidden-size", type=int, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--vocab-size", type=int, help="default 32000")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.lengths and len(set(options.lengths)) < 2:
        parser.error("a line needs two different lengths; give --lengths N M ...")
    if options.lengths and min(options.lengths) <= WARM_UP:
        parser.error(f"--lengths {min(options.lengths)} is within the warm-up; take > {WARM_UP}")
    if (options.hidden_size or 0) % HEAD_DIM:
        parser.error(f"--hidden-size {options.hidden_size} is no multiple of {HEAD_DIM}")
    return options


def main() -> None:
    """Measure, print a table and the result."""
    options = parse()
    if options.peak:
        arm, directory, length = options.peak
        print_peak(arm, Path(directory), int(length))
        return
    torch.set_num_threads(1)  # as the processes that are measured
    changes = {"hidden_size": options.hidden_size, "vocab_size": options.vocab_size}
    geometry = replace(GEOMETRY, **{name: value for name, value in changes.items() if value})
    lengths = sorted(set(options.lengths or (QUICK if options.quick else FULL)))
    measure.print_environment()
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoints(Path(directory), geometry, lengths[-1])
        rows = measure_peaks(Path(directory), lengths)
    summary = summarise(rows)
    cells = {(row["arm"], row["tokens"]): row for row in rows}
    measure.print_table(
        ("tokens", "ours MiB", "theirs MiB", "ratio", "ours ppl", "theirs ppl"),
        [
            (
                n,
                *(f"{cells[arm, n]['peak_bytes'] / 2**20:.1f}" for arm in ARMS),
                f"{summary['peak_ratio'][str(n)]:.4f}",
                *(f"{cells[arm, n]['ppl']:.3f}" for arm in ARMS),
            )
            for n in lengths
        ],
    )
    slopes = summary["slope_bytes_per_token"]
    print(
        f"bytes per token: ours {slopes['ours']}, theirs {slopes['theirs']}, ratio "
        f"{summary['ratio']:.4f}; perplexities differ by {summary['ppl_relative_difference']:.1e}"
    )
    changed = options.lengths or options.hidden_size or options.vocab_size
    measure.finish(
        "ppl_memory",
        summary.pop("ratio"),
        full_run=not (options.quick or changed),
        ratio_of="bytes of peak memory per token of the window, ours / transformers' forward pass "
        "with labels",
        **summary,
        geometry=asdict(geometry) | {"head_dim": HEAD_DIM},
        dtype="float32",
        malloc=MALLOC,
        peaks=rows,
        transformers=version("transformers"),
    )


if __name__ == "__main__":
    main()
