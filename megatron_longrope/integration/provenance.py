"""What a checkpoint says about its factors: compared with the run that loads it, and restored.

Every checkpoint of a run with LongRoPE holds `longrope_config_value` (the factor sets by value) and
`longrope_lineage` among its arguments. The lineage lists the stages that the weights went through,
the latest last. A stage is a dict of plain values: `rope` (`stock`, `longrope`, or `unknown` of a
checkpoint that stored no arguments), `iteration` (of the checkpoint that it began from, 0 from
scratch), `seq_length` (None of an unknown one), and with LongRoPE `max_length` of
the set in use, `attention_factor` and `sha256`, a hash of all that :class:`.rotation.InUse` holds.
A stage in which the mode changed also has `mode_changes`: `iteration`, `from` and `to` of each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_longrope.base_frequencies import megatron_base_frequencies
from megatron_longrope.errors import LongRopeError
from megatron_longrope.frequencies import carries_factor
from megatron_longrope.integration.rotation import Rotary, difference
from megatron_longrope.integration.settings import LongRopeSettings, is_packed


@dataclass(frozen=True)
class Verdict:
    """What follows from a checkpoint that the run may load."""

    lineage: list[dict[str, Any]]
    """What the run's own checkpoints shall hold as `longrope_lineage`; empty without LongRoPE."""
    remark: str | None = None
    """One line for the log, or None when the run goes on as the checkpoint's did."""


def check(
    args: argparse.Namespace,
    saved: argparse.Namespace,
    settings: LongRopeSettings | None,
    iteration: int = 0,
) -> Verdict:
    """Compare the factors of a checkpoint with those of the run that loads it.

    Weights fit the rotation that they were trained under. So they fit this run when

    - it rotates exactly as the checkpoint's run did (:class:`.rotation.InUse`): factors, start
      tokens, attention factor and max_length of the set in use, original window, base, dimension
      and precision of angles; neither the origin of factors nor a set not in use counts; or
    - only the sequence length moved on under the same factors: the checkpoint's run would have
      rotated as this one at this one's length, and this run's factors would have rotated as the
      checkpoint's did at its length.

    A model that was trained with plain RoPE fits any factors for its base: that is the first
    stage. Either way it must rotate the same dimensions, in the same pairs. A run without factors
    fits a model without that Megatron scales alike (`--use-rope-scaling`). A change to or from
    mode `mixed` under the same factors is no stage either: samples rotate as before, and only
    packed short documents do not. It is noted in the last stage; a run that packs documents must
    have asked for the mode. Everything else is refused, unless `--longrope-replace-factors` asks
    for it.

    Args:
        args (Namespace): The run's arguments.
        saved (Namespace): The checkpoint's.
        settings (LongRopeSettings): The run's; None leaves RoPE stock.
        iteration (int): The checkpoint's. Defaults to 0.

    Raises:
        LongRopeError: The run would silently train or evaluate another model.
    """
    theirs = Rotary.of_checkpoint(saved)
    if settings is None:
        if theirs is None or theirs.is_stock:
            return Verdict(saved_lineage(saved) if theirs else [])
        # Megatron gives --rope-scaling-factor to no model.
        scaling = megatron_base_frequencies(
            argparse.Namespace(**{**vars(args), "rope_scaling_factor": None})
        )
        own = theirs.config.base_frequencies
        if not theirs.has_factors and own == scaling:
            return Verdict(saved_lineage(saved))
        trained = f"LongRoPE, {theirs.describe()}" if theirs.has_factors else _scaled(own)
        raise LongRopeError(
            f"the checkpoint was trained with {trained}, and this run has {_scaled(scaling)}; give "
            "the checkpoint's factors with --longrope-config, or --use-checkpoint-args, which "
            "restores them"
        )
    ours = Rotary.of_run(args, settings)
    lineage = saved_lineage(saved)
    refusal = _other_positions(args, saved)
    if refusal is None and theirs is not None and theirs.in_use() == ours.in_use():
        return Verdict(lineage)
    if refusal is None and theirs is not None and theirs.differs_in_mode_alone(ours):
        return _mode_change(args, lineage, theirs, ours, settings.mode_is_chosen, iteration)
    step = ours.describe()
    if theirs is None or not theirs.has_factors:
        refusal = refusal or _other_base(saved, theirs, ours)
        if ours.is_stock and refusal is None:
            return Verdict(lineage)
        scaling = ours.config.base_frequencies
        whose = "stock RoPE" if scaling is None else f"RoPE scaled by {scaling['rope_type']}"
        remark = f"first LongRoPE stage: {step}, on a model with {whose}"
    else:
        refusal = refusal or _other_factors(theirs, ours)
        step += f", after {theirs.describe()}"
        remark = f"same factors at another length: {step}"
    if refusal is not None:
        if not getattr(args, "longrope_replace_factors", False):
            raise LongRopeError(
                f"{refusal}, or add --longrope-replace-factors to go on with this run's"
            )
        remark = f"factors replaced (--longrope-replace-factors): {step}"
    return Verdict([*lineage, _stage(ours, iteration)], remark)


