"""Megatron's own training loop loads mixtures of experts that `longrope convert from-hf` writes."""

import shlex

import moe_models
import pytest
from launching import pretrain_command, train
from recorded_batches import RECORDER, first_loss

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
    engine = load_engine(tmp_path / "megatron", device="cpu")
    expected = first_loss(engine.logits, tmp_path / "run", micro_batches=1)
    assert float(run.losses[0]) == pytest.approx(expected, rel=1e-5)
