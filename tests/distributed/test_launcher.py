"""`longrope pretrain` drives Megatron's own training loop, on one process and on several."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import launching
import pytest
from launching import HOST, LONGROPE, Command, pretrain_command, train
from tiny_training import EVALUATED, write_factors, write_ones

from megatron_longrope.config import LongRopeConfig

pytest.importorskip("megatron.training")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("launcher")


@pytest.fixture(scope="session")
def ones(directory) -> Path:
    return write_ones(directory / "ones.json")


@pytest.fixture(scope="session")
def factors(directory) -> Path:
    return write_factors(directory / "factors.json")


@pytest.fixture(scope="session")
def from_scratch(directory):
    """Runs from scratch with the given attention and factor file, each started once."""
    runs = {}

    def run(attention: str, config: Path | None):
        key = (attention, config)
        if key not in runs:
            flags = ["--longrope-attention", attention]
            flags += ["--longrope-config", str(config)] if config else []
            name = f"{attention}-{config.stem if config else 'stock'}"
            runs[key] = train([pretrain_command([*EVALUATED, *flags])], directory / name)
        return runs[key]

    return run


@pytest.fixture(scope="session")
def extended(directory, factors):
    """Three iterations with the factors, saved by one process."""
    save = ["--save", str(directory / "checkpoint"), "--save-interval", "3"]
    command = pretrain_command([*EVALUATED, *save, "--longrope-config", str(factors)])
    return train([command], directory / "saving")


@pytest.fixture(scope="session")
def checkpoint(directory, extended) -> Path:
    return directory / "checkpoint"


@pytest.fixture(scope="session")
def continued(checkpoint, factors) -> list[str]:
    """Flags of a run that goes on from the checkpoint's weights."""
    return [*EVALUATED, "--load", str(checkpoint), "--finetune", "--longrope-config", str(factors)]


@pytest.fixture(scope="session")
def one_process(directory, continued):
    """The run that every parallel layout must reproduce."""
    return train([pretrain_command(continued)], directory / "one-process")


@pytest.mark.skipif(
    "LONGROPE_EXPECT_MEGATRON" not in os.environ, reason="LONGROPE_EXPECT_MEGATRON is not set"
)
def test_started_processes_import_the_release_under_test(tmp_path):
    # Of real processes HOST says the same.
    statuses, log = launching.run([Command((*LONGROPE, "doctor", "--json"))], tmp_path)
    assert statuses == [0]
    found = json.loads(log[log.index("{") :])
    assert found["versions"]["megatron-core"] == os.environ["LONGROPE_EXPECT_MEGATRON"]


def assert_same_losses(ours, theirs, relative=1e-6):
    assert len(ours.losses) == len(theirs.losses) == 3
    assert [name for name, _ in ours.evaluations] == ["validation", "test"]
    assert ours.numbers() == pytest.approx(theirs.numbers(), rel=relative)


# All ones change nothing


def test_a_factor_file_of_ones_prints_the_stock_losses_digit_for_digit(from_scratch, ones):
    stock, ours = from_scratch("sdpa", None), from_scratch("sdpa", ones)
    assert "stock RoPE; attention sdpa" in stock.log
    assert "attention factor 1 by softmax; attention sdpa" in ours.log
    assert len(stock.losses) == 3
    assert ours.losses == stock.losses
    assert ours.gradient_norms == stock.gradient_norms
    assert ours.evaluations == stock.evaluations


@pytest.mark.one_release
def test_sdpa_agrees_with_megatrons_own_local_attention(from_scratch):
    assert_same_losses(from_scratch("sdpa", None), from_scratch("local", None), relative=1e-5)


def test_factors_change_the_losses(from_scratch, extended):
    assert len(extended.losses) == 3
    assert extended.losses != from_scratch("sdpa", None).losses


# One model, any parallel layout


