"""Which attention a run gets, with factors or without, and whether the norms beside it fit."""

from __future__ import annotations

import argparse

from megatron_longrope.errors import LongRopeError
from megatron_longrope.integration.compat import transformer_engine_version

OURS = ("flash", "sdpa")  # attention that the plugin provides


def attention_from_args(args: argparse.Namespace) -> str:
    """Resolve `--longrope-attention` to `te`, `flash`, `sdpa` or `local`.

    Raises:
        LongRopeError: The choice does not fit the transformer implementation or the parallel
            layout.
    """
    choice = getattr(args, "longrope_attention", "auto")
    is_local = args.transformer_impl == "local"
    if choice == "auto":
        if not is_local:
            return "te"
        choice = "flash" if _flash_attention_fits(args) else "sdpa"
    if choice == "te" and transformer_engine_version() is None:
        raise LongRopeError(
            "--longrope-attention te needs Transformer Engine, which is not installed; "
            "use --transformer-impl local with --longrope-attention sdpa"
        )
    if is_local == (choice == "te"):
        needed = "transformer_engine" if choice == "te" else "local"
        raise LongRopeError(
            f"--longrope-attention {choice} needs --transformer-impl {needed}, "
            f"got {args.transformer_impl}"
        )
    if choice == "flash" and (obstacle := flash_obstacle(_dropout(args))):
        raise LongRopeError(
            f"--longrope-attention flash needs a flash-attention package that runs here, but "
            f"{obstacle}; install one (pip install megatron-longrope[flash]) or use sdpa"
        )
    if choice == "local" and args.context_parallel_size > 1:
        raise LongRopeError(
            "--longrope-attention local cannot run context parallel size "
            f"{args.context_parallel_size}; use sdpa"
        )
    if choice in OURS and getattr(args, "reset_attention_mask", False):
        raise LongRopeError(
            f"--reset-attention-mask is not supported by {choice} attention, which is causal over "
            "the whole sample and would ignore document borders; remove the flag, pack documents "
            "with --dataloader-inter-document-masking, or use --longrope-attention local"
        )
    for flag in ("qk_clip", "log_max_attention_logit"):
        # Megatron reads the maxima after the first step, from a field of Transformer Engine's.
        if choice in OURS and getattr(args, flag, False):
            raise LongRopeError(
                f"--{flag.replace('_', '-')} is not supported by {choice} attention, which keeps "
                "no largest logits; remove the flag, or use --transformer-impl transformer_engine"
            )
    return choice


def flash_obstacle(dropout: float = 0.0) -> str | None:
    """Why no flash-attention package can run here, or train with dropout, or None."""
    from megatron_longrope.attention import flash_kernels

    return flash_kernels.obstacle(flash_kernels.capability(), dropout)


def _dropout(args: argparse.Namespace) -> float:
    return getattr(args, "attention_dropout", 0.0)


def _flash_attention_fits(args: argparse.Namespace) -> bool:
    import torch

    if getattr(args, "window_size", None) is not None:
        return False  # see FlashCoreAttention.windows
    half = getattr(args, "bf16", False) or getattr(args, "fp16", False)
    return bool(half and torch.cuda.is_available() and flash_obstacle(_dropout(args)) is None)


def check_norms(args: argparse.Namespace) -> None:
    """Check what Megatron's local implementation only asserts: its RMSNorm is torch's.

    Raises:
        LongRopeError: Sequence parallelism, or a kernel that torch's norm does not have.
    """
    if args.transformer_impl != "local" or getattr(args, "normalization", None) != "RMSNorm":
        return
    flags = []
    if getattr(args, "sequence_parallel", False):
        flags.append("remove --sequence-parallel")
    if not getattr(args, "no_persist_layer_norm", True):
        flags.append("add --no-persist-layer-norm")
    if flags:
        raise LongRopeError(
            "RMSNorm of --transformer-impl local is torch's, without sequence parallelism or a "
            f"persistent kernel; {' and '.join(flags)}, or use --transformer-impl "
            "transformer_engine"
        )
