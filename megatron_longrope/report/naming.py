"""What the measured things are called: short names that tell every one from the others."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_longrope.report.style import CYCLE, METHODS, Style, style_of

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

    checkpoint: str | None = None
    iteration: str | None = None
    config: str | None = field(default=None, compare=False)
    """The factor file; its content counts, not how its path was written."""

    config_sha256: str = ""
    """Of the factors; empty for baselines, which have others at every length."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint under one set of factors, as figures and tables list it."""

    name: str
    """Unique in the report."""

    identity: Identity
    """What it is."""

    folder: str
    """Where its records lie."""

    original_length: int | None = None
    """Pre-trained window in tokens."""

    def with_window(self, original_length: int | None) -> Subject:
        """The same with a pre-trained window."""
        return replace(self, original_length=original_length)


Entry = tuple[Identity, Path, Hashable, Mapping[str, Any]]
"""Of a record: identity, folder, cell, fields."""


def name_subjects(entries: Sequence[Entry]) -> list[Subject]:
    """The subject of each record.

    Records with one identity belong to one subject, unless two folders hold different records of
    the same cell: then each folder's are a subject of their own.

    Args:
        entries (Sequence[Entry]): In the order in which subjects shall be listed.
    """
    by_identity: dict[Identity, list[int]] = defaultdict(list)
    for index, (identity, *_) in enumerate(entries):
        by_identity[identity].append(index)
    groups = [
        (identity, part)
        for identity, indices in by_identity.items()
        for part in _apart(entries, indices)
    ]
    folders = [_common([entries[index][1] for index in part]) for _, part in groups]
    names = _names([identity for identity, _ in groups], folders)
    owners: dict[int, Subject] = {}
    for (identity, part), folder, name in zip(groups, folders, names, strict=True):
        owners |= dict.fromkeys(part, Subject(name, identity, str(folder)))
    return [owners[index] for index in range(len(entries))]


def subject_styles(subjects: Sequence[Subject]) -> dict[Subject, Style]:
    """A colour, marker and line style for each subject, the same in every figure.

    Beside a single model's factors the published methods keep the colours they have elsewhere.
    """
    single = len({subject.identity.model for subject in subjects}) == 1
    styles: dict[Subject, Style] = {}
    named: set[str | None] = set()
    for subject in subjects:
        label = subject.identity.label
        if single and _is_method(subject.identity) and label not in named:
            named.add(label)  # a second policy of the method gets another look
            styles[subject] = METHODS[label]._replace(label=subject.name)
    used = {style.color for style in styles.values()}
    free = [style for style in CYCLE if style.color not in used] or list(CYCLE)
    others = [subject for subject in subjects if subject not in styles]
    for number, subject in enumerate(others):
        # Each round through the colours pairs them with other markers and dashes.
        style, turn = free[number % len(free)], number // len(free)
        place = CYCLE.index(style)
        styles[subject] = Style(
            subject.name, style.color, CYCLE[(place + turn) % len(CYCLE)].marker,
            CYCLE[(place + 2 * turn) % len(CYCLE)].dashes,
        )  # fmt: skip
    return {subject: styles[subject] for subject in subjects}


def _is_method(identity: Identity) -> bool:
    return identity.config is None and identity.label in METHODS


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
    root = _common([entries[index][1] for index in indices])
    branches: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index in indices:
        branches[entries[index][1].relative_to(root).parts[:1]].append(index)
    return [part for branch in branches.values() for part in _apart(entries, branch)]


def _names(identities: Sequence[Identity], folders: Sequence[Path]) -> list[str]:
    """As short as tells all of them apart."""
    models = {identity.model for identity in identities}
    labels = {identity.label for identity in identities}
    policies: dict[tuple[str, str | None], set[str | None]] = defaultdict(set)
    for identity in identities:
        policies[identity.model, identity.label].add(identity.policy)
    names = []
    for identity in identities:
        parts = [identity.model] if len(models) > 1 or len(labels) == 1 else []
        if identity.label is not None and (len(labels) > 1 or identity.label != "checkpoint"):
            label = _OWN if identity.label == "checkpoint" else identity.label
            # A single label goes without saying beside several models.
            if len(labels) > 1 or len(models) == 1:
                parts.append(style_of(label).label if _is_method(identity) else label)
        name = ", ".join(parts) or identity.model
        if identity.policy and len(policies[identity.model, identity.label]) > 1:
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
    """What tells subjects with one name apart: folder, iteration, checkpoint or factor file."""
    candidates = (
        _distinct_parts(folders),
        [f"iteration {identity.iteration}" for identity in identities],
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


def _common(folders: Sequence[Path]) -> Path:
    common: list[str] = []
    for parts in zip(*(folder.parts for folder in folders), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return Path(*common)
