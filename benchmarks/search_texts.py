"""What the search benchmark scores: windows of text, losses kept in files, a pool that rotates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.data.documents import read_documents, read_manifest
from megatron_longrope.data.tokenizer import bos_prefix
from megatron_longrope.engine import Engine
from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.generations import Trial
from megatron_longrope.factor_search.journal import Evaluation, Journal
from megatron_longrope.factor_search.problem import SearchProblem
from megatron_longrope.factor_search.rotation import FINALISTS, Anchor, split_pool, validate
from megatron_longrope.factor_search.space import GivenFactors


class Windows:
    """Windows of documents, BOS in front: the first of each document, then the second of each.

    Args:
        engine (Engine): Resident model.
        prefix (Path): Prepared documents.
        length (int): Tokens of a window.
        count (int): Number of windows.
        first (int): Windows to pass over.

    Raises:
        LongRopeError: The documents do not hold so many.
    """

    def __init__(
        self, engine: Engine, prefix: Path, length: int, count: int, first: int = 0
    ) -> None:
        manifest = read_manifest(prefix)
        bos = bos_prefix(manifest["bos_id"])
        content = length - len(bos)
        documents = read_documents(prefix, min_length=content)
        longest = max(map(len, documents))
        # Windows of one document are more alike than those of two: blocks get different ones.
        rows = [
            [*bos, *document[start : start + content].tolist()]
            for start in range(0, longest - content + 1, content)
            for document in documents
            if start + content <= len(document)
        ]
        if first + count > len(rows):
            raise LongRopeError(
                f"{prefix} holds {len(rows)} windows of {length} tokens, {first + count} are "
                "needed; prepare more or longer documents"
            )
        self._tokens = torch.tensor(rows[first : first + count])
        self._engine = engine
        self.sha256 = manifest["token_sha256"] + (f" from {first}" if first else "")
        self.count = count

    def nlls(self, config: LongRopeConfig, first: int, last: int) -> tuple[float, ...]:
        """Mean loss per token of the windows `first` to `last` - 1.

        One window at a time: on a CPU a batch is no faster, and a loss must not depend on what it
        was computed with.
        """
        self._engine.set_config(config)
        rows = self._tokens[first:last].split(1)
        return tuple(self._engine.nll(row).double().mean().item() for row in rows)


class Scores:
    """Losses of configurations on windows, computed once and kept in a file.

    Args:
        path (Path): A journal; what it holds is not computed again.
        settings (dict): What the losses depend on.
        windows (Windows): The text.
    """

    def __init__(self, path: Path, settings: dict[str, Any], windows: Windows) -> None:
        self._journal = Journal(path, {**settings, "text": windows.sha256}, resume=True)
        # A later record of the same factors has more windows.
        self._known = {
            record.rescale_factors: record.sample_nlls for record in self._journal.records
        }
        self._windows = windows
        self.num_resumed = sum(map(len, self._known.values()))
        """Losses that the file held."""

    def nlls(self, config: LongRopeConfig, count: int) -> tuple[tuple[float, ...], int]:
        """Losses on the first `count` windows, and how many of them were computed now."""
        target = config.factor_sets[-1]
        known = self._known.get(target.rescale_factors, ())
        fresh = self._windows.nlls(config, len(known), count) if len(known) < count else ()
        if fresh:
            known += fresh
            record = Evaluation(target.rescale_factors, 0, perplexity(known), known)
            self._journal.append(record)
            self._known[target.rescale_factors] = known
        return known[:count], len(fresh)

    def close(self) -> None:
        """Release the file."""
        self._journal.close()


class Pool:
    """The blocks of an arm whose samples rotate: relative scores, and the final on unseen windows.

    Args:
        open_scores (Callable): (name, first window, number of windows) -> scores of those.
        problem (SearchProblem): What is searched.
        windows (int): Size of the pool.
        samples (int): Windows of a generation.
    """

    def __init__(
        self,
        open_scores: Callable[[str, int, int], Scores],
        problem: SearchProblem,
        windows: int,
        samples: int,
    ) -> None:
        self._problem = problem
        rotating, kept = split_pool(windows, samples)
        self.blocks = [
            open_scores(f"block{block}", block * samples, samples) for block in range(rotating)
        ]
        self._unseen = open_scores("unseen", rotating * samples, kept * samples)
        yarn = problem.references["yarn"]
        config = problem.config(yarn)
        losses = tuple(scores.nlls(config, samples)[0] for scores in self.blocks)
        self._anchor = Anchor(yarn, losses)
        self._records: list[Evaluation] = []
        self.num_samples, self.samples_per_forward = kept * samples, 1
        self.forwards = 0
        """Spent on the final."""

    def value(self, trial: Trial, nlls: Sequence[float]) -> float:
        """What the search is told of a trial's losses."""
        mean = math.fsum(nlls) / len(nlls) + self._anchor.offset(trial.block, len(nlls))
        factors = self._problem.factor_set(trial.candidate).rescale_factors
        self._records.append(
            Evaluation(
                factors, 0, math.exp(mean), tuple(nlls), index=trial.index, block=trial.block
            )
        )
        return math.exp(mean)

    def winner(self) -> GivenFactors:
        """The best of the finalists on the windows that no generation saw."""
        return validate(self._problem, self._records, self._anchor, self)[0]

    def losses(self, config: LongRopeConfig, first: int) -> list[float]:
        """As an objective: loss of one unseen window."""
        self.forwards += 1
        return [self._unseen.nlls(config, first + 1)[0][first]]


def pool_price(windows: int, samples: int) -> tuple[int, int, int]:
    """Blocks that rotate, and evaluations that the anchor and the final cost."""
    rotating, kept = split_pool(windows, samples)
    return rotating, rotating - 1, kept * (FINALISTS + 1)


def perplexity(nlls: Sequence[float]) -> float:
    """Of windows of equal length."""
    return math.exp(sum(nlls) / len(nlls))
