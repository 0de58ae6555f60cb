"""What the GPU benchmarks share: device, Megatron's groups of one rank, results as they come."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))
# Behind everything: what the machine has comes before run.sh's wheels.
sys.path += filter(None, [os.environ.get("LONGROPE_WHEELS")])

import measure
import torch

from megatron_longrope.integration import cpu_host
from megatron_longrope.plan import Model

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def options(description: str) -> argparse.ArgumentParser:
    """A parser with what every part takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="toy sizes, on the CPU if need be")
    parser.add_argument("--output", type=Path, help="append each result to this file as it comes")
    return parser


def start(quick: bool) -> torch.device:
    """The GPU, or with `quick` the CPU, with process groups of one rank.

    Raises:
        SystemExit: No GPU, and not `quick`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if not quick:
            raise SystemExit("there is no GPU; --quick checks the script with toy sizes")
        cpu_host.prepare_environment()
        cpu_host.enable()
    from megatron.core import tensor_parallel

    from megatron_longrope.engine import process_groups

    process_groups.initialize()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    return device


def transformer_config(model: Model, device: torch.device, **more: Any) -> TransformerConfig:
    """Megatron's settings of a Llama-type model without dropout, and `more` of them."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=device.type == "cpu",
        **more,
    )


def record(path: Path | None, **values: Any) -> None:
    """Print a result as one JSON line, and append it to a file at once: a time limit may follow."""
    line = json.dumps(values)
    print(line, flush=True)
    if path is not None:
        with path.open("a") as file:
            file.write(line + "\n")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor and GPU of the measurement."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {**measure.environment(), "gpu": name, "cuda": torch.version.cuda}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Bytes of tensors on the GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Let :func:`peak` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Most bytes of tensors on the GPU since :func:`reset_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
