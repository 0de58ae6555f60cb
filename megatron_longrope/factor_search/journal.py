"""The search's memory: an append-only file with one JSON line per finished evaluation.

A crash loses at most the line being written: each one is flushed to disk before the search goes on,
and a torn last line is dropped when the journal is opened again. The search is a function of its
seed and the scores told, so replaying the records resumes it exactly.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.space import GivenFactors
from megatron_longrope.files import hold

JOURNAL_VERSION = 3
_SHOWN = 120  # characters that a message shows of a changed list; fourteen start tokens have 60
_MARK = b'{"journal": '  # how every journal starts; nothing else is ever truncated


@dataclass(frozen=True)
class Evaluation:
    """One scored candidate. Values that are not finite become infinity (null in the file)."""

    rescale_factors: tuple[float, ...]
    """lambda_i as evaluated."""
    num_start_tokens: int
    """n_hat as evaluated."""
    score: float
    """Perplexity, which the search minimises. Of a candidate that a race stopped, a bound
    that its incumbent beats; infinity when the evaluation failed."""
    sample_nlls: tuple[float, ...] = ()
    """Mean negative log-likelihood per token of each sample scored, from the first one."""
    seconds: float = 0.0
    """Wall-clock time of the evaluation."""
    error: str | None = None
    """Why the evaluation failed, or None; always set when the score is infinite."""
    index: int = 0
    """Order of asking; of references, which are scored before, below 0. Lines stand in the order in
    which scores arrived, which depends on the number and speed of the replicas; apart from that and
    from `seconds`, journals of one seed are the same."""
    stopped: str | None = None
    """Why samples are missing: `exact`, a race was lost; `budget`, only so many were asked for.
    None when every sample was scored."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.score) and not self.error:
            object.__setattr__(self, "error", f"the score is {float(self.score)}")
        factors = tuple(float(value) for value in self.rescale_factors)
        object.__setattr__(self, "rescale_factors", factors)
        object.__setattr__(self, "num_start_tokens", int(self.num_start_tokens))
        object.__setattr__(self, "score", _finite_or_inf(self.score))
        object.__setattr__(self, "sample_nlls", tuple(map(_finite_or_inf, self.sample_nlls)))
        object.__setattr__(self, "seconds", float(self.seconds))
        object.__setattr__(self, "index", int(self.index))

    def to_dict(self) -> dict[str, Any]:
        """JSON object with null in place of infinity."""
        return {
            **asdict(self),
            "rescale_factors": list(self.rescale_factors),
            "score": _null_if_inf(self.score),
            "sample_nlls": [_null_if_inf(value) for value in self.sample_nlls],
        }

    @classmethod
    def from_dict(cls, value: Any) -> Evaluation:
        """Read what `to_dict` wrote.

        Raises:
            LongRopeError: Not an object with exactly this class' fields, or a field of the wrong
                type.
        """
        names = {item.name for item in fields(cls)}
        if not isinstance(value, dict) or value.keys() != names:
            raise LongRopeError(f"expected an object with the keys {sorted(names)}")
        nlls = value["sample_nlls"]
        score = value["score"]
        try:
            return cls(
                **{
                    **value,
                    "score": math.inf if score is None else score,
                    "sample_nlls": tuple(math.inf if item is None else item for item in nlls),
                }
            )
        except (TypeError, ValueError) as error:
            raise LongRopeError(f"a field has the wrong type ({error})") from None


