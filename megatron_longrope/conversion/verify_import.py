"""Compare a new Megatron checkpoint with the Hugging Face folder it was made of."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.conversion.hf_reader import HfFolder
from megatron_longrope.conversion.verify import (
    TOLERANCE,
    VerificationReport,
    compare,
    exported_config,
    random_tokens,
)

_SHORT_TOKENS = 512
_TOKENS_PAST_ORIGINAL = 64


def verify_import(
    checkpoint_path: str | Path, hf_dir: str | Path, *, tolerance: float = TOLERANCE, seed: int = 0
) -> VerificationReport:
    """Run transformers and the engine in fp32 on the same random tokens.

    One input lies within the original window; with LongRoPE factors another one goes past it.

    Args:
        tolerance (float): Largest difference of a logit; for a checkpoint in a narrower dtype than
            the folder, that dtype's rounding is added.

    Raises:
        ValueError: A window is over the tolerance, or its logits are not finite.
    """
    from transformers import AutoModelForCausalLM

    from megatron_longrope.engine import load_engine

    checkpoint = MegatronCheckpoint.open(checkpoint_path)
    config = checkpoint.longrope
    max_length = checkpoint.shape.max_position_embeddings
    windows = [("short", min(_SHORT_TOKENS, max_length))]
    if config is not None:
        config = exported_config(config)
        original = config.original_max_position_embeddings
        windows = [("short", min(_SHORT_TOKENS, original))]
        if config.max_length > original:
            windows.append(("long", min(original + _TOKENS_PAST_ORIGINAL, config.max_length)))
    engine = load_engine(
        checkpoint_path, longrope_config=config, dtype=torch.float32, hf_parity=True
    )
    model = AutoModelForCausalLM.from_pretrained(str(hf_dir), dtype=torch.float32).eval()
    rounding = _rounding(checkpoint, HfFolder(hf_dir))
    differences = []
    for window, length in windows:
        tokens = random_tokens(checkpoint.shape.vocab_size, length, seed)
        with torch.no_grad():
            theirs = model(tokens, use_cache=False).logits
            ours = engine.logits(tokens).to(device="cpu", dtype=torch.float32)
        difference = compare(window, ours, theirs)
        differences.append(difference)
        allowed = tolerance + rounding * theirs.abs().max().item()
        if not difference.max_abs_diff <= allowed:  # also catches NaN
            raise ValueError(
                f"verification failed on {length} tokens ({window} window): the checkpoint's "
                f"logits differ from transformers' by up to {difference.max_abs_diff:.3g} (allowed "
                f"{allowed:.3g}, same top token for {difference.top1_agreement:.1%}); nothing was "
                "written, please report the model's config.json"
            )
    return VerificationReport(tuple(differences), tolerance)


def _rounding(checkpoint: MegatronCheckpoint, folder: HfFolder) -> float:
    """Relative error to expect of a checkpoint whose dtypes are narrower than the folder's."""
    read = {info.dtype for info in folder.tensors.values()}
    written = {info.dtype for info in checkpoint.keys().values()}
    return 0.0 if written <= read else 32 * max(torch.finfo(dtype).eps for dtype in written)
