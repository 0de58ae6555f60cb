"""Write factor files with sorted random factors: what claim 2 compares the seeds with.

python examples/claims/random_factors.py --like factors/pi_8x.json --output a.json b.json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def write_random(like: Path, output: list[Path]) -> None:
    """Write factor files with sorted random factors up to those of `like`."""
    config = json.loads(like.read_text())
    longest = config["factor_sets"][-1]
    known = longest["rescale_factors"]
    for number, path in enumerate(output):
        chance = random.Random(number)
        drawn = sorted(chance.uniform(1, max(known)) for _ in known)
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
