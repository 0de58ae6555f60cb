"""`read_hf_rope`: the rotary geometry of a transformers `config.json`, for every command.

transformers 4.57 reads `rope_scaling` and the keys beside it at the top, 5.x copies a non-empty
`rope_scaling` over `rope_parameters` and prefers the keys inside. A file that the two would read
differently, because it states a value twice, is refused by the names of both keys. What 4.57 reads
differently of LongRoPE's own keys (:func:`other_in_4_57`) is warned of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_longrope.base_frequencies import BASE_KEYS
from megatron_longrope.config_rules import check_int, check_positive
from megatron_longrope.errors import LongRopeError
from megatron_longrope.frequencies import attention_factor

# What transformers takes where no rope_theta is stated; 10000 for the model types that are absent.
_DEFAULT_ROPE_THETA = {"mixtral": 1e6}
# Phi3Config has the key at the top, with a default: what stands inside is then overwritten.
_DEFAULT_ORIGINAL_WINDOW = {"phi3": 4096}
DEFAULT_HEAD_DIM = {"qwen3": 128, "seed_oss": 128}
"""Head dimension of a model type without `head_dim`, where it is not hidden_size / heads."""
# Type names of the first Phi-3 releases; the second only there.
_OLD_NAMES = {"su": "longrope"}
_OLD_NAMES_OF = {"phi3": {"yarn": "longrope"}}
# Of these transformers takes 0 as absent.
_ABSENT_IF_ZERO = {"mscale", "mscale_all_dim", "beta_fast", "beta_slow"}
# Keys that each type reads, beside rope_theta and partial_rotary_factor; transformers ignores
# others.
ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "longrope": frozenset(
        {"short_factor", "long_factor", "factor", "attention_factor"}
        | {"original_max_position_embeddings"}
    ),
    **{kind: needed | optional for kind, (needed, optional) in BASE_KEYS.items()},
}


@dataclass(frozen=True)
class HfRope:
    """Rotary geometry that a `config.json` states."""

    rope_type: str
    """A key of :data:`ROPE_KEYS`."""
    stated_type: str
    """The same by the name that stands in the file, which may be an old one."""
    rope_theta: float
    """Base of the geometric progression."""
    partial_rotary_factor: float
    """Share of a head that rotates."""
    original_max_position_embeddings: int | None
    """Window, in tokens, before the extension; None for types without."""
    parameters: Mapping[str, Any]
    """What the type reads beside these, by transformers' names."""
    holder: str
    """Where they stand: `rope_scaling` or `rope_parameters`."""


def read_hf_rope(config: Mapping[str, Any]) -> HfRope:
    """Read the rotary geometry of a `config.json`, in any spelling.

    Args:
        config (Mapping): The whole file; `model_type` decides about defaults.

    Raises:
        LongRopeError: A value is stated twice and differs, is of a wrong type, is missing, or the
            type of RoPE is not supported; the message names the keys.
    """
    model_type = str(config.get("model_type"))
    holder, values = _holder(config)
    kind = _rope_type(holder, values, model_type)
    if kind not in ROPE_KEYS:
        raise LongRopeError(
            f"config.json has {holder}.rope_type {kind!r}, whose frequencies are no constants that "
            f"factors could multiply; supported types are {', '.join(ROPE_KEYS)}"
        )
    original = None
    if "original_max_position_embeddings" in ROPE_KEYS[kind]:
        original = _original_window(config, holder, values, model_type, kind)
    partial = _stated_once("partial_rotary_factor", config, {holder: values})
    check_positive("partial_rotary_factor", 1.0 if partial is None else partial)
    return HfRope(
        rope_type=kind,
        stated_type=str(values.get("rope_type", values.get("type", "default"))),
        rope_theta=_rope_theta(config, values, model_type),
        partial_rotary_factor=1.0 if partial is None else float(partial),
        original_max_position_embeddings=original,
        parameters=_parameters(values, kind),
        holder=holder,
    )


def other_in_4_57(config: Mapping[str, Any], rope: HfRope) -> str | None:
    """What transformers 4.57 reads of a longrope otherwise than 5.x, which is followed here.

    Args:
        config (Mapping): The whole file, with max_position_embeddings.

    Returns:
        str | None: The difference and the remedy, to follow "config.json has"; None where there is
        none. 4.57 does not read rope_parameters at all, and of Phi-3 it refuses what would differ.
    """
    key, original = "original_max_position_embeddings", rope.original_max_position_embeddings
    is_phi3 = str(config.get("model_type")) in _DEFAULT_ORIGINAL_WINDOW
    if rope.rope_type != "longrope" or rope.holder != "rope_scaling" or is_phi3 or original is None:
        return None
    window = config["max_position_embeddings"]
    if config.get(key) is None and window != original:
        return (
            f"{key} {original} in rope_scaling alone, where transformers 4.57 does not look for it "
            f"and takes short_factor up to max_position_embeddings {window}; for one model in both "
            "releases write the key at the top as well"
        )
    factor, ratio = rope.parameters.get("factor"), window / original
    if factor is None or rope.parameters.get("attention_factor") is not None:
        return None
    ours, theirs = (attention_factor("su", item, original) for item in (factor, ratio))
    if math.isclose(ours, theirs):
        return None
    return (
        f"rope_scaling.factor {factor:g}, which gives attention factor {ours:g} here and in "
        f"transformers 5, while 4.57 takes {theirs:g}, that of max_position_embeddings / {key} = "
        f"{ratio:g}; for one model in both releases write attention_factor {ours!r}"
    )


