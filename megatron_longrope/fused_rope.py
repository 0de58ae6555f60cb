"""What Transformer Engine's fused RoPE kernel does not do."""

from __future__ import annotations


def fused_rope_drops(attention_factor: float) -> str:
    """Why the kernel for packed sequences cannot run under an attention factor on cos and sin.

    megatron-core does not hand it one; the kernel for plain sequences is then left out.
    """
    return (
        f"attention factor {attention_factor:.6g} on cos and sin is ignored by the fused RoPE "
        "kernel for packed sequences; add --no-rope-fusion"
    )


def fused_rope_overflow(
    rows: int, num_heads: int, num_groups: int, head_dim: int, tensor_parallel: int
) -> str | None:
    """Why the kernel would read the wrong memory, or None where it reaches every value.

    Its offsets are 32-bit (`offset_block` in transformer_engine/common/fused_rope), and queries and
    keys come as views of the joint q, k, v projection, whose row they stride over. With fewer
    groups than ranks Megatron gathers the row of all ranks.

    Args:
        rows (int): Tokens of a rank: of its part of the sequence, times the micro batch.
        num_heads (int): Query heads.
        num_groups (int): Key/value heads.
        head_dim (int): Width of a head.
        tensor_parallel (int): Ranks that share the heads.
    """
    width = (num_heads + 2 * num_groups) * head_dim
    if num_groups >= tensor_parallel:
        width //= tensor_parallel
    if rows * width <= 2**31:
        return None
    return (
        f"Transformer Engine's fused RoPE kernel has 32-bit offsets, and {rows} tokens a rank x "
        f"{width} values of queries, keys and values are beyond 2^31: add --no-rope-fusion, or "
        "split further with --context-parallel-size or --tensor-model-parallel-size"
    )
