"""Compare a Hugging Face folder with a Megatron checkpoint, logit by logit.

Both models are in memory at once, in fp32. Logits are taken of the last tokens only: those of 128k
tokens of a large vocabulary are 67 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_longrope.checkpoint.hf.source import open_folder
from megatron_longrope.checkpoint.loader import Checkpoint
from megatron_longrope.checkpoint.opening import open_checkpoint
from megatron_longrope.checkpoint.reader import MegatronCheckpoint
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.conversion.staging import NotVerified
from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import read_object
from megatron_longrope.flops import forward_flops
from megatron_longrope.hf_rope import read_hf_rope
from megatron_longrope.local_folder import LOCAL_ONLY
from megatron_longrope.out_of_memory import is_out_of_memory
from megatron_longrope.progress import format_duration

TOLERANCE = 1e-4
_SHORT_TOKENS = 512
_TOKENS_PAST_LIMIT = 64
_COMPARED_TOKENS = 512
# Keys of config.json that may change the attention of later positions.
_LIMITS = ("sliding_window", "attention_chunk_size")
_ROWS_PER_BLOCK = 256
_ROUNDING_KL = 1e-6
"""Mean KL, in nats, below which the same top tokens speak for rounding: fp32 sums in two orders."""


@dataclass(frozen=True)
class WindowDifference:
    """How far the two models are apart on one input."""

    window: str
    """`short` (the original window's factors), `long`, or another limit of config.json past which
    the models might part, such as `sliding_window`."""
    num_tokens: int
    """Length of the input; of a longer one than 512 tokens the last 512 are compared."""
    max_abs_diff: float
    """Largest difference of a logit."""
    mean_kl: float
    """Mean over compared tokens of KL(Megatron || transformers), in nats."""
    top1_agreement: float
    """Fraction of compared tokens with the same most likely next token."""


@dataclass(frozen=True)
class VerificationReport:
    """Result of :func:`verify`."""

    windows: tuple[WindowDifference, ...]
    """One entry for each window."""
    tolerance: float
    """Largest max_abs_diff that passes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def verify(
    checkpoint_path: str | Path | None,
    hf_dir: str | Path,
    *,
    longrope_config: LongRopeConfig | None,
    iteration: int | None = None,
    short_length: int | None = None,
    target_length: int | None = None,
    tolerance: float = TOLERANCE,
    sliding_window: str = "refuse",
    remedy: str = "do not use this folder",
    announce: Callable[[str], None] | None = None,
) -> VerificationReport:
    """Run both models in fp32 on random tokens, within and past every limit of config.json.

    The options are those of :class:`.options.VerifyOptions`.

    Args:
        checkpoint_path (str | Path, optional): None compares transformers with the engine on the
            folder itself.
        longrope_config (LongRopeConfig, optional): What was exported; None for plain RoPE.
        remedy (str): What to do about a difference.
        announce (Callable, optional): Called with what it takes, in words, before a model is
            loaded.

    Raises:
        NotVerified: transformers cannot load the folder, memory runs out, or a window is over the
            tolerance by what may be rounding.
        LongRopeError: A window is over the tolerance, or its logits are not finite.
    """
    folder = open_folder(hf_dir, sliding_window)
    source = None if checkpoint_path is not None else folder.directory
    checkpoint = open_checkpoint(checkpoint_path, source, iteration, sliding_window)
    config = None
    if longrope_config is not None:
        config = exported_config(longrope_config, short_length, target_length)
    window = folder.dropped_window or folder.kept_window
    hf_config = {**folder.config, "sliding_window": window} if window else folder.config
    vocab_size = hf_config["vocab_size"]
    stored = {info.dtype for info in checkpoint.keys().values()}
    written = {info.dtype for name, info in folder.tensors.items() if not name.endswith("inv_freq")}
    if announce is not None:
        announce(_cost(checkpoint, config, hf_config))
    differences = []
    try:
        engine = fp32_engine(checkpoint, config)
        model = _load_transformers_model(folder.directory, folder.dropped_window is not None)
        # In either direction: whichever was made of the other, both now hold the narrower values.
        _round(engine.model, written)
        _round(engine.model, stored)
        _round(model, stored)
        for name, length in windows_to_compare(config, hf_config):
            tokens = random_tokens(vocab_size, length, seed=0)
            count = min(length, _COMPARED_TOKENS)
            with torch.no_grad():
                theirs = model(tokens, use_cache=False, logits_to_keep=count).logits
                ours = engine.logits(tokens, count)[..., :vocab_size]
            difference = replace(compare(name, ours, theirs), num_tokens=length)
            differences.append(difference)
            if not difference.max_abs_diff <= tolerance:  # also catches NaN
                failed = (
                    f"verification failed on {length} tokens ({_describe(name)}): "
                    f"{_how_they_differ(difference, ours, theirs, tolerance)}"
                )
                if difference.top1_agreement == 1 and abs(difference.mean_kl) < _ROUNDING_KL:
                    allowed = f"{1.1 * difference.max_abs_diff:.1e}"
                    remedy = f"it may be rounding, which --tolerance {allowed} allows"
                    raise NotVerified(f"{failed}; {remedy}")
                raise LongRopeError(f"{failed}; {remedy}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise NotVerified(
            "verification ran out of memory, which must hold both models in fp32; use a machine "
            "with more, or leave it out of a conversion with --no-verify"
        ) from error
    return VerificationReport(tuple(differences), tolerance)


def verify_import(
    checkpoint_path: str | Path,
    hf_dir: str | Path,
    *,
    tolerance: float = TOLERANCE,
    sliding_window: str = "refuse",
    announce: Callable[[str], None] | None = None,
) -> VerificationReport:
    """Compare a new checkpoint with the folder that it was made of; see :func:`verify`."""
    return verify(
        checkpoint_path,
        hf_dir,
        longrope_config=MegatronCheckpoint.open(checkpoint_path).longrope,
        tolerance=tolerance,
        sliding_window=sliding_window,
        remedy="nothing was written",
        announce=announce,
    )


def _load_transformers_model(hf_dir: Path, full_attention: bool) -> Any:
    """The folder's model in fp32."""
    import transformers

    options: dict[str, Any] = {}
    try:
        if full_attention:
            config = options["config"] = transformers.AutoConfig.from_pretrained(
                str(hf_dir), **LOCAL_ONLY
            )
            config.sliding_window, config.use_sliding_window = None, False
            config.layer_types = ["full_attention"] * config.num_hidden_layers
        return transformers.AutoModelForCausalLM.from_pretrained(
            str(hf_dir), dtype=torch.float32, **options, **LOCAL_ONLY
        ).eval()
    except Exception as error:  # transformers raises many kinds, with messages of many lines
        if is_out_of_memory(error):
            raise
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())
        rope = read_hf_rope(read_object(hf_dir / "config.json"))
        remedy = "correct config.json, or leave the verification out with --no-verify"
        if rope.rope_type != rope.stated_type:
            remedy = f"write {rope.rope_type!r} in place of {rope.stated_type!r} in {rope.holder}"
        raise NotVerified(
            f"{hf_dir}: transformers {transformers.__version__} cannot load this folder "
            f"({type(cause).__name__}: {reason}); {remedy}"
        ) from None


