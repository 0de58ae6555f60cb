"""Megatron's own training loop loads what `longrope convert from-hf` writes."""

import shlex

import pytest
import torch
import torch.nn.functional as F
from launching import pretrain_command, train
from recorded_batches import RECORDER, first_loss
from tiny_hf import GEOMETRY, WINDOW, make_hf_folder
from transformers import AutoModelForCausalLM

from megatron_longrope.conversion.from_hf import write_checkpoint

pytest.importorskip("megatron.training")
pytestmark = pytest.mark.slow

VOCAB = GEOMETRY["vocab_size"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.0, 4.0],
}
# The run's own: nothing of the model.
RUN = shlex.split(
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 1 --lr 1e-3 --mock-data "
    f"--tokenizer-type NullTokenizer --vocab-size {VOCAB - 1} --eval-iters 0 --eval-interval 100 "
    "--log-interval 1 --seed 1"
)


def loss_of_transformers(folder, directory, padding=0):
    """Megatron's softmax is over all rows: those that pad the vocabulary have a logit of 0."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(tokens):
        assert tokens.shape == (2, WINDOW)
        return F.pad(model(tokens, use_cache=False).logits, (0, padding))

    with torch.no_grad():
        return first_loss(logits, directory, micro_batches=2)


def run_once(arguments, directory, processes=1):
    directory.mkdir()
    script = directory / "pretrain.py"
    script.write_text(RECORDER)
    run = train([pretrain_command(arguments, processes=processes, script=script)], directory)
    return float(run.losses[0]), run.log


@pytest.mark.parametrize(
    ("change", "rows"), [(["--vocab-size", "99"], 256), (["--padded-vocab-size", "304"], 304)]
)
def test_the_printed_flags_load_it_with_a_smaller_tokenizer_and_with_another_padding(
    tmp_path, change, rows
):
    make_hf_folder(tmp_path / "hf", "qwen3")
    report = write_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    assert report.shape.padded_vocab_size == 256
    flags = shlex.split(" ".join(report.flags))
    arguments = ["--load", str(tmp_path / "megatron"), *flags, *RUN, *change]
    ours, _ = run_once(arguments, tmp_path / "run")
    theirs = loss_of_transformers(tmp_path / "hf", tmp_path / "run", padding=rows - VOCAB)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_checkpoint_args_load_it_with_its_factors_at_tensor_parallel_2(tmp_path):
    window = {"original_max_position_embeddings": WINDOW // 2}
    make_hf_folder(tmp_path / "hf", "phi3", rope_parameters=LONGROPE, **window)
    padding = {"make_vocab_size_divisible_by": 125, "tensor_model_parallel_size": 2}  # none at all
    report = write_checkpoint(tmp_path / "hf", tmp_path / "megatron", **padding)
    rest = shlex.split(" ".join(report.flags_beside_checkpoint_args))
    arguments = ["--load", str(tmp_path / "megatron"), "--use-checkpoint-args", "--finetune", *rest]
    layout = ["--tensor-model-parallel-size", "2"]
    ours, log = run_once([*arguments, *layout, *RUN], tmp_path / "run", processes=2)
    assert f"attention factor {report.longrope_config.attention_factor:.6g} by softmax" in log
    theirs = loss_of_transformers(tmp_path / "hf", tmp_path / "run")
    assert ours == pytest.approx(theirs, rel=1e-5)
