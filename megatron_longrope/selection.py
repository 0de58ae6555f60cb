"""Which factor set a sequence uses: the one place that knows the modes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.errors import LongRopeError

MODES = ("auto", "long", "short", "mixed")


@dataclass(frozen=True)
class FactorSelection:
    """Factor sets, the mode that chooses among them, and the length that a run is fixed to.

    Raises:
        LongRopeError: The mode is unknown.
    """

    config: LongRopeConfig
    """Factor sets."""
    mode: str = "auto"
    """`auto`: the smallest set that covers the sequence. `long`: always the largest. `short`:
    always the original window's. `mixed`: documents within the original window use its set, longer
    ones the set of the run (mixed-window training of LongRoPE2)."""
    run_length: int = 0
    """Sequence length, in tokens, of a training run: shorter sequences and packed documents do not
    switch to another set batch by batch. 0 when there is no run."""
    pinned_length: int = 0
    """Length, in tokens, whose factors every sequence uses, whatever its own. 0: its own."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise LongRopeError(f"mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")

    def factor_set(self, length: int) -> FactorSet:
        """The set that a sequence, or in mixed mode a document, of `length` tokens uses.

        Raises:
            LongRopeError: No set reaches that far.
        """
        if self.pinned_length:
            return self.config.factor_set_for(self.pinned_length)
        original = self.config.original_max_position_embeddings
        if self.mode == "short":
            return self.config.factor_set_for(original)
        if self.mode == "mixed" and length <= original:
            return self.config.factor_set_for(original)
        covering = self.config.factor_set_for(max(length, self.run_length))
        return self.config.factor_sets[-1] if self.mode == "long" else covering

    def attention_factor(self, length: int) -> float:
        """Multiplier of q and k for a sequence of `length` tokens; logits get its square."""
        return self.config.attention_factor_for(self.factor_set(length).max_length)


def check_original_factors(config: LongRopeConfig, otherwise: str) -> None:
    """Refuse factors that have none for the original window, where those are what is meant.

    Args:
        config (LongRopeConfig): Factor sets.
        otherwise (str): What the larger set would do, for the error.

    Raises:
        LongRopeError: The original window has no factor set of its own.
    """
    original = config.original_max_position_embeddings
    if (reach := config.factor_set_for(original).max_length) > original:
        raise LongRopeError(
            f"the smallest factor set that covers the original window of {original} tokens "
            f"reaches to {reach}, so that {otherwise}; use factors with a set of their own for "
            f"{original} tokens"
        )