def _parameters(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What a type reads beside the original window; null is the default of every key but one."""
    read = ROPE_KEYS[kind] - {"original_max_position_embeddings"}
    found = {
        key: value
        for key, value in values.items()
        if key in read
        and (kind == "longrope" or value is not None)
        and not (key in _ABSENT_IF_ZERO and value == 0)
    }
    if "truncate" in read and "truncate" in values:
        found.setdefault("truncate", False)  # as transformers takes its null
    return found


def _holder(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The dict that transformers reads: a non-empty `rope_scaling` wins in 4.57 and in 5.x."""
    holder = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(holder) or {}
    if not isinstance(values, Mapping):
        raise LongRopeError(f"config.json has {holder} = {values!r}; it must be an object")
    for key, value in values.items():
        if isinstance(value, Mapping):
            raise LongRopeError(
                f"config.json has {holder}.{key}, a RoPE for some of the layers; one for all "
                "layers is supported"
            )
    return holder, values


def _rope_type(holder: str, values: Mapping[str, Any], model_type: str) -> str:
    new, old = values.get("rope_type"), values.get("type")
    names = _OLD_NAMES | _OLD_NAMES_OF.get(model_type, {})
    kinds = [names.get(str(item), str(item)) for item in (new, old) if item is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise LongRopeError(
            f"config.json has {holder}.rope_type {new!r} and {holder}.type {old!r}, of which "
            "transformers' releases read one or the other; make them agree"
        )
    return kinds[0] if kinds else "default"


def _stated_once(
    key: str, config: Mapping[str, Any], inside: Mapping[str, Mapping[str, Any]]
) -> Any:
    """A value that may stand at the top and in the dicts, None where it stands nowhere."""
    places = {key: config.get(key)}
    places |= {f"{name}.{key}": values.get(key) for name, values in inside.items()}
    stated = [(name, value) for name, value in places.items() if value is not None]
    for name, value in stated[1:]:
        if value != stated[0][1]:
            raise LongRopeError(
                f"config.json has {stated[0][0]} {stated[0][1]!r} and {name} {value!r}, of which "
                "transformers' releases read one or the other; keep the one that the model was "
                "trained with"
            )
    return stated[0][1] if stated else None


def _rope_theta(config: Mapping[str, Any], values: Mapping[str, Any], model_type: str) -> float:
    inside = {
        name: config[name]
        for name in ("rope_scaling", "rope_parameters")
        if isinstance(config.get(name), Mapping)
    }
    theta = _stated_once("rope_theta", config, inside)
    default = _DEFAULT_ROPE_THETA.get(model_type, 10000.0)
    read = values.get("rope_theta") is not None or config.get("rope_theta") is not None
    if theta is not None and theta != default and not read:
        raise LongRopeError(
            f"config.json has rope_parameters.rope_theta {theta!r} beside rope_scaling, for which "
            f"transformers ignores all of rope_parameters and takes {default:g}; write rope_theta "
            "at the top"
        )
    check_positive("rope_theta", default if theta is None else theta)
    return float(default if theta is None else theta)


def _original_window(
    config: Mapping[str, Any], holder: str, values: Mapping[str, Any], model_type: str, kind: str
) -> int:
    key = "original_max_position_embeddings"
    original = _stated_once(key, config, {holder: values})
    default = _DEFAULT_ORIGINAL_WINDOW.get(model_type)
    if original is None and kind == "yarn":
        original = config.get("max_position_embeddings")
    if original is None:
        raise LongRopeError(
            f"config.json has rope_type {kind} but no {key}; add the window, in tokens, that the "
            "model was pre-trained with"
        )
    if default is not None and config.get(key) is None and original != default:
        raise LongRopeError(
            f"config.json has {holder}.{key} {original!r}, which transformers overwrites with "
            f"{default}, its default for {model_type}; write the key at the top"
        )
    return check_int(key, original, 2)


def model_window(config: Mapping[str, Any]) -> int:
    """The window, in tokens, that a `config.json` states."""
    if "max_position_embeddings" not in config:
        raise LongRopeError("config.json has no max_position_embeddings")
    return check_int("max_position_embeddings", config["max_position_embeddings"], 2)


def rotated_dimensions(config: Mapping[str, Any], rope: HfRope) -> int:
    """Rotated dimensions of a head, by the keys that most model types have."""

    def size(key: str, default: int | None = None) -> Any:
        value = config.get(key, default)
        return value and check_int(key, value, 1)

    heads, width = size("num_attention_heads"), size("hidden_size")
    default = DEFAULT_HEAD_DIM.get(str(config.get("model_type")))
    head_dim = size("head_dim", default) or (heads and width and width // heads)
    if not head_dim:
        raise LongRopeError("config.json has no head_dim, nor hidden_size and num_attention_heads")
    return int(head_dim * rope.partial_rotary_factor)
