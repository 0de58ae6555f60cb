"""`longrope eval`: perplexity, passkey, needles and short benchmarks of models under factors."""

from __future__ import annotations

import argparse
import importlib

from megatron_longrope.cli import options

_KINDS = ("ppl", "passkey", "needle", "short")


def add_parser(commands) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "eval", help="measure perplexity, passkey, needles or short benchmarks"
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name in _KINDS:
        importlib.import_module(f"megatron_longrope.cli.eval_{name}").add_parser(kinds)


def add_common(parser: argparse.ArgumentParser, *, lengths: bool = True) -> None:
    """Flags that all kinds share: models, factors, lengths, output and the limit."""
    options.add_model(parser, several=True)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--longrope-config",
        action="append",
        default=[],
        metavar="[LABEL=]F.json",
        help="factor file, for every model; may be given several times (default: each model's own "
        "factors)",
    )
    if lengths:
        group.add_argument(
            "--lengths",
            required=True,
            type=options.lengths,
            metavar="LIST",
            help="4k,8k,... tokens (1k = 1024)",
        )
    group.add_argument("--output", required=True, metavar="DIR", help="directory for the results")
    group.add_argument(
        "--max-hours",
        type=_hours,
        default=12.0,
        metavar="H",
        help="ask, or refuse where nobody can answer, when more hours are expected (default: 12)",
    )
    group.add_argument("--yes", action="store_true", help="go on whatever it is expected to take")


def open_subjects(args: argparse.Namespace, lengths: list[int] | None = None):
    """The models, each under every factor file or its own factors; no weight is loaded.

    Args:
        lengths (list[int], optional): To be measured, in tokens; the factors must cover them.

    Returns:
        tuple[list[Model], list[Subject]]: Models, and subjects model by model.
    """
    from megatron_longrope.evaluation.subjects import open_models, subjects_of

    models = open_models(args.load, args.hf, args.iteration, args.sliding_window)
    subjects = [item for model in models for item in subjects_of(model, args.longrope_config)]
    for subject in subjects:
        if lengths:
            subject.check_lengths(lengths)
    return models, subjects


def open_session(args: argparse.Namespace, name: str, unit: str):
    """What measures and records the cells of this command.

    Args:
        name (str): Of the kind; `name`.jsonl in the output directory holds its records.
        unit (str): Name of a forward pass.
    """
    import os
    from pathlib import Path

    from megatron_longrope.engine import process_groups
    from megatron_longrope.evaluation.kinds import KINDS
    from megatron_longrope.evaluation.records import Records
    from megatron_longrope.evaluation.session import Limit, Session

    if "RANK" in os.environ:
        process_groups.initialize(
            args.tensor_model_parallel_size, args.context_parallel_size, replicas=True
        )
    return Session(
        Records(Path(args.output) / f"{name}.jsonl", KINDS[name].cell_fields),
        lambda model: options.load_engine_from(args, model.checkpoint, replicas=True),
        Limit(args.max_hours, args.yes),
        name,
        unit,
    )


def add_trials(group, what: str, *, depths: str) -> None:
    """Flags of retrieval tasks.

    Args:
        what (str): What there are so many trials of.
        depths (str): Default of --depths.
    """
    group.add_argument(
        "--depths",
        type=_depths,
        default=depths,
        metavar="D",
        help="where the number is hidden: how many depths, evenly from 0 to 1; or a list such as "
        f"0,0.5,1; or, for passkey, `random` as in the paper's code (default: {depths})",
    )
    group.add_argument(
        "--trials", type=int, default=10, metavar="K", help=f"trials {what} (default: 10)"
    )
    group.add_argument("--seed", type=int, default=42, help="of keys and places (default: 42)")


def check_trials(args: argparse.Namespace) -> None:
    """Refuse values that :func:`add_trials` cannot.

    Raises:
        ValueError: No trial, or a negative seed.
    """
    if args.trials < 1:
        raise ValueError(f"--trials {args.trials} must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be at least 0")


def add_tokenizer(group) -> None:
    """Flags of the tokenizer of a text or prompt."""
    group.add_argument(
        "--tokenizer",
        metavar="T",
        help="the models' tokenizer, a sentencepiece .model file or a Hugging Face folder "
        "(default: of --hf)",
    )
    options.add_bos(group)


def tokenizer_path(args: argparse.Namespace) -> str:
    """The tokenizer given, else that of the only model when it is a Hugging Face folder.

    Raises:
        ValueError: Neither.
    """
    if (path := own_tokenizer_path(args)) is None:
        raise ValueError(
            "prompts need a tokenizer: give the models' own with --tokenizer (a sentencepiece "
            ".model file or a Hugging Face folder); models with different ones need a command each"
        )
    return path


def own_tokenizer_path(args: argparse.Namespace) -> str | None:
    """As :func:`tokenizer_path`, but None where there is neither."""
    from megatron_longrope.evaluation.subjects import labelled

    if args.tokenizer is None and len(args.hf) == 1 and not args.load:
        return labelled(args.hf)[0][1]
    return args.tokenizer


def _hours(text: str) -> float:
    """argparse type: more than none."""
    hours = float(text)
    if not hours > 0:
        raise argparse.ArgumentTypeError(f"{text} hours must be above 0")
    return hours


def _depths(text: str) -> list[float | None]:
    """argparse type: `random` is [None], `3` is [0, 0.5, 1]."""
    if text == "random":
        return [None]
    try:
        if text.isascii() and text.isdigit() and int(text) > 1:
            return [index / (int(text) - 1) for index in range(int(text))]
        depths = [float(part) for part in text.split(",")]
    except ValueError:
        depths = [-1.0]
    if not all(0 <= depth <= 1 for depth in depths) or len(set(depths)) < len(depths):
        raise argparse.ArgumentTypeError(
            f"depths {text!r}: give how many, at least 2, or a list of different numbers from 0 to "
            "1 such as 0,0.5,1, or random"
        )
    return depths
