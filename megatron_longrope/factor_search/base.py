"""What a search command extends: the options that decide it, checked against the model."""

from __future__ import annotations

import math

from megatron_longrope.checkpoint.loader import Checkpoint
from megatron_longrope.checkpoint.opening import check_fits, model_config, warn_of_window
from megatron_longrope.config import LongRopeConfig, identity_config
from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.options import SearchOptions
from megatron_longrope.factor_search.space import START_TOKENS
from megatron_longrope.ranks import rank


def base_of(args: SearchOptions, checkpoint: Checkpoint) -> LongRopeConfig:
    """What the search extends: given factors, the model's own, or plain RoPE.

    Raises:
        LongRopeError: An option contradicts them, or given factors are another model's.
    """
    if args.attention_factor not in (None, "longest"):
        try:
            valid = 0 < float(args.attention_factor) < math.inf
        except ValueError:
            valid = False
        if not valid:
            raise LongRopeError(
                f"--attention-factor {args.attention_factor} must be a finite number above 0, or "
                "`longest`"
            )
    shape, stored = checkpoint.shape, checkpoint.longrope
    if args.base_config and args.base_config != "none":
        base = LongRopeConfig.load(args.base_config)
        check_fits(base, shape, stored)
        window = base.original_max_position_embeddings
        if args.original_length not in (None, window):
            raise LongRopeError(
                f"--original-length {args.original_length} contradicts --base-config "
                f"{args.base_config}, made for {window}; leave it out"
            )
        if args.original_length is None:
            warn_of_window(base, args.base_config, checkpoint)
    elif stored is None or not args.base_config:
        base = model_config(checkpoint, args.original_length)
        if stored and not stored.is_bare and rank() == 0:
            windows = ", ".join(str(item.max_length) for item in stored.factor_sets)
            print(
                f"the base is the model's own factors, for {windows} tokens (attention factor "
                f"{stored.attention_factor_for(stored.max_length):.6g} at the longest); "
                "--base-config none would leave them out",
                flush=True,
            )
    else:
        window = args.original_length or stored.original_max_position_embeddings
        own = stored.base_frequencies
        base = identity_config(shape.rotary_base, shape.rotary_dim, window, own)
    if (
        args.attention_factor == "longest"
        and base.max_length == base.original_max_position_embeddings
    ):
        raise LongRopeError(
            "--attention-factor longest takes the value that the model was tuned with, and plain "
            "RoPE has none: leave it out, or give the tuned model's --base-config"
        )
    return base


def start_token_choices(text: str | None) -> tuple[int, ...] | None:
    """Read --start-tokens; None leaves the choice to the problem.

    Raises:
        LongRopeError: No list of integers.
    """
    if text is None:
        return None
    if text == "paper":
        return START_TOKENS
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise LongRopeError(
            f"--start-tokens {text!r} must be integers, for example 0,2,4, or `paper`"
        ) from None