def _scaled(scaling: Mapping[str, Any] | None) -> str:
    if scaling is None:
        return "stock RoPE"
    return f"RoPE scaled by {scaling['rope_type']}, factor {scaling['factor']:g}"


def _mode_change(
    args: argparse.Namespace,
    lineage: list[dict[str, Any]],
    theirs: Rotary,
    ours: Rotary,
    is_chosen: bool,
    iteration: int,
) -> Verdict:
    if is_packed(args) and not is_chosen and not getattr(args, "longrope_replace_factors", False):
        raise LongRopeError(
            f"the checkpoint was trained in mode {theirs.mode} and this run would rotate short "
            f"packed documents in mode {ours.mode}; give --longrope-mode {theirs.mode} to go on as "
            f"it was, or --longrope-mode {ours.mode} to change the mode"
        )
    change = {"iteration": iteration, "from": theirs.mode, "to": ours.mode}
    changes = [*lineage[-1].get("mode_changes", ()), change]
    remark = f"mode {ours.mode} after mode {theirs.mode}, same factors: {ours.describe()}"
    return Verdict([*lineage[:-1], {**lineage[-1], "mode_changes": changes}], remark)


def unknown(args: argparse.Namespace, settings: LongRopeSettings | None, iteration: int) -> Verdict:
    """What follows from a checkpoint that tells nothing of its run, so that none can be refused."""
    remark = "the checkpoint stores no arguments; its factors could not be compared with this run's"
    if settings is None:
        return Verdict([], remark)
    past = {"rope": "unknown", "iteration": 0, "seq_length": None}
    return Verdict([past, _stage(Rotary.of_run(args, settings), iteration)], remark)


def begin(args: argparse.Namespace, settings: LongRopeSettings) -> list[dict[str, Any]]:
    """Lineage of a run that loads nothing."""
    return [_stage(Rotary.of_run(args, settings), 0)]


def saved_lineage(saved: argparse.Namespace) -> list[dict[str, Any]]:
    """A checkpoint's lineage; where none is stored, the one stage that its arguments tell."""
    stored = getattr(saved, "longrope_lineage", None)
    if stored:
        return [dict(stage) for stage in stored]
    rotary = Rotary.of_checkpoint(saved)
    if rotary is None:
        return [_stock_stage(0, getattr(saved, "seq_length", None))]
    return [_stage(rotary, 0)]


def restore(args: argparse.Namespace, saved: argparse.Namespace | None) -> bool:
    """Give a run without `--longrope-config` the checkpoint's factors (`--use-checkpoint-args`).

    The mode and the precision of angles follow where the user gave no flag. A softmax scale
    that an earlier stage of the plugin left in `args` goes: Megatron restores none, but scripts may
    copy a checkpoint's arguments as a whole. One that the user set stays.

    Args:
        args (Namespace): The run's arguments, validated by Megatron; changed in place.
        saved (Namespace): Arguments of the checkpoint as Megatron read them while it parsed. None
            lets the checkpoint be read here: scripts may parse before the plugin's hooks are in.

    Returns:
        bool: True when factors were restored.
    """
    _forget_softmax_scale(args)
    if getattr(args, "longrope_config", None):
        return False
    if saved is None and getattr(args, "use_checkpoint_args", False):
        saved = _read_saved_args(args)
    value = getattr(saved, "longrope_config_value", None)
    if value is None:
        return False
    args.longrope_config_value = value
    if args.longrope_mode is None:
        args.longrope_mode = getattr(saved, "longrope_mode", None)
    if getattr(saved, "longrope_hf_parity", False):
        args.longrope_hf_parity = True
    return True


