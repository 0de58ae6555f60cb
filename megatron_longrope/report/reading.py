"""Read what `longrope eval` left in one or several directories, and whose it is.

A series is a checkpoint under one set of factors. Its records may lie in several files; two series
that would be called the same get names that tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.kind import Row, cell_key
from megatron_longrope.evaluation.kinds import KINDS
from megatron_longrope.evaluation.records import read_rows
from megatron_longrope.evaluation.series import Identity, Rows, Series, identify, name_series
from megatron_longrope.files import read_json

FACTS = "facts.json"
"""Further facts about a run: `{title: {name: value}}`."""

JOURNAL = ".journal.jsonl"
"""How the name of a search's journal ends."""

Found = tuple[Identity, Path, str, Row]
"""Of a record: whose it is, its folder, its kind, its fields."""


@dataclass(frozen=True)
class Measurements:
    """Every measurement of the directories, each once."""

    series: list[Series]
    """What was measured, in the order of reading."""
    rows: Mapping[str, Rows]
    """Records of each kind with their series; of a repeated cell the last record."""
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named values of every :data:`FACTS` file by title."""

    @property
    def window(self) -> int | None:
        """The pre-trained window in tokens where all series share it."""
        found = {series.original_length for series in self.series}
        return found.pop() if len(found) == 1 else None


def read_measurements(directories: Sequence[str | Path]) -> Measurements:
    """Read the records below the directories, and the facts in them.

    Args:
        directories (Sequence[str | Path]): Searched at any depth; hidden folders are passed over.

    Raises:
        LongRopeError: A directory is missing or holds nothing to report, or a record is damaged or
            lacks a field.
    """
    names = {f"{name}.jsonl": kind for name, kind in KINDS.items()}
    found: dict[Path, list[Found]] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise LongRopeError(
                f"{directory} is no directory; give one that holds, at any depth, "
                f"{', '.join(names)} or *{JOURNAL}"
            )
        some = []
        for path, _ in files_below(directory, ".jsonl"):
            if (kind := names.get(path.name)) is None:
                continue
            if path.resolve() not in found:
                # The last record of a cell knows what its model is called by now.
                rows, _ = read_rows(path, kind.cell_fields, kind.check)
                folder = path.parent.resolve()
                found[path.resolve()] = [
                    (identify(row), folder, kind.name, row) for row in rows.values()
                ]
            some += found[path.resolve()]
        if not some and not files_below(directory, JOURNAL):
            raise LongRopeError(
                f"{directory} has no record in {', '.join(names)} and no journal of a search, at "
                "any depth; give the directory of an evaluation or of a search"
            )
        if (directory / FACTS).is_file():
            prefix = folder_prefix(directory, directories, ": ")
            facts |= {f"{prefix}{title}": part for title, part in _facts(directory).items()}
    return _gather([one for part in found.values() for one in part], facts)


def folder_names(directories: Sequence[str | Path]) -> dict[Path, str]:
    """Return names of the resolved directories: ends of their paths that tell them apart."""
    paths = {Path(directory).resolve() for directory in directories}
    names: dict[str, Path] = {}
    parts = 0
    while len(names) < len(paths):
        parts += 1
        names = {"/".join(path.parts[-parts:]): path for path in paths}
    return {path: name for name, path in names.items()}


def folder_prefix(directory: Path, directories: Sequence[str | Path], end: str) -> str:
    """Return what tells a folder's entries from those of others; nothing where it is alone."""
    return folder_names(directories)[directory.resolve()] + end if len(directories) > 1 else ""


def files_below(
    directory: Path, suffix: str, seen: set[Path] | None = None
) -> list[tuple[Path, str]]:
    """Find files below `directory`, with their relative names, sorted.

    Symbolic links are not entered. Files whose resolved paths are in `seen` are left out, and the
    others are added to it.
    """
    found = []
    for folder, subfolders, files in directory.walk():
        subfolders[:] = [item for item in subfolders if item[0] != "."]
        found += [folder / item for item in files if item.endswith(suffix)]
    if seen is not None:
        found = [path for path in found if path.resolve() not in seen]
        seen.update(path.resolve() for path in found)
    return sorted(
        (path, path.relative_to(directory).as_posix()) for path in found if path.is_file()
    )


def _facts(directory: Path) -> Mapping[str, Mapping[str, Any]]:
    facts = read_json(directory / FACTS)
    if not isinstance(facts, dict) or not all(isinstance(part, dict) for part in facts.values()):
        raise LongRopeError(f"{directory / FACTS}: must hold objects of names and values by title")
    return facts


def _gather(found: Sequence[Found], facts: Mapping[str, Mapping[str, Any]]) -> Measurements:
    """Keep the last record of each cell, and give every series its name."""
    keys = [(kind, cell_key(row, KINDS[kind].cell_fields)) for _, _, kind, row in found]
    owners = name_series(
        [(identity, folder, key, row)
         for (identity, folder, _, row), key in zip(found, keys, strict=True)]
    )  # fmt: skip
    cells: dict[str, dict[Any, tuple[Series, Row]]] = {kind: {} for kind in KINDS}
    windows: dict[Series, int | None] = {}
    for series, key, (_, _, kind, row) in zip(owners, keys, found, strict=True):
        cells[kind][series, key] = (series, row)
        windows[series] = row.get("original_length") or windows.get(series)
    known = {series: replace(series, original_length=window) for series, window in windows.items()}
    rows = {
        kind: [(known[series], row) for series, row in kept.values()]
        for kind, kept in cells.items()
        if kept
    }
    return Measurements(list(known.values()), rows, facts)
