"""What differs between megatron-core releases, in one place.

A :class:`Symbol` is a name inside Megatron that the plugin replaces or stands in for, with the
parameters that it relies on. `longrope doctor` compares them with the Megatron that is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import EllipsisType
from typing import Any

from megatron_longrope.errors import LongRopeError

TESTED_RELEASES = ("0.17", "0.18", "0.19")


@dataclass(frozen=True)
class Symbol:
    """A name inside a Megatron module that the plugin replaces or stands in for."""

    module: str
    """Dotted module path."""

    name: str
    """Attribute of the module, or `Class.attribute`."""

    parameters: tuple[str | EllipsisType, ...] = (...,)
    """Parameters that the plugin relies on, in their order. A last `...` stands for any others,
    which the plugin passes on as they are; without it there should be none."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> tuple[object, str]:
        """The object that holds the attribute, and the attribute's name.

        Raises:
            LongRopeError: This Megatron has no such symbol.
        """
        try:
            holder: object = importlib.import_module(self.module)
            *path, attribute = self.name.split(".")
            for part in path:
                holder = getattr(holder, part)
            getattr(holder, attribute)
        except (ImportError, AttributeError) as error:
            raise LongRopeError(
                f"{self} is missing from megatron-core {megatron_version()}; the plugin is tested "
                f"with {', '.join(TESTED_RELEASES)}: install one of these or report the release"
            ) from error
        return holder, attribute

    def misfit(self) -> str | None:
        """What no longer fits about the parameters, or None.

        Raises:
            LongRopeError: This Megatron has no such symbol.
        """
        theirs = self._theirs()
        missing = [name for name in self._ours if name not in theirs]
        if missing:
            return f"has no parameter {_quoted(missing)} any more"
        common = [name for name in theirs if name in self._ours]
        if common != self._ours:
            return f"takes {_quoted(common)} in another order"
        required = [
            name for name in self._unknown() if theirs[name].default is inspect.Parameter.empty
        ]
        if required:
            return f"requires {_quoted(required)}, which the plugin does not know"
        return None

    def news(self) -> str | None:
        """Optional parameters that the plugin does not know, or None; harmless unless they are set.

        Raises:
            LongRopeError: This Megatron has no such symbol.
        """
        unknown = self._unknown()
        return f"also takes {_quoted(unknown)}" if unknown and not self.misfit() else None

    @property
    def _ours(self) -> list[str]:
        return [name for name in self.parameters if name is not ...]

    def _unknown(self) -> list[str]:
        if ... in self.parameters:
            return []
        return [name for name in self._theirs() if name not in self._ours]

    def _theirs(self) -> dict[str, inspect.Parameter]:
        """Named parameters; a hooked function answers with the original's."""
        holder, attribute = self.owner()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        found = inspect.signature(getattr(holder, attribute)).parameters
        return {name: item for name, item in found.items() if item.kind not in variadic}


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


# Versions


def megatron_version() -> str:
    """Version of the megatron-core that is imported, or `not installed`."""
    try:
        version = importlib.import_module("megatron.core").__version__
    except ModuleNotFoundError:
        return "not installed"
    # From 0.18 on it names the commit of whatever git repository the package lies in.
    return version.partition("+")[0]


def megatron_location(package: str = "megatron.core") -> Path | None:
    """Folder on the import path that `megatron.core` or `megatron.training` comes from."""
    try:
        return Path(importlib.import_module(package).__file__).parents[2]
    except ImportError:
        return None


def is_tested() -> bool:
    """True when megatron-core is one of the tested releases."""
    return megatron_version().startswith(tuple(f"{release}." for release in TESTED_RELEASES))


def warn_if_untested() -> None:
    """Warn once when megatron-core is outside the tested range; the hooks are still tried."""
    if not is_tested():
        warnings.warn(
            f"megatron-core {megatron_version()} is outside the tested releases "
            f"{', '.join(TESTED_RELEASES)}; run `longrope doctor` and compare losses with an "
            "all-ones factor file first",
            stacklevel=3,
        )


