"""`longrope data`: train a tokenizer, prepare a Megatron data set, inspect one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_longrope.lengths import format_length, parse_length


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
    _add_source_flags(parser)
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH",
        help="sentencepiece .model file or Hugging Face tokenizer folder",
    )  # fmt: skip
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
    parser.set_defaults(run=run, usage_error=parser.error)


def _add_inspect(actions: Any) -> None:
    parser = actions.add_parser(
        "inspect",
        help="print a set's manifest and check every entry against it",
        description="Print the manifest of a set and check every token against it: exit 1 when a "
        "segment is misaligned or the data differ from the manifest.",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="path of the set, without suffix")
    parser.set_defaults(run=run)


def _add_source_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help=".txt (one document), .jsonl or .jsonl.gz (one document per line) files, or "
        "directories, which are read recursively in sorted order",
    )  # fmt: skip
    parser.add_argument(
        "--text-key", default="text", metavar="KEY",
        help="key of the text in JSON lines (default: %(default)s)",
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
    wrong = ("tail",) if args.whole_documents else whole_flags
    for name in wrong:
        if getattr(args, name) is not None:
            mode = "--segment-length" if name == "tail" else "--whole-documents"
            args.usage_error(f"--{name.replace('_', '-')} applies only with {mode}")

    from megatron_longrope.data.prepare import prepare
    from megatron_longrope.data.segments import FixedSegments, Recipe, WholeDocuments

    recipe: Recipe
    if args.whole_documents:
        recipe = WholeDocuments(args.min_length or 1, args.max_length, args.max_documents)
    else:
        recipe = FixedSegments(args.segment_length, args.tail or "drop")
    manifest = prepare(
        args.input,
        args.output,
        args.tokenizer,
        recipe,
        text_key=args.text_key,
        on_error=args.on_error,
        overwrite=args.overwrite,
        progress=True,
    )
    _print_facts(args.output, manifest)


def _run_inspect(args: argparse.Namespace) -> int:
    from megatron_longrope.data.documents import check_set, read_manifest

    manifest = read_manifest(args.prefix)
    _print_facts(args.prefix, manifest)
    _print_histogram(manifest["length_histogram"])
    problems = check_set(args.prefix)
    for problem in problems:
        print(f"problem: {problem}")
    print(f"check: {'failed' if problems else 'all entries match the manifest'}")
    return 1 if problems else 0


def _print_facts(prefix: str, manifest: dict[str, Any]) -> None:
    print(f"{prefix}: {manifest['segments']} {_describe_entries(manifest)}")
    print(f"  tokens           {manifest['tokens']:,} ({manifest['dtype']})")
    print(f"  source           {manifest['documents']:,} documents in "
          f"{len(manifest['source_files'])} files, {manifest['source_tokens']:,} tokens, "
          f"longest {manifest['longest_document']:,}")  # fmt: skip
    print(f"  skipped          {manifest['skipped']['count']} unreadable documents")
    for item in manifest["skipped"]["lines"][:10]:
        print(f"    {item['file']}:{item['line']}: {item['reason']}")
    print(f"  tokenizer        {manifest['tokenizer']} ({manifest['vocab_size']} tokens, "
          f"BOS {manifest['bos_id']}, EOS {manifest['eos_id']})")  # fmt: skip
    print(f"  tokenizer sha256 {manifest['tokenizer_sha256']}")
    print(f"  token sha256     {manifest['token_sha256']}")


def _describe_entries(manifest: dict[str, Any]) -> str:
    if manifest["mode"] == "segments":
        return f"segments of {manifest['segment_length']} tokens (tails: {manifest['tail']})"
    text = f"whole documents of at least {manifest['min_length']} tokens"
    if manifest["max_length"] is not None:
        text += f", truncated to {manifest['max_length']}"
    return text


def _print_histogram(histogram: dict[str, int]) -> None:
    """Source documents by length; the bar of the largest class has 40 marks."""
    print("  source documents by length (tokens)")
    largest = max(histogram.values())
    for low, count in ((int(key), value) for key, value in histogram.items()):
        label = f"{format_length(low)} to {format_length(2 * low)}" if low else "empty"
        print(f"  {label:>15} {count:>9} {'#' * max(1, round(40 * count / largest))}")


def _length(text: str) -> int:
    try:
        return parse_length(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
