"""Options that several commands share."""

from __future__ import annotations

import argparse

from megatron_longrope.lengths import parse_length


def length(text: str) -> int:
    """argparse type of one length."""
    try:
        return parse_length(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_bos(parser) -> None:
    """The flag of the token before every window and segment."""
    parser.add_argument(
        "--bos",
        type=int,
        metavar="ID",
        help="token id before every window or segment (default: the tokenizer's BOS; nothing where "
        "it has none, as Qwen's)",
    )


def add_sliding_window(parser) -> None:
    """The flag of a Hugging Face folder's sliding window."""
    parser.add_argument(
        "--sliding-window",
        choices=("refuse", "drop", "keep"),
        default="refuse",
        help="of a Hugging Face model with one that its sequences exceed: refuse it; drop the "
        "window and attend in full, as LongRoPE's authors do with Mistral v0.1; or keep it, as "
        "Megatron's --window-size (default: refuse)",
    )


def add_model(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Flags that say which model is loaded, and how.

    Args:
        several (bool): Any number of models, each with a label if wanted; `args.load` and `args.hf`
            are then lists.
    """
    group = parser.add_argument_group("model")
    how = {"action": "append", "default": []} if several else {}
    label = "[LABEL=]" if several else ""
    more = "; may be given several times" if several else ""
    either = group if several else group.add_mutually_exclusive_group(required=True)
    either.add_argument(
        "--load",
        metavar=f"{label}CKPT",
        help=f"Megatron checkpoint: a run's --save directory{more}",
        **how,
    )
    either.add_argument(
        "--hf",
        metavar=f"{label}DIR",
        help=f"local Hugging Face folder, read as it is{more}",
        **how,
    )
    add_sliding_window(group)
    group.add_argument("--iteration", type=int, help="iteration to load (default: the latest)")
    group.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, metavar="TP", help="under torchrun"
    )
    group.add_argument(
        "--context-parallel-size", type=int, default=1, metavar="CP", help="under torchrun"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="computation type (default: float32 on a CPU, the checkpoint's on a GPU)",
    )


def load_engine_from(args: argparse.Namespace, source, config=None, **options):
    """The engine of an opened checkpoint, as the model flags describe it."""
    import torch

    from megatron_longrope.engine import load_engine

    return load_engine(
        source,
        longrope_config=config,
        tensor_parallel=args.tensor_model_parallel_size,
        context_parallel=args.context_parallel_size,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        **options,
    )
