"""Perplexity as the paper's authors compute it, with the protocol named in every result.

BOS goes in front of every window of N tokens; a window's loss is the mean over the tokens that no
earlier window scored; the paper's number is exp of the unweighted mean over windows, so that the
first window of N - 1 tokens weighs as much as one that adds 256. With one window per document this
is the "truncated" form of table 5; with a stride beyond the window, the short columns of table 6.

Windows may instead be drawn at random places, the same ones at every length. Documents are the
units of every confidence interval: windows of one document are no independent observations.

A model without BOS (stock Qwen) is shown windows of N document tokens; the first of a window has no
prediction and is not scored.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch

from megatron_longrope.data.tokenizer import bos_prefix
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.passes import Passes
from megatron_longrope.evaluation.sharing import share
from megatron_longrope.evaluation.statistics import perplexity_of, ratio_interval

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
    """
    content = window - bos
    scored = 0
    for start in range(0, num_tokens, stride or num_tokens):
        end = min(start + content, num_tokens)
        # Without BOS nothing predicts the first token of a window.
        if num_scored := end - max(start + (not bos), scored):
            yield ScoredSpan(start, end, num_scored)
        scored = end
        if end == num_tokens:
            return


def protocol_of(window: int, stride: int | None, *, drawn: bool = False) -> str:
    """Name the way in which a document is tiled.

    `truncated`: its first window alone (YaRN's and the authors' `--truncate`); `sliding`: every
    token once, behind as many as fit; `sampled`: a window every S tokens, nothing between them;
    `random`: windows at places that were drawn.
    """
    if drawn:
        return "random"
    if stride is None:
        return "truncated"
    return "sliding" if stride < window else "sampled"


@dataclass(frozen=True)
class PerplexityResult:
    """One cell of a table, with everything needed to compare it honestly."""

    length: int
    """Window N in tokens."""
    stride: int
    """Advance of the window in tokens; the window itself when truncated or drawn."""
    protocol: str
    """`truncated`, `sliding`, `sampled` or `random`; see :func:`protocol_of`."""
    num_windows: int
    """Forward passes."""
    num_tokens: int
    """Scored tokens."""
    ppl_window_mean: float
    """exp of the unweighted mean over windows: the paper's number."""
    ppl_token_weighted: float
    """exp of the mean over tokens."""
    ppl_window_mean_interval: list[float] | None = None
    """95 % confidence interval with documents as units; None for one, or a loss not finite."""
    ppl_token_weighted_interval: list[float] | None = None
    """The same of the mean over tokens."""
    nll_per_document: list[float] = field(default_factory=list)
    """Mean over a document's windows, in nats. Of windows side by side the last, however short,
    counts as much as the others."""
    nll_per_document_token_weighted: list[float] = field(default_factory=list)
    """Mean over a document's scored tokens, in nats."""
    nll_by_position: list[dict[str, float]] = field(default_factory=list)
    """Mean NLL of tokens by position in the window, in eighths."""
    sha256: str = ""
    """Of the scored token ids."""
    seconds: float = 0.0
    """Wall time."""


