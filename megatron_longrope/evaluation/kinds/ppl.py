"""Perplexity at several lengths."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.kind import (
    COUNT,
    MODEL_COLUMNS,
    TEXT,
    Kind,
    Row,
    Section,
    is_number,
)
from megatron_longrope.evaluation.options import (
    EvaluationOptions,
    parse_choices,
    text_key_flag,
    tokenizer_flag,
)
from megatron_longrope.evaluation.perplexity_figures import MEANS, ByLength, by_position, curves
from megatron_longrope.evaluation.series import (
    Rows,
    as_text,
    distinct,
    joined,
    span,
    split_repeats,
)
from megatron_longrope.evaluation.table import Table, Value, format_score, length_column
from megatron_longrope.lengths import format_length, parse_length
from megatron_longrope.methods import METHODS
from megatron_longrope.options import bos_flag, flag, parse_positive
from megatron_longrope.ranks import rank

if TYPE_CHECKING:
    from megatron_longrope.evaluation.scored_documents import ScoredDocuments
    from megatron_longrope.evaluation.session import Cell, Plan
    from megatron_longrope.evaluation.targets import NamedModel, Target

_PROTOCOLS = {
    "truncated": "one window at the start of each document",
    "random": "windows at random places, the same ones at every length",
    "sampled": "windows that do not overlap and leave tokens between them",
    "sliding": "sliding windows over whole documents",
    "sampled and sliding": "windows at one stride, sampled where they are shorter than it and "
    "sliding where they are longer",
}  # in the order of a report

_SETTINGS = (
    "random_windows", "seed", "sources", "documents_sha256", "bos", "original_length",
    "config_sha256",
)  # fmt: skip


def _parse_stride(text: str) -> int | str:
    return text if text == "disjoint" else parse_length(text)


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(EvaluationOptions):
    """What `longrope eval ppl` is told."""

    GROUP: ClassVar[str] = "perplexity"

    data: str = flag(metavar="PREFIX|TEXT")
    """held-out documents: a prepared set, or text as `longrope data prepare` reads it: .txt, .jsonl
    (.gz, .zst), .parquet, or a directory"""
    text_key: str = text_key_flag()
    tokenizer: str | None = tokenizer_flag()
    bos: int | None = bos_flag()

    num_documents: int = flag(10, type=parse_positive, metavar="K")
    """the first K documents that fill the longest window; a longer one may choose others"""
    stride: int | str | None = flag(None, type=_parse_stride, metavar="S")
    """slide by S tokens (`sliding`; beyond the window `sampled`), or `disjoint`: windows side by
    side, so that every length scores the same tokens (default: one window per document,
    `truncated`)"""
    random_windows: int | None = flag(None, type=parse_positive, metavar="W")
    """W windows at random places of these documents instead (`random`), the same places at every
    length"""
    seed: int = flag(42, type=int)
    """of the random windows"""
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
    from megatron_longrope.evaluation.perplexity import perplexity, random_places
    from megatron_longrope.evaluation.scored_documents import is_prepared, read_scored_documents
    from megatron_longrope.evaluation.session import Plan
    from megatron_longrope.evaluation.targets import check_tokenizer_fits, own_tokenizer

    if options.random_windows is not None and options.stride is not None:
        raise LongRopeError(
            f"--random-windows {options.random_windows} and --stride {options.stride} are two ways "
            "of placing windows; give one of them"
        )
    for flag_name, value in (
        ("--attention-factor-policy", options.attention_factor_policy),
        ("--original-length", options.original_length),
    ):
        if value is not None and not options.baselines:
            raise LongRopeError(
                f"{flag_name} is for published methods, and none is measured: give --baselines, or "
                "leave it out (factor files and checkpoints have their own)"
            )
    targets = [item for model in models for item in _targets(options, model)]
    # A prepared set knows its tokenizer; a model's folder may hold the same one in another form.
    tokenizer = options.tokenizer
    if not is_prepared(options.data):
        tokenizer = own_tokenizer(tokenizer, models)
    documents = read_scored_documents(
        options.data,
        tokenizer,
        max(options.lengths),
        options.num_documents,
        options.bos,
        options.text_key,
    )
    places = None
    if (count := options.random_windows) is not None:
        lengths = [len(tokens) for tokens in documents.tokens]
        bos = documents.bos_id is not None
        places = random_places(lengths, max(options.lengths), count, options.seed, bos=bos)
    whose = f"the tokenizer of {options.data}"
    check_tokenizer_fits(documents.vocab_size, documents.tokenizer, whose, models)
    if rank() == 0:
        print(f"lengths: {', '.join(map(str, options.lengths))} tokens", flush=True)

    def measure(engine, cell, on_window, passes) -> Row:
        length = cell.fields["length"]
        with engine.pinned(length):  # the last window of a document may be shorter
            result = perplexity(
                engine.nll,
                documents.tokens,
                documents.bos_id,
                length,
                stride=options.stride_at(length),
                places=places,
                on_window=on_window,
                passes=passes,
            )
        return asdict(result)

    cells = [_cell(options, length, target, documents, places) for length, target in targets]
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
    options: PerplexityOptions,
    length: int,
    target: Target,
    documents: ScoredDocuments,
    places: list[tuple[int, int]] | None,
) -> Cell:
    from megatron_longrope.data.tokenizer import bos_name, bos_prefix
    from megatron_longrope.evaluation.perplexity import planned_windows, protocol_of
    from megatron_longrope.evaluation.session import Cell

    stride = options.stride_at(length)
    front = len(bos_prefix(documents.bos_id))
    lengths = [len(tokens) for tokens in documents.tokens]
    spans = planned_windows(lengths, length, stride, bos=bool(front), places=places)
    passes = [span.end - span.start + front for _, span in spans]
    return Cell(
        target,
        {
            "length": length,
            "protocol": protocol_of(length, stride, drawn=places is not None),
            "requested_stride": options.stride,
            "random_windows": options.random_windows,
            # Places are drawn for the longest window, so that they depend on it.
            "seed": None if places is None else f"{options.seed} at {max(options.lengths)}",
            "sources": f"{options.data}:{len(documents.tokens)}",
            "documents_sha256": documents.sha256,
            "bos": bos_name(documents.bos_id),
        },
        Counter(passes),
        passes=passes,
    )


def _sections(rows: Rows, window: int | None) -> list[Section]:
    """Return a section for each stride, or for each protocol where there is none.

    Where one series was measured on several sets of documents, or twice at a length, the records
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
        for documents, part in _by_documents(pairs).items():
            for detail, some in split_repeats(part, ("length",), _SETTINGS).items():
                protocol = " and ".join(sorted({row["protocol"] for _, row in some}))
                words = joined(f"stride {stride}" if stride else "", documents, detail)
                groups.append((protocol, words, some))
    groups.sort(
        key=lambda group: (
            order.get(group[0].split(" ")[0], len(order)),
            min(row["length"] for _, row in group[2]),
        )
    )
    names: list[str] = []
    for protocol, *_ in groups:
        slug = "".join(c if c.isascii() and c.isalnum() else "_" for c in protocol.lower())
        wanted = [f"perplexity_{slug}", *(f"perplexity_{slug}_{n}" for n in range(2, 99))]
        names.append(next(n for n in wanted if n not in names) if names else "perplexity")
    return [_section(name, *group, window) for name, group in zip(names, groups, strict=True)]


