"""What a kind of evaluation records, and what makes two of its records one cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Check = tuple[Callable[[Any], bool], str]
"""A rule for a field of a record, in code and in words."""

TARGET_KEY = ("checkpoint", "iteration", "label", "policy", "config_sha256")
"""Fields of a record that say what was measured: a checkpoint under a set of factors."""


@dataclass(frozen=True)
class Kind:
    """A kind of evaluation."""

    name: str
    """Of the command and of its files: `longrope eval <name>` writes `<name>.jsonl`."""

    key: tuple[str, ...]
    """Fields that, with :data:`TARGET_KEY`, identify a cell. The recorder, which resumes by it, and
    the report read this one tuple: a setting that is missing here is overwritten without a word."""

    required: Mapping[str, Check]
    """Fields that a record must hold."""

    optional: Mapping[str, Check] = field(default_factory=dict)
    """Fields that may be absent or null."""

    @property
    def cell_fields(self) -> tuple[str, ...]:
        """Every field that tells one cell from another."""
        return (*TARGET_KEY, *self.key)


def cell_key(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the identity of a record: equal for two records of one cell."""
    return json.dumps([row.get(name) for name in names], sort_keys=True)


def is_number(value: Any) -> bool:
    """Return whether it is a number; NaN and infinity, which lost models give, are some."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


NUMBER: Check = (is_number, "a number")
COUNT: Check = (_is_count, "a positive integer")
SHARE: Check = (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
TEXT: Check = (lambda value: isinstance(value, str) and value != "", "a text that is not empty")
ANYTHING: Check = (lambda value: True, "")
