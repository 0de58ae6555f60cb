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

from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.conversion.rules import (
    FUSED,
    OUTPUT_LAYER,
    QK_NORMS,
    QKV_BIAS,
    SEPARATE,
    TensorRule,
    decoder,
)


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture that a Megatron GPT model can become."""

    name: str
    """Its name on our command line and `model_type` in config.json."""

    architecture: str
    """Class in transformers."""

    rules: tuple[TensorRule, ...] = decoder(*SEPARATE)
    """Every tensor but the output layer, which is there when embeddings are untied."""

    qkv_bias: bool = False
    """Whether q, k and v have biases (Megatron `--add-qkv-bias`)."""

    qk_layernorm: bool = False
    """Whether q and k are normalized (Megatron `--qk-layernorm`)."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that are the same for every model of the family."""

    absent: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a key that a config.json lacks, where the families differ."""

    def tensor_rules(self, shape: ModelShape) -> tuple[TensorRule, ...]:
        """The rules that hold for one model."""
        return (*self.rules, OUTPUT_LAYER) if shape.untie_embeddings else self.rules


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", config={"attention_bias": False, "mlp_bias": False}),
        Family(
            "mistral",
            "MistralForCausalLM",
            config={"sliding_window": None},
            absent={"sliding_window": 4096, "num_key_value_heads": 8},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            rules=decoder(*SEPARATE, QKV_BIAS),
            qkv_bias=True,
            config={"use_sliding_window": False},
            absent={"use_sliding_window": False, "num_key_value_heads": 32},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            rules=decoder(*SEPARATE, *QK_NORMS),
            qk_layernorm=True,
            config={"attention_bias": False, "use_sliding_window": False},
            absent={"use_sliding_window": False, "num_key_value_heads": 32, "head_dim": 128},
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            rules=decoder(*FUSED),
            config={"sliding_window": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        ),
    )
}

# (config.json key, field of ModelShape)
_CONFIG_KEYS = (
    ("hidden_size", "hidden_size"),
    ("intermediate_size", "ffn_hidden_size"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "num_attention_heads"),
    ("num_key_value_heads", "num_query_groups"),
    ("head_dim", "head_dim"),
    ("vocab_size", "vocab_size"),
    ("max_position_embeddings", "max_position_embeddings"),
    ("rms_norm_eps", "norm_epsilon"),
    ("rope_theta", "rotary_base"),
)

# (config.json key, values that are fine, what conversion lacks); an absent key is fine. What only
# acts in training, such as dropout, is free.
_REFUSED_CONFIG: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("hidden_act", ("silu", "swish"), "activations other than SiLU"),
    ("attention_bias", (False,), "biases on the attention projections"),
    ("mlp_bias", (False,), "biases in the MLP"),
    ("partial_rotary_factor", (1, None), "partially rotated heads"),
    ("quantization_config", (None,), "quantized weights"),
    ("is_encoder_decoder", (False, None), "encoders"),
)

# (argument, values that are fine, what the Hugging Face families lack); an absent argument is fine.
_REFUSED_ARGUMENTS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("num_experts", (None, 0), "mixture of experts"),
    ("multi_latent_attention", (False, None), "multi-latent attention"),
    ("experimental_attention_variant", (None,), "other attention variants"),
    ("heterogeneous_layers_config_path", (None,), "layers that differ from each other"),
    ("mtp_num_layers", (None, 0), "multi-token prediction layers"),
    ("swiglu", (True,), "an MLP without SwiGLU"),
    ("normalization", ("RMSNorm",), "norms other than RMSNorm"),
    ("layernorm_zero_centered_gamma", (False, None), "zero-centred norm weights"),
    ("apply_layernorm_1p", (False, None), "zero-centred norm weights"),
    ("add_bias_linear", (False,), "biases on linear layers"),
    ("position_embedding_type", ("rope",), "position embeddings other than rope"),
    ("rotary_percent", (1, None), "partially rotated heads"),
    ("rotary_interleaved", (False, None), "interleaved rotary pairs"),
    ("rotary_seq_len_interpolation_factor", (None, 1), "linearly interpolated positions"),
    ("use_rope_scaling", (False, None), "Llama 3 rope scaling (its factor is not stored)"),
    ("no_rope_freq", (None,), "layers without RoPE"),
    ("window_size", (None,), "sliding-window attention"),
    ("softmax_type", ("vanilla", None), "attention sinks"),
    ("attention_output_gate", (False, None), "gated attention output"),
    ("qk_l2_norm", (False, None), "L2-normalized q and k"),
    ("activation_func_clamp_value", (None,), "clamped activations"),
    ("glu_linear_offset", (0, None), "an offset in the gated MLP"),
    ("apply_residual_connection_post_layernorm", (False, None), "post-norm residuals"),
    ("use_mup", (False, None), "muP scaling"),
)
_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def select_family(
    shape: ModelShape, args: argparse.Namespace | None = None, name: str | None = None
) -> Family:
    """The family that a model belongs to.

    Args:
        args (Namespace, optional): The checkpoint's arguments, to refuse what no family has.
        name (str, optional): Wanted family. Defaults to the one that the checkpoint was converted
            from, else the first that fits.

    Raises:
        ValueError: No family has what this model has; the message names the argument.
    """
    for argument, fine, lacking in _REFUSED_ARGUMENTS if args is not None else ():
        value = getattr(args, argument, fine[0])
        if value not in fine:
            raise ValueError(
                f"the model has {argument} = {value!r}; conversion does not support {lacking} "
                f"(families: {', '.join(FAMILIES)})"
            )
    if others := set(shape.hybrid_layer_pattern or "") - set("*-"):
        raise ValueError(
            f"the hybrid layer pattern {shape.hybrid_layer_pattern} has {sorted(others)[0]!r}; "
            "conversion supports '*' (attention) and '-' (dense MLP) layers"
        )
    if shape.softmax_scale is not None:
        raise ValueError(
            f"the model has softmax_scale = {shape.softmax_scale!r}; conversion does not support a "
            f"custom softmax scale (families: {', '.join(FAMILIES)})"
        )
    # What `convert from-hf` wrote remembers where it came from.
    origin = getattr(args, "longrope_hf_family", None)
    name = origin if name is None and origin in FAMILIES else name
    if name is not None and name not in FAMILIES:
        raise ValueError(f"family {name!r} is unknown; choose one of {', '.join(FAMILIES)}")
    if shape.hidden_size % shape.num_attention_heads:
        raise ValueError(
            f"hidden_size {shape.hidden_size} is not a multiple of {shape.num_attention_heads} "
            "heads, which transformers requires"
        )
    wanted = (shape.add_qkv_bias, shape.qk_layernorm)
    for family in FAMILIES.values() if name is None else (FAMILIES[name],):
        if (family.qkv_bias, family.qk_layernorm) == wanted:
            return family
    raise ValueError(
        f"no supported family has add_qkv_bias = {wanted[0]} and qk_layernorm = {wanted[1]} "
        f"(families: {', '.join(FAMILIES)})"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16` or `float16`.

    Raises:
        ValueError: Another dtype.
    """
    if dtype not in _DTYPE_NAMES:
        raise ValueError(
            f"dtype {dtype} is not supported; choose {', '.join(_DTYPE_NAMES.values())}"
        )
    return _DTYPE_NAMES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """Inverse of :func:`dtype_name`.

    Raises:
        ValueError: Another name.
    """
    for dtype, known in _DTYPE_NAMES.items():
        if name == known:
            return dtype
    raise ValueError(f"dtype {name!r} is not supported; choose {', '.join(_DTYPE_NAMES.values())}")


