"""What the records say: perplexity by protocol, retrieval by length and depth, benchmark scores."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_longrope.evaluation.statistics import wilson_interval
from megatron_longrope.lengths import format_length
from megatron_longrope.report.naming import Subject
from megatron_longrope.report.reading import Measurements, is_finite

Row = dict[str, Any]

_PROTOCOLS = ("truncated", "sampled", "sliding")
_TASKS = ("single", "multi_key", "multi_query")


@dataclass(frozen=True)
class PerplexityGroup:
    """Perplexities that one figure may compare: one protocol, one requested stride."""

    name: str
    """Unique, fit for a file name."""

    protocol: str
    """As in the records, joined where it changes with the length; `results.json` for curated."""

    detail: str
    """The stride, and the sources where they tell this group from another; may be empty."""

    rows: Mapping[Subject, Mapping[int, Row]]
    """Records of each subject by length, ascending."""

    @property
    def lengths(self) -> list[int]:
        """Every measured length in tokens, ascending."""
        return sorted({length for row in self.rows.values() for length in row})

    def values(self, mean: str = "ppl_window_mean") -> dict[Subject, dict[int, float]]:
        """A mean of each subject at each length; infinite where the model lost all sense."""
        return {
            subject: {n: float(row[mean]) for n, row in by_length.items() if mean in row}
            for subject, by_length in self.rows.items()
        }

    @property
    def title(self) -> str:
        """What it is, with protocol and stride."""
        protocol = "as in results.json" if self.protocol == "results.json" else self.protocol
        detail = f", {self.detail}" if self.detail else ""
        return f"Perplexity by sequence length ({protocol}{detail})"

    @property
    def apart(self) -> list[int]:
        """Lengths at which the lines were measured on different tokens."""
        hashes = {
            length: {row[length].get("sha256") for row in self.rows.values() if length in row}
            for length in self.lengths
        }
        return [length for length, found in hashes.items() if len(found - {None, ""}) > 1]

    @property
    def warning(self) -> str | None:
        """At which lengths the tokens were not the same, if any."""
        if not self.apart:
            return None
        where = f"at {', '.join(map(format_length, self.apart))}"
        if self.apart == self.lengths and len(self.lengths) > 1:
            where = "at any length"
        return (
            f"Not all lines were measured on the same tokens {where} (their sha256 differ): other "
            "documents or another tokenizer. Their values cannot be compared to each other."
        )


@dataclass
class Tally:
    """Trials of one cell."""

    hits: float = 0.0
    """Sum of what the trials found, each from 0 to 1."""

    trials: int | None = 0
    """None where only the share is known."""

    whole: bool = True
    """Whether every trial found all or nothing, as an interval for proportions supposes."""

    nlls: list[float] = field(default_factory=list)
    """Mean loss over the answer's tokens of each trial, in nats."""

    @property
    def share(self) -> float:
        """What was found, from 0 to 1."""
        return self.hits / self.trials if self.trials else self.hits

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval, where trials found all or nothing."""
        return wilson_interval(self.share, self.trials) if self.trials and self.whole else None

    @property
    def nll(self) -> float | None:
        """Mean over the trials, in nats per token of the answer."""
        return sum(self.nlls) / len(self.nlls) if self.nlls else None

    def add(self, found: float, nll: Any) -> None:
        """Count a trial."""
        assert self.trials is not None
        self.hits, self.trials = self.hits + found, self.trials + 1
        self.whole = self.whole and found in (0.0, 1.0)
        if is_finite(nll):
            self.nlls.append(float(nll))


Grid = dict[Subject, dict[tuple[int, float], Tally]]
"""Of each subject its trials by (length, depth)."""


@dataclass(frozen=True)
class RetrievalGroup:
    """Trials that one figure may compare."""

    kind: str
    """How they were scored (passkey), or the task (needle)."""

    by_length: dict[Subject, dict[int, Tally]]
    """All trials."""

    by_depth: Grid
    """Those on a grid of depths; empty if there are none."""

    scattered: set[Subject]
    """Subjects with trials that lie on no grid of depths."""

    @property
    def lengths(self) -> list[int]:
        """Every measured length in tokens, ascending."""
        return sorted({length for row in self.by_length.values() for length in row})


def perplexity_groups(measurements: Measurements) -> list[PerplexityGroup]:
    """Perplexities by requested stride, or by protocol where there is none.

    Where one subject was measured on several sources, these have groups of their own.
    """
    parts: dict[tuple[str, str], list[tuple[Subject, Row]]] = defaultdict(list)
    for subject, row in measurements.of("ppl"):
        stride = _text(row.get("requested_stride"))
        # One stride is one setting: whether its windows overlap follows from the length alone.
        parts["" if stride else row["protocol"], stride].append((subject, row))
    groups = []
    for (_, stride), pairs in parts.items():
        stride_text = f"stride {stride}" if stride else ""
        settings = ("sources", "documents_sha256", "original_length", "config_sha256")
        for source, some in split_repeats(pairs, ("length",), settings).items():
            rows: dict[Subject, dict[int, Row]] = defaultdict(dict)
            for subject, row in some:
                rows[subject][row["length"]] = row
            kept = {subject: dict(sorted(row.items())) for subject, row in rows.items()}
            detail = ", ".join(text for text in (stride_text, source) if text)
            found = {row["protocol"] for _, row in some}
            protocol = " and ".join(sorted(found, key=_place(_PROTOCOLS)))
            groups.append((protocol, detail, kept))
    groups.sort(key=lambda group: _place(_PROTOCOLS)(group[0].split(" ")[0]))
    names: list[str] = []
    for protocol, *_ in groups:
        slug = "".join(c if c.isascii() and c.isalnum() else "_" for c in protocol.lower())
        wanted = [f"perplexity_{slug}", *(f"perplexity_{slug}_{n}" for n in range(2, 99))]
        names.append(next(n for n in wanted if n not in names) if names else "perplexity")
    return [PerplexityGroup(name, *group) for name, group in zip(names, groups, strict=True)]


def passkey_groups(measurements: Measurements) -> list[RetrievalGroup]:
    """Passkey trials by the way of scoring."""
    parts: dict[str, list[tuple[Subject, Row]]] = defaultdict(list)
    for subject, row in measurements.of("passkey"):
        parts[row["scoring"]].append((subject, row))
    place = ("length", "requested_depth", "seed", "trial")
    return [
        _retrieval(", ".join(text for text in (kind, detail) if text), some)
        for kind, pairs in sorted(parts.items(), reverse=True)
        for detail, some in split_repeats(pairs, place, ("tokenizer_sha256",)).items()
    ]


def needle_groups(measurements: Measurements) -> list[RetrievalGroup]:
    """Needle trials by task, and by the numbers of needles and queries where these differ."""
    parts: dict[tuple[str, str], list[tuple[Subject, Row]]] = defaultdict(list)
    for subject, row in measurements.of("needle"):
        needles, queries = row.get("num_needles"), row.get("num_queries")
        detail = "" if needles is None else f"{needles} needle{'s' if needles != 1 else ''}"
        detail += f", {queries} queries" if queries not in (None, 1) else ""
        parts[row["task"], detail].append((subject, row))
    several = Counter(task for task, _ in parts)
    # Documents are a sample like trials, and pooled; prompts of two tokenizers are not.
    place = ("length", "requested_depth", "depth", "seed", "trial", "document_sha256")
    return [
        _retrieval(
            ", ".join(text for text in (task, detail if several[task] > 1 else "", more) if text),
            some,
        )
        for (task, detail), pairs in sorted(
            parts.items(), key=lambda part: (_place(_TASKS)(part[0][0]), part[0])
        )
        for more, some in split_repeats(pairs, place, ("tokenizer_sha256",)).items()
    ]


@dataclass(frozen=True)
class Benchmark:
    """One column of the table of short benchmarks."""

    task: str
    num_fewshot: int | None
    metric: str
    detail: str = ""
    """Settings that tell it from another of the same task, such as the seed; may be empty."""

    @property
    def lower_is_better(self) -> bool:
        """Whether a small value is a good one."""
        words = ("ppl", "perplexity", "loss", "bits", "byte", "brier", "nll")
        return any(word in self.metric.lower() for word in words)


def benchmark_table(
    measurements: Measurements,
) -> tuple[list[Benchmark], dict[Subject, dict[Benchmark, Row]]]:
    """Columns of the short benchmarks, and each subject's records."""
    parts: dict[tuple[Any, ...], list[tuple[Subject, Row]]] = defaultdict(list)
    for subject, row in measurements.of("short"):
        parts[row["task"], row.get("num_fewshot"), row["metric"]].append((subject, row))
    settings = ("limit", "max_length", "seed", "tokenizer_sha256")
    columns = {
        Benchmark(*benchmark, detail): some
        for benchmark, pairs in parts.items()
        for detail, some in split_repeats(pairs, (), settings).items()
    }
    table: dict[Subject, dict[Benchmark, Row]] = defaultdict(dict)
    for column, some in columns.items():
        for subject, row in some:
            table[subject][column] = row
    return list(columns), dict(table)


