"""Records of one checkpoint under one set of factors as a series, with a name of its own."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longrope.methods import METHODS

_OWN = "own factors"
"""What a checkpoint's factors are called beside those of files and baselines."""


@dataclass(frozen=True)
class Identity:
    """What makes two records belong together."""

    model: str
    """Label of the checkpoint."""
    label: str | None = None
    """Label of the factor file, name of the baseline, `checkpoint`, or None if nothing says."""
    policy: str | None = None
    """Attention-factor policy of a baseline."""
    checkpoint: str | None = field(default=None, compare=False)
    """The path as it was typed."""
    content: str | None = None
    """Hash of the checkpoint's content."""
    iteration: str | None = None
    sliding_window: int | None = None
    dtype: str | None = None
    """Of the weights."""
    config: str | None = field(default=None, compare=False)
    """The factor file; its content counts, not how its path was written."""
    config_sha256: str = ""
    """Of the factors; empty for baselines, which have others at every length."""

    @property
    def factors(self) -> str | None:
        """What its factors are called; a file may be called `checkpoint`, too."""
        return _OWN if self.config is None and self.label == "checkpoint" else self.label

    @property
    def is_method(self) -> bool:
        """Whether the factors are those of a published method."""
        return self.config is None and self.label in METHODS


@dataclass(frozen=True)
class Series:
    """A checkpoint under one set of factors: a row of a table, a line of a figure."""

    name: str
    """Unique in the report."""
    identity: Identity
    """What it is."""
    original_length: int | None = None
    """Pre-trained window in tokens."""


Entry = tuple[Identity, Path, Hashable, Mapping[str, Any]]
"""Of a record: identity, folder, cell, fields."""


Row = dict[str, Any]
"""A record."""

Rows = Sequence[tuple[Series, Row]]
"""Records of one kind, each with its series; no two of one cell."""


def name_series(entries: Sequence[Entry]) -> list[Series]:
    """Find the series of each record.

    Records with one identity belong to one series, unless two folders hold different records of
    the same cell: then each folder's are a series of their own.

    Args:
        entries (Sequence[Entry]): In the order in which series shall be listed.
    """
    by_identity: dict[Identity, list[int]] = defaultdict(list)
    for index, (identity, *_) in enumerate(entries):
        by_identity[identity].append(index)
    groups = [
        (identity, part)
        for identity, indices in by_identity.items()
        for part in _apart(entries, indices)
    ]
    folders = [_common(entries, part) for _, part in groups]
    names = _names([identity for identity, _ in groups], folders)
    owners: dict[int, Series] = {}
    for (identity, part), name in zip(groups, names, strict=True):
        owners |= dict.fromkeys(part, Series(name, identity))
    return [owners[index] for index in range(len(entries))]


def _apart(entries: Sequence[Entry], indices: Sequence[int]) -> list[list[int]]:
    """Split one identity's records by folder as far as their cells contradict each other."""
    contents: dict[Hashable, dict[Path, Mapping[str, Any]]] = defaultdict(dict)
    for index in indices:
        _, folder, cell, row = entries[index]
        contents[cell][folder] = row  # within a folder the last record wins
    # As text, in which NaN equals NaN.
    if not any(
        len({json.dumps(row, sort_keys=True) for row in of_folders.values()}) > 1
        for of_folders in contents.values()
        if len(of_folders) > 1
    ):
        return [list(indices)]
    root = _common(entries, indices)
    branches: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index in indices:
        branches[entries[index][1].relative_to(root).parts[:1]].append(index)
    return [part for branch in branches.values() for part in _apart(entries, branch)]


def _names(identities: Sequence[Identity], folders: Sequence[Path]) -> list[str]:
    """As short as tells all of them apart."""
    models = {identity.model for identity in identities}
    labels = {identity.factors for identity in identities}
    policies: dict[tuple[str, str | None], set[str | None]] = defaultdict(set)
    for identity in identities:
        policies[identity.model, identity.factors].add(identity.policy)
    names = []
    for identity in identities:
        parts = [identity.model] if len(models) > 1 or len(labels) == 1 else []
        label = identity.factors
        # A single label goes without saying beside several models.
        if label is not None and (len(labels) > 1 or (label != _OWN and len(models) == 1)):
            parts.append(METHODS[label].label if identity.is_method else label)
        name = ", ".join(parts) or identity.model
        if identity.policy and len(policies[identity.model, label]) > 1:
            name += f" ({identity.policy})"
        names.append(name)
    for name, count in Counter(names).items():
        if count > 1:
            same = [index for index, other in enumerate(names) if other == name]
            suffixes = _differences([identities[i] for i in same], [folders[i] for i in same])
            for index, suffix in zip(same, suffixes, strict=True):
                names[index] = f"{name} ({suffix})"
    taken: set[str] = set()
    for index, name in enumerate(names):
        number = 2
        while names[index] in taken:
            names[index] = f"{name} {number}"
            number += 1
        taken.add(names[index])
    return names


