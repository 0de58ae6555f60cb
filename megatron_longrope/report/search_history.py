"""What searches left: factor files, the way to the best candidate, what start tokens did."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longrope.baselines import extension
from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
from megatron_longrope.evaluation.statistics import is_finite
from megatron_longrope.factor_search.journal import (
    Evaluation,
    fresh_samples,
    is_complete,
    read_records,
)
from megatron_longrope.factor_search.problem import SEED_METHODS
from megatron_longrope.files import read_json
from megatron_longrope.report.reading import JOURNAL, files_below

_LARGEST_JSON = 16 * 2**20
"""Bytes above which a JSON file is no LongRoPE file; tokenizers and weight indices can be huge."""

_OF_A_SCORE = ("target_length", "data_sha256", "checkpoint_sha256", "objective", "num_samples")
"""Settings of a search that its starting points' scores depend on most; a factor file with others
is an earlier search's."""

NamedSet = tuple[str, LongRopeConfig, FactorSet]
"""A factor set with the file and the configuration that it comes from."""


@dataclass(frozen=True)
class SearchHistory:
    """The evaluations of one search in the order of asking."""

    name: str
    """What the search is called in a figure."""
    records: Sequence[Evaluation]
    """The journal's records, sorted by index here."""
    seeds: Mapping[str, float | None] = field(default_factory=dict)
    """Score of each named starting point; those without a finite one are left out here."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the journal's first line."""

    def __post_init__(self) -> None:
        records = tuple(sorted(self.records, key=lambda record: record.index))
        object.__setattr__(self, "records", records)
        finite = {name: score for name, score in self.seeds.items() if is_finite(score)}
        object.__setattr__(self, "seeds", finite)

    @property
    def objective(self) -> str:
        """What a score is: perplexity, or that of needle answers (`needle`) or both (`joint`)."""
        return self.settings.get("objective", "ppl")

    @property
    def best_scores(self) -> list[float]:
        """Return the best score of a completely scored candidate after each record."""
        best = math.inf
        return [
            best := min(best, record.score) if is_complete(record) else best
            for record in self.records
        ]

    @property
    def sample_forwards(self) -> list[int]:
        """Count the forward passes over one sample after each record."""
        counted: dict[Any, int] = {}
        total = 0
        return [total := total + fresh_samples(record, counted) for record in self.records]


@dataclass(frozen=True)
class StartTokenCurve:
    """Score against n_hat for one vector of rescale factors, always on the same samples."""

    name: str
    """Name of the search."""
    factors: tuple[float, ...]
    """The rescale factors that all points share."""
    is_best: bool
    """Whether they are those of the best candidate."""
    num_samples: int
    """Samples behind each point: those that every one of them has scored."""
    points: Mapping[int, float]
    """Score of each n_hat, ascending in n_hat."""
    objective: str = "ppl"
    """What a score is."""


def start_token_curve(history: SearchHistory) -> StartTokenCurve | None:
    """Find the factors that were scored with the most different n_hat; None if none had two.

    On a tie the larger number of common samples decides, then the lower score.
    """
    groups: dict[tuple[float, ...], dict[int, tuple[float, ...]]] = {}
    for record in history.records:
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
    complete = filter(is_complete, history.records)
    best = min(complete, key=lambda record: record.score, default=None)
    is_best = best is not None and tuple(best.rescale_factors) == factors
    return StartTokenCurve(history.name, factors, is_best, samples, points, history.objective)


def _perplexity(nlls: Sequence[float]) -> float:
    return math.exp(min(sum(nlls) / len(nlls), 700.0))  # e^700 is near the largest float


