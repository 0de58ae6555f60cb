"""The angles of transformers and megatron-core, which tables without exact angles must equal."""

import torch

from megatron_longrope.frequencies import inv_freq_fp32


def angles_fp32(positions, base, dim, factors=None, num_start_tokens=0):
    """The plain fp32 product of position and inverse frequency: `[s, dim / 2]`."""
    numbers = positions.to(torch.float32)[:, None]
    kept = numbers * inv_freq_fp32(base, dim)
    rescaled = numbers * inv_freq_fp32(base, dim, factors)
    return torch.where(positions[:, None] < num_start_tokens, kept, rescaled)