@pytest.mark.parametrize(
    ("layout", "flags_of_a_gpu"),
    [
        ("--context-parallel-size 2", "--bf16 --sequence-parallel"),
        ("--pipeline-model-parallel-size 2", "--fp16"),
        pytest.param(  # data parallel
            "", "--use-distributed-optimizer --overlap-grad-reduce", marks=pytest.mark.one_release
        ),
    ],
)
def test_two_processes_train_like_one(tmp_path, continued, one_process, layout, flags_of_a_gpu):
    flags = [*continued, *layout.split(), *flags_of_a_gpu.split()]
    two = train([pretrain_command(flags, processes=2)], tmp_path)
    assert f"> cpu: dropped  {flags_of_a_gpu}\n" in two.log
    assert_same_losses(two, one_process)


# What a checkpoint holds


def test_a_checkpoint_holds_the_factor_file_by_path_and_by_value(checkpoint, factors):
    from megatron_longrope.checkpoint.reader import MegatronCheckpoint

    opened = MegatronCheckpoint.open(checkpoint)
    config = LongRopeConfig.load(factors)
    assert opened.args.longrope_config == str(factors)
    assert opened.args.longrope_config_value == config.to_dict()
    assert opened.args.longrope_attention_factor == config.attention_factor_for(128)
    assert opened.longrope == config


# An unmodified checkout


@pytest.mark.skipif("MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH is not set")
def test_the_unmodified_script_of_a_megatron_lm_checkout_trains_with_the_plugin(
    directory, continued, one_process
):
    checkout = Path(os.environ["MEGATRON_LM_PATH"])
    scripts = directory / "scripts"
    # The checkout's own megatron would come before the installed one, whose helpers are compiled;
    # but the scripts of 0.17 need a part of it that no wheel ships.
    (scripts / "megatron").mkdir(parents=True)
    if (checkout / "megatron" / "legacy").is_dir():
        (scripts / "megatron" / "legacy").symlink_to(checkout / "megatron" / "legacy")
    for name in ("pretrain_gpt.py", "gpt_builders.py", "model_provider.py"):
        if (checkout / name).is_file():
            shutil.copy(checkout / name, scripts)
    command = pretrain_command(continued, script=scripts / "pretrain_gpt.py")
    theirs = train([command], directory / "checkout")
    assert "attention factor 1.08012 by softmax; attention sdpa" in theirs.log
    assert_same_losses(theirs, one_process)


# Without the launcher


def edited(text: str, *edits: tuple[str, str]) -> str:
    """A script of the quickstart as somebody would edit it who owns it."""
    for pattern, replacement in edits:
        text, count = re.subn(pattern, replacement, text)
        assert count == 1, pattern
    return f"from megatron_longrope import add_longrope_args, enable\n{text}"


PARSED_OUTSIDE = (
    r"( +)args = arguments\.parse_and_validate_args\(\)\n",
    r"\1args = arguments.parse_and_validate_args(extra_args_provider=add_longrope_args)\n"
    r"\1enable(args)\n",
)
# In megatron-core 0.17 pretrain() parses, and the model is the first to see the arguments.
PARSED_INSIDE = (
    (r"( +)megatron_pretrain\(\n", r"\g<0>\1    extra_args_provider=add_longrope_args,\n"),
    (r"( +)args = get_args\(\)\n", r"\g<0>\1enable(args)\n"),
)


@pytest.mark.real_process  # the script prepares Megatron itself, before it is imported
def test_the_readmes_three_lines_in_an_own_script_give_the_launchers_losses(
    directory, continued, one_process
):
    from megatron.training import arguments

    older = launching.SCRIPT.with_name("older_megatron.py")
    parsed_inside = not hasattr(arguments, "parse_and_validate_args")
    for path, edits in (
        (launching.SCRIPT, [PARSED_OUTSIDE]),
        (older, PARSED_INSIDE if parsed_inside else [PARSED_OUTSIDE]),
    ):
        (directory / path.name).write_text(edited(path.read_text(), *edits))
    (directory / "host.py").write_text(HOST)
    command = [sys.executable, str(directory / "host.py"), str(directory / launching.SCRIPT.name)]
    assert_same_losses(train([[*command, *continued]], directory / "own-script"), one_process, 0)
