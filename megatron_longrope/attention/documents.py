"""Where the documents of a batch lie; lengths only, no process group.

A batch is one document or several back to back (megatron-core's THD layout). A document occupies
some rows, of which the first are its tokens and the rest padding. Under context parallelism every
document is zigzag-sharded by itself: lengths here count whole documents, over all ranks, as
megatron-core's `cu_seqlens` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_longrope.context_parallel import check_divisible, check_documents, zigzag_chunks
from megatron_longrope.errors import LongRopeError


@dataclass(frozen=True)
class Documents:
    """Consecutive documents of a batch."""

    lengths: tuple[int, ...]
    """Tokens of each document."""
    rows: tuple[int, ...]
    """Rows that each document occupies: its tokens, then padding."""

    @classmethod
    def whole(cls, length: int) -> Documents:
        """One document without padding: a batch that is not packed."""
        return cls((length,), (length,))

    def chunk_tokens(self, document: int, chunk: int, cp_size: int) -> int:
        """Tokens, padding left out, in one of the document's 2 * cp_size zigzag chunks."""
        size = self.rows[document] // (2 * cp_size)
        return min(max(self.lengths[document] - chunk * size, 0), size)

    def halves(self, cp_rank: int, cp_size: int) -> Documents:
        """The two chunks of every document that a rank holds, in the rank's row order.

        Entries 2 i and 2 i + 1 are the lower and the upper chunk of document i.
        """
        chunks = zigzag_chunks(cp_rank, cp_size)
        count = len(self.rows)
        return Documents(
            tuple(self.chunk_tokens(i, chunk, cp_size) for i in range(count) for chunk in chunks),
            tuple(rows // (2 * cp_size) for rows in self.rows for _ in chunks),
        )

    def on_rank(self, cp_rank: int, cp_size: int) -> Documents:
        """What a rank holds of every document.

        Its tokens come first: the upper chunk has none before the lower chunk is full.
        """
        lengths = self.halves(cp_rank, cp_size).lengths
        return Documents(
            tuple(lower + upper for lower, upper in zip(lengths[::2], lengths[1::2], strict=True)),
            tuple(rows // cp_size for rows in self.rows),
        )


def documents_of(
    packed: PackedSeqParams | None, query_rows: int, key_rows: int, cp_size: int
) -> tuple[Documents, Documents]:
    """Documents of the queries and of the keys.

    Args:
        packed (PackedSeqParams, optional): megatron-core's description of a pack. None for a batch
            that is one document.
        query_rows (int): Rows that this rank holds.
        key_rows (int): Rows that this rank holds.
        cp_size (int): Context-parallel size.

    Raises:
        LongRopeError: Lengths that contradict each other or do not split over the ranks.
    """
    held = (query_rows * cp_size, key_rows * cp_size)
    if packed is None:
        check_divisible(held[1], cp_size)
        queries, keys = Documents.whole(held[0]), Documents.whole(held[1])
    else:
        queries, keys = _packed_documents(packed, cp_size)
    if cp_size > 1 and queries != keys:
        raise LongRopeError(
            f"queries of lengths {queries.lengths} and keys of lengths {keys.lengths} cannot "
            f"share context parallel size {cp_size}; decode without context parallelism"
        )
    for documents, rows in ((queries, held[0]), (keys, held[1])):
        if sum(documents.rows) > rows:
            raise LongRopeError(
                f"the documents of the pack have {sum(documents.rows)} tokens but the batch "
                f"{rows}; let cu_seqlens count the tokens of all context-parallel ranks"
            )
    return queries, keys


def offsets_on(device: torch.device, lengths: Sequence[int]) -> Tensor:
    """Where documents begin and the last one ends, int32, for kernels.

    Kept for the other layers of a batch: a copy to the device makes the host wait for it.
    """
    return _offsets(device, tuple(lengths), torch.is_inference_mode_enabled())


@lru_cache(maxsize=8)
def _offsets(device: torch.device, lengths: tuple[int, ...], _: bool) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def check_queries_see_keys(queries: Documents, keys: Documents) -> None:
    """Refuse queries without a key: the last query stands at the last key.

    Raises:
        LongRopeError: A document has more queries than keys.
    """
    for index, (rows, columns) in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        if rows > columns:
            raise LongRopeError(
                f"document {index} has {rows} queries but {columns} keys, so that its first "
                "queries see nothing; give every query its own key"
            )


def token_rows(tensor: Tensor, documents: Documents) -> Tensor:
    """Drop padding, and rows behind the last document: `[b, rows, ...] -> [b, tokens, ...]`."""
    if tensor.shape[1] == sum(documents.lengths):
        return tensor
    # One split, not a slice for each document: its backward pass is one concatenation.
    return torch.cat(tensor.split(_sections(documents, tensor.shape[1]), dim=1)[::2], dim=1)


def padded_rows(tensor: Tensor, documents: Documents, total: int) -> Tensor:
    """Put padding back as zeros, the inverse: `[b, tokens, ...] -> [b, total, ...]`."""
    if tensor.shape[1] == total:
        return tensor
    sections = _sections(documents, total)
    pieces = []
    for piece, padding in zip(tensor.split(sections[::2], dim=1), sections[1::2], strict=True):
        pieces += [piece, piece.new_zeros(piece.shape[0], padding, *piece.shape[2:])]
    return torch.cat(pieces, dim=1)


def padding_alone(query: Tensor, value_width: int, *others: Tensor) -> Tensor:
    """The output of a batch without a token, `[b, rows, h, d_v]` zeros.

    They depend on all tensors, whose gradients are zeros: Megatron waits for every parameter's.
    """
    zeros = query.new_zeros(*query.shape[:3], value_width)
    return zeros + sum(tensor[:, :0].sum() for tensor in (query, *others))


def _sections(documents: Documents, total: int) -> list[int]:
    """Row counts: tokens, padding, tokens, padding, ..., no tokens, rows behind the documents."""
    pairs = zip(documents.lengths, documents.rows, strict=True)
    sections = [count for length, rows in pairs for count in (length, rows - length)]
    return [*sections, 0, total - sum(documents.rows)]


def _packed_documents(packed: PackedSeqParams, cp_size: int) -> tuple[Documents, Documents]:
    """Read the offsets once for all layers, because the host waits for the device there."""
    tensors = [getattr(packed, name) for name in _OFFSETS]
    # Identity and version: a tensor may be replaced or overwritten between two batches.
    # Inference tensors have no version.
    seen = [
        (id(tensor), None if tensor is None or tensor.is_inference() else tensor._version)
        for tensor in tensors
    ]
    known = getattr(packed, "longrope_documents", None)
    if known is None or known[0] != (cp_size, seen):
        known = (cp_size, seen), _read_documents(packed, cp_size), tensors
        packed.longrope_documents = known
    return known[1]


_OFFSETS = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


def _read_documents(packed: PackedSeqParams, cp_size: int) -> tuple[Documents, Documents]:
    queries = _from_cu_seqlens(packed.cu_seqlens_q, packed.cu_seqlens_q_padded, "cu_seqlens_q")
    keys = queries
    if packed.cu_seqlens_kv is not None and (
        packed.cu_seqlens_kv is not packed.cu_seqlens_q
        or packed.cu_seqlens_kv_padded is not packed.cu_seqlens_q_padded
    ):
        keys = _from_cu_seqlens(packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded, "cu_seqlens_kv")
    if len(queries.rows) != len(keys.rows):
        raise LongRopeError(
            f"cu_seqlens_q has {len(queries.rows)} documents and cu_seqlens_kv {len(keys.rows)}; "
            "give queries and keys the same documents"
        )
    check_documents(queries.rows, cp_size)
    # Megatron fills a cu_seqlens tensor of fixed size with its last entry.
    used = [i for i in range(len(keys.rows)) if queries.rows[i] or keys.rows[i]]
    return _select(queries, used), _select(keys, used)


def _from_cu_seqlens(cu_seqlens: Tensor | None, padded: Tensor | None, name: str) -> Documents:
    if cu_seqlens is None:
        raise LongRopeError(f"packed sequences came without {name}; set it in PackedSeqParams")
    lengths = _differences(cu_seqlens, name)
    rows = lengths if padded is None else _differences(padded, f"{name}_padded")
    if len(lengths) != len(rows):
        raise LongRopeError(
            f"{name} has {len(lengths)} documents and {name}_padded {len(rows)}; "
            "describe the same documents in both"
        )
    for index, (length, room) in enumerate(zip(lengths, rows, strict=True)):
        if length > room:
            raise LongRopeError(
                f"document {index} has {length} tokens in {name} but {room} rows in "
                f"{name}_padded; a document needs a row for each token"
            )
    return Documents(lengths, rows)


def _differences(cu_seqlens: Tensor, name: str) -> tuple[int, ...]:
    offsets = cu_seqlens.tolist()
    if cu_seqlens.dim() == 1 and offsets[0] == 0:
        lengths = tuple(after - before for before, after in pairwise(offsets))
        if min(lengths, default=0) >= 0:
            return lengths
    raise LongRopeError(f"{name} is {offsets}; give one row that starts at 0 and never decreases")


def _select(documents: Documents, indices: list[int]) -> Documents:
    return Documents(
        tuple(documents.lengths[i] for i in indices), tuple(documents.rows[i] for i in indices)
    )
