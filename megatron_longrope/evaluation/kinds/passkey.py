"""Passkey retrieval: a number hidden in filler text."""

from __future__ import annotations

from megatron_longrope.evaluation.kind import ANYTHING, COUNT, NUMBER, SHARE, TEXT, Kind

PASSKEY = Kind(
    "passkey",
    key=(
        "length",
        "requested_depth",
        "seed",
        "trial",
        "scoring",
        "tokenizer_sha256",
        "requested_bos",
    ),
    required={
        "length": COUNT,
        "correct": (lambda value: isinstance(value, bool), "true or false"),
        "seed": ANYTHING,
        "trial": ANYTHING,
    },
    optional={"requested_depth": SHARE, "depth": SHARE, "nll": NUMBER, "scoring": TEXT},
)
