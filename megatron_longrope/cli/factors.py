"""`longrope factors`: read, write, compare and join factor files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_longrope.cli import options
from megatron_longrope.errors import LongRopeError

_FILE = "F.json, or published:NAME"


def add_parser(commands: Any) -> None:
    """Register the command and its actions."""
    parser = commands.add_parser(
        "factors",
        help="show, import, export, compare, sort or merge factor files",
        description="Look into factor files (--longrope-config), and exchange them with others. "
        "published:NAME is a file that comes with this package; `factors list` names them.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_show(actions)
    _add_list(actions)
    _add_import(actions)
    _add_export(actions)
    _add_diff(actions)
    _add_sort(actions)
    _add_merge(actions)


def _add_show(actions: Any) -> None:
    show = actions.add_parser("show", help="windows, factors and where they come from")
    show.add_argument("files", nargs="+", metavar="FILE", help=_FILE)
    show.add_argument("--all", action="store_true", help="every factor (default: three of each)")
    show.add_argument("--json", action="store_true", help="as JSON, a list of files")
    show.set_defaults(run=_run_show)


def _run_show(args: argparse.Namespace) -> None:
    from megatron_longrope.config import LongRopeConfig

    configs = {path: LongRopeConfig.load(path) for path in args.files}
    if args.json:
        print(json.dumps([_as_json(*item, args.all) for item in configs.items()], indent=2))
        return
    for path, config in configs.items():
        print(
            f"{path}: rotary base {config.rotary_base:g}, {config.rotary_dim} rotated dimensions, "
            f"original window {config.original_max_position_embeddings}"
        )
        print(f"{'window':>9} {'attention':>10} {'start':>6} {'factors':>23}  origin")
        for item in config.factor_sets:
            shown = " ".join(f"{value:7.4g}" for value in _three(item.rescale_factors))
            print(
                f"{item.max_length:9} {config.attention_factor_for(item.max_length):10.6g} "
                f"{item.num_start_tokens:6} {shown}  {_origin(item.origin)}"
            )
            if args.all:
                print(f"  {' '.join(map(repr, item.rescale_factors))}")
    if not args.all:
        print("factors: of the fastest, the middle and the slowest dimension")


def _three(factors: tuple[float, ...]) -> tuple[float, ...]:
    return factors[0], factors[len(factors) // 2], factors[-1]


def _as_json(path: str, config: Any, everything: bool) -> dict[str, Any]:
    """The file's content with each window's attention factor; without --all, three factors."""
    value = {"file": path, **config.to_dict()}
    for item, shown in zip(config.factor_sets, value["factor_sets"], strict=True):
        shown["attention_factor"] = config.attention_factor_for(item.max_length)
        if not everything:
            shown["rescale_factors"] = list(_three(item.rescale_factors))
    return value


def _origin(origin: dict[str, Any]) -> str:
    """How a set was found, in a few words."""
    if "stage" not in origin:
        words = [origin.get("method", origin.get("source")), origin.get("model")]
        return ", ".join(str(word) for word in words if word) or "-"
    found = f"{origin['stage']} search"
    if "search_perplexity" in origin:
        found += f", perplexity {origin['search_perplexity']:.6g}"
    return f"{found} ({origin['method']})" if "method" in origin else found


def _add_list(actions: Any) -> None:
    parser = actions.add_parser("list", help="names, models and licences of published factors")
    parser.set_defaults(run=_run_list)


def _run_list(args: argparse.Namespace) -> None:
    import warnings

    from megatron_longrope import published
    from megatron_longrope.config import LongRopeConfig

    for name in published.names():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # using unusual factors warns; listing them need not
            config = LongRopeConfig.load(f"{published.PREFIX}{name}")
        origin = config.factor_sets[-1].origin
        windows = ", ".join(str(item.max_length) for item in config.factor_sets)
        print(f"{published.PREFIX}{name}: {origin['model']}, {origin['method']}, for {windows} "
              f"tokens ({origin['source']}; {origin['license']})")  # fmt: skip


def _add_import(actions: Any) -> None:
    parser = actions.add_parser(
        "import",
        help="from the authors' CSV, a config.json, or a list of numbers",
        description="Make a factor file from the CSV files of the LongRoPE authors, the "
        "config.json of a Hugging Face model, LongRoPE2's short and long lists, or a bare list of "
        "numbers. "
        "config.json states everything; the others need the geometry of their model, and a window "
        "each unless they are called like the authors' (4k_la2_256k.csv, ft_la2_256k.csv).",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="[WINDOW=]FILE", help="file, for windows of WINDOW tokens"
    )
    parser.add_argument("--output", required=True, metavar="F.json", help="file to write")
    parser.add_argument("--rotary-base", type=float, metavar="B", help="base of RoPE of the model")
    parser.add_argument(
        "--original-length", type=options.length, metavar="N", help="pre-trained window in tokens"
    )
    parser.add_argument(
        "--attention-factor", type=float, metavar="X",
        help="one value for every window (default: by the policy)",
    )  # fmt: skip
    parser.add_argument(
        "--attention-factor-policy", choices=("su", "yarn", "none"), default="su",
        help="of files other than config.json (default: su, the authors')",
    )  # fmt: skip
    parser.set_defaults(run=_run_import)


def _run_import(args: argparse.Namespace) -> None:
    from megatron_longrope.factor_files import Geometry, import_factors

    sources: list[tuple[str, int | None]] = []
    for source in args.sources:
        window, separator, path = source.rpartition("=")
        try:
            sources.append((path, options.length(window) if separator else None))
        except argparse.ArgumentTypeError as error:
            raise LongRopeError(f"{source}: {error}; write WINDOW=FILE") from None
    geometry = Geometry(
        args.rotary_base, args.original_length, args.attention_factor, args.attention_factor_policy
    )
    _write(import_factors(sources, geometry), args.output)


def _add_export(actions: Any) -> None:
    parser = actions.add_parser("export", help="for other tools: config.json fields, CSV or list")
    parser.add_argument("file", metavar="FILE", help=_FILE)
    parser.add_argument("--output", required=True, metavar="PATH", help="file to write")
    parser.add_argument(
        "--format", choices=("hf", "csv", "list"), default="hf",
        help="hf: fields for config.json; csv: as the authors' code reads; list: JSON "
        "(default: hf)",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=options.length, metavar="N",
        help="whose factors, hf: the long ones (default: the longest)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=int, default=32, metavar="N", help="rows of a CSV (default: 32)"
    )
    parser.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> None:
    from megatron_longrope.config import LongRopeConfig
    from megatron_longrope.factor_files import export_factors
    from megatron_longrope.files import write_text_atomic

    config = LongRopeConfig.load(args.file)
    write_text_atomic(args.output, export_factors(config, args.format, args.window, args.layers))
    print(f"wrote {args.output}")


def _add_diff(actions: Any) -> None:
    parser = actions.add_parser(
        "diff",
        help="how two files rotate differently",
        description="Say how two files rotate differently; origins do not count. Exit 1 when they "
        "do.",
    )
    parser.add_argument("files", nargs=2, metavar="FILE", help=_FILE)
    parser.set_defaults(run=_run_diff)


def _run_diff(args: argparse.Namespace) -> int:
    from megatron_longrope.config import LongRopeConfig
    from megatron_longrope.factor_files import differences

    first, second = map(LongRopeConfig.load, args.files)
    found = differences(first, second)
    print("\n".join(found) if found else "the files rotate alike")
    return 1 if found else 0


def _add_sort(actions: Any) -> None:
    parser = actions.add_parser(
        "sort",
        help="put the factors of every set in ascending order",
        description="Put the factors of every set in ascending order, as a search keeps them; "
        "published ones decrease here and there. This changes the model a little.",
    )
    parser.add_argument("file", metavar="FILE", help=_FILE)
    parser.add_argument("--output", required=True, metavar="F.json", help="file to write")
    parser.set_defaults(run=_run_sort)


def _run_sort(args: argparse.Namespace) -> None:
    from megatron_longrope.config import LongRopeConfig
    from megatron_longrope.factor_files import sorted_factors

    config, changed = sorted_factors(LongRopeConfig.load(args.file))
    _write(config, args.output)
    print(f"changed: {', '.join(map(str, changed)) or 'none'}")


def _add_merge(actions: Any) -> None:
    merge = actions.add_parser(
        "merge",
        help="one file with the factor sets of several",
        description="One file with the factor sets of several of one model, such as those of "
        "second searches to different windows. A sequence takes the smallest set that covers it.",
    )
    merge.add_argument("files", nargs="+", metavar="F.json")
    merge.add_argument("--output", required=True, metavar="F.json", help="file to write")
    merge.set_defaults(run=_run_merge)


def _run_merge(args: argparse.Namespace) -> None:
    from megatron_longrope.config import LongRopeConfig
    from megatron_longrope.merging import merge_configs

    _write(merge_configs({path: LongRopeConfig.load(path) for path in args.files}), args.output)


def _write(config: Any, output: str | Path) -> None:
    config.save(output)
    windows = ", ".join(str(item.max_length) for item in config.factor_sets)
    print(f"wrote {output}: factors for {windows} tokens")
