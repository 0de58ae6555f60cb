"""Options of the preparation of data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.lengths import parse_length
from megatron_longrope.options import Options, bos_flag, flag, parse_positive, refuse_idle


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Options):
    """What `longrope data prepare` is told."""

    input: tuple[str, ...] | None = flag(
        None, nargs="+", metavar="PATH", exclusive="input", required=True
    )
    """.txt (one document each), .jsonl or .json (one in each line, also as .gz or .zst), .parquet
    (one in each row), folders saved by datasets' save_to_disk, or directories of these, in which
    .json is passed over; they are read recursively in sorted order"""
    mix: str | None = flag(None, metavar="FILE.json", exclusive="input", required=True)
    """several sources: {"NAME": {"paths": [...], "text_key": "text", "weight": 1, "upsample_long":
    {"above": "32k", "factor": 4}}, ...}"""
    text_key: str = flag("text", metavar="KEY")
    """key of the text in JSON lines, or column"""
    on_error: str = flag("fail", choices=("fail", "skip"))
    """at a document that cannot be read: stop, or count it and go on"""
    overwrite: bool = flag(False)
    """replace existing output"""

    tokenizer: str = flag(metavar="PATH")
    """sentencepiece .model file or Hugging Face tokenizer folder"""
    bos: int | None = bos_flag()

    output: str = flag(metavar="PREFIX")
    """path of the set, without suffix"""
    segment_length: int | None = flag(
        None, type=parse_length, metavar="S", exclusive="mode", required=True
    )
    """training data: segments of exactly S tokens, BOS and EOS included; use it with Megatron's
    --seq-length S"""
    whole_documents: bool = flag(False, exclusive="mode", required=True)
    """search and evaluation data: whole documents without special tokens"""
    tail: str | None = flag(None, choices=("drop", "pad", "pack"))
    """with --segment-length, the tokens after a document's last full segment: discard, fill up with
    EOS, or join with the tails of other documents (default: drop)"""
    min_length: int | None = flag(None, type=parse_length, metavar="N")
    """with --whole-documents, keep documents of at least N tokens (default: 1)"""
    max_length: int | None = flag(None, type=parse_length, metavar="N")
    """with --whole-documents, truncate documents to N tokens (default: keep them whole)"""
    max_documents: int | None = flag(None, type=parse_positive, metavar="K")
    """with --whole-documents and --input, stop after K kept documents (default: keep all)"""
    joined: int | None = flag(None, type=parse_positive, metavar="K")
    """with --segment-length, make every entry of K consecutive segments; --seq-length is then K x S
    (default: 1)"""
    short_window: int | None = flag(None, type=parse_length, metavar="W")
    """with --segment-length, write documents of at most W tokens, BOS and EOS included, one by one
    to PREFIX_short, for mixed-window training (default: treat all alike)"""
    short_multiple: int | None = flag(None, type=parse_positive, metavar="M")
    """with --short-window, fill those up with EOS to a multiple of M tokens; 2 x context-parallel
    size must divide it (default: 16)"""
    held_out: float = flag(0.0, type=float, metavar="SHARE")
    """share of the documents, chosen by a hash of the text, that goes whole to PREFIX_heldout
    (default: none)"""
    seed: int = flag(0, type=int, metavar="N")
    """decides which documents --held-out takes, and which stand once more where a weight of a mix
    has a fraction"""
    workers: int = flag(1, type=parse_positive, metavar="N")
    """processes that tokenize; the output is the same for any number"""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole, segments = "--whole-documents", "--segment-length"
        needed = dict.fromkeys(("min_length", "max_length", "max_documents"), whole)
        needed |= dict.fromkeys(("tail", "joined", "short_window"), segments)
        mode = whole if self.whole_documents else segments
        refuse_idle(
            *(
                (f"--{name.replace('_', '-')}", mode, getattr(self, name) is not None)
                for name, wanted in needed.items() if wanted != mode
            ),
        )  # fmt: skip
        if self.mix is not None and self.max_documents is not None:
            raise LongRopeError(
                "--max-documents would take the first documents of a --mix, which are all of its "
                "first source; prepare one source by --input"
            )
        if self.short_multiple is not None and self.short_window is None:
            raise LongRopeError("--short-multiple applies only with --short-window")

    def sources(self) -> Any:
        """Return the sources of a mix, or the one of --input."""
        from megatron_longrope.data.mix import Source, load_mix

        if self.mix is not None:
            return load_mix(Path(self.mix))
        return [Source("input", self.input)]

    def packing(self) -> Any:
        """Return how documents become the entries of the set."""
        from megatron_longrope.data.segments import FixedSegments, WholeDocuments

        if self.whole_documents:
            return WholeDocuments(self.min_length or 1, self.max_length, self.max_documents)
        return FixedSegments(self.segment_length, self.tail or "drop", self.joined or 1)

    def split(self) -> Any:
        """Return what goes to sets beside this one."""
        from megatron_longrope.data.segments import ShortDocuments
        from megatron_longrope.data.stream import Split

        short = None
        if self.short_window is not None:
            short = ShortDocuments(self.short_window, self.short_multiple or 16)
        return Split(self.held_out, short, self.seed)


@dataclass(frozen=True, kw_only=True)
class InspectSetOptions(Options):
    """What `longrope data inspect` is told."""

    prefix: str = flag(positional=True, metavar="PREFIX")
    """path of the set, without suffix"""
