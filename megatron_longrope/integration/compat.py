"""What differs between megatron-core releases, in one place.

Which symbols a release has, what it calls its classes, and what it does otherwise. What a release
writes to disk is in `checkpoint/torch_dist.py` and `conversion/megatron_writer.py`: data outlive
the release that is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_longrope.integration.symbol import TESTED_RELEASES, Symbol, megatron_version

# Versions


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


# The method that gives local layer specs their core attention class.
LOCAL_ATTENTION = Symbol(
    "megatron.core.models.backends", "LocalSpecProvider.core_attention", ("self",)
)
# The function that tells Attention the multiplier of cos and sin. 0.19 asks it once, when a layer
# is built; 0.17 and 0.18 ask it in every forward pass.
CONCENTRATION = Symbol(
    "megatron.core.transformer.attention",
    "_yarn_get_concentration_factor_from_config",
    ("config",),
)
# The constructor of every attention layer.
ATTENTION_INIT = Symbol(
    "megatron.core.transformer.attention", "Attention.__init__", ("self", "config", ...)
)
# What every language model calls at the end of its constructor.
OUTPUT_LAYER = Symbol(
    "megatron.core.models.common.language_module.language_module",
    "LanguageModule.setup_embeddings_and_output_layer",
    ("self",),
)


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


# Where Megatron looks up its parser builder.
ARGUMENTS = Symbol("megatron.training.arguments", "add_megatron_arguments", ("parser",))
# Where Megatron creates its process groups.
INITIALIZE_DISTRIBUTED = Symbol("megatron.training.initialize", "_initialize_distributed")
# The one function through which a checkpoint's arguments arrive, whatever its format.
LOAD_CHECKPOINT = Symbol("megatron.training.checkpointing", "_load_base_checkpoint")
# The function that returns the run's finished model chunks.
SETUP_MODEL = Symbol("megatron.training.training", "setup_model_and_optimizer")
# The dataset helper build, which a wheel cannot run: it ships the binary but no Makefile.
COMPILE_HELPERS = Symbol("megatron.core.datasets.utils", "compile_helpers", ())


def validate_symbols() -> list[Symbol]:
    """Where Megatron looks up `validate_args`; in 0.17 initialize.py binds a name of its own."""
    symbols = [Symbol("megatron.training.arguments", "validate_args", ("args", ...))]
    if hasattr(importlib.import_module("megatron.training.initialize"), "validate_args"):
        symbols.append(Symbol("megatron.training.initialize", "validate_args", ("args", ...)))
    return symbols


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


# What a release calls its classes, and what it does otherwise


def language_models() -> tuple[type, ...]:
    """Return the model classes that the plugin supports; HybridModel was MambaModel in 0.17."""
    found = []
    for name, dotted in zip(("GPTModel", "HybridModel", "MambaModel"), _MODELS, strict=True):
        try:
            module = importlib.import_module(f"megatron.core.models.{dotted}")
            found.append(getattr(module, name))
        except (ImportError, AttributeError):
            continue  # not in this release
    return tuple(found)


def hybrid_classes() -> tuple[type, type, type]:
    """Return HybridModel, its stack of layers and the stack's submodules."""
    try:
        block = importlib.import_module("megatron.core.models.hybrid.hybrid_block")
        model = importlib.import_module("megatron.core.models.hybrid.hybrid_model")
    except ModuleNotFoundError:  # 0.17
        block = importlib.import_module("megatron.core.ssm.mamba_block")
        model = importlib.import_module("megatron.core.models.mamba.mamba_model")
        return model.MambaModel, block.MambaStack, block.MambaStackSubmodules
    return model.HybridModel, block.HybridStack, block.HybridStackSubmodules


def dense_mlp(submodules: Any) -> object:
    """Return the MLP of these submodules in the form that this release's layers build it from."""
    mlp = importlib.import_module("megatron.core.transformer.mlp").MLP
    if hasattr(mlp, "as_mlp_submodule"):
        return functools.partial(mlp.as_mlp_submodule, submodules=submodules)
    specs = importlib.import_module("megatron.core.transformer.spec_utils")
    return specs.ModuleSpec(module=mlp, submodules=submodules)  # 0.17


def decoding_drops_softmax_scale() -> bool:
    """True when dynamic decoding takes neither a softmax scale nor a multiplier of keys."""
    return megatron_version().startswith(("0.17.", "0.18."))


# The multiplier of cos and sin, layer by layer


def set_cos_sin_factor(attention: Any, factor: float) -> None:
    """Let an attention layer that is already built multiply cos and sin by `factor`.

    Layers that share a config share the factor in 0.17 and 0.18.
    """
    if hasattr(attention, "_yarn_concentration_factor"):  # 0.19
        attention._yarn_concentration_factor = factor
        return
    attention.config.longrope_cos_sin_factor = factor
    holder, attribute = CONCENTRATION.owner()
    function = getattr(holder, attribute)
    if not getattr(function, "_asks_the_config", False):
        setattr(holder, attribute, _asking_the_config(function))


def cos_sin_factor(attention: Any) -> float:
    """What an attention layer multiplies cos and sin by."""
    if hasattr(attention, "_yarn_concentration_factor"):  # 0.19
        return attention._yarn_concentration_factor
    holder, attribute = CONCENTRATION.owner()
    return getattr(holder, attribute)(attention.config)


def _asking_the_config(concentration_factor: Callable[[Any], float]) -> Callable[[Any], float]:
    """Around the function of `CONCENTRATION`: a config's own factor comes first."""

    @functools.wraps(concentration_factor)
    def factor(config: Any) -> float:
        own = getattr(config, "longrope_cos_sin_factor", None)
        return concentration_factor(config) if own is None else own

    factor._asks_the_config = True
    return factor
