"""`longrope plan`: does a fine-tuning run fit, in which layout, and how long does it take?"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_longrope.cli.flags import add_command
from megatron_longrope.lengths import parse_length
from megatron_longrope.options import Options, flag, parse_positive

_SIZES = ("tensor", "context", "pipeline", "expert")


@dataclass(frozen=True, kw_only=True)
class _Run(Options):
    model: str | None = flag(None, metavar="NAME", exclusive="model", required=True)
    """llama2-7b, llama3-8b, mistral-7b, ..."""
    load: str | None = flag(None, metavar="CKPT", exclusive="model", required=True)
    """Megatron checkpoint: its --save directory"""
    hf: str | None = flag(None, metavar="DIR", exclusive="model", required=True)
    """local Hugging Face folder"""
    length: int = flag(type=parse_length, metavar="N")
    """tokens of a sequence"""
    global_batch_size: int = flag(32, type=parse_positive, metavar="B")
    """sequences of a step"""
    steps: int = flag(600, type=parse_positive, metavar="K")
    """steps of the run"""
    chunked_loss: bool = flag(True, action=argparse.BooleanOptionalAction)
    """with --longrope-chunked-loss (default), or with the logits of all tokens at once"""


@dataclass(frozen=True, kw_only=True)
class _Cluster(Options):
    GROUP: ClassVar = "cluster"

    gpus: int = flag(type=parse_positive, metavar="G")
    """GPUs of the run"""
    gpu: str = flag("h100", metavar="NAME")
    """a100-80, h100, ... or TFLOPS:GIB"""
    gpus_per_node: int = flag(8, type=parse_positive, metavar="G")
    """GPUs of a node, which NVLink joins"""
    mfu: float | None = flag(None, type=float, metavar="U")
    """part of the peak that all operations run at (default: assumed and fitted
    rates by GPU, see docs/plan.md)"""


def _size(name: str, who: str) -> Any:
    words = f"GPUs {who} (default: chosen)"
    name = f"--{name}-parallel-size"
    return flag(None, name=name, type=parse_positive, metavar="N", help=words)


@dataclass(frozen=True, kw_only=True)
class _Layout(Options):
    GROUP: ClassVar = ("layout", "what is given is not chosen")

    tensor: int | None = _size("tensor-model", "that share a layer")
    context: int | None = _size("context", "that share a sequence")
    pipeline: int | None = _size("pipeline-model", "with different layers")
    expert: int | None = _size("expert-model", "with different experts")

    recompute: str | None = flag(None, choices=("none", "mlp", "full"))
    """what the backward pass computes again. none: nothing. mlp: MLPs, or experts. full: whole
    layers (default: chosen)"""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(_Layout, _Cluster, _Run):
    """What `longrope plan` is told."""

    GROUP: ClassVar = None

    json: bool = flag(False)
    """print one JSON object instead"""
    all: bool = flag(False)
    """list every layout that fits, too"""


def add_parser(commands: Any, about: str | None = None) -> None:
    """Register the subcommand."""
    add_command(
        commands,
        "plan",
        PlanOptions,
        run,
        help=about,
        description="Memory per GPU, operations and hours of fine-tuning at a length, and the "
        "parallel sizes and recomputation to run it with, as flags to paste. Exits with 1 when it "
        "does not fit, and says what would.",
    )


def run(options: PlanOptions) -> int:
    """Run the command."""
    from megatron_longrope.plan import Cluster, Training, rank, remedies
    from megatron_longrope.plan.flags import DEFAULT_CHUNK
    from megatron_longrope.plan.hardware import GIB, parse_gpu
    from megatron_longrope.plan.layouts import FULL

    gpu, model = parse_gpu(options.gpu), _model(options)
    cluster = Cluster(gpu, options.gpus, options.gpus_per_node, options.mfu)
    chunk = DEFAULT_CHUNK if options.chunked_loss else None
    training = Training(options.length, options.global_batch_size, options.steps, chunk)
    fixed: Any = {name: size for name in _SIZES if (size := getattr(options, name)) is not None}
    if options.recompute is not None:
        kinds = {"none": (), "mlp": (model.mlp_module,), "full": FULL}
        fixed["recompute"] = kinds[options.recompute]
    ranked = rank(model, training, cluster, fixed)
    best, fitting = ranked[0], [one for one in ranked if one.fits]
    advice = [] if best.fits else remedies(best, cluster, fixed)
    if options.json:
        answer = {**best.as_dict(), "would_fit": advice}
        if options.all:
            answer["all"] = [one.as_dict() for one in fitting]
        print(json.dumps(answer, indent=2))
        return 0 if best.fits else 1
    print(best.text())
    if not best.fits:
        parts = best.memory
        over, most = parts.total / GIB - gpu.gib, parts.NAMES[parts.largest]
        print(
            f"no layout fits; the smallest is {over:.1f} GiB over, most of it {most} "
            f"({getattr(parts, parts.largest) / GIB:.1f} GiB). What would fit:"
        )
        print("\n".join(f"  {remedy}" for remedy in advice or ["nothing that was tried"]))
    elif options.all:
        print(f"all {len(fitting)} layouts that fit, the best first:")
        for one in fitting:
            print(f"  {one.short():<48}{one.memory.total / GIB:7.1f} GiB{one.hours:10.1f} h")
    return 0 if best.fits else 1


def _model(options: PlanOptions):
    from megatron_longrope.plan.model import Model, find_model

    if options.model is not None:
        return find_model(options.model)
    from megatron_longrope.checkpoint.opening import open_checkpoint

    return Model.from_shape(open_checkpoint(options.load, options.hf, sliding_window="drop").shape)
