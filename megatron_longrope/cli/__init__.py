"""The `longrope` command: one thin module per subcommand, each with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from megatron_longrope import __version__
from megatron_longrope.cli.flags import Parser
from megatron_longrope.errors import LongRopeError
from megatron_longrope.ranks import end_with_parent

# Modules keep torch and megatron imports inside `run`, so that --help and usage errors are instant.
_COMMANDS = {
    "pretrain": "run an unmodified Megatron pretrain script with LongRoPE",
    "search": "search rescale factors for a target length",
    "eval": "measure perplexity, passkey, needles, RULER, benchmarks or any task",
    "convert": "Megatron checkpoint to Hugging Face folder and back",
    "data": "text to Megatron .bin/.idx: BOS/EOS segments for training, whole held-out documents",
    "factors": "show, make, import, export, compare or merge factor files",
    "plan": "memory, hours and Megatron flags of a fine-tuning run",
    "report": "one self-contained HTML page, PNG figures and CSV data of evaluations and searches",
    "doctor": "versions, kernels, and whether the plugin works with this Megatron",
}
_MODULES = {"eval": "evaluate"}


class _Completion(argparse.Action):
    """Print a completion script for a shell."""

    def __call__(self, _: Any, __: Any, shell: Any, ___: Any = None) -> None:
        import shtab

        print(shtab.complete(build_parser(), shell))
        raise SystemExit


def build_parser(words: Sequence[str] | None = None) -> Parser:
    """The command line.

    Args:
        words (Sequence[str], optional): What is to be parsed: the commands that it does not name
            are left without flags, whose making takes longer than all else of `--help`.
    """
    parser = Parser(
        prog="longrope", description="Extend the context window of Megatron models with LongRoPE."
    )
    parser.add_argument("--version", action="version", version=f"longrope {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes commands and flags, and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in _COMMANDS.items():
        if words is None or name in words:
            module = importlib.import_module(f"megatron_longrope.cli.{_MODULES.get(name, name)}")
            module.add_parser(commands, about)
        else:
            commands.add_parser(name, help=about)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        int: 0 done; 1 done, and the answer is no (it does not fit, it differs); 2 refused, with one
            sentence; 130 interrupted; 141 nobody reads the output any more. Python itself exits
            with 1 and a traceback for all else.
    """
    words = sys.argv[1:] if argv is None else argv
    args = build_parser(words).parse_args(words)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)
    if args.command != "pretrain" and not args.debug:
        _quiet_imports()
        warnings.formatwarning = lambda message, *_: (
            f"longrope {args.command}: warning: {message}\n"
        )
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `longrope plan ... | head`: the reader has all that it wanted
        # Python flushes once more as it ends, which would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as error:
        for note in getattr(error, "__notes__", ()):
            print(f"longrope {args.command}: {note}", file=sys.stderr)
        print("longrope: interrupted", file=sys.stderr)
        return 130
    except LongRopeError as error:
        if args.debug:
            raise
        print(f"longrope {args.command}: error: {error}", file=sys.stderr)
        return 2


def _quiet_imports() -> None:
    """Megatron and torch announce at import which kernels they lack; scoring on SDPA needs none."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # Python compiles a library at its first import where pip did not, and complains of its source.
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for name in ("torch.utils.cpp_extension", "megatron.core.models.gpt.gpt_model"):
        logging.getLogger(name).setLevel(logging.ERROR)
