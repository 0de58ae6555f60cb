"""Convert a Hugging Face folder to a Megatron checkpoint; all of it appears or nothing does."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longrope import __version__
from megatron_longrope.checkpoint.hf.finite import check_finite
from megatron_longrope.checkpoint.hf.folder import HfFolder
from megatron_longrope.checkpoint.hf.source import HfSource, StoredTensor, open_folder, read_model
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.conversion.companions import keep_companions
from megatron_longrope.conversion.megatron_args import (
    flags_beside_checkpoint_args,
    megatron_flags,
    padded_vocab_size,
    stored_arguments,
)
from megatron_longrope.conversion.megatron_writer import TensorChunk, write_release
from megatron_longrope.conversion.staging import (
    MAX_SHARD_BYTES,
    check_apart,
    file_identity,
    output_folder,
    staging_folder,
)

_LONGROPE_FILE = "longrope.json"


@dataclass(frozen=True)
class ImportReport:
    """What was written."""

    output_dir: Path
    """Megatron's `--load` directory."""
    family: str
    """`model_type` in config.json."""
    shape: ModelShape
    """The model."""
    longrope_config: LongRopeConfig | None
    """Factors that config.json states."""
    dropped_window: int | None
    """Sliding window, in tokens, that the model lost (`sliding_window="drop"`)."""
    num_tensors: int
    """Tensors read."""
    num_bytes: int
    """Bytes of tensor data written."""
    left_out: tuple[str, ...]
    """Tensors that Megatron does not store because others determine them."""
    args: argparse.Namespace
    """The model's arguments, as Megatron finds them in the checkpoint."""
    verification: Any = None
    """What the `check` returned."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Megatron flags that build the model, in lines."""
        return tuple(megatron_flags(self.args))

    @property
    def flags_beside_checkpoint_args(self) -> tuple[str, ...]:
        """Those that `--use-checkpoint-args` does not restore."""
        return tuple(flags_beside_checkpoint_args(self.args))


def write_checkpoint(
    hf_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    make_vocab_size_divisible_by: int = 128,
    tensor_model_parallel_size: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    sliding_window: str = "refuse",
    check: Callable[[Path], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Write a torch_dist checkpoint that Megatron's `--load` takes at any parallel layout.

    Everything goes to a staging folder beside `output_dir`, and takes its name at the very end. The
    same call continues what an interrupted one left there; see :mod:`.staging`.

    The options are those of :class:`.options.FromHfOptions`.

    Args:
        max_shard_bytes (int): Largest file, unless a single tensor is larger.
        check (Callable, optional): Called with the finished directory before it is put in place.
        progress (Callable, optional): Called with bytes written and bytes in all.

    Raises:
        LongRopeError: The folder is damaged, or holds a model that is not supported; the disk is
            full.
    """
    output_dir = output_folder(output_dir, "give another --output")
    check_apart(output_dir, [hf_dir])
    folder = open_folder(hf_dir, sliding_window)
    family, shape, longrope_config = read_model(folder)
    rows = padded_vocab_size(
        shape.vocab_size, make_vocab_size_divisible_by, tensor_model_parallel_size
    )
    source = HfSource(folder, family, replace(shape, padded_vocab_size=rows), dtype)
    vocabulary = {
        rule.disk: rule.hf[0] for rule in family.tensor_rules(source.shape) if rule.split == "vocab"
    }
    # An embedding is the largest tensor by far: some rows at a time.
    plan = [replace(item, in_blocks=item.name in vocabulary) for item in source.plan]
    args = stored_arguments(
        source.shape,
        family=family.name,
        tokenizer=folder.directory,
        divisible_by=make_vocab_size_divisible_by,
        tensor_parallel=tensor_model_parallel_size,
        longrope_config=longrope_config,
        longrope_path=output_dir / _LONGROPE_FILE,
        dropped_window=folder.dropped_window,
    )
    identity = _identity(folder, plan, max_shard_bytes, sliding_window)
    with staging_folder(output_dir, identity) as staging:
        load = _loader(source, folder, vocabulary, shape.vocab_size)
        common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}  # qkv group by group
        write_release(staging, plan, load, common, progress, max_shard_bytes)
        if longrope_config is not None:
            longrope_config.save(staging.result / _LONGROPE_FILE)
        keep_companions(folder.directory, staging.result)
        verification = None if check is None else check(staging.result)
        staging.put_in_place()
    return ImportReport(
        output_dir=output_dir,
        family=family.name,
        shape=source.shape,
        longrope_config=longrope_config,
        dropped_window=folder.dropped_window,
        num_tensors=len(folder.tensors) - len(source.left_out),
        num_bytes=sum(item.num_bytes for item in source.plan),
        left_out=source.left_out,
        args=args,
        verification=verification,
    )


def _identity(
    folder: HfFolder, plan: Sequence[StoredTensor], max_shard_bytes: int, sliding_window: str
) -> dict[str, Any]:
    """Return what an interrupted conversion must agree on to be continued."""
    files = [folder.directory / "config.json", *folder.directory.glob("*.safetensors*")]
    return {
        "version": __version__,
        "conversion": "from-hf",
        "source": file_identity(files),
        "tensors": [repr(item) for item in plan],
        "max_shard_bytes": max_shard_bytes,
        "sliding_window": sliding_window,
    }


def _loader(
    source: HfSource, folder: HfFolder, vocabulary: Mapping[str, str], vocab_size: int
) -> Callable[[TensorChunk], Tensor]:
    """Loads chunks of a checkpoint; `vocabulary` names what comes some rows at a time."""

    def load(chunk: TensorChunk) -> Tensor:
        name = vocabulary.get(chunk.tensor.name)
        if name is None:
            return source.load(chunk.tensor.name, chunk.layer)
        return _vocabulary_rows(folder, name, chunk, vocab_size)

    return load


def _vocabulary_rows(folder: HfFolder, name: str, chunk: TensorChunk, vocab_size: int) -> Tensor:
    """Some rows of an embedding; those beyond the vocabulary are zero."""
    value = folder.rows(name, chunk.start, max(chunk.start, min(chunk.stop, vocab_size)))
    check_finite(f"{folder.directory}: tensor {name}", value, chunk.tensor.dtype)
    value = value.to(chunk.tensor.dtype)
    padding = chunk.stop - chunk.start - len(value)
    if padding == 0:
        return value
    return torch.cat([value, value.new_zeros(padding, *value.shape[1:])])
