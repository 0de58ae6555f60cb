"""A training step with the plugin, against the same step with stock RoPE.

    python benchmarks/step_overhead.py            # 2k and 4k tokens
    python benchmarks/step_overhead.py --quick    # 1k tokens

Claim: the plugin costs at most 1 % of a step. Both arms are the same megatron-core GPTModel (local
layer spec with the plugin's SDPA attention, which stock cannot replace on a CPU), the same weights
and the same tokens; they differ in the rotary module and in the attention factor, which rides on
the softmax scale. A step is forward, backward and SGD. The arms take turns, step by step, in one
process and on one thread; a step's cost is the CPU time of the process, which other work on the
machine disturbs less than wall time, and the ratio is the median over neighbouring steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# Megatron decorates small functions with torch.compile, which costs minutes on a CPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import measure
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longrope.attention import SdpaCoreAttention
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.engine import process_groups
from megatron_longrope.engine.model import set_attention_factor
from megatron_longrope.integration import cpu_host
from megatron_longrope.methods import yarn_factors
from megatron_longrope.rotary import LongRopeRotaryEmbedding

ROTARY_BASE = 10000.0
EXTENSION = 8  # the original window is an eighth of the sequence
REPEATS = 41
QUICK_REPEATS = 7


@dataclass(frozen=True)
class Shape:
    """Size of a model and of its one sequence."""

    seq_length: int
    hidden_size: int
    num_layers: int
    num_heads: int = 4
    vocab_size: int = 2048

    @property
    def head_dim(self) -> int:
        """All of it rotates."""
        return self.hidden_size // self.num_heads


SHAPES = (Shape(2048, 256, 4), Shape(4096, 256, 4))
QUICK_SHAPES = (Shape(1024, 256, 4),)


def build_model(shape: Shape) -> GPTModel:
    """A Llama-type model with stock RoPE, the same weights on every call."""
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=8 * shape.hidden_size // 3,
        num_attention_heads=shape.num_heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.seq_length,
        position_embedding_type="rope",
        rotary_base=ROTARY_BASE,
    ).train()


def install_plugin(model: GPTModel, shape: Shape) -> None:
    """Give the model LongRoPE's rotary module and attention factor."""
    window = shape.seq_length // EXTENSION
    factors = yarn_factors(shape.head_dim, EXTENSION, ROTARY_BASE, window)
    sets = (FactorSet(shape.seq_length, tuple(factors)),)
    config = LongRopeConfig(ROTARY_BASE, shape.head_dim, window, sets)
    model.rotary_pos_emb = LongRopeRotaryEmbedding(config, shape.head_dim)
    set_attention_factor(model, model.rotary_pos_emb.attention_factor(shape.seq_length))


def training_step(model: GPTModel, shape: Shape) -> Callable[[], float]:
    """A function that does one step and returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape.vocab_size, (1, shape.seq_length + 1), generator=generator)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        # RoPE models read no position ids; the attention is causal by construction.
        losses = model(tokens[:, :-1], None, None, labels=tokens[:, 1:])
        loss = losses.mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def compare(shape: Shape, repeats: int) -> dict[str, Any]:
    """One row of the result."""
    stock, plugin = build_model(shape), build_model(shape)
    install_plugin(plugin, shape)
    samples = measure.sample_interleaved(
        {"stock": training_step(stock, shape), "plugin": training_step(plugin, shape)},
        repeats,
        warmup=2,
        clock=time.process_time,
    )
    quartiles = measure.paired_ratios(samples["plugin"], samples["stock"])
    return {
        **asdict(shape),
        "seconds": {name: round(statistics.median(x), 6) for name, x in samples.items()},
        "fastest_seconds": {name: round(min(x), 6) for name, x in samples.items()},
        "ratio": round(quartiles[1], 4),
        "ratio_quartiles": [round(value, 4) for value in quartiles],
    }


def main() -> None:
    """Measure, print a table and the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats")
    parser.add_argument("--seq-length", type=int, help="one tiny model with this many tokens")
    parser.add_argument("--repeats", type=int, help="steps of each arm that are timed")
    options = parser.parse_args()
    shapes = QUICK_SHAPES if options.quick else SHAPES
    if options.seq_length:
        shapes = (Shape(options.seq_length, 64, 2),)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    torch.set_num_threads(1)
    cpu_host.enable()  # stock's rotary module asks CUDA for a device
    process_groups.initialize()
    measure.print_environment()
    rows = []
    for shape in shapes:
        rows.append(compare(shape, repeats))
        print(f"{shape.seq_length} tokens: done", file=sys.stderr, flush=True)
    measure.print_table(
        ("tokens", "hidden", "layers", "stock ms", "plugin ms", "ratio"),
        [
            (
                row["seq_length"],
                row["hidden_size"],
                row["num_layers"],
                *(f"{1e3 * row['seconds'][name]:.1f}" for name in ("stock", "plugin")),
                f"{row['ratio']:.4f}",
            )
            for row in rows
        ],
    )
    measure.finish(
        "step_overhead",
        max(row["ratio"] for row in rows),
        full_run=not (options.quick or options.seq_length or options.repeats),
        ratio_of="CPU seconds of a training step, plugin / stock, median over neighbouring steps, "
        "worst shape",
        repeats=repeats,
        rows=rows,
    )


if __name__ == "__main__":
    main()
