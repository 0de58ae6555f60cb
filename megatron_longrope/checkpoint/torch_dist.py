"""Checkpoints of `--ckpt-format torch_dist`: each tensor once, layers stacked."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_longrope.checkpoint.folders import TORCH_DIST
from megatron_longrope.checkpoint.hf.rules import EMBEDDING
from megatron_longrope.checkpoint.pickles import load_common
from megatron_longrope.checkpoint.reader import MegatronCheckpoint, TensorInfo
from megatron_longrope.checkpoint.shards import Shards
from megatron_longrope.errors import LongRopeError

# megatron-core <= 0.18 keeps the common state in its own file, 0.19 as an object in the shards.
_COMMON_FILE = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"
_NOT_MODEL_PREFIXES = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state")


class TorchDistCheckpoint(MegatronCheckpoint):
    """One iteration in torch_dist; opening it reads metadata only."""

    format = TORCH_DIST

    def __init__(self, directory: Path) -> None:
        """Read the metadata.

        Raises:
            LongRopeError: It is damaged, or a file is missing or too short.
        """
        super().__init__(directory)
        self._shards = Shards(directory)

    @cached_property
    def common(self) -> dict[str, Any]:
        """The non-tensor state: `args`, `iteration`, scheduler state, ..."""
        path = self.directory / _COMMON_FILE
        if path.is_file():
            return load_common(path.read_bytes(), str(path))
        if _COMMON_OBJECT not in self._shards:
            raise LongRopeError(
                f"{self.directory}: holds neither {_COMMON_FILE} (megatron-core <= 0.18) nor "
                f"{_COMMON_OBJECT} (0.19); the checkpoint is incomplete, copy it again"
            )
        return load_common(self._shards.data(_COMMON_OBJECT), f"{self.directory}: {_COMMON_OBJECT}")

    def keys(self) -> dict[str, TensorInfo]:
        """Name -> shape and dtype of every model tensor (no optimizer or extra state)."""
        return {
            name: info
            for name, info in self._shards.tensors.items()
            if not name.startswith(_NOT_MODEL_PREFIXES) and "_extra_state" not in name
        }

    def _embedding_rows(self) -> int | None:
        found = self._shards.tensors.get(EMBEDDING)
        return found and found.shape[0]

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """Load one tensor to the CPU; see the base class."""
        found = self._shards.tensors.get(name)
        if found is None:
            raise self._no_tensor(name)
        offsets, sizes = [0] * len(found.shape), list(found.shape)
        if layer is not None:
            self._check_layer(name, found.shape, layer)
            offsets[0], sizes[0] = layer, 1
        result = self._shards.read(name, sizes, found.dtype, offsets)
        return result if layer is None else result[0]
