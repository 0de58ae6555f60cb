"""Read the tables that collect.py wrote."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


class NotRun(Exception):
    """A record that a comparison needs is not there."""


class Table(dict):
    """A dictionary that says that a missing cell was not measured."""

    def __missing__(self, key):
        raise NotRun(key)


@dataclass
class Results:
    """The committed tables, as lists of what was measured for each document or passkey."""

    losses: Table = field(default_factory=Table)
    """(stage, model, factors, length): mean nats per token of each document."""

    found: Table = field(default_factory=Table)
    """(stage, model, factors, length): 1 or 0 for each passkey."""

    searches: Table = field(default_factory=Table)
    """Name of a search's factor file: its scores, by the column of searches.csv."""

    about: dict = field(default_factory=dict)

    def seeds(self, start: str) -> list[str]:
        """Searches of one kind, one for each seed."""
        return _of_each_seed(self.searches, start)

    def fine_tunings(self, start: str) -> list[str]:
        """Fine-tunings of one kind, one for each seed."""
        return _of_each_seed((key[1] for key in self.losses if key[0] == "tuned"), start)


def _of_each_seed(names: Iterable[str], start: str) -> list[str]:
    found = sorted({name for name in names if name.rpartition("_")[0] == start})
    if not found:
        raise NotRun(start)
    return found


def read_results(folder: Path) -> Results:
    """Read the committed tables; what is not there was not measured."""
    results = Results()
    for name, table in (("perplexity", results.losses), ("passkey", results.found)):
        path = folder / f"{name}.csv"
        for row in csv.DictReader(path.open(newline="")) if path.exists() else ():
            key = (row["stage"], row["model"], row["factors"], int(row["length"]))
            table[key] = [float(value) for value in row["values"].split()]
    path = folder / "searches.csv"
    for row in csv.DictReader(path.open(newline="")) if path.exists() else ():
        name = row.pop("name")
        results.searches[name] = {key: float(value) for key, value in row.items() if value}
    path = folder / "about.json"
    results.about = json.loads(path.read_text()) if path.exists() else {}
    return results
