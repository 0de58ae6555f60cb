"""Read Megatron checkpoints: no GPU, no process group, no Megatron import."""

from megatron_longrope.checkpoint.loader import load_into
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.reader import MegatronCheckpoint, TensorInfo

__all__ = ["MegatronCheckpoint", "ModelShape", "TensorInfo", "load_into"]
