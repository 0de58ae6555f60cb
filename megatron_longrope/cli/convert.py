"""`longrope convert`: to-hf, from-hf, verify, inspect."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from typing import Any

from megatron_longrope.cli.byte_progress import ByteProgress, interruptible
from megatron_longrope.cli.options import add_sliding_window
from megatron_longrope.errors import LongRopeError
from megatron_longrope.lengths import parse_length


def add_parser(commands: Any) -> None:
    """Register the command and its actions."""
    parser = commands.add_parser(
        "convert",
        help="Megatron checkpoint to Hugging Face folder and back",
        description="Convert Megatron checkpoints to Hugging Face folders and back.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    to_hf = actions.add_parser("to-hf", help="write a Hugging Face folder and verify it")
    _add_checkpoint(to_hf)
    to_hf.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    to_hf.add_argument(
        "--tokenizer",
        metavar="T",
        help="SentencePiece .model file or Hugging Face folder to include",
    )
    to_hf.add_argument(
        "--family",
        help="model family (default: the one converted from, else the first that fits)",
    )
    to_hf.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    _add_effect(to_hf)
    to_hf.set_defaults(run=interruptible(_run_to_hf))

    from_hf = actions.add_parser(
        "from-hf", help="write a Megatron checkpoint, verify it, print the flags of the model"
    )
    from_hf.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder to read")
    from_hf.add_argument(
        "--output", required=True, metavar="CKPT", help="Megatron --load directory to write"
    )
    from_hf.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="pad the vocabulary to a multiple of N rows per rank (default: %(default)s)",
    )
    from_hf.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="ranks to pad the vocabulary for; tensors are not split (default: %(default)s)",
    )
    add_sliding_window(from_hf)
    from_hf.set_defaults(run=interruptible(_run_from_hf))
    for command in (to_hf, from_hf):
        command.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16", "keep"),
            default="keep",
            help="dtype of the weights (default: as on disk)",
        )
        command.add_argument(
            "--no-verify",
            action="store_true",
            help="do not compare logits before finishing, which holds the model in memory twice, "
            "in fp32",
        )

    verify = actions.add_parser(
        "verify",
        help="compare the logits of checkpoint and folder",
        description="Compare the logits of a checkpoint and a folder; without --load, those of "
        "transformers and of this package's engine on the folder.",
    )
    _add_checkpoint(verify, required=False)
    verify.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.set_defaults(run=_run_verify)
    for command in (to_hf, from_hf, verify):
        command.add_argument(
            "--tolerance",
            type=float,
            default=1e-4,
            help="largest difference of a logit (default: %(default)g)",
        )

    inspect = actions.add_parser("inspect", help="show what a checkpoint holds")
    inspect.add_argument("checkpoint", metavar="CKPT", help="--save or iter_XXXXXXX directory")
    inspect.add_argument("--iteration", type=int, help="iteration (default: the latest)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_run_inspect)


def _add_checkpoint(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--load",
        required=required,
        metavar="CKPT",
        help="Megatron --save or iter_XXXXXXX directory",
    )
    parser.add_argument("--iteration", type=int, help="iteration (default: the latest)")
    parser.add_argument(
        "--longrope-config",
        metavar="F",
        help="factors to export (default: those stored in the checkpoint)",
    )
    parser.add_argument(
        "--short-length",
        metavar="N",
        help="window, in tokens, whose set becomes short_factor (default: the original window)",
    )
    parser.add_argument(
        "--target-length",
        metavar="N",
        help="window, in tokens, whose set becomes long_factor (default: the largest)",
    )
    parser.add_argument(
        "--drop-start-tokens",
        action="store_true",
        help="take factor sets with start tokens, which transformers cannot express, without them",
    )


def _add_effect(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what --drop-start-tokens does to the perplexity")
    group.add_argument(
        "--data",
        metavar="PREFIX|TEXT",
        help="held-out documents to measure it on: a prepared set, or a .txt, .jsonl or .jsonl.gz "
        "file or directory, for which --tokenizer is needed (default: it is not measured)",
    )
    group.add_argument(
        "--num-documents", type=int, default=10, metavar="K", help="documents (default: 10)"
    )
    group.add_argument(
        "--data-length",
        metavar="N",
        help="longest window, in tokens, to measure (default: those exported for)",
    )


def _run_to_hf(args: argparse.Namespace) -> int:
    from megatron_longrope.checkpoint import MegatronCheckpoint
    from megatron_longrope.conversion import convert_to_hf
    from megatron_longrope.conversion.families import dtype_named
    from megatron_longrope.conversion.start_tokens import drop_start_tokens
    from megatron_longrope.conversion.verify import verify

    if args.data and not args.drop_start_tokens:
        raise LongRopeError("--data measures what --drop-start-tokens does; give both or neither")
    shared = _shared_options(args)
    lengths = {name: shared[name] for name in ("short_length", "target_length")}
    exported = shared["longrope_config"]
    if args.drop_start_tokens:
        exported, _ = drop_start_tokens(exported, **lengths)

    def check(folder: Any) -> Any:
        checkpoint = MegatronCheckpoint.open(args.load, args.iteration)
        _say_memory(checkpoint)
        return verify(
            args.load,
            folder,
            tolerance=args.tolerance,
            **{**shared, "longrope_config": exported},
        )

    report = convert_to_hf(
        args.load,
        args.output,
        tokenizer=args.tokenizer,
        without_start_tokens=args.drop_start_tokens,
        measure=_measure(args, lengths) if args.data else None,
        dtype=None if args.dtype == "keep" else dtype_named(args.dtype),
        family=args.family,
        overwrite=args.overwrite,
        check=None if args.no_verify else check,
        progress=ByteProgress("writing"),
        **shared,
    )
    for item in report.dropped_start_tokens:
        print(item.describe())
    for remark in report.remarks:
        print(f"note: {remark}")
    if report.verification is None:
        print("not verified (--no-verify)")
    else:
        _print_verification(report.verification)
    print(
        f"wrote {report.output_dir}: {report.family}, {report.num_tensors} tensors, "
        f"{report.num_bytes} bytes in {len(report.files)} file(s), {report.dtype}, "
        f"vocabulary {report.vocab_size}, window {report.max_position_embeddings} tokens"
    )
    return 0


def _measure(args: argparse.Namespace, lengths: dict[str, int | None]) -> Callable[..., Any]:
    from megatron_longrope.cli.start_token_effect import measured

    def measure(config: Any, dropped: Any) -> Any:
        return measured(
            args.load,
            args.iteration,
            config,
            dropped,
            data=args.data,
            tokenizer=args.tokenizer,
            num_documents=args.num_documents,
            data_length=args.data_length and parse_length(args.data_length),
            **lengths,
        )

    return measure


def _run_from_hf(args: argparse.Namespace) -> int:
    from megatron_longrope.checkpoint import MegatronCheckpoint
    from megatron_longrope.conversion.families import dtype_named
    from megatron_longrope.conversion.from_hf import convert_from_hf
    from megatron_longrope.conversion.megatron_args import divisor_without_padding
    from megatron_longrope.conversion.verify_import import verify_import

    def check(directory: Any) -> Any:
        _say_memory(MegatronCheckpoint.open(directory))
        return verify_import(
            directory, args.hf, tolerance=args.tolerance, sliding_window=args.sliding_window
        )

    report = convert_from_hf(
        args.hf,
        args.output,
        dtype=None if args.dtype == "keep" else dtype_named(args.dtype),
        make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        sliding_window=args.sliding_window,
        check=None if args.no_verify else check,
        progress=ByteProgress("writing"),
    )
    if report.verification is None:
        print("not verified (--no-verify)")
    else:
        _print_verification(report.verification)
    shape = report.shape
    print(
        f"wrote {report.output_dir}: {report.family}, {report.num_tensors} tensors, "
        f"{report.num_bytes} bytes, {str(shape.params_dtype).removeprefix('torch.')}, vocabulary "
        f"{shape.vocab_size} padded to {shape.padded_vocab_size} rows (multiple of "
        f"{args.make_vocab_size_divisible_by} x {args.tensor_model_parallel_size})"
    )
    if padding := shape.padded_vocab_size - shape.vocab_size:
        divisor = divisor_without_padding(shape.vocab_size, args.tensor_model_parallel_size)
        advice = f"; --make-vocab-size-divisible-by {divisor} pads nothing" if divisor else ""
        print(
            f"the {padding} rows of padding are zero, and Megatron's training loss counts them as "
            f"tokens of logit 0{advice}"
        )
    if report.left_out:
        print(
            f"left out {len(report.left_out)} tensors that others determine: {report.left_out[0]}"
            f"{', ...' if len(report.left_out) > 1 else ''}"
        )
    if report.dropped_window is not None:
        print(f"dropped the sliding window of {report.dropped_window} tokens: attention is full")
    if report.longrope_config is not None:
        print(f"longrope configuration: {report.output_dir / 'longrope.json'}")
    print("\nMegatron flags of this model:\n")
    print(" \\\n".join((f"--load {shlex.quote(str(report.output_dir.resolve()))}", *report.flags)))
    beside = " ".join(report.flags_beside_checkpoint_args)
    print(f"\nor, read from the checkpoint:\n\n--use-checkpoint-args {beside}")
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    from megatron_longrope.conversion.start_tokens import drop_start_tokens
    from megatron_longrope.conversion.verify import verify

    shared = _shared_options(args, quiet=args.json)
    if args.drop_start_tokens:
        shared["longrope_config"], _ = drop_start_tokens(
            shared["longrope_config"], shared["short_length"], shared["target_length"]
        )
    report = verify(args.load, args.hf, tolerance=args.tolerance, **shared)
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        _print_verification(report)
    return 0


def _run_inspect(args: argparse.Namespace) -> int:
    from megatron_longrope.checkpoint import MegatronCheckpoint
    from megatron_longrope.conversion.inspection import as_text, inspect

    content = inspect(MegatronCheckpoint.open(args.checkpoint, args.iteration))
    print(json.dumps(content) if args.json else as_text(content))
    return 0


def _shared_options(args: argparse.Namespace, quiet: bool = False) -> dict[str, Any]:
    """The options that conversion and verification have in common, lengths parsed."""
    from megatron_longrope.config import LongRopeConfig
    from megatron_longrope.conversion.hf_checkpoint import open_checkpoint

    if args.longrope_config is not None:
        config, source = LongRopeConfig.load(args.longrope_config), args.longrope_config
    else:
        folder = None if args.load else args.hf
        config = open_checkpoint(args.load, folder, args.iteration).longrope
        where = "in the folder" if folder else "in the checkpoint"
        source = f"none stored {where}, plain RoPE"
        if config is not None:
            source = f"stored {where}, up to {config.max_length} tokens"
    if config is None and args.drop_start_tokens:
        raise LongRopeError(
            "--drop-start-tokens has no factors to drop them from: none are stored; give a file "
            "with --longrope-config or leave the flag out"
        )
    lengths = {
        "short_length": args.short_length and parse_length(args.short_length),
        "target_length": args.target_length and parse_length(args.target_length),
    }
    if not quiet:
        print(f"longrope configuration: {source}")
        for name, value in lengths.items():
            if value:
                print(f"{name.replace('_', ' ')}: {value} tokens")
    return {"longrope_config": config, "iteration": args.iteration, **lengths}


def _say_memory(checkpoint: Any) -> None:
    from megatron_longrope.conversion.verify import memory_needed

    gib = memory_needed(checkpoint) / 2**30
    print(
        f"verifying: holds the model in memory twice, in fp32, {gib:.1f} GiB of weights; "
        "--no-verify leaves it out",
        flush=True,
    )


def _print_verification(report: Any) -> None:
    for item in report.windows:
        print(
            f"verified {item.window:5} {item.num_tokens:7} tokens: max |logit difference| "
            f"{item.max_abs_diff:.2e}, mean KL {item.mean_kl:.2e}, same top token "
            f"{item.top1_agreement:.2%}"
        )
