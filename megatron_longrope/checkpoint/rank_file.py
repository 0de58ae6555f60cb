"""One rank's file of a checkpoint of `--ckpt-format torch`, mapped into memory."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longrope.checkpoint.pickles import load_common
from megatron_longrope.checkpoint.reader import TensorInfo
from megatron_longrope.errors import LongRopeError

_NOT_COMMON = ("model", "optimizer", "rng_state")


class RankFile:
    """`model_optim_rng.pt`: reads of it only what is asked for, never the optimizer's state."""

    def __init__(self, path: Path) -> None:
        """Look at the end of the file.

        Raises:
            LongRopeError: It is not a whole archive.
        """
        self.path = path
        if not path.is_file():
            raise LongRopeError(f"{path}: missing; the copy is incomplete")
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                is_cut = file.read(4) in (b"PK\x03\x04", b"")
            size = path.stat().st_size
            raise LongRopeError(
                f"{path}: truncated: {size} bytes, without the table that ends it; copy it again"
                if is_cut
                else f"{path}: not an archive of torch.save (of torch 1.6 or newer)"
            )

    @property
    def common(self) -> dict[str, Any]:
        """Everything but the model, the optimizer and the random state."""
        return self._header[0]

    @property
    def chunks(self) -> Mapping[str, Mapping[str, TensorInfo]]:
        """`model`, or `model0`, `model1`, ... of virtual pipeline stages: the tensors in them.

        Raises:
            LongRopeError: There is no model in the file, or something in it is not a tensor.
        """
        models = self._header[1]
        names = {"model"} if len(models) == 1 else {f"model{i}" for i in range(len(models))}
        if not models or set(models) != names:
            raise LongRopeError(
                f"{self.path}: holds the models {', '.join(sorted(models)) or 'none'}; expected "
                "model, or model0, model1, ... of virtual pipeline stages"
            )
        return {name: models[name] for name in sorted(models, key=lambda name: (len(name), name))}

    @cached_property
    def _header(self) -> tuple[dict[str, Any], dict[str, dict[str, TensorInfo]]]:
        state = load_common(self.path, str(self.path))
        common = {key: value for key, value in state.items() if not key.startswith(_NOT_COMMON)}
        chunks = {
            key: dict(self._infos(key, value))
            for key, value in state.items()
            if key.startswith("model")
        }
        return common, chunks

    @cached_property
    def models(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of `chunks`, mapped: the system may drop pages that were read."""
        state = load_common(self.path, str(self.path))
        return {key: state[key] for key in self.chunks}

    def _infos(self, chunk: str, model: Any) -> Iterator[tuple[str, TensorInfo]]:
        if not isinstance(model, dict) or "language_model" in model:
            raise LongRopeError(
                f"{self.path}: holds a model from before megatron-core's classes; convert it with "
                "the release of Megatron-LM that wrote it (tools/checkpoint, --saver core)"
            )
        for name, value in model.items():
            if "_extra_state" in name:
                continue
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                raise LongRopeError(
                    f"{self.path}: {chunk} holds {name}, which is no plain tensor; quantized "
                    "weights are not supported, save them in bf16 or fp32"
                )
            yield name, TensorInfo(tuple(value.shape), value.dtype)


class StoredPart:
    """A tensor in a rank's file, or some of its rows."""

    def __init__(
        self, file: RankFile, chunk: str, name: str, span: tuple[int, int] | None = None
    ) -> None:
        self._file, self._chunk, self._name, self._span = file, chunk, name, span
        self.info = file.chunks[chunk][name]
        if span is not None:
            shape = (span[1] - span[0], *self.info.shape[1:])
            self.info = TensorInfo(shape, self.info.dtype)

    def rows(self, start: int, stop: int) -> StoredPart:
        """Its rows from `start` up to `stop`."""
        return StoredPart(self._file, self._chunk, self._name, (start, stop))

    def read_into(self, target: Tensor) -> None:
        """Copy it out of the file."""
        value = self._file.models[self._chunk][self._name]
        target.copy_(value if self._span is None else value[slice(*self._span)])
