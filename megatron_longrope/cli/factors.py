"""`longrope factors`: show and merge factor files."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Register the command and its actions."""
    parser = commands.add_parser(
        "factors",
        help="show factor files, or merge several into one",
        description="Look into factor files (--longrope-config), or merge several of one model.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    show = actions.add_parser("show", help="windows, factors and where they come from")
    show.add_argument("files", nargs="+", metavar="F.json")
    show.set_defaults(run=_run_show)

    merge = actions.add_parser(
        "merge",
        help="one file with the factor sets of several",
        description="One file with the factor sets of several of one model, such as those of "
        "second searches to different windows. A sequence takes the smallest set that covers it.",
    )
    merge.add_argument("files", nargs="+", metavar="F.json")
    merge.add_argument("--output", required=True, metavar="F.json", help="file to write")
    merge.set_defaults(run=_run_merge)


def _run_show(args: argparse.Namespace) -> None:
    from megatron_longrope.config import LongRopeConfig

    for path in args.files:
        config = LongRopeConfig.load(path)
        print(
            f"{path}: rotary base {config.rotary_base:g}, {config.rotary_dim} rotated dimensions, "
            f"original window {config.original_max_position_embeddings}"
        )
        print(f"{'window':>9} {'attention':>10} {'start':>6} {'factors':>23}  origin")
        for item in config.factor_sets:
            factors = item.rescale_factors
            middle = factors[len(factors) // 2]
            print(
                f"{item.max_length:9} {config.attention_factor_for(item.max_length):10.6g} "
                f"{item.num_start_tokens:6} {factors[0]:7.4g} {middle:7.4g} {factors[-1]:7.4g}  "
                f"{_origin(item.origin)}"
            )
    print("factors: of the fastest, the middle and the slowest dimension")


def _origin(origin: dict[str, Any]) -> str:
    """How a set was found, in a few words."""
    if "stage" not in origin:
        return str(origin.get("method", "-"))
    found = f"{origin['stage']} search"
    if "search_perplexity" in origin:
        found += f", perplexity {origin['search_perplexity']:.6g}"
    return f"{found} ({origin['method']})" if "method" in origin else found


def _run_merge(args: argparse.Namespace) -> None:
    from megatron_longrope.config import LongRopeConfig
    from megatron_longrope.merging import merge_configs

    merged = merge_configs({path: LongRopeConfig.load(path) for path in args.files})
    merged.save(args.output)
    windows = ", ".join(str(item.max_length) for item in merged.factor_sets)
    print(f"wrote {args.output}: factors for {windows} tokens")
