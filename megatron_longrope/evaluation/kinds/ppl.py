"""Perplexity at several lengths."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from megatron_longrope.evaluation.figure import Lines
from megatron_longrope.evaluation.kind import COUNT, TEXT, Kind, Row, Section, is_number
from megatron_longrope.evaluation.series import (
    Rows,
    Series,
    as_text,
    distinct,
    joined,
    span,
    split_repeats,
)
from megatron_longrope.evaluation.statistics import is_finite
from megatron_longrope.evaluation.table import Table, Value, format_score, length_column
from megatron_longrope.lengths import format_length

_PROTOCOLS = {
    "truncated": "one window at the start of each document",
    "sampled": "windows that do not overlap and leave tokens between them",
    "sliding": "sliding windows over whole documents",
    "sampled and sliding": "windows at one stride, sampled where they are shorter than it and "
    "sliding where they are longer",
}  # in the order of a report
_MEANS = {
    "ppl_window_mean": "exp of the unweighted mean over windows, the paper's number",
    "ppl_token_weighted": "exp of the mean over tokens",
}

_SETTINGS = (
    "sources", "documents_sha256", "requested_bos", "original_length", "config_sha256",
)  # fmt: skip

ByLength = dict[Series, dict[int, Row]]


def _sections(rows: Rows, window: int | None) -> list[Section]:
    """Return a section for each stride, or for each protocol where there is none.

    Where one series was measured twice at a length, on other documents for instance, the records
    are split by what differs.
    """
    parts: dict[tuple[str, str], list] = defaultdict(list)
    for series, row in rows:
        stride = as_text(row.get("requested_stride"))
        # One stride is one setting: whether its windows overlap follows from the length alone.
        parts["" if stride else row["protocol"], stride].append((series, row))
    order = {protocol: place for place, protocol in enumerate(_PROTOCOLS)}
    groups = []
    for (_, stride), pairs in parts.items():
        settings = (
            "sources",
            "documents_sha256",
            "requested_bos",
            "original_length",
            "config_sha256",
        )
        for detail, some in split_repeats(pairs, ("length",), settings).items():
            protocol = " and ".join(sorted({row["protocol"] for _, row in some}))
            groups.append((protocol, joined(f"stride {stride}" if stride else "", detail), some))
    groups.sort(key=lambda group: order.get(group[0].split(" ")[0], len(order)))
    names: list[str] = []
    for protocol, *_ in groups:
        slug = "".join(c if c.isascii() and c.isalnum() else "_" for c in protocol.lower())
        wanted = [f"perplexity_{slug}", *(f"perplexity_{slug}_{n}" for n in range(2, 99))]
        names.append(next(n for n in wanted if n not in names) if names else "perplexity")
    return [_section(name, *group, window) for name, group in zip(names, groups, strict=True)]


def _section(name: str, protocol: str, detail: str, rows: Rows, window: int | None) -> Section:
    title = f"Perplexity by sequence length ({joined(protocol, detail)})"
    by_length: ByLength = defaultdict(dict)
    for series, row in sorted(rows, key=lambda pair: pair[1]["length"]):
        by_length[series][row["length"]] = row
    by_length = {series: by_length[series] for series, _ in rows}
    records = [row for _, row in rows]
    # The last of windows side by side may hold a few tokens only, which a mean over windows would
    # count as much as thousands.
    disjoint = any(row.get("requested_stride") == "disjoint" for row in records)
    main, other = sorted(_MEANS, reverse=not disjoint)
    apart = _on_other_tokens(by_length)
    facts = {
        "sources": distinct(records, "sources"),
        "strides used": "" if protocol == "truncated" else distinct(records, "stride"),
        "scored tokens": span(records, "num_tokens"),
        "windows": span(records, "num_windows"),
    }
    figures = [_curves(name, title, by_length, main, window), _positions(name, by_length)]
    caption = f"Protocol: {protocol}, {_PROTOCOLS.get(protocol, protocol)}."
    table = _table(name, title, by_length, (main, other), apart, window)
    return Section(
        title,
        [table],
        [figure for figure in figures if figure],
        [_warning(apart, table)] if apart else [],
        {"protocol": caption} | facts,
    )


def _table(
    name: str,
    title: str,
    rows: ByLength,
    means: tuple[str, str],
    apart: set[int],
    window: int | None,
) -> Table:
    lengths = sorted({length for row in rows.values() for length in row})
    main, other = means
    cells = {
        series.name: [
            Value(format_score(row[n][main]), float(row[n][main]), (format_score(row[n][other]),))
            if n in row
            else None
            for n in lengths
        ]
        for series, row in rows.items()
    }
    note = (
        f"Perplexity: {_MEANS[main]}; under it {_MEANS[other]}. The lowest of each length is marked"
        f"{' where all were measured on the same tokens' if apart else ''}."
    )
    if window:
        note += " Under each length: its ratio to the original window."
    columns = [length_column(n, window, "" if n in apart else "lowest") for n in lengths]
    return Table(name, title, columns, cells, "perplexity", note)


def _curves(name: str, title: str, rows: ByLength, mean: str, window: int | None) -> Lines | None:
    """Return perplexity against length; nothing without a finite value."""
    lines = {
        series: {length: row[mean] for length, row in by.items() if is_finite(row[mean])}
        for series, by in rows.items()
    }
    lost = sum(len(rows[series]) - len(line) for series, line in lines.items())
    lines = {series: line for series, line in lines.items() if line}
    if not lines:
        return None
    caption = f"Drawn: {_MEANS[mean]}."
    if lost:
        caption += f" {lost} value{'s are' if lost > 1 else ' is'} not finite and not drawn."
    header = (
        "length", "protocol", "ppl_window_mean", "ppl_token_weighted", "requested_stride", "stride",
        "num_windows", "num_tokens", "sha256",
    )  # fmt: skip
    data = [
        (series, [row.get(field, "") for field in header])
        for series, by in rows.items()
        for row in by.values()
    ]
    return Lines(name, title, caption, lines, "Sequence length (tokens)",
                 "Perplexity (lower is better)", True, window, header, data)  # fmt: skip


def _positions(name: str, rows: ByLength) -> Lines | None:
    """Return loss by the token's place in the window, at the longest length that has it."""
    having: dict[int, dict[Series, Row]] = defaultdict(dict)
    for series, by in rows.items():
        for length, row in by.items():
            if any(is_finite(bucket["nll"]) for bucket in row.get("nll_by_position") or ()):
                having[length][series] = row
    if not having:
        return None
    longest = max(having)
    data = [
        (series, (longest, bucket["from"], bucket["nll"], bucket.get("tokens", "")))
        for series, row in having[longest].items()
        for bucket in row["nll_by_position"]
    ]
    return Lines(
        f"{name}_by_position",
        f"Loss by position in a window of {format_length(longest)}",
        "Mean loss of the scored tokens in each part of the window, drawn at the part's middle. It "
        "falls where the model uses what stands before, and rises where positions are beyond it.",
        {series: _middles(row) for series, row in having[longest].items()},
        "Position in the window (tokens)",
        "Loss (nats per token)",
        False,
        longest,
        ("length", "from", "nll", "tokens"),
        data,
    )


