"""Floating-point operations of a forward pass; plain arithmetic without torch.

With n tokens, L layers, hidden size h, MLP width f, q the width of all query heads, k that of all
key heads and V tokens in the vocabulary, a forward pass takes

    2 n (L (h (q + 2 k) + q h + 3 h f) + h V)    matrix products, SwiGLU's three among them
    + 2 L n^2 q                                  attention: 2 x 2 n^2 q, of which causality halves

operations; norms, RoPE and softmax are not counted. In a mixture of E experts, k of which a token
is sent to, k times the width of an expert stands for f, and the router adds 2 n L h E.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_longrope.checkpoint.model_args import ModelShape
    from megatron_longrope.plan.model import Model

    type Shape = ModelShape | Model


def forward_flops(shape: Shape, tokens: int) -> tuple[int, int]:
    """Operations of one sequence: (matrix products with weights, attention)."""
    query = shape.num_attention_heads * shape.head_dim
    weights = sum(layer_weights(shape, active=True)) + shape.hidden_size * shape.vocab_size
    return 2 * tokens * weights, 2 * shape.num_layers * tokens**2 * query


def layer_weights(shape: Shape, *, active: bool = False) -> tuple[int, int]:
    """Weights in the matrices of all attentions and of all MLPs.

    Args:
        active (bool): Of experts, count only as many as a token is sent to. Defaults to False.
    """
    query = shape.num_attention_heads * shape.head_dim
    key = shape.num_query_groups * shape.head_dim
    pattern = shape.hybrid_layer_pattern  # a HybridModel counts its MLPs apart
    mlps = shape.num_layers if pattern is None else pattern.count("-")
    return (
        shape.num_layers * shape.hidden_size * (2 * query + 2 * key),
        mlps * shape.hidden_size * _mlp_width(shape, active),
    )


def _mlp_width(shape: Shape, active: bool) -> int:
    """Weights of one MLP per value of a hidden state."""
    if shape.num_experts is None:
        return 3 * shape.ffn_hidden_size
    assert shape.moe_ffn_hidden_size is not None and shape.moe_router_topk is not None
    experts = shape.moe_router_topk if active else shape.num_experts
    return 3 * experts * shape.moe_ffn_hidden_size + shape.num_experts