def transformer_engine_version() -> str | None:
    """Version of Transformer Engine, or None when it is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        return metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return "unknown"


def transformer_engine_is_usable() -> bool:
    """True when Megatron, too, could import it; a build for another torch is only installed."""
    if transformer_engine_version() is None:
        return False
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    return bool(getattr(extension, "HAVE_TE", False))


def fused_rope_is_available() -> bool:
    """True when Megatron has a kernel that rotates in one pass."""
    kernels = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    return getattr(kernels, "fused_apply_rotary_pos_emb", None) is not None


# Symbols of models


def rotary_symbols() -> list[Symbol]:
    """Where model classes look up `RotaryEmbedding`.

    GPTModel, which is to go, must have it as long as there is one, else HybridModel; the other
    names may.
    """
    gpt, *others = (f"megatron.core.models.{name}" for name in _MODELS)
    modules = [gpt if _find_module(gpt) else others.pop(0)]
    for dotted in others:
        if _find_module(dotted) and hasattr(importlib.import_module(dotted), "RotaryEmbedding"):
            modules.append(dotted)
    return [Symbol(module, "RotaryEmbedding", _ROTARY_INIT) for module in modules]


_MODELS = ("gpt.gpt_model", "hybrid.hybrid_model", "mamba.mamba_model")


_ROTARY_INIT = (
    "kv_channels",
    "rotary_percent",
    "rotary_interleaved",
    "seq_len_interpolation_factor",
    "rotary_base",
    "rope_scaling",
    "rope_scaling_factor",
    "use_cpu_initialization",
    "cp_group",
)


def local_attention_symbol() -> Symbol:
    """The method that gives local layer specs their core attention class."""
    return Symbol("megatron.core.models.backends", "LocalSpecProvider.core_attention", ("self",))


def concentration_symbol() -> Symbol:
    """The function that tells Attention the multiplier of cos and sin.

    0.19 asks it once, when a layer is built; 0.17 and 0.18 ask it in every forward pass.
    """
    return Symbol(
        "megatron.core.transformer.attention",
        "_yarn_get_concentration_factor_from_config",
        ("config",),
    )


def attention_init_symbol() -> Symbol:
    """The constructor of every attention layer."""
    return Symbol(
        "megatron.core.transformer.attention", "Attention.__init__", ("self", "config", ...)
    )


def output_layer_symbol() -> Symbol:
    """What every language model calls at the end of its constructor."""
    return Symbol(
        "megatron.core.models.common.language_module.language_module",
        "LanguageModule.setup_embeddings_and_output_layer",
        ("self",),
    )


def output_layer_casts() -> bool:
    """True when the output layer may give logits in a type of their own (since 0.20)."""
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    return "output_dtype" in inspect.signature(layers.ColumnParallelLinear.__init__).parameters


def stand_in_symbols() -> list[Symbol]:
    """Methods that Megatron calls on the plugin's own classes instead of its own ones."""
    rotary = "megatron.core.models.common.embeddings.rotary_pos_embedding"
    attention = "megatron.core.transformer.dot_product_attention"
    position = ("self", "max_seq_len", "offset")
    tensors = ("self", "query", "key", "value", "attention_mask", "attn_mask_type")
    options = ("attention_dropout", "softmax_scale", "cp_comm_type", "pg_collection")
    layer = ("self", "config", "layer_number", "attn_mask_type", "attention_type")
    call = ("inference_context", "transformer", "transformer_input", "transformer_config")
    output = ("self", "input_", "weight", "runtime_gather_output")
    return [
        Symbol("megatron.core.tensor_parallel.layers", "ColumnParallelLinear.forward", output),
        Symbol(rotary, "RotaryEmbedding.forward", (*position, "packed_seq", "cp_group")),
        Symbol(
            rotary, "RotaryEmbedding.get_rotary_seq_len", ("self", *call, "packed_seq_params", ...)
        ),
        Symbol(rotary, "RotaryEmbedding.get_emb", position),
        Symbol(rotary, "RotaryEmbedding.get_cos_sin", position),
        Symbol(rotary, "RotaryEmbedding.get_freqs_non_repeated", position),
        Symbol(attention, "DotProductAttention.__init__", (*layer, *options, ...)),
        Symbol(
            attention,
            "DotProductAttention.forward",
            (*tensors, "attention_bias", "packed_seq_params"),
        ),
    ]


# Symbols of the training loop


def argument_symbols() -> list[Symbol]:
    """Where Megatron looks up its parser builder."""
    return [Symbol("megatron.training.arguments", "add_megatron_arguments", ("parser",))]


