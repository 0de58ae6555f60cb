"""Megatron's own training loop loads what `longrope convert from-hf` writes."""

import json
import shlex

import pytest
import torch
import torch.nn.functional as F
from launching import SCRIPT, pretrain_command, train
from transformers import AutoModelForCausalLM, Phi3Config, Qwen3Config

from megatron_longrope.conversion.from_hf import write_checkpoint

pytest.importorskip("megatron.training")
pytestmark = pytest.mark.slow

VOCAB, WINDOW = 300, 128
GEOMETRY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.3],
    "long_factor": [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
}
# The run's own: nothing of the model.
RUN = shlex.split(
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 1 --lr 1e-3 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 299 --eval-iters 0 --eval-interval 100 "
    "--log-interval 1 --seed 1"
)
# A script as users have one, which also writes down what it trains on.
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


def hf_folder(directory, config):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape) + ("norm" in name)
    model.save_pretrained(directory)
    return directory


def loss_of_transformers(folder, directory, padding=0):
    """Mean loss of the batches that the run in `directory` read for its first iteration.

    Megatron's softmax is over all rows, so those that pad the vocabulary count with a logit of 0.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lines = (directory / "batches.jsonl").read_text().splitlines()[:2]  # micro-batches
    total = count = 0.0
    for batch in map(json.loads, lines):
        tokens, labels, mask = (
            torch.tensor(batch[key]) for key in ("tokens", "labels", "loss_mask")
        )
        assert tokens.shape == (2, WINDOW)
        with torch.no_grad():
            logits = F.pad(model(tokens, use_cache=False).logits, (0, padding))
        losses = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="none")
        total += (losses * mask.flatten()).sum().item()
        count += mask.sum().item()
    return total / count


def first_loss(arguments, directory, processes=1):
    directory.mkdir()
    script = directory / "pretrain.py"
    script.write_text(RECORDER)
    run = train([pretrain_command(arguments, processes=processes, script=script)], directory)
    return float(run.losses[0]), run.log


def test_the_printed_flags_load_it_on_one_process_with_another_padding(tmp_path):
    config = Qwen3Config(**GEOMETRY, head_dim=32)
    folder = hf_folder(tmp_path / "hf", config)
    report = write_checkpoint(folder, tmp_path / "megatron")
    assert report.shape.padded_vocab_size == 384
    flags = shlex.split(" ".join(report.flags))
    flags[flags.index("--make-vocab-size-divisible-by") + 1] = "16"
    arguments = ["--load", str(tmp_path / "megatron"), *flags, *RUN]
    ours, log = first_loss(arguments, tmp_path / "run")
    assert "(new size: 304)" in log
    theirs = loss_of_transformers(folder, tmp_path / "run", padding=304 - VOCAB)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_checkpoint_args_load_it_with_its_factors_at_tensor_parallel_2(tmp_path):
    config = Phi3Config(
        **GEOMETRY, original_max_position_embeddings=WINDOW // 2, rope_parameters=LONGROPE
    )
    folder = hf_folder(tmp_path / "hf", config)
    padding = {"make_vocab_size_divisible_by": 50, "tensor_model_parallel_size": 2}  # none at all
    report = write_checkpoint(folder, tmp_path / "megatron", **padding)
    rest = shlex.split(" ".join(report.flags_beside_checkpoint_args))
    arguments = ["--load", str(tmp_path / "megatron"), "--use-checkpoint-args", "--finetune", *rest]
    layout = ["--tensor-model-parallel-size", "2"]
    ours, log = first_loss([*arguments, *layout, *RUN], tmp_path / "run", processes=2)
    assert f"attention factor {report.longrope_config.attention_factor:.6g} by softmax" in log
    assert ours == pytest.approx(loss_of_transformers(folder, tmp_path / "run"), rel=1e-5)
