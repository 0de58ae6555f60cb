"""Sum up retrieval trials: accuracy with its interval, recall, perplexity of the answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_longrope.evaluation.statistics import perplexity_of, wilson_interval

_SUBJECT = ("model", "label", "config_sha256")


def passkey_summary(
    rows: Iterable[Mapping[str, Any]], *, by_depth: bool = False
) -> list[dict[str, Any]]:
    """One row for each subject, scoring and length, and where asked for each depth.

    Args:
        rows (Iterable[Mapping]): Records of `longrope eval passkey`.
        by_depth (bool): Keep the depths apart. Defaults to False.
    """
    summary = []
    names = (*_SUBJECT, "scoring", "length", *(["requested_depth"] if by_depth else []))
    for names_of_group, group in _groups(rows, names):
        accuracy = sum(bool(row["correct"]) for row in group) / len(group)
        low, high = wilson_interval(accuracy, len(group))
        summary.append(
            {
                **names_of_group,
                "trials": len(group),
                "accuracy": accuracy,
                "wilson_low": low,
                "wilson_high": high,
                "answer_nll": _mean(row["nll"] for row in group),
            }
        )
    return summary


def needle_summary(
    rows: Iterable[Mapping[str, Any]], *, by_depth: bool = False
) -> list[dict[str, Any]]:
    """One row for each subject, task and length, and where asked for each depth.

    Args:
        rows (Iterable[Mapping]): Records of `longrope eval needle`.
        by_depth (bool): Keep the depths apart. Defaults to False.
    """
    summary = []
    counts = ("num_needles", "num_queries")
    names = (*_SUBJECT, "task", *counts, "length", *(["requested_depth"] if by_depth else []))
    for names_of_group, group in _groups(rows, names):
        nll = _mean(row["nll"] for row in group)
        summary.append(
            {
                **names_of_group,
                "trials": len(group),
                "recall": sum(row["recall"] for row in group) / len(group),
                "nll": nll,
                "needle_ppl": math.inf if nll is None else perplexity_of(nll),
            }
        )
    return summary


def _groups(
    rows: Iterable[Mapping[str, Any]], names: tuple[str, ...]
) -> Iterable[tuple[dict[str, Any], list[Mapping[str, Any]]]]:
    """Rows with the same values of `names`, in the order in which these first occur."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [(dict(zip(names, key, strict=True)), group) for key, group in groups.items()]


def _mean(values: Iterable[float | None]) -> float | None:
    """None where one of them is none: a loss that was not measured or not finite."""
    found = list(values)
    return None if None in found else sum(found) / len(found)
