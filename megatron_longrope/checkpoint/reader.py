"""`MegatronCheckpoint`: arguments and tensors of a torch_dist checkpoint, read key by key."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
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

from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.pickles import load_common, load_metadata
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.files import read_json

TRACKER = "latest_checkpointed_iteration.txt"
# megatron-core <= 0.18 keeps the common state in its own file, 0.19 as an object in the shards.
_COMMON_FILE = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"
_NOT_MODEL_PREFIXES = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    """Full, unsharded shape; layers are stacked on dimension 0."""

    dtype: torch.dtype
    """Dtype on disk."""


class MegatronCheckpoint:
    """One iteration of a torch_dist checkpoint; opening it reads metadata only.

    Use :meth:`open`. Tensors are assembled from the shards of any parallel layout.
    """

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        self.directory = directory
        self._metadata = metadata
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    @classmethod
    def open(cls, path: str | Path, iteration: int | None = None) -> MegatronCheckpoint:
        """Open a checkpoint.

        Args:
            path (str | Path): Megatron's `--save` directory, or one `iter_XXXXXXX` directory in it.
            iteration (int, optional): Which iteration of a `--save` directory. Defaults to the
                latest.

        Raises:
            ValueError: There is no checkpoint, its format is not supported, or a file is missing
                or too short.
        """
        directory = _iteration_directory(Path(path), iteration)
        _check_format(directory)
        metadata = load_metadata(directory / ".metadata")
        _check_files(directory, metadata)
        return cls(directory, metadata)

    @cached_property
    def common(self) -> dict[str, Any]:
        """The non-tensor state: `args`, `iteration`, scheduler state, ..."""
        path = self.directory / _COMMON_FILE
        if path.is_file():
            return load_common(path.read_bytes(), str(path))
        if _COMMON_OBJECT not in self._metadata.state_dict_metadata:
            raise ValueError(
                f"{self.directory}: holds neither {_COMMON_FILE} (megatron-core <= 0.18) nor "
                f"{_COMMON_OBJECT} (0.19); the checkpoint is incomplete, copy it again"
            )
        sink = _Sink()
        index, zero = MetadataIndex(_COMMON_OBJECT), torch.Size((0,))
        self._read(
            _COMMON_OBJECT, [ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, zero)], sink
        )
        return load_common(sink.data, f"{self.directory}: {_COMMON_OBJECT}")

    @cached_property
    def args(self) -> argparse.Namespace:
        """Megatron's arguments as stored by the run that saved the checkpoint."""
        args = self.common.get("args")
        if not hasattr(args, "__dict__"):
            raise ValueError(f"{self.directory}: the checkpoint stores no arguments")
        return argparse.Namespace(**vars(args))

    @cached_property
    def iteration(self) -> int:
        """Training iteration of the checkpoint."""
        return int(self.common.get("iteration", 0))

    @cached_property
    def shape(self) -> ModelShape:
        """Geometry of the model, from the stored arguments."""
        return ModelShape.from_args(self.args)

    @cached_property
    def longrope(self) -> LongRopeConfig | None:
        """The configuration that the run trained with, or None for a run without this plugin.

        Raises:
            ValueError: The stored configuration does not validate.
        """
        value = getattr(self.args, "longrope_config_value", None)
        if value is None:
            return None
        try:
            return LongRopeConfig.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{self.directory}: stored longrope configuration: {error}") from None

    @cached_property
    def lineage(self) -> list[dict[str, Any]]:
        """The stages that the weights went through, the latest last; empty without this plugin.

        See :mod:`megatron_longrope.integration.provenance` for what a stage holds.
        """
        return list(getattr(self.args, "longrope_lineage", None) or [])

    def keys(self) -> dict[str, TensorInfo]:
        """Name -> shape and dtype of every model tensor (no optimizer or extra state)."""
        return {
            name: TensorInfo(tuple(item.size), item.properties.dtype)
            for name, item in self._metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata)
            and not name.startswith(_NOT_MODEL_PREFIXES)
            and "_extra_state" not in name
        }

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """Load one tensor to the CPU.

        Args:
            layer (int, optional): Only this layer of a tensor stacked over layers, without the
                layer dimension. Defaults to the whole tensor.

        Raises:
            ValueError: No such tensor or layer, or its data is damaged.
        """
        item = self._metadata.state_dict_metadata.get(name)
        if not isinstance(item, TensorStorageMetadata):
            raise ValueError(f"{self.directory}: has no tensor {name!r}")
        offsets, sizes = [0] * len(item.size), list(item.size)
        if layer is not None:
            if not sizes or not 0 <= layer < sizes[0]:
                raise ValueError(
                    f"{self.directory}: tensor {name!r} of shape {tuple(item.size)} "
                    f"has no layer {layer}"
                )
            offsets[0], sizes[0] = layer, 1
        result = torch.empty(sizes, dtype=item.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(name, item, [chunk])
        if sum(math.prod(part.lengths) for part in items) < result.numel():
            raise ValueError(f"{self.directory}: the shards do not cover tensor {name!r}")
        self._read(name, items, _Sink(result))
        return result if layer is None else result[0]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Load several tensors to the CPU."""
        return {name: self.tensor(name) for name in names}

    def _read(self, name: str, items: list[ReadItem], sink: _Sink) -> None:
        try:
            self._reader.read_data(LoadPlan(items), sink).wait()
        except Exception as error:  # torch reports damage as RuntimeError, KeyError, EOFError, ...
            raise ValueError(
                f"{self.directory}: the data of {name!r} is damaged, copy the checkpoint again: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from None


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


def _iteration_directory(path: Path, iteration: int | None) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give Megatron's --save directory")
    tracker = path / TRACKER
    is_one = (path / ".metadata").exists() or path.name.startswith("iter_")
    if is_one and not tracker.is_file():
        if iteration is not None and path.name != f"iter_{iteration:07d}":
            raise ValueError(
                f"{path} is one iteration's directory but iteration {iteration} was asked for; "
                "give the --save directory above it"
            )
        return path
    if iteration is None:
        if not tracker.is_file():
            if _is_legacy(path):
                return path  # refused by name later
            raise ValueError(
                f"{path}: not a Megatron checkpoint: it has neither {TRACKER} nor .metadata"
            )
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not (text.isdigit() or text == "release"):
            raise ValueError(f"{tracker}: holds {text!r}; expected an iteration number")
        directory = path / (text if text == "release" else f"iter_{int(text):07d}")
    else:
        directory = path / f"iter_{iteration:07d}"
    if not directory.is_dir():
        present = sorted(item.name for item in path.glob("iter_*"))
        raise ValueError(
            f"{directory}: no such iteration; {path} holds {', '.join(present) or 'none'}"
        )
    return directory


def _is_legacy(directory: Path) -> bool:
    return any(directory.glob("mp_rank_*"))


def _check_format(directory: Path) -> None:
    if _is_legacy(directory):
        raise ValueError(
            f"{directory}: checkpoint format `torch` (mp_rank_* files) is not supported yet; load "
            "and save it once with Megatron's --ckpt-format torch_dist"
        )
    described = directory / "metadata.json"
    backend = "torch_dcp or fsdp_dtensor"
    if described.is_file():
        value = read_json(described)
        backend = value.get("sharded_backend") if isinstance(value, dict) else None
    elif not (directory / ".metadata").is_file():
        raise ValueError(
            f"{directory}: no checkpoint here: metadata.json and .metadata are missing"
        )
    if backend != "torch_dist":
        raise ValueError(
            f"{directory}: checkpoint format {backend!r} is not supported yet; this release reads "
            "torch_dist (Megatron's --ckpt-format torch_dist)"
        )
    if not (directory / ".metadata").is_file():
        raise ValueError(
            f"{directory / '.metadata'}: missing; the save was interrupted or the copy incomplete"
        )


def _check_files(directory: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        path = directory / name
        if Path(name).name != name:
            raise ValueError(
                f"{directory}: .metadata names {name!r}, a file outside the checkpoint"
            )
        if not path.is_file():
            raise ValueError(f"{path}: missing; the copy is incomplete")
        if (size := path.stat().st_size) < end:
            raise ValueError(f"{path}: truncated: {size} bytes, the metadata needs {end}")
