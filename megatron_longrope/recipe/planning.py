"""What `longrope recipe plan` shows: memory, FLOPs and hours of each training and each search."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

from megatron_longrope.plan.hardware import GIB, parse_gpu
from megatron_longrope.progress import format_duration
from megatron_longrope.recipe.commands import PROCESS
from megatron_longrope.recipe.document import Recipe, Stage

_HEADER = ("stage", "GPU memory", "fits", "FLOP", "time", "")


@dataclass(frozen=True)
class Hardware:
    """The GPUs of every job."""

    gpu: str
    """See :func:`megatron_longrope.plan.hardware.parse_gpu`."""

    gpus: int
    """GPUs of a job."""

    memory: float | None
    """GiB of a GPU; None for what it has."""

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, gpu: str | None, gpus: int | None, memory: float | None
    ) -> Hardware:
        """The flags, else the recipe's `plan`, else 8 GPUs of type h100.

        Raises:
            ValueError: A number of the recipe is none.
        """
        given = recipe.plan
        try:
            return cls(
                gpu or given.get("gpu", "h100"),
                gpus if gpus is not None else int(given.get("gpus", "8")),
                memory if memory is not None or "memory" not in given else float(given["memory"]),
            )
        except ValueError:
            raise ValueError(
                f"{recipe.path}: plan holds {dict(given)}; gpus is a whole number and memory the "
                "GiB of a GPU"
            ) from None


def plan_table(recipe: Recipe, hardware: Hardware) -> str:
    """The costs as a table for people.

    Raises:
        ValueError: The GPU is unknown.
    """
    parse_gpu(hardware.gpu)
    rows = [_HEADER]
    for stage in recipe.stages:
        for command in stage.commands:
            kind = command.words[:2]
            ours = replace(hardware, gpus=1) if command.launcher == PROCESS.name else hardware
            if kind == ("longrope", "pretrain"):
                rows.append(_row(stage, _training, command.words, ours))
            elif kind == ("longrope", "search"):
                rows.append(_row(stage, _search, command.words, ours, recipe, hardware.gpus))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(
        [
            f"{hardware.gpus} x {hardware.gpu} for every launched job, one for a plain process",
            "",
            *lines,
        ]
    )


def _row(stage: Stage, estimate: Any, *arguments: Any) -> tuple[str, ...]:
    try:
        return (stage.name, *estimate(*arguments))
    except ValueError as error:
        return (stage.name, "", "", "", "", f"not estimated: {error}")


def _training(words: Sequence[str], hardware: Hardware) -> tuple[str, ...]:
    from megatron_longrope.plan import plan_command

    found = plan_command(words, hardware.gpu, hardware.gpus, hardware.memory)
    return _cells(found.memory.total, found.fits, found.flops, found.hours, found.short())


def _search(
    words: Sequence[str], hardware: Hardware, recipe: Recipe, training_gpus: int
) -> tuple[str, ...]:
    from megatron_longrope.cli import build_parser
    from megatron_longrope.cli.search import parameters
    from megatron_longrope.plan.estimate import with_memory
    from megatron_longrope.search.cost import estimate_command

    try:
        args = build_parser().parse_args(words[1:])
    except SystemExit:  # argparse has said what is wrong
        raise ValueError("its flags are not those of longrope search; see above") from None
    shape, source = _shape(args, recipe, training_gpus)
    sizes = parameters(args)
    evaluations = sizes.max_evaluations if args.algorithm == "cma" else sizes.total_evaluations
    if args.max_evaluations is not None:
        evaluations = min(evaluations, args.max_evaluations)
    ranks = args.tensor_model_parallel_size * args.context_parallel_size
    samples = args.num_samples * args.windows_per_document
    gpu = with_memory(parse_gpu(hardware.gpu), hardware.memory)
    if hardware.gpus % ranks:
        raise ValueError(f"{hardware.gpus} GPUs are no multiple of its TP x CP = {ranks}")
    found = estimate_command(
        args, shape, samples=samples, evaluations=evaluations, gpus=hardware.gpus, gpu=gpu
    )
    note = f"{evaluations} evaluations, replicas: {found.replicas}; {source}"
    return _cells(found.peak_bytes, found.fits, found.search_flops, found.hours, note)


def _cells(size: int, fits: bool, flops: float, hours: float, note: str) -> tuple[str, ...]:
    return (
        f"{size / GIB:.1f} GiB",
        "yes" if fits else "NO",
        f"{flops:.1e}",
        format_duration(3600 * hours),
        note,
    )


def _shape(args: Any, recipe: Recipe, gpus: int) -> tuple[Any, str]:
    """The searched model's shape, from its files or else from a training of the recipe."""
    from megatron_longrope.plan.flags import parse

    path = args.load or args.hf
    if os.path.exists(path):
        from megatron_longrope.conversion.hf_checkpoint import open_checkpoint

        return open_checkpoint(args.load, args.hf, args.iteration).shape, f"model of {path}"
    for stage in recipe.stages:
        for command in stage.commands:
            if command.words[:2] == ("longrope", "pretrain"):
                model, _, _ = parse(command.words, gpus)
                shape = {field.name: getattr(model, field.name) for field in fields(model)}
                shape |= {"rotary_dim": model.rotary_dim, "padded_vocab_size": model.rows()}
                return SimpleNamespace(**shape), f"model of {stage.name}'s flags"
    raise ValueError(f"{path} is not there yet, and no stage's flags say the model's shape")
