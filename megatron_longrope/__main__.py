"""`python -m megatron_longrope ...`, the form that torchrun needs."""

import sys

from megatron_longrope.cli import main

# The guard matters: Megatron's checkpoint writer spawns workers that import the main module again.
if __name__ == "__main__":
    sys.exit(main())
