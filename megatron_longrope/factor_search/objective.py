"""What a search minimises: losses of fixed samples at the target length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.data.tokenizer import bos_prefix
from megatron_longrope.errors import LongRopeError

if TYPE_CHECKING:
    from megatron_longrope.engine import Engine
    from megatron_longrope.factor_search.replicas import Replica

# Short samples go through the model together, up to this many tokens.
TOKENS_PER_FORWARD = 8192


class PerplexityObjective:
    """Mean or weighted loss of samples of `target_length` tokens.

    Args:
        engine (Engine | Replica): Resident model; only its factors change.
        samples (Tensor): `[k, target_length]`, int64, BOS included.
        weights (Tensor, optional): `[k, target_length - 1]`, what the loss of each target (of
            sample position 1, 2, ...) counts in the sample's sum. Defaults to the mean over all.
        tokens_per_forward (int): Samples shorter than this share a forward pass, and a race looks
            at its runners after each pass. Defaults to 8192.

    Raises:
        LongRopeError: There is no sample, or one in which nothing counts.
    """

    def __init__(
        self,
        engine: Engine | Replica,
        samples: Tensor,
        *,
        weights: Tensor | None = None,
        tokens_per_forward: int = TOKENS_PER_FORWARD,
    ) -> None:
        if not len(samples):
            raise LongRopeError("there is no sample to score; give at least one document")
        if weights is not None and not bool((weights > 0).any(dim=1).all()):
            raise LongRopeError(
                "a sample has no token that counts; weigh at least one target of each"
            )
        self._engine = engine
        self._samples, self._weights = samples, weights
        self._config: LongRopeConfig | None = None
        self.num_samples = len(samples)
        self.samples_per_forward = max(1, tokens_per_forward // samples.shape[1])
        self.target_length = samples.shape[1]

    def losses(self, config: LongRopeConfig, first: int) -> list[float]:
        """Score sample `first` and those that share its forward pass, in nats.

        Args:
            config (LongRopeConfig): Factors to score.
            first (int): A multiple of the samples of a forward pass.
        """
        if config is not self._config:
            self._engine.set_config(config)
            self._config = config
        rows = slice(first, first + self.samples_per_forward)
        if self._weights is None:
            means = self._engine.nll(self._samples[rows]).double().mean(dim=1)
        else:
            weights = self._weights[rows].double()
            start = int((weights > 0).any(dim=0).nonzero()[0])
            losses = self._engine.nll(self._samples[rows], start).double()
            weights = weights[:, start:]
            # What does not count may be infinite.
            means = (weights * torch.where(weights > 0, losses, 0.0)).sum(dim=1)
        # Rounding can take the loss of a certain token below zero, where races assume it never is.
        return [max(0.0, value) if value == value else value for value in means.tolist()]


def mean_over(marked: Tensor) -> Tensor:
    """Weights of a mean over the marked targets of each sample.

    Args:
        marked (Tensor): `[k, n]`, bool.

    Returns:
        Tensor: `[k, n]`, fp64, rows that add up to 1; zeros where nothing is marked.
    """
    return marked.double() / marked.sum(dim=1, keepdim=True).clamp(min=1)


def window_samples(
    documents: Sequence[np.ndarray],
    bos_id: int | None,
    length: int,
    windows_per_document: int = 1,
) -> Tensor:
    """Windows of `length` tokens, BOS included, from the beginning of each document.

    One window per document is the truncated form of
    :mod:`megatron_longrope.evaluation.perplexity`, so that the score of a search and that of an
    evaluation are the same number.

    Args:
        documents (Sequence[np.ndarray]): Token ids, int64, without special tokens, that fill the
            windows; see :func:`.documents.read_window_documents`.
        bos_id (int, optional): Put before every sample; None for nothing.
        length (int): Sample length in tokens.
        windows_per_document (int): Consecutive windows taken from each document; more of them make
            up for the little text in a short window. Defaults to 1.

    Returns:
        Tensor: `[documents * windows_per_document, length]`, int64.
    """
    content = length - len(bos_prefix(bos_id))
    texts = [torch.from_numpy(item[: windows_per_document * content]) for item in documents]
    rows = torch.stack(texts).view(-1, content)
    return rows if bos_id is None else functional.pad(rows, (1, 0), value=bos_id)
