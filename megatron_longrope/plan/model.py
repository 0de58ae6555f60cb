"""Shapes of models and their number of parameters; plain arithmetic without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from megatron_longrope.errors import LongRopeError
from megatron_longrope.flops import layer_weights

if TYPE_CHECKING:
    from megatron_longrope.checkpoint.model_args import ModelShape


class NotCoveredError(LongRopeError):
    """Refuse what Megatron trains and the plan's formulas do not cover."""


@dataclass(frozen=True)
class Model:
    """The part of a :class:`~megatron_longrope.checkpoint.ModelShape` that costs something.

    Fields of the same name mean the same, so that :mod:`megatron_longrope.flops` takes either; that
    class needs torch.
    """

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the gated MLP; without effect in a mixture of experts."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads."""
    vocab_size: int
    """Tokens of the vocabulary; rows are padded to what Megatron pads them to, see :meth:`rows`."""
    head_dim: int
    """Width of a head."""
    untie_embeddings: bool = True
    """The output layer has a weight of its own."""
    add_qkv_bias: bool = False
    """Bias on the q, k, v projection."""
    qk_layernorm: bool = False
    """Norms on q and k."""
    rotary_percent: float = 1.0
    """Part of head_dim that is rotated."""
    num_experts: int | None = None
    """Experts of each layer's MLP; None for dense MLPs."""
    moe_ffn_hidden_size: int = 0
    """Width of an expert; 0 without experts."""
    moe_router_topk: int = 0
    """Experts that a token is sent to; 0 without experts."""
    hybrid_layer_pattern: ClassVar[None] = None
    """None; see :meth:`from_shape`."""

    @classmethod
    def from_shape(cls, shape: ModelShape) -> Model:
        """The model of a checkpoint.

        Raises:
            NotCoveredError: The formulas do not cover it.
        """
        if shape.hybrid_layer_pattern is not None or not shape.swiglu:
            what = "a HybridModel" if shape.swiglu else "a model without gated MLPs (swiglu)"
            raise NotCoveredError(
                f"the checkpoint holds {what}, which the plan's formulas do not cover; plan a "
                "GPTModel of the same shape with gated MLPs"
            )
        if shape.other_moe is not None:
            raise NotCoveredError(
                f"the checkpoint has {shape.other_moe}, which the plan's formulas do not cover; "
                "plan a model with experts of equal width in every layer"
            )
        values = {field.name: getattr(shape, field.name) for field in fields(cls)}
        if shape.num_experts is None:
            values |= {"moe_ffn_hidden_size": 0, "moe_router_topk": 0}
        return cls(**values)

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return int(self.head_dim * self.rotary_percent)

    def key(self, tensor_parallel: int = 1) -> int:
        """Width of a rank's key heads; with fewer groups than ranks every rank has one."""
        return max(1, self.num_query_groups // tensor_parallel) * self.head_dim

    def rows(self, tensor_parallel: int = 1, divisor: int = 128) -> int:
        """Rows of a rank's embedding: Megatron pads to a multiple of divisor times ranks."""
        return math.ceil(self.vocab_size / (divisor * tensor_parallel)) * divisor

    @property
    def attention_parameters(self) -> int:
        """Weights of a layer's attention that tensor parallelism splits."""
        matrices = layer_weights(self)[0] // self.num_layers
        return matrices + self.add_qkv_bias * (self.query + 2 * self.key())

    @property
    def mlp_parameters(self) -> int:
        """Weights of a layer's MLP, of all its experts, without the router."""
        return layer_weights(self)[1] // self.num_layers - self.router_parameters

    @property
    def mlp_module(self) -> str:
        """Megatron's name of what stands after attention, as `--recompute-modules` takes it."""
        return "mlp" if self.num_experts is None else "moe"

    @property
    def router_parameters(self) -> int:
        """Weights of a layer's router, 0 without experts."""
        return self.hidden_size * (self.num_experts or 0)

    @property
    def replicated_parameters(self) -> int:
        """Weights of a layer that every tensor-parallel rank has: norms and router."""
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_layernorm
        return norms + self.router_parameters

    @property
    def parameters(self) -> int:
        """All weights, without padding of the vocabulary."""
        layer = self.attention_parameters + self.mlp_parameters + self.replicated_parameters
        embeddings = (1 + self.untie_embeddings) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + embeddings + self.hidden_size


MODELS = {
    "llama2-7b": Model(32, 4096, 11008, 32, 32, 32000, 128),
    "llama2-13b": Model(40, 5120, 13824, 40, 40, 32000, 128),
    "llama2-70b": Model(80, 8192, 28672, 64, 8, 32000, 128),
    "llama3-8b": Model(32, 4096, 14336, 32, 8, 128256, 128),
    "llama3-70b": Model(80, 8192, 28672, 64, 8, 128256, 128),
    "llama3.2-1b": Model(16, 2048, 8192, 32, 8, 128256, 64, untie_embeddings=False),
    "llama3.2-3b": Model(28, 3072, 8192, 24, 8, 128256, 128, untie_embeddings=False),
    "mistral-7b": Model(32, 4096, 14336, 32, 8, 32000, 128),
    "phi3-mini": Model(32, 3072, 8192, 32, 32, 32064, 96),
    "qwen2.5-7b": Model(28, 3584, 18944, 28, 4, 152064, 128, add_qkv_bias=True),
    "qwen3-8b": Model(36, 4096, 12288, 32, 8, 151936, 128, qk_layernorm=True),
    "mixtral-8x7b": Model(
        32, 4096, 14336, 32, 8, 32000, 128,
        num_experts=8, moe_ffn_hidden_size=14336, moe_router_topk=2,
    ),
}  # fmt: skip
"""Shapes as their publishers' configurations have them."""


def find_model(name: str) -> Model:
    """A model of :data:`MODELS`.

    Raises:
        LongRopeError: The name is unknown.
    """
    model = MODELS.get(name.strip().lower())
    if model is None:
        raise LongRopeError(
            f"model {name!r} is unknown; name one of {', '.join(MODELS)}, or give the model itself "
            "with --hf or --load"
        )
    return model
