"""Checkpoints of `--ckpt-format fsdp_dtensor` (Megatron-FSDP) and torch_dcp (torch's FSDP2).

Both are distributed checkpoints of torch with one tensor for each parameter, whole whatever the
ranks were: `model.module.decoder.layers.3.mlp.linear_fc2.weight`. Megatron-FSDP stores the two
halves of a gated linear_fc1 apart, as `...linear_fc1.weight_w` and `_v`, so that a tensor-parallel
rank's part is contiguous. The arguments and the iteration are objects of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_longrope.checkpoint.folders import FSDP_DTENSOR
from megatron_longrope.checkpoint.hf.rules import EMBEDDING
from megatron_longrope.checkpoint.layered import Joined, LayeredCheckpoint, LazyTensor
from megatron_longrope.checkpoint.pickles import load_object
from megatron_longrope.checkpoint.reader import TensorInfo
from megatron_longrope.checkpoint.shards import Shards
from megatron_longrope.errors import LongRopeError

_MODEL, _WRAPPER = "model.", "module."
_CHUNK = re.compile(r"model\d+\.")
_HALF = re.compile(r"(.*linear_fc1\.(?:weight|bias)\d*)_([wv])")
_COMMON = ("args", "iteration", "checkpoint_version")


class FsdpCheckpoint(LayeredCheckpoint):
    """One iteration in fsdp_dtensor or torch_dcp; opening it reads metadata only."""

    format = FSDP_DTENSOR

    def __init__(self, directory: Path) -> None:
        """Read the metadata.

        Raises:
            LongRopeError: It is damaged, a file is missing or too short, or the metadata is not
                that of this format.
        """
        super().__init__(directory)
        self._shards = Shards(directory)
        names = self._shards.tensors
        if any(map(_CHUNK.match, names)):
            raise LongRopeError(
                f"{directory}: holds several chunks of a pipelined model in one fsdp_dtensor "
                "checkpoint, which is not supported; save it without pipeline parallelism"
            )
        if not any(name.startswith(_MODEL) for name in names):
            raise LongRopeError(
                f"{directory}: has .metadata without metadata.json and holds no tensors named "
                f"{_MODEL}*, so it is neither torch_dist nor fsdp_dtensor; if it is torch_dist, "
                "copy metadata.json, too"
            )

    @cached_property
    def common(self) -> dict[str, Any]:
        """The non-tensor state: `args`, `iteration` and `checkpoint_version`."""
        return {
            name: load_object(self._shards.data(name), f"{self.directory}: {name}")
            for name in _COMMON
            if name in self._shards
        }

    def _embedding_rows(self) -> int | None:
        named = {_in_memory(key): info for key, info in self._shards.tensors.items()}
        return named[EMBEDDING].shape[0] if EMBEDDING in named else None

    def _stored_tensors(self) -> Mapping[str, LazyTensor]:
        tensors: dict[str, LazyTensor] = {}
        halves: dict[str, dict[str, LazyTensor]] = {}
        for key, info in self._shards.tensors.items():
            name = _in_memory(key)
            if name is None:
                continue
            tensor = _Stored(self._shards, key, info)
            if match := _HALF.fullmatch(name):
                halves.setdefault(match[1], {})[match[2]] = tensor
            else:
                tensors[name] = tensor
        for name, found in halves.items():
            if set(found) != {"w", "v"}:
                raise LongRopeError(f"holds only one half of {name}; the save was incomplete")
            tensors[name] = Joined(name, (found["w"], found["v"]), dim=0)  # gate, then up
        return tensors


def _in_memory(key: str) -> str | None:
    """The name that a tensor of the model has in memory; None for others."""
    if not key.startswith(_MODEL) or "_extra_state" in key:
        return None
    name = key.removeprefix(_MODEL)
    while name.startswith(_WRAPPER):
        name = name.removeprefix(_WRAPPER)
    return name


class _Stored:
    """A tensor of the shards."""

    def __init__(self, shards: Shards, key: str, info: TensorInfo) -> None:
        self._shards, self._key = shards, key
        self.info = info

    def read_into(self, target: Tensor) -> None:
        self._shards.read_into(self._key, target)
