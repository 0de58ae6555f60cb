"""Factors that authors have published, by name: `published:llama2-256k`.

Each JSON file here is an ordinary factor file; `origin` of its sets states source and licence.
LLaMA2 and Mistral: one set for each window that the LongRoPE authors searched, on top of the model
fine-tuned for 128k or 256k tokens. Phi and LLaMA3: short and long factors as deployed.
"""

from __future__ import annotations

from pathlib import Path

from megatron_longrope.errors import LongRopeError

PREFIX = "published:"
_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """List the names that may follow `published:`."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def resolve(path: str | Path) -> Path:
    """Replace `published:NAME` by the path of that file; leave any other path alone.

    Raises:
        LongRopeError: No published factors have this name.
    """
    if not str(path).startswith(PREFIX):
        return Path(path)
    name = str(path).removeprefix(PREFIX)
    if name not in names():
        raise LongRopeError(f"{path}: no such factors; published are {', '.join(names())}")
    return _FOLDER / f"{name}.json"
