"""`HfFolder`: config.json and safetensors of a Hugging Face folder, read tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_longrope.checkpoint.reader import TensorInfo
from megatron_longrope.files import read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HfFolder:
    """A folder that `save_pretrained` wrote; opening it reads the headers of all files.

    Args:
        directory (str | Path): The folder.

    Raises:
        ValueError: There is no such folder, it holds no safetensors, or a file is missing,
            truncated or not what the index says.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(f"{directory}: no such folder; give a local Hugging Face folder")
        config = read_json(self.directory / "config.json")
        if not isinstance(config, dict):
            raise ValueError(f"{self.directory / 'config.json'}: expected a JSON object")
        self.config: dict[str, Any] = config
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        for file, names in self._listed().items():
            self._open(file, names)

    def tensor(self, name: str) -> Tensor:
        """Load one tensor to the CPU.

        Raises:
            ValueError: Its data cannot be read.
        """
        file = self._places[name]
        try:
            return self._files[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.directory / file}: tensor {name} cannot be read, copy the file again: "
                f"{error}"
            ) from None

    def _listed(self) -> dict[str, set[str] | None]:
        """Files, each with the tensors that the index expects in it (None without an index)."""
        index = self.directory / _INDEX
        if not index.is_file():
            if (self.directory / _SINGLE).is_file():
                return {_SINGLE: None}
            raise ValueError(self._nothing())
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: has no weight_map; download the folder again")
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index}: names {file!r}, a file outside of the folder")
            names = files.setdefault(file, set())
            names.add(name)
        return dict(sorted(files.items()))

    def _nothing(self) -> str:
        pickles = sorted(self.directory.glob("pytorch_model*.bin"))
        if not pickles:
            return f"{self.directory}: holds neither {_SINGLE} nor {_INDEX}; nothing to convert"
        return (
            f"{self.directory}: holds {pickles[0].name}, a pickle, which could run code, and no "
            "safetensors; rewrite a folder that you trust once with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)"
        )

    def _open(self, file: str, names: set[str] | None) -> None:
        path = self.directory / file
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {_INDEX} names it; download it again")
        try:
            opened = safe_open(path, "pt")
            found = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated or damaged, download it again: {error}") from None
        for verb, lacking in (
            ("lacks", (names or found) - found),
            ("holds", found - (names or found)),
        ):
            if lacking:
                raise ValueError(
                    f"{path}: {verb} tensor {sorted(lacking)[0]}, which is not what {_INDEX} says; "
                    "download both again"
                )
        self._files[file] = opened
        for name in sorted(found):
            part = opened.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in _DTYPES:
                raise ValueError(
                    f"{path}: tensor {name} is of dtype {dtype}; conversion supports "
                    f"{', '.join(_DTYPES)}, so start from the unquantized model"
                )
            self.tensors[name] = TensorInfo(tuple(part.get_shape()), _DTYPES[dtype])
            self._places[name] = file
