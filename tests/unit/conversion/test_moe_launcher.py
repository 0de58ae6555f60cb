"""Megatron's own training loop loads mixtures of experts that `longrope convert from-hf` writes."""

import json
import shlex

import moe_models
import pytest
import torch
import torch.nn.functional as F
from launching import SCRIPT, pretrain_command, train

from megatron_longrope.conversion.from_hf import write_checkpoint
from megatron_longrope.engine import load_engine

pytest.importorskip("megatron.training")
pytestmark = pytest.mark.slow

# The run's own: nothing of the model. A micro-batch is all that it trains on before the first loss.
RUN = shlex.split(
    "--micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 1e-3 --mock-data "
    f"--tokenizer-type NullTokenizer --vocab-size {moe_models.VOCAB - 1} --eval-iters 0 "
    "--eval-interval 100 --log-interval 1 --seed 1"
)
# A script as users have one, which also writes down what it trains on.
RECORDER = f"""
import functools, json, runpy, sys
import megatron.core.utils as utils

KEYS = ("tokens", "labels", "loss_mask")
original = utils.get_batch_on_this_cp_rank

@functools.wraps(original)  # the script looks at its parameters
def recorded(batch, *args, **kwargs):
    with open("batches.jsonl", "a") as file:
        print(json.dumps({{key: batch[key].tolist() for key in KEYS}}), file=file)
    return original(batch, *args, **kwargs)

utils.get_batch_on_this_cp_rank = recorded
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def engine_loss(checkpoint, directory):
    """Mean loss of the first batch that the run in `directory` read."""
    engine = load_engine(checkpoint, device="cpu")
    batch = json.loads((directory / "batches.jsonl").read_text().splitlines()[0])
    tokens, labels, mask = (torch.tensor(batch[key]) for key in ("tokens", "labels", "loss_mask"))
    assert tokens.shape == (2, moe_models.WINDOW)
    logits = engine.logits(tokens).flatten(0, 1).double()
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    return ((losses * mask.flatten()).sum() / mask.sum()).item()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_other_gates"])
def test_the_first_loss_of_megatrons_loop_is_the_engines(tmp_path, name):
    folder = moe_models.save(name, tmp_path / "hf")
    # Without padding rows, whose logits of 0 Megatron counts and the engine does not.
    report = write_checkpoint(folder, tmp_path / "megatron", make_vocab_size_divisible_by=2)
    assert report.shape.padded_vocab_size == moe_models.VOCAB
    flags = shlex.split(" ".join(report.flags))
    script = tmp_path / "pretrain.py"
    script.write_text(RECORDER)
    arguments = ["--load", str(tmp_path / "megatron"), *flags, *RUN]
    run = train([pretrain_command(arguments, script=script)], tmp_path / "run")
    expected = engine_loss(tmp_path / "megatron", tmp_path / "run")
    assert float(run.losses[0]) == pytest.approx(expected, rel=1e-5)
