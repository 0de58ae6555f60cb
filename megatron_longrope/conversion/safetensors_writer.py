"""Write sharded safetensors tensor by tensor; `safetensors.torch.save_file` wants a whole shard.

The format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes
back to back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_longrope.conversion.staging import in_shards
from megatron_longrope.conversion.tensors import PlannedTensor
from megatron_longrope.files import atomic_file, write_json_atomic

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_safetensors(
    directory: Path,
    plan: list[PlannedTensor],
    load: Callable[[PlannedTensor], Tensor],
    max_shard_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write every planned tensor, with an index when one file does not hold them all.

    A file that is there already is the work of an earlier run of the same conversion; it is kept.

    Gives the names of the files. `progress` is called with bytes done and bytes in all; first with
    those that an earlier run wrote.
    """
    shards = in_shards(plan, max_shard_bytes)
    for shard in shards:
        # Wide dtypes first keep every tensor aligned; the sort is stable.
        shard.sort(key=lambda item: -item.dtype.itemsize)
    total = sum(item.num_bytes for item in plan)
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    missing = [
        (directory / name, shard)
        for name, shard in zip(names, shards, strict=True)
        if not _is_complete(directory / name, shard)
    ]
    done = total - sum(item.num_bytes for _, shard in missing for item in shard)
    if progress is not None:
        progress(done, total)
    for path, shard in missing:
        with atomic_file(path) as file:
            file.write(_header(shard))
            for item in shard:
                value = load(item)
                if tuple(value.shape) != item.shape or value.dtype != item.dtype:
                    raise RuntimeError(f"{item.name} is not as planned; report this as a bug")
                file.write(value.view(torch.uint8).numpy().data)
                del value  # else the next tensor is loaded beside it
                done += item.num_bytes
                if progress is not None:
                    progress(done, total)
    if count > 1:
        weight_map = {
            item.name: name for name, shard in zip(names, shards, strict=True) for item in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json_atomic(directory / "model.safetensors.index.json", index)
    return names


def _is_complete(path: Path, shard: list[PlannedTensor]) -> bool:
    """Whether a file holds these tensors; its name alone says that it was written to its end."""
    header = _header(shard)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        same = file.read(len(header)) == header
    return same and path.stat().st_size == len(header) + sum(item.num_bytes for item in shard)


def _header(shard: list[PlannedTensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in shard:
        end = offset + item.num_bytes
        header[item.name] = {
            "dtype": _DTYPES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
