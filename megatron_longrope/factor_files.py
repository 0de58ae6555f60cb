"""Factors in other people's files: the authors' CSV, config.json, lists; and two files compared.

A vector is `rotary_dim / 2` numbers, fastest frequency first. The authors store one row for each
layer, all alike; LongRoPE2's examples store a list; released models have two lists in config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import read_json

# `4k_la2_256k.csv`, `ft_mis_128k.csv`: the window is the first number; `ft` is the tuned window.
_AUTHORS_NAME = re.compile(r"^(?:(\d+)k_[a-z0-9]+_\d+k|ft_[a-z0-9]+_(\d+)k)$")


@dataclass(frozen=True)
class Geometry:
    """What a bare vector does not say of its model."""

    rotary_base: float | None = None
    """Base of RoPE."""
    original_max_position_embeddings: int | None = None
    """Window, in tokens, of the pre-trained model."""
    attention_factor: float | None = None
    """One value for every window; None follows the policy."""
    attention_factor_policy: str = "su"
    """`su`, `yarn` or `none`."""


def import_factors(
    sources: Sequence[tuple[str | Path, int | None]], geometry: Geometry | None = None
) -> LongRopeConfig:
    """Read factors from one file for each window, or from a config.json.

    Args:
        sources (Sequence[tuple[Path, int | None]]): Files and the windows, in tokens, that they are
            for; None where the file says it: a config.json, or one with a name of the authors.
        geometry (Geometry, optional): Of the model; a config.json states it.

    Raises:
        LongRopeError: A file holds no vector, or something is not known.
    """
    geometry = geometry or Geometry()
    configs = {str(path): _config_of(Path(path)) for path, _ in sources}
    if found := [name for name, config in configs.items() if config is not None]:
        if len(sources) > 1:
            raise LongRopeError(
                f"{found[0]} describes a model by itself; import it alone and join files with "
                "`longrope factors merge`"
            )
        if sources[0][1] is not None or geometry != Geometry():
            raise LongRopeError(
                f"{found[0]} states windows, rotary base and attention factor; leave the window "
                "and the flags of the geometry out"
            )
        return configs[found[0]]  # type: ignore[return-value]
    if geometry.rotary_base is None or geometry.original_max_position_embeddings is None:
        raise LongRopeError(
            f"{sources[0][0]} holds factors alone; give the model's --rotary-base and "
            "--original-length"
        )
    sets: list[FactorSet] = []
    for path, window in sources:
        sets += _sets_of(Path(path), window, geometry.original_max_position_embeddings)
    return LongRopeConfig(
        rotary_base=geometry.rotary_base,
        rotary_dim=2 * len(sets[0].rescale_factors),
        original_max_position_embeddings=geometry.original_max_position_embeddings,
        factor_sets=tuple(sorted(sets, key=lambda item: item.max_length)),
        attention_factor=geometry.attention_factor,
        attention_factor_policy=geometry.attention_factor_policy,
    )


def export_factors(
    config: LongRopeConfig, kind: str, window: int | None = None, layers: int = 1
) -> str:
    """Return factors in a format that other tools read.

    Args:
        config (LongRopeConfig): What to write.
        kind (str): `csv` (the authors') or `list` (JSON).
        window (int, optional): Tokens; whose set to write. Defaults to the longest.
        layers (int): Rows of a CSV; the authors' code reads one for each layer.

    Raises:
        LongRopeError: The format cannot hold the factors, or there is no such window.
    """
    item = config.factor_set_for(window or config.max_length)
    if item.effective_start_tokens:
        raise LongRopeError(
            f"the set for {item.max_length} tokens has {item.num_start_tokens} start tokens, which "
            f"{kind} cannot hold; search again with --start-tokens 0"
        )
    factors = config.plain_factors(item)  # such a file cannot say what the base's scaling is
    if kind == "list":
        return json.dumps(list(factors)) + "\n"
    return (",".join(map(repr, factors)) + "\n") * layers


def differences(first: LongRopeConfig, second: LongRopeConfig) -> list[str]:
    """Say, one line each, in what two configurations rotate differently; origins do not count."""
    lines = []
    for name in ("original_max_position_embeddings", "rotary_base", "rotary_dim"):
        if (ours := getattr(first, name)) != (theirs := getattr(second, name)):
            lines.append(f"{name}: {ours} and {theirs}")
    # Between two of these no sequence changes its set in either.
    for window in sorted({s.max_length for s in (*first.factor_sets, *second.factor_sets)}):
        if window > min(first.max_length, second.max_length):
            where = "first" if window <= first.max_length else "second"
            lines.append(f"{window} tokens: in the {where} only")
            continue
        a, b = first.factor_set_for(window), second.factor_set_for(window)
        start = a.effective_start_tokens, b.effective_start_tokens
        values = first.attention_factor_for(window), second.attention_factor_for(window)
        for name, (ours, theirs) in (("start tokens", start), ("attention factor", values)):
            if ours != theirs:
                lines.append(f"{window} tokens: {name} {ours} and {theirs}")
        factors = first.plain_factors(a), second.plain_factors(b)
        lines += _factor_differences(f"{window} tokens", *factors)
        if min(start):
            own = [c.base_factors or (1.0,) * (c.rotary_dim // 2) for c in (first, second)]
            lines += _factor_differences(f"{window} tokens, start tokens", *own)
    return lines


def _factor_differences(where: str, first: Sequence[float], second: Sequence[float]) -> list[str]:
    if len(first) != len(second):
        return [f"{where}: {len(first)} and {len(second)} factors"]
    ratios = [max(a / b, b / a) - 1 for a, b in zip(first, second, strict=True)]
    largest = max(range(len(ratios)), key=ratios.__getitem__)
    if not ratios[largest]:
        return []
    return [
        f"{where}: {sum(map(bool, ratios))} of {len(ratios)} factors differ, most at index "
        f"{largest}: {first[largest]!r} and {second[largest]!r} ({ratios[largest]:.3g} apart)"
    ]


def _config_of(path: Path) -> LongRopeConfig | None:
    """A config.json as factors; None for a file that holds vectors alone."""
    if path.suffix != ".json":
        return None
    value = read_json(path)
    if not isinstance(value, dict) or not {"rope_scaling", "rope_parameters"} & value.keys():
        return None
    try:
        return LongRopeConfig.from_hf(value)
    except ValueError as error:
        raise LongRopeError(f"{path}: {error}") from None


def _sets_of(path: Path, window: int | None, original: int) -> list[FactorSet]:
    """The vectors of a file: one, or LongRoPE2's short and long ones."""
    origin = {"source": path.name}
    value = _numbers(path)
    if isinstance(value, Mapping):
        if window is None:
            raise LongRopeError(f"{path} does not say which window it is for; write WINDOW={path}")
        vectors = {original: _vector(path, value.get("short_factor", ()))}
        vectors[window] = _vector(path, value["long_factor"])
        return [FactorSet(n, factors, origin=origin) for n, factors in vectors.items() if factors]
    if window is None:
        known = _AUTHORS_NAME.match(path.stem)
        if known is None:
            raise LongRopeError(f"{path} does not say which window it is for; write WINDOW={path}")
        window = 1024 * int(known[1] or known[2])
    return [FactorSet(window, _vector(path, value), origin=origin)]


def _numbers(path: Path) -> Any:
    """JSON, or rows of numbers that stand between commas, white space or line ends."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LongRopeError(f"{path}: cannot be read as text: {error}") from None
    if text.lstrip()[:1] in ("[", "{"):
        value = read_json(path)
        if not isinstance(value, dict):
            return value
        if "long_factor" in value:
            return value
        if "rescale_factors" in value:
            return value["rescale_factors"]
        raise LongRopeError(
            f"{path}: no factors here; expected rope_scaling, long_factor or rescale_factors"
        )
    rows = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    try:
        numbers = [[float(word) for word in row] for row in rows]
    except ValueError as error:
        raise LongRopeError(f"{path}: holds no numbers alone: {error}") from None
    # One number on a line is a vector in a column.
    return [row[0] for row in numbers] if all(len(row) == 1 for row in numbers) else numbers


def _vector(path: Path, value: Any) -> tuple[float, ...]:
    """One vector; of several rows, one for each layer, all must be alike."""
    if isinstance(value, list | tuple) and value and all(isinstance(row, list) for row in value):
        if any(row != value[0] for row in value):
            raise LongRopeError(
                f"{path}: layers have different factors; one vector for all of them is supported"
            )
        value = value[0]
    if not isinstance(value, list | tuple) or not all(
        isinstance(item, int | float) and not isinstance(item, bool) for item in value
    ):
        raise LongRopeError(f"{path}: expected a list of numbers, one for each frequency")
    return tuple(map(float, value))
