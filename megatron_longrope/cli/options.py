"""Options that several commands share."""

from __future__ import annotations

import argparse

from megatron_longrope.lengths import parse_length, parse_lengths


def length(text: str) -> int:
    """argparse type of one length."""
    try:
        return parse_length(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def lengths(text: str) -> list[int]:
    """argparse type of a comma-separated list of lengths."""
    try:
        return parse_lengths(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def choices(*allowed: str):
    """argparse type of a comma-separated choice among `allowed`."""

    def parse(text: str) -> list[str]:
        values = [part.strip() for part in text.split(",") if part.strip()]
        if wrong := [value for value in values if value not in allowed]:
            raise argparse.ArgumentTypeError(
                f"{wrong[0]!r} is unknown; choose among {', '.join(allowed)}"
            )
        return values

    return parse


def add_model(parser: argparse.ArgumentParser) -> None:
    """Flags that say which model is loaded, and how."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--load",
        required=True,
        metavar="CKPT",
        help="Megatron checkpoint: a run's --save directory",
    )
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


def load_engine_from(args: argparse.Namespace, config=None, **options):
    """The engine that the model flags describe."""
    import torch

    from megatron_longrope.engine import load_engine

    return load_engine(
        args.load,
        longrope_config=config,
        iteration=args.iteration,
        tensor_parallel=args.tensor_model_parallel_size,
        context_parallel=args.context_parallel_size,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        **options,
    )


def original_window(args: argparse.Namespace, engine) -> int:
    """The pre-trained window: the flag, else what the checkpoint says."""
    return args.original_length or engine.config.original_max_position_embeddings


def read_samples(prefix: str, length: int, count: int, windows: int = 1):
    """Token ids of the first `count` documents that fill `windows` windows, and the BOS id.

    Raises:
        ValueError: Too few documents are that long, or the set's tokenizer has no BOS.
    """
    from megatron_longrope.data.documents import read_documents_with_bos

    return read_documents_with_bos(prefix, windows * (length - 1), count)
