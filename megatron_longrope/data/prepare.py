"""Build a Megatron .bin/.idx pair and its manifest from text, as a stream."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longrope.data.outputs import refuse_existing, staged_outputs
from megatron_longrope.data.segments import Recipe, length_bucket
from megatron_longrope.data.sources import (
    Document,
    SkippedDocument,
    find_source_files,
    iterate_documents,
)
from megatron_longrope.data.tokenizer import Tokenizer, load_tokenizer

MANIFEST_SCHEMA = 1

# Line numbers beyond this many skipped documents are only counted, so that memory stays bounded.
MAX_REPORTED_SKIPS = 1000

ON_ERROR = ("fail", "skip")


@dataclass
class _Statistics:
    """What passes through the stream, counted on the way."""

    documents: int = 0
    source_tokens: int = 0
    longest_document: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    skipped_count: int = 0
    skipped: list[SkippedDocument] = field(default_factory=list)
    segments: int = 0
    tokens: int = 0

    def add_document(self, length: int) -> None:
        self.documents += 1
        self.source_tokens += length
        self.longest_document = max(self.longest_document, length)
        self.histogram[length_bucket(length)] += 1

    def add_skipped(self, skipped: SkippedDocument) -> None:
        self.skipped_count += 1
        if len(self.skipped) < MAX_REPORTED_SKIPS:
            self.skipped.append(skipped)

    def to_manifest(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "segments": self.segments,
            "tokens": self.tokens,
            "source_tokens": self.source_tokens,
            "longest_document": self.longest_document,
            "length_histogram": {str(key): self.histogram[key] for key in sorted(self.histogram)},
            "skipped": {
                "count": self.skipped_count,
                "lines": [asdict(item) for item in self.skipped],
            },
        }


def prepare(
    inputs: Iterable[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    recipe: Recipe,
    *,
    text_key: str = "text",
    on_error: str = "fail",
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Write `output`.bin, `output`.idx and the manifest `output`.json; return the manifest.

    The corpus passes through document by document, so memory does not grow with it, and the same
    inputs give the same bytes. The files appear together at the end, the manifest last.

    Args:
        inputs (Iterable[Path]): Source files or directories.
        output (Path): Prefix of the three files.
        tokenizer (Path): sentencepiece `.model` file or Hugging Face folder.
        recipe (Recipe): Fixed-length segments or whole documents.
        text_key (str): Key of the text in JSON lines. Defaults to "text".
        on_error (str): `fail` stops at an unreadable document, `skip` counts it and goes on.
        overwrite (bool): Replace existing output.
        progress (bool): Show a progress bar over the source bytes on stderr.

    Raises:
        ValueError: An input, the tokenizer or the output is unfit, or nothing is left to write.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}; it must be one of {', '.join(ON_ERROR)}")
    paths = output_paths(output)
    refuse_existing(paths, overwrite)
    files = find_source_files(inputs)
    loaded = load_tokenizer(tokenizer)
    if recipe.needs_special_tokens and (loaded.bos_id is None or loaded.eos_id is None):
        missing = "BOS" if loaded.bos_id is None else "EOS"
        raise ValueError(
            f"tokenizer {tokenizer} has no {missing} token; segments are bookended with BOS and "
            f"EOS, so name one in its tokenizer_config.json ({missing.lower()}_token)"
        )
    statistics = _Statistics()
    with (
        _progress_bar(sum(path.stat().st_size for path in files), progress) as bar,
        staged_outputs(paths, overwrite) as (bin_path, idx_path, manifest_path),
    ):
        documents = iterate_documents(
            files,
            text_key,
            on_skip=statistics.add_skipped if on_error == "skip" else None,
            on_bytes=bar.update,
        )
        arranged = recipe.arrange(
            _encode(documents, loaded, statistics), loaded.bos_id, loaded.eos_id
        )
        dtype, digest = _write(arranged, bin_path, idx_path, loaded.vocab_size, statistics)
        if not statistics.segments:
            raise ValueError(_nothing_left(recipe, statistics))
        manifest = {
            "schema": MANIFEST_SCHEMA,
            **recipe.describe(),
            "tokenizer": loaded.path,
            "tokenizer_sha256": loaded.sha256,
            "vocab_size": loaded.vocab_size,
            "bos_id": loaded.bos_id,
            "eos_id": loaded.eos_id,
            "dtype": dtype,
            "token_sha256": digest,
            **statistics.to_manifest(),
            "source_files": [{"path": str(path), "bytes": path.stat().st_size} for path in files],
        }
        manifest_path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def output_paths(prefix: str | Path) -> list[Path]:
    """`PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`; dots in the prefix stay.

    Raises:
        ValueError: The prefix ends like one of the files or names a directory.
    """
    if Path(prefix).suffix in (".bin", ".idx", ".json") or str(prefix).endswith("/"):
        raise ValueError(
            f"{prefix} is not a prefix; give the path of the data set without .bin, .idx or .json"
        )
    return [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")]


def update_digest(digest: Any, tokens: np.ndarray) -> None:
    """Add token ids to a hash as little-endian int32, whatever the dtype of the .bin."""
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())


def _encode(
    documents: Iterable[Document], tokenizer: Tokenizer, statistics: _Statistics
) -> Iterator[np.ndarray]:
    """Token ids of each document, int64 [n]."""
    for document in documents:
        tokens = np.asarray(tokenizer.encode(document.text), dtype=np.int64)
        # A larger id would wrap around silently in a uint16 file.
        if len(tokens) and tokens.max() >= tokenizer.vocab_size:
            raise ValueError(
                f"{document.id}: token id {tokens.max()} is not below the vocabulary size "
                f"{tokenizer.vocab_size}; the tokenizer's files do not belong together"
            )
        statistics.add_document(len(tokens))
        yield tokens


def _write(
    entries: Iterable[np.ndarray],
    bin_path: Path,
    idx_path: Path,
    vocab_size: int,
    statistics: _Statistics,
) -> tuple[str, str]:
    """Write each entry as one Megatron document; return the dtype's name and the token hash."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    digest = hashlib.sha256()
    builder = IndexedDatasetBuilder(str(bin_path), dtype=dtype)
    with closing(builder.data_file):
        for tokens in entries:
            builder.add_item(torch.from_numpy(tokens))
            builder.end_document()
            update_digest(digest, tokens)
            statistics.segments += 1
            statistics.tokens += len(tokens)
        builder.finalize(str(idx_path))
    return np.dtype(dtype).name, digest.hexdigest()


def _nothing_left(recipe: Recipe, statistics: _Statistics) -> str:
    read = f"none of the {statistics.documents} documents read"
    longest = f"the longest has {statistics.longest_document} tokens"
    if recipe.mode == "whole":
        return f"{read} has {recipe.min_length} tokens, {longest}; lower --min-length"
    return (
        f"{read} fills a segment of {recipe.segment_length} tokens, {longest}; "
        "lower --segment-length, or keep tails with --tail pack"
    )


def _progress_bar(total: int, enabled: bool) -> Any:
    from tqdm import tqdm

    # Outside a terminal every refresh stays in the log, so refresh seldom.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="prepare",
        mininterval=interval,
        disable=not enabled,
    )
