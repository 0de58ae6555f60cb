"""A resident model for search and evaluation: swap the factors, score tokens."""

from megatron_longrope.engine.engine import Engine, load_engine

__all__ = ["Engine", "load_engine"]
