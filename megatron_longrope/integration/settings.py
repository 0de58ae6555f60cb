"""`LongRopeSettings`: the flags of a run, checked against Megatron's own flags."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.errors import LongRopeError
from megatron_longrope.frequencies import softmax_scale
from megatron_longrope.fused_rope import fused_rope_drops, fused_rope_overflow
from megatron_longrope.integration.attention_choice import OURS
from megatron_longrope.selection import FactorSelection, check_original_factors

# Above this a dense [s, s] mask from the data loader is no longer affordable (4 GiB of bools).
DENSE_MASK_LIMIT = 65536


@dataclass(frozen=True)
class LongRopeSettings:
    """What a run does with LongRoPE."""

    selection: FactorSelection
    """Factor sets and which one a sequence uses."""
    carrier: str = "softmax"
    """`softmax` or `rope`: where the attention factor is applied."""
    attention_factor: float = 1.0
    """Multiplier of q and k at the run's sequence length."""
    hf_parity: bool = False
    """fp32 angles as transformers computes them."""
    mode_is_chosen: bool = False
    """Whether the mode was asked for or restored, rather than left to the default."""

    @property
    def config(self) -> LongRopeConfig:
        """Factor sets."""
        return self.selection.config

    @property
    def follows_documents(self) -> bool:
        """True when packed documents may need another attention factor than the run carries."""
        return self.selection.mode == "mixed" and self.document_scale(1) != 1.0

    def document_scale(self, length: int) -> float:
        """What a document of `length` tokens multiplies the run's softmax scale by."""
        return (self.selection.attention_factor(length) / self.attention_factor) ** 2


class DocumentScale:
    """Multiplier of the run's softmax scale for a document, which attention asks for.

    Static inference chooses angles by what a context has room for, long before the sequence is
    that long. There the rotary module sets `capacity`, so that one length decides both.

    Args:
        settings (LongRopeSettings): Of the run.
    """

    def __init__(self, settings: LongRopeSettings) -> None:
        self._settings = settings
        self.capacity: int | None = None
        """Tokens that the static inference context of the batch has room for; None in training."""

    def __call__(self, length: int) -> float:
        """For a document of `length` tokens."""
        return self._settings.document_scale(length if self.capacity is None else self.capacity)


def check_flags(args: argparse.Namespace) -> None:
    """Check what is wrong whatever the factor file holds, and so wrong on every rank.

    Raises:
        LongRopeError: A flag does not go with `--longrope-config`.
    """
    _refuse_other_scaling(args)
    _check_data(args)


def check_spec(args: argparse.Namespace) -> None:
    """Check the layers of a HybridModel that the plugin's own spec would build.

    Raises:
        LongRopeError: A kind of layer that the spec does not have.
    """
    spec = getattr(args, "spec", None) or [""]
    if spec[0] != f"{__package__}.hybrid_spec":
        return
    from megatron_longrope.integration.hybrid_spec import check_layers

    check_layers((getattr(args, "hybrid_layer_pattern", None) or "").replace("|", ""))


def config_from_args(args: argparse.Namespace) -> LongRopeConfig | None:
    """The run's factor sets: the file's, else what a checkpoint's arguments hold, else None.

    Raises:
        LongRopeError: The file is missing or invalid.
    """
    path, value = args.longrope_config, getattr(args, "longrope_config_value", None)
    # Tools copy a checkpoint's arguments as a whole, and its file may be another machine's.
    if path and (value is None or Path(path).exists()):
        return LongRopeConfig.load(path)
    return None if value is None else LongRopeConfig.from_dict(value)


def check_unused(args: argparse.Namespace) -> None:
    """Check the flags of a run without factors, which would be ignored.

    Raises:
        LongRopeError: One of them needs factors.
    """
    for name, stock in _NEEDS_FACTORS.items():
        if getattr(args, name, None) not in stock:
            raise LongRopeError(
                f"{_flag(name)} needs factors; give them with --longrope-config, or remove it"
            )


