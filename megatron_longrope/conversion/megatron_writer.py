"""Write a torch_dist checkpoint tensor by tensor, without Megatron, process groups or a GPU.

torch's distributed checkpoint writes the files; the planner below hands it one tensor at a time.
The common state is written twice: megatron-core <= 0.18 reads the file common.pt, later releases
an object in the shards (0.19 reads either).
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_longrope.files import write_json_atomic, write_text_atomic

RELEASE = "release"
_TRACKER = "latest_checkpointed_iteration.txt"
# 0.18 wants all four keys; later releases ignore the last two.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Modules of a layer that own an `_extra_state`: the linear ones in every spec, the others with
# Transformer Engine only. Megatron refuses a checkpoint that lacks one which the model has; those
# that the model lacks it ignores.
_STATEFUL = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_STATEFUL_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to write."""

    name: str
    """Its key."""

    shape: tuple[int, ...]
    """Shape, of one layer if `num_layers` is given."""

    dtype: torch.dtype
    """Its dtype."""

    num_layers: int | None = None
    """Layers that are stacked on dimension 0, or None."""

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return (self.num_layers or 1) * math.prod(self.shape) * self.dtype.itemsize


def write_release(
    directory: Path,
    tensors: list[StoredTensor],
    load: Callable[[str, int | None], Tensor],
    common: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fill a `--load` directory with weights to begin from at iteration 0.

    Megatron calls that a release: it looks for no optimizer in it, with or without `--finetune`.

    Args:
        directory (Path): An empty directory.
        load (Callable): Gives the data of a tensor by its name and layer (None if not stacked).
        common (Mapping): What is not tensors: `args`, `iteration`, ...
        progress (Callable, optional): Called with bytes done and bytes in all.

    Returns:
        Path: The directory of the checkpoint's files.
    """
    target = directory / RELEASE
    target.mkdir()
    num_layers = max(item.num_layers or 0 for item in tensors)
    has_qk_norms = any(".q_layernorm." in item.name for item in tensors)
    # What Transformer Engine itself stores where nothing runs in FP8.
    nothing = _serialized([torch.empty(0, dtype=torch.uint8)])
    objects = dict.fromkeys(_extra_states(num_layers, has_qk_norms), nothing)
    objects["common_state/shard_0_1"] = _serialized([dict(common)])
    planner = _OneByOne(tensors, load, objects, progress)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
            dcp.save({}, storage_writer=FileSystemWriter(target), planner=planner, no_dist=True)
    except CheckpointException as error:  # what went wrong, without torch's wrapping
        raise next(iter(error.failures.values()))[0] from None
    torch.save(dict(common), target / "common.pt")
    write_json_atomic(target / "metadata.json", _BACKENDS)
    write_text_atomic(directory / _TRACKER, RELEASE)
    return target


def _extra_states(num_layers: int, has_qk_norms: bool) -> list[str]:
    modules = (*_STATEFUL, *(_STATEFUL_NORMS if has_qk_norms else ()))
    return [
        "decoder.final_layernorm._extra_state/shard_0_1",
        *(
            f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
            for module in modules
            for layer in range(num_layers)
        ),
    ]


def _serialized(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _OneByOne(SavePlanner):
    """Plans all from shapes, and gives torch the data of a tensor when it is its turn."""

    def __init__(
        self,
        tensors: list[StoredTensor],
        load: Callable[[str, int | None], Tensor],
        objects: Mapping[str, bytes],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._load = load
        self._objects = objects
        self._progress = progress
        self._total = sum(item.num_bytes for item in tensors)
        self._done = 0
        self._sources: dict[MetadataIndex, tuple[StoredTensor, int | None]] = {}
        for item in tensors:
            for layer in (None,) if item.num_layers is None else range(item.num_layers):
                offsets = [0] * len(item.shape)
                start = torch.Size(offsets if layer is None else [layer, *offsets])
                self._sources[MetadataIndex(item.name, start)] = (item, layer)

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to do: the tensors came with the constructor."""

    def create_local_plan(self) -> SavePlan:
        """One piece for every object, tensor, and layer of a stacked tensor."""
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        for index, (item, layer) in self._sources.items():
            stacked = () if layer is None else (1,)
            chunk = ChunkStorageMetadata(index.offset, torch.Size((*stacked, *item.shape)))
            size = item.shape if layer is None else (item.num_layers, *item.shape)
            data = TensorWriteData(chunk, TensorProperties(dtype=item.dtype), torch.Size(size))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plan of the one process there is, and the checkpoint's metadata."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The data of a piece."""
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        item, layer = self._sources[write_item.index]
        value = self._load(item.name, layer)
        if tuple(value.shape) != item.shape or value.dtype != item.dtype:
            raise RuntimeError(f"{item.name} is not as planned; report this as a bug")
        self._done += value.nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)
        return value if layer is None else value[None]
