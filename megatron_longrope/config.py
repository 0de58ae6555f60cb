"""`LongRopeConfig`: the one JSON file that drives training, search, evaluation and export."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_longrope import published
from megatron_longrope.base_frequencies import (
    BASE_KEYS,
    base_attention_factor,
    base_factors,
    validate_base_frequencies,
)
from megatron_longrope.config_rules import (
    check_keys,
    check_positive,
    extension_ratio,
    unusual_factor,
    validate_factor_sets,
    validate_factors,
    validate_geometry,
)
from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import read_json, write_json_atomic
from megatron_longrope.frequencies import attention_factor
from megatron_longrope.hf_rope import (
    HfRope,
    model_window,
    other_in_4_57,
    read_hf_rope,
    rotated_dimensions,
)

SCHEMA_VERSION = 2
"""The second adds `base_frequencies`; a configuration without them is written as the first."""
_SET_KEYS = {"max_length", "rescale_factors", "num_start_tokens", "origin"}
_CONFIG_KEYS = {
    "schema", "rope_type", "rotary_base", "rotary_dim", "original_max_position_embeddings",
    "attention_factor", "attention_factor_policy", "factor_sets", "base_frequencies",
}  # fmt: skip
_OPTIONAL_CONFIG_KEYS = {"attention_factor", "attention_factor_policy", "base_frequencies"}


@dataclass(frozen=True)
class FactorSet:
    """Rescale factors for every sequence up to `max_length` tokens."""

    max_length: int
    """Longest sequence, in tokens, that this set serves."""
    rescale_factors: tuple[float, ...]
    """lambda_i of equation 3, one per frequency (rotary_dim / 2), > 0.

    A search proposes them at 1 or above and never decreasing; published ones may differ."""
    num_start_tokens: int = 0
    """n_hat: positions below it keep the original rotation."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where the factors come from (method, checkpoint, data hash, seed, ...); free-form JSON."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rescale_factors", tuple(self.rescale_factors))

    @property
    def is_identity(self) -> bool:
        """True when the set leaves the model's own frequencies as they are."""
        return all(value == 1.0 for value in self.rescale_factors)

    @property
    def effective_start_tokens(self) -> int:
        """`num_start_tokens`, or 0 where they rotate like all others."""
        return 0 if self.is_identity else self.num_start_tokens


