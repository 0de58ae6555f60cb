"""GPUs by name: peak and memory; plain numbers without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_longrope.errors import LongRopeError

GIB = 2**30

USABLE = 0.9
"""Part of a GPU's memory that is planned for. The rest is the reserve: CUDA context, buffers of
NCCL, gaps between tensors. An assumption, not a measurement."""


MOST_GPUS = 4096
"""Up to so many are tried where a plan does not fit."""


@dataclass(frozen=True)
class Gpu:
    """What matters of a GPU."""

    name: str
    """As printed."""
    tflops: float
    """Peak of dense bf16 matrix products, TFLOP/s."""
    gib: float
    """Memory, GiB."""
    attention_rate: float = 0.27
    """Part of the peak that attention runs at, forward and backward, with the communication of
    context parallelism; its causal half counts. The default is Hopper's."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 312, 40, 0.50),
        Gpu("a100-80", 312, 80, 0.50),
        Gpu("h100", 989, 80),
        Gpu("h200", 989, 141),
        Gpu("b200", 2250, 180, 0.36),
    )
}
"""NVIDIA's data sheets, SXM versions, without sparsity; docs/plan.md calibrates the rates."""


def parse_gpu(text: str) -> Gpu:
    """`h100`, or another GPU as TFLOP/s:GiB, such as `312:80`.

    Raises:
        LongRopeError: Neither a known name nor two positive numbers.
    """
    known = GPUS.get(text.strip().lower())
    if known is not None:
        return known
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or not all(0 < number < math.inf for number in numbers):
        raise LongRopeError(
            f"GPU {text!r} is unknown; name one of {', '.join(GPUS)}, or give its dense bf16 "
            "TFLOP/s and GiB, such as 312:80"
        )
    return Gpu(text.strip(), *numbers)
