"""Megatron's arguments of a model: those stored in a checkpoint, and the flags that spell them."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from pathlib import Path
from typing import Any

import torch

from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.errors import LongRopeError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

# (flag, argument), in lines as they are printed; a flag with a value.
_VALUES = (
    (("--num-layers", "num_layers"), ("--hidden-size", "hidden_size")),
    (("--ffn-hidden-size", "ffn_hidden_size"), ("--num-attention-heads", "num_attention_heads")),
    (("--kv-channels", "kv_channels"), ("--num-query-groups", "num_query_groups")),
    (("--seq-length", "seq_length"), ("--max-position-embeddings", "max_position_embeddings")),
    (("--position-embedding-type", "position_embedding_type"), ("--rotary-base", "rotary_base")),
    (("--rotary-percent", "rotary_percent"),),
    (("--window-size", "window_size"),),
    (("--normalization", "normalization"), ("--norm-epsilon", "norm_epsilon")),
    (("--attention-dropout", "attention_dropout"), ("--hidden-dropout", "hidden_dropout")),
    (
        ("--num-experts", "num_experts"),
        ("--moe-ffn-hidden-size", "moe_ffn_hidden_size"),
        ("--moe-router-topk", "moe_router_topk"),
    ),
    (
        ("--moe-router-load-balancing-type", "moe_router_load_balancing_type"),
        ("--moe-aux-loss-coeff", "moe_aux_loss_coeff"),
    ),
    # Megatron pads the tokenizer's vocabulary, and drops an embedding's rows beyond in silence.
    (
        ("--make-vocab-size-divisible-by", "make_vocab_size_divisible_by"),
        ("--padded-vocab-size", "padded_vocab_size"),
    ),
    (("--tokenizer-type", "tokenizer_type"), ("--tokenizer-model", "tokenizer_model")),
    (("--longrope-config", "longrope_config"),),
)
# (flag, argument, the value that asks for the flag)
_SWITCHES = (
    ("--swiglu", "swiglu", True),
    ("--disable-bias-linear", "add_bias_linear", False),
    ("--group-query-attention", "group_query_attention", True),
    ("--untie-embeddings-and-output-weights", "untie_embeddings_and_output_weights", True),
    ("--add-qkv-bias", "add_qkv_bias", True),
    ("--qk-layernorm", "qk_layernorm", True),
    ("--moe-router-pre-softmax", "moe_router_pre_softmax", True),
    ("--bf16", "bf16", True),
    ("--fp16", "fp16", True),
)
# What no model that is imported differs in, of its architecture and of a checkpoint without a past.
_OF_EVERY_MODEL = {
    "position_embedding_type": "rope",
    "add_position_embedding": True,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "swiglu": True,
    "squared_relu": False,
    "add_bias_linear": False,
    "apply_query_key_layer_scaling": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "pipeline_model_parallel_size": 1,
    "ckpt_format": "torch_dist",
    "no_save_optim": True,
    "no_save_rng": True,
    "iteration": 0,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
}
# What `--use-checkpoint-args` of Megatron 0.17 to 0.19 does not restore.
_NOT_RESTORED = (
    "--norm-epsilon",
    "--window-size",
    "--make-vocab-size-divisible-by",
    "--qk-layernorm",
    "--moe-router-load-balancing-type",
    "--moe-aux-loss-coeff",
    "--bf16",
    "--fp16",
)


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel: int) -> int:
    """Rows of the embedding by Megatron's rule.

    Raises:
        LongRopeError: A size is not positive.
    """
    for name, value in (
        ("make-vocab-size-divisible-by", divisible_by),
        ("tensor-model-parallel-size", tensor_parallel),
    ):
        if value < 1:
            raise LongRopeError(f"--{name} {value} must be at least 1")
    multiple = divisible_by * tensor_parallel
    return math.ceil(vocab_size / multiple) * multiple


def divisor_without_padding(vocab_size: int, tensor_parallel: int) -> int | None:
    """Largest power of two, up to Megatron's 128, that leaves a vocabulary unpadded."""
    for divisor in (128, 64, 32, 16, 8, 4, 2, 1):
        if padded_vocab_size(vocab_size, divisor, tensor_parallel) == vocab_size:
            return divisor
    return None


