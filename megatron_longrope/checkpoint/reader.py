"""`MegatronCheckpoint`: arguments and tensors of a checkpoint of any of Megatron's formats."""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_longrope.base_frequencies import megatron_base_frequencies
from megatron_longrope.checkpoint.folders import checkpoint_format, iteration_directory
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.run_config import RUN_CONFIG, args_from_run_config
from megatron_longrope.config import LongRopeConfig, identity_config
from megatron_longrope.errors import LongRopeError

# What must be known to read a model; a script that saves stores all of its arguments.
_MODEL_FLAGS = (
    "--num-layers, --hidden-size, --ffn-hidden-size, --num-attention-heads, "
    "--group-query-attention with --num-query-groups, --kv-channels, --swiglu, --normalization, "
    "--norm-epsilon, --rotary-base, --seq-length and --untie-embeddings-and-output-weights"
)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    """Full, unsharded shape; layers are stacked on dimension 0."""
    dtype: torch.dtype
    """Dtype on disk."""

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


class MegatronCheckpoint(ABC):
    """One iteration of a checkpoint; use :meth:`open`, which reads metadata only.

    Whatever the format and the parallel layout, tensors have the names, the full shapes and the
    stacking over layers that torch_dist gives them.
    """

    format: ClassVar[str]
    """Megatron's `--ckpt-format`: `torch_dist`, `torch` or `fsdp_dtensor`."""

    _formats: ClassVar[dict[str, type[MegatronCheckpoint]]] = {}
    """The formats that can be read; the package imports their modules, which stand above this."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "format" in vars(cls):
            MegatronCheckpoint._formats[cls.format] = cls

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def open(cls, path: str | Path, iteration: int | None = None) -> MegatronCheckpoint:
        """Open a checkpoint.

        Args:
            path (str | Path): Megatron's `--save` directory, or one `iter_XXXXXXX` directory in it.
            iteration (int, optional): Which iteration of a `--save` directory. Defaults to the one
                in its tracker file, or to the only one.

        Raises:
            LongRopeError: There is no checkpoint, its format is not supported, or a file is missing
                or too short.
        """
        directory = iteration_directory(Path(path), iteration)
        return cls._formats[checkpoint_format(directory)](directory)

    @property
    @abstractmethod
    def common(self) -> dict[str, Any]:
        """The non-tensor state: `args`, `iteration`, ..."""

    @abstractmethod
    def keys(self) -> dict[str, TensorInfo]:
        """Name -> shape and dtype of every model tensor (no optimizer or extra state)."""

    @abstractmethod
    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """Load one tensor to the CPU.

        Args:
            layer (int, optional): Only this layer of a tensor stacked over layers, without the
                layer dimension. Defaults to the whole tensor.

        Raises:
            LongRopeError: No such tensor or layer, or its data is damaged.
        """

    @cached_property
    def args(self) -> argparse.Namespace:
        """Megatron's arguments as stored by the run that saved the checkpoint."""
        args = self.common.get("args")
        if hasattr(args, "__dict__"):
            return argparse.Namespace(**vars(args))
        described = self.directory / RUN_CONFIG
        if described.is_file():
            return args_from_run_config(described, self._embedding_rows())
        raise LongRopeError(
            f"{self.directory}: the checkpoint stores no arguments; load it once with a Megatron "
            f"script that is given {_MODEL_FLAGS} and save it again, or put Megatron-Bridge's "
            f"{RUN_CONFIG} into this folder"
        )

    @cached_property
    def iteration(self) -> int:
        """Training iteration of the checkpoint; of one that does not say, by its folder's name."""
        number = self.directory.name.removeprefix("iter_")
        return int(self.common.get("iteration", int(number) if number.isdigit() else 0))

    @cached_property
    def shape(self) -> ModelShape:
        """Geometry of the model, from the stored arguments."""
        return ModelShape.from_args(self.args)

    @cached_property
    def longrope(self) -> LongRopeConfig | None:
        """The configuration that the run trained with, or None for plain RoPE without this plugin.

        Raises:
            LongRopeError: The stored configuration does not validate.
        """
        value = getattr(self.args, "longrope_config_value", None)
        if value is None:
            scaling = megatron_base_frequencies(self.args)
            if scaling is None:
                return None
            shape = self.shape
            window = shape.max_position_embeddings
            return identity_config(shape.rotary_base, shape.rotary_dim, window, scaling)
        try:
            return LongRopeConfig.from_dict(value)
        except ValueError as error:
            raise LongRopeError(
                f"{self.directory}: stored longrope configuration: {error}"
            ) from None

    @cached_property
    def lineage(self) -> list[dict[str, Any]]:
        """The stages that the weights went through, the latest last; empty without this plugin.

        See :mod:`megatron_longrope.integration.provenance` for what a stage holds.
        """
        return list(getattr(self.args, "longrope_lineage", None) or [])

    def _embedding_rows(self) -> int | None:
        """Rows of the stored embedding, padding included; None where only the arguments tell."""
        return None

    def _no_tensor(self, name: str) -> LongRopeError:
        return LongRopeError(f"{self.directory}: has no tensor {name!r}")

    def _check_layer(self, name: str, shape: tuple[int, ...], layer: int) -> None:
        if not shape or not 0 <= layer < shape[0]:
            raise LongRopeError(
                f"{self.directory}: tensor {name!r} of shape {shape} has no layer {layer}"
            )
