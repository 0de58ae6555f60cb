"""Recognize that memory ran out, on any device."""

from __future__ import annotations

import torch

# Of torch's CPU allocator, of CUDA outside of torch's own, and of cuBLAS: none has a type.
_WORDS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch raises when a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
