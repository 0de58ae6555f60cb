"""The tensors of a Megatron checkpoint, assembled from a Hugging Face folder one at a time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_longrope.checkpoint.hf.families import FAMILIES, Family, shape_from_hf_config
from megatron_longrope.checkpoint.hf.finite import check_finite
from megatron_longrope.checkpoint.hf.folder import HfFolder
from megatron_longrope.checkpoint.hf.limits import without_sliding_window
from megatron_longrope.checkpoint.hf.rules import EMBEDDING, OUTPUT_LAYER, TensorRule, dimensions
from megatron_longrope.checkpoint.hf.splits import join, part_rows
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.errors import LongRopeError
from megatron_longrope.hf_rope import read_hf_rope

SLIDING_WINDOW = ("refuse", "drop", "keep")
"""What to do about a sliding window that a model declares."""

# Older exports store the frequencies, which every implementation computes from rope_theta.
_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to write."""

    name: str
    """Its key."""
    shape: tuple[int, ...]
    """Shape, of one layer if `num_layers` is given."""
    dtype: torch.dtype
    """Its dtype."""
    num_layers: int | None = None
    """Layers that are stacked on dimension 0, or None."""
    in_blocks: bool = False
    """Whether `load` gives some of the rows at a time."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape with the layers, if any."""
        return self.shape if self.num_layers is None else (self.num_layers, *self.shape)

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.full_shape) * self.dtype.itemsize


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
    reads = family is not None and family.has_sliding_window and wanted <= folder.config.keys()
    if sliding_window != "refuse" and reads:
        stated = family.stated(folder.config)
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

    def _check_names(self) -> tuple[str, ...]:
        """Compare the names in the folder with the family's; gives those that are derived."""
        wanted = {
            name.format(layer=layer)
            for rule in self._rules.values()
            for layer in rule.layers(self.shape.num_layers)
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
        layers = rule.layers(self.shape.num_layers)
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
