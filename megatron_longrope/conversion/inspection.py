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
        "samples": _samples(checkpoint),
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
    samples, seen = content["samples"], "not stored"
    if samples is not None:
        seen = "{num_samples}, of {seq_length} tokens in the run that saved it".format(**samples)
    lines = [
        f"{content['directory']}: iteration {content['iteration']}",
        _line("format", content["format"]),
        _line("release", content["release"]),
        _line("parallel sizes", parallel or "not stored"),
        _line("samples seen", seen),
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


def _samples(checkpoint: MegatronCheckpoint) -> dict[str, int] | None:
    """How many sequences were trained on, and the length of the last run's, in tokens."""
    args = checkpoint.args
    length = getattr(args, "seq_length", None)
    samples = getattr(args, "consumed_train_samples", None)  # right where the batch size changed
    samples = samples or checkpoint.iteration * (getattr(args, "global_batch_size", None) or 0)
    return {"num_samples": samples, "seq_length": length} if samples and length else None