def _middles(row: Row) -> dict[float, float]:
    """Return the finite loss of each part of the window by the part's middle."""
    buckets = sorted(row["nll_by_position"], key=lambda bucket: bucket["from"])
    ends = [bucket["from"] for bucket in buckets[1:]] + [row["length"]]
    return {
        (bucket["from"] + end) / 2: bucket["nll"]
        for bucket, end in zip(buckets, ends, strict=True)
        if is_finite(bucket["nll"])
    }


def _on_other_tokens(rows: ByLength) -> set[int]:
    """Return the lengths at which the series were measured on different tokens."""
    hashes: dict[int, set[str]] = defaultdict(set)
    for by in rows.values():
        for length, row in by.items():
            hashes[length].add(row.get("sha256") or "")
    return {length for length, found in hashes.items() if len(found - {""}) > 1}


def _warning(apart: set[int], table: Table) -> str:
    where = f"at {', '.join(map(format_length, sorted(apart)))}"
    if len(apart) == len(table.columns) > 1:
        where = "at any length"
    return (
        f"Not all rows were measured on the same tokens {where} (their sha256 differ): other "
        "documents or another tokenizer. Their values cannot be compared to each other."
    )


def _restore(row: Row) -> None:
    """Records hold null where a perplexity or a loss is not finite, for which JSON has no word."""
    buckets = row.get("nll_by_position")
    places = [(row, "ppl_window_mean"), (row, "ppl_token_weighted")]
    if isinstance(buckets, list):
        places += [(bucket, "nll") for bucket in buckets if isinstance(bucket, dict)]
    for place, name in places:
        if name in place and place[name] is None:
            place[name] = math.inf


def _are_buckets(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and is_number(item.get("from")) and is_number(item.get("nll"))
        for item in value
    )


_PERPLEXITY = (lambda value: is_number(value) and not value <= 0, "a number above 0")

PPL = Kind(
    "ppl",
    key=("length", "requested_stride", "documents_sha256", "requested_bos"),
    required={
        "length": COUNT,
        "protocol": TEXT,
        "ppl_window_mean": _PERPLEXITY,
        "ppl_token_weighted": _PERPLEXITY,
    },
    optional={"nll_by_position": (_are_buckets, "a list of objects with `from` and `nll`")},
    restore=_restore,
    sections=_sections,
)
