"""Small files beside the weights of a Hugging Face folder, carried through Megatron and back.

`convert from-hf` keeps them, byte for byte, in the folder `hf` of the checkpoint that it writes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_longrope.files import read_object, write_json_atomic

FOLDER = "hf"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",  # a folder
)
_KEPT = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_companions(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy those of the named files and folders that exist; gives their names."""
    found = [name for name in names if (source / name).exists()]
    for name in found:
        target.mkdir(exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / name, target / name)
    return found


def keep_companions(source: Path, checkpoint: Path) -> None:
    """Copy what a later `convert to-hf` needs into a checkpoint directory."""
    copy_companions(source, checkpoint / FOLDER, _KEPT)


def companions(tokenizer: str | Path | None, checkpoint: Path) -> Path | None:
    """The folder whose files an export takes along.

    Args:
        tokenizer (str | Path, optional): As given to the export; a folder is taken as it is.
        checkpoint (Path): Directory of an iteration, beside which :func:`keep_companions` wrote.
    """
    if tokenizer is not None:
        return Path(tokenizer) if Path(tokenizer).is_dir() else None
    folder = checkpoint.parent / FOLDER
    # An export that somebody wrote there is of another model; it has weights and a model card.
    foreign = (folder / "README.md").exists() or any(folder.glob("*.safetensors*"))
    return folder if (folder / "config.json").is_file() and not foreign else None


def raise_limit(path: Path, key: str, length: int) -> None:
    """Raise a limit that a file of the short model states, at which readers of a longer one stop.

    Args:
        path (Path): A JSON file, which need not be there.
        key (str): Where it states a length in tokens.
    """
    config = read_object(path) if path.is_file() else {}
    stated = config.get(key)
    # transformers takes anything that is no number, such as null, as no limit.
    if isinstance(stated, int | float) and stated < length:
        write_json_atomic(path, {**config, key: length})


def special_token_ids(folder: Path | None, defaults: dict[str, int | None]) -> dict[str, Any]:
    """Ids for config.json: a model may have several ids of the end, a tokenizer has one.

    Args:
        folder (Path, optional): From :func:`companions`.
        defaults (dict): Those of the tokenizer.
    """
    result: dict[str, Any] = dict(defaults)
    for name in () if folder is None else (GENERATION_CONFIG, "config.json"):
        if (folder / name).is_file():
            stated = read_object(folder / name)
            result |= {key: stated[key] for key in _SPECIAL_TOKENS if stated.get(key) is not None}
    return result
