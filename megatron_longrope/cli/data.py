"""`longrope data`: train a tokenizer, prepare a Megatron data set, inspect one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_longrope.cli.data_facts import print_facts
from megatron_longrope.cli.options import add_bos
from megatron_longrope.lengths import parse_length


def add_parser(commands: Any) -> None:
    """Add `data` with its three subcommands."""
    data = commands.add_parser(
        "data",
        help="text to Megatron .bin/.idx: BOS/EOS segments for training, whole held-out documents",
        description="Prepare data sets for fine-tuning, search and evaluation.",
    )
    actions = data.add_subparsers(dest="data_command", required=True, metavar="ACTION")
    _add_tokenizer(actions)
    _add_prepare(actions)
    _add_inspect(actions)


def run(args: argparse.Namespace) -> int | None:
    """Run the subcommand that was parsed."""
    actions = {"tokenizer": _run_tokenizer, "prepare": _run_prepare, "inspect": _run_inspect}
    return actions[args.data_command](args)


def _add_tokenizer(actions: Any) -> None:
    parser = actions.add_parser(
        "tokenizer",
        help="train a sentencepiece tokenizer",
        description="Train a lossless sentencepiece BPE model (byte fallback, single digits).",
    )
    _add_source_flags(parser)
    parser.add_argument(
        "--vocab-size", type=_positive, required=True, metavar="N",
        help="tokens in the vocabulary, of which 260 are fixed (special tokens, newline, bytes)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="X.model", help="the model file to write"
    )
    parser.add_argument(
        "--max-sentences", type=_positive, default=500_000, metavar="N",
        help="train on a random sample of at most N lines, which bounds memory, about 3 KB a line "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="seed of that sample (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def _add_prepare(actions: Any) -> None:
    parser = actions.add_parser(
        "prepare",
        help="tokenize text into PREFIX.bin, PREFIX.idx and the manifest PREFIX.json",
        description="Tokenize text into PREFIX.bin, PREFIX.idx and the manifest PREFIX.json. "
        "Lengths are in tokens; 4k is 4096.",
    )
    _add_source_flags(parser, mix=True)
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH",
        help="sentencepiece .model file or Hugging Face tokenizer folder",
    )  # fmt: skip
    add_bos(parser)
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="path of the set, without suffix"
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--segment-length", type=_length, metavar="S",
        help="training data: segments of exactly S tokens, BOS and EOS included; use it with "
        "Megatron's --seq-length S",
    )  # fmt: skip
    mode.add_argument(
        "--whole-documents", action="store_true",
        help="search and evaluation data: whole documents without special tokens",
    )  # fmt: skip
    parser.add_argument(
        "--tail", choices=("drop", "pad", "pack"),
        help="with --segment-length, the tokens after a document's last full segment: discard, "
        "fill up with EOS, or join with the tails of other documents (default: drop)",
    )  # fmt: skip
    parser.add_argument(
        "--min-length", type=_length, metavar="N",
        help="with --whole-documents, keep documents of at least N tokens (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--max-length", type=_length, metavar="N",
        help="with --whole-documents, truncate documents to N tokens (default: keep them whole)",
    )  # fmt: skip
    parser.add_argument(
        "--max-documents", type=_positive, metavar="K",
        help="with --whole-documents, stop after K kept documents (default: keep all)",
    )  # fmt: skip
    parser.add_argument(
        "--joined", type=_positive, metavar="K",
        help="with --segment-length, make every entry of K consecutive segments; --seq-length is "
        "then K x S (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--cut", choices=("tokens", "sentences"),
        help="with --segment-length, cut documents anywhere, or at sentence ends, which Punkt "
        "learns from the text itself, and fill up with EOS (default: tokens)",
    )  # fmt: skip
    parser.add_argument(
        "--short-window", type=_length, metavar="W",
        help="with --segment-length, write documents of at most W tokens, BOS and EOS included, "
        "one by one to PREFIX_short, for mixed-window training (default: treat all alike)",
    )  # fmt: skip
    parser.add_argument(
        "--short-multiple", type=_positive, metavar="M",
        help="with --short-window, fill those up with EOS to a multiple of M tokens; 2 x "
        "context-parallel size must divide it (default: 16)",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=float, default=0.0, metavar="SHARE",
        help="share of the documents, chosen by a hash of the text, that goes whole to "
        "PREFIX_heldout (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--upsample-long", nargs=2, metavar=("N", "FACTOR"),
        help="with --input, repeat documents of more than N tokens FACTOR times; a mix says it for "
        "each source (default: all once)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="decides which documents are held out or repeated once more (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=_positive, default=1, metavar="N",
        help="processes that tokenize; the output is the same for any number (default: "
        "%(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run, usage_error=parser.error)


def _add_inspect(actions: Any) -> None:
    parser = actions.add_parser(
        "inspect",
        help="print a set's manifest and check every entry against it",
        description="Print the manifest of a set and check every token against it: exit 1 when a "
        "segment is misaligned or the data differ from the manifest.",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="path of the set, without suffix")
    parser.add_argument(
        "--figure", type=Path, metavar="X.png", help="draw the length histogram (default: none)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing figure")
    parser.set_defaults(run=run)


def _add_source_flags(parser: argparse.ArgumentParser, mix: bool = False) -> None:
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--input", nargs="+", metavar="PATH",
        help=".txt (one document), .jsonl, .jsonl.gz, .jsonl.zst (one document per line) or "
        ".parquet files, folders saved by datasets' save_to_disk, or directories of these, which "
        "are read recursively in sorted order",
    )  # fmt: skip
    if mix:
        inputs.add_argument(
            "--mix", type=Path, metavar="FILE.json",
            help='several sources: {"NAME": {"paths": [...], "weight": 1, "upsample_long": '
            '{"above": "32k", "factor": 4}}, ...}',
        )  # fmt: skip
    parser.add_argument(
        "--text-key", default="text", metavar="KEY",
        help="key of the text in JSON lines, or column (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--on-error", choices=("fail", "skip"), default="fail",
        help="at a document that cannot be read: stop, or count it and go on "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")


def _run_tokenizer(args: argparse.Namespace) -> None:
    from megatron_longrope.data.sources import find_source_files, iterate_documents
    from megatron_longrope.data.tokenizer import train_sentencepiece

    skipped: list[Any] = []
    documents = iterate_documents(
        find_source_files(args.input),
        args.text_key,
        on_skip=skipped.append if args.on_error == "skip" else None,
    )
    tokenizer = train_sentencepiece(
        (document.text for document in documents),
        args.output,
        args.vocab_size,
        max_sentences=args.max_sentences,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    for item in skipped[:10]:
        print(f"skipped {item}", file=sys.stderr)
    print(f"wrote {args.output}: {tokenizer.vocab_size} tokens, {len(skipped)} documents skipped")
    print(f"sha256 {tokenizer.sha256}")


def _run_prepare(args: argparse.Namespace) -> None:
    whole_flags = ("min_length", "max_length", "max_documents")
    segment_flags = ("tail", "joined", "cut", "short_window")
    for name in segment_flags if args.whole_documents else whole_flags:
        if getattr(args, name) is not None:
            mode = "--segment-length" if name in segment_flags else "--whole-documents"
            args.usage_error(f"{_flag(name)} applies only with {mode}")
    if args.short_multiple is not None and args.short_window is None:
        args.usage_error("--short-multiple applies only with --short-window")
    if args.mix is not None and args.upsample_long is not None:
        args.usage_error("--upsample-long applies only with --input; a mix has upsample_long")

    from megatron_longrope.data.mix import load_mix
    from megatron_longrope.data.prepare import prepare
    from megatron_longrope.data.segments import (
        FixedSegments,
        Recipe,
        ShortDocuments,
        WholeDocuments,
    )
    from megatron_longrope.data.stream import Split

    recipe: Recipe
    if args.whole_documents:
        recipe = WholeDocuments(args.min_length or 1, args.max_length, args.max_documents)
    else:
        recipe = FixedSegments(
            args.segment_length, args.tail or "drop", args.joined or 1, args.cut or "tokens"
        )
    short = None
    if args.short_window is not None:
        short = ShortDocuments(args.short_window, args.short_multiple or 16)
    manifest = prepare(
        load_mix(args.mix) if args.mix is not None else _inputs(args),
        args.output,
        args.tokenizer,
        recipe,
        split=Split(args.held_out, short, args.seed),
        bos=args.bos,
        text_key=args.text_key,
        on_error=args.on_error,
        workers=args.workers,
        overwrite=args.overwrite,
        progress=True,
    )
    print_facts(args.output, manifest)
    for suffix, wanted in (("_heldout", args.held_out), ("_short", args.short_window)):
        if wanted:
            print(f"beside it: {args.output}{suffix}")


def _inputs(args: argparse.Namespace) -> list[Any]:
    """The paths of --input, or one source with its upsampling."""
    if args.upsample_long is None:
        return args.input
    from megatron_longrope.data.mix import Source

    length, factor = args.upsample_long
    try:
        above, times = parse_length(length), float(factor)
    except ValueError as error:
        args.usage_error(f"--upsample-long: {error}")
    return [Source("input", tuple(args.input), long_above=above, long_factor=times)]


def _run_inspect(args: argparse.Namespace) -> int:
    from megatron_longrope.data.documents import check_set, read_manifest
    from megatron_longrope.data.histogram import draw_histogram, histogram_lines, source_histograms

    manifest = read_manifest(args.prefix)
    print_facts(args.prefix, manifest)
    for name, histogram in source_histograms(manifest).items():
        print(f"  documents of {name} by length (tokens)")
        for line in histogram_lines(histogram):
            print(f"  {line}")
    if args.figure is not None:
        draw_histogram(manifest, args.figure, args.overwrite)
        print(f"  figure           {args.figure}")
    problems = check_set(args.prefix)
    for problem in problems:
        print(f"problem: {problem}")
    print(f"check: {'failed' if problems else 'all entries match the manifest'}")
    return 1 if problems else 0


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _length(text: str) -> int:
    try:
        return parse_length(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
