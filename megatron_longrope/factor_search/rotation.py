"""Rotating samples: every generation is scored on other windows of a larger pool.

A search that scores every candidate on the same few documents ends by fitting them. Here each
generation takes the next block of the pool. What a candidate loses on a block says nothing by
itself, as blocks differ more than candidates do; so scores are taken relative to an anchor, one of
the published methods, on the same windows. At the end the best few are compared on windows that no
generation saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.generations import Trial
from megatron_longrope.factor_search.journal import Evaluation, best_scores, is_complete
from megatron_longrope.factor_search.objective import PerplexityObjective
from megatron_longrope.factor_search.problem import SearchProblem
from megatron_longrope.factor_search.racing import Race
from megatron_longrope.factor_search.scoring import score_trial
from megatron_longrope.factor_search.space import Candidate, GivenFactors

FINALISTS = 4
"""Candidates that are compared on the validation windows, beside the anchor."""


def split_pool(num_documents: int, per_generation: int) -> tuple[int, int]:
    """How many blocks rotate, and how many are kept for validation: a quarter, at least one.

    Raises:
        LongRopeError: The pool is smaller than two blocks, or no whole number of them.
    """
    blocks = num_documents // per_generation
    if blocks < 2:
        raise LongRopeError(
            f"a pool of {num_documents} documents is less than two generations' "
            f"{per_generation}: one part rotates, another one is kept for the end; give more"
        )
    if num_documents % per_generation:
        least = blocks * per_generation
        raise LongRopeError(
            f"a pool of {num_documents} documents is no multiple of a generation's "
            f"{per_generation}, and {num_documents - least} of them would not be read; give {least}"
            f" or {least + per_generation}"
        )
    kept = -(-blocks // 4)
    return blocks - kept, kept


@dataclass(frozen=True)
class Anchor:
    """Losses that all others are relative to."""

    given: GivenFactors
    """The factors whose losses they are."""
    losses: tuple[tuple[float, ...], ...]
    """Of each sample of each rotating block."""

    @property
    def level(self) -> float:
        """Mean loss over all blocks, which makes relative losses comparable with perplexities."""
        values = [value for block in self.losses for value in block]
        return math.fsum(values) / len(values)

    def offset(self, block: int, samples: int) -> float:
        """What to add to a mean loss over the first `samples` of a block."""
        return self.level - math.fsum(self.losses[block][:samples]) / samples

    def losses_of(self, score: float, block: int) -> list[float]:
        """What a candidate of that score would lose on a block if it differed from the anchor
        everywhere alike; a race needs an incumbent on the same windows."""
        return [value + math.log(score) - self.level for value in self.losses[block]]

    def adjusted(self, records: Sequence[Evaluation]) -> list[Evaluation]:
        """Records of whole blocks, scored without the anchor, with the scores they get with it."""
        return [
            replace(
                record,
                score=record.score
                * math.exp(self.offset(record.block, len(self.losses[record.block]))),
            )
            for record in records
            if is_complete(record)
        ]


def validate(
    problem: SearchProblem,
    records: Sequence[Evaluation],
    anchor: Anchor,
    objective: PerplexityObjective,
) -> tuple[Candidate | GivenFactors, float, dict[str, float]]:
    """Compare the best few candidates and the anchor on windows that no generation saw.

    A candidate that a paired test finds worse than the best so far is given up early.

    Args:
        records (Sequence[Evaluation]): Of the search.
        objective (PerplexityObjective): The validation windows.

    Returns:
        tuple: The winner, the score that the search gave it, and the perplexities of the winner
        and of the anchor on these windows.
    """
    best = best_scores(records)
    finalists = [item for item in best if item != anchor.given][:FINALISTS]
    race = Race("paired")
    winner = anchor.given
    leading = score_trial(Trial(0, winner), problem, objective, Race("off"))
    of_anchor = leading.score
    for given in finalists:
        incumbent = leading.sample_nlls if is_complete(leading) else None  # the anchor may fail
        found = score_trial(Trial(0, given), problem, objective, race, incumbent=incumbent)
        if found.score < leading.score:
            winner, leading = given, found
    score = best.get(winner, math.exp(anchor.level))
    return winner, score, {"longrope": leading.score, "anchor": of_anchor}
