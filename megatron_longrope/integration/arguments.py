"""The `--longrope-*` flags of Megatron scripts and their check against Megatron's own flags."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.context_parallel import check_divisible
from megatron_longrope.integration.compat import transformer_engine_version

# Above this a dense [s, s] mask from the data loader is no longer affordable (4 GiB of bools).
DENSE_MASK_LIMIT = 65536


@dataclass(frozen=True)
class LongRopeSettings:
    """What a training run does with LongRoPE."""

    config: LongRopeConfig
    """Factor sets."""

    mode: str = "auto"
    """`auto`, `long` or `short`: which factor set a sequence uses."""

    carrier: str = "softmax"
    """`softmax` or `rope`: where the attention factor is applied."""

    attention_factor: float = 1.0
    """Multiplier of q and k at the run's sequence length."""

    hf_parity: bool = False
    """fp32 angles as transformers computes them."""


def add_longrope_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags; fits Megatron's `extra_args_provider`."""
    group = parser.add_argument_group(title="longrope")
    group.add_argument(
        "--longrope-config",
        metavar="PATH",
        help="JSON file with the LongRoPE factor sets; without it the model keeps stock RoPE",
    )
    group.add_argument(
        "--longrope-mode",
        choices=("auto", "long", "short"),
        default="auto",
        help="factor set of a sequence: by its length (auto), always the largest (long), always "
        "the original window's (short)",
    )
    group.add_argument(
        "--longrope-attention",
        choices=("auto", "te", "sdpa", "local"),
        default="auto",
        help="core attention: Transformer Engine, torch SDPA (CPU and CUDA, context parallel), or "
        "Megatron's local one; auto takes sdpa wherever Transformer Engine is absent or the "
        "transformer implementation is local",
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
    return parser


def attention_from_args(args: argparse.Namespace) -> str:
    """Resolve `--longrope-attention` to `te`, `sdpa` or `local`.

    Raises:
        ValueError: The choice does not fit the transformer implementation or the parallel layout.
    """
    choice = getattr(args, "longrope_attention", "auto")
    is_local = args.transformer_impl == "local"
    if choice == "auto":
        if not is_local:
            return "te"
        choice = "sdpa"
    if choice == "te" and transformer_engine_version() is None:
        raise ValueError(
            "--longrope-attention te needs Transformer Engine, which is not installed; "
            "use --transformer-impl local with --longrope-attention sdpa"
        )
    if choice != "te" and not is_local:
        raise ValueError(
            f"--longrope-attention {choice} needs --transformer-impl local, "
            f"got {args.transformer_impl}"
        )
    if choice == "local" and args.context_parallel_size > 1:
        raise ValueError(
            "--longrope-attention local cannot run context parallel size "
            f"{args.context_parallel_size}; use sdpa"
        )
    if choice == "sdpa" and getattr(args, "reset_attention_mask", False):
        raise ValueError(
            "--reset-attention-mask is not supported by sdpa attention, which is causal over the "
            "whole sample and would ignore document borders; remove the flag or use "
            "--longrope-attention local"
        )
    return choice


def settings_from_args(args: argparse.Namespace) -> LongRopeSettings | None:
    """Read and check the flags after Megatron has validated its own; None without a config.

    The factors are also stored in `args` by value (`longrope_config_value`), so that every
    checkpoint of the run holds them.

    Raises:
        ValueError: A combination that would train a different model than asked for.
    """
    path = getattr(args, "longrope_config", None)
    if not path:
        return None
    _refuse_other_scaling(args)
    config = LongRopeConfig.load(path)
    head_dim = args.kv_channels
    rotary_dim = int(head_dim * args.rotary_percent)
    _check_geometry(args, config, rotary_dim)
    check_divisible(args.seq_length, args.context_parallel_size)
    length = config.original_max_position_embeddings
    if args.longrope_mode == "auto":
        length = config.factor_set_for(args.seq_length).max_length
    elif args.longrope_mode == "long":
        config.factor_set_for(args.seq_length)
        length = config.max_length
    if args.seq_length >= DENSE_MASK_LIMIT and args.create_attention_mask_in_dataloader:
        raise ValueError(
            f"sequence length {args.seq_length} with a dense attention mask from the data loader "
            f"would build a {args.seq_length} x {args.seq_length} mask per sample; add "
            "--no-create-attention-mask-in-dataloader (attention is causal without it)"
        )
    factor = config.attention_factor_for(length)
    carrier = _carrier(args, factor, whole_head=rotary_dim == head_dim)
    if carrier == "softmax" and factor != 1.0:
        scale = factor**2 / math.sqrt(head_dim)
        if getattr(args, "softmax_scale", None) not in (None, scale):
            raise ValueError(
                f"softmax_scale {args.softmax_scale} is already set, so the attention factor has "
                "no room there; use --longrope-attention-factor-carrier rope"
            )
        # Megatron copies every args field that TransformerConfig knows: this one is our carrier.
        args.softmax_scale = scale
    args.longrope_config_value = config.to_dict()
    args.longrope_attention_factor = factor
    return LongRopeSettings(
        config=config,
        mode=args.longrope_mode,
        carrier=carrier,
        attention_factor=factor,
        hf_parity=args.longrope_hf_parity,
    )


def _carrier(args: argparse.Namespace, factor: float, *, whole_head: bool) -> str:
    choice = args.longrope_attention_factor_carrier
    if choice == "auto":
        choice = "softmax" if whole_head else "rope"
    if choice == "softmax" and not whole_head and factor != 1.0:
        raise ValueError(
            f"rotary_percent {args.rotary_percent} rotates a part of each head, and the softmax "
            "scale would also multiply the rest; use --longrope-attention-factor-carrier rope"
        )
    return choice


def _check_geometry(args: argparse.Namespace, config: LongRopeConfig, rotary_dim: int) -> None:
    if config.rotary_dim != rotary_dim:
        raise ValueError(
            f"{args.longrope_config}: rotary_dim {config.rotary_dim} differs from this model's "
            f"{rotary_dim} (kv_channels {args.kv_channels} x rotary_percent {args.rotary_percent})"
        )
    if float(config.rotary_base) != float(args.rotary_base):
        raise ValueError(
            f"{args.longrope_config}: rotary_base {config.rotary_base:g} differs from "
            f"--rotary-base {args.rotary_base}; give the base that the model was trained with"
        )


def _refuse_other_scaling(args: argparse.Namespace) -> None:
    def refuse(flag: str, reason: str) -> None:
        raise ValueError(f"--longrope-config cannot be combined with {flag}: {reason}")

    def get(name: str) -> Any:
        return getattr(args, name, None)

    if get("position_embedding_type") != "rope":
        refuse(
            f"--position-embedding-type {get('position_embedding_type')}",
            "LongRoPE rescales RoPE; use --position-embedding-type rope",
        )
    if get("multi_latent_attention"):
        refuse("--multi-latent-attention", "its attention builds a rotary embedding of its own")
    if get("use_rope_scaling"):
        refuse("--use-rope-scaling", "it would scale the frequencies twice")
    if get("rotary_seq_len_interpolation_factor") is not None:
        refuse("--rotary-seq-len-interpolation-factor", "it would interpolate the positions twice")
    if get("hybrid_context_parallel"):
        refuse("--hybrid-context-parallel", "its ranks would get another rank's positions")
    if get("dataloader_inter_document_masking"):
        refuse(
            "--dataloader-inter-document-masking",
            "packed sequences with LongRoPE are not supported yet",
        )
