"""Retrieval trials, of whatever kind: counted by length and depth, as tables and figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_longrope.evaluation.figure import Bars, Grid
from megatron_longrope.evaluation.kind import (
    ANYTHING,
    COUNT,
    MODEL_COLUMNS,
    Row,
    Section,
)
from megatron_longrope.evaluation.series import Rows, Series, distinct, span
from megatron_longrope.evaluation.statistics import Tally
from megatron_longrope.evaluation.table import Table, Value, length_column

REQUIRED = {"length": COUNT, "seed": ANYTHING, "trial": ANYTHING}
"""Fields of every trial."""

_PROMPTS = ("tokenizer_sha256", "bos")  # what they depend on, beside the trial

NUMBERS = {"nll": None}
"""See :attr:`.Kind.numbers`; a generated answer has no loss."""


@dataclass(frozen=True)
class Trials:
    """Trials that one table and one figure may compare."""

    by_length: Mapping[Series, Mapping[int, Tally]]
    """All of them."""
    by_depth: Mapping[Series, Mapping[tuple[int, float], Tally]]
    """Those that were asked for at a depth, by (length, depth)."""
    random: set[Series]
    """Series with trials at random depths."""

    @property
    def have_losses(self) -> bool:
        """Whether any trial recorded the loss of its answer."""
        return any(tally.nlls for row in self.by_length.values() for tally in row.values())


def count(rows: Rows, found: str) -> Trials:
    """Count trials.

    Args:
        rows (Rows): Records of trials that may be compared.
        found (str): Field that says what a trial found: a share, or whether it did.
    """
    by_length: dict[Series, dict[int, Tally]] = defaultdict(lambda: defaultdict(Tally))
    by_depth: dict[Series, dict[Any, Tally]] = defaultdict(lambda: defaultdict(Tally))
    random = set()
    for series, row in rows:
        share, nll, asked = float(row[found]), row.get("nll"), row.get("requested_depth")
        by_length[series][row["length"]].add(share, nll)
        if asked is None:
            random.add(series)
        else:
            by_depth[series][row["length"], round(asked, 4)].add(share, nll)
    return Trials(_ascending(by_length), _ascending(by_depth), random)


def section(
    trials: Trials,
    rows: Rows,
    *,
    name: str,
    title: str,
    what: str,
    tables: Sequence[Table],
    window: int | None,
) -> Section:
    """Return the section of some trials: their tables, a grid of depths, bars for random ones.

    `name` is the figures' and unique in a report; `what` is what captions call the share.
    """
    figures: list[Grid | Bars] = []
    if trials.by_depth:
        depths = sorted({depth for row in trials.by_depth.values() for _, depth in row})
        figures.append(
            Grid(
                f"{name}_by_depth", f"{title}, by depth",
                f"{what} by depth (0 % is the beginning of the text) and length; the darker, the "
                "more was found.",
                trials.by_depth,
                {depth: f"{depth:.0%}" for depth in depths},
                "Depth",
            )
        )  # fmt: skip
    loose = {series: row for series, row in trials.by_length.items() if series in trials.random}
    if loose:
        edge = " The upright line is the end of the original window." if window else ""
        figures.append(Bars(name, title, f"{what} by length.{edge}", loose, window))
    records = [row for _, row in rows]
    facts = {
        "scoring": distinct(records, "scoring"),
        "seeds": distinct(records, "seed"),
        "tokens of the prompts": span(records, "num_tokens"),
        "sources": distinct(records, "sources"),
    }
    return Section(title, tables, figures, facts=facts)


def table(
    trials: Trials,
    show: Callable[[Tally], Value],
    *,
    name: str,
    title: str,
    note: str,
    best: str = "highest",
) -> Table:
    """Return a table of series and lengths."""
    lengths = sorted({length for row in trials.by_length.values() for length in row})
    rows = {
        series.name: [show(row[length]) if length in row else None for length in lengths]
        for series, row in trials.by_length.items()
    }
    columns = [length_column(length, None, best) for length in lengths]
    return Table(name, title, columns, rows, note)


def percent(share: float) -> str:
    """Return a share for people."""
    return f"{100 * share:.0f} %"


def summary(rows: Iterable[Row], names: Sequence[str], found: str) -> list[tuple[Row, Tally]]:
    """Count the records of each target and of each value of `names`."""
    tallies: dict[tuple[Any, ...], Tally] = defaultdict(Tally)
    names = (*MODEL_COLUMNS, *_PROMPTS, *names)
    for row in rows:
        tallies[tuple(row.get(name) for name in names)].add(float(row[found]), row.get("nll"))
    return [(dict(zip(names, key, strict=True)), tally) for key, tally in tallies.items()]


def _ascending(counted: Mapping[Series, Mapping[Any, Tally]]) -> dict[Series, dict[Any, Tally]]:
    return {series: dict(sorted(row.items())) for series, row in counted.items()}
