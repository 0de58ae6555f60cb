"""The `longrope` command: one thin module per subcommand, each with `add_parser` and `run`."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
import warnings

from megatron_longrope import __version__
from megatron_longrope.cli.flags import Parser
from megatron_longrope.errors import LongRopeError

# Modules are imported on start but keep torch and megatron imports inside `run`, so that --help and
# usage errors are instant.
_COMMANDS = (
    "pretrain",
    "search",
    "evaluate",
    "convert",
    "data",
    "factors",
    "plan",
    "report",
    "doctor",
)


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="longrope", description="Extend the context window of Megatron models with LongRoPE."
    )
    parser.add_argument("--version", action="version", version=f"longrope {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        importlib.import_module(f"megatron_longrope.cli.{name}").add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        int: 0 done; 1 done, and the answer is no (it does not fit, it differs); 2 refused, with one
            sentence; 130 interrupted; 141 nobody reads the output any more. Python itself exits
            with 1 and a traceback for all else.
    """
    args = build_parser().parse_args(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_agent()
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
    except KeyboardInterrupt:
        print("longrope: interrupted", file=sys.stderr)
        return 130
    except LongRopeError as error:
        if args.debug:
            raise
        print(f"longrope {args.command}: error: {error}", file=sys.stderr)
        return 2


def _end_with_agent() -> None:
    """Get SIGTERM when the torchrun agent is gone.

    After kill -9 of an agent its workers would keep the GPUs and go on writing.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _quiet_imports() -> None:
    """Megatron and torch announce at import which kernels they lack; scoring on SDPA needs none."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    for name in ("torch.utils.cpp_extension", "megatron.core.models.gpt.gpt_model"):
        logging.getLogger(name).setLevel(logging.ERROR)
