"""What rotates q and k in a run, as a value that two runs can be compared by."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.errors import LongRopeError
from megatron_longrope.integration.settings import LongRopeSettings
from megatron_longrope.selection import FactorSelection


@dataclass(frozen=True)
class Window:
    """What rotates one sequence or packed document."""

    rescale_factors: tuple[float, ...]
    """Of the factor set, times the model's own scaling of RoPE."""
    num_start_tokens: int
    """Of the factor set, those that rotate otherwise."""
    attention_factor: float
    """Multiplier of q and k, to 12 digits: the last ones differ between math libraries."""
    max_length: int
    """Of the factor set."""


@dataclass(frozen=True)
class InUse:
    """What rotates q and k in a run of one length; equal values mean an equal model."""

    rotary_base: float
    """Base of RoPE."""
    rotary_dim: int
    """Rotated dimensions of a head."""
    original_max_position_embeddings: int
    """Window of the pre-trained model."""
    sequence: Window
    """Of a sample, or a document as long as a sample."""
    document: Window
    """Of a short packed document: the same, but for mode `mixed`."""
    hf_parity: bool
    """fp32 angles as transformers computes them."""


@dataclass(frozen=True)
class Rotary:
    """The part of a run's arguments that decides how it rotates."""

    config: LongRopeConfig
    """Factor sets."""
    mode: str
    """See :class:`FactorSelection`."""
    seq_length: int
    """Sequence length, in tokens, of the run."""
    hf_parity: bool
    """fp32 angles as transformers computes them."""
    attention_factor: float | None = None
    """What a checkpoint's run stored, in case that another release computed another value."""

    @classmethod
    def of_checkpoint(cls, saved: argparse.Namespace) -> Rotary | None:
        """From a checkpoint's arguments; None when it was trained without LongRoPE.

        Raises:
            LongRopeError: What it stores is not valid.
        """
        value = getattr(saved, "longrope_config_value", None)
        if value is None:
            return None
        mode = getattr(saved, "longrope_mode", None) or "auto"
        try:
            config = LongRopeConfig.from_dict(value)
            FactorSelection(config, mode, saved.seq_length).factor_set(saved.seq_length)
        except ValueError as error:
            raise LongRopeError(f"the LongRoPE factors in the checkpoint: {error}") from None
        return cls(
            config,
            mode,
            saved.seq_length,
            bool(getattr(saved, "longrope_hf_parity", False)),
            getattr(saved, "longrope_attention_factor", None),
        )

    @classmethod
    def of_run(cls, args: argparse.Namespace, settings: LongRopeSettings) -> Rotary:
        """From the run that loads."""
        selection = settings.selection
        return cls(selection.config, selection.mode, args.seq_length, settings.hf_parity)

    @property
    def is_stock(self) -> bool:
        """True when it is plain RoPE."""
        return self.config.base_frequencies is None and not self.has_factors

    @property
    def has_factors(self) -> bool:
        """False when every sequence rotates as in the model that the factors are made for."""
        factor = self.in_use().sequence.attention_factor
        own = _rounded(self.config.attention_factor_by("none", self.config.max_length))
        return factor != own or not all(item.is_identity for item in self.config.factor_sets)

    def in_use(self) -> InUse:
        """What rotates in this run."""
        in_use = self.elsewhere(self.config, self.seq_length)
        if self.attention_factor is None:
            return in_use
        sequence = replace(in_use.sequence, attention_factor=_rounded(self.attention_factor))
        is_one = in_use.document == in_use.sequence
        return replace(in_use, sequence=sequence, document=sequence if is_one else in_use.document)

    def elsewhere(self, config: LongRopeConfig, seq_length: int) -> InUse | None:
        """What would rotate with other factor sets or at another length; None beyond the sets."""
        selection = FactorSelection(config, self.mode, seq_length)

        def window(length: int) -> Window:
            chosen = selection.factor_set(length)
            return Window(
                config.plain_factors(chosen),
                chosen.effective_start_tokens,
                _rounded(selection.attention_factor(length)),
                chosen.max_length,
            )

        try:
            sequence, document = window(seq_length), window(1)
        except ValueError:
            return None
        return InUse(
            float(config.rotary_base),
            config.rotary_dim,
            config.original_max_position_embeddings,
            sequence,
            document,
            self.hf_parity,
        )

    def differs_in_mode_alone(self, other: Rotary) -> bool:
        """True when another mode makes the two equal, and samples rotate alike in both."""
        in_use = other.in_use()
        return (
            self.mode != other.mode
            and self.seq_length == other.seq_length
            and self.in_use().sequence == in_use.sequence
            and replace(self, mode=other.mode).in_use() == in_use
        )

    def describe(self) -> str:
        """Length, set and attention factor in use, for a sentence."""
        return _describe(self.seq_length, self.mode, self.in_use())


def difference(theirs: Rotary, ours: Rotary) -> str | None:
    """What differs, with both sides, or None when only the sequence length moved on.

    Args:
        theirs (Rotary): The checkpoint's.
        ours (Rotary): Of the run that loads it.
    """
    trained, in_use = theirs.in_use(), ours.in_use()
    # The checkpoint's run at this run's length, and this run's factors at the checkpoint's.
    is_one_length = ours.seq_length == theirs.seq_length
    here = trained if is_one_length else theirs.elsewhere(theirs.config, ours.seq_length)
    there = theirs.elsewhere(ours.config, theirs.seq_length)
    if (here, there) == (in_use, trained):
        return None
    left, right = (theirs.seq_length, theirs.mode, trained), (ours.seq_length, ours.mode, in_use)
    if here not in (None, in_use):
        left = (ours.seq_length, theirs.mode, here)
    elif here == in_use and there is not None:
        right = (theirs.seq_length, theirs.mode, there)
    return (
        f"{_first_difference(left[2], right[2])} (checkpoint: {_describe(*left)}; "
        f"this run: {_describe(*right)})"
    )


def _first_difference(theirs: InUse, ours: InUse) -> str:
    for name in ("rotary_base", "rotary_dim", "original_max_position_embeddings"):
        pair = getattr(theirs, name), getattr(ours, name)
        if pair[0] != pair[1]:
            return f"{name} {pair[0]:g} against {pair[1]:g}"
    if difference := _window_difference(theirs.sequence, ours.sequence):
        return difference
    if difference := _window_difference(theirs.document, ours.document):
        return f"in short documents {difference}"
    kinds = ("exact", "fp32 (--longrope-hf-parity)")
    return f"{kinds[theirs.hf_parity]} angles against {kinds[ours.hf_parity]} angles"


def _window_difference(theirs: Window, ours: Window) -> str | None:
    factors = zip(theirs.rescale_factors, ours.rescale_factors, strict=True)
    for index, pair in enumerate(factors):
        if pair[0] != pair[1]:
            return f"rescale factor {index} is {pair[0]:.8g} against {pair[1]:.8g}"
    for name in ("num_start_tokens", "attention_factor", "max_length"):
        pair = getattr(theirs, name), getattr(ours, name)
        if pair[0] != pair[1]:
            return f"{name} {pair[0]:.8g} against {pair[1]:.8g}"
    return None


def _describe(seq_length: int, mode: str, in_use: InUse) -> str:
    window = in_use.sequence
    return (
        f"{seq_length} tokens{'' if mode == 'auto' else f' in mode {mode}'} with the set up to "
        f"{window.max_length}, attention factor {window.attention_factor:.6g}"
    )


def _rounded(attention_factor: float) -> float:
    return float(f"{attention_factor:.12g}")
