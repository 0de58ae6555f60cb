"""Convert a Megatron checkpoint to a Hugging Face folder; all of it appears or nothing does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_longrope import __version__
from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.checkpoint.hf.families import (
    Family,
    dtype_name,
    select_family,
    to_hf_config,
)
from megatron_longrope.checkpoint.opening import check_fits, warn_of_window
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.conversion.card import model_card
from megatron_longrope.conversion.companions import (
    GENERATION_CONFIG,
    companions,
    copy_companions,
    raise_limit,
    special_token_ids,
)
from megatron_longrope.conversion.rope_export import ExportedRope, export_rope, is_bare_base
from megatron_longrope.conversion.safetensors_writer import write_safetensors
from megatron_longrope.conversion.staging import (
    MAX_SHARD_BYTES,
    check_apart,
    file_identity,
    output_folder,
    staging_folder,
)
from megatron_longrope.conversion.start_tokens import drop_start_tokens
from megatron_longrope.conversion.tensors import TensorSource
from megatron_longrope.conversion.tokenizer import (
    TokenizerInfo,
    copy_tokenizer,
    existing_tokenizer,
    write_tokenizer,
)
from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import read_object, write_json_atomic, write_text_atomic


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
    dropped_start_tokens: tuple[str, ...] = ()
    """Sentences about factor sets that were exported without their start tokens."""
    remarks: tuple[str, ...] = ()
    """Sentences about what some readers of the folder cannot do, and what else may surprise."""
    tokenizer: Path | None = None
    """File or folder that the tokenizer was taken from; None if none is included."""


def write_hf_folder(
    checkpoint_path: str | Path,
    output_dir: str | Path,
    *,
    longrope_config: LongRopeConfig | None,
    iteration: int | None = None,
    tokenizer: str | Path | None = None,
    short_length: int | None = None,
    target_length: int | None = None,
    without_start_tokens: bool = False,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    check: Callable[[Path], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write `config.json`, safetensors, tokenizer, model card and `longrope.json`.

    Everything goes to a staging folder beside `output_dir`, and takes its name at the very end. The
    same call continues what an interrupted one left there; see :mod:`.staging`.

    The options are those of :class:`.options.ToHfOptions`.

    Args:
        longrope_config (LongRopeConfig, optional): Factors to export; None writes plain RoPE.
        max_shard_bytes (int): Largest safetensors file.
        check (Callable, optional): Called with the finished folder before it is put in place.
        progress (Callable, optional): Called with bytes written and bytes in all.

    Raises:
        LongRopeError: The checkpoint, the configuration or the tokenizer does not fit; the disk is
            full.
    """
    remedy = None if overwrite else "give another --output or --overwrite"
    output_dir = output_folder(output_dir, remedy)
    tokenizer = None if tokenizer is None else existing_tokenizer(tokenizer)
    checkpoint = MegatronCheckpoint.open(checkpoint_path, iteration)
    beside = companions(tokenizer, checkpoint.directory)
    check_apart(output_dir, [checkpoint_path, checkpoint.directory, tokenizer, beside])
    chosen = select_family(checkpoint.shape, checkpoint.args, family)
    dtype_name(dtype or checkpoint.shape.params_dtype)  # refuses others before any work
    lengths = short_length, target_length
    factors = Factors.of(checkpoint, chosen, longrope_config, lengths, without_start_tokens)
    files = tokenizer or beside
    # What an interrupted conversion must agree on to be continued.
    identity = {
        "version": __version__,
        "conversion": "to-hf",
        "source": file_identity([checkpoint.directory]),
        "tokenizer": file_identity([] if files is None else [files]),
        "longrope": None if factors.config is None else factors.config.to_dict(),
        "lengths": list(factors.lengths),
        "dtype": str(dtype),
        "family": chosen.name,
        "max_shard_bytes": max_shard_bytes,
    }
    with staging_folder(output_dir, identity, overwrite) as staging:
        source, hf_config, included, padded = _write_small_files(
            staging.result, output_dir.name, checkpoint, chosen, factors, dtype, tokenizer, beside
        )
        staging.check_space(num_bytes := sum(item.num_bytes for item in source.plan))
        files = write_safetensors(
            staging.result, source.plan, source.load, max_shard_bytes, progress
        )
        verification = None if check is None else check(staging.result)
        staging.put_in_place()
    return ConversionReport(
        output_dir=output_dir,
        family=chosen.name,
        dtype=hf_config["dtype"],
        num_tensors=len(source.plan),
        num_bytes=num_bytes,
        files=tuple(files),
        vocab_size=hf_config["vocab_size"],
        max_position_embeddings=hf_config["max_position_embeddings"],
        verification=verification,
        dropped_start_tokens=factors.dropped,
        remarks=(*factors.remarks, *padded),
        tokenizer=included,
    )


