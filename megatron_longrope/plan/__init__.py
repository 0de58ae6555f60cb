"""Memory, time and layout of long-context training before it starts; no torch."""

from megatron_longrope.plan.estimate import Cluster, Estimate, plan_command, rank, remedies
from megatron_longrope.plan.layouts import Layout, Training
from megatron_longrope.plan.memory import Memory
from megatron_longrope.plan.model import MODELS, Model, NotCoveredError

__all__ = [
    "MODELS",
    "Cluster",
    "Estimate",
    "Layout",
    "Memory",
    "Model",
    "NotCoveredError",
    "Training",
    "plan_command",
    "rank",
    "remedies",
]
