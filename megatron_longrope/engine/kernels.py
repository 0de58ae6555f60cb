"""Which core attention the engine builds its model with."""

from __future__ import annotations

import torch

from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention, flash_kernels
from megatron_longrope.errors import LongRopeError

ATTENTIONS = ("auto", "sdpa", "flash")

_HALF = (torch.float16, torch.bfloat16)


def core_attention(attention: str, device: torch.device, dtype: torch.dtype) -> type:
    """The class for the model's `core_attention` slot.

    Args:
        attention (str): `sdpa`, `flash`, or `auto`: a flash-attention package where one can run,
            else SDPA, which on CUDA in half precision takes torch's own flash kernel.
        device (torch.device): Where the model will be.
        dtype (torch.dtype): What it will compute in.

    Raises:
        LongRopeError: Another name, or `flash` where it cannot run.
    """
    if attention not in ATTENTIONS:
        raise LongRopeError(
            f"attention {attention!r} is unknown to the engine; choose among "
            f"{', '.join(ATTENTIONS)}"
        )
    if attention == "sdpa":
        return SdpaCoreAttention
    obstacle = _flash_obstacle(device, dtype)
    if obstacle is None:
        return FlashCoreAttention
    if attention == "flash":
        raise LongRopeError(
            "attention 'flash' needs a flash-attention package and a half-precision model on a "
            f"CUDA device, but {obstacle}; use attention 'sdpa'"
        )
    return SdpaCoreAttention


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """What `auto` takes for a model, and why not another."""
    chosen = core_attention("auto", device, dtype)
    if chosen is FlashCoreAttention:
        return f"flash ({flash_kernels.find(torch.cuda.get_device_capability(device)).name})"
    return f"sdpa ({_flash_obstacle(device, dtype)})"


def _flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the device is {device}"
    if dtype not in _HALF:
        return f"the dtype is {dtype}"
    return flash_kernels.obstacle(torch.cuda.get_device_capability(device))
