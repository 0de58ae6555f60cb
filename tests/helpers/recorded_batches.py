"""A training script that writes down what it trains on, and the loss that a model has there."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from launching import SCRIPT

RECORDER = f"""
import functools, json, os, runpy, sys
import megatron.core.utils as utils

original = utils.get_batch_on_this_cp_rank

@functools.wraps(original)  # the script looks at its parameters
def recorded(batch, *args, **kwargs):
    if os.environ["RANK"] == "0":
        with open("batches.jsonl", "a") as file:
            keys = ("tokens", "labels", "loss_mask")
            print(json.dumps({{key: batch[key].tolist() for key in keys}}), file=file)
    return original(batch, *args, **kwargs)

utils.get_batch_on_this_cp_rank = recorded
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def first_loss(
    logits: Callable[[torch.Tensor], torch.Tensor], directory: Path, *, micro_batches: int
) -> float:
    """Mean loss of the micro-batches that the run in `directory` read for its first iteration."""
    lines = (directory / "batches.jsonl").read_text().splitlines()[:micro_batches]
    total = count = 0.0
    for batch in map(json.loads, lines):
        tokens, labels, mask = (
            torch.tensor(batch[key]) for key in ("tokens", "labels", "loss_mask")
        )
        rows = logits(tokens).flatten(0, 1).double()
        losses = F.cross_entropy(rows, labels.flatten(), reduction="none")
        total += (losses * mask.flatten()).sum().item()
        count += mask.sum().item()
    return total / count
