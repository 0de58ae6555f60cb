"""The records that `longrope eval` left in one or several directories, and whose they are.

A subject is what was measured: a checkpoint under one set of factors. The same subject may lie in
several files; two subjects that would be called the same get names that tell them apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longrope.evaluation.kind import COUNT, NUMBER, TEXT, cell_key, is_number
from megatron_longrope.evaluation.kinds import KINDS
from megatron_longrope.report.naming import Identity, Subject, name_subjects
from megatron_longrope.report.results import load_results
from megatron_longrope.report.style import METHODS

__all__ = ["FILES", "KINDS", "Measurements", "read_measurements"]

FILES = tuple(f"{kind}.jsonl" for kind in KINDS)
"""Names of the files that are read."""

_CURATED = ("ppl", "passkey")
"""Kinds whose numbers `results.json` may hold itself."""

_OPTIONAL_EVERYWHERE = {
    "label": TEXT,
    "model": TEXT,
    "original_length": COUNT,
    "seconds": NUMBER,
}


@dataclass(frozen=True)
class Measurements:
    """Every measurement of the directories, each once."""

    subjects: list[Subject]
    """What was measured, in the order of reading."""

    rows: dict[str, list[tuple[Subject, dict[str, Any]]]]
    """Of each kind the records with their subject; of a repeated cell the last record."""

    results: list[dict[str, Any]] = field(default_factory=list)
    """Checked `results.json` of the directories that have one."""

    def of(self, kind: str) -> list[tuple[Subject, dict[str, Any]]]:
        """Records of a kind."""
        return self.rows.get(kind, [])

    @property
    def original_length(self) -> int | None:
        """The pre-trained window in tokens where all subjects share it."""
        found = {subject.original_length for subject in self.subjects}
        return found.pop() if len(found) == 1 else None


def read_measurements(directories: Sequence[str | Path]) -> Measurements:
    """Read the records below the directories.

    Where a directory has `results.json`, its perplexities and passkey accuracies stand for the
    directory's own ppl.jsonl and passkey.jsonl.

    Args:
        directories (Sequence[str | Path]): Searched at any depth; hidden folders are passed over.

    Raises:
        ValueError: A directory is missing or holds nothing to report, or a record is damaged or
            lacks a field.
    """
    found: list[tuple[Identity, Path, str, dict[str, Any]]] = []
    curated = []
    seen: set[Path] = set()
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise ValueError(
                f"{directory} is no directory; give one that holds results.json or, at any depth, "
                f"{', '.join(FILES)}"
            )
        before, again, skipped = len(found), False, set()
        if (directory / "results.json").is_file():
            results = load_results(directory)
            curated.append(results)
            skipped = set(_CURATED)
            found += _curated_rows(directory, results)
        paths = [path for path, _ in files_below(directory, ".jsonl") if path.name in FILES]
        for path in paths:
            if path.stem in skipped:
                continue
            if path.resolve() in seen:
                again = True  # read for an earlier directory: that is something to report
                continue
            seen.add(path.resolve())
            folder = path.parent.resolve()
            found += [(_identity(row), folder, path.stem, row) for row in _read(path)]
        if len(found) == before and not skipped and not again:
            raise ValueError(
                f"{directory} has no results.json and no record in {', '.join(FILES)} at any "
                "depth; give the directory of an evaluation"
            )
    return _gather(found, curated)


def files_below(directory: Path, suffix: str) -> list[tuple[Path, str]]:
    """Files below `directory` with their relative names, sorted.

    Symbolic links are not entered, nor what a recipe has moved aside to `stale`.
    """
    found = []
    for folder, subfolders, files in directory.walk():
        subfolders[:] = [item for item in subfolders if item[0] != "." and item != "stale"]
        found += [folder / item for item in files if item.endswith(suffix)]
    return sorted(
        (path, path.relative_to(directory).as_posix()) for path in found if path.is_file()
    )


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Checked rows of a file; what a crash left of the last line is passed over."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise ValueError(
                f"{where}: not JSON; the file is damaged, repair the line or move the file away"
            ) from None
        yield _checked(row, path.stem, where)


def _checked(row: Any, kind: str, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a record must be a JSON object, got {type(row).__name__}")
    rules = KINDS[kind]
    if kind == "ppl":
        _restore_infinity(row)
    for name, (check, rule) in rules.required.items():
        if name not in row:
            raise ValueError(
                f"{where}: the record lacks {name!r}; measure again with `longrope eval {kind}`"
            )
        if not check(row[name]):
            raise ValueError(f"{where}: {name} is {row[name]!r}; it must be {rule}")
    for name, (check, rule) in (rules.optional | _OPTIONAL_EVERYWHERE).items():
        if row.get(name) is not None and not check(row[name]):
            raise ValueError(f"{where}: {name} is {row[name]!r}; it must be {rule} or null")
    row["kind"] = kind
    if kind == "passkey":
        row["scoring"] = row.get("scoring") or "teacher-forced"
    return row


def _restore_infinity(row: dict[str, Any]) -> None:
    """Records hold null where a perplexity or a loss is not finite."""
    buckets = row.get("nll_by_position")
    places = [(row, "ppl_window_mean"), (row, "ppl_token_weighted")]
    if isinstance(buckets, list):
        places += [(bucket, "nll") for bucket in buckets if isinstance(bucket, dict)]
    for place, name in places:
        if name in place and place[name] is None:
            place[name] = math.inf


def _identity(row: Mapping[str, Any]) -> Identity:
    checkpoint = row.get("checkpoint")
    config, policy = row.get("config"), row.get("policy")
    # A baseline's factors are computed for each length, so its hash changes along the line.
    computed = config is None and (policy is not None or row.get("label") in METHODS)
    return Identity(
        model=row.get("model") or (Path(str(checkpoint)).name if checkpoint else "model"),
        label=row.get("label") or "checkpoint",
        policy=None if policy is None else str(policy),
        checkpoint=None if checkpoint is None else str(checkpoint),
        iteration=None if row.get("iteration") is None else str(row["iteration"]),
        config=None if config is None else str(config),
        config_sha256="" if computed else str(row.get("config_sha256") or ""),
    )


def _curated_rows(
    directory: Path, results: Mapping[str, Any]
) -> Iterator[tuple[Identity, Path, str, dict[str, Any]]]:
    """The numbers of a `results.json` as records; which protocol they follow it does not say."""
    folder = directory.resolve()
    original = {"original_length": results.get("original_length")}
    for method, row in results["perplexity"].items():
        identity = Identity(model=folder.name, label=method)
        policies = results["attention_factor_policy"].get(method, {})
        for length, value in row.items():
            shared = {"length": length, "protocol": "results.json", "ppl_window_mean": value}
            shared |= {"kept_policy": policies.get(length)}
            yield identity, folder, "ppl", {**shared, **original}
    for length, value in results["passkey"].items():
        shared = {"length": length, "scoring": "results.json", "accuracy": value}
        shared |= {"trials": results.get("passkey_trials")}
        yield Identity(model=folder.name), folder, "passkey", {**shared, **original}


def _gather(
    found: Sequence[tuple[Identity, Path, str, dict[str, Any]]],
    curated: list[dict[str, Any]],
) -> Measurements:
    """Keep the last record of each cell, and give every subject its name."""
    keys = [(kind, cell_key(row, KINDS[kind].cell_fields)) for _, _, kind, row in found]
    owners = name_subjects(
        [(identity, folder, key, row)
         for (identity, folder, _, row), key in zip(found, keys, strict=True)]
    )  # fmt: skip
    cells: dict[str, dict[Any, tuple[Subject, dict[str, Any]]]] = {kind: {} for kind in KINDS}
    original: dict[Subject, int | None] = {}
    for subject, key, (_, _, kind, row) in zip(owners, keys, found, strict=True):
        cells[kind][subject, key] = (subject, row)
        original[subject] = row.get("original_length") or original.get(subject)
    known = {subject: subject.with_window(window) for subject, window in original.items()}
    rows = {
        kind: [(known[subject], row) for subject, row in kept.values()]
        for kind, kept in cells.items()
    }
    return Measurements(list(known.values()), rows, curated)


def is_finite(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return is_number(value) and math.isfinite(value)