def _differences(identities: Sequence[Identity], folders: Sequence[Path]) -> list[str]:
    """What tells series with one name apart: folder, iteration, checkpoint or factor file."""
    candidates = (
        _distinct_parts(folders),
        [f"iteration {identity.iteration}" for identity in identities],
        [
            f"sliding window {identity.sliding_window}" if identity.sliding_window else "full"
            for identity in identities
        ],
        [identity.dtype or "default dtype" for identity in identities],
        _distinct_parts([Path(identity.checkpoint or "?") for identity in identities]),
        [f"factors {identity.config_sha256[:8]}" for identity in identities],
        _distinct_parts([Path(identity.config or "?") for identity in identities]),
    )
    for candidate in candidates:
        if len(set(candidate)) == len(candidate):
            return candidate
    varied = [candidate for candidate in candidates if len(set(candidate)) > 1]
    return [", ".join(parts) for parts in zip(*varied, strict=True)] or [
        str(number) for number in range(1, len(identities) + 1)
    ]


def _distinct_parts(paths: Sequence[Path]) -> list[str]:
    """The paths without the parts that all of them begin and end with."""
    parts = [path.parts for path in paths]
    shortest = min(map(len, parts))
    start = 0
    while start < shortest - 1 and len({item[start] for item in parts}) == 1:
        start += 1
    stop = 0
    while stop < shortest - start - 1 and len({item[len(item) - 1 - stop] for item in parts}) == 1:
        stop += 1
    return ["/".join(item[start : len(item) - stop]) for item in parts]


def _common(entries: Sequence[Entry], indices: Sequence[int]) -> Path:
    """Return the folder that all of these lie in."""
    return Path(os.path.commonpath([entries[index][1] for index in indices]))


def identify(row: Row) -> Identity:
    """Return what a record says of the series that it belongs to."""
    checkpoint = row.get("checkpoint")
    config, policy = row.get("config"), row.get("policy")
    # A baseline's factors are computed for each length, so its hash changes along the line.
    computed = config is None and (policy is not None or row.get("label") in METHODS)
    return Identity(
        model=row.get("model") or (Path(str(checkpoint)).name if checkpoint else "model"),
        label=row.get("label") or "checkpoint",
        policy=None if policy is None else str(policy),
        checkpoint=None if checkpoint is None else str(checkpoint),
        content=row.get("checkpoint_sha256"),
        iteration=None if row.get("iteration") is None else str(row["iteration"]),
        sliding_window=row.get("sliding_window"),
        dtype=row.get("requested_dtype"),
        config=None if config is None else str(config),
        config_sha256="" if computed else str(row.get("config_sha256") or ""),
    )


def split_repeats(rows: Rows, place: Sequence[str], settings: Sequence[str]) -> dict[str, Rows]:
    """Split records so that no series has two at one place of a table.

    Args:
        rows (Rows): Records of a table.
        place (Sequence[str]): Fields that say where in the table a record belongs.
        settings (Sequence[str]): Fields by which to split, the first that helps first. One by which
            no two records of a place differ splits nothing.

    Returns:
        dict[str, Rows]: The parts under the settings that tell them apart, in words; one part under
            an empty name where nothing repeats.
    """
    if not settings:
        return {"": rows}
    setting, *rest = settings
    found: dict[Any, set[str]] = defaultdict(set)
    parts: dict[str, list[tuple[Series, Row]]] = defaultdict(list)
    for series, row in rows:
        words = _in_words(setting, row.get(setting))
        found[series, tuple(as_text(row.get(name)) for name in place)].add(words)
        parts[words].append((series, row))
    if not any(len(words) > 1 for words in found.values()):
        return split_repeats(rows, place, rest)
    return {
        joined(words, more): some
        for words, part in parts.items()
        for more, some in split_repeats(part, place, rest).items()
    }


def _in_words(name: str, value: Any) -> str:
    """`tokenizer 3fa9c0d1`, `seed 7`, `no limit`."""
    if name == "sources":
        return as_text(value)
    words = name.removeprefix("requested_").removesuffix("_sha256").replace("_", " ")
    text = as_text(value)[:8] if name.endswith("_sha256") else as_text(value)
    if value is None:
        return f"{'default' if name.startswith('requested_') else 'no'} {words}"
    return f"{words} {text}"


def joined(*words: str) -> str:
    """Return the words that are not empty with commas between them."""
    return ", ".join(filter(None, words))


def distinct(rows: Iterable[Row], name: str) -> str:
    """Return every value of a field, in the order of appearance."""
    found = dict.fromkeys(as_text(row[name]) for row in rows if row.get(name) not in (None, ""))
    return ", ".join(found)


def span(rows: Iterable[Row], name: str) -> str:
    """Return the values of a field as `10`, or as `10 to 2,000` where they differ."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def as_text(value: Any) -> str:
    """Return a field as text; nothing for one that is absent."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
