"""`longrope search`: find rescale factors for a longer (or, to recover, a short) window."""

from __future__ import annotations

import signal
import sys
from typing import Any

from megatron_longrope import api
from megatron_longrope.cli.flags import add_command
from megatron_longrope.factor_search.options import SearchOptions
from megatron_longrope.ranks import rank


def add_parser(commands: Any, about: str | None = None) -> None:
    """Register the subcommand."""
    add_command(
        commands,
        "search",
        SearchOptions,
        run,
        help=about,
        description="Search LongRoPE factors: a first search on a model with plain RoPE; on one "
        "with factors (its own, or --base-config) a second search beyond their window (factors "
        "multiply) or, for a length within it, a recovery search of that window. Under torchrun, "
        "ranks form replicas of TP x CP that score candidates in parallel.",
    )


def run(options: SearchOptions) -> int | None:
    """Run the command."""
    # So ends torchrun the other ranks when one dies, and a batch system a job at its time limit.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        api.search(options)
    except KeyboardInterrupt as stop:
        from megatron_longrope.factor_search.session import num_journaled

        if rank() == 0:
            reason = str(stop) or "Ctrl-C"
            print(
                f"longrope search: stopped by {reason}; {num_journaled(options.journal)} "
                f"evaluations are in {options.journal}: run the same command with --resume to go "
                "on",
                file=sys.stderr,
            )
        return 130
    return None


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt("SIGTERM (the job was cancelled, or another rank ended)")
