"""The documents that a set is made of, in order, with what goes to the sets beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from megatron_longrope.data.counts import Counts
from megatron_longrope.data.mix import Source, draw
from megatron_longrope.data.parts import Encoder
from megatron_longrope.data.segments import Packing, ShortDocuments, TokenizedDocument
from megatron_longrope.data.tokenization import read_batches, store_batches
from megatron_longrope.data.writer import SetWriter
from megatron_longrope.errors import LongRopeError


@dataclass(frozen=True)
class Split:
    """What goes beside the set that a packing makes."""

    held_out: float = 0.0
    """Share of the documents, by hash of the text, that goes whole to `PREFIX_heldout`."""
    short: ShortDocuments | None = None
    """Documents within a short window go to `PREFIX_short`; None leaves them in the set."""
    seed: int = 0
    """Decides which documents are held out and which fractions of a weight are copies."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise LongRopeError(
                f"held_out is {self.held_out}; it must be a share of at least 0 and below 1"
            )

    def holds_out(self, document: TokenizedDocument) -> bool:
        """Whether a document goes to the held-out set: equal texts always share their fate."""
        return draw(document.digest, self.seed, "held out") < self.held_out


class DocumentStream:
    """The documents of a mix: tokenized once, then read from parts as often as weights ask for."""

    def __init__(
        self,
        sources: Sequence[Source],
        files: Sequence[Sequence[Path]],
        encoder: Encoder,
        directory: Path,
        split: Split,
        num_bytes: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self.counts = Counts(sources)
        self._sources, self._files = sources, files
        self._encoder, self._directory = encoder, directory
        self._split, self._num_bytes, self._progress = split, num_bytes, progress
        self._parts: list[tuple[int, Path]] = []

    def training(
        self,
        writers: dict[str, SetWriter],
        packings: dict[str, Packing],
        text_key: str,
        skip_errors: bool,
        workers: int,
    ) -> Iterator[TokenizedDocument]:
        """Yield what the main packing arranges; what belongs beside it is written on the way.

        Copies of a document do not follow each other: the whole corpus passes as often as its most
        repeated document.

        Args:
            writers (dict): Of the sets beside the main one, by suffix.
            packings (dict): Of the same.
            text_key (str): Key or column of the text.
            skip_errors (bool): Count unreadable documents instead of stopping there.
            workers (int): Processes that tokenize.

        Raises:
            LongRopeError: A document cannot be read or tokenized.
        """
        tokenizer = self._encoder.tokenizer
        for turn in count():
            more = False
            for source, document in self._documents(turn, text_key, skip_errors, workers):
                counts, length = self.counts.of[source], len(document.tokens)
                if turn == 0:
                    counts.add(length)
                if self._split.holds_out(document):
                    if turn == 0:
                        counts.held_out_documents += 1
                        writers["_heldout"].extend(
                            packings["_heldout"].arrange([document], None, None)  # type: ignore[arg-type]
                        )
                    continue
                copies = self._sources[source].copies(length, document.digest, self._split.seed)
                more = more or copies > turn + 1
                if copies <= turn:
                    continue
                counts.use(length)
                short = self._split.short
                bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
                if short is not None and short.fits(document, bos_id):
                    writers["_short"].extend(short.arrange([document], bos_id, eos_id))  # type: ignore[arg-type]
                else:
                    yield document
            if not more:
                return

    def _documents(
        self, turn: int, text_key: str, skip_errors: bool, workers: int
    ) -> Iterator[tuple[int, TokenizedDocument]]:
        """The index of the source and the document, all documents in order."""
        if turn == 0:
            yield from self._first_turn(text_key, skip_errors, workers)
            return
        for source, part in self._parts:
            for document in self._encoder.load(part):
                yield source, document

    def _first_turn(
        self, text_key: str, skip_errors: bool, workers: int
    ) -> Iterator[tuple[int, TokenizedDocument]]:
        read, total, begun = 0, self._num_bytes, False
        batches = read_batches(self._sources, self._files, text_key, skip_errors)
        try:
            with closing(store_batches(batches, self._encoder, self._directory, workers)) as stored:
                for batch in stored:
                    if batch.error is not None:
                        raise batch.error
                    self.counts.add_skips(batch.skips)
                    if not begun and not batch.found:  # what an earlier run left is said first
                        self._progress(read, total)
                        begun = True
                    read += batch.bytes_read
                    if begun and batch.bytes_read:
                        self._progress(read, total)
                    if batch.part is None:
                        continue
                    self._parts.append((batch.source, batch.part))
                    for document in self._encoder.load(batch.part):
                        yield batch.source, document
        finally:
            if not begun and read:  # all that was read an earlier run left
                self._progress(read, total)
                begun = True
            if begun and read < total:  # --max-documents, or an error
                self._progress(read, read)
        if not begun:
            self._progress(read, total)
