"""A checkpoint knows its factors: runs that would use others are refused, or say so for ever."""

import launching
import pytest
from launching import pretrain_command, train
from tiny_training import MODEL, refusal, yarn_config

from megatron_longrope.checkpoint.reader import MegatronCheckpoint
from megatron_longrope.cli import main

pytest.importorskip("megatron.training")
pytestmark = pytest.mark.slow

TRAINING = [*MODEL, "--lr-decay-iters", "4", "--save-interval", "100"]
ON = ["--load", "first", "--train-iters", "4", "--override-opt-param-scheduler"]
TO_256 = ["--seq-length", "256", "--max-position-embeddings", "256"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("factors")
    yarn_config(2).save(directory / "a.json")
    yarn_config(2, 4).save(directory / "b.json")
    return directory


def flags(directory, *words):
    """A run in `directory`; words that name something there become its path."""
    names = {"a.json", "b.json", "base", "first", "resumed", "second"}
    return [*TRAINING, *(str(directory / word) if word in names else word for word in words)]


@pytest.fixture(scope="module")
def base(directory):
    """Stock RoPE on 64 tokens."""
    words = flags(directory, "--seq-length", "64", "--save", "base")
    train([pretrain_command(words)], directory / "log-base")
    return directory / "base"


@pytest.fixture(scope="module")
def first(directory, base):
    """Fine-tuned at 128 tokens with the first factors."""
    words = flags(
        directory, "--longrope-config", "a.json", "--load", "base", "--finetune", "--save", "first"
    )
    return train([pretrain_command(words)], directory / "log-first")


@pytest.fixture(scope="module")
def resumed(directory, first):
    """Two more iterations with the same factors."""
    words = flags(directory, "--longrope-config", "a.json", *ON, "--save", "resumed")
    return train([pretrain_command(words)], directory / "log-resumed")


def lineage(checkpoint):
    stages = MegatronCheckpoint.open(checkpoint).lineage
    return [(item["rope"], item["iteration"], item["seq_length"]) for item in stages]


def test_the_first_stage_on_a_stock_model_is_logged_and_recorded(directory, first):
    assert first.log.count("first LongRoPE stage: ") == 1
    assert (
        f"> longrope: {directory / 'base'}: first LongRoPE stage: 128 tokens with the set up to "
        "128, attention factor 1.08012, on a model with stock RoPE\n"
    ) in first.log
    assert lineage(directory / "first") == [("stock", 0, 64), ("longrope", 2, 128)]


def test_a_resumed_run_says_nothing_and_keeps_the_lineage(directory, resumed):
    assert resumed.log.count("> longrope: ") == 1  # what the run does
    assert len(resumed.losses) == 2
    one, two = (MegatronCheckpoint.open(directory / name) for name in ("first", "resumed"))
    assert two.iteration == 4
    assert two.lineage == one.lineage
    assert two.longrope == one.longrope == yarn_config(2)


def test_use_checkpoint_args_restores_the_factors(directory, resumed):
    words = flags(directory, "--use-checkpoint-args", *ON)
    restored = train([pretrain_command(words)], directory / "log-restored")
    assert "> longrope: factors restored from the checkpoint\n" in restored.log
    assert restored.losses == resumed.losses
    assert restored.gradient_norms == resumed.gradient_norms


def test_other_factors_are_refused_by_rank_0_on_every_rank_also_with_finetune(directory, first):
    words = ("--longrope-config", "b.json", "--load", "first", "--finetune", *TO_256)
    command = pretrain_command(flags(directory, *words), processes=2)
    statuses, log = launching.run([command], directory / "log-other")
    sentence = refusal(statuses, log)
    place = f"{directory / 'first'}: the checkpoint was trained with other LongRoPE factors"
    assert sentence.startswith(place)
    assert (
        "(checkpoint: 128 tokens with the set up to 128, attention factor 1.08012; this run: 256 "
        "tokens with the set up to 256, attention factor 1.1547)"
    ) in sentence
    assert sentence.endswith("or add --longrope-replace-factors to go on with this run's")


def test_a_deliberate_switch_trains_and_its_checkpoint_remembers_both(directory, first, capsys):
    words = ("--longrope-config", "b.json", "--longrope-replace-factors", *TO_256)
    words = flags(directory, *words, "--load", "first", "--finetune", "--save", "second")
    second = train([pretrain_command(words)], directory / "log-second")
    assert "factors replaced (--longrope-replace-factors): 256 tokens with the set" in second.log
    assert lineage(directory / "second") == [
        ("stock", 0, 64), ("longrope", 2, 128), ("longrope", 2, 256),
    ]  # fmt: skip
    assert MegatronCheckpoint.open(directory / "second").longrope == yarn_config(2, 4)
    assert main(["convert", "inspect", str(directory / "second")]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  stage ")]
    assert [line.split()[2] for line in told] == ["stock,", "longrope,", "longrope,"]
    assert "iteration 2, seq_length 256, max_length 256, attention_factor 1.1547" in told[2]
