"""LongRoPE (arXiv 2402.13753) for Megatron-LM: search, fine-tune, evaluate, export.

Importable without megatron-core; only building or hooking a model needs it. Names are imported when
they are first used, so that commands which need no torch start at once.
"""

from typing import TYPE_CHECKING

from megatron_longrope.lazy import importer

if TYPE_CHECKING:
    from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
    from megatron_longrope.integration.arguments import add_longrope_args
    from megatron_longrope.integration.hooks import apply, enable, remove

__version__ = "0.2.0"
__all__ = [
    "FactorSet",
    "LongRopeConfig",
    "__version__",
    "add_longrope_args",
    "apply",
    "enable",
    "identity_config",
    "remove",
]

__getattr__ = importer(
    __name__,
    {
        "FactorSet": "config",
        "LongRopeConfig": "config",
        "identity_config": "config",
        "add_longrope_args": "integration.arguments",
        "apply": "integration.hooks",
        "enable": "integration.hooks",
        "remove": "integration.hooks",
    },
)
