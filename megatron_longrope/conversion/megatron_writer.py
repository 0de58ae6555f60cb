"""Write a torch_dist checkpoint tensor by tensor, without Megatron, process groups or a GPU.

torch's own writer keeps the last tensor of every name until it ends, and begins from nothing after
an interruption; so the files are written here, and torch describes them: the plan, the metadata and
each tensor's bytes are its own. The common state is written twice: megatron-core <= 0.18 reads the
file common.pt, later releases an object in the shards (0.19 reads either).
"""

from __future__ import annotations

import io
import math
import pickle
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_longrope.checkpoint.folders import TRACKER
from megatron_longrope.checkpoint.hf.source import StoredTensor
from megatron_longrope.conversion.staging import MAX_SHARD_BYTES, StagingFolder, in_shards
from megatron_longrope.files import (
    atomic_file,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)

# Rows are written in chunks of this size where only some can be had at a time.
_BLOCK_BYTES = 64 * 2**20
RELEASE = "release"
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
class TensorChunk:
    """What is loaded and written at once: a tensor, one of its layers, or some of its rows."""

    tensor: StoredTensor
    """Of which it is a chunk."""
    layer: int | None
    """Which layer, None if the tensor is not stacked."""
    start: int
    """First row."""
    stop: int
    """One past the last row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, without the dimension of layers."""
        return (self.stop - self.start, *self.tensor.shape[1:])

    @property
    def num_bytes(self) -> int:
        """Size on disk, but for some hundred bytes around it."""
        return math.prod(self.shape) * self.tensor.dtype.itemsize

    def write_item(self) -> WriteItem:
        """How torch plans it."""
        stacked = self.layer is not None
        item, rest = self.tensor, [0] * (len(self.shape) - 1)
        offsets = [self.layer, self.start, *rest] if stacked else [self.start, *rest]
        chunk = ChunkStorageMetadata(
            torch.Size(offsets), torch.Size((1, *self.shape) if stacked else self.shape)
        )
        size = torch.Size((item.num_layers, *item.shape) if stacked else item.shape)
        return WriteItem(
            MetadataIndex(item.name, chunk.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, TensorProperties(dtype=item.dtype), size),
        )


