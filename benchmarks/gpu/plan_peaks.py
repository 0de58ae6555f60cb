"""Measured peaks of a training step against `longrope plan`, for three kinds of recomputation.

    python benchmarks/gpu/plan_peaks.py [--quick] [--output FILE]

tests/gpu/test_plan_peaks.py holds the two together within a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass

import device as gpu
import torch

from megatron_longrope.plan import Layout, Model, Training
from megatron_longrope.plan.memory import memory

MODEL = Model(8, 1024, 2816, 16, 4, 32000, 64)
_TOY = Model(2, 64, 128, 4, 2, 512, 16)
RECOMPUTATION = {
    (): {},
    ("mlp",): {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    ("full",): {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@dataclass(frozen=True)
class Peak:
    """Bytes of tensors at the worst moment of a step."""

    measured: int
    """On the GPU; 0 on a CPU."""

    planned: int
    """By `longrope plan`, with what this way of building a model adds."""


def _spec(has_te: bool):
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention
    from megatron_longrope.integration.attention_choice import flash_obstacle

    if has_te:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    found = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    runs_flash = torch.cuda.is_available() and flash_obstacle() is None
    attention = FlashCoreAttention if runs_flash else SdpaCoreAttention
    found.submodules.self_attention.submodules.core_attention = attention
    return found


def _unfused(model: Model, tokens: int, recompute: tuple[str, ...]) -> int:
    """Bytes that only the local spec keeps: docs/plan.md, "What was checked"."""
    layer = 2 * (model.hidden_size + 1) + 4 * model.head_dim
    layer += model.hidden_size * ("mlp" in recompute)  # its norm is not part of the MLP
    return 2 * tokens * layer * (1 if recompute == ("full",) else model.num_layers)


def peak_of_a_step(
    model: Model, tokens: int, recompute: tuple[str, ...], device: torch.device
) -> Peak:
    """Build the model as Megatron does, take two steps, and compare.

    Args:
        model (Model): Its shape.
        tokens (int): Of the one sequence.
        recompute (tuple[str, ...]): A key of :data:`RECOMPUTATION`.
        device (torch.device): Where.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    from megatron_longrope.integration import compat

    has_te = compat.transformer_engine_is_usable() and device.type == "cuda"
    config = gpu.transformer_config(
        model,
        device,
        bias_activation_fusion=device.type == "cuda",
        apply_rope_fusion=has_te,
        bf16=True,
        params_dtype=torch.bfloat16,
        **RECOMPUTATION[recompute],
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    before = gpu.allocated(device)
    built = GPTModel(
        config,
        _spec(has_te),
        vocab_size=model.rows(),
        max_sequence_length=tokens,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(device)
    built = Float16Module(config, built).train()
    # The fp32 gradient and Adam's state, as Megatron's optimizer allocates them.
    parameters = list(built.parameters())
    state = [torch.zeros(p.numel(), device=device) for p in parameters for _ in range(4)]
    ids = torch.randint(0, model.vocab_size, (1, tokens), device=device)
    positions = torch.arange(tokens, device=device)[None]
    for _ in range(2):
        gpu.reset_peak(device)
        built(ids, positions, None, labels=ids).mean().backward()
    measured = gpu.peak(device) - before
    plan = memory(model, Training(tokens, 1, loss_chunk=None), Layout(recompute=recompute))
    del state
    # Gradients lie in parameters' own type beside the fp32 sums here; and the local spec's extra.
    extra = 0 if has_te else _unfused(model, tokens, recompute)
    return Peak(measured, plan.allocated + 2 * model.parameters + extra)


def main() -> None:
    """Run the part."""
    options = gpu.options(__doc__.splitlines()[0]).parse_args()
    device = gpu.start(options.quick)
    model, lengths = (_TOY, (128,)) if options.quick else (MODEL, (8192, 32768))
    for tokens in lengths:
        for recompute in RECOMPUTATION:
            found = peak_of_a_step(model, tokens, recompute, device)
            gpu.record(
                options.output,
                part="plan_peaks",
                tokens=tokens,
                recompute="+".join(recompute) or "none",
                measured_bytes=found.measured,
                planned_bytes=found.planned,
                ratio=found.measured / found.planned,
            )
    gpu.record(options.output, part="plan_peaks", environment=gpu.environment(device))


if __name__ == "__main__":
    main()