def _forget_softmax_scale(args: argparse.Namespace) -> None:
    factor = getattr(args, "longrope_attention_factor", None)
    scale = getattr(args, "softmax_scale", None)
    if factor is None or scale is None:
        return
    if carries_factor(scale, factor, args.kv_channels):
        args.softmax_scale = None


def _read_saved_args(args: argparse.Namespace) -> argparse.Namespace | None:
    for name in ("load", "pretrained_checkpoint"):  # the order in which Megatron looks for weights
        directory = getattr(args, name, None)
        # None: no checkpoint yet, or another format. It is compared when Megatron loads it.
        if directory and (saved := saved_args(directory, args)) is not None:
            return saved
    return None


def saved_args(directory: str, args: argparse.Namespace) -> argparse.Namespace | None:
    """Arguments of the checkpoint in a folder, Megatron-Bridge's too; None if nothing tells them.

    Args:
        directory (str): Megatron's `--load` or `--pretrained-checkpoint`.
        args (Namespace): The run's, of which `ckpt_step` chooses an iteration.
    """
    from megatron_longrope.checkpoint.reader import MegatronCheckpoint

    try:
        return MegatronCheckpoint.open(directory, getattr(args, "ckpt_step", None) or None).args
    except ValueError:
        return None


def _stage(rotary: Rotary, iteration: int) -> dict[str, Any]:
    if rotary.is_stock:
        return _stock_stage(iteration, rotary.seq_length)
    in_use = rotary.in_use()
    text = json.dumps(asdict(in_use), sort_keys=True)
    return {
        "rope": "longrope",
        "iteration": iteration,
        "seq_length": rotary.seq_length,
        "max_length": in_use.sequence.max_length,
        "attention_factor": in_use.sequence.attention_factor,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _stock_stage(iteration: int, seq_length: int | None) -> dict[str, Any]:
    return {"rope": "stock", "iteration": iteration, "seq_length": seq_length}


def _other_positions(args: argparse.Namespace, saved: argparse.Namespace) -> str | None:
    """What a checkpoint has, and a run with factors has not, besides factors and frequencies."""
    kind = getattr(saved, "position_embedding_type", None)
    if kind not in (None, "rope"):
        return (
            f"the checkpoint was trained with --position-embedding-type {kind} and this run has "
            "rope; give a checkpoint that was trained with rope"
        )
    factor = getattr(saved, "rotary_seq_len_interpolation_factor", None)
    if factor is not None:
        return (
            f"the checkpoint was trained with --rotary-seq-len-interpolation-factor {factor} and "
            "this run does not interpolate positions; give a checkpoint without"
        )
    for name, default in (("rotary_percent", 1.0), ("rotary_interleaved", False)):
        pair = getattr(saved, name, default), getattr(args, name, default)
        if pair[0] != pair[1]:
            return (
                f"the checkpoint was trained with {name} {pair[0]} and this run has {pair[1]}; "
                f"give the checkpoint's {name}"
            )
    return None


def _other_factors(theirs: Rotary, ours: Rotary) -> str | None:
    found = difference(theirs, ours)
    return found and (
        f"the checkpoint was trained with other LongRoPE factors than this run's: {found}; give "
        "the checkpoint's factors (--use-checkpoint-args without --longrope-config restores them)"
    )


def _other_base(saved: argparse.Namespace, theirs: Rotary | None, ours: Rotary) -> str | None:
    """Factors rescale the frequencies that the model was trained with."""
    scaling = megatron_base_frequencies(saved) if theirs is None else theirs.config.base_frequencies
    if scaling != ours.config.base_frequencies:
        scaled, factors = (
            "plain RoPE" if item is None else f"RoPE scaled by {item['rope_type']}"
            for item in (scaling, ours.config.base_frequencies)
        )
        return (
            f"the checkpoint was trained with {scaled} and this run's factors multiply {factors}; "
            "give factors with the checkpoint's base_frequencies"
        )
    base = getattr(saved, "rotary_base", None)
    if base is None or float(base) == float(ours.config.rotary_base):
        return None
    return (
        f"the checkpoint was trained with rotary_base {base:g} and this run's factors are for "
        f"{ours.config.rotary_base:g}; give factors and --rotary-base for the checkpoint's"
    )