def write_release(
    staging: StagingFolder,
    tensors: list[StoredTensor],
    load: Callable[[TensorChunk], Tensor],
    common: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill a `--load` directory with weights to begin from at iteration 0.

    Megatron calls that a release: it looks for no optimizer in it, with or without `--finetune`.
    Files with a record are the work of an earlier run of the same conversion; they are kept.

    Args:
        staging (StagingFolder): Where an earlier run left off, or empty.
        load (Callable): Gives the data of a chunk.
        common (Mapping): What is not tensors: `args`, `iteration`, ...
        progress (Callable, optional): Called with bytes done and bytes in all; first with those
            that an earlier run wrote.
        max_shard_bytes (int): Largest file, unless a single chunk is larger.

    Raises:
        LongRopeError: The disk has no room for it.
    """
    target = staging.result / RELEASE
    target.mkdir(exist_ok=True)
    chunks = (chunk for item in tensors for chunk in _chunks(item))
    shards = in_shards(chunks, max_shard_bytes)
    total = sum(item.num_bytes for item in tensors)
    staging.check_space(total)
    names = [f"__0_{number}.distcp" for number in range(len(shards))]
    places = {name: _recorded(target / name, staging.shards) for name in names}
    done = sum(
        chunk.num_bytes
        for name, shard in zip(names, shards, strict=True)
        for chunk in (shard if places[name] else ())
    )
    if progress is not None:
        progress(done, total)
    for name, shard in zip(names, shards, strict=True):
        if places[name]:
            continue
        with atomic_file(target / name) as file:
            places[name] = []
            for chunk in shard:
                places[name].append(_write(file, load(chunk), chunk))
                done += chunk.num_bytes
                if progress is not None:
                    progress(done, total)
            write_json_atomic(staging.shards / f"{name}.json", places[name])

    objects = _objects(tensors, common)
    last = f"__0_{len(shards)}.distcp"
    with atomic_file(target / last) as file:
        places[last] = []
        for content in objects.values():
            places[last].append((file.tell(), len(content)))
            file.write(content)
    items = [chunk.write_item() for shard in shards for chunk in shard]
    items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    infos = [_StorageInfo(name, *place) for name in (*names, last) for place in places[name]]
    with atomic_file(target / ".metadata") as file:
        pickle.dump(_metadata(items, infos, target), file)
    write_bytes_atomic(target / "common.pt", _serialized(dict(common)))
    write_json_atomic(target / "metadata.json", _BACKENDS)
    write_text_atomic(staging.result / TRACKER, RELEASE)


def _chunks(item: StoredTensor) -> list[TensorChunk]:
    layers: list[int | None] = [None] if item.num_layers is None else list(range(item.num_layers))
    rows = item.shape[0]
    block = rows
    if item.in_blocks:
        block = max(1, _BLOCK_BYTES // (math.prod(item.shape[1:]) * item.dtype.itemsize))
    return [
        TensorChunk(item, layer, start, min(start + block, rows))
        for layer in layers
        for start in range(0, rows, block)
    ]


def _recorded(path: Path, records: Path) -> list[tuple[int, int]]:
    """Where the chunks of a complete file are: (offset, length); empty if it is not complete."""
    record = records / f"{path.name}.json"
    if not (path.is_file() and record.is_file()):
        return []
    places = [(offset, length) for offset, length in read_json(record)]
    return places if path.stat().st_size == sum(places[-1]) else []


def _write(file: IO[bytes], value: Tensor, chunk: TensorChunk) -> tuple[int, int]:
    """Append a chunk as torch does; gives its offset and length."""
    if tuple(value.shape) != chunk.shape or value.dtype != chunk.tensor.dtype:
        raise RuntimeError(f"{chunk.tensor.name} is not as planned; report this as a bug")
    if value.untyped_storage().nbytes() != value.nbytes:
        value = value.clone()  # torch.save writes all of what a view looks into
    offset = file.tell()
    torch.save(value if chunk.layer is None else value[None], file)
    return offset, file.tell() - offset


def _metadata(items: list[WriteItem], infos: list[_StorageInfo], target: Path) -> Metadata:
    """The checkpoint's table of contents."""
    (plan,), metadata = create_default_global_save_plan([SavePlan(items)])
    places = zip(plan.items, infos, strict=True)
    metadata.storage_data = {item.index: info for item, info in places}
    metadata.storage_meta = StorageMeta(checkpoint_id=target.name, save_id=str(uuid.uuid4()))
    return metadata


def _objects(tensors: list[StoredTensor], common: Mapping[str, Any]) -> dict[str, bytes]:
    """What is not tensors."""
    num_layers = max(item.num_layers or 0 for item in tensors)
    has_qk_norms = any(".q_layernorm." in item.name for item in tensors)
    num_experts = next((item.shape[0] for item in tensors if ".experts." in item.name), 0)
    # What Transformer Engine itself stores where nothing runs in FP8.
    nothing = _serialized([torch.empty(0, dtype=torch.uint8)])
    states = dict.fromkeys(_extra_states(num_layers, has_qk_norms, num_experts), nothing)
    return {**states, "common_state/shard_0_1": _serialized([dict(common)])}


def _extra_states(num_layers: int, has_qk_norms: bool, num_experts: int) -> list[str]:
    modules = (*_STATEFUL, *(_STATEFUL_NORMS if has_qk_norms else ()))
    modules += ("pre_mlp_layernorm",) if num_experts else ()
    return [
        "decoder.final_layernorm._extra_state/shard_0_1",
        *(
            f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
            for module in modules
            for layer in range(num_layers)
        ),
        *(
            f"decoder.layers.mlp.experts.experts.{linear}._extra_state/"
            f"shard_{layer}.{expert}_{num_layers}.{num_experts}"
            for linear in ("linear_fc1", "linear_fc2")
            for layer in range(num_layers)
            for expert in range(num_experts)
        ),
    ]


def _serialized(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
