"""What a search minimises: perplexity of fixed samples at the target length."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.engine import Engine
from megatron_longrope.search.journal import Evaluation


class PerplexityObjective:
    """Mean loss of the first `target_length` tokens (BOS included) of each document.

    The protocol is the truncated form of :mod:`megatron_longrope.evaluation.perplexity`: one window
    per document, so that the score of a search and that of an evaluation are the same number.

    Args:
        engine (Engine): Resident model; only its factors change.
        documents (Sequence[np.ndarray]): Token ids without special tokens.
        bos_id (int): Put before every sample.
        target_length (int): Sample length in tokens.

    Raises:
        ValueError: A document is too short.
    """

    def __init__(
        self, engine: Engine, documents: Sequence[np.ndarray], bos_id: int, target_length: int
    ) -> None:
        for index, document in enumerate(documents):
            if len(document) < target_length - 1:
                raise ValueError(
                    f"sample {index} has {len(document)} tokens; {target_length - 1} are needed "
                    f"for a target length of {target_length}"
                )
        self.engine = engine
        self.samples = [
            torch.from_numpy(np.concatenate(([bos_id], document[: target_length - 1])))[None]
            for document in documents
        ]

    def __call__(self, config: LongRopeConfig) -> Evaluation:
        """Score a configuration; a failed forward is a score of infinity with its reason."""
        target = config.factor_set_for(self.samples[0].shape[1])
        started = time.perf_counter()
        losses: list[float] = []
        error = None
        try:
            self.engine.set_config(config)
            for sample in self.samples:
                losses.append(float(self.engine.nll(sample).double().mean()))
            score = math.exp(sum(losses) / len(losses))
        except (torch.OutOfMemoryError, OverflowError) as failure:
            score, error = math.inf, f"{type(failure).__name__}: {failure}"
        return Evaluation(
            target.rescale_factors,
            target.num_start_tokens,
            score,
            tuple(losses),
            time.perf_counter() - started,
            error,
        )