def perplexity(
    nll: NLL,
    documents: Sequence[np.ndarray],
    bos_id: int | None,
    length: int,
    *,
    stride: int | None = None,
    places: Sequence[tuple[int, int]] | None = None,
    on_window: Callable[..., None] | None = None,
    passes: Passes | None = None,
) -> PerplexityResult:
    """Score documents at one window length; copies of the model share the windows.

    Args:
        nll (Callable): `[1, n] -> [1, n - 1]` under the factors of `length`, however short the
            window; such as :meth:`megatron_longrope.engine.Engine.nll`, pinned.
        documents (Sequence[np.ndarray]): Token ids without special tokens; each fills a window.
        bos_id (int, optional): Put before every window; None for nothing.
        stride (int, optional): Tokens between windows; see :func:`windows`. Defaults to None, the
            truncated form.
        places (Sequence, optional): Windows from :func:`random_places` instead.
        on_window (Callable, optional): :meth:`.Progress.update` without its note, called after each
            forward.
        passes (Passes, optional): Keeps each window's losses, and has those of an earlier run.
    """
    started = time.perf_counter() - (passes.seconds if passes else 0.0)
    front = bos_prefix(bos_id)
    lengths = [len(document) for document in documents]
    spans = planned_windows(lengths, length, stride, bos=bool(front), places=places)
    digest = hashlib.sha256()
    for index, span in spans:
        digest.update(_content(documents[index], span).tobytes())

    def score(number: int) -> tuple[float, list[list[float]]]:
        index, span = spans[number]
        content = _content(documents[index], span)
        tokens = torch.from_numpy(np.concatenate((np.asarray(front, np.int64), content)))[None]
        values = nll(tokens)[0].double().numpy()
        return float(values[-span.num_scored :].mean()), _buckets(values, span, length).tolist()

    results = dict(passes.results) if passes else {}
    if results and on_window is not None:
        on_window(count=len(results), resumed=True)
    left = [number for number in range(len(spans)) if number not in results]
    for number, result in share(left, score):
        results[number] = result
        if passes is not None:
            passes.add(number, result)
        if on_window is not None:
            on_window()
    means: dict[int, list[float]] = {index: [] for index, _ in spans}
    totals = {index: np.zeros(2) for index in means}  # sum and count over tokens
    buckets = np.zeros((_BUCKETS, 2))
    for number, (index, _) in enumerate(spans):
        mean, part = results[number]
        means[index].append(mean)
        totals[index] += np.sum(part, axis=0)
        buckets += part
    window_means = [mean for row in means.values() for mean in row]
    total, count = buckets.sum(axis=0)
    return PerplexityResult(
        length=length,
        stride=stride or length,
        protocol=protocol_of(length, stride, drawn=places is not None),
        num_windows=len(window_means),
        num_tokens=int(count),
        ppl_window_mean=perplexity_of(sum(window_means) / len(window_means)),
        ppl_token_weighted=perplexity_of(total / count),
        ppl_window_mean_interval=_interval(
            [sum(row) for row in means.values()], [len(row) for row in means.values()]
        ),
        ppl_token_weighted_interval=_interval(*zip(*totals.values(), strict=True)),
        nll_per_document=[sum(row) / len(row) for row in means.values()],
        nll_per_document_token_weighted=[float(s / n) for s, n in totals.values()],
        nll_by_position=[
            {"from": -(-i * (length - 1) // _BUCKETS), "nll": float(s / n), "tokens": int(n)}
            for i, (s, n) in enumerate(buckets)
            if n
        ],
        sha256=digest.hexdigest(),
        seconds=time.perf_counter() - started,
    )


def _interval(sums: Sequence[float], weights: Sequence[float]) -> list[float] | None:
    """Return the interval of a perplexity."""
    found = ratio_interval(sums, weights)
    if found is None or any(map(math.isnan, found)):
        return None
    return [perplexity_of(bound) for bound in found]


def random_places(
    num_tokens: Sequence[int], window: int, count: int, seed: int, *, bos: bool = True
) -> list[tuple[int, int]]:
    """Draw windows, every possible one as likely as any other, none twice.

    Args:
        num_tokens (Sequence[int]): Lengths of the documents.
        window (int): Longest window in tokens, BOS included; shorter ones begin at the same places.
        count (int): How many.
        seed (int): Of the draw.
        bos (bool): Whether BOS stands before every window. Defaults to True.

    Returns:
        list[tuple[int, int]]: Index of the document and first token of each window, in order.

    Raises:
        LongRopeError: There are not so many windows.
    """
    starts = [max(0, n - (window - bos) + 1) for n in num_tokens]
    if not 1 <= count <= sum(starts):
        raise LongRopeError(
            f"{count} random windows of {window} tokens were asked for, {len(starts)} documents "
            f"have from 1 to {sum(starts)}; give more documents or ask for fewer"
        )
    ends = [*accumulate(starts)]
    places = []
    for drawn in sorted(random.Random(seed).sample(range(ends[-1]), count)):
        index = bisect_right(ends, drawn)
        places.append((index, drawn - (ends[index] - starts[index])))
    return places


def planned_windows(
    num_tokens: Sequence[int],
    length: int,
    stride: int | None,
    *,
    bos: bool = True,
    places: Sequence[tuple[int, int]] | None = None,
) -> list[tuple[int, ScoredSpan]]:
    """List every forward pass as (index of the document, window), for documents of these lengths.

    Raises:
        LongRopeError: The windows are too short to score a token.
    """
    if length < 2:
        raise LongRopeError(f"a window of {length} token predicts none; give at least 2")
    if places is not None:
        content = length - bos
        return [(index, ScoredSpan(start, start + content, length - 1)) for index, start in places]
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
