"""Read prepared sets back, and check that they are what their manifest says."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longrope.data.prepare import MANIFEST_SCHEMA
from megatron_longrope.data.tokenizer import Tokenizer, bos_prefix, check_bos, load_tokenizer
from megatron_longrope.data.writer import output_paths, update_digest
from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import read_json

# Magic, version, dtype code, number of entries, number of document boundaries.
_INDEX_HEADER = struct.Struct("<9sQBQQ")

# Problems beyond this many are only counted.
_MAX_REPORTED_PROBLEMS = 10


def read_manifest(prefix: str | Path) -> dict[str, Any]:
    """Read `prefix`.json, the manifest that :func:`prepare` wrote.

    Raises:
        LongRopeError: The manifest is missing or is not a manifest of this release.
    """
    path = output_paths(prefix)[2]
    if not path.exists():
        raise LongRopeError(
            f"{path}: no such manifest; either the prefix is wrong or the set was not written by "
            "`longrope data prepare`, which writes it last"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema") != MANIFEST_SCHEMA:
        raise LongRopeError(
            f"{path} is not a manifest of schema {MANIFEST_SCHEMA}; "
            "prepare the set again with this release"
        )
    return manifest


def tokenizer_of(manifest: Mapping[str, Any], path: str | None = None) -> Tokenizer | None:
    """Load the tokenizer of a set, unless another one, or none, lies there by now.

    Args:
        path (str, optional): Where it should lie. Defaults to where the manifest says.
    """
    with contextlib.suppress(LongRopeError):
        loaded = load_tokenizer(path or manifest["tokenizer"])
        if loaded.sha256 == manifest["tokenizer_sha256"]:
            return loaded
    return None


def read_window_documents(
    prefix: str | Path,
    window: int,
    limit: int,
    *,
    windows: int = 1,
    bos: int | None = None,
    least: int | None = None,
) -> tuple[list[np.ndarray], int | None]:
    """Read documents that fill `windows` windows of `window` tokens; see :func:`read_documents`.

    Args:
        prefix (Path): A prepared set.
        window (int): Tokens of a window, BOS included.
        limit (int): How many documents.
        windows (int): Windows in each document, side by side.
        bos (int, optional): Token id before every window. Defaults to the set's, or none.
        least (int, optional): Documents that will do where there are no more. Defaults to `limit`.

    Returns:
        tuple[list[np.ndarray], int | None]: Documents without special tokens, and the id of BOS;
        None for a tokenizer without one.

    Raises:
        LongRopeError: It is a set for training, too few documents are that long, or `bos` is no
            token.
    """
    manifest = read_manifest(prefix)
    if manifest["mode"] != "whole":
        raise LongRopeError(
            f"{prefix} is a set for training, whose entries have BOS and EOS in them; give one of "
            "`longrope data prepare --whole-documents`"
        )
    bos_id = manifest["bos_id"] if bos is None else bos
    if bos is not None:
        check_bos(bos, manifest["vocab_size"])
    content = windows * (window - len(bos_prefix(bos_id)))
    return read_documents(prefix, content, limit, least), bos_id


def read_documents(
    prefix: str | Path,
    min_length: int | None = None,
    limit: int | None = None,
    least: int | None = None,
) -> list[np.ndarray]:
    """Read the documents (or segments) of a prepared set.

    Args:
        prefix (Path): Path of the set without .bin or .idx.
        min_length (int, optional): Only documents of at least this many tokens. Defaults to all.
        limit (int, optional): Read the first `limit` of them. Defaults to all.
        least (int, optional): How many there must be. Defaults to `limit`.

    Returns:
        list[np.ndarray]: Token ids, int64 [n], in the order of the file.

    Raises:
        LongRopeError: The set is missing, damaged or empty, or holds too few documents.
    """
    dataset = _open(prefix)
    lengths = dataset.sequence_lengths
    wanted = np.flatnonzero(lengths >= (min_length or 1))
    kind = f"documents of at least {min_length} tokens" if min_length else "documents"
    if len(wanted) < (needed := least or limit or 1):
        raise LongRopeError(
            f"{prefix} holds {len(wanted)} {kind}, {needed} needed (the longest has "
            f"{lengths.max()} tokens); ask for fewer or shorter ones, or prepare a larger set "
            "with `longrope data prepare --whole-documents --min-length N`"
        )
    return [dataset[k].astype(np.int64) for k in wanted[:limit]]


def check_set(prefix: str | Path) -> list[str]:
    """Compare every token of a set with its manifest; memory stays at one entry.

    Entries of segments must all have exactly segment_length tokens (times joined), and each segment
    starts with BOS (where the tokenizer has one) and ends with EOS, or GPTDataset's samples are not
    the entries. Short documents must keep their multiple, or context parallelism cannot divide
    them.

    Returns:
        list[str]: One sentence for each problem, shortened to the first few; empty when sound.

    Raises:
        LongRopeError: The set or its manifest is missing or damaged.
    """
    manifest = read_manifest(prefix)
    dataset = _open(prefix)
    problems: list[str] = []
    count = tokens_seen = 0
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        tokens = dataset[index]
        tokens_seen += len(tokens)
        update_digest(digest, tokens)
        for problem in _entry_problems(tokens, manifest):
            count += 1
            if count <= _MAX_REPORTED_PROBLEMS:
                problems.append(f"entry {index} {problem}")
    if count > len(problems):
        problems.append(f"{count - len(problems)} more of this kind")
    if len(dataset.document_indices) - 1 != len(dataset):
        problems.append("documents and entries differ in number; every entry must be a document")
    for name, found in (
        ("segments", len(dataset)),
        ("tokens", tokens_seen),
        ("token_sha256", digest.hexdigest()),
    ):
        if found != manifest[name]:
            problems.append(f"{name} is {found} in the .bin, {manifest[name]} in the manifest")
    return problems


def _entry_problems(tokens: np.ndarray, manifest: dict[str, Any]) -> list[str]:
    if manifest["mode"] == "whole":
        shortest, longest = manifest["min_length"], manifest["max_length"]
        if len(tokens) < shortest or (longest is not None and len(tokens) > longest):
            return [f"has {len(tokens)} tokens, outside {shortest} to {longest or 'any length'}"]
        return []
    problems = []
    if manifest["mode"] == "short":
        window, multiple = manifest["window"], manifest["multiple"]
        if len(tokens) > window or len(tokens) % multiple:
            problems.append(
                f"has {len(tokens)} tokens, not a multiple of {multiple} up to {window}"
            )
        segments = [tokens]
    else:
        length, joined = manifest["segment_length"], manifest["joined"]
        if len(tokens) != length * joined:
            problems.append(f"has {len(tokens)} tokens, not {length * joined}")
        segments = np.array_split(tokens, joined)
    for segment in segments:
        for place, position, name in (("starts", 0, "bos_id"), ("ends", -1, "eos_id")):
            special = manifest[name]
            if special is not None and len(segment) and segment[position] != special:
                found = segment[position]
                problems.append(f"{place} with token {found}, not {name} {special}")
    return problems


def _open(prefix: str | Path) -> Any:
    """The IndexedDataset of a prefix, after checks that Megatron leaves to assertions."""
    bin_path, idx_path, _ = output_paths(prefix)
    for path in (bin_path, idx_path):
        if not path.exists():
            raise LongRopeError(
                f"{path}: no such file; check the path, which is given without suffix"
            )
    _check_index(idx_path)
    if not bin_path.stat().st_size:
        raise LongRopeError(f"{bin_path} is empty; prepare the set again")

    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    dataset = IndexedDataset(str(prefix))
    expected = int(dataset.sequence_lengths.sum(dtype=np.int64)) * DType.size(dataset.index.dtype)
    if bin_path.stat().st_size != expected:
        raise LongRopeError(
            f"{bin_path} has {bin_path.stat().st_size} bytes, its index describes {expected}; "
            "copy or prepare the set again"
        )
    return dataset


def _check_index(path: Path) -> None:
    """Check header and size of an .idx file."""
    with path.open("rb") as file:
        data = file.read(_INDEX_HEADER.size)
    if len(data) == _INDEX_HEADER.size:
        magic, version, dtype_code, entries, boundaries = _INDEX_HEADER.unpack(data)
        # int32 length and int64 offset of each entry, then int64 document boundaries
        size = _INDEX_HEADER.size + 12 * entries + 8 * boundaries
        if (magic, version) == (b"MMIDIDX\x00\x00", 1) and 1 <= dtype_code <= 8:
            if path.stat().st_size == size:
                return
            raise LongRopeError(
                f"{path} has {path.stat().st_size} bytes, its header describes {size}; "
                "copy or prepare the set again"
            )
    raise LongRopeError(f"{path} is not a Megatron index; copy or prepare the set again")
