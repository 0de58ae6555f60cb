"""Errors of every attention kernel that runs here, against fp64, beside those of torch's own.

Relative norms of output and gradients in bf16, for one sequence and for a pack of documents with
two softmax scales. A kernel passes with at most twice the error of torch's attention.

    python benchmarks/gpu/kernels.py [--quick] [--output FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import device as gpu
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))

NAMES = ("output", "dq", "dk", "dv")


def main() -> None:
    """Run the part."""
    parser = gpu.options(__doc__.splitlines()[0])
    options = parser.parse_args()
    device = gpu.start(options.quick)
    import attention_cases as cases
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention

    heads, groups, width, length = (4, 2, 8, 64) if options.quick else (16, 4, 128, 4096)
    classes = {"sdpa": SdpaCoreAttention, "flash": FlashCoreAttention}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    plain = width**-0.5
    half, quarter = length // 2, length // 4

    def scale_of(rows: int) -> float:
        return 1.5 if rows > quarter else 1.0

    pack = cases.Pack((half, quarter - 3, quarter), (half, quarter, quarter))
    description = pack.params()
    for name in vars(description):
        value = getattr(description, name)
        if isinstance(value, torch.Tensor):
            setattr(description, name, value.to(device))
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, width), (groups, width), (groups, width), (heads * width,))
    batch = [torch.randn(length, *size, generator=generator).to(device) for size in sizes]
    half_batch = [x.bfloat16() for x in batch]
    forms = {
        "sequence": (
            {},
            lambda attend: (
                lambda q, k, v: attend(
                    q[:, None], k[:, None], v[:, None], plain * scale_of(length)
                )[:, 0]
            ),
        ),
        "pack": (
            {"packed_seq_params": description},
            lambda attend: (
                lambda q, k, v: cases.packed_reference(
                    q, k, v, pack, scale_of=scale_of, attention=attend, plain=plain
                )
            ),
        ),
    }
    for form, (arguments, of) in forms.items():
        exact = cases.output_and_gradients(of(cases.reference), *(x.double() for x in half_batch))
        exact = [x.cpu() for x in exact]
        stock = cases.output_and_gradients(of(cases.stock_attention), *half_batch)
        limits = cases.relative_errors(stock, exact)
        for kernel, cls in classes.items():
            result = {"part": "kernels", "kernel": kernel, "form": form}
            scaled = type("Scaled", (cls,), {"document_scale": staticmethod(scale_of)})
            try:
                module = scaled(config, 1, AttnMaskType.causal, "self")
                ours = cases.output_and_gradients(
                    lambda q, k, v, module=module, arguments=arguments: (
                        module(q, k, v, **arguments)
                        if arguments
                        else module(q[:, None], k[:, None], v[:, None])[:, 0]
                    ),
                    *half_batch,
                )
            except (ValueError, RuntimeError) as error:
                gpu.record(options.output, **result, skipped=str(error).partition("\n")[0])
                continue
            errors = cases.relative_errors(ours, exact)
            if kernel == "flash":
                result["package"] = module.kernels.name
            gpu.record(
                options.output,
                **result,
                errors=dict(zip(NAMES, errors, strict=True)),
                stock=dict(zip(NAMES, limits, strict=True)),
                passes=all(a <= 2 * b + 1e-3 for a, b in zip(errors, limits, strict=True)),
            )
    gpu.record(options.output, part="kernels", environment=gpu.environment(device))


if __name__ == "__main__":
    main()
