"""Checkpoints that hold each layer apart, read as torch_dist would hold them: stacked.

What a name of torch_dist stands for is a :class:`LazyTensor`: a stored tensor, or a :class:`Joined`
or :class:`Stacked` set of them. Nothing is read before :meth:`LazyTensor.read_into`, and that reads
right into its place, so that peak memory is the tensor that was asked for.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from megatron_longrope.checkpoint.layout import LAYER, disk_name
from megatron_longrope.checkpoint.reader import MegatronCheckpoint, TensorInfo
from megatron_longrope.errors import LongRopeError

# A layer's experts are numbered by one of two classes of megatron-core; torch_dist stacks them.
_EXPERTS = (
    re.compile(r"(?P<head>.*mlp\.experts)\.local_experts\.(?P<number>\d+)\.(?P<tail>.+)"),
    re.compile(r"(?P<head>.*mlp\.experts)\.(?P<tail>linear_fc[12]\.(weight|bias))(?P<number>\d+)"),
)
_OUTPUT_LAYER = "output_layer.weight"


class LazyTensor(Protocol):
    """A tensor on disk that has not been read, or several that make up one."""

    @property
    def info(self) -> TensorInfo:
        """Its shape and dtype."""

    def read_into(self, target: Tensor) -> None:
        """Fill `target`, which has its shape and dtype."""


class Joined:
    """Tensors side by side along one dimension."""

    def __init__(self, name: str, parts: Sequence[LazyTensor], dim: int) -> None:
        """Check that the parts fit.

        Args:
            name (str): Of the whole, for messages.

        Raises:
            LongRopeError: They differ in dtype or along another dimension.
        """
        self._parts, self._dim = parts, dim
        first = parts[0].info
        others = [
            (*item.info.shape[:dim], *item.info.shape[dim + 1 :], item.info.dtype) for item in parts
        ]
        if any(other != others[0] for other in others) or len(first.shape) <= dim:
            raise LongRopeError(
                f"the parts of {name} do not fit together along dimension {dim}: "
                f"{_told(item.info for item in parts)}"
            )
        length = sum(item.info.shape[dim] for item in parts)
        self.info = TensorInfo((*first.shape[:dim], length, *first.shape[dim + 1 :]), first.dtype)

    def read_into(self, target: Tensor) -> None:
        """Fill `target` part by part."""
        start = 0
        for item in self._parts:
            length = item.info.shape[self._dim]
            item.read_into(target.narrow(self._dim, start, length))
            start += length


class Stacked:
    """Tensors of one shape, on a new first dimension."""

    def __init__(self, name: str, parts: Sequence[LazyTensor], what: str) -> None:
        """Check that the parts are alike.

        Args:
            name (str): Of the whole, for messages.
            what (str): What one of them is: a layer or an expert.

        Raises:
            LongRopeError: They differ in shape or dtype.
        """
        self.parts = parts
        first = parts[0].info
        for index, item in enumerate(parts):
            if item.info != first:
                raise LongRopeError(
                    f"{name} of {what} {index} is {_told([item.info])}, of {what} 0 "
                    f"{_told([first])}; the file is damaged or of another model"
                )
        self.info = TensorInfo((len(parts), *first.shape), first.dtype)

    def read_into(self, target: Tensor) -> None:
        """Fill `target` part by part."""
        for item, view in zip(self.parts, target, strict=True):
            item.read_into(view)


class LayeredCheckpoint(MegatronCheckpoint):
    """A checkpoint whose tensors have layer numbers in their names."""

    @abstractmethod
    def _stored_tensors(self) -> Mapping[str, LazyTensor]:
        """Every tensor of the model by its name in memory, its layer's number counted over all."""

    @cached_property
    def _tensors(self) -> dict[str, LazyTensor]:
        """Every tensor of the model by its name in torch_dist."""
        try:
            tensors = dict(self._stored_tensors())
            if not self.shape.untie_embeddings:
                # The last pipeline stage's copy of the embedding.
                tensors.pop(_OUTPUT_LAYER, None)
            tensors = stack_experts(fuse_norms(tensors))
            self._check_layers(tensors)
            if self.shape.hybrid_layer_pattern is not None:
                return tensors  # layers differ in kind: torch_dist numbers them, too
            return stack_layers(tensors)
        except ValueError as error:
            message = str(error)
            known = message.startswith(str(self.directory))
            raise LongRopeError(message if known else f"{self.directory}: {message}") from None

    def _check_layers(self, names: Iterable[str]) -> None:
        numbers = {int(match[1]) for match in map(LAYER.fullmatch, names) if match}
        pattern = self.shape.hybrid_layer_pattern
        wanted = self.shape.num_layers if pattern is None else len(pattern.partition("/")[0])
        if numbers != set(range(wanted)):
            raise LongRopeError(
                f"holds {len(numbers)} layers, its arguments say {wanted}; files are missing or of "
                "another checkpoint"
            )

    def keys(self) -> dict[str, TensorInfo]:
        """Name -> shape and dtype of every model tensor (no optimizer or extra state)."""
        return {name: tensor.info for name, tensor in self._tensors.items()}

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """Load one tensor to the CPU; see the base class."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise self._no_tensor(name)
        if layer is not None:
            self._check_layer(name, tensor.info.shape, layer)
            if not isinstance(tensor, Stacked):
                return self.tensor(name)[layer]
            tensor = tensor.parts[layer]
        result = torch.empty(tensor.info.shape, dtype=tensor.info.dtype)
        tensor.read_into(result)
        return result


def match_expert(name: str) -> re.Match[str] | None:
    """Find the `number` of an expert in a tensor's name, and what stands around it."""
    return next(filter(None, (pattern.fullmatch(name) for pattern in _EXPERTS)), None)


