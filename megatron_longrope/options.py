"""Options as dataclasses, which the command line, its help and the Python API are made from."""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

from megatron_longrope.errors import LongRopeError

DTYPES = ("float32", "bfloat16", "float16")


def flag(default: Any = MISSING, **how: Any) -> Any:
    """Return the field of a flag; the docstring below it is the flag's help.

    Args:
        default (Any): Its value where the flag is not given; without one the flag is required.
        how: Further keywords of `argparse.ArgumentParser.add_argument`. A `type` says what is wrong
            by a ValueError. `name` is the flag where it is not the field's name, `positional=True`
            makes an argument of it, and `hidden=True` keeps the field off the command line. Of the
            fields that share an `exclusive` at most one may be given, with `required=True` exactly
            one.
    """
    return field(default=default, metadata=how)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command is told: checked in Python as on the command line.

    A text or path stands for what the flag would make of it, so that `target_length="128k"` is
    131072, and one item for a list of one; a list is read as its items with commas between them.

    Raises:
        LongRopeError: A value is unknown or cannot be read; too many or too few were given.
    """

    GROUP: ClassVar[str | tuple[str, str] | None] = None
    """Heading of the class' flags in the help, with a sentence if wanted."""

    def __post_init__(self) -> None:
        alternatives = defaultdict(list)
        for item in fields(self):
            object.__setattr__(self, item.name, _read(item, getattr(self, item.name)))
            if name := item.metadata.get("exclusive"):
                alternatives[name].append(item)
        for items in alternatives.values():
            given = [item.name for item in items if getattr(self, item.name) != item.default]
            names = ", ".join(item.name for item in items)
            if len(given) > 1:
                raise LongRopeError(f"{' and '.join(given)} exclude each other; give one of them")
            if not given and items[0].metadata.get("required"):
                raise LongRopeError(f"none of {names} is given; give one of them")


def _read(item: Field[Any], value: Any) -> Any:
    """Return a field's value as the command line would have read it."""
    how = item.metadata
    if value is item.default or (value is None and item.type.endswith("None")):
        return value
    is_empty = value is None or value == []
    # A switch or list that a caller passes on from options of its own.
    if (item.default == () and is_empty) or (item.default is False and value is None):
        return item.default
    if value is None:
        raise LongRopeError(f"{item.name} is None; leave it out or give a value")
    value = _text_of(value)
    if how.get("action") == "append" or "nargs" in how:
        value = (value,) if isinstance(value, str) else tuple(map(_text_of, value))
        if isinstance(how.get("nargs"), int) and len(value) != how["nargs"]:
            raise LongRopeError(f"{item.name} has {len(value)} values; give {how['nargs']}")
    elif "type" in how and isinstance(value, str | int | float | list | tuple):
        items = value if isinstance(value, list | tuple) else [value]
        if items is value and item.type.startswith("Sequence[float"):
            # As text a whole number alone would be how many.
            items = [float(i) if isinstance(i, int) else i for i in items]
        try:  # None is what `random` is read as, the one word that stands for no number
            value = how["type"](",".join("random" if i is None else str(i) for i in items))
        except ValueError as error:
            raise LongRopeError(f"{item.name}: {error}") from None
    if item.type in ("str", "str | None") and not isinstance(value, str):
        raise LongRopeError(f"{item.name} is of type {type(value).__name__}; give a text or a path")
    if item.type == "bool":
        if value not in (True, False):  # any text would be true
            raise LongRopeError(f"{item.name} is {value!r}; it must be True or False")
        value = bool(value)
    if "choices" in how and value not in how["choices"]:
        raise LongRopeError(
            f"{item.name} is {value!r}; it must be one of {', '.join(how['choices'])}"
        )
    return value


def refuse_idle(*flags: tuple[str, str, bool]) -> None:
    """Refuse flags that would change nothing.

    Args:
        flags: Of each its name, the flag and value beside which it is idle, and whether it is.

    Raises:
        LongRopeError: One is.
    """
    for name, beside, is_idle in flags:
        if is_idle:
            raise LongRopeError(f"{name} has no meaning with {beside}; leave it out")


def _text_of(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value


def bos_flag() -> Any:
    """Return the field of --bos."""
    return flag(
        None,
        type=int,
        metavar="ID",
        help="token id before every window or segment (default: the tokenizer's BOS; nothing where "
        "it has none, as Qwen's)",
    )


def sliding_window_flag() -> Any:
    """Return the field of --sliding-window."""
    return flag(
        "refuse",
        choices=("refuse", "drop", "keep"),
        help="of a Hugging Face model with one that its sequences exceed: refuse it; drop the "
        "window and attend in full, as LongRoPE's authors do with Mistral v0.1; or keep it, as "
        "Megatron's --window-size (default: refuse)",
    )


def parse_positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise LongRopeError(f"{text!r} is not a positive integer")
    return int(text)


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a type whose ValueError argparse shows as it is."""

    def argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return argument


@dataclass(frozen=True, kw_only=True)
class OneModel(Options):
    """Which model is meant."""

    GROUP: ClassVar = "model"

    load: str | None = flag(None, metavar="CKPT", exclusive="model", required=True)
    """Megatron checkpoint: a run's --save directory"""
    hf: str | None = flag(None, metavar="DIR", exclusive="model", required=True)
    """local Hugging Face folder, read as it is"""


@dataclass(frozen=True, kw_only=True)
class SeveralModels(Options):
    """Which models are meant, each with a label if wanted."""

    GROUP: ClassVar = "model"

    load: tuple[str, ...] = flag((), action="append", metavar="[LABEL=]CKPT")
    """Megatron checkpoint: a run's --save directory; may be given several times"""
    hf: tuple[str, ...] = flag((), action="append", metavar="[LABEL=]DIR")
    """local Hugging Face folder, read as it is; may be given several times"""


@dataclass(frozen=True, kw_only=True)
class Loading(Options):
    """How models are loaded."""

    GROUP: ClassVar = "model"

    sliding_window: str = sliding_window_flag()

    iteration: int | None = flag(None, type=int)
    """iteration to load (default: the latest)"""
    tensor_model_parallel_size: int = flag(1, type=parse_positive, metavar="TP")
    """under torchrun"""
    context_parallel_size: int = flag(1, type=parse_positive, metavar="CP")
    """under torchrun"""
    dtype: str | None = flag(None, choices=DTYPES)
    """computation type (default: float32 on a CPU, the checkpoint's on a GPU)"""