def _describe(window: str) -> str:
    return f"{window} factors" if window in ("short", "long") else f"past {window}"


def _how_they_differ(
    difference: WindowDifference, ours: Tensor, theirs: Tensor, allowed: float
) -> str:
    first = difference.num_tokens - ours.shape[1]
    for name, logits in (("transformers", theirs), ("Megatron", ours)):
        if not logits.isfinite().all():
            position = first + int((~logits.isfinite()).any(-1).flatten().nonzero()[0])
            return f"the logits of {name} are not finite from position {position} on"
    position = first + int(((ours - theirs).abs().amax(-1) > allowed).flatten().nonzero()[0])
    return (
        "transformers' logits differ from Megatron's by up to "
        f"{difference.max_abs_diff:.3g}, from position {position} on (allowed {allowed:.3g}, mean "
        f"KL {difference.mean_kl:.3g}, same top token for {difference.top1_agreement:.1%})"
    )


def _cost(
    checkpoint: Checkpoint, config: LongRopeConfig | None, hf_config: Mapping[str, Any]
) -> str:
    """What a verification takes; config and hf_config as for :func:`windows_to_compare`."""
    shape, size = checkpoint.shape, torch.float32.itemsize
    lengths = [length for _, length in windows_to_compare(config, hf_config)]
    weights = 2 * size * sum(math.prod(info.shape) for info in checkpoint.keys().values())
    ffn = shape.ffn_hidden_size
    if shape.num_experts is not None:
        ffn = (shape.moe_ffn_hidden_size or ffn) * (shape.moe_router_topk or 1)
    # transformers holds an MLP's intermediates whole, and some hidden states beside them.
    at_work = (4 * ffn + 6 * shape.hidden_size) * size * max(lengths)
    operations = 2 * sum(sum(forward_flops(shape, length)) for length in lengths)
    return (
        f"verifying: holds the model in memory twice, in fp32, {weights / 2**30:.1f} GiB of "
        f"weights, and about {at_work / 2**30:.1f} GiB for an input of {max(lengths)} tokens; "
        f"takes {operations:.1e} operations on the CPU, "
        f"{format_duration(operations / 1e12)} at 10^12 a second"
    )


