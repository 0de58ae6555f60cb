"""`ModelShape`: the geometry of a model, out of Megatron's arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from megatron_longrope.errors import LongRopeError
from megatron_longrope.frequencies import carries_factor


@dataclass(frozen=True)
class ModelShape:
    """What is needed to build a transformer or to describe it elsewhere."""

    num_layers: int
    """Transformer layers; of a HybridModel, which counts attention and MLPs one by one, its
    attention layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLP, of one half for gated activations; of no effect in a mixture of experts."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads; equal to num_attention_heads without grouped queries."""
    head_dim: int
    """Width of a head (Megatron `kv_channels`)."""
    vocab_size: int
    """Tokens of the vocabulary without padding, or padded_vocab_size where it was not stored."""
    padded_vocab_size: int
    """Rows of the embedding."""
    norm_epsilon: float
    """Epsilon of the norms."""
    rotary_base: float
    """Base of RoPE."""
    rotary_percent: float
    """Fraction of head_dim that is rotated."""
    rotary_interleaved: bool
    """True when pairs are neighbours instead of halves."""
    untie_embeddings: bool
    """True when the output layer has its own weight."""
    qk_layernorm: bool
    """Norms on q and k."""
    add_qkv_bias: bool
    """Bias on the q, k, v projection."""
    add_bias_linear: bool
    """Biases on every linear layer."""
    swiglu: bool
    """Gated SiLU in the MLP."""
    normalization: str
    """`RMSNorm` or `LayerNorm`."""
    max_position_embeddings: int
    """Longest window, in tokens, that the model was configured for."""
    seq_length: int
    """Sequence length, in tokens, of the run that saved it."""
    params_dtype: torch.dtype
    """Dtype of the parameters in that run."""
    softmax_scale: float | None = None
    """Custom scale of the attention logits; None is 1 / sqrt(head_dim). LongRoPE's attention
    factor, which a run carries there, is not part of it: it belongs to the factors."""
    sliding_window: int | None = None
    """Keys, its own included, that a query sees in every layer (Megatron's `--window-size` less the
    counting: (sliding_window - 1, 0)); None for all before it."""
    hybrid_layer_pattern: str | None = None
    """Layers of a HybridModel, a letter each, without the borders of pipeline stages; None for
    GPTModel."""
    num_experts: int | None = None
    """Experts of each layer's MLP, every one of which routes among as many; None for dense MLPs."""
    moe_ffn_hidden_size: int | None = None
    """Width of an expert, as ffn_hidden_size counts it."""
    moe_router_topk: int | None = None
    """Experts that a token is sent to."""
    moe_normalized_gates: bool | None = None
    """True where the weights of a token's experts add up to 1 (softmax over the chosen ones), False
    where they are their part of all (Megatron `--moe-router-pre-softmax`)."""
    moe_router_dtype: str | None = None
    """`fp32` or `fp64`, what the router computes in; None for the dtype of the hidden states."""
    moe_aux_loss_coeff: float | None = None
    """Weight of the load-balancing loss in training, 0 without; the outputs do not depend on it."""
    other_moe: str | None = None
    """An argument, with its value, that asks for experts that this package does not know."""
    other_architecture: str | None = None
    """The same of anything else, such as positions or norms: the tensors may look like any other
    model's."""

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return int(self.head_dim * self.rotary_percent)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelShape:
        """Read Megatron's arguments, filling what Megatron derives.

        Raises:
            LongRopeError: An argument is missing or not of its type.
        """
        heads = _int(args, "num_attention_heads")
        hidden_size = _int(args, "hidden_size")
        grouped = bool(getattr(args, "group_query_attention", False))
        padded = _int(args, "padded_vocab_size", _optional(args, "vocab_size"))
        seq_length = _int(args, "seq_length")
        # `--norm-epsilon` is stored under the name that the transformer config uses.
        epsilon = _optional(args, "layernorm_epsilon", _optional(args, "norm_epsilon", 1e-5))
        pattern = _hybrid_layer_pattern(args)
        return cls(
            num_layers=_int(args, "num_layers") if pattern is None else _attention_layers(pattern),
            hidden_size=hidden_size,
            ffn_hidden_size=_int(args, "ffn_hidden_size"),
            num_attention_heads=heads,
            num_query_groups=_int(args, "num_query_groups") if grouped else heads,
            head_dim=_int(args, "kv_channels", hidden_size // heads),
            vocab_size=min(_int(args, "vocab_size", padded) + _end_beyond(args), padded),
            padded_vocab_size=padded,
            norm_epsilon=float(epsilon),
            rotary_base=float(_optional(args, "rotary_base", 10000)),
            rotary_percent=float(_optional(args, "rotary_percent", 1.0)),
            rotary_interleaved=bool(getattr(args, "rotary_interleaved", False)),
            untie_embeddings=bool(getattr(args, "untie_embeddings_and_output_weights", False)),
            qk_layernorm=bool(getattr(args, "qk_layernorm", False)),
            add_qkv_bias=bool(getattr(args, "add_qkv_bias", False)),
            add_bias_linear=bool(getattr(args, "add_bias_linear", True)),
            swiglu=bool(getattr(args, "swiglu", False)),
            normalization=str(getattr(args, "normalization", "LayerNorm")),
            max_position_embeddings=_int(args, "max_position_embeddings", seq_length),
            seq_length=seq_length,
            params_dtype=_dtype(args),
            softmax_scale=custom_softmax_scale(args),
            sliding_window=_sliding_window(args),
            hybrid_layer_pattern=pattern,
            other_architecture=_other_architecture(args),
            **(_moe(args) if _optional(args, "num_experts") else {}),
        )


# (argument, values that leave a decoder with plain RoPE as it is, what others ask for); an absent
# argument is fine, and so is what only acts in training. Most of them add no tensor.
_PLAIN_ARCHITECTURE: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("multi_latent_attention", (False,), "multi-latent attention"),
    ("experimental_attention_variant", (), "another variant of attention"),
    ("heterogeneous_layers_config_path", (), "layers that differ from each other"),
    ("mtp_num_layers", (0,), "multi-token prediction layers"),
    ("layernorm_zero_centered_gamma", (False,), "zero-centred norm weights"),
    ("apply_layernorm_1p", (False,), "zero-centred norm weights"),
    ("position_embedding_type", ("rope",), "position embeddings other than rope"),
    ("rotary_seq_len_interpolation_factor", (1,), "linearly interpolated positions"),
    ("no_rope_freq", (0,), "layers without RoPE"),
    ("softmax_type", ("vanilla",), "attention sinks"),
    ("attention_output_gate", (False,), "gated attention output"),
    ("qk_l2_norm", (False,), "L2-normalized q and k"),
    ("activation_func_clamp_value", (), "clamped activations"),
    ("glu_linear_offset", (0,), "an offset in the gated MLP"),
    ("apply_residual_connection_post_layernorm", (False,), "post-norm residuals"),
    ("use_mup", (False,), "muP scaling"),
)


