"""Perplexity as the paper's authors compute it, with the protocol named in every result.

BOS goes in front of every window of N tokens; a window's loss is the mean over the tokens that no
earlier window scored; the paper's number is exp of the unweighted mean over windows, so that the
first window of N - 1 tokens weighs as much as one that adds 256. With one window per document this
is the "truncated" form of table 5; with a stride beyond the window, the short columns of table 6.

A model without BOS (stock Qwen) is shown windows of N document tokens; the first of a window has no
prediction and is not scored.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_longrope.data.tokenizer import bos_prefix
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.sharing import share
from megatron_longrope.evaluation.statistics import perplexity_of

NLL = Callable[[torch.Tensor], torch.Tensor]

_BUCKETS = 8  # parts of the window by which losses are reported


@dataclass(frozen=True)
class ScoredSpan:
    """A span of a document that is scored in one forward pass."""

    start: int
    """First document token in the window (BOS, if there is one, stands before it)."""

    end: int
    """One past the last token."""

    num_scored: int
    """How many of the window's last tokens count."""


def windows(
    num_tokens: int, window: int, stride: int | None, *, bos: bool = True
) -> Iterator[ScoredSpan]:
    """Tile a document as the authors' code does.

    Args:
        num_tokens (int): Document length without BOS.
        window (int): Model input N in tokens, BOS included.
        stride (int, optional): Tokens S between the starts of two windows. Up to window - 1 every
            token is scored exactly once (without BOS, all but the first); beyond, those that lie
            between two windows are not scored. None for one window per document.
        bos (bool): Whether BOS stands before every window. Defaults to True.

    Raises:
        LongRopeError: A size below its minimum.
    """
    content = window - bos
    if window < 2 or num_tokens < 1:
        raise LongRopeError(f"window {window} and document of {num_tokens} tokens must be positive")
    if stride is not None and stride < 1:
        raise LongRopeError(f"stride {stride} must be at least 1")
    scored = 0
    for start in range(0, num_tokens, stride or num_tokens):
        end = min(start + content, num_tokens)
        # Without BOS nothing predicts the first token of a window.
        if num_scored := end - max(start + (not bos), scored):
            yield ScoredSpan(start, end, num_scored)
        scored = end
        if end == num_tokens:
            return


def protocol_of(window: int, stride: int | None) -> str:
    """Name the way in which a document is tiled.

    `truncated`: its first window alone (YaRN's and the authors' `--truncate`); `sliding`: every
    token once, behind as many as fit; `sampled`: a window every S tokens, nothing between them.
    """
    if stride is None:
        return "truncated"
    return "sliding" if stride < window else "sampled"


@dataclass(frozen=True)
class PerplexityResult:
    """One cell of a table, with everything needed to compare it honestly."""

    length: int
    """Window N in tokens."""

    stride: int
    """Advance of the window in tokens; the window itself when truncated."""

    protocol: str
    """`truncated`, `sliding` or `sampled`; see :func:`protocol_of`."""

    num_windows: int
    """Forward passes."""

    num_tokens: int
    """Scored tokens."""

    ppl_window_mean: float
    """exp of the unweighted mean over windows: the paper's number."""

    ppl_token_weighted: float
    """exp of the mean over tokens."""

    nll_per_document: list[float] = field(default_factory=list)
    """Mean over a document's windows, in nats."""

    nll_by_position: list[dict[str, float]] = field(default_factory=list)
    """Mean NLL of tokens by position in the window, in eighths."""

    sha256: str = ""
    """Of the scored token ids."""

    seconds: float = 0.0
    """Wall time."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def perplexity(
    nll: NLL,
    documents: Sequence[np.ndarray],
    bos_id: int | None,
    length: int,
    *,
    stride: int | None = None,
    on_window: Callable[[], None] | None = None,
) -> PerplexityResult:
    """Score documents at one window length; copies of the model share the windows.

    Args:
        nll (Callable): `[1, n] -> [1, n - 1]`, such as :meth:`megatron_longrope.engine.Engine.nll`.
        documents (Sequence[np.ndarray]): Token ids without special tokens; each fills a window.
        bos_id (int, optional): Put before every window; None for nothing.
        stride (int, optional): Tokens between windows; see :func:`windows`. Defaults to None, the
            truncated form.
        on_window (Callable, optional): Called after each forward, for progress.

    Raises:
        LongRopeError: A document is shorter than the window.
    """
    started = time.perf_counter()
    front = bos_prefix(bos_id)
    lengths = [len(document) for document in documents]
    spans = planned_windows(lengths, length, stride, bos=bool(front))
    digest = hashlib.sha256()
    for index, span in spans:
        digest.update(_content(documents[index], span).tobytes())

    def score(place: tuple[int, ScoredSpan]) -> tuple[float, np.ndarray]:
        index, span = place
        content = _content(documents[index], span)
        tokens = torch.from_numpy(np.concatenate((np.asarray(front, np.int64), content)))[None]
        values = nll(tokens)[0].double().numpy()
        return float(values[-span.num_scored :].mean()), _buckets(values, span, length)

    means: list[list[float]] = [[] for _ in documents]
    buckets = np.zeros((_BUCKETS, 2))
    for (index, _), (mean, part) in share(spans, score):
        means[index].append(mean)
        buckets += part
        if on_window is not None:
            on_window()
    window_means = [mean for row in means for mean in row]
    total, count = buckets.sum(axis=0)
    return PerplexityResult(
        length=length,
        stride=stride or length,
        protocol=protocol_of(length, stride),
        num_windows=len(window_means),
        num_tokens=int(count),
        ppl_window_mean=perplexity_of(sum(window_means) / len(window_means)),
        ppl_token_weighted=perplexity_of(total / count),
        nll_per_document=[sum(row) / len(row) for row in means],
        nll_by_position=[
            {"from": -(-i * (length - 1) // _BUCKETS), "nll": float(s / n), "tokens": int(n)}
            for i, (s, n) in enumerate(buckets)
            if n
        ],
        sha256=digest.hexdigest(),
        seconds=time.perf_counter() - started,
    )


def planned_windows(
    num_tokens: Sequence[int], length: int, stride: int | None, *, bos: bool = True
) -> list[tuple[int, ScoredSpan]]:
    """List every forward pass as (index of the document, window), for documents of these lengths.

    Raises:
        LongRopeError: A document is shorter than the window.
    """
    for index, count in enumerate(num_tokens):
        if count < length - bos:
            beside = " beside BOS" if bos else ""
            raise LongRopeError(
                f"document {index} has {count} tokens, fewer than the {length - bos} that a window "
                f"of {length} needs{beside}; use longer documents or shorter lengths"
            )
    return [
        (index, span)
        for index, count in enumerate(num_tokens)
        for span in windows(count, length, stride, bos=bos)
    ]


def _content(document: np.ndarray, span: ScoredSpan) -> np.ndarray:
    return np.asarray(document[span.start : span.end], dtype=np.int64)


def _buckets(values: np.ndarray, span: ScoredSpan, length: int) -> np.ndarray:
    """Sum and count the scored losses by eighths of the window."""
    result = np.zeros((_BUCKETS, 2))
    first = len(values) - span.num_scored
    places = np.arange(first, len(values)) * _BUCKETS // (length - 1)
    np.add.at(result[:, 0], places, values[first:])
    np.add.at(result[:, 1], places, 1)
    return result
