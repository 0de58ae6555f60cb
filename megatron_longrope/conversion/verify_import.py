"""Compare a new Megatron checkpoint with the Hugging Face folder it was made of."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.checkpoint.hf.folder import HfFolder
from megatron_longrope.checkpoint.hf.source import open_folder
from megatron_longrope.conversion.verify import (
    TOLERANCE,
    VerificationReport,
    compare_models,
    exported_config,
    fp32_engine,
    windows_to_compare,
)


def verify_import(
    checkpoint_path: str | Path,
    hf_dir: str | Path,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    sliding_window: str = "refuse",
) -> VerificationReport:
    """Run transformers and the engine in fp32 on the same random tokens.

    One input lies within the original window, others past every limit that config.json declares.

    Args:
        tolerance (float): Largest difference of a logit; for a checkpoint in a narrower dtype than
            the folder, that dtype's rounding is added.
        sliding_window (str): As given to the conversion; with `drop` transformers, too, attends in
            full.

    Raises:
        LongRopeError: A window is over the tolerance, or its logits are not finite.
    """
    checkpoint = MegatronCheckpoint.open(checkpoint_path)
    config = checkpoint.longrope
    folder = open_folder(hf_dir, sliding_window)
    window = folder.dropped_window or folder.kept_window
    if config is not None:
        config = exported_config(config)
    return compare_models(
        fp32_engine(checkpoint, config),
        Path(hf_dir),
        windows_to_compare(
            config,
            {**folder.config, "sliding_window": window} if window else folder.config,
        ),
        checkpoint.shape.vocab_size,
        tolerance=tolerance,
        rounding=_rounding(checkpoint, folder),
        remedy="nothing was written",
        seed=seed,
        full_attention=folder.dropped_window is not None,
    )


def _rounding(checkpoint: MegatronCheckpoint, folder: HfFolder) -> float:
    """Relative error to expect of a checkpoint whose dtypes are narrower than the folder's."""
    read = {info.dtype for info in folder.tensors.values()}
    written = {info.dtype for info in checkpoint.keys().values()}
    return 0.0 if written <= read else 32 * max(torch.finfo(dtype).eps for dtype in written)
