"""`HfFolder`: config.json and safetensors of a Hugging Face folder, read tensor by tensor.

safetensors' own reader maps whole files into memory, and what was read of them stays resident; so
it only checks the files here, and the tensors' bytes are read from where the header says.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_longrope.checkpoint.reader import TensorInfo
from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import read_object

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HfFolder:
    """A folder that `save_pretrained` wrote; opening it reads the headers of all files.

    Args:
        directory (str | Path): The folder.

    Raises:
        LongRopeError: There is no such folder, it holds no safetensors or two sets of them, or a
            file is missing, truncated or not what the index says.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise LongRopeError(f"{directory}: no such folder; give a local Hugging Face folder")
        if (
            not (self.directory / "config.json").is_file()
            and (self.directory / "adapter_config.json").is_file()
        ):
            raise LongRopeError(
                f"{directory}: is an adapter (LoRA), not a model; merge it into its base model "
                "first (peft: merge_and_unload) and give the folder that this saves"
            )
        self.config = read_object(self.directory / "config.json")
        self.dropped_window: int | None = None
        """Sliding window, in tokens, that :func:`.source.open_folder` took out of `config`."""
        self.kept_window: int | None = None
        """The same, for a model that is to keep it."""
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[str, int]] = {}  # file, and the offset there
        for file, names in self._listed().items():
            self._open(file, names)

    def rename(self, name: str, other: str) -> None:
        """Give a tensor another name."""
        self.tensors[other] = self.tensors.pop(name)
        self._places[other] = self._places.pop(name)

    def tensor(self, name: str) -> Tensor:
        """Load one tensor to the CPU.

        Raises:
            LongRopeError: Its data cannot be read.
        """
        shape = self.tensors[name].shape
        return self._read(name, 0, shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Load some rows of a tensor to the CPU.

        Args:
            start (int): First row.
            stop (int): One past the last row.

        Raises:
            LongRopeError: Its data cannot be read.
        """
        _, *rest = self.tensors[name].shape
        return self._read(name, start * math.prod(rest), (stop - start, *rest))

    def _read(self, name: str, skipped: int, shape: tuple[int, ...]) -> Tensor:
        """Load a tensor of this shape that begins `skipped` elements after the named one."""
        file, offset = self._places[name]
        result = torch.empty(shape, dtype=self.tensors[name].dtype)
        target = memoryview(result.view(-1).view(torch.uint8).numpy())
        try:
            with (self.directory / file).open("rb") as stream:
                stream.seek(offset + skipped * result.itemsize)
                while target:  # one call reads at most 2 GiB
                    count = stream.readinto(target)
                    if not count:
                        raise EOFError("the file ends early")
                    target = target[count:]
        except (OSError, EOFError) as error:
            raise LongRopeError(
                f"{self.directory / file}: tensor {name} cannot be read, copy the file again: "
                f"{error}"
            ) from error
        return result

    def _listed(self) -> dict[str, set[str] | None]:
        """Files, each with the tensors that the index expects in it (None without an index)."""
        index = self.directory / _INDEX
        if not index.is_file():
            if (self.directory / _SINGLE).is_file():
                return {_SINGLE: None}
            raise LongRopeError(self._nothing())
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LongRopeError(f"{index}: has no weight_map; download the folder again")
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise LongRopeError(f"{index}: names {file!r}, a file outside of the folder")
            names = files.setdefault(file, set())
            names.add(name)
        if (self.directory / _SINGLE).is_file() and _SINGLE not in files:
            raise LongRopeError(
                f"{self.directory}: holds two sets of weights, {_SINGLE}, which transformers "
                f"loads, and {_INDEX} with {len(files)} files; move away the one that is not meant"
            )
        return dict(sorted(files.items()))

    def _nothing(self) -> str:
        if found := sorted(path.name for path in self.directory.glob("*.safetensors")):
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return (
                f"{self.directory}: holds {found[0]}{others}, but neither {_SINGLE} nor {_INDEX}, "
                f"which names the files; download {_INDEX} and all that it names"
            )
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
            raise LongRopeError(f"{path}: missing, though {_INDEX} names it; download it again")
        try:
            with safe_open(path, "pt") as opened:
                found = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise LongRopeError(
                f"{path}: truncated or damaged, download it again: {error}"
            ) from error
        if lacking := (names or found) - found:
            raise LongRopeError(
                f"{path}: lacks tensor {sorted(lacking)[0]}, which is not what {_INDEX} says; "
                "download both again"
            )
        # transformers reads whole files: what the index does not list counts as well.
        for name in sorted(found & self.tensors.keys()):
            raise LongRopeError(
                f"{path}: holds tensor {name}, and so does {self._places[name][0]}; download both "
                "again"
            )
        with path.open("rb") as stream:  # now known to be a good header
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name in sorted(found):
            item = header[name]
            if item["dtype"] not in _DTYPES:
                raise LongRopeError(
                    f"{path}: tensor {name} is of dtype {item['dtype']}; conversion supports "
                    f"{', '.join(_DTYPES)}, so start from the unquantized model"
                )
            self.tensors[name] = TensorInfo(tuple(item["shape"]), _DTYPES[item["dtype"]])
            self._places[name] = (file, 8 + length + item["data_offsets"][0])
