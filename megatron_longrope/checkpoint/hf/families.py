"""Model families as data: which tensor goes where, which config key is which argument.

Adding a family is adding a row to `FAMILIES`; the code below reads the tables and has no branch on
a family's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_longrope.checkpoint.hf.limits import (
    check_config,
    check_routing,
    check_shape,
    check_sliding_window,
)
from megatron_longrope.checkpoint.hf.rules import (
    FUSED_MLP,
    FUSED_QKV,
    MIXTRAL_EXPERTS,
    MLP,
    OUTPUT_LAYER,
    QK_NORMS,
    QKV,
    QKV_BIAS,
    QWEN_EXPERTS,
    TensorRule,
    decoder,
)
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.config_rules import check_int
from megatron_longrope.errors import LongRopeError
from megatron_longrope.hf_rope import DEFAULT_HEAD_DIM, read_hf_rope
from megatron_longrope.options import DTYPES


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture that a Megatron GPT model can become."""

    name: str
    """Its name on our command line and `model_type` in config.json."""
    architecture: str
    """Class in transformers."""
    rules: tuple[TensorRule, ...] = decoder(QKV, MLP)
    """Every tensor but the output layer, which is there when embeddings are untied."""
    qkv_bias: bool = False
    """Whether q, k and v have biases (Megatron `--add-qkv-bias`)."""
    qk_layernorm: bool = False
    """Whether q and k are normalized (Megatron `--qk-layernorm`)."""
    experts: bool = False
    """Whether each MLP is a mixture of experts (Megatron `--num-experts`)."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Further keys of config.json, and others than usual: key -> field of ModelShape."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelShape that are the same for every model of the family."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that are the same for every model of the family."""
    bare_longrope: bool = False
    """Whether transformers 4.57 accepts no key in `rope_scaling` beside type and factor lists."""
    partial_rotary: bool = False
    """Whether transformers rotates a part of each head where `partial_rotary_factor` says so."""
    free_head_dim: bool = True
    """Whether transformers takes a `head_dim` other than hidden_size / heads."""
    free_hidden_size: bool = True
    """Whether transformers takes a hidden_size that is no multiple of the heads."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a key that a config.json lacks, where the families differ."""

    def tensor_rules(self, shape: ModelShape) -> tuple[TensorRule, ...]:
        """The rules that hold for one model."""
        rules = tuple(rule.of_experts(shape.num_experts or 0) for rule in self.rules)
        return (*rules, OUTPUT_LAYER) if shape.untie_embeddings else rules

    @property
    def has_sliding_window(self) -> bool:
        """Whether transformers reads `sliding_window`; any config.json may have the key."""
        return "sliding_window" in {**self.absent, **self.config}

    def stated(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with transformers' defaults for missing keys, without switches it ignores.

        A switch of the window in a config.json whose type has none switches nothing.
        """
        ignored = {"use_sliding_window", "max_window_layers"} - self.absent.keys()
        both = {**self.absent, **config}
        return {key: value for key, value in both.items() if key not in ignored}

    def config_keys(self) -> dict[str, str]:
        """Key of config.json -> field of ModelShape."""
        return {**_CONFIG_KEYS, **self.keys}


# transformers reads sliding_window, 4096 by default, once use_sliding_window is true.
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            free_hidden_size=False,
            config={"attention_bias": False, "mlp_bias": False},
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            config={"sliding_window": None},
            absent={"sliding_window": 4096, "num_key_value_heads": 8},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            rules=decoder(QKV, MLP, QKV_BIAS),
            qkv_bias=True,
            config={"use_sliding_window": False},
            absent={**_QWEN_WINDOW, "max_window_layers": 28, "num_key_value_heads": 32},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            rules=decoder(QKV, MLP, *QK_NORMS),
            qk_layernorm=True,
            config={"attention_bias": False, "use_sliding_window": False},
            absent={
                **_QWEN_WINDOW,
                "max_window_layers": 28,
                "num_key_value_heads": 32,
                "head_dim": DEFAULT_HEAD_DIM["qwen3"],
            },
        ),
        Family(
            "seed_oss",
            "SeedOssForCausalLM",
            rules=decoder(QKV, MLP, QKV_BIAS),
            qkv_bias=True,
            config={
                "attention_bias": True,
                "attention_out_bias": False,
                "mlp_bias": False,
                "residual_dropout": 0.0,
            },
            absent={
                "attention_bias": True,
                "num_key_value_heads": 8,
                "head_dim": DEFAULT_HEAD_DIM["seed_oss"],
            },
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            rules=decoder(FUSED_QKV, FUSED_MLP),
            bare_longrope=True,
            partial_rotary=True,
            free_head_dim=False,
            config={"sliding_window": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            rules=decoder(QKV, MIXTRAL_EXPERTS),
            experts=True,
            keys={
                "intermediate_size": "moe_ffn_hidden_size",
                "num_local_experts": "num_experts",
                "num_experts_per_tok": "moe_router_topk",
                "router_aux_loss_coef": "moe_aux_loss_coeff",
            },
            fixed={"moe_normalized_gates": True},
            config={"sliding_window": None},
            absent={
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "router_aux_loss_coef": 0.001,
            },
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            rules=decoder(QKV, QWEN_EXPERTS, *QK_NORMS),
            qk_layernorm=True,
            experts=True,
            keys={
                "moe_intermediate_size": "moe_ffn_hidden_size",
                # transformers 4 reads the first, 5 writes the second.
                "num_experts": "num_experts",
                "num_local_experts": "num_experts",
                "num_experts_per_tok": "moe_router_topk",
                "norm_topk_prob": "moe_normalized_gates",
                "router_aux_loss_coef": "moe_aux_loss_coeff",
            },
            config={
                "attention_bias": False,
                "use_sliding_window": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
            absent={
                **_QWEN_WINDOW,  # of all its layers: transformers reads no max_window_layers here
                "num_key_value_heads": 4,
                "moe_intermediate_size": 768,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
                "router_aux_loss_coef": 0.001,
            },
        ),
    )
}

_PARTIAL = [family.name for family in FAMILIES.values() if family.partial_rotary]

# config.json key -> field of ModelShape
_CONFIG_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
}


def select_family(
    shape: ModelShape, args: argparse.Namespace | None = None, name: str | None = None
) -> Family:
    """The family that a model belongs to.

    Args:
        args (Namespace, optional): The checkpoint's arguments, which may say where it comes from.
        name (str, optional): Wanted family. Defaults to the one that the checkpoint was converted
            from, else the first that fits.

    Raises:
        LongRopeError: No family has what this model has; the message names the argument.
    """
    check_shape(shape, FAMILIES)
    # What `convert from-hf` wrote remembers where it came from.
    origin = getattr(args, "longrope_hf_family", None)
    name = origin if name is None and origin in FAMILIES else name
    if name is not None and name not in FAMILIES:
        raise LongRopeError(f"family {name!r} is unknown; choose one of {', '.join(FAMILIES)}")
    wanted = (shape.add_qkv_bias, shape.qk_layernorm, shape.num_experts is not None)
    is_partial = shape.rotary_percent != 1
    is_free = shape.head_dim * shape.num_attention_heads != shape.hidden_size
    rest = shape.hidden_size % shape.num_attention_heads
    for family in FAMILIES.values() if name is None else (FAMILIES[name],):
        fixed = all(getattr(shape, key) == value for key, value in family.fixed.items())
        if is_partial and not family.partial_rotary:
            continue
        if (is_free and not family.free_head_dim) or (rest and not family.free_hidden_size):
            continue
        if shape.sliding_window is not None and "sliding_window" not in family.config:
            continue
        if (family.qkv_bias, family.qk_layernorm, family.experts) == wanted and fixed:
            return family
    experts = f", num_experts = {shape.num_experts}, moe_router_pre_softmax = "
    raise LongRopeError(
        f"no supported family has add_qkv_bias = {wanted[0]} and qk_layernorm = {wanted[1]}"
        f"{f'{experts}{not shape.moe_normalized_gates}' if wanted[2] else ''}"
        f"{f', rotary_percent = {shape.rotary_percent:g}' if is_partial else ''}"
        f"{f', kv_channels = {shape.head_dim} (not hidden_size / heads)' if is_free else ''}"
        f"{f', hidden_size = {shape.hidden_size} (no multiple of the heads)' if rest else ''}"
        f"{'' if shape.sliding_window is None else f', a window of {shape.sliding_window} tokens'} "
        f"(families: {', '.join(FAMILIES if name is None else (name,))})"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16` or `float16`.

    Raises:
        LongRopeError: Another dtype.
    """
    name = str(dtype).removeprefix("torch.")
    dtype_named(name)
    return name


def dtype_named(name: str) -> torch.dtype:
    """Inverse of :func:`dtype_name`.

    Raises:
        LongRopeError: Another name.
    """
    if name not in DTYPES:
        raise LongRopeError(f"dtype {name!r} is not supported; choose {', '.join(DTYPES)}")
    return getattr(torch, name)


def to_hf_config(
    shape: ModelShape,
    family: Family,
    dtype: torch.dtype,
    rope: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`config.json` of a model, valid for transformers 4.57 and 5.x.

    Args:
        rope (Mapping, optional): Keys of its rotation. Defaults to plain RoPE.
    """
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "dtype": dtype_name(dtype),
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_cache": True,
        "tie_word_embeddings": not shape.untie_embeddings,
        **family.config,
    }
    config.update((key, getattr(shape, name)) for key, name in family.config_keys().items())
    if shape.sliding_window is not None:
        config["sliding_window"] = shape.sliding_window
    if shape.rotary_percent != 1:
        config["partial_rotary_factor"] = shape.rotary_percent
    # 4.x reads rope_theta at the top, 5.x in rope_parameters.
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rotary_base}}
    return {**config, **(plain if rope is None else rope)}


def shape_from_hf_config(config: Mapping[str, Any]) -> ModelShape:
    """Inverse of :func:`to_hf_config`, for `config.json` files of any origin.

    Raises:
        LongRopeError: The model type is not one of the families, a key is missing, or a value is
            one that conversion does not support.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise LongRopeError(
            f"model_type {config.get('model_type')!r} is not supported; supported are: "
            f"{', '.join(FAMILIES)}"
        )
    rope = read_hf_rope(config)
    check_config({**family.absent, **config}, family.config)
    partial = rope.partial_rotary_factor
    if partial != 1 and not (family.partial_rotary and partial < 1):
        raise LongRopeError(
            f"config.json has partial_rotary_factor = {partial!r}; conversion supports partially "
            f"rotated heads of {', '.join(_PARTIAL)} only"
        )
    keys = family.config_keys()
    for key, name in keys.items():
        if config.get(key) is not None and ModelShape.__annotations__[name].startswith("int"):
            check_int(key, config[key], 1)
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": width // heads if heads and width else None,
        # `null` and a missing key differ: transformers reads the first as "as many as heads".
        **{key: value for key, value in family.absent.items() if key not in config},
    }
    fields = {}
    config = {**config, "rope_theta": rope.rope_theta}
    for key, name in keys.items():
        value = defaults.get(key) if config.get(key) is None else config[key]
        if value is not None and fields.setdefault(name, value) != value:
            raise LongRopeError(
                f"config.json has {key} = {value!r} and {fields[name]!r} under another name of "
                "it; make them agree"
            )
    for key, name in keys.items():
        if name not in fields:
            raise LongRopeError(f"config.json lacks {key}")
    fields.setdefault("ffn_hidden_size", fields.get("moe_ffn_hidden_size"))
    if family.has_sliding_window:
        check_sliding_window(
            family.stated(config), fields["num_layers"], fields["max_position_embeddings"]
        )
    shape = ModelShape(
        **fields,
        **family.fixed,
        padded_vocab_size=fields["vocab_size"],
        rotary_percent=partial,
        rotary_interleaved=False,
        untie_embeddings=not config.get("tie_word_embeddings", False),
        qk_layernorm=family.qk_layernorm,
        add_qkv_bias=family.qkv_bias,
        add_bias_linear=False,
        swiglu=True,
        normalization="RMSNorm",
        seq_length=fields["max_position_embeddings"],
        params_dtype=dtype_named(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )
    check_routing(shape)
    return shape
