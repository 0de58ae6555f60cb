"""A folder of torch's distributed checkpoints, read key by key without a process group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_longrope.checkpoint.pickles import load_metadata
from megatron_longrope.checkpoint.reader import TensorInfo
from megatron_longrope.errors import LongRopeError


class Shards:
    """`.metadata` and the `.distcp` files that it names; opening reads the former only."""

    def __init__(self, directory: Path) -> None:
        """Read what there is.

        Raises:
            LongRopeError: The metadata is damaged, or a file is missing or too short.
        """
        self.directory = directory
        metadata = load_metadata(directory / ".metadata")
        _check_files(directory, metadata)
        self._items: Mapping[str, Any] = metadata.state_dict_metadata
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def __contains__(self, name: str) -> bool:
        return name in self._items

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name -> full shape and dtype."""
        return {
            name: TensorInfo(tuple(item.size), item.properties.dtype)
            for name, item in self._items.items()
            if isinstance(item, TensorStorageMetadata)
        }

    def data(self, name: str) -> bytes:
        """The bytes of what is not a tensor: a `torch.save` archive.

        Raises:
            LongRopeError: Its data is damaged.
        """
        sink = _Sink()
        index, zero = MetadataIndex(name), torch.Size((0,))
        self._read(name, [ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, zero)], sink)
        return sink.data

    def read(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, offsets: Sequence[int]
    ) -> Tensor:
        """A tensor, or the block of it that begins at `offsets`, on the CPU.

        Raises:
            LongRopeError: Its data is damaged or incomplete.
        """
        target = torch.empty(tuple(shape), dtype=dtype)
        self.read_into(name, target, offsets)
        return target

    def read_into(self, name: str, target: Tensor, offsets: Sequence[int] | None = None) -> None:
        """Fill `target` with a tensor, or the block of it that begins at `offsets`.

        Args:
            target (Tensor): On the CPU, with as many dimensions as the tensor.

        Raises:
            LongRopeError: Its data is damaged or incomplete.
        """
        items = self._items_of(name, target.shape, offsets or (0,) * target.dim())
        self._read(name, items, _Sink(target))

    def _items_of(self, name: str, shape: torch.Size, offsets: Sequence[int]) -> list[ReadItem]:
        """What to read for a block of a tensor."""
        chunk = ChunkStorageMetadata(torch.Size(offsets), shape)
        items = create_read_items_for_chunk_list(name, self._items[name], [chunk])
        if sum(math.prod(part.lengths) for part in items) < shape.numel():
            raise LongRopeError(f"{self.directory}: the shards do not cover tensor {name!r}")
        return items

    def _read(self, name: str, items: list[ReadItem], sink: _Sink) -> None:
        try:
            self._reader.read_data(LoadPlan(items), sink).wait()
        except Exception as error:  # torch reports damage as RuntimeError, KeyError, EOFError, ...
            raise LongRopeError(
                f"{self.directory}: the data of {name!r} is damaged, copy the checkpoint again: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error


class _Sink:
    """The three methods of torch's LoadPlanner that reading calls; never unpickles anything."""

    def __init__(self, target: Tensor | None = None) -> None:
        self.target = target
        self.data = b""

    def load_bytes(self, item: ReadItem, value: Any) -> None:
        self.data = value.getvalue()

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        view = self.target
        for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: `resolve_tensor` gave a view of the target."""


def _check_files(directory: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        path = directory / name
        if Path(name).name != name:
            raise LongRopeError(
                f"{directory}: .metadata names {name!r}, a file outside the checkpoint"
            )
        if not path.is_file():
            raise LongRopeError(f"{path}: missing; the copy is incomplete")
        if (size := path.stat().st_size) < end:
            raise LongRopeError(f"{path}: truncated: {size} bytes, the metadata needs {end}")