def _other_architecture(args: argparse.Namespace) -> str | None:
    for name, plain, meaning in _PLAIN_ARCHITECTURE:
        value = getattr(args, name, None)
        if value is not None and value not in plain:
            return f"{name} = {value!r} ({meaning})"
    left, right = _optional(args, "window_size", (-1, 0))
    skipped = _optional(args, "window_attn_skip_freq")
    if left >= 0 and (right != 0 or skipped is not None):
        told = f"window_size = {(left, right)} and window_attn_skip_freq = {skipped!r}"
        return f"{told} (other than a causal window in every layer)"
    return None


# (argument, values that leave softmax routing among the experts of every layer as it is); an absent
# argument is fine, and so is what only acts in training.
_PLAIN_MOE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("moe_shared_expert_intermediate_size", (None, 0)),
    ("moe_latent_size", (None,)),
    ("moe_router_score_function", ("softmax", None)),
    ("moe_router_enable_expert_bias", (False, None)),
    ("moe_router_topk_scaling_factor", (None, 1)),
    ("moe_router_dtype", (None, "fp32", "fp64")),
    ("moe_router_num_groups", (None,)),
    ("moe_router_group_topk", (None,)),
    ("moe_router_topk_limited_devices", (None,)),
    ("moe_router_force_load_balancing", (False, None)),
    ("moe_router_force_biased", (None,)),
    ("moe_expert_capacity_factor", (None,)),
    ("moe_expert_rank_capacity_factor", (None,)),
    ("moe_apply_probs_on_input", (False, None)),
    ("moe_mlp_glu_interleave_size", (None,)),
)
_BALANCING_LOSSES = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}