def stored_arguments(
    shape: ModelShape,
    *,
    family: str,
    tokenizer: Path,
    divisible_by: int,
    tensor_parallel: int,
    longrope_config: LongRopeConfig | None = None,
    longrope_path: Path | None = None,
    dropped_window: int | None = None,
) -> argparse.Namespace:
    """What a run that saved this model would have stored, as far as it concerns the model.

    Args:
        family (str): Where the model comes from; `convert to-hf` goes back there.
        tokenizer (Path): A Hugging Face folder; stored if it holds a tokenizer.
        divisible_by (int): Megatron's `--make-vocab-size-divisible-by`.
        tensor_parallel (int): What the vocabulary was padded for; the tensors are not split.
        longrope_path (Path, optional): The file that holds `longrope_config`.
        dropped_window (int, optional): Sliding window, in tokens, that the model lost.

    Raises:
        LongRopeError: The rotary base is not an integer, which is all that Megatron takes.
    """
    if not float(shape.rotary_base).is_integer():
        raise LongRopeError(
            f"config.json has rope_theta = {shape.rotary_base}; Megatron's --rotary-base takes "
            "integers only"
        )
    values: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": shape.num_query_groups != shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "seq_length": shape.seq_length,
        "max_position_embeddings": shape.max_position_embeddings,
        "rotary_base": int(shape.rotary_base),
        "rotary_percent": shape.rotary_percent,
        "normalization": shape.normalization,
        # Megatron's releases know the epsilon by one name or the other.
        "norm_epsilon": shape.norm_epsilon,
        "layernorm_epsilon": shape.norm_epsilon,
        "window_size": None if shape.sliding_window is None else (shape.sliding_window - 1, 0),
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "untie_embeddings_and_output_weights": shape.untie_embeddings,
        "vocab_size": shape.vocab_size,
        "padded_vocab_size": shape.padded_vocab_size,
        "make_vocab_size_divisible_by": divisible_by,
        "params_dtype": shape.params_dtype,
        "bf16": shape.params_dtype == torch.bfloat16,
        "fp16": shape.params_dtype == torch.float16,
        "tensor_model_parallel_size": tensor_parallel,
        "longrope_hf_family": family,
        "longrope_dropped_sliding_window": dropped_window,
        **_OF_EVERY_MODEL,
    }
    if shape.num_experts is not None:
        values |= {
            "num_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
            "moe_router_topk": shape.moe_router_topk,
            "moe_router_pre_softmax": not shape.moe_normalized_gates,
            "moe_router_score_function": "softmax",
            "moe_router_load_balancing_type": "aux_loss" if shape.moe_aux_loss_coeff else "none",
            "moe_aux_loss_coeff": shape.moe_aux_loss_coeff,
            "moe_layer_freq": 1,
        }
    if any((tokenizer / name).is_file() for name in _TOKENIZER_FILES):
        values["tokenizer_type"] = "HuggingFaceTokenizer"
        values["tokenizer_model"] = str(tokenizer.resolve())
    if longrope_config is not None:
        values["longrope_config"] = str(longrope_path)
        values["longrope_config_value"] = longrope_config.to_dict()
    return argparse.Namespace(**values)


def megatron_flags(args: argparse.Namespace) -> list[str]:
    """The flags of a Megatron script that build the model, in lines.

    Args:
        args (Namespace): From :func:`stored_arguments`.
    """
    lines = []
    for line in _VALUES:
        told = [
            f"{flag} {shlex.quote(str(value))}"
            for flag, name in line
            if (value := getattr(args, name, None)) is not None and _applies(args, name)
        ]
        lines += [" ".join(told)] if told else []
    switches = [flag for flag, name, wanted in _SWITCHES if getattr(args, name, None) == wanted]
    return [*lines, " ".join(switches)]


def flags_beside_checkpoint_args(args: argparse.Namespace) -> list[str]:
    """The flags that are still needed with `--use-checkpoint-args`."""
    return [
        flag
        for line in megatron_flags(args)
        for flag in re.split(r" (?=--)", line)
        if flag.split()[0] in _NOT_RESTORED
    ]


def _applies(args: argparse.Namespace, name: str) -> bool:
    """Megatron refuses query groups without grouped queries; whole heads are its default."""
    if name == "rotary_percent":
        return args.rotary_percent != 1
    return name != "num_query_groups" or args.group_query_attention
