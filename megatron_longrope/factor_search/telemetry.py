"""A running search in numbers: counters, the note beside its progress bar, TensorBoard scalars."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

from megatron_longrope.factor_search.journal import fresh_samples, is_complete, is_failed
from megatron_longrope.ranks import rank


class SearchStatus:
    """Counts what a search has done and what racing has spared it.

    Args:
        num_samples (int): Samples behind a complete evaluation.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.evaluations = 0
        """Records counted, those replayed from a journal included."""
        self.sample_forwards = 0
        """Forward passes over one sample."""
        self.avoided = 0
        """Sample-forwards that racing made unnecessary."""
        self.failed = 0
        """Evaluations without a score."""
        self.best: Any = None
        """The best record scored on every sample; None before the first."""
        self._counted: dict[Any, int] = {}

    @property
    def saving(self) -> float:
        """Part of all sample-forwards, done and avoided, that racing avoided."""
        return self.avoided / max(self.avoided + self.sample_forwards, 1)

    def add(self, record: Any, wanted: int | None = None) -> None:
        """Count an evaluation; a promoted candidate's earlier samples are not counted again.

        Args:
            record (Evaluation): The evaluation.
            wanted (int, optional): Samples that it would have had without racing. Defaults to all.
        """
        self.evaluations += 1
        self.sample_forwards += fresh_samples(record, self._counted)
        if record.stopped == "exact":  # a budget of halving is meant to be spent in part only
            self.avoided += max((wanted or self.num_samples) - len(record.sample_nlls), 0)
        self.failed += is_failed(record)
        if is_complete(record) and (self.best is None or record.score < self.best.score):
            self.best = record

    def note(self) -> str:
        """`71 evaluations, best 12.3456 (n_hat 4), 118 sample-forwards saved (34 %), 1 failed`."""
        parts = [f"{self.evaluations:,} evaluation{'' if self.evaluations == 1 else 's'}"]
        if self.best is None:
            parts.append("no score yet")
        else:
            parts.append(f"best {self.best.score:.4f} (n_hat {self.best.num_start_tokens})")
        if self.avoided:
            plural = "s" if self.avoided > 1 else ""
            saved = f"{self.avoided:,} sample-forward{plural} saved"
            parts.append(f"{saved} ({100 * self.saving:.0f} %)")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        return ", ".join(parts)


class Telemetry:
    """TensorBoard scalars of a search, written by rank 0 after each evaluation.

    Events that an earlier run left in the directory from the first step on that this one writes are
    withdrawn, so that neither resuming nor starting again shows a step twice.

    Args:
        directory (str | Path, optional): Where the event file goes. None writes nothing.
    """

    def __init__(self, directory: str | Path | None) -> None:
        self._directory = None if directory is None or rank() != 0 else Path(directory)
        self._writer: Any = None

    def evaluated(self, record: Any, counters: SearchStatus) -> None:
        """Write the scalars of one new evaluation; those replayed from a journal need none.

        Args:
            record (Evaluation): The evaluation.
            counters (SearchStatus): The search with `record` counted; its number of evaluations is
                the step.
        """
        if self._directory is None:
            return
        step = counters.evaluations
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory), purge_step=step)
        # What was stopped early has no perplexity over all samples; it gets a curve of its own.
        kind = "perplexity" if record.stopped is None else "perplexity_stopped_early"
        values = {
            "best_perplexity": counters.best and counters.best.score,
            kind: record.score,
            "evaluations": counters.evaluations,
            "sample_forwards": counters.sample_forwards,
            "saving_by_racing": counters.saving,
            "seconds_per_evaluation": record.seconds,
            "failed": counters.failed,
        }
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(f"search/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file; closing twice is harmless."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._directory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
