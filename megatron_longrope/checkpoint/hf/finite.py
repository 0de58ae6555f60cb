"""Weights that are not finite, or would not be in the dtype that they are converted to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_longrope.errors import LongRopeError


def check_finite(name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor that holds NaN or infinity, before or after a conversion.

    Args:
        name (str): Where it stands, for the message.
        value (Tensor): As it was read.
        dtype (torch.dtype, optional): What it will be converted to. Defaults to its own.

    Raises:
        LongRopeError: The message says what it holds and what helps.
    """
    if value.numel() == 0:
        return
    # One pass and no copy of the tensor's size; a NaN anywhere is the result of both.
    low, high = (item.item() for item in torch.aminmax(value))
    largest = max(-low, high)
    if math.isnan(largest) or math.isinf(largest):
        raise LongRopeError(
            f"{name} holds {'NaN' if math.isnan(largest) else 'infinity'}; the source is damaged "
            "or its training diverged, so take another copy or an earlier checkpoint"
        )
    if dtype is None or not math.isinf(torch.tensor(largest, dtype=torch.float64).to(dtype)):
        return
    limit, wider = torch.finfo(dtype).max, "bfloat16" if dtype == torch.float16 else "float32"
    raise LongRopeError(
        f"{name} holds values up to {largest:.4g}, over {limit:.4g}, the largest of "
        f"{str(dtype).removeprefix('torch.')}; convert with --dtype {wider}"
    )