def exported_config(
    config: LongRopeConfig, short_length: int | None = None, target_length: int | None = None
) -> LongRopeConfig:
    """What transformers makes of `config`: one set up to the original window, one beyond.

    The sets between them, which only Megatron can hold, are left out.
    """
    original = config.original_max_position_embeddings
    short = config.factor_set_for(short_length or original)
    long_length = target_length or config.max_length
    sets = {original: short}
    if long_length > original:
        sets[long_length] = config.factor_set_for(long_length)
    sets.setdefault(config.max_length, config.factor_sets[-1])
    return replace(
        config,
        factor_sets=tuple(
            FactorSet(length, item.rescale_factors, item.num_start_tokens, item.origin)
            for length, item in sorted(sets.items())
        ),
        attention_factor=config.attention_factor_for(long_length),
    )


def lengths_in(
    config: LongRopeConfig, hf_config: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    """What `--short-length` and `--target-length` a folder was exported with, by its config.json.

    Args:
        config (LongRopeConfig): What it was exported from.

    Returns:
        tuple[int | None, int | None]: Windows, in tokens; None for a default, or where no set of
        `config` is the folder's short_factor, or its window is not one of `config`.
    """
    rope = read_hf_rope(hf_config)
    if rope.rope_type != "longrope":
        return None, None
    original, target = config.original_max_position_embeddings, hf_config["max_position_embeddings"]
    stated = tuple(rope.parameters.get("short_factor", ()))
    same = [item.max_length for item in config.factor_sets if config.plain_factors(item) == stated]
    is_default = config.factor_set_for(original).max_length in same
    short = None if is_default or not same else same[0]
    return short, target if original <= target < config.max_length else None


def random_tokens(vocab_size: int, length: int, seed: int) -> Tensor:
    """`[1, length]` tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (1, length), generator=generator)


def compare(window: str, ours: Tensor, theirs: Tensor) -> WindowDifference:
    """Difference of two sets of fp32 logits `[b, s, vocab]`."""
    ours, theirs = ours.flatten(0, 1), theirs.flatten(0, 1)
    largest, divergence, agreeing = 0.0, 0.0, 0
    # Blocks bound the fp64 copies for a large vocabulary.
    for left, right in zip(ours.split(_ROWS_PER_BLOCK), theirs.split(_ROWS_PER_BLOCK), strict=True):
        difference = _largest(left - right)
        largest = difference if difference != difference else max(largest, difference)
        agreeing += int((left.argmax(-1) == right.argmax(-1)).sum())
        left, right = (value.double().log_softmax(-1) for value in (left, right))
        divergence += (left.exp() * (left - right)).sum().item()
        if largest != largest:
            break
    count = len(ours)
    return WindowDifference(window, count, largest, divergence / count, agreeing / count)


def _largest(value: Tensor) -> float:
    """Largest magnitude, NaN if there is one, without a copy of the magnitudes."""
    low, high = value.aminmax()
    return max(abs(low.item()), abs(high.item()))


def windows_to_compare(
    config: LongRopeConfig | None, hf_config: Mapping[str, Any]
) -> list[tuple[str, int]]:
    """Inputs within the original window and past every limit that config.json declares.

    Args:
        config (LongRopeConfig, optional): From :func:`exported_config`.
        hf_config (Mapping): config.json.

    Returns:
        list[tuple[str, int]]: Names and lengths in tokens.
    """
    max_length = hf_config["max_position_embeddings"]
    original = max_length if config is None else config.original_max_position_embeddings
    windows = [("short", min(_SHORT_TOKENS, original, max_length))]
    rope = read_hf_rope(hf_config)
    limits = {"long": original, "original window": rope.original_max_position_embeddings}
    limits |= {key: hf_config.get(key) for key in _LIMITS}
    for name, limit in limits.items():
        if not isinstance(limit, int) or not 0 < limit < max_length:
            continue
        if all(length <= limit for _, length in windows):
            windows.append((name, min(limit + _TOKENS_PAST_LIMIT, max_length)))
    return windows


def _round(model: nn.Module, dtypes: set[torch.dtype]) -> None:
    """Round a model's weights, one at a time, to the dtype that the other model is stored in.

    A conversion that narrows gives all tensors one dtype; where there are several, it kept them.
    """
    if len(dtypes) == 1:
        (dtype,) = dtypes
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.to(dtype))


def fp32_engine(checkpoint: Checkpoint, config: LongRopeConfig | None) -> Any:
    """The evaluation engine with transformers' arithmetic, on the CPU as transformers' model is."""
    from megatron_longrope.engine import load_engine, process_groups

    process_groups.initialize(alone=True)  # a pod may have set RANK for the training to come
    return load_engine(
        checkpoint, longrope_config=config, dtype=torch.float32, device="cpu", hf_parity=True
    )
