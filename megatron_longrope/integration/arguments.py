"""The `--longrope-*` flags of Megatron scripts."""

from __future__ import annotations

import argparse

from megatron_longrope.selection import MODES
from megatron_longrope.training_loss import DEFAULT_CHUNK


def add_longrope_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags; fits Megatron's `extra_args_provider`.

    A parser that has them already, that of a patched Megatron, is left as it is.
    """
    if "--longrope-config" in parser._option_string_actions:
        return parser
    group = parser.add_argument_group(title="longrope")
    group.add_argument(
        "--longrope-config",
        metavar="PATH",
        help="JSON file with the LongRoPE factor sets; without it the model keeps stock RoPE",
    )
    group.add_argument(
        "--longrope-mode",
        choices=MODES,
        help="factor set of a sequence: by the run's sequence length (auto), always the largest "
        "(long), always the original window's (short), or by packed document: the original "
        "window's up to that window, the run's beyond (mixed). Without the flag: the mode of the "
        "checkpoint that --use-checkpoint-args restores, else auto",
    )
    group.add_argument(
        "--longrope-attention",
        choices=("auto", "te", "flash", "sdpa", "local"),
        default="auto",
        help="core attention: Transformer Engine, flash-attn, torch SDPA (also on CPU), or "
        "Megatron's local one, which knows no context parallelism; auto takes te with "
        "--transformer-impl transformer_engine, otherwise flash where flash-attn, CUDA and half "
        "precision meet, and sdpa elsewhere",
    )
    group.add_argument(
        "--longrope-attention-factor-carrier",
        choices=("auto", "softmax", "rope"),
        default="auto",
        help="apply the attention factor through the softmax scale (keeps fused RoPE kernels) or "
        "through cos/sin; auto takes softmax when every head dimension is rotated",
    )
    group.add_argument(
        "--longrope-hf-parity",
        action="store_true",
        help="compute angles as transformers does (fp32 product) instead of exactly",
    )
    group.add_argument(
        "--longrope-replace-factors",
        action="store_true",
        help="go on from a checkpoint that was trained with other LongRoPE factors than "
        "--longrope-config holds (the next stage, for example 128k to 256k) and record both in the "
        "lineage; without it such a checkpoint is refused",
    )
    group.add_argument(
        "--longrope-chunked-loss",
        metavar="TOKENS",
        nargs="?",
        type=int,
        const=DEFAULT_CHUNK,
        help="compute the training loss in chunks of so many tokens (without a number: "
        f"{DEFAULT_CHUNK}) instead of building the logits of the whole sequence; the backward pass "
        "computes them once more",
    )
    return parser
