"""Convert a Megatron checkpoint to a Hugging Face folder; all of it appears or nothing does."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_longrope import __version__
from megatron_longrope.checkpoint import MegatronCheckpoint, ModelShape
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.conversion.card import model_card
from megatron_longrope.conversion.families import dtype_name, select_family, to_hf_config
from megatron_longrope.conversion.safetensors_writer import write_safetensors
from megatron_longrope.conversion.tensors import TensorSource
from megatron_longrope.conversion.tokenizer import TokenizerInfo, write_tokenizer
from megatron_longrope.files import write_json_atomic, write_text_atomic

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ConversionReport:
    """What was written."""

    output_dir: Path
    """The Hugging Face folder."""

    family: str
    """`model_type` in config.json."""

    dtype: str
    """Dtype in config.json."""

    num_tensors: int
    """Tensors written."""

    num_bytes: int
    """Bytes of tensor data."""

    files: tuple[str, ...]
    """Names of the safetensors files."""

    vocab_size: int
    """Rows of the embedding, padding removed."""

    max_position_embeddings: int
    """Window, in tokens."""

    verification: Any = None
    """What the `check` returned."""


def convert_to_hf(
    checkpoint_path: str | Path,
    output_dir: str | Path,
    *,
    longrope_config: LongRopeConfig | None,
    iteration: int | None = None,
    tokenizer: str | Path | None = None,
    short_length: int | None = None,
    target_length: int | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    check: Callable[[Path], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write `config.json`, safetensors, tokenizer, model card and `longrope.json`.

    Everything goes to a temporary sibling of `output_dir`, which takes its name at the very end.

    Args:
        checkpoint_path (str | Path): Megatron's `--save` directory or an `iter_XXXXXXX` in it.
        longrope_config (LongRopeConfig, optional): Factors to export; None writes plain RoPE.
        iteration (int, optional): Iteration to convert. Defaults to the latest.
        tokenizer (str | Path, optional): SentencePiece `.model` or Hugging Face folder.
        short_length (int, optional): Window, in tokens, whose factor set becomes short_factor.
            Defaults to the original window.
        target_length (int, optional): Window, in tokens, whose set becomes long_factor. Defaults
            to the largest.
        dtype (torch.dtype, optional): Dtype to convert to. Defaults to the one on disk.
        family (str, optional): One of :data:`.families.FAMILIES`. Defaults to the one the
            checkpoint was imported from, else the first that fits.
        max_shard_bytes (int): Largest safetensors file.
        overwrite (bool): Replace an existing folder (once the new one is complete).
        check (Callable, optional): Called with the temporary folder before it is put in place;
            an exception leaves nothing behind.
        progress (Callable, optional): Called with bytes written and bytes in all.

    Raises:
        ValueError: The checkpoint, the configuration or the tokenizer does not fit.
    """
    output_dir = Path(output_dir)
    if not overwrite and output_dir.exists() and not _is_empty_directory(output_dir):
        raise ValueError(f"{output_dir} exists already; give another --output or --overwrite")
    checkpoint = MegatronCheckpoint.open(checkpoint_path, iteration)
    shape = checkpoint.shape
    chosen = select_family(shape, checkpoint.args, family)
    if longrope_config is not None:
        check_fits(longrope_config, shape)
    elif short_length or target_length:
        raise ValueError("short_length and target_length need a longrope configuration")
    dtype_name(dtype or shape.params_dtype)  # refuses others before any work

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output_dir.parent, prefix=f".{output_dir.name}."))
    try:
        longest = target_length or (
            longrope_config.max_length if longrope_config else shape.max_position_embeddings
        )
        info = write_tokenizer(tokenizer, temporary, longest)
        shape = _with_true_vocabulary(shape, checkpoint, info)
        source = TensorSource(checkpoint, chosen, shape, dtype)
        embedding_dtype = source.plan[0].dtype
        hf_config = to_hf_config(shape, chosen, dtype or embedding_dtype)
        if longrope_config is not None:
            hf_config.update(longrope_config.to_hf(short_length, target_length))
            longrope_config.save(temporary / "longrope.json")
        special = {
            "bos_token_id": info.bos_token_id,
            "eos_token_id": info.eos_token_id,
            "pad_token_id": info.pad_token_id,
        }
        write_json_atomic(temporary / "config.json", {**hf_config, **special})
        write_json_atomic(temporary / "generation_config.json", special)
        card = model_card(
            name=output_dir.name,
            hf_config=hf_config,
            longrope_config=longrope_config,
            short_length=short_length,
            target_length=target_length,
            iteration=checkpoint.iteration,
            version=__version__,
            has_tokenizer=tokenizer is not None,
        )
        write_text_atomic(temporary / "README.md", card)
        files = write_safetensors(temporary, source.plan, source.load, max_shard_bytes, progress)
        verification = None if check is None else check(temporary)
        _put_in_place(temporary, output_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return ConversionReport(
        output_dir=output_dir,
        family=chosen.name,
        dtype=hf_config["dtype"],
        num_tensors=len(source.plan),
        num_bytes=sum(item.num_bytes for item in source.plan),
        files=tuple(files),
        vocab_size=shape.vocab_size,
        max_position_embeddings=hf_config["max_position_embeddings"],
        verification=verification,
    )


def check_fits(longrope_config: LongRopeConfig, shape: ModelShape) -> None:
    """Refuse factors that belong to another model.

    Raises:
        ValueError: rotary_dim or rotary_base differ.
    """
    for name in ("rotary_dim", "rotary_base"):
        ours, theirs = getattr(longrope_config, name), getattr(shape, name)
        if ours != theirs:
            raise ValueError(
                f"the longrope configuration has {name} {ours:g}, the model has {theirs:g}; "
                "the factors were made for another model"
            )


def _with_true_vocabulary(
    shape: ModelShape, checkpoint: MegatronCheckpoint, info: TokenizerInfo
) -> ModelShape:
    stored = getattr(checkpoint.args, "vocab_size", None)
    if info.vocab_size is None:
        return shape
    if stored is not None and info.vocab_size > stored:
        raise ValueError(
            f"the tokenizer has {info.vocab_size} tokens, the model's vocabulary {stored}; "
            "it is not the one the model was trained with"
        )
    # Megatron stores --vocab-size only where the user gave it; the tokenizer knows otherwise.
    return replace(shape, vocab_size=stored or info.vocab_size)


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _put_in_place(temporary: Path, output_dir: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)  # mkdtemp gave 0700
    if not output_dir.exists():
        temporary.rename(output_dir)
        return
    aside = Path(tempfile.mkdtemp(dir=output_dir.parent, prefix=f".{output_dir.name}.old."))
    output_dir.rename(aside / output_dir.name)
    try:
        temporary.rename(output_dir)
    except BaseException:
        (aside / output_dir.name).rename(output_dir)
        raise
    finally:
        if output_dir.exists():
            shutil.rmtree(aside, ignore_errors=True)
