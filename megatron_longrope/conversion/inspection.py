"""What a checkpoint holds and where it comes from, for people and for programs."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_longrope.checkpoint import MegatronCheckpoint

# (name here, Megatron's argument)
_PARALLEL = (
    ("tensor", "tensor_model_parallel_size"),
    ("pipeline", "pipeline_model_parallel_size"),
    ("virtual_pipeline", "virtual_pipeline_model_parallel_size"),
    ("context", "context_parallel_size"),
    ("expert", "expert_model_parallel_size"),
    ("data", "data_parallel_size"),
)
_COMMON_FILE = "common.pt"


def inspect(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """Everything that is known without reading a weight, as plain JSON."""
    tensors = checkpoint.keys()
    longrope = checkpoint.longrope
    return {
        "directory": str(checkpoint.directory),
        "format": checkpoint.format,
        "release": _release(checkpoint),
        "iteration": checkpoint.iteration,
        "parallel": _parallel(checkpoint),
        "tokens": _tokens(checkpoint),
        "num_parameters": sum(math.prod(info.shape) for info in tensors.values()),
        "num_bytes": sum(info.num_bytes for info in tensors.values()),
        "model": {name: _plain(value) for name, value in vars(checkpoint.shape).items()},
        "longrope": None if longrope is None else longrope.to_dict(),
        "lineage": checkpoint.lineage,
        "tensors": {
            name: {"shape": list(info.shape), "dtype": _plain(info.dtype)}
            for name, info in tensors.items()
        },
    }


def as_text(content: dict[str, Any]) -> str:
    """What :func:`inspect` found, in lines."""
    parallel = ", ".join(f"{name} {size}" for name, size in content["parallel"].items())
    tokens = content["tokens"]
    seen = "not stored" if tokens is None else f"{tokens['num_tokens']} ({tokens['from']})"
    lines = [
        f"{content['directory']}: iteration {content['iteration']}",
        _line("format", content["format"]),
        _line("release", content["release"]),
        _line("parallel sizes", parallel or "not stored"),
        _line("tokens seen", seen),
        _line("parameters", f"{content['num_parameters']}, padding of the vocabulary included"),
        _line("bytes", content["num_bytes"]),
        *(_line(name, value) for name, value in content["model"].items()),
    ]
    if content["longrope"] is None:
        lines.append(_line("longrope", "none stored"))
    else:
        lengths = (str(item["max_length"]) for item in content["longrope"]["factor_sets"])
        lines.append(_line("longrope", f"factor sets up to {', '.join(lengths)} tokens"))
    for stage in content["lineage"]:
        told = ", ".join(f"{key} {value}" for key, value in stage.items())
        lines.append(_line("stage", told))
    for name, info in sorted(content["tensors"].items()):
        lines.append(f"  {name}  {info['shape']}  {info['dtype']}")
    return "\n".join(lines)


def _line(name: str, value: Any) -> str:
    return f"  {name:26} {value}"


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _release(checkpoint: MegatronCheckpoint) -> str:
    """Megatron stores no version, but its releases place the common state differently."""
    if family := getattr(checkpoint.args, "longrope_hf_family", None):
        return f"longrope convert from-hf ({family})"
    if checkpoint.format != "torch_dist":
        return "not stored"
    if (checkpoint.directory / _COMMON_FILE).is_file():
        return "not stored; megatron-core 0.18 or earlier, by its layout"
    return "not stored; megatron-core 0.19 or later, by its layout"


def _parallel(checkpoint: MegatronCheckpoint) -> dict[str, int]:
    """Sizes of the run that saved it; the reader does not depend on them."""
    found = ((name, getattr(checkpoint.args, argument, None)) for name, argument in _PARALLEL)
    return {name: size for name, size in found if size}


def _tokens(checkpoint: MegatronCheckpoint) -> dict[str, Any] | None:
    """How much the run trained on, padding included, and what that is computed from."""
    args = checkpoint.args
    length = getattr(args, "seq_length", None)
    if not length:
        return None
    # Counted, so right for a batch size that changed on the way.
    if samples := getattr(args, "consumed_train_samples", None):
        return {"num_tokens": samples * length, "from": f"{samples} samples x {length} tokens"}
    if batch := getattr(args, "global_batch_size", None):
        return {
            "num_tokens": checkpoint.iteration * batch * length,
            "from": f"{checkpoint.iteration} iterations x {batch} samples x {length} tokens",
        }
    return None