def _by_documents(rows: Rows) -> dict[str, Rows]:
    """Split records if a series has several sets of documents: no curve leads over two corpora."""
    # With no field for a place, all records of a series count as at one.
    if len(split_repeats(rows, (), ("documents_sha256",))) == 1:
        return {"": rows}  # the same documents, whatever their files were called
    return split_repeats(rows, (), ("sources", "documents_sha256"))


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
    main, other = sorted(MEANS, reverse=not disjoint)
    apart = _on_other_tokens(by_length)
    facts = {
        "sources": distinct(records, "sources"),
        "strides used": "" if protocol == "truncated" else distinct(records, "stride"),
        "scored tokens": span(records, "num_tokens"),
        "windows": span(records, "num_windows"),
    }
    figures = [curves(name, title, by_length, main, window), by_position(name, by_length)]
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
        series.name: [_value(row[n], main, other) if n in row else None for n in lengths]
        for series, row in rows.items()
    }
    note = (
        f"Perplexity: {MEANS[main]}; under it {MEANS[other]}. The lowest of each length is marked"
        f"{' where all were measured on the same tokens' if apart else ''}."
    )
    if any(_interval(row, main) for by in rows.values() for row in by.values()):
        note += " From ... to: 95 % confidence interval of each, Student's t, documents as units."
    if window:
        note += " Under each length: its ratio to the original window."
    columns = [length_column(n, window, "" if n in apart else "lowest") for n in lengths]
    return Table(name, title, columns, cells, note)


def _value(row: Row, main: str, other: str) -> Value:
    """Return both means, each with its interval below it."""
    below = [_interval(row, main), format_score(row[other]), _interval(row, other)]
    return Value(format_score(row[main]), float(row[main]), tuple(filter(None, below)))


def _interval(row: Row, mean: str) -> str:
    found = row.get(f"{mean}_interval")
    return f"{format_score(found[0])} to {format_score(found[1])}" if found else ""


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


_PERPLEXITY = (lambda value: is_number(value) and not value <= 0, "a number above 0")

_NUMBERS = (
    *MEANS, *(f"{mean}_interval" for mean in MEANS), "nll_per_document",
    "nll_per_document_token_weighted", "nll_by_position",
)  # fmt: skip
_KEY = ("length", "requested_stride", "random_windows", "seed", "documents_sha256", "bos")
_COLUMNS = (
    *MODEL_COLUMNS, *_KEY, "protocol", "stride", "ppl_window_mean", "ppl_window_mean_low",
    "ppl_window_mean_high", "ppl_token_weighted", "ppl_token_weighted_low",
    "ppl_token_weighted_high", "num_windows", "num_tokens", "sha256", "seconds",
)  # fmt: skip


def _summary(rows: Sequence[Row]) -> list[Row]:
    lines = []
    for row in rows:
        bounds = {
            f"{mean}_{end}": value
            for mean in MEANS
            for end, value in zip(
                ("low", "high"), row.get(f"{mean}_interval") or (None, None), strict=True
            )
        }
        lines.append({name: (row | bounds).get(name) for name in _COLUMNS})
    return lines


PPL = Kind(
    "ppl",
    help="perplexity at several lengths, for baselines and factor files",
    description="Perplexity by the paper's definition: BOS (where the tokenizer has one) before "
    "every window, unweighted mean over windows; the token-weighted mean is given beside it. One "
    "window per document (`truncated`) unless --stride is given.",
    options=PerplexityOptions,
    plan=_plan,
    unit="windows",
    summary=_summary,
    key=_KEY,
    required={
        "length": COUNT,
        "protocol": TEXT,
        "ppl_window_mean": _PERPLEXITY,
        "ppl_token_weighted": _PERPLEXITY,
    },
    numbers=dict.fromkeys(_NUMBERS, math.inf),
    sections=_sections,
)