def settings_from_args(
    args: argparse.Namespace, config: LongRopeConfig, attention: str
) -> LongRopeSettings:
    """Check the flags after Megatron has validated its own.

    The factors are also stored in `args` by value (`longrope_config_value`), so that every
    checkpoint of the run holds them.

    Args:
        args (Namespace): Megatron's arguments.
        config (LongRopeConfig): From :func:`config_from_args`.
        attention (str): From :func:`.attention_choice.attention_from_args`.

    Raises:
        LongRopeError: A combination that would train a different model than asked for.
    """
    check_flags(args)
    rotary_dim = int(args.kv_channels * args.rotary_percent)
    _check_geometry(args, config, rotary_dim)
    selection = FactorSelection(config, args.longrope_mode or "auto", args.seq_length)
    if selection.mode in ("short", "mixed"):
        check_original_factors(config, f"--longrope-mode {selection.mode} would take long factors")
    factor = selection.attention_factor(args.seq_length)
    settings = LongRopeSettings(
        selection=selection,
        carrier=_carrier(args, factor, whole_head=rotary_dim == args.kv_channels),
        attention_factor=factor,
        hf_parity=args.longrope_hf_parity,
        mode_is_chosen=args.longrope_mode is not None,
    )
    _check_start_tokens(args, config)
    _check_kernels(args, settings)
    _check_fused_rope(args)
    if selection.mode == "mixed":
        _check_mixed(args, settings, attention)
    if settings.carrier == "softmax" and factor != 1.0:
        scale = softmax_scale(factor, args.kv_channels)
        if getattr(args, "softmax_scale", None) not in (None, scale):
            raise LongRopeError(
                f"softmax_scale {args.softmax_scale} is already set, so the attention factor has "
                "no room there; use --longrope-attention-factor-carrier rope"
            )
        # Megatron copies every args field that TransformerConfig knows: this one is our carrier.
        args.softmax_scale = scale
    args.longrope_config_value = config.to_dict()
    args.longrope_attention_factor = factor
    return settings


def is_packed(args: argparse.Namespace) -> bool:
    """True when a batch is several documents (THD format)."""
    # RL without sequence packing makes a pack of every single sequence.
    flags = ("sft", "dataloader_inter_document_masking", "perform_rl_step")
    return any(getattr(args, name, False) for name in flags)


def _carrier(args: argparse.Namespace, factor: float, *, whole_head: bool) -> str:
    choice = args.longrope_attention_factor_carrier
    obstacle = _softmax_obstacle(args, whole_head)
    if choice == "auto":
        return "softmax" if obstacle is None else "rope"
    if choice == "softmax" and factor != 1.0 and obstacle is not None:
        raise LongRopeError(f"{obstacle}; use --longrope-attention-factor-carrier rope")
    return choice


def _softmax_obstacle(args: argparse.Namespace, whole_head: bool) -> str | None:
    """Why the softmax scale cannot carry the attention factor, or None when it can."""
    if not whole_head:
        return (
            f"rotary_percent {args.rotary_percent} rotates a part of each head, and the softmax "
            "scale would also multiply the rest"
        )
    if getattr(args, "no_rope_freq", None):
        return "--no-rope-freq leaves layers unrotated, and the softmax scale would multiply them"
    if getattr(args, "use_mup", False):
        return "--use-mup has a softmax scale of its own"
    if getattr(args, "flash_decode", False):
        return "--flash-decode ignores the softmax scale"
    return None


def _check_start_tokens(args: argparse.Namespace, config: LongRopeConfig) -> None:
    """Refuse positions that are not those of a document: start tokens are the first of each.

    Megatron's bins name their own length as that of the longest sequence. Their rotary table has a
    row for each token of the bin, which megatron-core reads as positions of the whole bin.
    """
    if not getattr(args, "rl_use_sequence_packing", False):
        return
    count = max(item.effective_start_tokens for item in config.factor_sets)
    if count:
        raise LongRopeError(
            f"the factors have {count} start tokens, and --rl-use-sequence-packing counts "
            "positions from the start of a bin, so that only its first sequence would have any; "
            "remove that flag, or use factors without (longrope search --start-tokens 0)"
        )


def _check_kernels(args: argparse.Namespace, settings: LongRopeSettings) -> None:
    """Refuse kernels that would drop the multiplier of cos and sin."""
    if settings.carrier != "rope" or settings.attention_factor == 1.0:
        return
    if is_packed(args) and getattr(args, "apply_rope_fusion", False):
        raise LongRopeError(fused_rope_drops(settings.attention_factor))
    if getattr(args, "fused_single_qkv_rope", False):
        raise LongRopeError(
            f"attention factor {settings.attention_factor:.6g} on cos and sin is ignored by "
            "--fused-single-qkv-rope; remove that flag"
        )


def _check_fused_rope(args: argparse.Namespace) -> None:
    """Refuse lengths that the fused kernel cannot index."""
    heads = getattr(args, "num_attention_heads", None)
    if not getattr(args, "apply_rope_fusion", False) or heads is None:
        return
    grouped = getattr(args, "group_query_attention", False)
    batch = max(args.micro_batch_size, getattr(args, "eval_micro_batch_size", None) or 0)
    overflow = fused_rope_overflow(
        args.seq_length // args.context_parallel_size * batch,
        heads,
        args.num_query_groups if grouped else heads,
        args.kv_channels,
        args.tensor_model_parallel_size,
    )
    if overflow is not None:
        raise LongRopeError(overflow)


