"""What the journal of a search tells: the way to its best candidate, and what start tokens did.

Records are duck-typed: anything with the attributes of :class:`JournalRecord` will do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JournalRecord:
    """What a report needs of one evaluation."""

    index: int
    """Order of asking; the order in the file differs from it when replicas score in parallel."""

    rescale_factors: tuple[float, ...]
    """lambda_i as evaluated."""

    num_start_tokens: int
    """n_hat as evaluated."""

    score: float
    """Perplexity; an estimate or a bound when stopped early, infinity when failed."""

    sample_nlls: tuple[float, ...] = ()
    """Loss of each sample scored so far."""

    stopped: str | None = None
    """Why not every sample was scored; None when all were."""


@dataclass(frozen=True)
class SearchTrace:
    """The evaluations of one search in the order of asking."""

    name: str
    """What the search is called in a figure."""

    records: Sequence[Any]
    """The journal's records, see :class:`JournalRecord`; sorted by index here."""

    names: Mapping[tuple[float, ...], str] = field(default_factory=dict)
    """Rescale factors, as recorded, that have a name (`pi`, `ntk`, `yarn`, ...)."""

    seeds: Mapping[str, float] | None = None
    """Perplexity of each named starting point; None looks them up in the records."""

    def __post_init__(self) -> None:
        records = tuple(sorted(self.records, key=lambda record: record.index))
        object.__setattr__(self, "records", records)
        seeds = self._named_scores() if self.seeds is None else dict(self.seeds)
        finite = {name: score for name, score in seeds.items() if math.isfinite(score)}
        object.__setattr__(self, "seeds", finite)

    @property
    def best_scores(self) -> list[float]:
        """Best perplexity of a completely scored candidate after each record."""
        best = math.inf
        return [
            best := min(best, record.score) if is_complete(record) else best
            for record in self.records
        ]

    @property
    def sample_forwards(self) -> list[int]:
        """Forward passes over one sample after each record."""
        counted: dict[Any, int] = {}
        total = 0
        return [total := total + fresh_samples(record, counted) for record in self.records]

    def _named_scores(self) -> dict[str, float]:
        """Of each name its completely scored record with the fewest start tokens."""
        found: dict[str, Any] = {}
        for record in filter(is_complete, self.records):
            name = self.names.get(tuple(record.rescale_factors))
            if name is not None and (
                name not in found or record.num_start_tokens < found[name].num_start_tokens
            ):
                found[name] = record
        order = dict.fromkeys(self.names.values())
        return {name: found[name].score for name in order if name in found}


@dataclass(frozen=True)
class StartTokenCurve:
    """Perplexity against n_hat for one vector of rescale factors, always on the same samples."""

    name: str
    """Name of the search."""

    factors: tuple[float, ...]
    """The rescale factors that all points share."""

    whose: str | None
    """Name of the factors, `best` for those of the best candidate, or None."""

    num_samples: int
    """Samples behind each point: those that every one of them has scored."""

    points: Mapping[int, float]
    """Perplexity of each n_hat, ascending in n_hat."""


def is_complete(record: Any) -> bool:
    """Whether the record's score is a perplexity over every sample."""
    return record.stopped is None and math.isfinite(record.score)


def is_failed(record: Any) -> bool:
    """Whether the record has no score; the bound of one stopped early may well be infinite."""
    return record.stopped is None and not math.isfinite(record.score)


def fresh_samples(record: Any, counted: dict[Any, int]) -> int:
    """Samples scored for this record and not for an earlier one of the same candidate.

    `counted` is what earlier calls noted; a candidate that halving promotes is recorded again with
    the samples that it already had.
    """
    key = (tuple(record.rescale_factors), record.num_start_tokens)
    before = counted.get(key, 0)
    counted[key] = max(before, len(record.sample_nlls))
    return counted[key] - before


def start_token_curve(trace: SearchTrace) -> StartTokenCurve | None:
    """The factors that were scored with the most different n_hat; None if none had two.

    On a tie the larger number of common samples decides, then the lower perplexity.
    """
    groups: dict[tuple[float, ...], dict[int, tuple[float, ...]]] = {}
    for record in trace.records:
        nlls = tuple(record.sample_nlls)
        if not nlls or not all(map(math.isfinite, nlls)):
            continue
        group = groups.setdefault(tuple(record.rescale_factors), {})
        known = group.get(record.num_start_tokens, ())
        group[record.num_start_tokens] = max(known, nlls, key=len)
    curves = []
    for factors, group in groups.items():
        if len(group) > 1:
            samples = min(map(len, group.values()))
            points = {n: _perplexity(group[n][:samples]) for n in sorted(group)}
            curves.append((factors, samples, points))
    if not curves:
        return None
    factors, samples, points = max(
        curves, key=lambda curve: (len(curve[2]), curve[1], -min(curve[2].values()))
    )
    whose = trace.names.get(factors)
    complete = [record for record in trace.records if is_complete(record)]
    if whose is None and complete:
        best = min(complete, key=lambda record: record.score)
        whose = "best" if tuple(best.rescale_factors) == factors else None
    return StartTokenCurve(trace.name, factors, whose, samples, points)


def read_records(path: str | Path) -> list[JournalRecord]:
    """Every readable record of a journal of any version; damaged lines are passed over.

    The first version of journals had no index and stopped no candidate early.
    """
    records: list[JournalRecord] = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
            stopped = value.get("stopped")
            record = JournalRecord(
                int(value.get("index", len(records))),
                tuple(float(item) for item in value["rescale_factors"]),
                int(value.get("num_start_tokens", 0)),
                _number(value["score"]),
                tuple(map(_number, value.get("sample_nlls") or ())),
                None if stopped is None else str(stopped),
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            continue  # the header, a torn last line, or damage
        records.append(record)
    return records


def _number(value: Any) -> float:
    """A JSON number; null, which journals write for infinity, and NaN become infinity."""
    return float(value) if value is not None and math.isfinite(value) else math.inf


def _perplexity(nlls: Sequence[float]) -> float:
    return math.exp(min(sum(nlls) / len(nlls), 700.0))  # e^700 is near the largest float
