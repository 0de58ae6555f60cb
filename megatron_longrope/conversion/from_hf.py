"""Convert a Hugging Face folder to a Megatron checkpoint; all of it appears or nothing does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longrope import __version__
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.conversion.companions import keep_companions
from megatron_longrope.conversion.families import FAMILIES, Family, shape_from_hf_config
from megatron_longrope.conversion.finite import check_finite
from megatron_longrope.conversion.hf_reader import HfFolder
from megatron_longrope.conversion.limits import without_sliding_window
from megatron_longrope.conversion.megatron_args import (
    flags_beside_checkpoint_args,
    megatron_flags,
    padded_vocab_size,
    stored_arguments,
)
from megatron_longrope.conversion.megatron_writer import (
    MAX_SHARD_BYTES,
    Piece,
    StoredTensor,
    write_release,
)
from megatron_longrope.conversion.rules import EMBEDDING, OUTPUT_LAYER, TensorRule, dimensions
from megatron_longrope.conversion.tensors import join, part_rows
from megatron_longrope.conversion.work import file_identity, work_folder
from megatron_longrope.errors import LongRopeError
from megatron_longrope.hf_rope import read_hf_rope

SLIDING_WINDOW = ("refuse", "drop", "keep")
"""What to do about a sliding window that a model declares."""

_LONGROPE_FILE = "longrope.json"
# Older exports store the frequencies, which every implementation computes from rope_theta.
_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


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

    flags: tuple[str, ...]
    """Megatron flags that build the model, in lines."""

    flags_beside_checkpoint_args: tuple[str, ...]
    """Those that `--use-checkpoint-args` does not restore."""

    verification: Any = None
    """What the `check` returned."""

    resumed: bool = False
    """Whether an interrupted conversion was continued."""


def convert_from_hf(
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

    Everything goes to a work folder beside `output_dir`, and takes its name at the very end. What
    an interrupted call left there the same call continues; see :mod:`.work`.

    Args:
        hf_dir (str | Path): Folder with config.json and safetensors.
        output_dir (str | Path): Directory to write; must not exist or be empty.
        dtype (torch.dtype, optional): Dtype to convert to. Defaults to each tensor's own.
        make_vocab_size_divisible_by (int): With the next, what the vocabulary is padded to.
        tensor_model_parallel_size (int): Largest tensor parallel size to pad the vocabulary for.
        max_shard_bytes (int): Largest file, unless a single tensor is larger.
        sliding_window (str): See :func:`open_folder`.
        check (Callable, optional): Called with the finished directory before it is put in place;
            an exception leaves nothing behind.
        progress (Callable, optional): Called with bytes written and bytes in all; first with those
            that an interrupted call wrote.

    Raises:
        LongRopeError: The folder is damaged, or holds a model that is not supported; the disk is
            full.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise LongRopeError(f"{output_dir} exists already; give another --output")
    folder = open_folder(hf_dir, sliding_window)
    family, shape, longrope_config = read_model(folder)
    rows = padded_vocab_size(
        shape.vocab_size, make_vocab_size_divisible_by, tensor_model_parallel_size
    )
    source = HfSource(folder, family, replace(shape, padded_vocab_size=rows), dtype)
    vocabulary = {
        rule.disk: rule.hf[0] for rule in family.tensor_rules(source.shape) if rule.split == "vocab"
    }
    plan = [replace(item, in_blocks=item.name in vocabulary) for item in source.plan]
    longrope_path = output_dir.resolve() / _LONGROPE_FILE
    args = stored_arguments(
        source.shape,
        family=family.name,
        tokenizer=folder.directory,
        divisible_by=make_vocab_size_divisible_by,
        tensor_parallel=tensor_model_parallel_size,
        longrope_config=longrope_config,
        longrope_path=longrope_path if longrope_config else None,
    )
    args.longrope_dropped_sliding_window = folder.dropped_window
    files = [folder.directory / "config.json", *folder.directory.glob("*.safetensors*")]
    identity = {
        "version": __version__,
        "conversion": "from-hf",
        "source": file_identity(files),
        "tensors": [repr(item) for item in plan],
        "max_shard_bytes": max_shard_bytes,
        "sliding_window": sliding_window,
    }
    with work_folder(output_dir, identity) as (work, resumed):
        work.check_space(sum(item.num_bytes for item in plan))
        write_release(
            work.result,
            plan,
            _loader(source, folder, vocabulary, shape.vocab_size),
            {"args": args, "checkpoint_version": 3.0, "iteration": 0},
            progress,
            records=work.shards,
            max_shard_bytes=max_shard_bytes,
        )
        if longrope_config is not None:
            longrope_config.save(work.result / _LONGROPE_FILE)
        keep_companions(folder.directory, work.result)
        verification = None if check is None else check(work.result)
        work.put_in_place()
    return ImportReport(
        output_dir=output_dir,
        family=family.name,
        shape=source.shape,
        longrope_config=longrope_config,
        dropped_window=folder.dropped_window,
        num_tensors=len(folder.tensors) - len(source.left_out),
        num_bytes=sum(item.num_bytes for item in source.plan),
        left_out=source.left_out,
        flags=tuple(megatron_flags(args)),
        flags_beside_checkpoint_args=tuple(flags_beside_checkpoint_args(args)),
        verification=verification,
        resumed=resumed,
    )


def _loader(
    source: HfSource, folder: HfFolder, vocabulary: Mapping[str, str], vocab_size: int
) -> Callable[[Piece], Tensor]:
    """Loads pieces of a checkpoint; `vocabulary` names what comes some rows at a time."""

    def load(piece: Piece) -> Tensor:
        name = vocabulary.get(piece.tensor.name)
        if name is None:
            return source.load(piece.tensor.name, piece.layer)
        return _vocabulary_rows(folder, name, piece, vocab_size)

    return load


def _vocabulary_rows(folder: HfFolder, name: str, piece: Piece, vocab_size: int) -> Tensor:
    """Some rows of an embedding; those beyond the vocabulary are zero."""
    value = folder.rows(name, piece.start, max(piece.start, min(piece.stop, vocab_size)))
    check_finite(f"{folder.directory}: tensor {name}", value, piece.tensor.dtype)
    value = value.to(piece.tensor.dtype)
    padding = piece.stop - piece.start - len(value)
    if padding == 0:
        return value
    return torch.cat([value, value.new_zeros(padding, *value.shape[1:])])


def open_folder(hf_dir: str | Path, sliding_window: str = "refuse") -> HfFolder:
    """Open a Hugging Face folder.

    Args:
        hf_dir (str | Path): The folder.
        sliding_window (str): `refuse` leaves a window in use to be refused. `drop` reads the model
            as if it had none: every token attends to all before it, which it was not trained for.
            LongRoPE's authors use Mistral v0.1 so. `keep` gives every layer Megatron's
            `--window-size`.

    Raises:
        LongRopeError: The folder is damaged, `sliding_window` unknown, or only some of the layers
            have the window that is to be kept.
    """
    if sliding_window not in SLIDING_WINDOW:
        raise LongRopeError(
            f"sliding_window is {sliding_window!r}; it must be one of {', '.join(SLIDING_WINDOW)}"
        )
    folder = HfFolder(hf_dir)
    family = FAMILIES.get(folder.config.get("model_type"))
    wanted = {"num_hidden_layers", "max_position_embeddings"}
    if sliding_window != "refuse" and family is not None and wanted <= folder.config.keys():
        stated = {**family.absent, **folder.config}
        without, window = without_sliding_window(stated)
        if window is not None:
            folder.config = without
        if sliding_window == "drop":
            folder.dropped_window = window
        elif window is not None and "use_sliding_window" in stated:
            raise LongRopeError(
                f"{hf_dir}: a window of {window} tokens in some of the layers is not supported; "
                "drop it with --sliding-window drop"
            )
        else:
            folder.kept_window = window
    return folder


def read_model(folder: HfFolder) -> tuple[Family, ModelShape, LongRopeConfig | None]:
    """What config.json describes."""
    config = folder.config
    try:
        shape = replace(shape_from_hf_config(config), sliding_window=folder.kept_window)
        family = FAMILIES[config["model_type"]]
        if (classes := config.get("architectures")) and family.architecture not in classes:
            raise LongRopeError(
                f"config.json has architectures = {classes!r}; conversion supports "
                f"{family.architecture} of model_type {family.name}"
            )
        if read_hf_rope(config).rope_type == "default":
            return family, shape, None
        longrope_config = LongRopeConfig.from_hf(config, shape.rotary_dim)
    except ValueError as error:
        raise LongRopeError(f"{folder.directory}: {error}") from None
    return family, shape, longrope_config


class HfSource:
    """Plans the tensors of a checkpoint and assembles them one at a time.

    Peak memory is one tensor of one layer (or the embedding) and its parts.

    Args:
        shape (ModelShape): Geometry, with the padded vocabulary to write.
        dtype (torch.dtype, optional): Dtype to convert to. Defaults to each tensor's own.

    Raises:
        LongRopeError: The folder lacks a tensor, holds one too many, or one whose shape or dtype
            does not fit.
    """

    def __init__(
        self, folder: HfFolder, family: Family, shape: ModelShape, dtype: torch.dtype | None = None
    ) -> None:
        self._folder = folder
        self._family = family
        self._dtype = dtype
        self._rules = {
            name: rule for rule in family.tensor_rules(shape) for name in (rule.disk, *rule.also)
        }
        self.shape = shape
        self.left_out = self._check_names()
        self.plan = [self._planned(name, rule) for name, rule in self._rules.items()]
        stored = {item.name: item.dtype for item in self.plan}
        self.shape = replace(shape, params_dtype=stored[EMBEDDING])

    def load(self, name: str, layer: int | None) -> Tensor:
        """A tensor of the plan, or one of its layers."""
        rule = self._rules[name]
        names = [part.format(layer=layer) for part in rule.hf]
        parts = [self._folder.tensor(part) for part in names]
        for part, value in zip(names, parts, strict=True):
            check_finite(f"{self._folder.directory}: tensor {part}", value, self._dtype)
        value = join(parts, rule, self.shape)
        return value if self._dtype is None else value.to(self._dtype)

    def _layers(self, rule: TensorRule) -> list[int | None]:
        return list(range(self.shape.num_layers)) if rule.is_stacked else [None]

    def _check_names(self) -> tuple[str, ...]:
        """Compare the names in the folder with the family's; gives those that are derived."""
        wanted = {
            name.format(layer=layer)
            for rule in self._rules.values()
            for layer in self._layers(rule)
            for name in rule.hf
        }
        head, embedding = OUTPUT_LAYER.hf[0], self._rules[EMBEDDING].hf[0]
        stored = self._folder.tensors.keys() & {head, embedding}
        if head not in wanted and stored == {head}:  # tied, and stored under the other name
            self._folder.rename(head, embedding)
        found = set(self._folder.tensors)
        derived = {name for name in found - wanted if _FREQUENCIES.fullmatch(name)}
        if head in found - wanted and embedding in found:
            if not torch.equal(self._folder.tensor(head), self._folder.tensor(embedding)):
                raise LongRopeError(
                    f"{self._folder.directory}: {head} differs from {embedding}, though "
                    "config.json ties them; set tie_word_embeddings to false there"
                )
            derived.add(head)
        if missing := sorted(wanted - found):
            raise LongRopeError(
                f"{self._folder.directory}: lacks tensor {missing[0]}{_others(missing)}, which a "
                f"{self._family.name} model as in config.json has"
            )
        if unexpected := sorted(found - wanted - derived):
            raise LongRopeError(
                f"{self._folder.directory}: holds tensor {unexpected[0]}{_others(unexpected)}, "
                f"which a {self._family.name} model as in config.json does not have; conversion "
                "leaves nothing out"
            )
        return tuple(sorted(derived))

    def _planned(self, stored_name: str, rule: TensorRule) -> StoredTensor:
        """Check shapes and dtypes of all that a checkpoint's tensor is made of."""
        sizes = dimensions(self.shape)
        rest = tuple(sizes[name] for name in rule.dims[1:])
        columns = rest[1:] if rule.split == "experts" else rest
        layers = self._layers(rule)
        first = rule.hf[0].format(layer=layers[0])
        dtype = self._folder.tensors[first].dtype
        for layer in layers:
            for name, rows in zip(rule.hf, part_rows(rule, self.shape), strict=True):
                name = name.format(layer=layer)
                info = self._folder.tensors[name]
                if info.shape != (rows, *columns):
                    raise LongRopeError(
                        f"{self._folder.directory}: tensor {name} has shape {info.shape}, "
                        f"config.json says {(rows, *columns)}"
                    )
                if self._dtype is None and info.dtype != dtype:
                    raise LongRopeError(
                        f"{self._folder.directory}: tensor {name} is {info.dtype} and {first} "
                        f"{dtype}, which are one tensor in a checkpoint; choose one with --dtype"
                    )
        rows = self.shape.padded_vocab_size if rule.split == "vocab" else sizes[rule.dims[0]]
        return StoredTensor(
            name=stored_name,
            shape=(rows, *rest),
            dtype=self._dtype or dtype,
            num_layers=len(layers) if rule.is_stacked else None,
        )


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
