"""The arguments of a checkpoint that Megatron-Bridge wrote, which keeps them in run_config.yaml."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_longrope.errors import LongRopeError

RUN_CONFIG = "run_config.yaml"

# Fields of Bridge's model provider under another name than Megatron-LM's argument. `scale_factor`
# is that of Llama 3.1 in Bridge 0.1 and 0.2, which scaled without a field for it.
_RENAMED = {
    "num_moe_experts": "num_experts",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "scale_factor": "rope_scaling_factor",
}


def args_from_run_config(path: Path, padded_vocab_size: int | None) -> argparse.Namespace:
    """Read the model section of a run_config.yaml as Megatron-LM's arguments.

    Args:
        path (Path): The file; it lies in the folder of an iteration.
        padded_vocab_size (int, optional): Rows of the stored embedding, which the file leaves out.

    Raises:
        LongRopeError: The file is no YAML or has no model section.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise LongRopeError(f"{path}: cannot be read as YAML: {reason}") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise LongRopeError(f"{path}: has no section `model`, which Megatron-Bridge writes")
    # Bridge's newest recipes keep what is TransformerConfig's in a section of its own.
    model = {**(model.get("transformer") or {}), **model}
    args = argparse.Namespace(
        **{_RENAMED.get(name, name): _plain(value) for name, value in model.items()}
    )
    groups = getattr(args, "num_query_groups", None)
    args.group_query_attention = groups is not None
    args.untie_embeddings_and_output_weights = not getattr(
        args, "share_embeddings_and_output_weights", True
    )
    args.swiglu = _is_swiglu(path, model)
    if "scale_factor" in model:
        args.rope_scaling = True
    args.params_dtype = _dtype(model)
    if padded_vocab_size is not None:
        args.padded_vocab_size = padded_vocab_size
    return args


def _plain(value: Any) -> Any:
    """A value; of a function, type or enumeration, which Bridge writes as a mapping, its name."""
    if isinstance(value, dict) and "_target_" in value:
        return value["_target_"]
    return value


def _is_swiglu(path: Path, model: dict[str, Any]) -> bool:
    if not model.get("gated_linear_unit"):
        return False
    if "activation_func" not in model:  # megatron-core 0.19 leaves functions out
        raise LongRopeError(
            f"{path}: says nothing of activation_func, on which a model with gated_linear_unit "
            "depends; add `activation_func: silu` to its section `model` if that is the model's"
        )
    return str(_plain(model["activation_func"])).endswith("silu")


def _dtype(model: dict[str, Any]) -> torch.dtype:
    name = str(_plain(model.get("params_dtype"))).removeprefix("torch.")
    found = getattr(torch, name, None)
    if isinstance(found, torch.dtype):
        return found
    flags = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((kind for flag, kind in flags.items() if model.get(flag)), torch.float32)
