"""Core attention without Transformer Engine: causal, grouped queries, packed, context parallel.

megatron-core's own local attention builds `[b, h, s, s]` scores and refuses context parallelism and
packed sequences; Transformer Engine needs CUDA. These modules fit the same slot of a layer spec:

- :class:`SdpaCoreAttention` on torch's kernels, CPU and CUDA;
- :class:`FlashCoreAttention` on the flash-attn package, CUDA in half precision.

`documents` locates the documents of a pack, `gathered` and `ring` are the two forms of context
parallelism, `tiles` is the kernel of the ring.
"""

from megatron_longrope.attention.flash import FlashCoreAttention
from megatron_longrope.attention.sdpa import SdpaCoreAttention

__all__ = ["FlashCoreAttention", "SdpaCoreAttention"]
