"""Documents to be scored: prepared token sets, or text files that are tokenized here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_longrope.data.documents import (
    read_manifest,
    read_window_documents,
    tokenizer_of,
)
from megatron_longrope.data.sources import (
    Document,
    SkippedDocument,
    find_source_files,
    iterate_documents,
)
from megatron_longrope.data.tokenizer import Tokenizer, bos_prefix, load_tokenizer
from megatron_longrope.errors import LongRopeError

_TEXT_KEY = (
    "name the key or column of the text: --text-key of `longrope eval` or of `longrope data "
    "prepare --whole-documents`"
)


@dataclass(frozen=True)
class ScoredDocuments:
    """Token ids without special tokens, and where they come from."""

    tokens: list[np.ndarray]
    """int64 `[n]` each."""
    bos_id: int | None
    """Put before every window; None for a tokenizer without BOS."""
    vocab_size: int
    """Largest token id that the tokenizer has, plus one."""
    tokenizer: Tokenizer | None
    """What made the tokens; None where the tokenizer of a prepared set is gone."""
    sha256: str
    """Of the tokens."""


def is_prepared(data: str) -> bool:
    """Return whether `data` is the prefix of a set that `longrope data prepare` wrote."""
    return Path(f"{data}.idx").exists()


def read_scored_documents(
    data: str,
    tokenizer: str | None,
    window: int,
    count: int,
    bos: int | None = None,
    text_key: str = "text",
    least: int | None = None,
) -> ScoredDocuments:
    """Read the first `count` documents that fill a window.

    Args:
        data (str): Prefix of a prepared set, or text as :func:`read_texts` reads it.
        tokenizer (str, optional): sentencepiece model or Hugging Face folder; needed for text. A
            prepared set knows its own, and is checked against this one.
        window (int): Tokens, BOS included; a document that does not fill it is passed over.
        count (int): How many documents.
        bos (int, optional): Token id before every window. Defaults to the tokenizer's BOS, or none.
        text_key (str): Key or column of the text. Defaults to `text`.
        least (int, optional): Documents that will do where there are no more. Defaults to `count`.

    Raises:
        LongRopeError: The data is missing, empty, no UTF-8 or of too few long documents; or the
            tokenizer is missing or is not that of the set.
    """
    if is_prepared(data):
        manifest = read_manifest(data)
        loaded = load_tokenizer(tokenizer) if tokenizer else tokenizer_of(manifest)
        if loaded and loaded.sha256 != manifest["tokenizer_sha256"]:
            raise LongRopeError(
                f"{data} was made with another tokenizer than {tokenizer}; give --tokenizer the "
                f"one that made it ({manifest['tokenizer']})"
            )
        tokens, bos_id = read_window_documents(data, window, count, bos=bos, least=least)
        vocab_size = int(manifest["vocab_size"])
    else:
        if not Path(data).exists():
            raise LongRopeError(
                f"{data}: neither a prepared set (no {Path(data).name}.idx) nor a text file; check "
                "the path"
            )
        if tokenizer is None:
            raise LongRopeError(
                f"{data} is read as text (a prepared set is given without .bin, .idx or .json); "
                "give the model's tokenizer with --tokenizer"
            )
        loaded = load_tokenizer(tokenizer, bos)
        content = window - len(bos_prefix(loaded.bos_id))
        tokens = _tokenize(read_texts(data, text_key), data, loaded, content, count, least or count)
        bos_id, vocab_size = loaded.bos_id, loaded.vocab_size
    return ScoredDocuments(tokens, bos_id, vocab_size, loaded, _sha256(tokens))


def read_texts(
    data: str, text_key: str = "text", without_text: str = _TEXT_KEY
) -> Iterator[Document]:
    """Read the documents of whatever `longrope data prepare` reads.

    Args:
        data (str): A .txt, .jsonl (.gz, .zst) or .parquet file, a dataset's folder, or a directory.
        text_key (str): Key or column of the text. Defaults to `text`.
        without_text (str): What helps where that is missing.

    Raises:
        LongRopeError: A path does not exist, or a document cannot be read; evaluations skip
            nothing.
    """

    def refuse(skipped: SkippedDocument) -> None:
        remedy = without_text if skipped.kind != "damage" else "repair the file or take it out"
        raise LongRopeError(f"{skipped}; {remedy}")

    return iterate_documents(find_source_files([data]), text_key, on_skip=refuse)


def _tokenize(
    documents: Iterator[Document],
    data: str,
    tokenizer: Tokenizer,
    min_tokens: int,
    count: int,
    least: int,
) -> list[np.ndarray]:
    found, seen, longest = [], 0, 0
    for document in documents:
        ids = tokenizer.encode(document.text)
        seen, longest = seen + 1, max(longest, len(ids))
        if len(ids) >= min_tokens:
            found.append(np.asarray(ids, dtype=np.int64))
        if len(found) == count:
            return found
    if len(found) >= least:
        return found
    if not seen:
        raise LongRopeError(f"{data} holds no document; give a file with text in it")
    raise LongRopeError(
        f"{data} holds {len(found)} documents of at least {min_tokens} tokens, {least} needed "
        f"(it has {seen} documents, the longest of {longest} tokens); ask for fewer or shorter ones"
    )


def _sha256(documents: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(document.tobytes())
    return digest.hexdigest()
