"""Host memory that loading a bf16 model for scoring takes, in bytes of the model.

The engine allocates parameters once, in the type and on the device of their use, and fills them
tensor by tensor; the claim is a peak of at most 1.2 times the model. The baseline is the obvious
way, and the engine's former one: build in fp32, fill, convert. Peaks are those of anonymous memory,
so that mapped files do not count, sampled in a fresh process of each arm.

    python benchmarks/engine_loading.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

LIMIT = 1.2
_FULL = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16}
_QUICK = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}


def make_checkpoint(directory: Path, sizes: dict[str, int]) -> int:
    """A Llama folder with random bf16 weights; returns the bytes of the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype="bfloat16",
        **sizes,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def load(arm: str, directory: Path) -> Any:
    """The engine's model in bf16 on the host."""
    import torch

    from megatron_longrope.checkpoint import load_into
    from megatron_longrope.checkpoint.hf.checkpoint import HfCheckpoint
    from megatron_longrope.checkpoint.opening import model_config
    from megatron_longrope.engine import load_engine, process_groups
    from megatron_longrope.engine.model import build_model

    checkpoint = HfCheckpoint(directory)
    if arm == "ours":
        return load_engine(checkpoint, device="cpu", dtype=torch.bfloat16).model
    process_groups.initialize()
    model = build_model(checkpoint.shape, model_config(checkpoint))
    load_into(model, checkpoint)
    return model.to(torch.bfloat16)


def peak_growth(function: Callable[[], Any]) -> int:
    """Largest growth of this process' anonymous memory while `function` runs, in bytes."""
    before, peak, ended = _anonymous(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.is_set():
            peak = max(peak, _anonymous())
            time.sleep(0.002)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    kept = function()
    ended.set()
    sampler.join()
    del kept
    return peak - before


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])


def peak_of(arm: str, directory: Path) -> int:
    """Peak bytes of one arm, in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--directory", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model; writes nothing")
    parser.add_argument("--arm", choices=("ours", "convert"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.arm:
        warm_up = options.directory / "warm_up"
        load(options.arm, warm_up)  # imports and lazily loaded code are not the model's
        print(peak_growth(lambda: load(options.arm, options.directory / "model")))
        return
    measure.print_environment()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_checkpoint(directory / "warm_up", {**_QUICK, "num_hidden_layers": 1})
        size = make_checkpoint(directory / "model", _QUICK if options.quick else _FULL)
        peaks = {arm: peak_of(arm, directory) for arm in ("convert", "ours")}
    measure.print_table(
        ("arm", "peak, MiB", "of the model"),
        [(arm, f"{peak / 2**20:.0f}", f"{peak / size:.2f}") for arm, peak in peaks.items()],
    )
    measure.finish(
        "engine_loading",
        peaks["ours"] / peaks["convert"],
        full_run=not options.quick,
        ratio_of="peak anonymous bytes over those of building in fp32 and converting",
        model_bytes=size,
        peak_over_model={arm: round(peak / size, 3) for arm, peak in peaks.items()},
        target=LIMIT,
        target_met=peaks["ours"] <= LIMIT * size,
    )


if __name__ == "__main__":
    main()
