"""`longrope factors`: read, write, compare and join factor files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_longrope.cli.flags import add_command
from megatron_longrope.errors import LongRopeError
from megatron_longrope.lengths import parse_length
from megatron_longrope.methods import METHODS
from megatron_longrope.options import OneModel, Options, flag, parse_positive, refuse_idle

if TYPE_CHECKING:
    from megatron_longrope.config import LongRopeConfig


def _file(**how: Any) -> Any:
    words = "F.json, published:NAME, or a Megatron checkpoint or Hugging Face folder: its own"
    return flag(positional=True, metavar="FILE", help=words, **how)


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Options):
    """What `longrope factors show` is told."""

    files: tuple[str, ...] = _file(nargs="+")

    all: bool = flag(False)
    """every factor (default: three of each)"""
    json: bool = flag(False)
    """as JSON, a list of files"""


@dataclass(frozen=True, kw_only=True)
class _Output(Options):
    output: str = flag(metavar="F.json")
    """file to write"""
    overwrite: bool = flag(False)
    """replace an existing file"""


@dataclass(frozen=True, kw_only=True)
class _Sources(Options):
    sources: tuple[str, ...] = flag(positional=True, nargs="+", metavar="[WINDOW=]FILE")
    """file, for windows of WINDOW tokens"""


@dataclass(frozen=True, kw_only=True)
class ImportOptions(_Output, _Sources):
    """What `longrope factors import` is told."""

    rotary_base: float | None = flag(None, type=float, metavar="B")
    """base of RoPE of the model"""
    original_length: int | None = flag(None, type=parse_length, metavar="N")
    """pre-trained window in tokens"""
    attention_factor: float | None = flag(None, type=float, metavar="X")
    """one value for every window (default: by the policy)"""
    attention_factor_policy: str = flag("su", choices=("su", "yarn", "none"))
    """of files other than config.json (default: su, the authors')"""


@dataclass(frozen=True, kw_only=True)
class MakeOptions(OneModel, _Output):
    """What `longrope factors make` is told."""

    GROUP: ClassVar = None

    method: str = flag(positional=True, choices=tuple(METHODS), metavar="METHOD")
    """none, pi, ntk, yarn, dynamic-ntk or base-ntk"""
    target_length: int = flag(type=parse_length, metavar="N")
    """window in tokens"""
    original_length: int | None = flag(None, type=parse_length, metavar="N")
    """pre-trained window in tokens (default: the model's)"""
    attention_factor_policy: str | None = flag(None, choices=("su", "yarn", "none"))
    """attention factor of longer windows (default: the method's own, yarn for YaRN and none for the
    others)"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """What `longrope factors export` is told."""

    file: str = _file()

    output: str = flag(metavar="PATH")
    """file to write"""
    overwrite: bool = flag(False)
    """replace an existing file"""
    format: str = flag("hf", choices=("hf", "csv", "list", "json"))
    """hf: fields for config.json; csv: as the authors' code reads; list: numbers as JSON; json: a
    factor file"""
    window: int | None = flag(None, type=parse_length, metavar="N")
    """whose factors, hf: the long ones (default: the longest)"""
    layers: int = flag(32, type=parse_positive, metavar="N")
    """rows of a CSV"""

    def __post_init__(self) -> None:
        super().__post_init__()
        beside, layers = f"--format {self.format}", ExportOptions.layers
        refuse_idle(
            ("--window", beside, self.format == "json" and self.window is not None),
            ("--layers", beside, self.format != "csv" and self.layers != layers),
        )


@dataclass(frozen=True, kw_only=True)
class DiffOptions(Options):
    """What `longrope factors diff` is told."""

    files: tuple[str, ...] = _file(nargs=2)


@dataclass(frozen=True, kw_only=True)
class _Files(Options):
    files: tuple[str, ...] = flag(positional=True, nargs="+", metavar="F.json")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(_Output, _Files):
    """What `longrope factors merge` is told."""


def add_parser(commands: Any, about: str | None = None) -> None:
    """Register the command and its actions."""
    parser = commands.add_parser(
        "factors",
        help=about,
        description="Look into factor files (--longrope-config), and exchange them with others. "
        "published:NAME is a file that comes with this package; `factors list` names them.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, options, run, help, more in (
        ("show", ShowOptions, _run_show, "windows, factors and where they come from", None),
        ("list", Options, _run_list, "names, models and licences of published factors", None),
        (
            "import",
            ImportOptions,
            _run_import,
            "from the authors' CSV, a config.json, or a list of numbers",
            "Make a factor file from the CSV files of the LongRoPE authors, the config.json of a "
            "Hugging Face model, LongRoPE2's short and long lists, or a bare list of numbers. "
            "config.json states everything; the others need the geometry of their model, and a "
            "window each unless they are called like the authors' (4k_la2_256k.csv, "
            "ft_la2_256k.csv).",
        ),
        (
            "make",
            MakeOptions,
            _run_make,
            "of a published method, such as YaRN",
            "Make the factor file of a published method for a model, to evaluate or to train with "
            "it. On a model with factors the method's multiply those of its longest window. "
            "Transformers has the longer factors at all lengths: convert to-hf --short-length N.",
        ),
        (
            "export",
            ExportOptions,
            _run_export,
            "for other tools: config.json fields, CSV, list; or a model's own as a factor file",
            None,
        ),
        (
            "diff",
            DiffOptions,
            _run_diff,
            "how two files rotate differently",
            "Say how two files rotate differently; origins do not count. Exit 1 when they do.",
        ),
        (
            "merge",
            MergeOptions,
            _run_merge,
            "one file with the factor sets of several",
            "One file with the factor sets of several of one model, such as those of second "
            "searches to different windows. A sequence takes the smallest set that covers it.",
        ),
    ):
        add_command(actions, name, options, run, help=help, description=more)


def _load(path: str) -> LongRopeConfig:
    """Read a factor file, or the factors that a checkpoint or Hugging Face folder carries.

    Raises:
        LongRopeError: The model carries none.
    """
    from megatron_longrope.config import LongRopeConfig

    if not Path(path).is_dir():
        return LongRopeConfig.load(path)
    from megatron_longrope.checkpoint.opening import open_checkpoint

    folder = (Path(path) / "config.json").exists()
    # Its own factors are the same with and without its sliding window.
    opened = (None, path) if folder else (path, None)
    checkpoint = open_checkpoint(*opened, sliding_window="drop")
    if checkpoint.longrope is None:
        raise LongRopeError(
            f"{path} is a model with plain RoPE, which carries no factors; give a factor file, or "
            "make one: longrope factors make"
        )
    return checkpoint.longrope


def _run_show(options: ShowOptions) -> None:
    configs = {path: _load(path) for path in options.files}
    if options.json:
        print(json.dumps([_as_json(*item, options.all) for item in configs.items()], indent=2))
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
            if options.all:
                print(f"  {' '.join(map(repr, item.rescale_factors))}")
    if not options.all:
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
        objective = origin.get("objective", "ppl")
        score = "perplexity" if objective == "ppl" else f"score by {objective}"
        found += f", {score} {origin['search_perplexity']:.6g}"
    return f"{found} ({origin['method']})" if "method" in origin else found


def _run_list(options: Options) -> None:
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


def _run_import(options: ImportOptions) -> None:
    from megatron_longrope.factor_files import Geometry, import_factors

    sources: list[tuple[str, int | None]] = []
    for source in options.sources:
        window, _, path = source.partition("=")
        if not path or Path(source).exists():  # a path may have a = in it
            sources.append((source, None))
            continue
        try:
            sources.append((path, parse_length(window)))
        except ValueError as error:
            raise LongRopeError(f"{source}: {error}; write WINDOW=FILE") from None
    geometry = Geometry(
        options.rotary_base,
        options.original_length,
        options.attention_factor,
        options.attention_factor_policy,
    )
    _write(import_factors(sources, geometry), options)


def _run_make(options: MakeOptions) -> None:
    from megatron_longrope.baselines import extended_config
    from megatron_longrope.checkpoint.opening import model_config, open_checkpoint
    from megatron_longrope.methods import method

    checkpoint = open_checkpoint(options.load, options.hf, sliding_window="drop")  # as in _load
    base = model_config(checkpoint, options.original_length)
    if options.target_length <= base.max_length:
        raise LongRopeError(
            f"--target-length {options.target_length} is within the model's window of "
            f"{base.max_length} tokens, where nothing is to be rescaled; give a longer one"
        )
    plain = base.max_length == base.original_max_position_embeddings
    policy = options.attention_factor_policy or (method(options.method).policy if plain else None)
    _write(extended_config(options.method, base, options.target_length, policy), options)


def _run_export(options: ExportOptions) -> None:
    from megatron_longrope.checkpoint.hf.families import FAMILIES
    from megatron_longrope.conversion.rope_export import export_rope
    from megatron_longrope.factor_files import export_factors
    from megatron_longrope.files import refuse_existing, write_text_atomic

    config = _load(options.file)
    if options.format == "json":
        _write(config, options)
        return
    if options.format == "hf":
        window = options.window or config.max_length
        keys = export_rope(config, FAMILIES["llama"], target_length=window).keys
        text = json.dumps(keys, indent=2) + "\n"
    else:
        text = export_factors(config, options.format, options.window, options.layers)
    refuse_existing([Path(options.output)], options.overwrite)
    write_text_atomic(options.output, text)
    print(f"wrote {options.output}")


def _run_diff(options: DiffOptions) -> int:
    from megatron_longrope.factor_files import differences

    first, second = map(_load, options.files)
    found = differences(first, second)
    print("\n".join(found) if found else "the files rotate alike")
    return 1 if found else 0


def _run_merge(options: MergeOptions) -> None:
    from megatron_longrope.merging import merge_configs

    _write(merge_configs({path: _load(path) for path in options.files}), options)


def _write(config: LongRopeConfig, options: _Output | ExportOptions) -> None:
    from megatron_longrope.files import refuse_existing

    refuse_existing([Path(options.output)], options.overwrite)
    config.save(options.output)
    windows = ", ".join(str(item.max_length) for item in config.factor_sets)
    print(f"wrote {options.output}: factors for {windows} tokens")
