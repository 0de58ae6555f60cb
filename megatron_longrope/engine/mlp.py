"""The MLP, some tokens at a time: its `[s, b, 2 ffn]` intermediate never exists whole."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

# Enough rows to fill a GPU with each matrix product. In bf16 and Llama-2-7B the intermediate of so
# many is 172 MiB; that of 256k tokens would be 11 GiB.
_TOKENS_PER_SLICE = 4096


def slice_mlps(model: nn.Module) -> None:
    """Let every dense MLP of `model` take :data:`_TOKENS_PER_SLICE` tokens at a time.

    An MLP treats each token by itself, so the slices change nothing but rounding. Megatron's own
    `mlp_chunks_for_prefill` wants an inference context, its `mlp_chunks_for_training` training
    mode. All tensor-parallel ranks cut alike, which keeps their all-reduces in step.

    Args:
        model (nn.Module): GPTModel or HybridModel; changed in place. Its parameters keep their
            names.
    """
    for module in model.modules():
        if isinstance(module, MLP):
            # On the instance, because each release has its own way to build the module.
            module.forward = functools.partial(_forward_in_slices, module.forward)


def _forward_in_slices(
    whole: Callable[..., tuple[Tensor, Tensor | None]], hidden: Tensor, **options: object
) -> tuple[Tensor, Tensor | None]:
    """`[s, b, h] -> [s, b, h]` and the bias that Megatron's MLP leaves to its caller."""
    rows = max(1, _TOKENS_PER_SLICE // hidden.shape[1])
    if len(hidden) <= rows:
        return whole(hidden, **options)
    output, bias = torch.empty_like(hidden), None
    for start in range(0, len(hidden), rows):
        span = slice(start, start + rows)
        output[span], bias = whole(hidden[span], **options)
    return output, bias
