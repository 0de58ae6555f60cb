"""Would the plugin work here? What `longrope doctor` prints, as data."""

from __future__ import annotations

import argparse
import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from megatron_longrope import __version__
from megatron_longrope.errors import LongRopeError
from megatron_longrope.integration import compat, hooks, wrappers
from megatron_longrope.integration.attention_choice import attention_from_args


@dataclass(frozen=True)
class SymbolState:
    """One name inside Megatron."""

    symbol: str
    """Dotted name."""
    role: str
    """`hook` when the plugin replaces it, `patched` when Megatron's source already calls the plugin
    (see patches/), `stand-in` when one of the plugin's classes takes its place."""
    state: str
    """`found`, `MISSING` or `SIGNATURE CHANGED`."""
    detail: str | None = None
    """What changed."""

    @property
    def fits(self) -> bool:
        """True when the plugin can use it."""
        return self.state == "found"


@dataclass(frozen=True)
class Checkup:
    """Everything that decides whether the plugin works on this machine."""

    versions: dict[str, str | None]
    """Distribution to version, None when it is not installed."""
    gpu: str | None
    """Name of the first GPU."""
    locations: dict[str, str | None]
    """Package to the folder that it is imported from."""
    helpers: str
    """State of Megatron's compiled dataset helpers."""
    attention: dict[str, str]
    """`--transformer-impl` to the core attention that `--longrope-attention auto` takes."""
    rope: str
    """Kernel that rotates queries and keys."""
    symbols: list[SymbolState]
    """What the plugin replaces or stands in for."""
    problems: list[str]
    """Why the plugin would not work, one sentence each."""
    notes: list[str]
    """What is worth knowing, one sentence each."""

    @property
    def works(self) -> bool:
        """True when nothing stands in the plugin's way."""
        return not self.problems


def examine() -> Checkup:
    """Look at the installed packages and at Megatron's symbols; changes nothing."""
    problems: list[str] = []
    notes: list[str] = []
    locations = {
        package: _location(package, problems) for package in ("megatron.core", "megatron.training")
    }
    has_core = locations["megatron.core"] is not None
    if has_core and not compat.is_tested():
        notes.append(
            f"megatron-core {compat.megatron_version()} is untested (tested: "
            f"{', '.join(compat.TESTED_RELEASES)}); compare losses with an all-ones factor file"
        )
    if None not in locations.values() and len(set(locations.values())) > 1:
        notes.append(
            "megatron.core and megatron.training come from different folders, perhaps from "
            "different releases; put one Megatron first on PYTHONPATH"
        )
    symbols = _symbols() if has_core else []
    problems += [
        f"{item.symbol} {item.detail}" if item.detail else f"{item.symbol} is missing"
        for item in symbols
        if not item.fits
    ]
    return Checkup(
        versions=_versions(),
        gpu=_gpu(),
        locations=locations,
        helpers=_helpers(problems) if has_core else "unknown",
        attention=_attention(notes) if has_core else {},
        rope=_rope_kernel() if has_core else "unknown",
        symbols=symbols,
        problems=problems,
        notes=notes,
    )


def _versions() -> dict[str, str | None]:
    import torch

    return {
        "megatron_longrope": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "megatron-core": _or_none(compat.megatron_version),
        "transformer-engine": compat.transformer_engine_version(),
        "flash-attn": _installed("flash-attn"),
        "transformers": _installed("transformers"),
    }


def _or_none(version: Callable[[], str]) -> str | None:
    try:
        found = version()
    except Exception:  # it is there, but something that it imports is not, or is broken
        return None
    return None if found == "not installed" else found


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _location(package: str, problems: list[str]) -> str | None:
    try:
        importlib.import_module(package)
    except Exception as error:  # a package with compiled parts may raise anything, as OSError
        what = "the plugin" if package == "megatron.core" else "`longrope pretrain`"
        remedy = 'install "megatron-core[training]" or put a Megatron-LM checkout on PYTHONPATH'
        if not isinstance(error, ImportError):
            remedy = f"`python -c 'import {package}'` shows which package to repair or uninstall"
        problems.append(
            f"{package} cannot be imported ({_one_line(error)}), and {what} needs it; {remedy}"
        )
        return None
    return str(compat.megatron_location(package))


def _helpers(problems: list[str]) -> str:
    if compat.helpers_are_compiled():
        return "compiled"
    obstacle = compat.helpers_obstacle()
    if obstacle is None:
        return "compiled by Megatron when a run starts"
    problems.append(
        f"megatron.core.datasets.helpers_cpp is not compiled for this Python, and {obstacle}"
    )
    return "missing"


def _attention(notes: list[str]) -> dict[str, str]:
    chosen = {"local": attention_from_args(_flags("local"))}
    flash = _flash()
    if chosen["local"] == "flash":
        chosen["local"] = f"flash ({flash}) with --bf16 or --fp16, otherwise sdpa"
    else:
        chosen["local"] += f" ({flash})"
    chosen["search and evaluation"] = _engine_attention()
    if compat.transformer_engine_is_usable():
        chosen["transformer_engine"] = "te"
    else:
        chosen["transformer_engine"] = "not available: Transformer Engine is not installed"
        if compat.transformer_engine_version() is not None:
            chosen["transformer_engine"] = "not available: Transformer Engine cannot be imported"
            notes.append("Transformer Engine is installed, but megatron-core cannot import it")
    return chosen


def _flash() -> str:
    """The flash-attention package that would be taken, or why none is."""
    import torch

    from megatron_longrope.attention import flash_kernels

    if not torch.cuda.is_available():
        return "no GPU"
    try:
        return flash_kernels.find(flash_kernels.capability()).name
    except ValueError as error:
        return str(error)


def _engine_attention() -> str:
    import torch

    from megatron_longrope.engine.kernels import describe
    from megatron_longrope.engine.model import default_device

    return describe(default_device(), torch.bfloat16)


def _flags(transformer_impl: str) -> argparse.Namespace:
    return argparse.Namespace(
        transformer_impl=transformer_impl, context_parallel_size=1, bf16=True, fp16=False
    )


def _rope_kernel() -> str:
    if compat.fused_rope_is_available():
        return "fused (Transformer Engine); unfused where cos and sin carry the attention factor"
    return "unfused; runs need --no-rope-fusion"


def _symbols() -> list[SymbolState]:
    """Every symbol once, in the order in which the plugin replaces them."""
    groups: list[tuple[str, Callable[[], list[compat.Symbol]]]] = [
        ("hook", lambda: [symbol for symbol, _ in hooks.argument_wrappers()]),
        ("hook", lambda: [symbol for symbol, _ in hooks.model_wrappers()]),
        ("hook", lambda: [compat.COMPILE_HELPERS]),
        ("stand-in", compat.stand_in_symbols),
    ]
    states = []
    for role, symbols in groups:
        try:
            states += [_state(role, symbol) for symbol in symbols()]
        except Exception as error:  # as in _location
            name = getattr(error, "name", None) or "megatron"
            states.append(SymbolState(name, role, "MISSING", _one_line(error)))
    return states


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _state(role: str, symbol: compat.Symbol) -> SymbolState:
    try:
        misfit = symbol.misfit()
        holder, attribute = symbol.owner()
    except LongRopeError:
        return SymbolState(str(symbol), role, "MISSING")
    if role == "hook" and wrappers.is_bound(vars(holder).get(attribute)):
        role = "patched"
    if misfit:
        return SymbolState(str(symbol), role, "SIGNATURE CHANGED", misfit)
    return SymbolState(str(symbol), role, "found")