def _moe(args: argparse.Namespace) -> dict[str, Any]:
    """What a model with experts has beyond others."""
    balancing = _optional(args, "moe_router_load_balancing_type", "aux_loss")
    coefficient = _optional(args, "moe_aux_loss_coeff", 0.0)
    return {
        "num_experts": _int(args, "num_experts"),
        "moe_ffn_hidden_size": _int(args, "moe_ffn_hidden_size", _int(args, "ffn_hidden_size")),
        "moe_router_topk": _int(args, "moe_router_topk", 2),
        "moe_normalized_gates": not _optional(args, "moe_router_pre_softmax", False),
        "moe_router_dtype": _optional(args, "moe_router_dtype"),
        # Other losses have coefficients of their own meaning, of which lists hold several.
        "moe_aux_loss_coeff": float(coefficient) if balancing == "aux_loss" else 0.0,
        "other_moe": _other_moe(args),
    }


def _other_moe(args: argparse.Namespace) -> str | None:
    frequency = _optional(args, "moe_layer_freq", 1)
    if set(frequency if isinstance(frequency, list | tuple) else [frequency]) != {1}:
        return f"moe_layer_freq = {frequency!r} (dense layers among those with experts)"
    balancing = _optional(args, "moe_router_load_balancing_type", "none")
    if set([balancing] if isinstance(balancing, str) else balancing) - _BALANCING_LOSSES:
        return f"moe_router_load_balancing_type = {balancing!r} (it changes the routing)"
    for name, plain in _PLAIN_MOE:
        value = getattr(args, name, None)
        if value is not None and value not in plain:
            return f"{name} = {value!r}"
    return None


def _end_beyond(args: argparse.Namespace) -> bool:
    """Whether --vocab-size does not count the end of a document, which follows its ids.

    So it was with NullTokenizer before megatron-core 0.18, which has a flag for that id.
    """
    is_null = getattr(args, "tokenizer_type", None) == "NullTokenizer"
    return is_null and not hasattr(args, "null_tokenizer_eod_id")


def custom_softmax_scale(args: argparse.Namespace) -> float | None:
    """The run's softmax scale, unless it is what the LongRoPE plugin put there itself."""
    scale = _optional(args, "softmax_scale")
    factor = _optional(args, "longrope_attention_factor")
    if scale is None or factor is None:
        return scale
    head_dim = _int(args, "kv_channels", args.hidden_size // args.num_attention_heads)
    return None if carries_factor(scale, factor, head_dim) else scale


def _hybrid_layer_pattern(args: argparse.Namespace) -> str | None:
    # The second is the flag's older name; releases that know both copy it into the first.
    pattern = _optional(args, "hybrid_layer_pattern", _optional(args, "hybrid_override_pattern"))
    return None if pattern is None else str(pattern).replace("|", "")


def _attention_layers(pattern: str) -> int:
    return pattern.partition("/")[0].count("*")  # what follows is multi-token prediction


def _sliding_window(args: argparse.Namespace) -> int | None:
    size = _optional(args, "window_size")
    return None if size is None or size[0] < 0 else int(size[0]) + 1


def _optional(args: argparse.Namespace, name: str, default: Any = None) -> Any:
    value = getattr(args, name, None)
    return default if value is None else value


def _int(args: argparse.Namespace, name: str, default: int | None = None) -> int:
    value = _optional(args, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LongRopeError(
            f"the checkpoint's argument {name} is {value!r}; a positive integer is needed"
        )
    return value


def _dtype(args: argparse.Namespace) -> torch.dtype:
    value = getattr(args, "params_dtype", None)
    return value if isinstance(value, torch.dtype) else torch.float32
