"""LongRoPE (arXiv 2402.13753) for Megatron-LM: search, fine-tune, evaluate, export."""

from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config

__version__ = "0.1.0"
__all__ = ["FactorSet", "LongRopeConfig", "__version__", "identity_config"]