def validate_symbols() -> list[Symbol]:
    """Where Megatron looks up `validate_args`; in 0.17 initialize.py binds a name of its own."""
    symbols = [Symbol("megatron.training.arguments", "validate_args", ("args", ...))]
    if hasattr(importlib.import_module("megatron.training.initialize"), "validate_args"):
        symbols.append(Symbol("megatron.training.initialize", "validate_args", ("args", ...)))
    return symbols


def initialize_distributed_symbol() -> Symbol:
    """Where Megatron creates its process groups."""
    return Symbol("megatron.training.initialize", "_initialize_distributed")


def load_checkpoint_symbol() -> Symbol:
    """The one function through which a checkpoint's arguments arrive, whatever its format."""
    return Symbol("megatron.training.checkpointing", "_load_base_checkpoint")


def setup_model_symbol() -> Symbol:
    """The function that returns the run's finished model chunks."""
    return Symbol("megatron.training.training", "setup_model_and_optimizer")


def batch_split_symbols() -> list[Symbol]:
    """What splits packed documents over context-parallel ranks.

    0.17 does it in a function of another shape, which asserts that Transformer Engine is there.
    """
    utilities = importlib.import_module("megatron.core.utils")
    if hasattr(utilities, "get_thd_batch_on_this_cp_rank"):  # 0.17
        return []
    if hasattr(utilities, "get_sft_batch_on_this_cp_rank"):  # 0.18
        names = ["get_sft_batch_on_this_cp_rank"]
    else:
        names = [f"_get_batch_on_this_cp_rank_per_{unit}_balancing" for unit in _BALANCING]
    return [Symbol(utilities.__name__, name, ("batch", "cp_group")) for name in names]


_BALANCING = ("sequence", "document")


def compile_helpers_symbol() -> Symbol:
    """The dataset helper build, which a wheel cannot run: it ships the binary but no Makefile."""
    return Symbol("megatron.core.datasets.utils", "compile_helpers", ())


def helpers_are_compiled() -> bool:
    """True when the dataset helpers can be imported as they are."""
    return _find_module("megatron.core.datasets.helpers_cpp")


def helpers_obstacle() -> str | None:
    """Why Megatron could not compile the dataset helpers when training starts, or None."""
    location = megatron_location()
    if location is None or not (location / "megatron/core/datasets/Makefile").is_file():
        return (
            "there is no Makefile beside it to build it with; install a wheel of megatron-core for "
            "this Python"
        )
    compiler = os.environ.get("CXX", "c++")
    for tool in ("make", compiler, "python3-config"):
        if shutil.which(tool) is None:
            return f"{tool}, which Megatron's Makefile calls, is not on the PATH; install it"
    # The Makefile asks the python3 of the PATH, whichever Python runs here.
    asked = subprocess.run(["python3", "-m", "pybind11", "--includes"], capture_output=True)
    if asked.returncode != 0:
        return (
            "the python3 on the PATH has no pybind11, whose headers Megatron's Makefile needs; pip "
            "install pybind11, with the environment activated"
        )
    return None


def _find_module(dotted: str) -> bool:
    try:
        return importlib.util.find_spec(dotted) is not None
    except ModuleNotFoundError:
        return False


# The multiplier of cos and sin, layer by layer


def set_cos_sin_factor(attention: Any, factor: float) -> None:
    """Let an attention layer that is already built multiply cos and sin by `factor`.

    Layers that share a config share the factor in 0.17 and 0.18.
    """
    if hasattr(attention, "_yarn_concentration_factor"):  # 0.19
        attention._yarn_concentration_factor = factor
        return
    attention.config.longrope_cos_sin_factor = factor
    holder, attribute = concentration_symbol().owner()
    function = getattr(holder, attribute)
    if not getattr(function, "_asks_the_config", False):
        setattr(holder, attribute, _asking_the_config(function))


def cos_sin_factor(attention: Any) -> float:
    """What an attention layer multiplies cos and sin by."""
    if hasattr(attention, "_yarn_concentration_factor"):  # 0.19
        return attention._yarn_concentration_factor
    holder, attribute = concentration_symbol().owner()
    return getattr(holder, attribute)(attention.config)


def _asking_the_config(concentration_factor: Callable[[Any], float]) -> Callable[[Any], float]:
    """Around the function of :func:`concentration_symbol`: a config's own factor comes first."""

    @functools.wraps(concentration_factor)
    def factor(config: Any) -> float:
        own = getattr(config, "longrope_cos_sin_factor", None)
        return concentration_factor(config) if own is None else own

    factor._asks_the_config = True
    return factor