def find_factor_sets(directory: Path, seen: set[Path]) -> tuple[list[NamedSet], list[str]]:
    """Find every different factor set below `directory`, and a note on each broken LongRoPE file.

    Sets that change nothing are left out; the name is the path within `directory`. Files of `seen`
    are passed over, and those that are found join it.
    """
    found: dict[tuple[Any, ...], NamedSet] = {}
    notes = []
    for path, name in files_below(directory, ".json", seen):
        if path.stat().st_size > _LARGEST_JSON:
            continue
        try:
            content = read_json(path)
        except ValueError:
            continue
        if not isinstance(content, dict) or not {"schema", "factor_sets"} <= content.keys():
            continue
        try:
            config = LongRopeConfig.load(path)
        except ValueError as error:
            notes.append(f"{name} was left out: {str(error).removeprefix(f'{path}: ')}")
            continue
        for item in config.factor_sets:
            if not item.is_identity:
                key = (
                    item.max_length, item.rescale_factors, item.effective_start_tokens,
                    config.original_max_position_embeddings, config.rotary_base,
                    config.attention_factor_for(item.max_length),
                    json.dumps(config.base_frequencies, sort_keys=True),
                )  # fmt: skip
                found.setdefault(key, (name, config, item))
    return sorted(found.values(), key=lambda entry: (entry[2].max_length, entry[0])), notes


def find_search_histories(
    directory: Path, seen: set[Path]
) -> tuple[list[SearchHistory], list[str]]:
    """Read every search below `directory` that scored a candidate completely.

    One with rotating samples, which an earlier version had, is left out: its scores are no scores
    of the same samples. A note says of each that is left out why. `seen` is that of
    :func:`find_factor_sets`.
    """
    histories, notes = [], []
    for path, name in files_below(directory, JOURNAL, seen):
        factors = path.with_name(f"{path.name.removesuffix(JOURNAL)}.json")
        history = read_history(name.removesuffix(JOURNAL), path, factors)
        reason = ""
        if not history.records:
            reason = "it has no record that this version reads"
        elif history.settings.get("pool"):
            reason = "its candidates were scored on different samples (--pool)"
        elif not any(map(is_complete, history.records)):
            reason = "no candidate has been scored on every sample yet"
        if reason:
            notes.append(f"{name} was left out: {reason}")
        else:
            histories.append(history)
    return histories, notes


def read_history(name: str, journal: Path, factors: Path) -> SearchHistory:
    """Read what a search wrote.

    Args:
        name (str): What it is called in a figure.
        journal (Path): Its evaluations; lines that cannot be read are passed over.
        factors (Path): Its factor file, which says what the starting points scored; there is none
            before the search has ended.
    """
    settings = _settings(journal)
    seeds = _starting_points(settings, factors) if settings else {}
    return SearchHistory(name, read_records(journal), seeds, settings)


def _settings(journal: Path) -> dict[str, Any]:
    """Return the settings in a journal's first line; nothing of an older version, or broken."""
    try:
        with journal.open(encoding="utf-8") as file:
            return dict(json.loads(file.readline())["settings"])
    except (ValueError, TypeError, KeyError):
        return {}


def _starting_points(settings: Mapping[str, Any], factors: Path) -> dict[str, Any]:
    """Return the scores in the origin of the searched set; nothing without a factor file."""
    wanted = {key: settings.get(key) for key in _OF_A_SCORE}
    try:
        config = LongRopeConfig.load(factors)
    except (ValueError, TypeError, KeyError, AttributeError):  # or the search has not ended
        return {}
    for item in config.factor_sets:
        if all(item.origin.get(key) == value for key, value in wanted.items()):
            return dict(item.origin.get("seed_perplexity") or {})
    return {}


def reference_factors(config: LongRopeConfig, length: int) -> dict[str, tuple[float, ...]]:
    """Return factors of PI, NTK and YaRN for the model; none for a window that is no extension."""
    original, dim = config.original_max_position_embeddings, config.rotary_dim
    if length <= original or dim < 4:
        return {}
    plain = identity_config(config.rotary_base, dim, original, config.base_frequencies)
    return {name: extension(name, plain, length).rescale_factors for name in SEED_METHODS}
