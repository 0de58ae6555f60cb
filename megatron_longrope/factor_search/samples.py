"""The samples that a search scores, and the needles that its winner is asked for at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_longrope.data.documents import read_manifest, read_window_documents
from megatron_longrope.data.tokenizer import Tokenizer, bos_name, load_tokenizer
from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.needle import NeedleSamples, needle_samples
from megatron_longrope.factor_search.objective import mean_over, window_samples
from megatron_longrope.factor_search.options import SearchOptions


@dataclass(frozen=True, eq=False)
class Samples:
    """What an objective scores."""

    tokens: Tensor
    """`[k, n]`, int64, BOS included where there is one."""
    bos: str | int
    """What stands before every window; see :func:`.tokenizer.bos_name`."""
    weights: Tensor | None = None
    """`[k, n - 1]`, what the loss of each target counts; None for the mean over all."""
    needles: dict[str, Any] | None = None
    """Wording and places of the needles, if there are any."""

    def __len__(self) -> int:
        return len(self.tokens)


def read_samples(args: SearchOptions, prefix: str, objective: str) -> Samples:
    """Samples of a data set for `ppl`, `needle` or `joint`.

    `joint` is the loss of the document's tokens plus --needle-weight x the loss of the answer's, in
    nats, both from one forward pass. What the best seed has of either would only be subtracted from
    every candidate alike.

    Raises:
        LongRopeError: Too few documents are long enough, or the tokenizer does not fit.
    """
    windows, length = args.windows_per_document, args.target_length
    documents, bos_id = read_window_documents(
        prefix, length, args.num_samples, windows=windows, bos=args.bos
    )
    if objective == "ppl":
        return Samples(window_samples(documents, bos_id, length, windows), bos_name(bos_id))
    if args.tokenizer is None:
        raise LongRopeError(
            f"--objective {objective} writes text into documents: give their --tokenizer"
        )
    tokenizer = _tokenizer(args.tokenizer, prefix)
    samples = needle_samples(
        documents, tokenizer, length, bos_id=bos_id, depths=_searched_depths(args), seed=args.seed
    )
    weights = mean_over(samples.scored)
    if objective == "joint":
        weights = mean_over(samples.text) + args.needle_weight * weights
    return Samples(samples.tokens, bos_name(bos_id), weights, samples.describe())


def retrieval_samples(args: SearchOptions, prefix: str) -> NeedleSamples:
    """Needles for the closing table: none that a candidate was scored on.

    Depths are spread evenly from 0 to 1; under an objective with needles over the gaps between its.

    Raises:
        LongRopeError: No tokenizer is at hand, it does not fit, or the window is too short.
    """
    path = args.tokenizer or read_manifest(prefix)["tokenizer"]
    if not path:
        raise LongRopeError(f"the manifest of {prefix} names no tokenizer")
    tokenizer = _tokenizer(path, prefix)
    trials, depths, seed = args.retrieval_trials, _even(args.retrieval_trials), args.seed
    if args.objective != "ppl":
        depths, seed = _between(_searched_depths(args), trials), args.seed + 1
    documents, bos_id = read_window_documents(
        prefix, args.target_length, args.num_samples, bos=args.bos
    )
    return needle_samples(
        documents[:trials], tokenizer, args.target_length, bos_id=bos_id,
        depths=depths, seed=seed,
    )  # fmt: skip


def needles_or_reason(args: SearchOptions) -> NeedleSamples | str:
    """Hide needles in the held-out documents (else the search's), or say why there are none.

    Raises:
        LongRopeError: A tokenizer was given, and it does not fit.
    """
    if not args.retrieval_trials:
        return "--retrieval-trials is 0"
    try:
        return retrieval_samples(args, args.held_out or args.data)
    except ValueError as error:
        if args.tokenizer is not None and "tokenizer" in str(error):
            raise
        return (
            f"{error} (--tokenizer names the data's)" if "tokenizer" in str(error) else f"{error}"
        )


def _even(count: int) -> list[float]:
    return [index / max(count - 1, 1) for index in range(count)]


def _between(depths: Sequence[float], count: int) -> list[float]:
    """`count` other depths, spread over the gaps that `depths` leave in [0, 1]."""
    edges = sorted({0.0, *depths, 1.0})
    gaps = [int((index + 0.5) * (len(edges) - 1) / count) for index in range(count)]
    return [
        edges[gap]
        + (edges[gap + 1] - edges[gap]) * (1 + gaps[:index].count(gap)) / (1 + gaps.count(gap))
        for index, gap in enumerate(gaps)
    ]


def _tokenizer(path: str, prefix: str) -> Tokenizer:
    tokenizer, manifest = load_tokenizer(path), read_manifest(prefix)
    if tokenizer.sha256 != manifest["tokenizer_sha256"]:
        raise LongRopeError(
            f"{path} is not the tokenizer that {prefix} was made with "
            f"({manifest['tokenizer']}); give that one"
        )
    return tokenizer


def _searched_depths(args: SearchOptions) -> Sequence[float]:
    """Where the objective's needles stand."""
    if args.needle_depths is None:
        return _even(args.num_samples)
    try:
        return [float(part) for part in args.needle_depths.split(",")]
    except ValueError:
        raise LongRopeError(
            f"--needle-depths {args.needle_depths!r} must be numbers, for example 0,0.5,1"
        ) from None
