"""Write the logits that the transformers on the path computes of Hugging Face folders.

Run as `python read_hf_folders.py RESULT FOLDER...`; a process of its own, because one can import
one release of transformers. Each folder holds `inputs.pt`, a list of token tensors.
"""

import sys
from pathlib import Path

import torch
import transformers


def read(folder):
    """Logits of each input, or the sentence with which transformers refuses the folder."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception as error:
        return str(error)
    with torch.no_grad():
        return [model.eval()(tokens, use_cache=False).logits for tokens in _inputs(folder)]


def _inputs(folder):
    return torch.load(Path(folder) / "inputs.pt")


if __name__ == "__main__":
    result, *folders = sys.argv[1:]
    found = {folder: read(folder) for folder in folders}
    torch.save({"version": transformers.__version__, "folders": found}, result)
