"""Which core attention the engine builds its model with."""

from __future__ import annotations

import torch

from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention

ATTENTIONS = ("auto", "sdpa", "flash")

_HALF = (torch.float16, torch.bfloat16)
_AMPERE = (8, 0)  # the oldest compute capability of flash-attn 2


def core_attention(
    attention: str, device: torch.device, dtype: torch.dtype
) -> type[SdpaCoreAttention]:
    """The class for the model's `core_attention` slot.

    Args:
        attention (str): `sdpa`, `flash`, or `auto`: flash-attn where it can run, else SDPA, which
            on CUDA in half precision takes torch's own flash kernel.
        device (torch.device): Where the model will be.
        dtype (torch.dtype): What it will compute in.

    Raises:
        ValueError: Another name, or `flash` where flash-attn cannot run.
    """
    if attention not in ATTENTIONS:
        raise ValueError(
            f"attention {attention!r} is unknown to the engine; choose among "
            f"{', '.join(ATTENTIONS)}"
        )
    if attention == "sdpa":
        return SdpaCoreAttention
    obstacle = _obstacle(device, dtype)
    if obstacle is None:
        return FlashCoreAttention
    if attention == "flash":
        raise ValueError(
            f"attention 'flash' needs flash-attn and a half-precision model on a CUDA device, but "
            f"{obstacle}; use attention 'sdpa'"
        )
    return SdpaCoreAttention


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot run, or None."""
    if device.type != "cuda":
        return f"the device is {device}"
    if dtype not in _HALF:
        return f"the dtype is {dtype}"
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        return f"flash-attn cannot be imported ({error})"
    capability = torch.cuda.get_device_capability(device)
    if capability < _AMPERE:
        return f"the device has compute capability {'.'.join(map(str, capability))}, below 8.0"
    return None
