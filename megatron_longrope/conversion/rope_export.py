"""The rotary keys of an exported config.json, for every program that is known to read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_longrope.checkpoint.hf.families import Family
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.frequencies import attention_factor

_MSCALES = ("short_mscale", "long_mscale")


@dataclass(frozen=True)
class ExportedRope:
    """What config.json says about the rotation."""

    keys: dict[str, Any]
    """Keys of config.json, in place of those of plain RoPE."""
    attention_factor: float
    """Multiplier of q and k in both windows."""
    remarks: tuple[str, ...] = ()
    """Sentences about what some readers cannot do."""


def export_rope(
    config: LongRopeConfig,
    family: Family,
    short_length: int | None = None,
    target_length: int | None = None,
) -> ExportedRope:
    """Write factors as transformers' `longrope`, valid for 4.57, 5.x and vLLM.

    vLLM does not read attention_factor: it computes the value of the paper's formula unless
    `short_mscale` and `long_mscale` are there, so they are written where the two values differ.

    Args:
        family (Family): The architecture; Phi-3's code checks which keys there are.
        short_length (int, optional): Window whose set becomes short_factor.
        target_length (int, optional): Window whose set becomes long_factor.

    Raises:
        LongRopeError: transformers cannot hold the factors; see :meth:`.LongRopeConfig.to_hf`.
    """
    is_whole = target_length in (None, config.max_length)
    if is_whole and is_bare_base(config) and not family.bare_longrope:
        return _bare_base(config)
    keys = config.to_hf(short_length, target_length)
    scaling = keys["rope_scaling"]
    used = scaling["attention_factor"]
    computed = attention_factor("su", scaling["factor"], config.original_max_position_embeddings)
    if math.isclose(used, computed, rel_tol=1e-6):
        if family.bare_longrope:
            # transformers 4.57 refuses any other key here, and takes the rest from the top.
            lists = {key: scaling[key] for key in ("short_factor", "long_factor")}
            keys["rope_scaling"] = {"type": "longrope", **lists}
            del keys["rope_parameters"]
        return ExportedRope(keys, used)
    for spelling in ("rope_scaling", "rope_parameters"):
        keys[spelling] |= dict.fromkeys(_MSCALES, used)
    # transformers 5.x warns of keys that it does not know, except of those named here.
    keys["ignore_keys_at_rope_validation"] = list(_MSCALES)
    remark = (
        "transformers 4.57 warns of the keys short_mscale and long_mscale, which vLLM reads, and "
        "goes on"
    )
    if family.bare_longrope:
        remark = (
            f"transformers 4.57 cannot load this folder: its {family.name} holds only the "
            f"attention factor of its formula ({computed:.6g}), not {used:.6g}; 5.x can"
        )
    return ExportedRope(keys, used, (remark,))


def is_bare_base(config: LongRopeConfig) -> bool:
    """Whether a configuration says no more than how the model itself scales RoPE."""
    return config.base_frequencies is not None and config.is_bare


def _bare_base(config: LongRopeConfig) -> ExportedRope:
    """The scaling itself; the original window stands inside only, where it is that before it."""
    scaling = dict(config.base_frequencies)
    keys = {
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": config.rotary_base},
    }
    return ExportedRope(keys, config.attention_factor_for(config.max_length))
