"""`longrope pretrain`: any unmodified Megatron pretrain script with the plugin."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any, about: str | None = None) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "pretrain",
        help=about,
        usage="longrope pretrain SCRIPT [--cpu] <the script's Megatron flags> [--longrope-...]",
        description="Run a Megatron pretrain script with the --longrope-* flags added. Under "
        "torchrun: torchrun ... -m megatron_longrope pretrain SCRIPT ...",
    )
    parser.add_argument("script", help="path of the pretrain script, for example pretrain_gpt.py")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        help="the script's own flags; --cpu among them hosts Megatron's training loop on the CPU "
        "(gloo, fp32) and replaces flags that need CUDA",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from megatron_longrope.integration.launcher import launch

    arguments = [item for item in args.arguments if item != "--cpu"]
    launch(args.script, arguments, cpu=len(arguments) < len(args.arguments))
