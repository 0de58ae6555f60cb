"""Read Megatron checkpoints: no GPU, no process group, no Megatron import."""

from typing import TYPE_CHECKING

from megatron_longrope.lazy import importer

if TYPE_CHECKING:
    from megatron_longrope.checkpoint.loader import load_into
    from megatron_longrope.checkpoint.model_args import ModelShape
    from megatron_longrope.checkpoint.reader import MegatronCheckpoint, TensorInfo

__all__ = ["MegatronCheckpoint", "ModelShape", "TensorInfo", "load_into"]

__getattr__ = importer(
    __name__,
    {
        "MegatronCheckpoint": "reader",
        "ModelShape": "model_args",
        "TensorInfo": "reader",
        "load_into": "loader",
    },
)
