"""Print what the trainings, searches and evaluations of a recipe would take: memory, FLOPs, hours.

    make plan RECIPE=llama2_7b
    snakemake -s examples/llama3_8b/Snakefile --cores 1 plan

Asks Snakemake for the commands of all rules and puts the flags of each `longrope pretrain`,
`longrope search` and `longrope eval` through the arithmetic of `longrope plan` and `longrope search
--dry-run`. Nothing runs, and the inputs need not exist.
"""

import argparse
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_longrope.cli import build_parser
from megatron_longrope.cli.flags import read_flags
from megatron_longrope.factor_search.options import SearchOptions
from megatron_longrope.plan import plan_command
from megatron_longrope.plan.flags import parse
from megatron_longrope.plan.hardware import GIB, parse_gpu
from megatron_longrope.plan.search_cost import SearchCost, estimate_command
from megatron_longrope.progress import format_duration

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

HEADER = ("rule", "GPU memory", "fits", "FLOP", "time", "")


@dataclass(frozen=True)
class Command:
    """A `longrope` command of a rule."""

    rule: str
    """Its name, with its wildcards."""
    gpus: int
    """GPUs it runs on."""
    words: tuple[str, ...]
    """`longrope`, the subcommand, its flags."""

    @functools.cached_property
    def args(self) -> argparse.Namespace:
        """Return the flags as `longrope` reads them; `pretrain` hands its own to Megatron."""
        return _parser().parse_args(self.words[1:])


@functools.cache
def _parser() -> argparse.ArgumentParser:
    return build_parser()


def commands_of(listing: str, nodes: int) -> Iterator[Command]:
    """Read the `longrope` commands that `snakemake --dry-run --printshellcmds` lists.

    Lines are `[TRAINED ||] [on_gpus N] longrope COMMAND FLAGS`.
    """
    rule = ""
    for line in listing.splitlines():
        if found := re.match(r"(?:local)?rule (\w+):$", line):
            rule = found[1]
        elif found := re.match(r"    wildcards: (.*)$", line):
            rule += " " + ", ".join(re.findall(r"=([^,]+)", found[1]))
        elif found := re.match(r" +(?:.* \|\| +)?(?:on_gpus (\d+) )?(longrope .*)$", line):
            gpus = int(found[1] or 0) * nodes
            yield Command(rule, max(gpus, 1), tuple(shlex.split(found[2])))


