"""Which tensor is which: the names, shapes and order of rows in a Megatron checkpoint and in
Hugging Face folders, as data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    `qkv` (group by group: queries, key, value; one or three tensors), `gate_up` (two) or `experts`
    (expert by expert, on a dimension of its own; the rows of each are those of its tensors)."""
    also: tuple[str, ...] = ()
    """Names of the same tensor in models of other specs; written as well, none has to be there."""

    @property
    def is_stacked(self) -> bool:
        """True for tensors with layers on dimension 0."""
        return "{layer}" in self.hf[0]

    def layers(self, count: int) -> list[int | None]:
        """Each of `count` layers of a stacked tensor; None, once, of another."""
        return list(range(count)) if self.is_stacked else [None]

    def of_experts(self, count: int) -> TensorRule:
        """The same with the tensors of every expert by name, where a table says `{expert}`.

        Args:
            count (int): Experts of a layer.
        """
        names = (name.replace("{expert}", str(index)) for index in range(count) for name in self.hf)
        return replace(self, hf=tuple(names)) if self.split == "experts" else self


def _layer_rule(
    disk: str, hf: tuple[str, ...], dims: str, split: str = "whole", also: tuple[str, ...] = ()
) -> TensorRule:
    names = tuple(_HF_LAYER + name for name in hf)
    others = tuple(_LAYER + name for name in also)
    return TensorRule(_LAYER + disk, names, tuple(dims.split()), split, others)


def decoder(
    qkv: TensorRule, mlp: tuple[TensorRule, ...], *more: TensorRule
) -> tuple[TensorRule, ...]:
    """Every tensor of a decoder but the output layer.

    Args:
        qkv (TensorRule): The projection to queries, keys and values.
        mlp (tuple[TensorRule, ...]): What follows the attention of a layer, with its norm.
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
        *mlp,
        TensorRule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
        *more,
    )


OUTPUT_LAYER = TensorRule(
    "output_layer.weight", ("lm_head.weight",), ("vocab", "hidden"), split="vocab"
)
_Q_K_V = tuple(f"self_attn.{name}_proj" for name in "qkv")
_MLP_NORM = ("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), "hidden")
_DOWN = _layer_rule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "hidden ffn")
QKV = _layer_rule(
    "self_attention.linear_qkv.weight",
    tuple(f"{name}.weight" for name in _Q_K_V),
    "qkv hidden",
    "qkv",
)
FUSED_QKV = _layer_rule(
    "self_attention.linear_qkv.weight", ("self_attn.qkv_proj.weight",), "qkv hidden", "qkv"
)
MLP = (
    _layer_rule(*_MLP_NORM),
    _layer_rule(
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "gate_up hidden",
        "gate_up",
    ),
    _DOWN,
)
FUSED_MLP = (
    _layer_rule(*_MLP_NORM),
    # Gate above up on both sides.
    _layer_rule("mlp.linear_fc1.weight", ("mlp.gate_up_proj.weight",), "gate_up hidden"),
    _DOWN,
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[TensorRule, ...]:
    """A mixture of experts, which megatron-core 0.17 to 0.19 store alike with and without grouped
    matrix products.

    Args:
        block (str): Name of its module in transformers.
        gate (str): With `up` and `down`, names of an expert's matrices there.
    """
    each = block + ".experts.{expert}."
    return (
        # Transformer Engine fuses this norm with a linear layer, but not with a router.
        _layer_rule(*_MLP_NORM, also=("pre_mlp_layernorm.weight",)),
        _layer_rule("mlp.router.weight", (f"{block}.gate.weight",), "experts hidden"),
        _layer_rule(
            "mlp.experts.experts.linear_fc1.weight",
            (f"{each}{gate}.weight", f"{each}{up}.weight"),
            "experts expert_gate_up hidden",
            "experts",
        ),
        _layer_rule(
            "mlp.experts.experts.linear_fc2.weight",
            (f"{each}{down}.weight",),
            "experts hidden expert_ffn",
            "experts",
        ),
    )


MIXTRAL_EXPERTS = _experts("block_sparse_moe", "w1", "w3", "w2")
QWEN_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")
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
    expert_ffn = shape.moe_ffn_hidden_size or 0
    return {
        "vocab": shape.vocab_size,
        "hidden": shape.hidden_size,
        "heads": shape.num_attention_heads * head_dim,
        "qkv": (shape.num_attention_heads + 2 * groups) * head_dim,
        "head_dim": head_dim,
        "ffn": shape.ffn_hidden_size,
        "gate_up": 2 * shape.ffn_hidden_size,
        "experts": shape.num_experts or 0,
        "expert_ffn": expert_ffn,
        "expert_gate_up": 2 * expert_ffn,
    }
