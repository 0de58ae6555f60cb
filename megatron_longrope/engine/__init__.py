"""A resident model for search and evaluation: swap the factors, score tokens."""

from megatron_longrope.engine.engine import Answer, Engine
from megatron_longrope.engine.loading import load_engine

__all__ = ["Answer", "Engine", "load_engine"]
