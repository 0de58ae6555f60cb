"""Perplexity at several lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_longrope.evaluation.kind import COUNT, TEXT, Kind, is_number


def _are_buckets(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and is_number(item.get("from")) and is_number(item.get("nll"))
        for item in value
    )


_PERPLEXITY = (lambda value: is_number(value) and not value <= 0, "a number above 0")

PPL = Kind(
    "ppl",
    key=("length", "requested_stride", "documents_sha256", "requested_bos"),
    required={
        "length": COUNT,
        "protocol": TEXT,
        "ppl_window_mean": _PERPLEXITY,
        "ppl_token_weighted": _PERPLEXITY,
    },
    optional={"nll_by_position": (_are_buckets, "a list of objects with `from` and `nll`")},
)
