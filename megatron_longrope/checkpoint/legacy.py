"""Checkpoints of `--ckpt-format torch`: a file for each rank of the run, merged on reading.

`mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` is what the rank with these tensor, pipeline and expert
coordinates held: its part of its layers, numbered from 0 in each chunk. Virtual pipeline stages are
several chunks in a file; chunk v of pipeline rank p is the (v * ranks + p)-th of the model.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_longrope.checkpoint.folders import TORCH
from megatron_longrope.checkpoint.layered import LayeredCheckpoint, LazyTensor, match_expert
from megatron_longrope.checkpoint.layout import LAYER
from megatron_longrope.checkpoint.rank_file import RankFile, StoredPart
from megatron_longrope.checkpoint.tensor_parallel import join_ranks
from megatron_longrope.errors import LongRopeError

_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_FILE = "model_optim_rng.pt"
# Before this version the rows of qkv had another order.
_OLDEST_VERSION = 2.0

Coordinates = tuple[int, int, int]


class LegacyCheckpoint(LayeredCheckpoint):
    """One iteration in the format `torch`.

    Opening it reads the arguments of the first rank. Tensors are mapped into memory, not loaded:
    what stays is the tensor that is asked for, and pages that the system may drop.
    """

    format = TORCH

    def __init__(self, directory: Path) -> None:
        """Look for the ranks' files.

        Raises:
            LongRopeError: One is missing, truncated, or too many for the run that wrote the others.
        """
        super().__init__(directory)
        folders = {
            path.name: match
            for path in sorted(directory.glob("mp_rank_*"))
            if (match := _FOLDER.fullmatch(path.name))
        }
        if not folders:
            raise LongRopeError(f"{directory}: has no folder named as mp_rank_00 or mp_rank_00_000")
        self._files = {name: RankFile(directory / name / _FILE) for name in folders}
        self._sizes = _Sizes.of_args(self.args)
        self._ranks: dict[Coordinates, RankFile] = {}
        for name, match in folders.items():
            coordinates = self._sizes.coordinates([int(part) for part in match.groups() if part])
            if coordinates is None:
                raise LongRopeError(
                    f"{directory / name}: the run was {self._sizes}, which has no such rank; the "
                    "folder mixes several checkpoints"
                )
            self._ranks[coordinates] = self._files[name]
        if missing := self._sizes.missing(set(self._ranks)):
            raise LongRopeError(
                f"{directory}: the file of {missing} is missing; the run was {self._sizes} and "
                f"there are {', '.join(folders)}"
            )

    @cached_property
    def common(self) -> dict[str, Any]:
        """The non-tensor state of the first rank: `args`, `iteration`, ..."""
        common = next(iter(self._files.values())).common
        if float(common.get("checkpoint_version", 0)) < _OLDEST_VERSION:
            raise LongRopeError(
                f"{self.directory}: checkpoint_version {common.get('checkpoint_version', 0)}; "
                f"versions before {_OLDEST_VERSION} order the rows of qkv otherwise and are not "
                "supported, load and save it once with Megatron"
            )
        return common

    def _stored_tensors(self) -> Mapping[str, LazyTensor]:
        self._check_one_run()
        tensors: dict[str, LazyTensor] = {}
        offset = 0
        for chunk in next(iter(self._files.values())).chunks:
            for pipeline_rank in range(self._sizes.pipeline):
                stage = self._stage(chunk, pipeline_rank)
                numbers = [-1]
                for name, tensor in stage.items():
                    match = LAYER.fullmatch(name)
                    if match is None:
                        # The last stage repeats what it shares with the first.
                        tensors.setdefault(name, tensor)
                        continue
                    numbers.append(int(match[1]))
                    tensors[f"decoder.layers.{offset + numbers[-1]}.{match[2]}"] = tensor
                offset += 1 + max(numbers)
        return tensors

    def _check_one_run(self) -> None:
        first, *others = self._files.values()
        for file in others:
            if (theirs := file.common.get("iteration")) != (ours := first.common.get("iteration")):
                raise LongRopeError(
                    f"{file.path}: is of iteration {theirs}, {first.path.parent.name} of {ours}; "
                    "the folder mixes several checkpoints"
                )
            theirs, ours = (_Sizes.of_args(item.common.get("args")) for item in (file, first))
            if theirs != ours or set(file.chunks) != set(first.chunks):
                raise LongRopeError(
                    f"{file.path}: is of a run that was {theirs} with {len(file.chunks)} chunks, "
                    f"{first.path.parent.name} of one that was {ours} with "
                    f"{len(first.chunks)}; the folder mixes several checkpoints"
                )

    def _stage(self, chunk: str, pipeline_rank: int) -> dict[str, LazyTensor]:
        """Whole tensors of one chunk; layers are numbered as there, experts over all ranks."""
        is_gated, sizes = self.shape.swiglu, self._sizes
        files = [
            (tensor, expert, self._ranks[tensor, pipeline, expert])
            for tensor, pipeline, expert in sorted(self._ranks)
            if pipeline == pipeline_rank
        ]
        # What is no expert is the same on all expert ranks.
        dense = [
            next(file for tensor, _, file in files if tensor == rank)
            for rank in range(sizes.tensor)
        ]
        stage: dict[str, LazyTensor] = {}
        for name in _shared_names(dense, chunk):
            if not match_expert(name):
                parts = [StoredPart(file, chunk, name) for file in dense]
                stage[name] = join_ranks(name, parts, is_gated)
        for rank in range(sizes.expert):
            members = [file for _, expert, file in files if expert == rank]
            if sizes.expert_tensor == 1:
                members = members[:1]  # each of them has its experts whole
            names = {
                name: match
                for name in _shared_names(members, chunk)
                if (match := match_expert(name))
            }
            count = len({match["number"] for match in names.values()})
            for name, match in names.items():
                number = rank * count + int(match["number"])
                before, after = name[: match.start("number")], name[match.end("number") :]
                parts = [StoredPart(file, chunk, name) for file in members]
                stage[f"{before}{number}{after}"] = join_ranks(name, parts, is_gated)
        return stage


@dataclass(frozen=True)
class _Sizes:
    """How many ranks of each kind a run had."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int

    def __str__(self) -> str:
        expert = f" x expert parallel {self.expert}" if self.expert > 1 else ""
        return f"tensor parallel {self.tensor} x pipeline parallel {self.pipeline}{expert}"

    @classmethod
    def of_args(cls, args: argparse.Namespace | None) -> _Sizes:
        def size(name: str, default: int = 1) -> int:
            value = getattr(args, name, None)
            return value if isinstance(value, int) and value > 0 else default

        tensor = size("tensor_model_parallel_size")
        return cls(
            tensor,
            size("pipeline_model_parallel_size"),
            size("expert_model_parallel_size"),
            size("expert_tensor_parallel_size", tensor),
        )

    def coordinates(self, numbers: Sequence[int]) -> Coordinates | None:
        """Tensor, pipeline and expert rank of a folder; None if the run had no such rank."""
        rest = list(numbers[1:])
        pipeline = rest.pop(0) if self.pipeline > 1 and rest else 0
        expert = rest.pop(0) if self.expert > 1 and rest else 0
        fits = numbers[0] < self.tensor and pipeline < self.pipeline and expert < self.expert
        named = len(numbers) == 1 + (self.pipeline > 1) + (self.expert > 1)
        return (numbers[0], pipeline, expert) if fits and named and not rest else None

    def missing(self, present: set[Coordinates]) -> str | None:
        """A rank whose file is needed and not there, in words."""
        if self.expert_tensor not in (1, self.tensor):
            raise LongRopeError(
                f"the run split experts over {self.expert_tensor} of {self.tensor} tensor-parallel "
                "ranks, which is not supported; save it with --ckpt-format torch_dist"
            )
        for pipeline in range(self.pipeline):
            ranks = {(tensor, expert) for tensor, stage, expert in present if stage == pipeline}
            if self.expert_tensor == self.tensor:
                needed = list(itertools.product(range(self.tensor), range(self.expert)))
            else:  # experts that are whole on a rank need not be in the file of each of them
                needed = [(rank, None) for rank in range(self.tensor)]
                needed += [(None, rank) for rank in range(self.expert)]
            for tensor, expert in needed:
                if not any(tensor in (None, t) and expert in (None, e) for t, e in ranks):
                    return self._told(tensor, pipeline, expert)
        return None

    def _told(self, tensor: int | None, pipeline: int, expert: int | None) -> str:
        parts = [] if tensor is None else [f"tensor-parallel rank {tensor}"]
        parts += [f"pipeline rank {pipeline}"] if self.pipeline > 1 else []
        parts += [f"expert rank {expert}"] if self.expert > 1 and expert is not None else []
        return ", ".join(parts)


def _shared_names(files: Sequence[RankFile], chunk: str) -> list[str]:
    """Names of the tensors of a chunk, which all ranks have."""
    first, *others = files
    names = list(first.chunks[chunk])
    for file in others:
        if different := set(names) ^ set(file.chunks[chunk]):
            raise LongRopeError(
                f"{file.path}: {sorted(different)[0]} is in only one of this file and that of "
                f"{first.path.parent.name}; they are of several checkpoints"
            )
    return names
