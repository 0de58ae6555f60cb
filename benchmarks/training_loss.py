"""Training loss forward and backward: peak memory and time, in chunks against Megatron's own.

    python benchmarks/training_loss.py            # 4096 tokens; Megatron's needs 2.2 GiB
    python benchmarks/training_loss.py --quick    # 1024 tokens, one round

Claim: with a vocabulary of 131,072 the chunks need less than a fifth of the memory.

`ours` is `chunked_linear_cross_entropy`, `stock` Megatron's column-parallel product and then its
vocabulary-parallel cross-entropy: what `--longrope-chunked-loss` replaces. Both take the same
random hidden states [s, 1, h] and weights [V, h] in fp32 and give the loss of every token and both
gradients, whose sums must agree: it is the same work.

Each number comes from a process of its own that has made the inputs and has done the same on a few
tokens; the arms take turns, one thread each, with malloc settings that return freed memory. Memory
is the growth of the resident set's peak, time what the process computed. In fp32, with c tokens in
a chunk,

    stock   4 V (s + h)   logits, softmax and gradient in one place, and the weights' gradient
    ours    4 V (c + h)   the same of a chunk, and the same gradient of the weights

and the hidden states' gradient in both. Half-precision inputs make it 6 V s and 6 V c, with 6 V h
for ours: there a second copy of the logits is in the inputs' type. Logits are computed twice: the
floor of the time is 4/3 where products of matrices dominate; in a model as narrow as this one the
exponentials, twice too, add to it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

# Megatron decorates small functions with torch.compile, which costs minutes on a CPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import measure
import torch

from megatron_longrope.training_loss import chunked_linear_cross_entropy

ARMS = ("ours", "stock")
VOCABULARIES = (32000, 131072)
WARM_UP = 16  # tokens that load all code before anything is measured
AGREEMENT = 1e-4  # largest relative difference of the sums


def stock_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What Megatron's output layer and loss do on one rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers, vocab_parallel_cross_entropy

    logits = layers.linear_with_grad_accumulation_and_async_allreduce(
        hidden,
        weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    return vocab_parallel_cross_entropy(logits, labels)


def print_step(arm: str, tokens: int, hidden_size: int, vocabulary: int, chunk: int) -> None:
    """One step of one arm, in a process of its own: print peak memory, time and sums."""
    from megatron_longrope.engine import process_groups

    torch.set_num_threads(1)
    process_groups.initialize()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 1, hidden_size, generator=generator)
    weight = torch.randn(vocabulary, hidden_size, generator=generator).mul_(hidden_size**-0.5)
    labels = torch.randint(0, vocabulary, (tokens, 1), generator=generator)
    seconds: list[float] = []

    def step(count: int) -> list[torch.Tensor]:
        states, rows = hidden[:count].requires_grad_(), weight.detach().requires_grad_()
        start = time.process_time()
        if arm == "ours":
            losses = chunked_linear_cross_entropy(states, rows, labels[:count], chunk_tokens=chunk)
        else:
            losses = stock_loss(states, rows, labels[:count])
        losses.mean().backward()
        seconds.append(time.process_time() - start)
        return [losses.detach(), states.grad, rows.grad]

    step(WARM_UP)
    found: list[list[torch.Tensor]] = []
    peak = measure.peak_growth(lambda: found.append(step(tokens)))
    sums = [float(x.double().abs().sum()) for x in found[0]]
    print(json.dumps({"peak_bytes": peak, "seconds": seconds[-1], "sums": sums}))


def measure_vocabulary(
    tokens: int, hidden_size: int, vocabulary: int, chunk: int, repeats: int
) -> dict[str, Any]:
    """Medians of both arms, which take turns."""
    steps: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for turn in range(repeats):
        for arm in ARMS[:: -1 if turn % 2 else 1]:
            sizes = (tokens, hidden_size, vocabulary, chunk)
            step = measure.in_own_process(__file__, "--step", arm, *sizes, env=measure.MALLOC)
            steps[arm].append(step)
    for ours, theirs in zip(*(steps[arm][0]["sums"] for arm in ARMS), strict=True):
        if abs(ours - theirs) > AGREEMENT * abs(theirs):
            raise RuntimeError(f"the arms disagree: {ours} and {theirs} are not the same work")

    def median(arm: str, key: str) -> float:
        return statistics.median(step[key] for step in steps[arm])

    row: dict[str, Any] = {"vocabulary": vocabulary, "tokens": tokens}
    for key in ("peak_bytes", "seconds"):
        row[key] = {arm: median(arm, key) for arm in ARMS}
        row[f"{key}_ratio"] = row[key]["ours"] / row[key]["stock"]
    return row


def main() -> None:
    """Print a table and the result line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1024 tokens, one round")
    parser.add_argument("--tokens", type=int, help="tokens of the sequence; default 4096")
    parser.add_argument("--hidden-size", type=int, default=256, help="width; default 256")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a chunk; default 128")
    parser.add_argument("--repeats", type=int, help="rounds; default 3")
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print_step(options.step[0], *map(int, options.step[1:]))
        return
    tokens = options.tokens or (1024 if options.quick else 4096)
    repeats = options.repeats or (1 if options.quick else 3)
    torch.set_num_threads(1)
    measure.print_environment()
    rows = [
        measure_vocabulary(tokens, options.hidden_size, vocabulary, options.chunk, repeats)
        for vocabulary in options.vocabularies
    ]
    measure.print_table(
        ("vocabulary", "ours MiB", "stock MiB", "ratio", "ours s", "stock s", "ratio"),
        [
            (
                row["vocabulary"],
                *(f"{row['peak_bytes'][arm] / 2**20:.0f}" for arm in ARMS),
                f"{row['peak_bytes_ratio']:.3f}",
                *(f"{row['seconds'][arm]:.2f}" for arm in ARMS),
                f"{row['seconds_ratio']:.2f}",
            )
            for row in rows
        ],
    )
    is_full = not options.quick and sys.argv[1:] == []
    measure.finish(
        "training_loss",
        rows[-1]["peak_bytes_ratio"],
        full_run=is_full,
        ratio_of=f"peak bytes of loss forward and backward, vocabulary {rows[-1]['vocabulary']}",
        time_ratio=rows[-1]["seconds_ratio"],
        tokens=tokens,
        hidden_size=options.hidden_size,
        chunk_tokens=options.chunk,
        repeats=repeats,
        rows=rows,
    )


if __name__ == "__main__":
    main()
