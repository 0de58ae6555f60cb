"""Operations and hours of a training run; docs/plan.md has the calibration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longrope.errors import LongRopeError
from megatron_longrope.flops import forward_flops, layer_weights
from megatron_longrope.plan.hardware import Gpu
from megatron_longrope.plan.layouts import FULL, Layout, Training
from megatron_longrope.plan.model import Model

_MATMUL_RATE = 0.45


def rates(gpu: Gpu, mfu: float | None = None) -> tuple[float, float]:
    """Parts of a GPU's bf16 peak that products with weights and attention run at.

    Args:
        gpu (Gpu): Has its own for attention.
        mfu (float, optional): In place of both.

    Raises:
        LongRopeError: `mfu` is not in (0, 1].
    """
    if mfu is None:
        return _MATMUL_RATE, gpu.attention_rate
    if not 0 < mfu <= 1:
        raise LongRopeError(f"--mfu {mfu} is not in (0, 1]; give a part of the peak such as 0.4")
    return mfu, mfu


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a step."""

    matmul: float
    """Products with weights, forward and backward."""
    attention: float
    """Attention, forward and backward as twice the forward pass."""
    recomputed_matmul: float
    """Products that the backward pass repeats."""
    recomputed_attention: float
    """Attention that it repeats (what a flash kernel repeats inside is in its rate)."""

    @property
    def model(self) -> float:
        """Operations without repetition, of which utilisation is a part."""
        return self.matmul + self.attention

    @property
    def hardware(self) -> float:
        """Operations with repetition."""
        return self.model + self.recomputed_matmul + self.recomputed_attention


def step_flops(model: Model, training: Training, layout: Layout) -> Flops:
    """Operations of a step of all GPUs."""
    linear, attention = forward_flops(model, training.length)
    batch = training.global_batch_size
    output = 2 * training.length * model.hidden_size * model.vocab_size
    blocks = linear - output
    repeated_linear = repeated_attention = 0.0
    if layout.recompute == FULL:
        layers = model.num_layers
        if layout.recompute_method == "block":
            layers = min(layers, layout.recompute_num_layers * layout.pipeline)
        repeated_linear = blocks * layers / model.num_layers
        repeated_attention = attention * layers / model.num_layers
    if model.mlp_module in layout.recompute:
        repeated_linear = 2 * training.length * layer_weights(model, active=True)[1]
    if "core_attn" in layout.recompute:
        repeated_attention = attention
    if training.loss_chunk is not None:
        repeated_linear += output  # the logits
    return Flops(
        3.0 * batch * linear,
        3.0 * batch * attention,
        batch * repeated_linear,
        batch * repeated_attention,
    )


def step_seconds(
    flops: Flops, training: Training, layout: Layout, gpu: Gpu, rate: tuple[float, float]
) -> float:
    """Seconds of a step: operations at their rates, and the pipeline's bubble (p - 1) / m."""
    peak, (matmul, attention) = gpu.tflops * 1e12 * layout.gpus, rate
    busy = (flops.matmul + flops.recomputed_matmul) / (peak * matmul)
    busy += (flops.attention + flops.recomputed_attention) / (peak * attention)
    return busy * (1 + (layout.pipeline - 1) / layout.microbatches(training))
