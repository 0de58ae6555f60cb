"""What passes through a preparation, counted by source on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_longrope.data.mix import Source
from megatron_longrope.data.segments import length_bucket
from megatron_longrope.data.tokenization import Skips


@dataclass
class SourceCounts:
    """Of one source."""

    documents: int = 0
    """Documents read, each once."""
    source_tokens: int = 0
    """Their tokens."""
    longest_document: int = 0
    """Tokens of the longest."""
    held_out_documents: int = 0
    """Those that went to the held-out set."""
    used_documents: int = 0
    """Documents that were handed on, each as often as it was: the mix."""
    used_tokens: int = 0
    """Their tokens, before they are cut, filled up or discarded."""
    histogram: Counter[int] = field(default_factory=Counter)
    """Documents read, by :func:`length_bucket`."""

    def add(self, length: int) -> None:
        """Count a document that was read."""
        self.documents += 1
        self.source_tokens += length
        self.longest_document = max(self.longest_document, length)
        self.histogram[length_bucket(length)] += 1

    def use(self, length: int) -> None:
        """Count a document that is handed on once more."""
        self.used_documents += 1
        self.used_tokens += length

    def to_manifest(self) -> dict[str, Any]:
        """As manifest fields."""
        fields = asdict(self)
        del fields["histogram"]
        ordered = {str(key): self.histogram[key] for key in sorted(self.histogram)}
        return {**fields, "length_histogram": ordered}


class Counts:
    """Of all sources, in their order."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.of = [SourceCounts() for _ in sources]
        self.skips = Skips()
        self._sources = sources

    def add_skips(self, skips: Skips) -> None:
        """Count the unreadable documents of a batch."""
        for item in skips.listed:
            self.skips.add(item)
        self.skips.count += skips.count - len(skips.listed)

    def total(self) -> SourceCounts:
        """The sum over the sources."""
        total = SourceCounts()
        for counts in self.of:
            for name in ("documents", "source_tokens", "held_out_documents", "used_documents",
                         "used_tokens"):  # fmt: skip
                setattr(total, name, getattr(total, name) + getattr(counts, name))
            total.longest_document = max(total.longest_document, counts.longest_document)
            total.histogram.update(counts.histogram)
        return total

    def to_manifest(self) -> dict[str, Any]:
        """As manifest fields; the sums stand beside the sources, as they did in older sets."""
        return {
            **self.total().to_manifest(),
            "skipped": {
                "count": self.skips.count,
                "lines": [
                    {"file": item.file, "line": item.line, "reason": item.reason}
                    for item in self.skips.listed
                ],
            },
            "sources": [
                {
                    "name": source.name,
                    "weight": source.weight,
                    "long_above": source.long_above,
                    "long_factor": source.long_factor,
                    **counts.to_manifest(),
                }
                for source, counts in zip(self._sources, self.of, strict=True)
            ],
        }
