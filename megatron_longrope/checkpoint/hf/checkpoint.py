"""A Hugging Face folder with the interface of a Megatron checkpoint, converted as it is read."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megatron_longrope.checkpoint.hf.source import HfSource, open_folder, read_model
from megatron_longrope.checkpoint.reader import TensorInfo


class HfCheckpoint:
    """A local folder that the engine loads without a conversion on disk.

    Each tensor is assembled from the folder's safetensors when it is asked for; memory is one
    tensor. It implements :class:`megatron_longrope.checkpoint.loader.Checkpoint`.

    Args:
        directory (str | Path): Folder with config.json and safetensors.
        sliding_window (str): See :func:`.source.open_folder`.

    Raises:
        LongRopeError: The folder is damaged, or holds a model that is not supported.
    """

    iteration = 0

    def __init__(self, directory: str | Path, sliding_window: str = "refuse") -> None:
        folder = open_folder(directory, sliding_window)
        family, shape, self.longrope = read_model(folder)
        self._source = HfSource(folder, family, shape)
        self.shape = self._source.shape
        self.directory = folder.directory

    def keys(self) -> dict[str, TensorInfo]:
        """Name, shape and dtype of every tensor as a Megatron checkpoint would have it."""
        return {item.name: TensorInfo(item.full_shape, item.dtype) for item in self._source.plan}

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """One tensor, or one layer of a tensor stacked over layers, on the CPU."""
        return self._source.load(name, layer)
