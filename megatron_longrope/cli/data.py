"""`longrope data`: prepare a Megatron data set, inspect one."""

from __future__ import annotations

from typing import Any

from megatron_longrope import api
from megatron_longrope.cli.byte_progress import ByteProgress
from megatron_longrope.cli.flags import add_command
from megatron_longrope.data.options import InspectSetOptions, PrepareOptions
from megatron_longrope.lengths import format_length


def add_parser(commands: Any, about: str | None = None) -> None:
    """Add `data` with its two subcommands."""
    data = commands.add_parser(
        "data",
        help=about,
        description="Prepare data sets for fine-tuning, search and evaluation.",
    )
    actions = data.add_subparsers(dest="data_command", required=True, metavar="ACTION")
    add_command(
        actions,
        "prepare",
        PrepareOptions,
        _run_prepare,
        help="tokenize text into PREFIX.bin, PREFIX.idx and the manifest PREFIX.json",
        description="Tokenize text into PREFIX.bin, PREFIX.idx and the manifest PREFIX.json. "
        "Lengths are in tokens; 4k is 4096.",
    )
    add_command(
        actions,
        "inspect",
        InspectSetOptions,
        _run_inspect,
        help="print a set's manifest and check every entry against it",
        description="Print the manifest of a set and check every token against it: exit 1 when a "
        "segment is misaligned or the data differ from the manifest.",
    )


def _run_prepare(options: PrepareOptions) -> None:
    _print_facts(options.output, api.prepare_data(options, ByteProgress("preparing")))
    for suffix, wanted in (("_heldout", options.held_out), ("_short", options.short_window)):
        if wanted:
            print(f"beside it: {options.output}{suffix}")


def _run_inspect(options: InspectSetOptions) -> int:
    from megatron_longrope.data.documents import check_set, read_manifest

    manifest = read_manifest(options.prefix)
    _print_facts(options.prefix, manifest)
    for source in manifest["sources"]:
        print(f"  documents of {source['name']} by length (tokens)")
        for line in histogram_lines(source["length_histogram"]):
            print(f"  {line}")
    problems = check_set(options.prefix)
    for problem in problems:
        print(f"problem: {problem}")
    print(f"check: {'failed' if problems else 'all entries match the manifest'}")
    return 1 if problems else 0


def histogram_lines(histogram: dict[str, int], width: int = 40) -> list[str]:
    """One line for each class of lengths, which its lower end names; the largest bar is `width`."""
    largest = max(histogram.values(), default=0)
    return [
        f"{f'{format_length(low)} to {format_length(2 * low)}' if low else 'empty':>15} "
        f"{count:>9} {'#' * max(1, round(width * count / largest))}"
        for low, count in sorted((int(low), count) for low, count in histogram.items())
    ]


def _print_facts(prefix: str, manifest: dict[str, Any]) -> None:
    """Print a manifest, without its histograms."""
    from megatron_longrope.data.tokenizer import bos_name

    print(f"{prefix}: {manifest['segments']} {_describe_entries(manifest)}")
    print(f"  tokens           {manifest['tokens']:,} ({manifest['dtype']})")
    print(f"  source           {manifest['documents']:,} documents in "
          f"{len(manifest['source_files'])} files, {manifest['source_tokens']:,} tokens, "
          f"longest {manifest['longest_document']:,}")  # fmt: skip
    if manifest["held_out"]:
        print(f"  held out         {manifest['held_out_documents']:,} documents, a share of "
              f"{manifest['held_out']} (seed {manifest['seed']})")  # fmt: skip
    for source in manifest["sources"] if len(manifest["sources"]) > 1 else ():
        share = source["used_tokens"] / max(1, manifest["used_tokens"])
        print(f"  {source['name']:<16} {source['documents']:,} documents, "
              f"{source['source_tokens']:,} tokens; in the mix: {source['used_documents']:,} "
              f"documents, {source['used_tokens']:,} tokens, {100 * share:.1f} % "
              "(before cutting and --min-length)")  # fmt: skip
    hidden, others = manifest.get("hidden_skipped"), manifest.get("other_files")
    print(f"  skipped          {manifest['skipped']['count']} unreadable documents"
          f"{f', {hidden} hidden files or folders' if hidden else ''}"
          f"{f', {others} files of other kinds' if others else ''}")  # fmt: skip
    for item in manifest["skipped"]["lines"][:10]:
        print(f"    {item['file']}:{item['line']}: {item['reason']}")
    print(f"  tokenizer        {manifest['tokenizer']} ({manifest['vocab_size']} tokens, "
          f"BOS {bos_name(manifest['bos_id'])}, "
          f"EOS {manifest['eos_id']})")  # fmt: skip
    print(f"  tokenizer sha256 {manifest['tokenizer_sha256']}")
    print(f"  token sha256     {manifest['token_sha256']}")


def _describe_entries(manifest: dict[str, Any]) -> str:
    if manifest["mode"] == "short":
        return (
            f"documents of at most {manifest['window']} tokens, filled up to multiples of "
            f"{manifest['multiple']}"
        )
    if manifest["mode"] == "segments":
        joined = manifest["joined"]
        text = f"segments of {manifest['segment_length']} tokens (tails: {manifest['tail']}"
        # Release 0.2 could make such sets.
        text += ", cut at sentence ends)" if manifest.get("cut") == "sentences" else ")"
        if joined > 1:
            length = manifest["segment_length"] * joined
            text = f"entries of {length} tokens, each {joined} consecutive {text}"
        return text
    text = f"whole documents of at least {manifest['min_length']} tokens"
    if manifest["max_length"] is not None:
        text += f", truncated to {manifest['max_length']}"
    if manifest.get("max_documents") is not None:
        text += f", the first {manifest['max_documents']} at most"
    return text
