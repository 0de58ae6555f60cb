"""Documents of several sources to parts, on any number of processes, in the order of the sources.

The main process reads, workers tokenize. What a part holds is decided while reading, so it is the
same on any number of workers, and at most three parts for each worker are on their way at a time.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path

from megatron_longrope.data.mix import Source
from megatron_longrope.data.parts import Encoder
from megatron_longrope.data.sources import Document, SkippedDocument, iterate_documents
from megatron_longrope.data.tokenizer import load_tokenizer
from megatron_longrope.errors import LongRopeError

# A part is closed at this many characters or documents: seconds of work for a worker.
_CHARACTERS = 1_000_000
_DOCUMENTS = 10_000

# Line numbers beyond this many skipped documents are only counted, so that memory stays bounded.
MAX_REPORTED_SKIPS = 1000

_worker_encoder: Encoder | None = None


@dataclass
class Skips:
    """Unreadable documents: all are counted, the first ones listed."""

    count: int = 0
    """How many."""
    listed: list[SkippedDocument] = field(default_factory=list)
    """The first ones."""

    def add(self, skipped: SkippedDocument) -> None:
        """Count one more."""
        self.count += 1
        if len(self.listed) < MAX_REPORTED_SKIPS:
            self.listed.append(skipped)


@dataclass
class Batch:
    """What becomes one part."""

    source: int
    """Index of its source."""
    documents: list[Document] = field(default_factory=list)
    """Emptied once they are stored."""
    skips: Skips = field(default_factory=Skips)
    """Unreadable documents among them."""
    bytes_read: int = 0
    """What reading them took from disk."""
    error: ValueError | None = None
    """Why reading ended here; comes alone, behind all documents before the error."""
    part: Path | None = None
    """Where they are stored; None when there is none."""
    found: bool = False
    """An earlier run had stored them."""


def read_batches(
    sources: Sequence[Source], files: Sequence[Sequence[Path]], text_key: str, skip_errors: bool
) -> Iterator[Batch]:
    """Cut the sources into batches that depend on nothing but their content.

    A source without any document ends the stream as `Batch.error`.

    Args:
        sources (Sequence[Source]): The mix.
        files (Sequence[Sequence[Path]]): Of each source.
        text_key (str): Key or column of the text of those that name none.
        skip_errors (bool): Count unreadable documents; else the first of them ends the stream as
            `Batch.error`.
    """
    batch, skips = Batch(0), Skips()

    def skip(item: SkippedDocument) -> None:
        batch.skips.add(item)
        skips.add(item)

    def read(count: int) -> None:
        batch.bytes_read += count

    for source, paths in enumerate(files):
        batch, characters, error = Batch(source), 0, None
        skips, documents = Skips(), 0
        key, on_skip = sources[source].text_key or text_key, skip if skip_errors else None
        try:
            for document in iterate_documents(paths, key, on_skip, read):
                batch.documents.append(document)
                documents += 1
                characters += len(document.text)
                if characters >= _CHARACTERS or len(batch.documents) >= _DOCUMENTS:
                    yield batch
                    batch, characters = Batch(source), 0
            if not documents:
                _refuse_empty(sources[source], skips)
        except ValueError as caught:
            error = caught
        yield batch
        if error is not None:
            yield Batch(source, error=error)
            return


def store_batches(
    batches: Iterable[Batch], encoder: Encoder, directory: Path, workers: int
) -> Iterator[Batch]:
    """Store every batch as a part; they come back in order.

    Args:
        batches (Iterable[Batch]): From :func:`read_batches`.
        encoder (Encoder): Workers load its tokenizer from its path.
        directory (Path): Where parts are.
        workers (int): Processes that tokenize; 1 does it in this one.

    Raises:
        LongRopeError: A document cannot be tokenized or a worker died.
    """
    if workers == 1:
        for batch in batches:
            if batch.documents:
                batch.part, batch.found = encoder.store(batch.documents, directory)
                batch.documents = []
            yield batch
        return
    # Forking this process would copy whatever threads torch and tokenizers have started, halfway
    # through. A fresh one imports once what costs each of them seconds, and all are forked from it.
    context = get_context("forkserver")
    auto = "transformers.models.auto.tokenization_auto"  # which `transformers` imports when asked
    library = [auto] if Path(encoder.tokenizer.path).is_dir() else []
    context.set_forkserver_preload([__name__, *library])
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start_worker,
        initargs=(encoder.tokenizer.path,),
    )
    waiting: deque[tuple[Batch, Future[tuple[Path, bool]] | None]] = deque()
    try:
        for batch in batches:
            job = pool.submit(_store, batch.documents, directory) if batch.documents else None
            batch.documents = []
            waiting.append((batch, job))
            if len(waiting) >= 3 * workers:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    except BrokenProcessPool:
        raise LongRopeError(
            "a worker process ended unexpectedly: for lack of memory (run this again with fewer "
            "workers, finished parts are kept), or because it imports the script that calls "
            'prepare_data, where the call then belongs under `if __name__ == "__main__":`'
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _refuse_empty(source: Source, skips: Skips) -> None:
    more = f" and {len(source.paths) - 1} more" if len(source.paths) > 1 else ""
    what = f"source {source.name!r} ({source.paths[0]}{more})"
    if not skips.count:
        raise LongRopeError(f"{what} holds no document; leave it out or give other files")
    first = skips.listed[0]
    remedy = first.remedy if first.kind != "damage" else "repair the input"
    raise LongRopeError(
        f"{what}: none of {skips.count} documents can be read, such as {first}; {remedy}"
    )


def _finished(batch: Batch, job: Future[tuple[Path, bool]] | None) -> Batch:
    if job is not None:
        batch.part, batch.found = job.result()
    return batch


def _start_worker(tokenizer: str) -> None:
    global _worker_encoder
    _worker_encoder = Encoder(load_tokenizer(tokenizer))
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "workers have a parent"
    parent.join()
    os._exit(1)


def _store(documents: list[Document], directory: Path) -> tuple[Path, bool]:
    assert _worker_encoder is not None, "the pool runs _start_worker first"
    return _worker_encoder.store(documents, directory)
