"""Needle retrieval: numbers hidden between the sentences of real documents."""

from __future__ import annotations

from megatron_longrope.evaluation.kind import ANYTHING, COUNT, NUMBER, SHARE, TEXT, Kind

NEEDLE = Kind(
    "needle",
    key=(
        "task", "length", "requested_depth", "seed", "trial", "num_needles", "num_queries",
        "document_sha256", "tokenizer_sha256", "requested_bos",
    ),
    required={
        "task": TEXT, "length": COUNT, "recall": SHARE, "seed": ANYTHING, "trial": ANYTHING,
    },
    optional={"requested_depth": SHARE, "depth": SHARE, "nll": NUMBER},
)  # fmt: skip