@dataclass(frozen=True)
class Factors:
    """What an export has instead of plain RoPE."""

    config: LongRopeConfig | None
    """As exported; None for plain RoPE."""
    lengths: tuple[int | None, int | None] = (None, None)
    """Windows whose sets become short_factor and long_factor, as asked for."""
    rope: ExportedRope | None = None
    """How transformers is told."""
    dropped: tuple[str, ...] = ()
    """Sentences about sets that lost their start tokens."""
    remarks: tuple[str, ...] = ()
    """Sentences about them."""

    @classmethod
    def of(
        cls,
        checkpoint: MegatronCheckpoint,
        family: Family,
        config: LongRopeConfig | None,
        lengths: tuple[int | None, int | None],
        without_start_tokens: bool,
    ) -> Factors:
        """Check the factors and drop their start tokens where that is asked for."""
        if config is None and checkpoint.longrope is not None:
            # Plain RoPE would be another model where the base is scaled.
            config = checkpoint.longrope if is_bare_base(checkpoint.longrope) else None
        if config is None:
            return cls(None)
        check_fits(config, checkpoint.shape, checkpoint.longrope)
        warn_of_window(config, "the longrope configuration", checkpoint)
        remarks = _remark_on_tuning(config, checkpoint.longrope, lengths[1] or config.max_length)
        dropped: tuple[str, ...] = ()
        if without_start_tokens:
            config, dropped = drop_start_tokens(config, *lengths)
        rope = export_rope(config, family, *lengths)
        return cls(config, lengths, rope, dropped, (*remarks, *rope.remarks))

    @property
    def window(self) -> int | None:
        """Longest window, in tokens; None for plain RoPE."""
        return self.config and (self.lengths[1] or self.config.max_length)


def _remark_on_tuning(
    config: LongRopeConfig, tuned: LongRopeConfig | None, longest: int
) -> tuple[str, ...]:
    """Say that a checkpoint was tuned with other factors than are exported.

    A second search keeps the tuned set, adds others and, for a longer window, chooses another
    attention factor: no remark.

    Args:
        config (LongRopeConfig): What is exported.
        tuned (LongRopeConfig, optional): What the checkpoint carries.
        longest (int): Window, in tokens, that the export has.
    """
    if tuned is None or tuned.is_bare:
        return ()
    window = tuned.max_length
    if window > config.max_length:
        other = ["factors"]
    else:
        ours, theirs = config.factor_set_for(window), tuned.factor_set_for(window)
        pairs = zip(config.plain_factors(ours), tuned.plain_factors(theirs), strict=True)
        values = config.attention_factor_for(window), tuned.attention_factor_for(window)
        same = {
            "factors": all(math.isclose(*pair, rel_tol=1e-6) for pair in pairs),
            "start tokens": ours.effective_start_tokens == theirs.effective_start_tokens,
            "attention factor": longest > window or math.isclose(*values, rel_tol=1e-6),
        }
        other = [name for name, alike in same.items() if not alike]
    if not other:
        return ()
    return (
        f"the {' and '.join(other)} for {window} tokens are not those that the checkpoint was "
        "tuned with; `longrope factors diff` shows both, and without --longrope-config the "
        "checkpoint's are exported",
    )


