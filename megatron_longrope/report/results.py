"""`results.json` of an evaluated run: its check, and what it says in a table and in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longrope.files import read_json
from megatron_longrope.lengths import format_length
from megatron_longrope.report.style import METHODS, format_ratio, format_score, style_of

ABSENT = "\N{EN DASH}"
"""Stands for a cell that was not measured."""


def load_results(directory: str | Path) -> dict[str, Any]:
    """Read and check `results.json`; lengths become integers, methods get a fixed order.

    Raises:
        ValueError: The file is missing or not JSON, or a known key has the wrong form.
    """
    path = Path(directory) / "results.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} has no results.json; give the directory of a finished evaluation"
        )
    return check_results(read_json(path), str(path))


def check_results(value: Any, where: str = "results") -> dict[str, Any]:
    """A checked copy of results as in `results.json`; keys that it lacks stay absent.

    Raises:
        ValueError: A known key has the wrong form; the message names it, its value and the rule.
    """
    results = dict(_mapping(value, where))
    for key in ("original_length", "passkey_trials"):
        if results.get(key) is not None:
            number = results[key]
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{where}: {key} is {number!r}; it must be a positive integer")
    perplexity = _mapping(results.get("perplexity") or {}, f"{where}: perplexity")
    known = [method for method in METHODS if method in perplexity]
    results["perplexity"] = {
        method: _by_length(perplexity[method], f"{where}: perplexity.{method}", math.inf)
        for method in [*known, *(name for name in perplexity if name not in METHODS)]
    }
    results["passkey"] = _by_length(results.get("passkey") or {}, f"{where}: passkey", 1.0)
    for key in ("attention_factor_policy", "conversion", "cp_parity", "seconds", "versions"):
        results[key] = dict(_mapping(results.get(key) or {}, f"{where}: {key}"))
    results["attention_factor_policy"] = {
        method: {_length(key, here): str(policy) for key, policy in _mapping(row, here).items()}
        for method, row in results["attention_factor_policy"].items()
        for here in [f"{where}: attention_factor_policy.{method}"]
    }
    for stage, seconds in results["seconds"].items():
        _number(seconds, f"{where}: seconds.{stage}", math.inf, zero=True)
    for name, loss in results["cp_parity"].items():
        _number(loss, f"{where}: cp_parity.{name}", math.inf, zero=True)
    return results


def summary_table(results: Mapping[str, Any]) -> str:
    """Perplexity for each method and length as plain text; the lowest of a column gets a star.

    Args:
        results (Mapping): As in `results.json`.

    Raises:
        ValueError: The results are malformed.
    """
    perplexity = check_results(results)["perplexity"]
    lengths = measured_lengths(perplexity)
    if not lengths:
        return "No perplexity was measured."
    best = best_cells(perplexity)
    rows = [["Perplexity", *map(format_length, lengths)]]
    for method, row in perplexity.items():
        cells = [
            format_score(row[length]) + ("*" if (method, length) in best else " ")
            if length in row
            else f"{ABSENT} "
            for length in lengths
        ]
        rows.append([style_of(method).label, *cells])
    rows[0][1:] = [f"{cell} " for cell in rows[0][1:]]
    lines = text_table(rows)
    if best:
        lines.append("* lowest of its column")
    if policies := results.get("attention_factor_policy"):
        kept = (f"{style_of(name).label} {_kept(row)}" for name, row in policies.items())
        lines.append("attention factor of the better value: " + "; ".join(kept))
    return "\n".join(lines)


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for the terminal: a head, a rule, then a line for each further row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def _kept(policies: Mapping[Any, str]) -> str:
    """`su`, or `none (512, 1k), su (2k)` where the better policy changes with the length."""
    lengths: dict[str, list[str]] = {}
    for length, policy in policies.items():
        lengths.setdefault(policy, []).append(format_length(int(length)))
    if len(lengths) == 1:
        return next(iter(lengths))
    return ", ".join(f"{policy} ({', '.join(items)})" for policy, items in lengths.items())


def summary_sentence(results: Mapping[str, Any], things: str = "methods") -> str:
    """What the perplexities say, in one sentence, at the longest length that all methods share.

    Where they share none, the longest of the lengths with the most methods counts.

    Args:
        results (Mapping): As in `results.json`.
        things (str): What its methods are called.

    Raises:
        ValueError: The results are malformed.
    """
    results = check_results(results)
    rows = {method: row for method, row in results["perplexity"].items() if row}
    if not rows:
        return "No perplexity was measured."
    counts = {n: sum(n in row for row in rows.values()) for n in measured_lengths(rows)}
    length = max(n for n, count in counts.items() if count == max(counts.values()))
    measured = [(row[length], style_of(name).label) for name, row in rows.items() if length in row]
    ranked = sorted(measured, key=lambda entry: entry[0])
    place = f"At {length:,} tokens"
    if original := results.get("original_length"):
        times = length / original
        place += f", {format_ratio(times)} times the original window," if times > 1 else ""
        place += ", within the original window," if times <= 1 else ""
    lowest, name = ranked[0]
    if len(ranked) == 1:
        return f"{place} {name} has a perplexity of {format_score(lowest)}."
    tied = [label for value, label in ranked if value == lowest]
    if len(tied) > 1:
        return (
            f"{place} {', '.join(tied[:-1])} and {tied[-1]} share the lowest perplexity of the "
            f"{len(ranked)} {things} measured there, {format_score(lowest)}."
        )
    second, runner_up = ranked[1]
    return (
        f"{place} {name} has the lowest perplexity of the {len(ranked)} {things} measured "
        f"there, {format_score(lowest)}; next is {runner_up} with {format_score(second)}."
    )


def measured_lengths(perplexity: Mapping[str, Mapping[int, float]]) -> list[int]:
    """Every length with a value, ascending."""
    return sorted({length for row in perplexity.values() for length in row})


def best_cells(perplexity: Mapping[str, Mapping[int, float]]) -> set[tuple[str, int]]:
    """(method, length) of the lowest value of each length that two methods or more have."""
    best = set()
    for length in measured_lengths(perplexity):
        column = {method: row[length] for method, row in perplexity.items() if length in row}
        lowest = min(column.values())
        if len(column) > 1:
            best |= {(method, length) for method, value in column.items() if value == lowest}
    return best


def _by_length(value: Any, where: str, largest: float) -> dict[int, float]:
    """{length: number}, ascending; null is the same as absent."""
    row = {_length(key, where): item for key, item in _mapping(value, where).items()}
    return {
        length: _number(row[length], f"{where}.{length}", largest, zero=largest == 1.0)
        for length in sorted(row)
        if row[length] is not None
    }


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {type(value).__name__}")
    return value


def _length(key: Any, where: str) -> int:
    text = str(key)
    if not text.isascii() or not text.isdigit() or len(text) > 15 or int(text) == 0:
        raise ValueError(f"{where} has the key {key!r}; keys must be lengths in tokens such as 512")
    return int(text)


def _number(value: Any, where: str, largest: float, *, zero: bool) -> float:
    rule = "a finite number" + (" of at least 0" if zero else " above 0")
    rule += f" and at most {largest:g}" if largest < math.inf else ""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not (0 <= value <= min(largest, 1e300)) or (value == 0 and not zero):
        raise ValueError(f"{where} is {value!r}; it must be {rule}")
    return float(value)
