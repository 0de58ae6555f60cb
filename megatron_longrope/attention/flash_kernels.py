"""The flash-attention packages, called alike: which of them is here, and which suits the GPU.

flash-attn 2 (`flash_attn`), 3 (`flash_attn_interface`, Hopper) and 4 (`flash_attn.cute`, Hopper and
Blackwell) are three packages with three signatures. What counts is the function that will be
called: `flash_attn` alone may be the namespace of flash-attn 4, or a build for another torch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_longrope.errors import LongRopeError

_MODULES = {
    2: ("flash_attn",),
    3: ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    4: ("flash_attn.cute",),
}
# Releases to try, fastest first, by the major compute capability; elsewhere flash-attn 2.
_ORDER = {9: (3, 4, 2), 10: (4, 2), 11: (4, 2)}
_AMPERE = (8, 0)  # the oldest compute capability of any of them
_LSE_FLAGS = ("return_attn_probs", "return_lse")  # the first names it so for historical reasons


@dataclass(frozen=True)
class FlashKernels:
    """One of the packages."""

    name: str
    """For messages, such as `flash-attn 3`."""
    dense: Callable[..., Any]
    """Its `flash_attn_func`."""
    varlen: Callable[..., Any]
    """Its `flash_attn_varlen_func`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attention of one document.

        Args:
            query (Tensor): `[b, s, h, d]`.
            key (Tensor): `[b, t, g, d]`.
            value (Tensor): `[b, t, g, d]`.
            **options (Any): `softmax_scale`, `causal`, `dropout_p`, `deterministic`.
        """
        return _output(self.dense(query, key, value, **self._accepted(self.dense, options)))

    def attend_pack(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        **options: Any,
    ) -> Tensor:
        """Attention within documents back to back: `[t, h, d]`, else as :meth:`attend`.

        Args:
            offsets (tuple[Tensor, Tensor]): int32, of the documents' queries and keys.
            longest (tuple[int, int]): Most queries and keys of a document.
        """
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        options |= dict(zip(names, (*offsets, *longest), strict=True))
        return _output(self.varlen(query, key, value, **self._accepted(self.varlen, options)))

    def attend_with_lse(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Output `[b, s, h, d]` and logsumexp of the scaled scores `[b, h, s]`."""
        known = inspect.signature(self.dense).parameters
        flags = {name: True for name in _LSE_FLAGS if name in known}
        return self.dense(query, key, value, softmax_scale=scale, causal=causal, **flags)[:2]

    def _accepted(self, function: Callable, options: dict[str, Any]) -> dict[str, Any]:
        """`options` without those that are off, and without lengths that it finds by itself."""
        known = inspect.signature(function).parameters
        return {
            name: value
            for name, value in options.items()
            # `deterministic` came with 2.4.1, and flash-attn 4 takes no longest lengths at first.
            if name in known or (value and not name.startswith("max_seqlen"))
        }


def find(capability: tuple[int, int] | None, dropout: float = 0.0) -> FlashKernels:
    """The package that suits a GPU.

    Args:
        capability (tuple[int, int], optional): Compute capability; None where there is no GPU.
        dropout (float): Of attention in training. Defaults to 0.

    Raises:
        LongRopeError: None of them can run; the message says why for each.
    """
    if capability is not None and capability < _AMPERE:
        raise LongRopeError(
            f"the device has compute capability {'.'.join(map(str, capability))}, below 8.0"
        )
    # Without a GPU in sight the question is only what is installed.
    order = (2, 3, 4) if capability is None else _ORDER.get(capability[0], (2,))
    reasons = []
    if dropout:
        order, reasons = (2,), ["only flash-attn 2 has dropout (--attention-dropout 0 needs none)"]
    for release in order:
        try:
            return _load(release)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            reasons.append(f"flash-attn {release} cannot be used ({_first_line(error)})")
    raise LongRopeError("; ".join(reasons))


def obstacle(capability: tuple[int, int] | None, dropout: float = 0.0) -> str | None:
    """Why :func:`find` finds no package, or None."""
    try:
        find(capability, dropout)
    except ValueError as error:
        return str(error)
    return None


def capability() -> tuple[int, int] | None:
    """Compute capability of this process' GPU, None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _load(release: int) -> FlashKernels:
    first: ImportError | None = None
    for dotted in _MODULES[release]:
        try:
            module = importlib.import_module(dotted)
            break
        except ModuleNotFoundError as error:
            first = first or error
    else:
        raise first
    kernels = FlashKernels(
        f"flash-attn {release}", module.flash_attn_func, module.flash_attn_varlen_func
    )
    # Before 2.1 a causal mask was aligned with the first key instead of the last.
    version = getattr(module, "__version__", "")
    if release == 2 and tuple(int(part) for part in version.split(".")[:2]) < (2, 1):
        raise RuntimeError(f"{version} is older than 2.1, which changed the causal mask")
    return kernels


def _output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
