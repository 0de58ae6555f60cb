"""Which process this is, known before any process group exists: torchrun says it in RANK."""

from __future__ import annotations

import os


def rank() -> int:
    """Global rank of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
