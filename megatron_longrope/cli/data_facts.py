"""A set's manifest in words, for `longrope data prepare` and `inspect`."""

from __future__ import annotations

from typing import Any

from megatron_longrope.data.tokenizer import bos_name


def print_facts(prefix: str, manifest: dict[str, Any]) -> None:
    """Print a manifest, without its histograms.

    Args:
        prefix (str): Path of the set.
        manifest (dict): Of any set; those of older releases lack some keys.
    """
    print(f"{prefix}: {manifest['segments']} {_describe_entries(manifest)}")
    print(f"  tokens           {manifest['tokens']:,} ({manifest['dtype']})")
    print(f"  source           {manifest['documents']:,} documents in "
          f"{len(manifest['source_files'])} files, {manifest['source_tokens']:,} tokens, "
          f"longest {manifest['longest_document']:,}")  # fmt: skip
    if manifest.get("held_out"):
        print(f"  held out         {manifest['held_out_documents']:,} documents, a share of "
              f"{manifest['held_out']} (seed {manifest['seed']})")  # fmt: skip
    for source in manifest.get("sources", []):
        print(f"  {source['name']:<16} {source['documents']:,} documents, "
              f"{source['source_tokens']:,} tokens; used {source['used_documents']:,}, "
              f"{source['used_tokens']:,} ({_share(source, manifest):.1%})")  # fmt: skip
    hidden = manifest.get("hidden_skipped")
    print(f"  skipped          {manifest['skipped']['count']} unreadable documents"
          f"{f', {hidden} hidden files or folders' if hidden else ''}")  # fmt: skip
    for item in manifest["skipped"]["lines"][:10]:
        print(f"    {item['file']}:{item['line']}: {item['reason']}")
    print(f"  tokenizer        {manifest['tokenizer']} ({manifest['vocab_size']} tokens, "
          f"BOS {bos_name(manifest['bos_id'])}, "
          f"EOS {manifest['eos_id']})")  # fmt: skip
    print(f"  tokenizer sha256 {manifest['tokenizer_sha256']}")
    print(f"  token sha256     {manifest['token_sha256']}")


def _share(source: dict[str, Any], manifest: dict[str, Any]) -> float:
    return source["used_tokens"] / max(1, manifest["used_tokens"])


def _describe_entries(manifest: dict[str, Any]) -> str:
    if manifest["mode"] == "short":
        return (
            f"documents of at most {manifest['window']} tokens, filled up to multiples of "
            f"{manifest['multiple']}"
        )
    if manifest["mode"] == "segments":
        joined, cut = manifest.get("joined", 1), manifest.get("cut", "tokens")
        text = f"segments of {manifest['segment_length']} tokens (tails: {manifest['tail']}"
        text += ", cut at sentence ends)" if cut == "sentences" else ")"
        if joined > 1:
            length = manifest["segment_length"] * joined
            text = f"entries of {length} tokens, each {joined} consecutive {text}"
        return text
    text = f"whole documents of at least {manifest['min_length']} tokens"
    if manifest["max_length"] is not None:
        text += f", truncated to {manifest['max_length']}"
    return text
