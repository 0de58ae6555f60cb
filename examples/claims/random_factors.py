"""Write factor files with sorted random factors: what claim 2 compares the seeds with.

python examples/claims/random_factors.py --like factors/ppl_8x_0.json --output a.json b.json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def write_random(like: Path, output: list[Path]) -> None:
    """Write factor files as `like` with sorted random factors, from the whole space of a search."""
    config = json.loads(like.read_text())
    longest = config["factor_sets"][-1]
    # The bound of a first search; the attention factor is that of the searched file.
    bound = 1.25 * longest["max_length"] / config["original_max_position_embeddings"]
    for number, path in enumerate(output):
        chance = random.Random(number)
        drawn = sorted(chance.uniform(1, bound) for _ in longest["rescale_factors"])
        longest |= {"rescale_factors": drawn, "origin": {"method": "random", "seed": number}}
        path.write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", type=Path, required=True, help="a factor file of the same model")
    parser.add_argument("--output", type=Path, required=True, nargs="+", help="seeds 0, 1, ...")
    args = parser.parse_args()
    write_random(args.like, args.output)


if __name__ == "__main__":
    main()
