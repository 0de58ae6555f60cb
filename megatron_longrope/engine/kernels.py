"""Which core attention the engine builds its model with."""

from __future__ import annotations

import torch

from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention, flash_kernels
from megatron_longrope.errors import LongRopeError
from megatron_longrope.integration import compat

ATTENTIONS = ("auto", "sdpa", "flash", "te")

_HALF = (torch.float16, torch.bfloat16)


def core_attention(attention: str, device: torch.device, dtype: torch.dtype) -> type:
    """The class for the model's `core_attention` slot.

    Args:
        attention (str): `sdpa`, `flash`, `te` (Transformer Engine), or `auto`: a flash-attention
            package where one can run, else SDPA, which on CUDA in half precision takes torch's own
            flash kernel.
        device (torch.device): Where the model will be.
        dtype (torch.dtype): What it will compute in.

    Raises:
        LongRopeError: Another name, or `flash` or `te` where it cannot run.
    """
    if attention not in ATTENTIONS:
        raise LongRopeError(
            f"attention {attention!r} is unknown to the engine; choose among "
            f"{', '.join(ATTENTIONS)}"
        )
    if attention == "sdpa":
        return SdpaCoreAttention
    obstacle = _no_half_on_cuda(device, dtype)
    if attention == "te":
        if obstacle is None and not compat.transformer_engine_is_usable():
            obstacle = "megatron-core cannot import Transformer Engine"
        if obstacle is not None:
            raise _refusal(attention, "Transformer Engine", obstacle)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    obstacle = obstacle or _flash_obstacle(device)
    if obstacle is None:
        return FlashCoreAttention
    if attention == "flash":
        raise _refusal(attention, "a flash-attention package", obstacle)
    return SdpaCoreAttention


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """What `auto` takes for a model, and why not another."""
    chosen = core_attention("auto", device, dtype)
    if chosen is FlashCoreAttention:
        return f"flash ({flash_kernels.find(torch.cuda.get_device_capability(device)).name})"
    return f"sdpa ({_no_half_on_cuda(device, dtype) or _flash_obstacle(device)})"


def _refusal(attention: str, package: str, obstacle: str) -> LongRopeError:
    return LongRopeError(
        f"attention {attention!r} needs {package} and a half-precision model on a CUDA device, but "
        f"{obstacle}; use attention 'sdpa'"
    )


def _no_half_on_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the device is {device}"
    return None if dtype in _HALF else f"the dtype is {dtype}"


def _flash_obstacle(device: torch.device) -> str | None:
    return flash_kernels.obstacle(torch.cuda.get_device_capability(device))
