"""`python -m megatron_longrope ...`, the form that torchrun needs."""

import os
import signal
import sys

from megatron_longrope.cli import main


def run() -> int | str | None:
    """Run the command; what it refuses, agent.sh of examples/cluster is told not to start anew."""
    try:
        status: int | str | None = main()
    except SystemExit as stop:  # argparse's, Megatron's too
        status = stop.code
    if status == 2 and (agent := os.environ.get("LONGROPE_AGENT")):
        os.kill(int(agent), signal.SIGUSR2)
    return status


# The guard matters: Megatron's checkpoint writer spawns workers that import the main module again.
if __name__ == "__main__":
    sys.exit(run())
