"""Sequence lengths on the command line: `4096` and `4k` are the same (1k = 1024 tokens)."""

from __future__ import annotations

from megatron_longrope.errors import LongRopeError


def parse_length(text: str) -> int:
    """Parse one length such as `4096`, `4k` or `2M` into tokens (1k = 1024, 1M = 1048576).

    Raises:
        LongRopeError: The text is not a positive length.
    """
    cleaned = str(text).strip().lower()
    multiplier = {"k": 1024, "m": 1024 * 1024}.get(cleaned[-1:], 1)
    digits = cleaned[:-1] if multiplier > 1 else cleaned
    if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
        raise LongRopeError(
            f"length {text!r} is not a positive integer; write 4096 or 4k (1k = 1024)"
        )
    return int(digits) * multiplier


def parse_lengths(text: str) -> list[int]:
    """Parse a comma-separated list of lengths; order is kept, duplicates are refused.

    Raises:
        LongRopeError: An entry is not a length or stands twice.
    """
    lengths = [parse_length(part) for part in text.split(",") if part.strip()]
    if not lengths:
        raise LongRopeError(f"lengths {text!r} holds no length; write for example 4k,8k,16k")
    if len(set(lengths)) != len(lengths):
        raise LongRopeError(f"lengths {text!r} holds one length twice; give each length once")
    return lengths


def format_length(tokens: int) -> str:
    """`262144` -> `256k`; lengths that are no multiple of 1024 stay plain integers."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
