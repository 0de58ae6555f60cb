"""Read checkpoints without Megatron and without unsafe pickles."""

from megatron_longrope.checkpoint.fsdp import FsdpCheckpoint
from megatron_longrope.checkpoint.legacy import LegacyCheckpoint
from megatron_longrope.checkpoint.loader import load_into
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.reader import MegatronCheckpoint, TensorInfo
from megatron_longrope.checkpoint.torch_dist import TorchDistCheckpoint

__all__ = [
    "FsdpCheckpoint",
    "LegacyCheckpoint",
    "MegatronCheckpoint",
    "ModelShape",
    "TensorInfo",
    "TorchDistCheckpoint",
    "load_into",
]