def stack_experts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Put the experts of each layer into one tensor `[experts, ...]`.

    Raises:
        LongRopeError: Experts are missing or differ.
    """
    result: dict[str, LazyTensor] = {}
    experts: defaultdict[str, dict[int, LazyTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = match_expert(name)
        if match is None:
            result[name] = tensor
        else:
            experts[f"{match['head']}.experts.{match['tail']}"][int(match["number"])] = tensor
    for name, found in experts.items():
        result[name] = Stacked(name, _in_order(name, found, "expert"), "expert")
    return result


def fuse_norms(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Name norms as on disk, where those of the local spec are part of Transformer Engine's layers.

    With Transformer Engine itself a norm of its own, before a router, keeps its name.
    """
    is_local = any(
        name.endswith(".input_layernorm.weight")
        and name.replace("input_layernorm", "self_attention.linear_qkv") in tensors
        for name in tensors
    )
    if not is_local:
        return dict(tensors)
    result = {}
    for name, tensor in tensors.items():
        stacked, number = disk_name(name)
        if number is not None:
            name = f"decoder.layers.{number}.{stacked.removeprefix('decoder.layers.')}"
        result[name] = tensor
    return result


def stack_layers(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Put the layers of each tensor into one tensor `[layers, ...]`.

    Raises:
        LongRopeError: A layer lacks a tensor that others have, or differs in shape.
    """
    result: dict[str, LazyTensor] = {}
    layers: defaultdict[str, dict[int, LazyTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = LAYER.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            layers[f"decoder.layers.{match[2]}"][int(match[1])] = tensor
    count = 1 + max((max(found) for found in layers.values()), default=-1)
    for name, found in layers.items():
        result[name] = Stacked(name, _in_order(name, found, "layer", count), "layer")
    return result


def _in_order(
    name: str, found: Mapping[int, LazyTensor], what: str, count: int | None = None
) -> list[LazyTensor]:
    count = 1 + max(found) if count is None else count
    if missing := [index for index in range(count) if index not in found]:
        raise LongRopeError(
            f"{what} {missing[0]} lacks {name}, which others have; files are missing or of another "
            "checkpoint"
        )
    return [found[index] for index in range(count)]


def _told(infos: Iterable[TensorInfo]) -> str:
    return ", ".join(f"{info.shape} {str(info.dtype).removeprefix('torch.')}" for info in infos)
