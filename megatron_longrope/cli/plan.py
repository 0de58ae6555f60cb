"""`longrope plan`: does a fine-tuning run fit, in which layout, and how long does it take?"""

from __future__ import annotations

import argparse

from megatron_longrope.cli import options
from megatron_longrope.errors import LongRopeError

_SIZES = {
    "tensor": "tensor-model-parallel-size",
    "context": "context-parallel-size",
    "pipeline": "pipeline-model-parallel-size",
    "expert": "expert-model-parallel-size",
}


def add_parser(commands) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="memory, hours and Megatron flags of a fine-tuning run",
        description="Memory per GPU, operations and hours of fine-tuning at a length, and the "
        "parallel sizes and recomputation to run it with, as flags to paste. Exits with 1 when it "
        "does not fit, and says what would.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="NAME", help="llama2-7b, llama3-8b, mistral-7b, ...")
    model.add_argument("--load", metavar="CKPT", help="Megatron checkpoint: its --save directory")
    model.add_argument("--hf", metavar="DIR", help="local Hugging Face folder")
    parser.add_argument(
        "--length", required=True, type=options.length, metavar="N", help="tokens of a sequence"
    )
    parser.add_argument("--global-batch-size", type=int, default=32, metavar="B", help="default 32")
    parser.add_argument("--steps", type=int, default=600, metavar="K", help="default: 600")
    parser.add_argument(
        "--chunked-loss",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --longrope-chunked-loss (default), or with the logits of all tokens at once",
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--gpus", required=True, type=int, metavar="G", help="GPUs of the run")
    cluster.add_argument(
        "--gpu", default="h100", metavar="NAME", help="a100-80, h100, ... or TFLOPS:GIB"
    )
    cluster.add_argument("--memory", type=float, metavar="GIB", help="of a GPU (default: its own)")
    cluster.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default: 8")
    cluster.add_argument(
        "--mfu",
        type=float,
        metavar="U",
        help="part of the peak that all operations run at (default: measured by others, by GPU)",
    )
    layout = parser.add_argument_group("layout", "what is given is not chosen")
    for name, flag in _SIZES.items():
        layout.add_argument(f"--{flag}", dest=name, type=int, metavar="N")
    layout.add_argument("--recompute", choices=("none", "mlp", "full"), help="mlp: experts, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--all", action="store_true", help="list every layout that fits, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import json

    from megatron_longrope.plan import Cluster, Training, rank, remedies
    from megatron_longrope.plan.estimate import with_memory
    from megatron_longrope.plan.flags import DEFAULT_CHUNK
    from megatron_longrope.plan.hardware import parse_gpu
    from megatron_longrope.plan.layouts import FULL

    _check_positive(args)
    model = _model(args)
    chunk = DEFAULT_CHUNK if args.chunked_loss else None
    training = Training(args.length, args.global_batch_size, args.steps, chunk)
    gpu = with_memory(parse_gpu(args.gpu), args.memory)
    cluster = Cluster(gpu, args.gpus, args.gpus_per_node, args.mfu)
    fixed = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    if args.recompute is not None:
        kinds = {"none": (), "mlp": (model.mlp_module,), "full": FULL}
        fixed["recompute"] = kinds[args.recompute]
    estimates = rank(model, training, cluster, fixed)
    best = estimates[0]
    others = [estimate for estimate in estimates if estimate.fits] if args.all else []
    advice = [] if best.fits else remedies(best, cluster, fixed)
    if args.json:
        answer = {**best.as_dict(), "would_fit": advice}
        if args.all:
            answer["all"] = [estimate.as_dict() for estimate in others]
        print(json.dumps(answer, indent=2))
    else:
        print("\n".join(_lines(best, others, advice)))
    return 0 if best.fits else 1


def _check_positive(args: argparse.Namespace) -> None:
    names = ["gpus", "gpus_per_node", "global_batch_size", "steps"]
    flags = {name: "--" + name.replace("_", "-") for name in names}
    flags |= {name: f"--{flag}" for name, flag in _SIZES.items()}
    for name, flag in flags.items():
        value = getattr(args, name)
        if value is not None and value < 1:
            raise LongRopeError(f"{flag} is {value}; give 1 or more")


def _model(args: argparse.Namespace):
    from megatron_longrope.plan.model import Model, find_model

    if args.model is not None:
        return find_model(args.model)
    from megatron_longrope.conversion.hf_checkpoint import open_checkpoint

    return Model.from_shape(open_checkpoint(args.load, args.hf, sliding_window="drop").shape)


def _lines(best, others, advice: list[str]) -> list[str]:
    from megatron_longrope.plan.hardware import GIB

    lines = [best.text()]
    if best.fits:
        lines += ["flags:"]
        lines += [f"  {' '.join(flag.words):<46}# {flag.reason}" for flag in best.flags()]
    else:
        parts = best.memory
        over = parts.total / GIB - best.gpu.gib
        lines.append(
            f"no layout fits; the smallest is {over:.1f} GiB over, most of it {parts.largest} "
            f"({getattr(parts, parts.largest) / GIB:.1f} GiB). What would fit:"
        )
        lines += [f"  {remedy}" for remedy in advice or ["nothing that was tried"]]
    if others:
        lines.append(f"all {len(others)} layouts that fit, the best first:")
        lines += [
            f"  {other.short():<48}{other.memory.total / GIB:7.1f} GiB{other.hours:10.1f} h"
            for other in others
        ]
    return lines
