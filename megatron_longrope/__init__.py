"""LongRoPE (arXiv 2402.13753) for Megatron-LM: search, fine-tune, evaluate, export.

Importable without megatron-core; only building or hooking a model needs it. Names are imported when
they are first used, so that commands which need no torch start at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_longrope.api import convert_from_hf, convert_to_hf, evaluate, prepare_data, search
    from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
    from megatron_longrope.conversion.options import FromHfOptions, ToHfOptions
    from megatron_longrope.data.options import PrepareOptions
    from megatron_longrope.errors import LongRopeError
    from megatron_longrope.evaluation.kinds.needle import NeedleOptions
    from megatron_longrope.evaluation.kinds.passkey import PasskeyOptions
    from megatron_longrope.evaluation.kinds.ppl import PerplexityOptions
    from megatron_longrope.evaluation.kinds.ruler import RulerOptions
    from megatron_longrope.evaluation.kinds.tasks import BenchmarkOptions, TaskOptions
    from megatron_longrope.factor_search.options import SearchOptions
    from megatron_longrope.integration.arguments import add_longrope_args
    from megatron_longrope.integration.hooks import apply, enable, remove

__version__ = "0.2.0"
__all__ = [
    "BenchmarkOptions",
    "FactorSet",
    "FromHfOptions",
    "LongRopeConfig",
    "LongRopeError",
    "NeedleOptions",
    "PasskeyOptions",
    "PerplexityOptions",
    "PrepareOptions",
    "RulerOptions",
    "SearchOptions",
    "TaskOptions",
    "ToHfOptions",
    "__version__",
    "add_longrope_args",
    "apply",
    "convert_from_hf",
    "convert_to_hf",
    "enable",
    "evaluate",
    "identity_config",
    "prepare_data",
    "remove",
    "search",
]

_MODULES = {
    "BenchmarkOptions": "evaluation.kinds.tasks",
    "FactorSet": "config",
    "FromHfOptions": "conversion.options",
    "LongRopeConfig": "config",
    "LongRopeError": "errors",
    "NeedleOptions": "evaluation.kinds.needle",
    "PasskeyOptions": "evaluation.kinds.passkey",
    "PerplexityOptions": "evaluation.kinds.ppl",
    "PrepareOptions": "data.options",
    "RulerOptions": "evaluation.kinds.ruler",
    "SearchOptions": "factor_search.options",
    "TaskOptions": "evaluation.kinds.tasks",
    "ToHfOptions": "conversion.options",
    "add_longrope_args": "integration.arguments",
    "apply": "integration.hooks",
    "convert_from_hf": "api",
    "convert_to_hf": "api",
    "enable": "integration.hooks",
    "evaluate": "api",
    "identity_config": "config",
    "prepare_data": "api",
    "remove": "integration.hooks",
    "search": "api",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
