"""Install the plugin around Megatron's symbols at run time, each by name; :func:`remove` undoes it.

:func:`apply` is for unmodified scripts: it adds the command-line flags, and the run is configured
when Megatron validates its arguments. People who own their script skip it: they pass
`add_longrope_args` as `extra_args_provider` and call `enable(args)` before the model is built.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from typing import Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.integration import compat, wrappers
from megatron_longrope.integration.symbol import Symbol

logger = logging.getLogger(__name__)

Wrapper = Callable[[Any], Any]
# Replaced symbols in order, with their originals. Module state because the symbols are global too.
_replaced: list[tuple[Symbol, Any]] = []


def argument_wrappers() -> list[tuple[Symbol, Wrapper]]:
    """What lets an unmodified script read the plugin's flags."""
    return [
        (compat.ARGUMENTS, wrappers.with_arguments),
        *((symbol, wrappers.with_validation) for symbol in compat.validate_symbols()),
    ]


def model_wrappers() -> list[tuple[Symbol, Wrapper]]:
    """What makes models, batches and checkpoints follow the configured run."""
    return [
        *((symbol, wrappers.with_rotary) for symbol in compat.rotary_symbols()),
        *((symbol, wrappers.with_document_shards) for symbol in compat.batch_split_symbols()),
        (compat.LOCAL_ATTENTION, wrappers.with_core_attention),
        (compat.CONCENTRATION, wrappers.with_concentration),
        (compat.ATTENTION_INIT, wrappers.with_softmax_scale),
        (compat.OUTPUT_LAYER, wrappers.with_chunked_loss),
        (compat.INITIALIZE_DISTRIBUTED, wrappers.with_agreement),
        (compat.LOAD_CHECKPOINT, wrappers.with_factor_check),
        (compat.SETUP_MODEL, wrappers.with_model_check),
    ]


def apply() -> None:
    """Hook Megatron; call before the pretrain script is imported. Idempotent.

    Raises:
        LongRopeError: This Megatron lacks a symbol that the plugin needs; nothing stays replaced.
    """
    compat.warn_if_untested()
    pairs = [*argument_wrappers(), *model_wrappers()]
    if compat.helpers_are_compiled():
        # A wheel ships the compiled helpers without the Makefile that Megatron would run.
        pairs.append((compat.COMPILE_HELPERS, lambda _: lambda: None))
    _install(pairs)


def enable(args: argparse.Namespace) -> None:
    """Make models that are built from now on follow the `--longrope-*` flags in `args`.

    Call it after Megatron has validated `args` and before the model is built.

    Raises:
        SystemExit: A flag is wrong; the message is one sentence.
        LongRopeError: This Megatron lacks a symbol that the plugin needs.
    """
    _install(model_wrappers())
    wrappers.configure(args)


def remove() -> None:
    """Put every replaced symbol back; models that were already built keep what they have."""
    wrappers.activate(None)
    while _replaced:
        symbol, original = _replaced.pop()
        holder, attribute = symbol.owner()
        setattr(holder, attribute, original)


def replaced_symbols() -> list[str]:
    """Dotted names of what is replaced at the moment."""
    return [str(symbol) for symbol, _ in _replaced]


def _install(pairs: list[tuple[Symbol, Wrapper]]) -> None:
    """Replace what is not replaced yet; a missing symbol undoes everything."""
    present = replaced_symbols()
    try:
        for symbol, wrapper in pairs:
            if str(symbol) in present:
                continue
            holder, attribute = symbol.owner()
            # A class attribute must be stored undescribed, or restoring would bind it.
            original = vars(holder)[attribute]
            if wrappers.is_bound(original):
                continue
            if misfit := symbol.misfit():
                warnings.warn(f"{symbol} {misfit}; see `longrope doctor`", stacklevel=3)
            setattr(holder, attribute, wrapper(original))
            _replaced.append((symbol, original))
            logger.info("replaced %s", symbol)
    except LongRopeError:
        remove()
        raise
