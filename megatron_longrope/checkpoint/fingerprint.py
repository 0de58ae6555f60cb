"""Tell one model on disk from another by what its files hold, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK_BYTES = 4096
_NUM_BLOCKS = 64
# What weights and their geometry are stored in; a tokenizer or a card does not change the model.
_SUFFIXES = {".safetensors", ".distcp", ".pt", ".pth"}
_NAMES = {"config.json", ".metadata", "metadata.json"}


def content_sha256(directory: Path) -> str:
    """Hash sizes and evenly spread samples of a model's files.

    Reading all of a 70B model takes minutes. A training step changes nearly every weight, so that
    64 blocks of each file tell two checkpoints apart; a copy in another folder is the same model.

    Args:
        directory (Path): A Hugging Face folder, or one iteration of a Megatron checkpoint.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        # Hidden folders hold what a download leaves behind, such as the times of its files.
        *folders, name = path.relative_to(directory).parts
        if any(part[0] == "." for part in folders) or (name[0] == "." and name not in _NAMES):
            continue
        if path.is_file() and (path.suffix in _SUFFIXES or path.name in _NAMES):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(directory)} {size}\n".encode())
            step = max(_BLOCK_BYTES, size // _NUM_BLOCKS)
            with path.open("rb") as file:
                for offset in range(0, size, step):
                    file.seek(offset)
                    digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
