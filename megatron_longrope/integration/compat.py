"""What differs between megatron-core releases, in one place."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

TESTED_RELEASES = ("0.17", "0.18", "0.19")


@dataclass(frozen=True)
class Symbol:
    """A name inside a Megatron module that the plugin replaces."""

    module: str
    """Dotted module path."""

    name: str
    """Attribute of the module, or `Class.attribute`."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> tuple[object, str]:
        """The object that holds the attribute, and the attribute's name.

        Raises:
            RuntimeError: This Megatron has no such symbol.
        """
        try:
            holder: object = importlib.import_module(self.module)
            *path, attribute = self.name.split(".")
            for part in path:
                holder = getattr(holder, part)
            getattr(holder, attribute)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"{self} is missing from megatron-core {megatron_version()}; the plugin is tested "
                f"with {', '.join(TESTED_RELEASES)}: install one of these or report the release"
            ) from error
        return holder, attribute


def megatron_version() -> str:
    """Version of the megatron-core that is imported, or `not installed`."""
    try:
        return importlib.import_module("megatron.core").__version__
    except ModuleNotFoundError:
        return "not installed"


def transformer_engine_version() -> str | None:
    """Version of Transformer Engine, or None when it is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        return metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return "unknown"


def warn_if_untested() -> None:
    """Warn once when megatron-core is outside the tested range; the hooks are still tried."""
    version = megatron_version()
    if not version.startswith(tuple(f"{release}." for release in TESTED_RELEASES)):
        warnings.warn(
            f"megatron-core {version} is outside the tested releases "
            f"{', '.join(TESTED_RELEASES)}; run `longrope doctor` and compare losses with an "
            "all-ones factor file first",
            stacklevel=3,
        )


def rotary_symbols() -> list[Symbol]:
    """Where model classes look up `RotaryEmbedding`; GPTModel's must exist, the others may."""
    symbols = [Symbol("megatron.core.models.gpt.gpt_model", "RotaryEmbedding")]
    for module in ("hybrid.hybrid_model", "mamba.mamba_model"):
        dotted = f"megatron.core.models.{module}"
        if _find_module(dotted) and hasattr(importlib.import_module(dotted), "RotaryEmbedding"):
            symbols.append(Symbol(dotted, "RotaryEmbedding"))
    return symbols


def local_attention_symbol() -> Symbol:
    """The method that gives local layer specs their core attention class."""
    return Symbol("megatron.core.models.backends", "LocalSpecProvider.core_attention")


def concentration_symbol() -> Symbol:
    """The function that tells Attention the multiplier of cos and sin (read at build in 0.19)."""
    return Symbol(
        "megatron.core.transformer.attention", "_yarn_get_concentration_factor_from_config"
    )


def argument_symbols() -> list[Symbol]:
    """Where Megatron looks up its parser builder."""
    return [Symbol("megatron.training.arguments", "add_megatron_arguments")]


def validate_symbols() -> list[Symbol]:
    """Where Megatron looks up `validate_args`; up to 0.17 initialize.py binds its own name."""
    symbols = [Symbol("megatron.training.arguments", "validate_args")]
    initialize: ModuleType = importlib.import_module("megatron.training.initialize")
    if hasattr(initialize, "validate_args"):
        symbols.append(Symbol("megatron.training.initialize", "validate_args"))
    return symbols


def compile_helpers_symbol() -> Symbol:
    """The dataset helper build, which a wheel cannot run: it ships the binary but no Makefile."""
    return Symbol("megatron.core.datasets.utils", "compile_helpers")


def helpers_are_compiled() -> bool:
    """True when the dataset helpers can be imported as they are."""
    return _find_module("megatron.core.datasets.helpers_cpp")


def _find_module(dotted: str) -> bool:
    try:
        return importlib.util.find_spec(dotted) is not None
    except ModuleNotFoundError:
        return False
