"""Replace a few Megatron symbols, each by name, each undone by :func:`remove`.

Two layers. :func:`apply` adds the command-line flags and, once Megatron has validated its
arguments, calls :func:`enable`, which reads them and swaps the rotary module and the local
attention. People who own their script skip `apply`: they pass `add_longrope_args` as
`extra_args_provider` and call `enable(args)` before the model is built.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from megatron_longrope.context_parallel import check_divisible
from megatron_longrope.integration import compat
from megatron_longrope.integration.arguments import (
    LongRopeSettings,
    add_longrope_args,
    attention_from_args,
    settings_from_args,
)

logger = logging.getLogger(__name__)

# Replaced symbols in order, with their originals. Module state because the symbols are global too.
_Replaced = list[tuple[compat.Symbol, Any]]
_argument_hooks: _Replaced = []  # by apply()
_model_hooks: _Replaced = []  # by the latest activate()


def apply() -> None:
    """Hook Megatron's argument parsing; call before the pretrain script is imported. Idempotent.

    Raises:
        RuntimeError: This Megatron lacks a symbol that the plugin needs; nothing stays replaced.
    """
    if _argument_hooks:
        return
    compat.warn_if_untested()
    try:
        for symbol in compat.argument_symbols():
            _replace(_argument_hooks, symbol, _with_longrope_args)
        for symbol in compat.validate_symbols():
            _replace(_argument_hooks, symbol, _with_activation)
        if compat.helpers_are_compiled():
            _replace(_argument_hooks, compat.compile_helpers_symbol(), lambda _: lambda: None)
    except RuntimeError:
        _restore(_argument_hooks)
        raise


def enable(args: argparse.Namespace) -> None:
    """Make models that are built from now on follow the `--longrope-*` flags in `args`.

    Call it after Megatron has validated `args` and before the model is built.

    Raises:
        SystemExit: A flag is wrong; the message is one sentence.
        RuntimeError: This Megatron lacks a symbol that the plugin needs.
    """
    with _errors_in_one_sentence():
        settings = settings_from_args(args)
        attention = attention_from_args(args)
    activate(settings, attention)
    if args.rank == 0:
        print(describe(settings, attention), flush=True)


def activate(settings: LongRopeSettings | None, attention: str) -> None:
    """Make models that are built from now on use the settings; None leaves their RoPE stock.

    A later call takes the place of an earlier one.

    Args:
        settings (LongRopeSettings, optional): From :func:`settings_from_args`.
        attention (str): `te`, `sdpa` or `local`; see :func:`attention_from_args`.

    Raises:
        RuntimeError: This Megatron lacks a symbol that the plugin needs; models stay stock.
    """
    _restore(_model_hooks)
    try:
        if attention == "sdpa":
            _replace(_model_hooks, compat.local_attention_symbol(), _provide_sdpa)
        if settings is None:
            return
        rotary_class = _rotary_class(settings)
        for symbol in compat.rotary_symbols():
            _replace(_model_hooks, symbol, lambda _: rotary_class)
        if settings.carrier == "rope" and settings.attention_factor != 1.0:
            factor = settings.attention_factor
            _replace(_model_hooks, compat.concentration_symbol(), lambda _: lambda config: factor)
    except RuntimeError:
        _restore(_model_hooks)
        raise


def remove() -> None:
    """Put every replaced symbol back; models that were already built keep what they have."""
    _restore(_model_hooks)
    _restore(_argument_hooks)


def replaced_symbols() -> list[str]:
    """Dotted names of what is replaced at the moment."""
    return [str(symbol) for symbol, _ in _argument_hooks + _model_hooks]


def _replace(replaced: _Replaced, symbol: compat.Symbol, make: Callable[[Any], Any]) -> None:
    holder, attribute = symbol.owner()
    # A class attribute must be stored undescribed, or restoring would bind it.
    original = vars(holder)[attribute]
    setattr(holder, attribute, make(original))
    replaced.append((symbol, original))
    logger.info("replaced %s", symbol)


def _restore(replaced: _Replaced) -> None:
    while replaced:
        symbol, original = replaced.pop()
        holder, attribute = symbol.owner()
        setattr(holder, attribute, original)


def _with_longrope_args(original: Callable) -> Callable:
    @functools.wraps(original)
    def add_megatron_arguments(parser):
        return add_longrope_args(original(parser))

    return add_megatron_arguments


def _with_activation(original: Callable) -> Callable:
    @functools.wraps(original)
    def validate_args(args, *rest, **options):
        with _errors_in_one_sentence():
            if args.longrope_config and args.seq_length:
                # Before Megatron's own assertion, which names no remedy.
                check_divisible(args.seq_length, args.context_parallel_size)
        result = original(args, *rest, **options)
        enable(args)
        return result

    return validate_args


@contextlib.contextmanager
def _errors_in_one_sentence() -> Iterator[None]:
    """A bad flag is the user's to correct: no traceback."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"longrope: error: {error}") from None


def describe(settings: LongRopeSettings | None, attention: str) -> str:
    """One line for the log that says what the plugin does in this run."""
    if settings is None:
        return f"> longrope: no --longrope-config, stock RoPE; attention {attention}"
    lengths = ", ".join(str(item.max_length) for item in settings.config.factor_sets)
    return (
        f"> longrope: factor sets up to {lengths} tokens, mode {settings.mode}, attention factor "
        f"{settings.attention_factor:.6g} by {settings.carrier}; attention {attention}"
    )


def _provide_sdpa(_: Callable) -> Callable:
    from megatron_longrope.attention import SdpaCoreAttention

    return lambda self: SdpaCoreAttention


def _rotary_class(settings: LongRopeSettings) -> type:
    from megatron_longrope.rotary import LongRopeRotaryEmbedding

    class ConfiguredLongRopeRotaryEmbedding(LongRopeRotaryEmbedding):
        """The rotary module with this run's settings bound; takes megatron-core's keywords."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(
                settings.config,
                *args,
                mode=settings.mode,
                hf_parity=settings.hf_parity,
                **kwargs,
            )

    return ConfiguredLongRopeRotaryEmbedding
