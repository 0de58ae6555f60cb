"""Open a model on disk, whichever kind it is, and say which factors it goes with."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from megatron_longrope.checkpoint.hf.checkpoint import HfCheckpoint
from megatron_longrope.checkpoint.loader import Checkpoint
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.checkpoint.reader import MegatronCheckpoint
from megatron_longrope.config import LongRopeConfig, identity_config
from megatron_longrope.errors import LongRopeError
from megatron_longrope.ranks import rank


def open_checkpoint(
    load: str | Path | None,
    hf: str | Path | None,
    iteration: int | None = None,
    sliding_window: str = "refuse",
) -> Checkpoint:
    """Read the headers of a Megatron checkpoint or of a Hugging Face folder.

    Args:
        load (str | Path, optional): Megatron's `--save` directory.
        hf (str | Path, optional): Hugging Face folder; exactly one of the two is given.
        iteration (int, optional): Of the Megatron checkpoint. Defaults to the latest.
        sliding_window (str): Of the folder; see :func:`.hf.source.open_folder`.

    Raises:
        LongRopeError: It is damaged or of an unsupported kind, or a folder was asked for an
            iteration.
    """
    if hf is None:
        return MegatronCheckpoint.open(load, iteration)
    if iteration is not None:
        raise LongRopeError(f"{hf} is a Hugging Face folder, which has no iterations; leave it out")
    return HfCheckpoint(hf, sliding_window)


def model_config(checkpoint: Checkpoint, original_length: int | None = None) -> LongRopeConfig:
    """Return the factors that a model carries, or plain RoPE up to its window.

    Args:
        original_length (int, optional): Pre-trained window in tokens. Defaults to the model's,
            which a linear scaling's config.json may state as it was before the scaling.

    Raises:
        LongRopeError: `original_length` contradicts the model's factors.
    """
    stored, shape = checkpoint.longrope, checkpoint.shape
    if stored is None:
        window = original_length or shape.max_position_embeddings
        return identity_config(shape.rotary_base, shape.rotary_dim, window)
    window = stored.original_max_position_embeddings
    if original_length is None or original_length == window:
        return stored
    if not stored.is_bare:
        raise LongRopeError(
            f"--original-length {original_length} contradicts the factors of "
            f"{checkpoint.directory}, which were made for {window}; leave it out"
        )
    only = replace(stored.factor_sets[0], max_length=original_length)
    return replace(stored, original_max_position_embeddings=original_length, factor_sets=(only,))


def check_vocabulary(vocab_size: int, what: str, shape: ModelShape, path: str | Path) -> None:
    """Refuse token ids that a model does not have.

    Args:
        vocab_size (int): Largest token id plus one.
        what (str): Where the tokens come from.
        path (str | Path): Of the model.

    Raises:
        LongRopeError: The model's vocabulary is smaller.
    """
    if vocab_size > shape.vocab_size:
        raise LongRopeError(
            f"{what} has {vocab_size} tokens, the vocabulary of {path} {shape.vocab_size}; it is "
            "not the model's tokenizer"
        )


def check_fits(
    longrope_config: LongRopeConfig, shape: ModelShape, stored: LongRopeConfig | None = None
) -> None:
    """Refuse factors that belong to another model.

    Args:
        stored (LongRopeConfig, optional): What the model rotates by itself. Defaults to plain RoPE.
            One with factors says nothing of what they multiply: a list of a config.json is relative
            to plain RoPE, whatever its model was made from.

    Raises:
        LongRopeError: rotary_dim or rotary_base differ, or the scaling that the factors multiply.
    """
    own = None if stored is None else stored.base_frequencies
    has_factors = stored is not None and not all(item.is_identity for item in stored.factor_sets)
    if not has_factors and own != longrope_config.base_frequencies:
        theirs, ours = (
            "plain RoPE" if item is None else f"RoPE scaled by {item['rope_type']}"
            for item in (own, longrope_config.base_frequencies)
        )
        raise LongRopeError(
            f"the longrope configuration multiplies {ours}, the model has {theirs}; the factors "
            "were made for another model, so search again or correct their base_frequencies"
        )
    for name in ("rotary_dim", "rotary_base"):
        ours, theirs = getattr(longrope_config, name), getattr(shape, name)
        if ours != theirs:
            raise LongRopeError(
                f"the longrope configuration has {name} {ours:g}, the model has {theirs:g}; "
                "the factors were made for another model"
            )


def warn_of_window(longrope_config: LongRopeConfig, what: str, checkpoint: Checkpoint) -> None:
    """Warn of factors for another original window than that of a model without factors.

    It is no error: what a model states need not be the window that it was trained in. Mistral's
    published factors are for 4096 tokens, its config.json says 32768.

    Args:
        what (str): Where the factors come from.
    """
    if checkpoint.longrope is not None and not checkpoint.longrope.is_bare:
        return
    theirs = longrope_config.original_max_position_embeddings
    own = model_config(checkpoint).original_max_position_embeddings
    if theirs != own and rank() == 0:
        # At this place, whoever calls, so that Python shows it once.
        warnings.warn(
            f"{what} has factors for a model with an original window of {theirs} tokens, that of "
            f"{checkpoint.directory} is {own}; make sure that they were made for this model",
            stacklevel=1,
        )
