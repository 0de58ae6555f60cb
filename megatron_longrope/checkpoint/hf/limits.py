"""What conversion does not support, as data, and the refusals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.config_rules import check_int
from megatron_longrope.errors import LongRopeError

# (config.json key, values that are fine, what conversion lacks); an absent key is fine. What only
# acts in training, such as dropout, is free.
_CONFIG: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("hidden_act", ("silu", "swish"), "activations other than SiLU"),
    ("attention_bias", (False,), "biases on the attention projections"),
    ("attention_out_bias", (False,), "biases on the output projection"),
    ("mlp_bias", (False,), "biases in the MLP"),
    ("quantization_config", (None,), "quantized weights"),
    ("is_encoder_decoder", (False, None), "encoders"),
    ("decoder_sparse_step", (1, None), "dense layers among those with experts"),
    ("mlp_only_layers", ([], None), "dense layers among those with experts"),
    ("shared_expert_intermediate_size", (0, None), "shared experts"),
)

# (field of ModelShape, what every family has there, what families and the engine lack)
_SHAPE: tuple[tuple[str, Any, str], ...] = (
    ("swiglu", True, "an MLP without SwiGLU"),
    ("normalization", "RMSNorm", "norms other than RMSNorm"),
    ("add_bias_linear", False, "biases on linear layers"),
    ("rotary_interleaved", False, "interleaved rotary pairs"),
    ("softmax_scale", None, "a custom softmax scale"),
    ("other_moe", None, "experts beyond softmax routing in every layer"),
    ("other_architecture", None, "what is not in a decoder with plain RoPE"),
)


def check_shape(shape: ModelShape, families: Iterable[str]) -> None:
    """Refuse a geometry that no family has.

    Args:
        families (Iterable[str]): Their names, for the message.

    Raises:
        LongRopeError: The message names what is not supported.
    """
    if others := set(shape.hybrid_layer_pattern or "") - set("*-"):
        raise LongRopeError(
            f"the hybrid layer pattern {shape.hybrid_layer_pattern} has {sorted(others)[0]!r}; "
            "conversion supports '*' (attention) and '-' (dense MLP) layers"
        )
    for problem, lacking in unsupported(shape):
        raise LongRopeError(
            f"the model has {problem}; conversion does not support {lacking} "
            f"(families: {', '.join(families)})"
        )


def unsupported(shape: ModelShape) -> Iterator[tuple[str, str]]:
    """What of a geometry no family has, and what is lacking for it, in words."""
    for field, of_families, lacking in _SHAPE:
        value = getattr(shape, field)
        if value != of_families:
            # The last two fields name an argument themselves.
            yield value if field.startswith("other_") else f"{field} = {value!r}", lacking


def check_routing(shape: ModelShape) -> None:
    """Refuse a routing of a Hugging Face model that Megatron does not have.

    Raises:
        LongRopeError: One expert for each token, whose weight is normalized to 1.
    """
    if shape.moe_router_topk == 1 and shape.moe_normalized_gates:
        raise LongRopeError(
            "config.json has num_experts_per_tok = 1 and weights each token's experts so that they "
            "add up to 1; Megatron refuses that routing (where top-k is 1 it wants "
            "--moe-router-pre-softmax), so conversion does not support it"
        )


def check_config(config: Mapping[str, Any], of_family: Mapping[str, Any]) -> None:
    """Refuse values in config.json that conversion lacks.

    Args:
        config (Mapping): config.json with transformers' defaults for missing keys.
        of_family (Mapping): Values that every model of the family has.

    Raises:
        LongRopeError: The message names the key and the value that is supported.
    """
    for key, fine, lacking in _CONFIG:
        if key in of_family and of_family[key] not in fine:
            fine, lacking = (of_family[key],), "models of this type without it"
        if config.get(key, fine[0]) not in fine:
            raise LongRopeError(
                f"config.json has {key} = {config[key]!r}; conversion does not support {lacking}, "
                f"only {key} = {fine[0]!r}"
            )


def check_sliding_window(config: Mapping[str, Any], num_layers: int, max_length: int) -> None:
    """Refuse a window below the model's; one that is never reached changes nothing.

    Args:
        config (Mapping): Of :meth:`.families.Family.stated`. Only families that choose their layers
            have `max_window_layers`.
        num_layers (int): Layers of the model.
        max_length (int): Longest sequence, in tokens.

    Raises:
        LongRopeError: Some positions would see less than all before them.
    """
    window = _window_in_use(config, num_layers, max_length)
    if window is None:
        return
    raise LongRopeError(
        f"config.json has sliding_window = {window} and max_position_embeddings = {max_length}; "
        "read it with --sliding-window keep, drop the window with --sliding-window drop, as "
        "LongRoPE's authors do, or set max_position_embeddings to "
        f"{window}, which the model attends to in full"
    )


def without_sliding_window(config: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Let a model attend in full, whatever window it was trained with.

    Args:
        config (Mapping): Of :meth:`.families.Family.stated`.

    Returns:
        tuple[dict[str, Any], int | None]: The configuration, and the window, in tokens, that it no
        longer has; None where none was in use.
    """
    changed = {key: value for key, value in config.items() if key != "layer_types"}
    changed |= {"sliding_window": None}
    if "use_sliding_window" in config:
        changed |= {"use_sliding_window": False}
    return changed, _window_in_use(
        config, config["num_hidden_layers"], config["max_position_embeddings"]
    )


def _window_in_use(config: Mapping[str, Any], num_layers: int, max_length: int) -> int | None:
    """The window that keeps some positions from seeing all before them, in tokens."""
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True):
        return None
    check_int("max_position_embeddings", max_length, 1)
    if check_int("sliding_window", window, 0) >= max_length:
        return None
    if "max_window_layers" in config:
        kinds = config.get("layer_types")
        if kinds is None:
            kinds = ["full_attention"] * min(config["max_window_layers"], num_layers)
        if kinds == ["full_attention"] * num_layers:
            return None
    return window