class Journal:
    """Append-only journal of a search, locked against a second writer while open.

    Args:
        path (str | Path): The file; `<path>.lock` beside it carries the lock.
        settings (Mapping): Everything that decides a score or the trajectory (checkpoint, data
            hash, search space, parameters, seed, ...); plain JSON.
        resume (bool): Continue a journal of the same settings; starts one if there is none.
        overwrite (bool): Discard what the file holds.

    Raises:
        LongRopeError: The file is in use, exists without `resume` or `overwrite`, was written with
            other settings, or is corrupt before its last line.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps(dict(settings), allow_nan=False))
        self.records: list[Evaluation] = []
        """Replayed evaluations, then those appended, in file order."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd: int | None = None
        # The lock file stays: removing it would let two writers lock two different files.
        self._lock = hold(
            self.path.with_name(f"{self.path.name}.lock"),
            f"{self.path}",
            "wait for it to end or choose another output",
        )
        try:
            content = b"" if overwrite or not self.path.exists() else self.path.read_bytes()
            if content and not resume:
                raise LongRopeError(
                    f"{self.path} already holds a search; continue it with --resume or discard it "
                    "with --overwrite"
                )
            self._size = self._replay(content)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._fd, self._size)
            if not self._size:
                self._write({"journal": JOURNAL_VERSION, "settings": self.settings})
        except BaseException:
            self.close()
            raise

    def append(self, record: Evaluation) -> None:
        """Store one evaluation; it is on disk when this returns.

        Raises:
            OSError: The line could not be written; the file then holds nothing of it.
        """
        self._write(record.to_dict())
        self.records.append(record)

    def close(self) -> None:
        """Release the file and the lock; closing twice is harmless."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _replay(self, content: bytes) -> int:
        """Read the records of `content`; return how many of its bytes are whole lines."""
        if content and not (content.startswith(_MARK) or _MARK.startswith(content)):
            raise LongRopeError(f"{self.path} is not a search journal; choose another path")
        size = 0
        lines = io.BytesIO(content).readlines()
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
                if not line.endswith(b"\n"):
                    raise LongRopeError("the line has no end")
            except ValueError as error:  # includes JSON and UTF-8 errors
                if number == len(lines):
                    break  # torn by a crash in the middle of a write
                raise self._corrupt(number, str(error)) from None
            if number == 1:
                self._check_header(value)
            else:
                try:
                    self.records.append(Evaluation.from_dict(value))
                except ValueError as error:
                    raise self._corrupt(number, str(error)) from None
            size += len(line)
        return size

    def _check_header(self, header: dict[str, Any]) -> None:
        if header["journal"] != JOURNAL_VERSION:
            raise LongRopeError(
                f"{self.path} is a journal of version {header['journal']!r}, and this release goes "
                f"on with version {JOURNAL_VERSION}; discard it with --overwrite, or go on with "
                "the release that began it"
            )
        if changes := _differences(header.get("settings"), self.settings):
            raise LongRopeError(
                f"{self.path} was written with other settings: {'; '.join(changes)}; "
                "resume with the old settings or discard the journal with --overwrite"
            )

    def _corrupt(self, number: int, reason: str) -> LongRopeError:
        return LongRopeError(
            f"{self.path} line {number} is corrupt: {reason}; restore the file from a copy, or "
            "discard the journal with --overwrite"
        )

    def _write(self, value: dict[str, Any]) -> None:
        assert self._fd is not None  # nobody appends to a closed journal
        data = (json.dumps(value, allow_nan=False) + "\n").encode()
        try:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
            os.fsync(self._fd)
        except BaseException:
            # A full disk or Ctrl-C: leave no half line for the next append to continue.
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)


def read_records(path: str | Path) -> list[Evaluation]:
    """Read every readable record of a journal but the references'; damaged lines are passed over.

    For whoever looks at a search: a search that goes on opens a :class:`Journal`, which refuses
    damage.
    """
    records: list[Evaluation] = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        # The header, a torn last line, or damage.
        with contextlib.suppress(ValueError, OverflowError, RecursionError):
            records.append(Evaluation.from_dict(json.loads(line)))
    return [record for record in records if record.index >= 0]


def is_complete(record: Evaluation) -> bool:
    """Return whether the record's score is a perplexity over every sample."""
    return record.stopped is None and math.isfinite(record.score)


def best_scores(records: Iterable[Evaluation]) -> dict[GivenFactors, float]:
    """Return the lowest complete score of all factors that have one, the best first."""
    best: dict[GivenFactors, float] = {}
    for record in sorted(filter(is_complete, records), key=lambda item: item.score):
        best.setdefault(GivenFactors(record.rescale_factors, record.num_start_tokens), record.score)
    return best


def is_failed(record: Evaluation) -> bool:
    """Return whether it has no score; the bound of one stopped early may well be infinite."""
    return record.stopped is None and not math.isfinite(record.score)


def fresh_samples(record: Evaluation, counted: dict[Any, int]) -> int:
    """Count the samples scored for this record and not for an earlier one of the same candidate.

    `counted` is what earlier calls noted; a candidate that halving promotes is recorded again with
    the samples that it already had.
    """
    key = (tuple(record.rescale_factors), record.num_start_tokens)
    before = counted.get(key, 0)
    counted[key] = max(before, len(record.sample_nlls))
    return counted[key] - before


def _finite_or_inf(value: float) -> float:
    return float(value) if math.isfinite(value) else math.inf


def _null_if_inf(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs; of long lists, such as factors, the key."""
    if isinstance(old, dict) and isinstance(new, dict):
        missing = "(absent)"
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in _differences(
                old.get(key, missing), new.get(key, missing), f"{name}.{key}" if name else key
            )
        ]
    if old == new:
        return []
    shown = f"{old!r} -> {new!r}"
    is_long = list in (type(old), type(new)) and len(shown) > _SHOWN
    return [f"{name}: other values" if is_long else f"{name}: {shown}"]
