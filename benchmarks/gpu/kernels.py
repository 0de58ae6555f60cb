"""Errors of every attention kernel that runs here, against fp64, beside those of torch's own.

Relative norms of output and gradients in bf16, for one sequence and for a pack of documents with
two softmax scales. A kernel passes with at most twice the error of torch's attention.

    python benchmarks/gpu/kernels.py [--quick] [--output FILE]

Exit status 1 where a kernel fails or does not pass; one that cannot run here is only recorded.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import device as gpu
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))

NAMES = ("output", "dq", "dk", "dv")


def measure_form(cases, form: str, sizes: tuple[int, ...], device: torch.device, output) -> bool:
    """Record every kernel's errors on one `sequence` or on a `pack`; whether all pass.

    Args:
        cases (module): tests/helpers/attention_cases.py.
        form (str): `sequence` or `pack`.
        sizes (tuple[int, ...]): Query heads, key heads, width of a head, tokens.
        device (torch.device): Where.
        output (Path, optional): See :func:`.device.record`.
    """
    from megatron_longrope.engine.kernels import core_attention
    from megatron_longrope.errors import LongRopeError

    heads, groups, width, length = sizes
    plain, quarter = width**-0.5, length // 4
    pack = cases.Pack((length // 2, quarter - 3, quarter), (length // 2, quarter, quarter))

    def scale_of(rows: int) -> float:
        return 1.5 if rows > quarter else 1.0

    def plainly(attend):
        """Attention of the form, with `attend` for each document."""
        if form == "pack":
            options = {"scale_of": scale_of, "attention": attend, "plain": plain}
            return lambda q, k, v: cases.packed_reference(q, k, v, pack, **options)
        scale = plain * scale_of(length)
        return lambda q, k, v: attend(*(x[:, None] for x in (q, k, v)), scale)[:, 0]

    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, width), (groups, width), (groups, width), (heads * width,))
    batch = [
        torch.randn(length, *shape, generator=generator).to(device, torch.bfloat16)
        for shape in shapes
    ]
    exact = cases.output_and_gradients(plainly(cases.reference), *(x.double() for x in batch))
    exact = [x.cpu() for x in exact]
    stock = cases.output_and_gradients(plainly(cases.stock_attention), *batch)
    limits = cases.relative_errors(stock, exact)
    all_pass = True
    for kernel in ("sdpa", "flash"):
        result = {"part": "kernels", "kernel": kernel, "form": form}
        try:
            cls = core_attention(kernel, device, torch.bfloat16)
        except LongRopeError as error:
            gpu.record(output, **result, skipped=str(error))
            continue
        try:
            module = build(cls, heads, groups, width, scale_of)
            ours = cases.output_and_gradients(own(module, form, pack, device), *batch)
        except Exception as error:  # a kernel's own, of any kind; the others are still measured
            traceback.print_exc()
            gpu.record(output, **result, failed=repr(error), passes=False)
            all_pass = False
            continue
        errors = cases.relative_errors(ours, exact)
        if kernel == "flash":
            result["package"] = module.kernels.name
        passes = all(a <= 2 * b + 1e-3 for a, b in zip(errors, limits, strict=True))
        all_pass &= passes
        gpu.record(
            output,
            **result,
            errors=dict(zip(NAMES, errors, strict=True)),
            stock=dict(zip(NAMES, limits, strict=True)),
            passes=passes,
        )
    return all_pass


def build(cls: type, heads: int, groups: int, width: int, scale_of):
    """The plugin's core attention with a softmax scale for each document."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    scaled = type("Scaled", (cls,), {"document_scale": staticmethod(scale_of)})
    return scaled(config, 1, AttnMaskType.causal, "self")


def own(module, form: str, pack, device: torch.device):
    """A function of query, key and value that calls the plugin's attention."""
    if form == "sequence":
        return lambda *qkv: module(*(x[:, None] for x in qkv))[:, 0]
    description = pack.params()
    for name, value in list(vars(description).items()):
        if isinstance(value, torch.Tensor):
            setattr(description, name, value.to(device))
    return lambda *qkv: module(*qkv, packed_seq_params=description)


def main() -> int:
    """Run the part; 0 when every kernel passes."""
    options = gpu.options(__doc__.splitlines()[0]).parse_args()
    device = gpu.start(options.quick)
    import attention_cases as cases

    sizes = (4, 2, 8, 64) if options.quick else (16, 4, 128, 4096)
    passed = [
        measure_form(cases, form, sizes, device, options.output) for form in ("sequence", "pack")
    ]
    gpu.record(options.output, part="kernels", environment=gpu.environment(device))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
