"""`longrope convert`: to-hf, from-hf, verify, inspect."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_longrope import api
from megatron_longrope.cli.byte_progress import ByteProgress
from megatron_longrope.cli.flags import add_command
from megatron_longrope.conversion.options import (
    FromHfOptions,
    InspectCheckpointOptions,
    ToHfOptions,
    VerifyOptions,
)


def add_parser(commands: Any, about: str | None = None) -> None:
    """Register the command and its actions."""
    parser = commands.add_parser(
        "convert",
        help=about,
        description="Convert Megatron checkpoints to Hugging Face folders and back.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_command(
        actions,
        "to-hf",
        ToHfOptions,
        _run_to_hf,
        help="write a Hugging Face folder and verify it",
    )
    add_command(
        actions,
        "from-hf",
        FromHfOptions,
        _run_from_hf,
        help="write a Megatron checkpoint, verify it, print the flags of the model",
    )
    add_command(
        actions,
        "verify",
        VerifyOptions,
        _run_verify,
        help="compare the logits of checkpoint and folder",
        description="Compare the logits of a checkpoint and a folder; without --load, those of "
        "transformers and of this package's engine on the folder.",
    )
    add_command(
        actions,
        "inspect",
        InspectCheckpointOptions,
        _run_inspect,
        help="show what a checkpoint holds",
    )


def _run_to_hf(options: ToHfOptions) -> None:
    from megatron_longrope.checkpoint.folders import iteration_directory

    # Once: a training may save a later iteration meanwhile.
    load = iteration_directory(Path(options.load), options.iteration)
    options = replace(options, load=str(load))
    print(f"converting {load}")
    _say_factors(options)
    report = api.convert_to_hf(options, ByteProgress("writing"), _announce)
    for sentence in report.dropped_start_tokens:
        print(sentence)
    for remark in report.remarks:
        print(f"note: {remark}")
    included = report.tokenizer
    print("no tokenizer included" if included is None else f"tokenizer from {included}")
    _print_verification(report.verification)
    print(
        f"wrote {report.output_dir}: {report.family}, {report.num_tensors} tensors, "
        f"{report.num_bytes} bytes in {len(report.files)} file(s), {report.dtype}, "
        f"vocabulary {report.vocab_size}, window {report.max_position_embeddings} tokens"
    )


def _run_from_hf(options: FromHfOptions) -> None:
    report = api.convert_from_hf(options, ByteProgress("writing"), _announce)
    _print_verification(report.verification)
    shape = report.shape
    print(
        f"wrote {report.output_dir}: {report.family}, {report.num_tensors} tensors, "
        f"{report.num_bytes} bytes, {str(shape.params_dtype).removeprefix('torch.')}, vocabulary "
        f"{shape.vocab_size} padded to {shape.padded_vocab_size} rows (multiple of "
        f"{options.make_vocab_size_divisible_by} x {options.tensor_model_parallel_size})"
    )
    if padding := shape.padded_vocab_size - shape.vocab_size:
        from megatron_longrope.conversion.megatron_args import divisor_without_padding

        divisor = divisor_without_padding(shape.vocab_size, options.tensor_model_parallel_size)
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


def _run_verify(options: VerifyOptions) -> None:
    from megatron_longrope.checkpoint.hf.source import open_folder
    from megatron_longrope.conversion.start_tokens import drop_start_tokens
    from megatron_longrope.conversion.verify import lengths_in, verify

    config = _say_factors(options, options.hf, options.sliding_window, say=not options.json)
    lengths = [options.short_length, options.target_length]
    if config is not None:
        stated = lengths_in(config, open_folder(options.hf, options.sliding_window).config)
        for index, name in enumerate(("short", "target")):
            if lengths[index] is None and stated[index] is not None:
                lengths[index] = stated[index]
                if not options.json:
                    print(f"{name} length: {lengths[index]} tokens, as the folder has it")
    if options.drop_start_tokens:
        config, _ = drop_start_tokens(config, *lengths)
    report = verify(
        options.load,
        options.hf,
        longrope_config=config,
        iteration=options.iteration,
        short_length=lengths[0],
        target_length=lengths[1],
        tolerance=options.tolerance,
        sliding_window=options.sliding_window,
        announce=None if options.json else partial(print, flush=True),
    )
    if options.json:
        print(json.dumps(report.to_dict()))
    else:
        _print_verification(report)


def _run_inspect(options: InspectCheckpointOptions) -> None:
    from megatron_longrope.checkpoint import MegatronCheckpoint
    from megatron_longrope.conversion.inspection import as_text, inspect

    content = inspect(MegatronCheckpoint.open(options.checkpoint, options.iteration))
    print(json.dumps(content) if options.json else as_text(content))


def _say_factors(
    options: ToHfOptions | VerifyOptions,
    hf: str | None = None,
    sliding_window: str = "refuse",
    say: bool = True,
) -> Any:
    """Find the factors of a conversion, and print where they come from."""
    config, source = api.exported_factors(options, hf, sliding_window)
    if say:
        print(f"longrope configuration: {source}")
        for name in ("short_length", "target_length"):
            if value := getattr(options, name):
                print(f"{name.replace('_', ' ')}: {value} tokens")
    return config


def _announce(cost: str) -> None:
    """Print what the verification of a conversion takes, and how to do without."""
    print(
        f"{cost}; interrupted here, the files are kept, and the same command with --no-verify goes "
        "on",
        flush=True,
    )


def _print_verification(report: Any | None) -> None:
    if report is None:
        print("not verified (--no-verify)")
        return
    for item in report.windows:
        print(
            f"verified {item.window:5} {item.num_tokens:7} tokens: max |logit difference| "
            f"{item.max_abs_diff:.2e}, mean KL {item.mean_kl:.2e}, same top token "
            f"{item.top1_agreement:.2%}"
        )