def best_of(column: Mapping[Any, float], *, lowest: bool) -> set[Any]:
    """Keys of the best value of a column that has two or more; nothing if all are equal."""
    finite = {key: value for key, value in column.items() if math.isfinite(value)}
    if len(set(column.values())) < 2 or not finite:
        return set()
    best = min(finite.values()) if lowest else max(finite.values())
    return {key for key, value in finite.items() if value == best}


def distinct(rows: Iterable[Row], key: str) -> list[str]:
    """Every value of a field as text, in the order of appearance."""
    return list(dict.fromkeys(_text(row[key]) for row in rows if row.get(key) not in (None, "")))


def split_repeats(
    pairs: Sequence[tuple[Subject, Row]], place: Sequence[str], settings: Sequence[str]
) -> dict[str, list[tuple[Subject, Row]]]:
    """Split records so that no subject has two at one place of a table.

    Args:
        place (Sequence[str]): Fields that say where in the table a record belongs.
        settings (Sequence[str]): Fields by which to split, the first that helps first. One by which
            no two records of a place differ splits nothing.

    Returns:
        dict[str, list]: The parts under the settings that tell them apart, in words; one part under
            an empty name where nothing repeats.
    """
    if not settings:
        return {"": list(pairs)}
    setting, *rest = settings
    found: dict[Any, set[str]] = defaultdict(set)
    parts: dict[str, list[tuple[Subject, Row]]] = defaultdict(list)
    for subject, row in pairs:
        words = _setting(setting, row.get(setting))
        found[subject, tuple(_text(row.get(name)) for name in place)].add(words)
        parts[words].append((subject, row))
    if not any(len(words) > 1 for words in found.values()):
        return split_repeats(pairs, place, rest)
    return {
        ", ".join(word for word in (words, more) if word): some
        for words, part in parts.items()
        for more, some in split_repeats(part, place, rest).items()
    }