def _write_small_files(
    directory: Path,
    name: str,
    checkpoint: MegatronCheckpoint,
    family: Family,
    factors: Factors,
    dtype: torch.dtype | None,
    tokenizer: Path | None,
    beside: Path | None,
) -> tuple[TensorSource, dict[str, Any], Path | None, tuple[str, ...]]:
    """Write all but the tensors.

    Args:
        directory (Path): The folder.
        name (str): What it will be called.
        dtype (torch.dtype, optional): What tensors are converted to; None keeps their own.
        beside (Path, optional): Folder whose companions are taken along, from :func:`companions`.

    Returns:
        tuple: Where the tensors come from, the content of config.json without token ids, where the
        tokenizer comes from, and a sentence where padding may be exported.
    """
    longest = factors.window or checkpoint.shape.max_position_embeddings
    info = write_tokenizer(tokenizer, directory, longest)
    included = tokenizer
    if included is None and beside is not None and copy_tokenizer(beside, directory, longest):
        included = beside
    rows, remarks = true_vocabulary(checkpoint, info, beside), ()
    if rows is None:
        rows = checkpoint.shape.vocab_size
        remarks = (
            f"nothing says how many of the embedding's {rows} rows are padding, so all are "
            "exported; give --tokenizer to leave it out",
        )
    elif info.vocab_size is None and (cut := checkpoint.shape.vocab_size - rows) > 0:
        remarks = (
            f"{cut} rows of the embedding are left out as padding, as config.json beside the "
            "checkpoint has it; if tokens were added in training, give --tokenizer",
        )
    shape = replace(checkpoint.shape, vocab_size=rows)
    source = TensorSource(checkpoint, family, shape, dtype)
    dtype = dtype or source.plan[0].dtype
    hf_config = to_hf_config(shape, family, dtype, factors.rope and factors.rope.keys)
    _write_configs(directory, hf_config, info, beside, factors.config)
    card = model_card(
        name,
        hf_config,
        factors,
        iteration=checkpoint.iteration,
        has_tokenizer=included is not None,
        dropped_window=getattr(checkpoint.args, "longrope_dropped_sliding_window", None),
    )
    write_text_atomic(directory / "README.md", card)
    return source, hf_config, included, remarks


def _write_configs(
    directory: Path,
    hf_config: dict[str, Any],
    info: TokenizerInfo,
    beside: Path | None,
    longrope_config: LongRopeConfig | None,
) -> None:
    """The JSON files of the folder."""
    own = {
        "bos_token_id": info.bos_token_id,
        "eos_token_id": info.eos_token_id,
        "pad_token_id": info.pad_token_id,
    }
    special = special_token_ids(beside, own)
    write_json_atomic(directory / "config.json", {**hf_config, **special})
    if beside is None or not copy_companions(beside, directory, (GENERATION_CONFIG,)):
        write_json_atomic(directory / GENERATION_CONFIG, special)
    window = hf_config["max_position_embeddings"]
    raise_limit(directory / GENERATION_CONFIG, "max_length", window)
    if longrope_config is not None:
        longrope_config.save(directory / "longrope.json")


def true_vocabulary(
    checkpoint: MegatronCheckpoint, info: TokenizerInfo, beside: Path | None = None
) -> int | None:
    """Return how many rows of the embedding the model was trained with, padding left out.

    Args:
        beside (Path, optional): Folder whose config.json may say it, from :func:`companions`: a
            model may have more rows than tokens.

    Returns:
        int | None: The rows; None where nothing says it.

    Raises:
        LongRopeError: The tokenizer has more tokens.
    """
    shape, tokens = checkpoint.shape, info.vocab_size or 0
    if getattr(checkpoint.args, "vocab_size", None) is not None:
        if tokens > shape.vocab_size:
            raise LongRopeError(
                f"the tokenizer has {tokens} tokens, the model's vocabulary {shape.vocab_size}; "
                "it is not the one the model was trained with"
            )
        return shape.vocab_size
    if tokens > shape.padded_vocab_size:
        raise LongRopeError(
            f"the tokenizer has ids up to {tokens - 1}, the model's embedding "
            f"{shape.padded_vocab_size} rows; it is not the one the model was trained with"
        )
    # Megatron stores --vocab-size only where the user gave it.
    config = None if beside is None else beside / "config.json"
    rows = read_object(config).get("vocab_size") if config and config.is_file() else None
    fits = isinstance(rows, int) and max(tokens, 1) <= rows <= shape.padded_vocab_size
    return rows if fits else info.vocab_size
