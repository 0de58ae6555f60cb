"""LongRoPE (arXiv 2402.13753) for Megatron-LM: search, fine-tune, evaluate, export.

Importable without megatron-core; only building or hooking a model needs it. Names are imported when
they are first used, so that commands which need no torch start at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as`: what type checkers take for public
    from megatron_longrope.api import convert_from_hf as convert_from_hf
    from megatron_longrope.api import convert_to_hf as convert_to_hf
    from megatron_longrope.api import evaluate as evaluate
    from megatron_longrope.api import prepare_data as prepare_data
    from megatron_longrope.api import search as search
    from megatron_longrope.config import FactorSet as FactorSet
    from megatron_longrope.config import LongRopeConfig as LongRopeConfig
    from megatron_longrope.config import identity_config as identity_config
    from megatron_longrope.conversion.options import FromHfOptions as FromHfOptions
    from megatron_longrope.conversion.options import ToHfOptions as ToHfOptions
    from megatron_longrope.data.options import PrepareOptions as PrepareOptions
    from megatron_longrope.errors import LongRopeError as LongRopeError
    from megatron_longrope.evaluation.kinds.needle import NeedleOptions as NeedleOptions
    from megatron_longrope.evaluation.kinds.passkey import PasskeyOptions as PasskeyOptions
    from megatron_longrope.evaluation.kinds.ppl import PerplexityOptions as PerplexityOptions
    from megatron_longrope.evaluation.kinds.ruler import RulerOptions as RulerOptions
    from megatron_longrope.evaluation.kinds.tasks import BenchmarkOptions as BenchmarkOptions
    from megatron_longrope.evaluation.kinds.tasks import TaskOptions as TaskOptions
    from megatron_longrope.factor_search.options import SearchOptions as SearchOptions
    from megatron_longrope.integration.arguments import add_longrope_args as add_longrope_args
    from megatron_longrope.integration.hooks import apply as apply
    from megatron_longrope.integration.hooks import enable as enable
    from megatron_longrope.integration.hooks import remove as remove

__version__ = "0.3.0.dev0"
_PUBLIC = {
    "api": ["convert_from_hf", "convert_to_hf", "evaluate", "prepare_data", "search"],
    "config": ["FactorSet", "LongRopeConfig", "identity_config"],
    "conversion.options": ["FromHfOptions", "ToHfOptions"],
    "data.options": ["PrepareOptions"],
    "errors": ["LongRopeError"],
    "evaluation.kinds.needle": ["NeedleOptions"],
    "evaluation.kinds.passkey": ["PasskeyOptions"],
    "evaluation.kinds.ppl": ["PerplexityOptions"],
    "evaluation.kinds.ruler": ["RulerOptions"],
    "evaluation.kinds.tasks": ["BenchmarkOptions", "TaskOptions"],
    "factor_search.options": ["SearchOptions"],
    "integration.arguments": ["add_longrope_args"],
    "integration.hooks": ["apply", "enable", "remove"],
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *_MODULES]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
