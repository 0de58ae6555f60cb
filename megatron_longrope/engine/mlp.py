"""The MLP, some tokens at a time: its `[s, b, 2 ffn]` intermediate never exists whole.

Mixtures of experts run here as well. Megatron's own dispatchers spread experts over GPUs, for which
they want CUDA; scoring has every expert on every rank, so a token need not travel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

# Enough rows to fill a GPU with each matrix product. In bf16 and Llama-2-7B the intermediate of so
# many is 172 MiB; that of 256k tokens would be 11 GiB.
_TOKENS_PER_SLICE = 4096
_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def slice_mlps(model: nn.Module) -> None:
    """Let every MLP of `model`, dense or of experts, take :data:`_TOKENS_PER_SLICE` tokens a time.

    An MLP treats each token by itself, so the slices change nothing but rounding. Megatron's own
    `mlp_chunks_for_prefill` wants an inference context, its `mlp_chunks_for_training` training
    mode. All tensor-parallel ranks cut alike, which keeps their all-reduces in step.

    Args:
        model (nn.Module): GPTModel or HybridModel; changed in place. Its parameters keep their
            names.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MoELayer)]
    experts = {id(part) for mixture in mixtures for part in mixture.modules()}
    # On the instance, because each release has its own way to build the module.
    for mixture in mixtures:
        whole = functools.partial(_mixture_of_experts, mixture, model.pg_collection.tp)
        mixture.forward = functools.partial(_forward_in_slices, whole)
    for module in model.modules():
        if isinstance(module, MLP) and id(module) not in experts:
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


def _mixture_of_experts(
    layer: MoELayer, group: dist.ProcessGroup, hidden: Tensor, **_: object
) -> tuple[Tensor, None]:
    """`[s, b, h] -> [s, b, h]`: the experts that the router chooses for a token, weighted.

    Args:
        layer (MoELayer): Router and experts; tensor parallelism splits each expert.
        group (ProcessGroup): The tensor-parallel ranks, all of which route alike.
    """
    tokens = hidden.flatten(0, 1)  # [s b, h]
    dtype = _ROUTER_DTYPES.get(layer.config.moe_router_dtype, tokens.dtype)
    logits = F.linear(tokens.to(dtype), layer.router.weight.to(dtype))
    scores = logits.softmax(-1, dtype=torch.float32)  # like Megatron and transformers
    gates, chosen = scores.topk(layer.config.moe_router_topk)  # [s b, k]
    if not layer.config.moe_router_pre_softmax:  # softmax over the chosen ones alone
        gates = gates / gates.sum(-1, keepdim=True)
    gates = gates.to(dtype)
    output = torch.zeros_like(tokens)
    for index, expert in enumerate(layer.experts.local_experts):
        rows, places = (chosen == index).nonzero(as_tuple=True)
        if len(rows):
            value, _bias = expert(tokens[rows])
            output.index_add_(0, rows, (value * gates[rows, places, None]).to(value.dtype))
    if group.size() > 1:  # Megatron's experts leave their sum over ranks to the dispatcher
        dist.all_reduce(output, group=group)
    return output.view_as(hidden), None