def _check_mixed(args: argparse.Namespace, settings: LongRopeSettings, attention: str) -> None:
    """Refuse runs in which documents could not follow their own window."""
    mode = "--longrope-mode mixed"
    if getattr(args, "sft", False):
        # SFTDataset ends its last conversation at the end of the pack (`cu_seqlens[-1]`), padding
        # included: a short conversation would count, and rotate, as a long one.
        raise LongRopeError(
            f"{mode} cannot follow --sft, whose data set counts the padding of a pack to its last "
            "conversation; pack with --dataloader-inter-document-masking (megatron-core 0.19), or "
            "give --longrope-mode auto"
        )
    if getattr(args, "perform_rl_step", False):
        raise LongRopeError(
            f"{mode} cannot follow --perform-rl-step, which counts the padding of a sequence to "
            "it, and whose bins may be empty; give --longrope-mode auto"
        )
    if not is_packed(args):
        raise LongRopeError(
            f"{mode} chooses factors by packed document, and this run packs none; add "
            "--dataloader-inter-document-masking (megatron-core 0.19), or give --longrope-mode auto"
        )
    if getattr(args, "apply_rope_fusion", False):
        raise LongRopeError(
            f"{mode} needs a table row per token, and the fused RoPE kernel has one table for all "
            "documents; add --no-rope-fusion"
        )
    if settings.follows_documents and attention not in OURS:
        raise LongRopeError(
            f"{mode} needs another softmax scale for short documents, which {attention} attention "
            "cannot give; use --transformer-impl local with --longrope-attention flash or sdpa, or "
            "factors with one attention factor"
        )
    if settings.follows_documents and settings.carrier != "softmax":
        raise LongRopeError(
            f"{mode} carries the attention factor of a document on the softmax scale; remove "
            "--longrope-attention-factor-carrier rope, or use factors with one attention factor"
        )


def _check_data(args: argparse.Namespace) -> None:
    if not (getattr(args, "train_iters", None) or getattr(args, "train_samples", None)):
        return  # a conversion or a server: there is no data loader
    if args.seq_length >= DENSE_MASK_LIMIT and args.create_attention_mask_in_dataloader:
        raise LongRopeError(
            f"sequence length {args.seq_length} with a dense attention mask from the data loader "
            f"would build a {args.seq_length} x {args.seq_length} mask per sample; add "
            "--no-create-attention-mask-in-dataloader (attention is causal without it)"
        )


def _check_geometry(args: argparse.Namespace, config: LongRopeConfig, rotary_dim: int) -> None:
    source = args.longrope_config or "the checkpoint's factors"
    if config.rotary_dim != rotary_dim:
        raise LongRopeError(
            f"{source}: rotary_dim {config.rotary_dim} differs from this model's "
            f"{rotary_dim} (kv_channels {args.kv_channels} x rotary_percent {args.rotary_percent})"
        )
    if float(config.rotary_base) != float(args.rotary_base):
        raise LongRopeError(
            f"{source}: rotary_base {config.rotary_base:g} differs from "
            f"--rotary-base {args.rotary_base}; give the base that the model was trained with"
        )


# Megatron's arguments that do not go with factors, in the order in which they are looked for.
_REFUSED = {
    "multi_latent_attention": "its attention builds a rotary embedding of its own",
    "heterogeneous_layers_config_path": "Megatron lets them rotate with --use-rope-scaling alone",
    "heterogeneous_layers_config_encoded_json": (
        "Megatron lets them rotate with --use-rope-scaling alone"
    ),
    "use_rope_scaling": (
        "base_frequencies in the file of --longrope-config replaces it (longrope convert from-hf "
        "writes them), and both would scale the frequencies twice; remove the flag"
    ),
    "rotary_seq_len_interpolation_factor": "it would interpolate the positions twice",
    "export_kd_teacher_load": "the teacher would get this run's factors, whatever its own are",
    "hybrid_context_parallel": "its ranks would get another rank's positions",
    "dynamic_context_parallel": "its ranks would get another rank's positions",
}
# The plugin's arguments that need factors, and their values that ask for nothing.
_NEEDS_FACTORS = {
    "longrope_mode": (None, "auto"),
    "longrope_attention_factor_carrier": (None, "auto"),
    "longrope_hf_parity": (None, False),
    "longrope_replace_factors": (None, False),
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_other_scaling(args: argparse.Namespace) -> None:
    def refuse(flag: str, reason: str) -> None:
        raise LongRopeError(f"--longrope-config cannot be combined with {flag}: {reason}")

    positions = getattr(args, "position_embedding_type", None)
    if positions != "rope":
        refuse(
            f"--position-embedding-type {positions}",
            "LongRoPE rescales RoPE; use --position-embedding-type rope",
        )
    for name, reason in _REFUSED.items():
        if getattr(args, name, None):
            refuse(_flag(name), reason)
    if getattr(args, "hybrid_layer_pattern", None) and getattr(args, "rotary_interleaved", False):
        refuse(
            "--rotary-interleaved",
            "Megatron's HybridModel applies it to angles in the order of two halves",
        )
