"""What the search benchmark scores: windows of text, and their losses kept in files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.data.documents import read_documents, read_manifest
from megatron_longrope.data.tokenizer import bos_prefix
from megatron_longrope.engine import Engine
from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.journal import Evaluation, Journal


class Windows:
    """Windows of documents, BOS in front: the first of each document, then the second of each.

    Args:
        engine (Engine): Resident model.
        prefix (Path): Prepared documents.
        length (int): Tokens of a window.
        count (int): Number of windows.

    Raises:
        LongRopeError: The documents do not hold so many.
    """

    def __init__(self, engine: Engine, prefix: Path, length: int, count: int) -> None:
        manifest = read_manifest(prefix)
        bos = bos_prefix(manifest["bos_id"])
        content = length - len(bos)
        documents = read_documents(prefix, min_length=content)
        longest = max(map(len, documents))
        rows = [
            [*bos, *document[start : start + content].tolist()]
            for start in range(0, longest - content + 1, content)
            for document in documents
            if start + content <= len(document)
        ]
        if count > len(rows):
            raise LongRopeError(
                f"{prefix} holds {len(rows)} windows of {length} tokens, {count} are needed; "
                "prepare more or longer documents"
            )
        self._tokens = torch.tensor(rows[:count])
        self._engine = engine
        self.sha256 = manifest["token_sha256"]
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


def perplexity(nlls: Sequence[float]) -> float:
    """Of windows of equal length."""
    return math.exp(sum(nlls) / len(nlls))
