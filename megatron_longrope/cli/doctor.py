"""`longrope doctor`: would the plugin work here?"""

from __future__ import annotations

import argparse


def add_parser(commands) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="versions, kernels, and whether the hooks fit this Megatron",
        description="Exits with 1 when the plugin would not work.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import importlib.util
    import platform

    import torch

    from megatron_longrope import __version__
    from megatron_longrope.integration import compat

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    engine = compat.transformer_engine_version()
    flash = "installed" if importlib.util.find_spec("flash_attn") else "not installed"
    print(f"megatron_longrope   {__version__}")
    print(f"python              {platform.python_version()}")
    print(f"torch               {torch.__version__} (GPU: {cuda})")
    print(f"megatron-core       {compat.megatron_version()}")
    print(f"transformer-engine  {engine or 'not installed'}")
    print(f"flash-attn          {flash}")
    print(
        f"attention           {'te, or sdpa with --transformer-impl local' if engine else 'sdpa'}"
    )
    missing = 0
    for symbol in _symbols(compat):
        try:
            symbol.owner()
            state = "found"
        except RuntimeError:
            state, missing = "MISSING", missing + 1
        print(f"hook                {symbol}: {state}")
    if missing:
        print(
            f"{missing} of the symbols that the plugin replaces are missing; it is tested with "
            f"megatron-core {', '.join(compat.TESTED_RELEASES)}"
        )
    elif not compat.megatron_version().startswith(
        tuple(f"{release}." for release in compat.TESTED_RELEASES)
    ):
        print("all hooks fit, but this release is untested")
    return 1 if missing else 0


def _symbols(compat) -> list:
    try:
        return [
            *compat.argument_symbols(),
            *compat.validate_symbols(),
            compat.compile_helpers_symbol(),
            *compat.rotary_symbols(),
            compat.local_attention_symbol(),
            compat.concentration_symbol(),
        ]
    except ModuleNotFoundError as error:
        raise RuntimeError(f"megatron-core cannot be imported: {error}") from None