def to_hf_config(shape: ModelShape, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` of a model with plain RoPE, valid for transformers 4.57 and 5.x."""
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
    config.update((key, getattr(shape, name)) for key, name in _CONFIG_KEYS)
    # 4.x reads rope_theta at the top, 5.x in rope_parameters.
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": shape.rotary_base}
    return config


def shape_from_hf_config(config: Mapping[str, Any]) -> ModelShape:
    """Inverse of :func:`to_hf_config`, for `config.json` files of any origin.

    Raises:
        ValueError: The model type is not one of the families, a key is missing, or a value is one
            that conversion does not support.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ValueError(
            f"model_type {config.get('model_type')!r} is not supported; "
            f"families: {', '.join(FAMILIES)}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _check_values({**rope, **config})
    heads = config.get("num_attention_heads")
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": config["hidden_size"] // heads if heads and "hidden_size" in config else None,
        "rope_theta": rope.get("rope_theta", 10000.0),
        # `null` and a missing key differ: transformers reads the first as "as many as heads".
        **{key: value for key, value in family.absent.items() if key not in config},
    }
    fields = {}
    for key, name in _CONFIG_KEYS:
        value = defaults.get(key) if config.get(key) is None else config[key]
        if value is None:
            raise ValueError(f"config.json lacks {key}")
        fields[name] = value
    fields["rotary_base"] = float(fields["rotary_base"])
    _check_rope(rope)
    _check_sliding_window({**family.absent, **config}, fields["max_position_embeddings"])
    return ModelShape(
        **fields,
        padded_vocab_size=fields["vocab_size"],
        rotary_percent=1.0,
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


def _check_values(config: Mapping[str, Any]) -> None:
    for key, fine, lacking in _REFUSED_CONFIG:
        if config.get(key, fine[0]) not in fine:
            raise ValueError(
                f"config.json has {key} = {config[key]!r}; conversion does not support {lacking}, "
                f"only {key} = {fine[0]!r}"
            )


def _check_rope(rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in (None, "default", "longrope", "su"):
        raise ValueError(
            f"config.json has rope_type {kind!r}; conversion supports plain RoPE and longrope, so "
            "start from a model of the family that was not extended this way"
        )


def _check_sliding_window(config: Mapping[str, Any], max_length: int) -> None:
    """Refuse a window below the model's; one that is never reached changes nothing."""
    window = config.get("sliding_window")
    if window is None or window >= max_length or not config.get("use_sliding_window", True):
        return
    raise ValueError(
        f"config.json has sliding_window = {window} and max_position_embeddings = {max_length}; "
        "conversion does not support sliding-window attention: set max_position_embeddings to "
        f"{window}, which the model attends to in full"
    )
