"""`longrope pretrain` drives Megatron's own training loop, on one process and on several."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import launching
import pytest
from launching import LONGROPE, PRETRAIN, Command, pretrain_command, train, two_agents

from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
from megatron_longrope.methods import yarn_factors

pytest.importorskip("megatron.training")
pytestmark = pytest.mark.slow

# A model that was pre-trained on 64 tokens and now sees 128.
MODEL = shlex.split(
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --seq-length 128 --max-position-embeddings 128 "
    "--swiglu --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --position-embedding-type rope --rotary-base 10000 "
    "--hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 32 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 3 --lr 1e-3 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 255 --eval-iters 1 --eval-interval 100 "
    "--log-interval 1 --seed 1"
)
HEAD_DIM = 16
FACTOR = 2.0


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("launcher")


@pytest.fixture(scope="session")
def ones(directory) -> Path:
    """A factor file that must change nothing: it covers the 128 tokens with ones."""
    path = directory / "ones.json"
    identity_config(10000.0, HEAD_DIM, 128).save(path)
    return path


@pytest.fixture(scope="session")
def factors(directory) -> Path:
    """YaRN's factors for twice the window; the attention factor is 1.08."""
    path = directory / "factors.json"
    yarn = tuple(yarn_factors(HEAD_DIM, FACTOR, 10000.0, 64))
    sets = (FactorSet(64, (1.0,) * (HEAD_DIM // 2)), FactorSet(128, yarn))
    LongRopeConfig(10000.0, HEAD_DIM, 64, sets).save(path)
    return path


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
            runs[key] = train([pretrain_command([*MODEL, *flags])], directory / name)
        return runs[key]

    return run


@pytest.fixture(scope="session")
def checkpoint(directory, factors) -> Path:
    """Three iterations with the factors, saved by one process."""
    save = directory / "checkpoint"
    flags = ["--save", str(save), "--save-interval", "3", "--longrope-config", str(factors)]
    train([pretrain_command([*MODEL, *flags])], directory / "saving")
    return save


@pytest.fixture(scope="session")
def continued(checkpoint, factors) -> list[str]:
    """Flags of a run that goes on from the checkpoint's weights."""
    return [*MODEL, "--load", str(checkpoint), "--finetune", "--longrope-config", str(factors)]


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


@pytest.mark.parametrize(
    "attention", ["sdpa", pytest.param("local", marks=pytest.mark.one_release)]
)
def test_a_factor_file_of_ones_prints_the_stock_losses_digit_for_digit(
    from_scratch, ones, attention
):
    stock, ours = from_scratch(attention, None), from_scratch(attention, ones)
    assert f"stock RoPE; attention {attention}" in stock.log
    assert f"attention factor 1 by softmax; attention {attention}" in ours.log
    assert len(stock.losses) == 3
    assert ours.losses == stock.losses
    assert ours.gradient_norms == stock.gradient_norms
    assert ours.evaluations == stock.evaluations


@pytest.mark.one_release
def test_sdpa_agrees_with_megatrons_own_local_attention(from_scratch):
    assert_same_losses(from_scratch("sdpa", None), from_scratch("local", None), relative=1e-5)


def test_factors_change_the_losses(one_process, continued, directory, ones):
    flags = [str(ones) if Path(item).name == "factors.json" else item for item in continued]
    flags.append("--longrope-replace-factors")
    stock = train([pretrain_command(flags)], directory / "other-factors")
    assert stock.losses != one_process.losses


# One model, any parallel layout


@pytest.mark.parametrize(
    ("layout", "flags_of_a_gpu"),
    [
        ("--context-parallel-size 2", "--bf16"),
        pytest.param(  # test_from_hf_launcher.py trains on two such ranks with every release
            "--tensor-model-parallel-size 2", "--sequence-parallel", marks=pytest.mark.one_release
        ),
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


@pytest.mark.release  # test_elastic_training.py has two agents too
@pytest.mark.one_release
def test_two_torchrun_agents_train_like_one_process(directory, continued, one_process):
    flags = [*continued, "--context-parallel-size", "2"]
    commands = two_agents([*PRETRAIN, str(launching.SCRIPT), "--cpu", *flags])
    assert_same_losses(train(commands, directory / "two-agents"), one_process)


# The attention factor


def test_both_carriers_of_the_attention_factor_give_the_same_losses(
    directory, continued, one_process
):
    flags = [*continued, "--longrope-attention-factor-carrier", "rope"]
    rope = train([pretrain_command(flags)], directory / "rope-carrier")
    assert "attention factor 1.08012 by softmax" in one_process.log
    assert "attention factor 1.08012 by rope" in rope.log
    assert_same_losses(rope, one_process)


# What a checkpoint holds


def test_a_checkpoint_holds_the_factor_file_by_path_and_by_value(checkpoint, factors):
    from megatron_longrope.checkpoint.reader import MegatronCheckpoint

    opened = MegatronCheckpoint.open(checkpoint)
    config = LongRopeConfig.load(factors)
    assert opened.args.longrope_config == str(factors)
    assert opened.args.longrope_config_value == config.to_dict()
    assert opened.args.longrope_attention_factor == config.attention_factor_for(128)
    assert opened.longrope == config


# Bad input


def assert_refused(directory, name, flags, sentence):
    statuses, log = launching.run([pretrain_command([*MODEL, *flags])], directory / name)
    assert statuses == [1]
    assert log.splitlines()[-1].startswith("longrope: error: ")
    assert sentence in log.splitlines()[-1]
    assert "Traceback" not in log


@pytest.mark.one_release
def test_a_missing_factor_file_is_one_sentence(directory):
    flags = ["--longrope-config", "absent.json"]
    assert_refused(directory, "absent", flags, "absent.json: no such file; check the path")


@pytest.mark.one_release
def test_a_sequence_that_does_not_split_into_zigzag_chunks_is_one_sentence(directory, factors):
    flags = ["--longrope-config", str(factors), "--seq-length", "126"]
    command = pretrain_command([*MODEL, *flags, "--context-parallel-size", "2"], processes=2)
    statuses, log = launching.run([command], directory / "indivisible")
    assert statuses == [1]
    assert (
        "longrope: error: sequence length 126 is not divisible by 2 x context parallel size 2 = 4; "
        "use 128 or another context parallel size"
    ) in log


@pytest.mark.one_release
def test_a_sequence_beyond_the_largest_factor_set_is_one_sentence(directory, factors):
    flags = ["--longrope-config", str(factors)]
    flags += ["--seq-length", "256", "--max-position-embeddings", "256"]
    sentence = "sequence length 256 exceeds 128, the max_length of the largest factor set"
    assert_refused(directory, "too-long", flags, sentence)


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

HOST = """\
import os, runpy, sys
from megatron_longrope.integration import cpu_host, launcher
cpu_host.prepare_environment()
rewrite = cpu_host.cpu_arguments(sys.argv[2:])
cpu_host.enable()
launcher._default_rendezvous()
from megatron.core.datasets import utils
utils.compile_helpers = lambda: None  # the wheel ships no Makefile
from megatron.core import __version__ as release
release = release.partition("+")[0]
assert release == os.environ.get("LONGROPE_EXPECT_MEGATRON", release)
if __name__ == "__main__":
    sys.argv = [sys.argv[1], *rewrite.arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
