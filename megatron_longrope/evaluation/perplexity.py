"""Perplexity as the paper's authors compute it, with the protocol named in every result.

BOS goes in front of every window of N tokens; a window's loss is the mean over the tokens that no
earlier window scored; the paper's number is exp of the unweighted mean over windows. With a stride
of the window itself and one window per document this is the "truncated" form of tables 1 to 5.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

NLL = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Window:
    """A span of a document that is scored in one forward pass."""

    start: int
    """First document token in the window (BOS stands before it)."""

    end: int
    """One past the last token."""

    num_scored: int
    """How many of the window's last tokens count."""


def windows(num_tokens: int, window: int, stride: int, *, truncate: bool) -> Iterator[Window]:
    """Tile a document: every token is scored exactly once (the first `window - 1` if truncated).

    Args:
        num_tokens (int): Document length without BOS.
        window (int): Model input N in tokens, BOS included.
        stride (int): Tokens between the starts of two windows, at most window - 1.
        truncate (bool): One window per document.

    Raises:
        ValueError: A size below its minimum, or a stride that would leave tokens unscored.
    """
    content = window - 1
    if content < 1 or num_tokens < 1:
        raise ValueError(f"window {window} and document of {num_tokens} tokens must be positive")
    if truncate:
        end = min(num_tokens, content)
        yield Window(0, end, end)
        return
    if not 1 <= stride <= content:
        raise ValueError(
            f"stride {stride} must be between 1 and window - 1 = {content}; a longer stride would "
            "leave tokens unscored"
        )
    scored = 0
    for start in range(0, num_tokens, stride):
        end = min(start + content, num_tokens)
        yield Window(start, end, end - scored)
        scored = end
        if end == num_tokens:
            return


@dataclass(frozen=True)
class PerplexityResult:
    """One cell of a table, with everything needed to compare it honestly."""

    length: int
    """Window N in tokens."""

    stride: int
    """Advance of the window in tokens; the window itself when truncated."""

    protocol: str
    """`truncated` (one window per document) or `sliding`."""

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
    bos_id: int,
    length: int,
    *,
    stride: int | str | None = None,
    on_window: Callable[[], None] | None = None,
) -> PerplexityResult:
    """Score documents at one window length.

    Args:
        nll (Callable): `[1, n] -> [1, n - 1]`, such as :meth:`megatron_longrope.engine.Engine.nll`.
        documents (Sequence[np.ndarray]): Token ids without special tokens, each at least
            `length - 1` long.
        bos_id (int): Put before every window.
        stride (int | str, optional): Tokens between windows, or `disjoint` for windows side by side
            (window - 1), so that every length scores the same tokens. None for the truncated form.
        on_window (Callable, optional): Called after each forward, for progress.

    Raises:
        ValueError: A document is shorter than the window.
    """
    started = time.perf_counter()
    if stride == "disjoint":
        stride = length - 1
    digest = hashlib.sha256()
    window_means: list[float] = []
    document_means: list[float] = []
    total, count = 0.0, 0
    buckets = np.zeros((8, 2))
    for index, document in enumerate(documents):
        if len(document) < length - 1:
            raise ValueError(
                f"document {index} has {len(document)} tokens, fewer than the {length - 1} that a "
                f"window of {length} needs beside BOS; use longer documents or shorter lengths"
            )
        means = []
        for span in windows(len(document), length, stride or length, truncate=stride is None):
            content = np.asarray(document[span.start : span.end], dtype=np.int64)
            digest.update(content.tobytes())
            tokens = torch.from_numpy(np.concatenate(([bos_id], content)))[None]
            values = nll(tokens)[0].double().numpy()
            scored = values[-span.num_scored :]
            means.append(float(scored.mean()))
            total, count = total + float(scored.sum()), count + span.num_scored
            places = np.arange(len(values) - span.num_scored, len(values)) * 8 // (length - 1)
            np.add.at(buckets[:, 0], places, scored)
            np.add.at(buckets[:, 1], places, 1)
            if on_window is not None:
                on_window()
        window_means += means
        document_means.append(sum(means) / len(means))
    return PerplexityResult(
        length=length,
        stride=stride or length,
        protocol="truncated" if stride is None else "sliding",
        num_windows=len(window_means),
        num_tokens=count,
        ppl_window_mean=_exp(sum(window_means) / len(window_means)),
        ppl_token_weighted=_exp(total / count),
        nll_per_document=document_means,
        nll_by_position=[
            {"from": i * (length - 1) // 8, "nll": float(s / n), "tokens": int(n)}
            for i, (s, n) in enumerate(buckets)
            if n
        ],
        sha256=digest.hexdigest(),
        seconds=time.perf_counter() - started,
    )


def _exp(nll: float) -> float:
    """A loss above 700 nats has no fp64 perplexity; say so instead of overflowing."""
    return math.exp(nll) if nll < 700 else float("inf")
