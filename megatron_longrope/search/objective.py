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

# Samples of short windows are scored together up to this many tokens.
_TOKENS_PER_BATCH = 8192


class PerplexityObjective:
    """Mean loss of windows of `target_length` tokens (BOS included) from each document.

    One window per document is the truncated form of
    :mod:`megatron_longrope.evaluation.perplexity`, so that the score of a search and that of an
    evaluation are the same number.

    Args:
        engine (Engine): Resident model; only its factors change.
        documents (Sequence[np.ndarray]): Token ids without special tokens.
        bos_id (int): Put before every sample.
        target_length (int): Sample length in tokens.
        windows_per_document (int): Consecutive windows taken from each document; more of them make
            up for the little text in a short window. Defaults to 1.

    Raises:
        ValueError: A document is too short.
    """

    def __init__(
        self,
        engine: Engine,
        documents: Sequence[np.ndarray],
        bos_id: int,
        target_length: int,
        windows_per_document: int = 1,
    ) -> None:
        content = target_length - 1
        for index, document in enumerate(documents):
            if len(document) < windows_per_document * content:
                raise ValueError(
                    f"document {index} has {len(document)} tokens; {windows_per_document} windows "
                    f"of {target_length} need {windows_per_document * content} (BOS is added)"
                )
        self.engine = engine
        self.target_length = target_length
        samples = torch.stack(
            [
                torch.from_numpy(
                    np.concatenate(([bos_id], document[i * content : (i + 1) * content]))
                )
                for document in documents
                for i in range(windows_per_document)
            ]
        )
        self.batches = samples.split(max(1, _TOKENS_PER_BATCH // target_length))

    def __call__(self, config: LongRopeConfig) -> Evaluation:
        """Score a configuration; a failed forward is a score of infinity with its reason."""
        target = config.factor_set_for(self.target_length)
        started = time.perf_counter()
        losses: list[float] = []
        error = None
        try:
            self.engine.set_config(config)
            for batch in self.batches:
                losses += self.engine.nll(batch).double().mean(dim=1).tolist()
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
