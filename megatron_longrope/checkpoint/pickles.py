"""Restricted unpickling: a checkpoint is data, and reading one must never run code from it.

Two pickles are met. `.metadata` of torch's distributed checkpoints is a plain pickle of a few torch
dataclasses; `torch.distributed.checkpoint` reads it with `pickle.load`, so it is read here instead.
The common state (`args`, iteration, ...) is a `torch.save` archive, and so is each rank's file of
the format `torch`; they are read with `weights_only=True`. Megatron's enums in them become inert
:class:`Opaque` records, since Megatron need not be installed; so do CUDA's random generators, since
a GPU need not be there.
"""

from __future__ import annotations

import argparse
import enum
import io
import pathlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_longrope.errors import LongRopeError

_METADATA_CLASSES = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    # torch 2.2 and older
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
}

_PATH_CLASSES = {
    f"{module}.{name}": pathlib.PurePosixPath
    for module in ("pathlib", "pathlib._local")  # the second in Python 3.13
    for name in ("PosixPath", "PurePosixPath")
}
# Real classes that plain arguments need.
_ARGUMENT_CLASSES = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": SimpleNamespace,
    **_PATH_CLASSES,
}
# Python 3.11 pickles a member of an enum as a call of it.
_GETATTR = "builtins.getattr"
# Classes met in common state of 0.17 to 0.19 whose values nothing here needs.
_OPAQUE_PREFIXES = ("megatron.", "numpy.", "signal.", "transformer_engine.")
# The second and third are in ranks' files of the format `torch`: Transformer Engine's extra state,
# and the random state of runs with CUDA graphs.
_OPAQUE_CLASSES = (_GETATTR, "_io.BytesIO", "torch._C.Generator")


class Opaque:
    """Stands in for an object of a class that is not imported; keeps what it was made from."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"Opaque{self.arguments}"


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if (path := f"{module}.{name}") in _PATH_CLASSES:
            return _PATH_CLASSES[path]
        if path == _GETATTR:
            return _enum_member
        raise pickle.UnpicklingError(f"class {module}.{name} is not part of checkpoint metadata")


def _enum_member(kind: Any, name: str) -> Any:
    """In place of getattr: a member of an enum by its name, and nothing else."""
    if not isinstance(kind, enum.EnumMeta):
        raise pickle.UnpicklingError(f"{_GETATTR} of {kind!r}, which is not part of metadata")
    return kind[name]


def load_metadata(path: Path) -> Metadata:
    """Read a distributed checkpoint's `.metadata`.

    Raises:
        LongRopeError: The file is damaged or names a class that metadata has no use for.
    """
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise LongRopeError(f"{path}: not readable as checkpoint metadata: {error}") from error
    if not isinstance(metadata, Metadata):
        raise LongRopeError(f"{path}: holds a {type(metadata).__name__}, expected Metadata")
    return metadata


def load_common(data: bytes | Path, where: str) -> dict[str, Any]:
    """Read the common state (`args`, `iteration`, ...) from a `torch.save` archive.

    Args:
        data (bytes | Path): The archive, or the file that it is. Tensors of a file are mapped into
            memory, and read when they are used.
        where (str): What the archive is, for error messages.

    Raises:
        LongRopeError: The archive is damaged or holds an object of a class that is not allowed.
    """
    value = load_object(data, where)
    if isinstance(value, list) and len(value) == 1:  # 0.19 wraps the state as a sharded object
        value = value[0]
    if not isinstance(value, dict):
        raise LongRopeError(f"{where}: holds a {type(value).__name__}, expected a dictionary")
    return value


def load_object(data: bytes | Path, where: str) -> Any:
    """Read whatever a `torch.save` archive holds; arguments and errors as for `load_common`."""
    # Megatron, where it is imported, declares generators safe, and torch would make them on a GPU.
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([x for x in declared if x is not torch._C.Generator])
    try:
        return _load_object(data, where)
    finally:
        torch.serialization.add_safe_globals(declared)


def _load_object(data: bytes | Path, where: str) -> Any:
    def source() -> Any:
        return str(data) if isinstance(data, Path) else io.BytesIO(data)

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source())
    except Exception as error:
        raise LongRopeError(f"{where}: not readable as a torch archive: {_line(error)}") from error
    allowed = []
    for name in names:
        if name in _ARGUMENT_CLASSES:
            allowed.append((_ARGUMENT_CLASSES[name], name))
        elif name in _OPAQUE_CLASSES or name.startswith(_OPAQUE_PREFIXES):
            allowed.append((type("Opaque", (Opaque,), {}), name))
        else:
            raise LongRopeError(
                f"{where}: holds an object of class {name}, which is not one that Megatron stores; "
                "it is not read, since unpickling it could run code"
            )
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(
                source(), map_location="cpu", weights_only=True, mmap=isinstance(data, Path)
            )
    except Exception as error:
        raise LongRopeError(f"{where}: not readable: {_line(error)}") from error


def _line(error: Exception) -> str:
    """What torch found, without its advice to load unsafely, which stands before and after it."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
