"""Which tensor is which: the names, shapes and order of rows in a Megatron checkpoint and in
Hugging Face folders, as data.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longrope.checkpoint.model_args import ModelShape

EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = "decoder.layers."
_HF_LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class TensorRule:
    """One tensor on disk and what it becomes."""

    disk: str
    """Name in the Megatron checkpoint."""

    hf: tuple[str, ...]
    """Names in the Hugging Face folder; `{layer}` where the disk tensor is stacked over layers."""

    dims: tuple[str, ...]
    """Its dimensions without that of layers, by the names of :func:`dimensions`."""

    split: str = "whole"
    """How the tensors of `hf` lie in it: `whole` (as it is), `vocab` (below its padding rows),
    `qkv` (group by group: queries, key, value; one or three tensors) or `gate_up` (two)."""

    @property
    def is_stacked(self) -> bool:
        """True for tensors with layers on dimension 0."""
        return "{layer}" in self.hf[0]


def _layer_rule(disk: str, hf: tuple[str, ...], dims: str, split: str = "whole") -> TensorRule:
    names = tuple(_HF_LAYER + name for name in hf)
    return TensorRule(_LAYER + disk, names, tuple(dims.split()), split)


def decoder(qkv: TensorRule, fc1: TensorRule, *more: TensorRule) -> tuple[TensorRule, ...]:
    """Every tensor of a dense decoder but the output layer.

    Args:
        qkv (TensorRule): The projection to queries, keys and values.
        fc1 (TensorRule): The first projection of the MLP.
        more (TensorRule): What only this decoder has.
    """
    return (
        TensorRule(EMBEDDING, ("model.embed_tokens.weight",), ("vocab", "hidden"), "vocab"),
        _layer_rule(
            "self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), "hidden"
        ),
        qkv,
        _layer_rule(
            "self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "hidden heads"
        ),
        _layer_rule(
            "mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), "hidden"
        ),
        fc1,
        _layer_rule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "hidden ffn"),
        TensorRule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
        *more,
    )


OUTPUT_LAYER = TensorRule(
    "output_layer.weight", ("lm_head.weight",), ("vocab", "hidden"), split="vocab"
)
_Q_K_V = tuple(f"self_attn.{name}_proj" for name in "qkv")
SEPARATE = (
    _layer_rule(
        "self_attention.linear_qkv.weight",
        tuple(f"{name}.weight" for name in _Q_K_V),
        "qkv hidden",
        "qkv",
    ),
    _layer_rule(
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "gate_up hidden",
        "gate_up",
    ),
)
FUSED = (
    _layer_rule(
        "self_attention.linear_qkv.weight", ("self_attn.qkv_proj.weight",), "qkv hidden", "qkv"
    ),
    # Gate above up on both sides.
    _layer_rule("mlp.linear_fc1.weight", ("mlp.gate_up_proj.weight",), "gate_up hidden"),
)
QKV_BIAS = _layer_rule(
    "self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _Q_K_V), "qkv", "qkv"
)
QK_NORMS = tuple(
    _layer_rule(
        f"self_attention.{name}_layernorm.weight", (f"self_attn.{name}_norm.weight",), "head_dim"
    )
    for name in "qk"
)


def dimensions(shape: ModelShape) -> dict[str, int]:
    """Sizes of the dimensions that :attr:`TensorRule.dims` names."""
    head_dim, groups = shape.head_dim, shape.num_query_groups
    return {
        "vocab": shape.vocab_size,
        "hidden": shape.hidden_size,
        "heads": shape.num_attention_heads * head_dim,
        "qkv": (shape.num_attention_heads + 2 * groups) * head_dim,
        "head_dim": head_dim,
        "ffn": shape.ffn_hidden_size,
        "gate_up": 2 * shape.ffn_hidden_size,
    }
