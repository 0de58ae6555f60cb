"""How replicas share a search: who scores which trial, and what came out.

Every replica runs the same search on the same scores, so that nobody has to hand out candidates: a
replica claims the next trial that nobody else has claimed, scores it and publishes the result. No
replica waits for another one within a generation.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_longrope.factor_search.journal import Evaluation

_POLL_SECONDS = 0.02
_POLL_LIMIT_SECONDS = 0.5
_BEAT_SECONDS = 5.0
SILENCE_SECONDS = 120.0
"""A replica that shows no sign of life for so long is taken for dead."""


class TrialQueue:
    """Trials of a search, and what came out of each: here of one replica, where all is its own.

    Args:
        write (Callable): Puts a result into the journal.
    """

    def __init__(self, write: Callable[[Evaluation], None]) -> None:
        self._write = write

    def claim(self, index: int) -> bool:
        """Whether this replica is the first to ask for the trial."""
        return True

    def publish(self, record: Evaluation) -> None:
        """Share a result; the journal has it, or soon will."""
        self._write(record)

    def fetch(self, index: int) -> Evaluation | None:
        """Another replica's result, if it is there."""
        return None

    def wait(self) -> None:
        """Nothing can be claimed: pause until something may have changed."""
        raise RuntimeError("a search of one replica has nothing to wait for")


class SharedTrialQueue(TrialQueue):
    """Several replicas around a key-value store.

    The replica that has the journal writes it from a thread, so that a result is on disk within a
    fraction of a second, however long its own forward pass takes.

    Args:
        store (dist.Store): Shared by the replicas and used by no other search.
        replica (int): This one.
        replicas (int): How many there are.
        write (Callable, optional): Puts a result into the journal, on the replica that has it.
        silence (float): Seconds without a sign of life after which a replica is taken for dead.
    """

    def __init__(
        self,
        store: dist.Store,
        replica: int,
        replicas: int,
        write: Callable[[Evaluation], None] | None = None,
        *,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        self._store, self._replica, self._replicas = store, replica, replicas
        self._taken: set[int] = set()
        self._pause = _POLL_SECONDS
        self._silence = silence
        self._beats: dict[int, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._last_word = "ended"
        self._failure: BaseException | None = None
        # Each thread has a connection of its own: one connection answers one request at a time.
        self._threads = [threading.Thread(target=self._beat, args=(store.clone(),), daemon=True)]
        if write is not None:
            target = threading.Thread(
                target=self._write_all, args=(store.clone(), write), daemon=True
            )
            self._threads.append(target)
        for thread in self._threads:
            thread.start()

    def claim(self, index: int) -> bool:
        """Whether this replica is the first to ask for the trial."""
        if index in self._taken:
            return False
        self._taken.add(index)
        if self._store.add(f"claim/{index}", 1) > 1:  # the store adds atomically: one gets 1
            return False
        self._pause = _POLL_SECONDS
        return True

    def publish(self, record: Evaluation) -> None:
        """Share a result."""
        self._check_writer()
        # The record first: whoever reads its place in the order finds it.
        self._store.set(f"record/{record.index}", json.dumps(record.to_dict()))
        # Added in one step: a replica may die between two, and nobody could go on behind a gap.
        self._store.append("order", f"{record.index} ")

    def fetch(self, index: int) -> Evaluation | None:
        """Another replica's result, if it is there."""
        return _read(self._store, index) if self._store.check([f"record/{index}"]) else None

    def wait(self) -> None:
        """Pause, a little longer each time in a row.

        Raises:
            RuntimeError: A replica has fallen silent, or the journal cannot be written.
        """
        self._check_writer()
        self._check_beats()
        time.sleep(self._pause)
        self._pause = min(_POLL_LIMIT_SECONDS, 1.5 * self._pause)

    def close(self, done: bool) -> None:
        """Return when every published result is in the journal, and the others are done as well.

        Args:
            done (bool): Whether the search has ended on every replica, rather than failed here.
        """
        self._last_word = "ended" if done else "failed"  # which the beat writes as it ends
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._check_writer()
        if done and self._replica == 0:
            # The store lives here: it stays until nobody needs it any more.
            beats = [f"beat/{replica}" for replica in range(self._replicas)]
            while any(self._store.get(key) != b"ended" for key in beats):
                self.wait()

    def _check_writer(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _beat(self, store: dist.Store) -> None:
        count = 0
        while True:
            count += 1
            store.set(f"beat/{self._replica}", str(count))
            if self._ended.wait(_BEAT_SECONDS):
                store.set(f"beat/{self._replica}", self._last_word)
                return

    def _check_beats(self) -> None:
        now = time.monotonic()
        for replica in range(self._replicas):
            key = f"beat/{replica}"
            beat = self._store.get(key).decode() if self._store.check([key]) else "none"
            last, since = self._beats.get(replica, (None, now))
            if beat != last:
                last, since = beat, now
            self._beats[replica] = last, since
            if beat == "failed":
                raise RuntimeError(
                    f"replica {replica} of {self._replicas} has failed, see its messages; the "
                    "journal holds every finished evaluation: start the job again with --resume"
                )
            if beat != "ended" and now - since > self._silence:
                raise RuntimeError(
                    f"replica {replica} of {self._replicas} has shown no sign of life for "
                    f"{now - since:.0f} s; the journal holds every finished evaluation: start the "
                    "job again with --resume"
                )

    def _write_all(self, store: dist.Store, write: Callable[[Evaluation], None]) -> None:
        """Journal results in the order of publishing, until the search has ended and all are in."""
        try:
            store.append("order", "")  # `get` waits for a key that nobody has set
            written = 0
            while True:
                ended = self._ended.wait(_POLL_SECONDS)  # before looking, or the last one is lost
                order = store.get("order").split()
                for index in order[written:]:
                    write(_read(store, int(index)))
                written = len(order)
                if ended:
                    return
        except BaseException as failure:
            self._failure = failure


def _read(store: dist.Store, index: int) -> Evaluation:
    return Evaluation.from_dict(json.loads(store.get(f"record/{index}")))


def shared_store() -> dist.Store:
    """A key-value store on rank 0 that every rank of the job can reach; call it on every rank."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    server = None
    port = [0]
    if dist.get_rank() == 0:
        # The kernel chooses the port: one looked for here could be taken before it is bound.
        server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port[0] = server.port
    dist.broadcast_object_list(port)
    if server is not None:
        return server
    return dist.TCPStore(host, port[0], is_master=False, timeout=timedelta(minutes=5))
