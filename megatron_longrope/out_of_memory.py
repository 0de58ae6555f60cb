"""Recognize that memory ran out, on any device."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch raises when a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # torch's CPU allocator has no type of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
