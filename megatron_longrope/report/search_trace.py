"""What the journal of a search tells: the way to its best candidate, and what start tokens did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_longrope.search.journal import Evaluation, fresh_samples, is_complete


@dataclass(frozen=True)
class SearchTrace:
    """The evaluations of one search in the order of asking."""

    name: str
    """What the search is called in a figure."""

    records: Sequence[Evaluation]
    """The journal's records, sorted by index here."""

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
        found: dict[str, Evaluation] = {}
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


def _perplexity(nlls: Sequence[float]) -> float:
    return math.exp(min(sum(nlls) / len(nlls), 700.0))  # e^700 is near the largest float