def _setting(name: str, value: Any) -> str:
    """A setting in words: `tokenizer 3fa9c0d1`, `seed 7`, `no limit`."""
    if name == "sources":
        return _text(value)
    words = name.removesuffix("_sha256").replace("_", " ")
    if value is None:
        return f"no {words}"
    return f"{words} {_text(value)[:8] if name.endswith('_sha256') else _text(value)}"


def _retrieval(kind: str, pairs: Sequence[tuple[Subject, Row]]) -> RetrievalGroup:
    by_length: dict[Subject, dict[int, Tally]] = defaultdict(lambda: defaultdict(Tally))
    grid: Grid = defaultdict(lambda: defaultdict(Tally))
    scattered = set()
    for subject, row in pairs:
        length = row["length"]
        if "accuracy" in row:  # curated: the share is all there is
            trials = row.get("trials")
            hits = row["accuracy"] * (trials or 1)
            by_length[subject][length] = Tally(hits, trials)
            scattered.add(subject)
            continue
        found = float(row["correct"] if "correct" in row else row["recall"])
        by_length[subject][length].add(found, row.get("nll"))
        if (asked := row.get("requested_depth")) is not None:
            grid[subject][length, round(asked, 4)].add(found, row.get("nll"))
        else:
            scattered.add(subject)
    return RetrievalGroup(
        kind,
        {subject: dict(sorted(row.items())) for subject, row in by_length.items()},
        {subject: dict(sorted(cells.items())) for subject, cells in grid.items()},
        scattered,
    )


def _place(order: Sequence[str]) -> Callable[[str], int]:
    """Sort key: known words in their order, then the others."""
    return lambda word: order.index(word) if word in order else len(order)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
