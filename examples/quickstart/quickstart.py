"""Extend a small, real Megatron model from 256 to 8192 tokens, end to end, on a laptop.

    make quickstart                      # or: python examples/quickstart/quickstart.py
    python examples/quickstart/quickstart.py --smoke    # the same walk with hardly any work

Runs recipe.yaml on the CPU, or on two GPUs where they are. An interrupted run goes on where it
stopped. Results: results.json, report.html and logs/ in the output directory.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from megatron_longrope.recipe.document import Recipe
from megatron_longrope.recipe.runner import run_recipe

RECIPE = Path(os.path.relpath(Path(__file__).parent)) / "recipe.yaml"


def main() -> int:
    """Run the recipe; 0 when everything was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="the same walk with hardly any work")
    args = parser.parse_args()
    # Its fine-tuning is context parallel over two processes.
    profiles = ["gpu"] if torch.cuda.device_count() >= 2 else []
    profiles += ["smoke"] if args.smoke else []
    seeds = {"seed": str(args.seed), "training_seed": str(args.seed + 1)}
    try:
        return run_recipe(Recipe.load(RECIPE, profiles, seeds, args.output))
    except ValueError as error:
        sys.exit(f"quickstart: {error}")


if __name__ == "__main__":
    sys.exit(main())
