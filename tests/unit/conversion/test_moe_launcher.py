"""Megatron's own training loop loads mixtures of experts that `longrope convert from-hf` writes."""

import shlex

import pytest
from launching import pretrain_command, train
from recorded_batches import RECORDER, first_loss
from tiny_hf import GEOMETRY, make_hf_folder

from megatron_longrope.conversion.from_hf import write_checkpoint
from megatron_longrope.engine import load_engine

pytest.importorskip("megatron.training")
pytestmark = pytest.mark.slow

# The run's own: nothing of the model. A micro-batch is all that it trains on before the first loss.
RUN = shlex.split(
    "--micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 1e-3 --mock-data "
    f"--tokenizer-type NullTokenizer --vocab-size {GEOMETRY['vocab_size'] - 1} --eval-iters 0 "
    "--eval-interval 100 --log-interval 1 --seed 1"
)


@pytest.mark.parametrize(
    ("family", "changes"), [("mixtral", {}), ("qwen3_moe", {"norm_topk_prob": False})]
)
def test_the_first_loss_of_megatrons_loop_is_the_engines(tmp_path, family, changes):
    make_hf_folder(tmp_path / "hf", family, **changes)
    # Without padding rows, whose logits of 0 Megatron counts and the engine does not.
    report = write_checkpoint(
        tmp_path / "hf", tmp_path / "megatron", make_vocab_size_divisible_by=2
    )
    assert report.shape.padded_vocab_size == GEOMETRY["vocab_size"]
    flags = shlex.split(" ".join(report.flags))
    script = tmp_path / "pretrain.py"
    script.write_text(RECORDER)
    arguments = ["--load", str(tmp_path / "megatron"), *flags, *RUN]
    run = train([pretrain_command(arguments, script=script)], tmp_path / "run")
    engine = load_engine(tmp_path / "megatron", device="cpu")
    expected = first_loss(engine.logits, tmp_path / "run", micro_batches=1)
    assert float(run.losses[0]) == pytest.approx(expected, rel=1e-5)
