"""Several sources in one set: how often each document is repeated, and which are held out.

Every decision about a document depends on its text and the seed alone. So it is the same in every
run, on any number of workers, wherever the document stands, and equal texts are never divided
between the training set and the held-out set.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import read_json
from megatron_longrope.lengths import parse_length

_KEYS = {"paths", "text_key", "weight", "upsample_long"}
_LONG_KEYS = {"above", "factor"}


@dataclass(frozen=True)
class Source:
    """One part of a mix.

    Raises:
        LongRopeError: A field breaks its rule.
    """

    name: str
    """Its name in the manifest."""
    paths: tuple[str, ...]
    """Files or directories."""
    weight: float = 1.0
    """How often the source is passed through: 2 repeats all, 0.5 takes every second at random."""
    long_above: int | None = None
    """Documents of more than this many tokens are repeated `long_factor` times as often."""
    long_factor: float = 1.0
    """See `long_above`."""
    text_key: str | None = None
    """Key or column of the text; None for that of all sources."""

    def __post_init__(self) -> None:
        numbers = {"weight": self.weight, "upsample_long factor": self.long_factor}
        for key, value in numbers.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= 1000:
                raise LongRopeError(
                    f"source {self.name!r}: {key} is {value!r}; it must be a number above 0 and "
                    "at most 1000; leave a source out to give it none"
                )
        if self.text_key is not None and not (self.text_key and isinstance(self.text_key, str)):
            raise LongRopeError(
                f"source {self.name!r}: text_key is {self.text_key!r}; give the name of a key or "
                "column"
            )
        if self.long_above is not None and self.long_above < 1:
            raise LongRopeError(
                f"source {self.name!r}: long documents begin above {self.long_above} tokens; "
                "it must be at least 1"
            )

    def copies(self, length: int, digest: bytes, seed: int) -> int:
        """How often a document stands in the set.

        A fraction becomes one copy more for that share of the documents, chosen by hash.

        Args:
            length (int): Tokens of the document.
            digest (bytes): Hash of its text.
            seed (int): Of the whole set.
        """
        is_long = self.long_above is not None and length > self.long_above
        wanted = self.weight * (self.long_factor if is_long else 1.0)
        whole = math.floor(wanted)
        return whole + (draw(digest, seed, "copies") < wanted - whole)


def draw(digest: bytes, seed: int, purpose: str) -> float:
    """A number in [0, 1) that a document has in every run with this seed.

    Args:
        digest (bytes): Hash of the document's text.
        seed (int): Of the whole set.
        purpose (str): Keeps decisions apart: those held out are no special part of those repeated.
    """
    value = hashlib.sha256(f"{purpose}:{seed}:".encode() + digest).digest()
    return int.from_bytes(value[:7]) / 2**56  # 56 bits: a float holds no more of them exactly


def load_mix(path: str | Path) -> list[Source]:
    """Read a mix: `{"NAME": {"paths": [...], "text_key": "text", "weight": 1, ...}, ...}`.

    Relative paths start at the directory of the file. `text_key`, `weight` and `upsample_long`
    (`{"above": "32k", "factor": 4}`) may be left out.

    Raises:
        LongRopeError: The file breaks a rule; names source and key.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise LongRopeError(f"{path} is not a mix; give an object with one key for each source")
    return [_source(Path(path), name, entry) for name, entry in content.items()]


def _source(path: Path, name: str, entry: Any) -> Source:
    where = f"{path}: source {name!r}"
    _check_keys(entry, _KEYS, where)
    paths = entry.get("paths")
    if not isinstance(paths, Sequence) or isinstance(paths, str) or not paths:
        raise LongRopeError(f"{where}: paths is {paths!r}; give a list of files or directories")
    above, factor = None, 1.0
    if (upsample := entry.get("upsample_long")) is not None:
        _check_keys(upsample, _LONG_KEYS, f"{where}, upsample_long")
        if upsample.keys() != _LONG_KEYS:
            raise LongRopeError(f"{where}: upsample_long needs both above (tokens) and factor")
        factor = upsample["factor"]
        try:
            above = parse_length(str(upsample["above"]))
        except ValueError as error:
            raise LongRopeError(f"{where}: upsample_long above: {error}") from None
    resolved = tuple(str(path.parent / item) for item in map(str, paths))
    try:
        weight, text_key = entry.get("weight", 1.0), entry.get("text_key")
        return Source(name, resolved, weight, above, factor, text_key)
    except ValueError as error:
        raise LongRopeError(f"{path}: {error}") from None


def _check_keys(entry: Any, known: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise LongRopeError(f"{where} is {entry!r}; give an object with {', '.join(sorted(known))}")
    for key in entry:
        if key not in known:
            raise LongRopeError(
                f"{where}: unknown key {key!r}; known are {', '.join(sorted(known))}"
            )
