"""Perplexity at several lengths."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_longrope.evaluation.figure import Lines
from megatron_longrope.evaluation.kind import COUNT, TEXT, Kind, Row, Section, is_number
from megatron_longrope.evaluation.options import (
    EvaluationOptions,
    bos_flag,
    flag,
    parse_choices,
    tokenizer_flag,
)
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
from megatron_longrope.lengths import format_length, parse_length
from megatron_longrope.methods import METHODS
from megatron_longrope.ranks import rank

if TYPE_CHECKING:
    from megatron_longrope.evaluation.scored_documents import ScoredDocuments
    from megatron_longrope.evaluation.session import Cell, Plan
    from megatron_longrope.evaluation.targets import NamedModel, Target

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


def _parse_stride(text: str) -> int | str:
    return text if text == "disjoint" else parse_length(text)


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(EvaluationOptions):
    """What `longrope eval ppl` is told."""

    GROUP: ClassVar[str] = "perplexity"

    data: str = flag(metavar="PREFIX|TEXT")
    """held-out documents: a prepared set, or a .txt, .jsonl or .jsonl.gz file or directory"""

    tokenizer: str | None = tokenizer_flag()
    bos: int | None = bos_flag()

    num_documents: int = flag(10, type=int, metavar="K")
    """the first K documents that fill the longest window (default: 10)"""

    stride: int | str | None = flag(None, type=_parse_stride, metavar="S")
    """slide by S tokens (`sliding`; beyond the window `sampled`), or `disjoint`: windows side by
    side, so that every length scores the same tokens (default: one window per document,
    `truncated`)"""

    baselines: Sequence[str] = flag((), type=parse_choices(*METHODS), metavar="LIST")
    """published methods to measure: none,pi,ntk,yarn,dynamic-ntk,base-ntk; on a model with factors
    they multiply those of its longest window"""

    attention_factor_policy: Sequence[str] | None = flag(
        None, type=parse_choices("su", "yarn", "none"), metavar="LIST"
    )
    """attention-factor policies of the baselines: su,yarn,none (default: each method's own, yarn
    for YaRN and none for the others, on top of what the model has)"""

    original_length: int | None = flag(None, type=parse_length, metavar="N")
    """pre-trained window of the baselines in tokens (default: from the checkpoint)"""

    def stride_at(self, length: int) -> int | None:
        """Return the tokens between the starts of two windows of this length."""
        return length - 1 if self.stride == "disjoint" else self.stride


def _plan(options: PerplexityOptions, models: Sequence[NamedModel]) -> Plan:
    from megatron_longrope.evaluation.perplexity import perplexity
    from megatron_longrope.evaluation.scored_documents import is_prepared, read_scored_documents
    from megatron_longrope.evaluation.session import Plan
    from megatron_longrope.evaluation.targets import check_tokenizer_fits, own_tokenizer

    targets = [item for model in models for item in _targets(options, model)]
    # A prepared set knows its tokenizer; a model's folder may hold the same one in another form.
    tokenizer = options.tokenizer
    if not is_prepared(options.data):
        tokenizer = own_tokenizer(tokenizer, models)
    documents = read_scored_documents(
        options.data, tokenizer, max(options.lengths), options.num_documents, options.bos
    )
    check_tokenizer_fits(documents.vocab_size, f"the tokenizer of {options.data}", models)
    if rank() == 0:
        print(f"lengths: {', '.join(map(str, options.lengths))} tokens", flush=True)

    def measure(engine, cell, on_window) -> Row:
        length = cell.fields["length"]
        result = perplexity(
            engine.nll,
            documents.tokens,
            documents.bos_id,
            length,
            stride=options.stride_at(length),
            on_window=on_window,
        )
        return result.to_dict()

    cells = [_cell(options, length, target, documents) for length, target in targets]
    return Plan(cells, measure, shared=False)


def _targets(options: PerplexityOptions, model: NamedModel) -> Iterator[tuple[int, Target]]:
    """Yield (length, target) of one model; lengths that its factors do not cover are refused."""
    from megatron_longrope.evaluation.targets import baselines_of, targets_at

    if options.longrope_config or not options.baselines:
        for target in targets_at([model], options.longrope_config, options.lengths):
            for length in options.lengths:
                yield length, target
    if options.baselines:
        policies = options.attention_factor_policy or [None]
        yield from baselines_of(
            model, options.baselines, policies, options.lengths, options.original_length
        )


def _cell(
    options: PerplexityOptions, length: int, target: Target, documents: ScoredDocuments
) -> Cell:
    from megatron_longrope.data.tokenizer import bos_name, bos_prefix
    from megatron_longrope.evaluation.perplexity import planned_windows, protocol_of
    from megatron_longrope.evaluation.session import Cell

    stride = options.stride_at(length)
    front = len(bos_prefix(documents.bos_id))
    lengths = [len(tokens) for tokens in documents.tokens]
    spans = planned_windows(lengths, length, stride, bos=bool(front))
    return Cell(
        target,
        {
            "length": length,
            "protocol": protocol_of(length, stride),
            "requested_stride": options.stride,
            "sources": f"{documents.source}:{len(documents.tokens)}",
            "documents_sha256": documents.sha256,
            "bos": bos_name(documents.bos_id),
            "requested_bos": options.bos,
        },
        Counter(span.end - span.start + front for _, span in spans),
    )


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

_COLUMNS = (
    "model", "label", "policy", "length", "protocol", "stride", "ppl_window_mean",
    "ppl_token_weighted", "num_windows", "num_tokens", "sha256", "seconds",
)  # fmt: skip

PPL = Kind(
    "ppl",
    help="perplexity at several lengths, for baselines and factor files",
    description="Perplexity by the paper's definition: BOS (where the tokenizer has one) before "
    "every window, unweighted mean over windows; the token-weighted mean is given beside it. One "
    "window per document (`truncated`) unless --stride is given.",
    options=PerplexityOptions,
    plan=_plan,
    unit="windows",
    summary=lambda rows: [{name: row.get(name) for name in _COLUMNS} for row in rows],
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