@dataclass(frozen=True)
class LongRopeConfig:
    """A model's rotary geometry and its factor sets, validated on construction.

    Raises:
        LongRopeError: Any field breaks its rule; the message names field, index, value and rule.
    """

    rotary_base: float
    """Base of RoPE (HF `rope_theta`, Megatron `--rotary-base`)."""
    rotary_dim: int
    """Rotated dimensions of a head: head_dim * rotary_percent; even."""
    original_max_position_embeddings: int
    """Window, in tokens, of the pre-trained model."""
    factor_sets: tuple[FactorSet, ...]
    """Sorted by max_length; a sequence uses the first set that covers it."""
    attention_factor: float | None = None
    """One value for every window, or None to follow `attention_factor_policy` set by set."""
    attention_factor_policy: str = "su"
    """`su`, `yarn` or `none`; see :func:`megatron_longrope.frequencies.attention_factor`."""
    base_frequencies: Mapping[str, Any] | None = None
    """How the model itself scales RoPE, as :mod:`.base_frequencies` describes it; the factors
    multiply its scaling. None for plain RoPE."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor_sets", tuple(self.factor_sets))
        validate_geometry(self)
        if self.base_frequencies is not None:
            validate_base_frequencies(self.base_frequencies)
            object.__setattr__(self, "base_frequencies", dict(self.base_frequencies))
        validate_factor_sets(self)

    @property
    def max_length(self) -> int:
        """Longest sequence, in tokens, that any factor set covers."""
        return self.factor_sets[-1].max_length

    def factor_set_for(self, length: int) -> FactorSet:
        """Smallest set whose max_length covers `length` tokens.

        Raises:
            LongRopeError: No set reaches that far.
        """
        for factor_set in self.factor_sets:
            if length <= factor_set.max_length:
                return factor_set
        raise LongRopeError(
            f"sequence length {length} exceeds {self.max_length}, the max_length of the largest "
            "factor set; search factors for the longer window or shorten the sequence"
        )

    def attention_factor_for(self, length: int) -> float:
        """Multiplier of q and k for a sequence of `length` tokens (logits get its square)."""
        if self.attention_factor is not None:
            return self.attention_factor
        longest = self.factor_set_for(length).max_length
        return self.attention_factor_by(self.attention_factor_policy, longest)

    def attention_factor_by(self, policy: str, max_length: int) -> float:
        """The attention factor of a window of `max_length` tokens under a policy.

        A model whose own scaling has one keeps it: the policy's multiplies it.
        """
        original = self.original_max_position_embeddings
        own = 1.0 if self.base_frequencies is None else base_attention_factor(self.base_frequencies)
        return own * attention_factor(policy, max_length / original, original)

    @property
    def is_bare(self) -> bool:
        """True when it says no more than how the model itself rotates within its window."""
        only = self.factor_sets[0]
        return (
            len(self.factor_sets) == 1
            and only.is_identity
            and only.max_length == self.original_max_position_embeddings
            and self.attention_factor is None
        )

    @property
    def base_factors(self) -> tuple[float, ...] | None:
        """By what the model itself slows each frequency of plain RoPE; None for plain RoPE."""
        if self.base_frequencies is None:
            return None
        return base_factors(self.base_frequencies, self.rotary_base, self.rotary_dim)

    def plain_factors(self, factor_set: FactorSet) -> tuple[float, ...]:
        """By what a set and the model together slow each frequency of plain RoPE."""
        own = self.base_factors
        if own is None:
            return factor_set.rescale_factors
        return tuple(a * b for a, b in zip(own, factor_set.rescale_factors, strict=True))

    def with_factor_set(self, factor_set: FactorSet) -> LongRopeConfig:
        """A copy that holds `factor_set`, in place of a set with the same max_length if any."""
        kept = [item for item in self.factor_sets if item.max_length != factor_set.max_length]
        ordered = sorted([*kept, factor_set], key=lambda item: item.max_length)
        return replace(self, factor_sets=tuple(ordered))

    def to_dict(self) -> dict[str, Any]:
        """JSON object; of schema 1 where that holds everything."""
        base = self.base_frequencies
        extra = {} if base is None else {"base_frequencies": dict(base)}
        return {
            "schema": 1 if base is None else SCHEMA_VERSION,
            "rope_type": "longrope",
            "rotary_base": self.rotary_base,
            "rotary_dim": self.rotary_dim,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "attention_factor": self.attention_factor,
            "attention_factor_policy": self.attention_factor_policy,
            "factor_sets": [
                {
                    "max_length": item.max_length,
                    "rescale_factors": list(item.rescale_factors),
                    "num_start_tokens": item.num_start_tokens,
                    "origin": dict(item.origin),
                }
                for item in self.factor_sets
            ],
            **extra,
        }

    @classmethod
    def from_dict(cls, value: Any) -> LongRopeConfig:
        """Build from a JSON object of schema 1 or 2.

        Raises:
            LongRopeError: Unknown schema, unknown or missing key, or an invalid field.
        """
        if not isinstance(value, dict):
            raise LongRopeError(f"expected a JSON object, got {type(value).__name__}")
        schema = value.get("schema")
        if schema not in (1, SCHEMA_VERSION) or isinstance(schema, bool):
            raise LongRopeError(
                f"schema {schema!r} is not supported; this release reads schema 1 and 2"
            )
        known = _CONFIG_KEYS - ({"base_frequencies"} if schema == 1 else set())
        check_keys("the configuration", value, known, _OPTIONAL_CONFIG_KEYS)
        if value["rope_type"] != "longrope":
            raise LongRopeError(f'rope_type {value["rope_type"]!r} must be "longrope"')
        if not isinstance(value["factor_sets"], list):
            raise LongRopeError("factor_sets must be a list of objects")
        sets = []
        for index, item in enumerate(value["factor_sets"]):
            where = f"factor_sets[{index}]"
            if not isinstance(item, dict):
                raise LongRopeError(f"{where} must be an object, got {type(item).__name__}")
            check_keys(where, item, _SET_KEYS, {"num_start_tokens", "origin"})
            if not isinstance(item["rescale_factors"], list):
                raise LongRopeError(f"{where}.rescale_factors must be a list of numbers")
            if not isinstance(item.get("origin", {}), dict):
                raise LongRopeError(f"{where}.origin must be an object")
            sets.append(FactorSet(**item))
        names = (_CONFIG_KEYS & value.keys()) - {"schema", "rope_type"}
        fields = {key: value[key] for key in names}
        return cls(**{**fields, "factor_sets": tuple(sets)})

    def save(self, path: str | Path) -> None:
        """Write the JSON file atomically."""
        write_json_atomic(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> LongRopeConfig:
        """Read and validate a JSON file; warn of factors that no search would propose.

        Args:
            path (str | Path): A file, or `published:NAME` (:mod:`megatron_longrope.published`).

        Raises:
            LongRopeError: The file or its content is not valid; the message starts with the path.
        """
        value = read_json(published.resolve(path))
        try:
            config = cls.from_dict(value)
        except ValueError as error:
            raise LongRopeError(f"{path}: {error}") from None
        names = [f"factor_sets[{i}].rescale_factors" for i in range(len(config.factor_sets))]
        _warn_of_unusual_factors(f"{path}: ", names, config)
        return config

    def to_hf(
        self, short_length: int | None = None, long_length: int | None = None
    ) -> dict[str, Any]:
        """The `config.json` fields of transformers' `longrope`, valid for 4.57 and 5.x.

        Transformers knows two factor vectors and one attention factor: `short_factor` up to
        `original_max_position_embeddings`, `long_factor` beyond. Both spellings are returned,
        `rope_scaling` (4.x) and `rope_parameters` (5.x, which also holds `rope_theta`).

        Args:
            short_length (int, optional): Window whose set becomes short_factor. Defaults to
                original_max_position_embeddings.
            long_length (int, optional): Window whose set becomes long_factor and which becomes
                max_position_embeddings. Defaults to the largest.

        Raises:
            LongRopeError: Start tokens or differing attention factors, which transformers cannot
                hold, or a long_length below the original window.
        """
        short_length = short_length or self.original_max_position_embeddings
        long_length = long_length or self.max_length
        if long_length < self.original_max_position_embeddings:
            raise LongRopeError(
                f"long_length {long_length} is below the original window "
                f"{self.original_max_position_embeddings}; transformers' longrope only extends it"
            )
        short, long = self.factor_set_for(short_length), self.factor_set_for(long_length)
        for name, item in (("short", short), ("long", long)):
            if item.effective_start_tokens:
                raise LongRopeError(
                    f"the {name} factor set (max_length {item.max_length}) has num_start_tokens "
                    f"{item.num_start_tokens}; transformers' longrope cannot express start tokens, "
                    "search again with --start-tokens 0, or export without them (convert to-hf "
                    "--drop-start-tokens)"
                )
        short_value, long_value = map(self.attention_factor_for, (short_length, long_length))
        if not math.isclose(short_value, long_value, rel_tol=1e-12):
            raise LongRopeError(
                f"attention factor {short_value:.6g} at {short_length} tokens differs from "
                f"{long_value:.6g} at {long_length}; transformers applies one value to both "
                f"windows, so give both the factors of {long_length} (convert to-hf --short-length "
                f"{long_length}), write attention_factor {long_value!r} into the factor file, or "
                f"search the short window again under it (--attention-factor {long_value!r})"
            )
        scaling = {
            "rope_type": "longrope",
            "factor": long_length / self.original_max_position_embeddings,
            "attention_factor": long_value,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "short_factor": list(self.plain_factors(short)),
            "long_factor": list(self.plain_factors(long)),
        }
        return {
            "max_position_embeddings": long_length,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "rope_theta": self.rotary_base,
            "rope_scaling": dict(scaling),
            "rope_parameters": {**scaling, "rope_theta": self.rotary_base},
        }

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any], rotary_dim: int | None = None) -> LongRopeConfig:
        """Read the rotation of a transformers `config.json` (either spelling).

        A type that scales RoPE without LongRoPE's factors becomes `base_frequencies` under one set
        of ones. Warns, once and by key and index, of factors that no search would propose.

        Args:
            hf_config (Mapping): The whole file.
            rotary_dim (int, optional): Rotated dimensions of a head. Defaults to what the factor
                lists are made for.

        Raises:
            LongRopeError: The configuration is plain RoPE, lacks a field, or a value breaks its
                rule; the message names the key of config.json.
        """
        rope = read_hf_rope(hf_config)
        if rope.rope_type in BASE_KEYS:
            return _scaled_base(rope, hf_config, rotary_dim)
        if rope.rope_type != "longrope":
            raise LongRopeError(f"rope_type {rope.rope_type!r} in config.json is not longrope")
        lists = {}
        for key in ("short_factor", "long_factor"):
            if key not in rope.parameters:
                raise LongRopeError(f"config.json has rope_type longrope but no {key}")
            lists[key] = rope.parameters[key]
            if not isinstance(lists[key], list | tuple):
                raise LongRopeError(f"{key} in config.json must be a list of numbers")
        max_length = model_window(hf_config)
        original = rope.original_max_position_embeddings
        assert original is not None  # read_hf_rope refuses this type without it
        value = rope.parameters.get("attention_factor")
        if value is None:
            ratio = rope.parameters.get("factor")
            ratio = max_length / original if ratio is None else ratio
            check_positive("factor", ratio)
            value = attention_factor("su", ratio, original)
        check_positive("attention_factor", value)
        if difference := other_in_4_57(hf_config, rope):
            warnings.warn(f"config.json has {difference}", stacklevel=2)
        if rotary_dim is None:
            rotary_dim = 2 * max(map(len, lists.values()))
        windows = {"short_factor": original, "long_factor": max_length}
        if max_length <= original:
            del windows["long_factor"]
        for key in windows:  # here, not as factor_sets[i], the name is one that the file holds
            validate_factors(key, lists[key], rotary_dim, max(max_length / original, 1.0))
        config = cls(
            rotary_base=rope.rope_theta,
            rotary_dim=rotary_dim,
            original_max_position_embeddings=original,
            factor_sets=tuple(
                FactorSet(window, tuple(lists[key]), origin={"source": "hf"})
                for key, window in windows.items()
            ),
            attention_factor=float(value),
        )
        _warn_of_unusual_factors("config.json: ", list(windows), config)
        return config


def _scaled_base(
    rope: HfRope, hf_config: Mapping[str, Any], rotary_dim: int | None
) -> LongRopeConfig:
    rotary_dim = rotary_dim or rotated_dimensions(hf_config, rope)
    base = {"rope_type": rope.rope_type, **rope.parameters}
    if rope.original_max_position_embeddings is not None:
        base["original_max_position_embeddings"] = rope.original_max_position_embeddings
    window = model_window(hf_config)
    try:
        validate_base_frequencies(base)
        if rope.rope_type == "yarn":  # Qwen's cards add it and leave max_position_embeddings
            reached = min(base["factor"], 2.0**53) * base["original_max_position_embeddings"]
            window = max(window, int(reached))
        stated = rope.original_max_position_embeddings is not None
        # transformers reads no window here, and files state the one before or the one after.
        if rope.rope_type == "linear" and base["factor"] != 1 and not stated:
            warnings.warn(
                f"config.json has linear RoPE scaling by {base['factor']:g}, and its "
                f"max_position_embeddings {window} is taken for the window with it; where it is "
                "the window before, give --original-length "
                f"{window * base['factor']:.0f}",
                stacklevel=1,  # whoever reads it, so that Python shows it once
            )
        return identity_config(rope.rope_theta, rotary_dim, window, base)
    except ValueError as error:  # the rules name the fields of our own file
        raise LongRopeError(
            str(error).replace("base_frequencies", f"config.json's {rope.holder}")
        ) from None


def _warn_of_unusual_factors(source: str, names: Sequence[str], config: LongRopeConfig) -> None:
    """One warning that names the first unusual factor; `names` are the vectors', set by set."""
    extension = extension_ratio(config)
    for name, item in zip(names, config.factor_sets, strict=True):
        if found := unusual_factor(name, item.rescale_factors, extension):
            warnings.warn(
                f"{source}{found}, which no search would propose; the factors are used as they are",
                stacklevel=3,
            )
            return


def identity_config(
    rotary_base: float,
    rotary_dim: int,
    original_max_position_embeddings: int,
    base_frequencies: Mapping[str, Any] | None = None,
) -> LongRopeConfig:
    """Return a model without factors as a configuration: one all-ones set for its window."""
    window = original_max_position_embeddings
    only = FactorSet(window, (1.0,) * (rotary_dim // 2), origin={"method": "none"})
    return LongRopeConfig(
        rotary_base, rotary_dim, window, (only,), base_frequencies=base_frequencies
    )