def list_commands(snakefile: str, config: dict[str, Any]) -> list[Command]:
    """Ask Snakemake for the commands of all rules.

    Args:
        snakefile (str): The recipe's Snakefile.
        config (dict): Its whole configuration.

    Raises:
        ValueError: Snakemake refuses the recipe.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        # What stands in for missing inputs lies here, see common.smk; in an empty folder everything
        # is still to be done.
        missing = f"{folder}/missing"
        planning = {"missing": missing}
        if "output" in config:  # else the Snakefile's own
            planning["output"] = config["output"]
        path.write_text(json.dumps(config | {"output": f"{folder}/output", "planning": planning}))
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "-s", snakefile, "--configfile", str(path),
             "--dry-run", "--printshellcmds", "--cores", "1", "--nocolor"],
            capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise ValueError(f"Snakemake refuses {snakefile}:\n{done.stdout}{done.stderr}")
    listing = (done.stdout + done.stderr).replace(missing, "")
    found = set(commands_of(listing, config.get("nodes", 1)))
    return sorted(found, key=lambda command: command.rule)


def plan_table(commands: Sequence[Command], gpu: str) -> str:
    """Estimate every training, search and evaluation, and their sum.

    Args:
        commands (Sequence[Command]): Of all rules.
        gpu (str): See :func:`megatron_longrope.plan.hardware.parse_gpu`.

    Raises:
        ValueError: The GPU is unknown.
    """
    parse_gpu(gpu)
    rows, hours, flops = [HEADER], 0.0, 0.0
    for command in commands:
        if estimate := ESTIMATES.get(command.words[1]):
            try:
                cost = estimate(command, gpu, commands)
            except ValueError as error:
                rows.append((command.rule, "", "", "", "", f"not estimated: {error}"))
                continue
            rows.append((command.rule, *cost.cells()))
            hours, flops = hours + cost.hours, flops + cost.flops
    # The rules take all GPUs, so one after the other.
    rows.append(("all of these", "", "", f"{flops:.1e}", format_duration(3600 * hours), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


@dataclass(frozen=True)
class Cost:
    """What a command takes."""

    peak_bytes: int
    """Per GPU at the worst moment."""
    fits: bool
    """Whether a GPU has them."""
    flops: float
    """Of the command."""
    hours: float
    """Of the command."""
    note: str
    """What it was computed with."""

    def cells(self) -> tuple[str, ...]:
        """Texts of a row of the table."""
        time = format_duration(3600 * self.hours)
        fits = "yes" if self.fits else "NO"
        return f"{self.peak_bytes / GIB:.1f} GiB", fits, f"{self.flops:.1e}", time, self.note


def _training(command: Command, gpu: str, commands: Sequence[Command]) -> Cost:
    found = plan_command(command.words, gpu, command.gpus)
    return Cost(found.memory.total, found.fits, found.flops, found.hours, found.short())


def _search(command: Command, gpu: str, commands: Sequence[Command]) -> Cost:
    args = read_flags(SearchOptions, command.args)
    sizes = args.parameters()
    evaluations = sizes.max_evaluations if args.algorithm == "cma" else sizes.total_evaluations
    if args.max_evaluations is not None:
        evaluations = min(evaluations, args.max_evaluations)
    _ranks(command, args)
    found = estimate_command(
        args,
        _shape(commands),
        samples=args.num_samples * args.windows_per_document,
        evaluations=evaluations,
        gpus=command.gpus,
        gpu=parse_gpu(gpu),
    )
    note = f"{evaluations} evaluations, replicas: {found.replicas}"
    return Cost(found.peak_bytes, found.fits, found.search_flops, found.hours, note)


def _evaluation(command: Command, gpu: str, commands: Sequence[Command]) -> Cost:
    """One forward pass of each model under its factors for each document or prompt of a length."""
    args, kind = command.args, command.words[2]
    methods = 0
    if kind == "ppl" and args.stride is None:
        forwards = args.random_windows or args.num_documents
        methods = len(args.baselines) * len(args.attention_factor_policy or [None])
    elif kind == "passkey" and args.scoring == "teacher-forced":
        forwards = args.trials * len(args.depths)
    elif kind == "needle":
        forwards = args.trials * len(args.depths) * len(args.tasks)
    else:
        raise ValueError(f"what `eval {kind}` takes follows from its data")
    # Without files and methods a model is measured under its own factors.
    forwards *= len((*args.load, *args.hf)) * (len(args.longrope_config) + methods or 1)
    found = [
        SearchCost(
            _shape(commands),
            target_length=length,
            samples=1,
            evaluations=forwards,
            gpu=parse_gpu(gpu),
            tensor_parallel=args.tensor_model_parallel_size,
            context_parallel=args.context_parallel_size,
            replicas=command.gpus // _ranks(command, args),
            dtype=args.dtype or _shape(commands).params_dtype,
        )
        for length in args.lengths
    ]
    return Cost(
        max(cost.peak_bytes for cost in found),
        all(cost.fits for cost in found),
        sum(cost.search_flops for cost in found),
        sum(cost.hours for cost in found),
        f"{forwards * len(found)} forward passes, replicas: {found[0].replicas}",
    )


ESTIMATES = {"pretrain": _training, "search": _search, "eval": _evaluation}
"""Of a subcommand: (command, GPU, all commands) -> cost. Raises ValueError where it cannot tell."""


def _ranks(command: Command, sizes: Any) -> int:
    """GPUs of one copy of the model."""
    ranks = sizes.tensor_model_parallel_size * sizes.context_parallel_size
    if command.gpus % ranks:
        raise ValueError(f"{command.gpus} GPUs are no multiple of its TP x CP = {ranks}")
    return ranks


def _shape(commands: Sequence[Command]) -> SimpleNamespace:
    """The model's shape, from the flags of a training: its checkpoint need not be there yet."""
    for command in commands:
        if command.words[1] == "pretrain":
            model, training, _ = parse(command.words, command.gpus)
            shape = {field.name: getattr(model, field.name) for field in fields(model)}
            return SimpleNamespace(
                **shape,
                hybrid_layer_pattern=model.hybrid_layer_pattern,
                rotary_dim=model.rotary_dim,
                padded_vocab_size=model.rows(),
                params_dtype=_DTYPES[training.precision],
            )
    raise ValueError("no training's flags say the model's shape")


def main() -> None:
    """Print the table of one recipe."""
    snakefile, config = sys.argv[1], json.loads(sys.argv[2])
    gpu = config.get("gpu", "h100")
    commands = list_commands(snakefile, config)
    print(f"{max(command.gpus for command in commands)} x {gpu} for every job on GPUs\n")
    print(plan_table(commands, gpu))


if __name__ == "__main__":
    os.environ.pop("SNAKEMAKE_PROFILE", None)  # the one of the outer Snakemake must not count
    try:
        main()
    except ValueError as error:
        sys.exit(f"plan: error: {error}")
