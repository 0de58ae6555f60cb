"""`longrope pretrain` with packed documents and other rotations."""

import argparse
import math
import re
from pathlib import Path

import pytest
from launching import TrainingRun, pretrain_command, train
from tiny_training import HEAD_DIM, MODEL, yarn_config

from megatron_longrope.config import LongRopeConfig, identity_config

pytest.importorskip("megatron.training")

from megatron.training import argument_utils, arguments

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "helpers" / "pretrain_formats.py"
PACKED = "--dataloader-inter-document-masking"


def megatron_knows(flag: str) -> bool:
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return any(flag in action.option_strings for action in parser._actions)


@pytest.fixture(scope="session")
def packed() -> list[str]:
    return [PACKED] if megatron_knows(PACKED) else []


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.fixture(scope="session")
def launch(directory):
    """Start the script with the given flags and factors."""

    def start(name: str, *flags: str, config: LongRopeConfig | None = None) -> TrainingRun:
        arguments = [*MODEL, *flags]
        if config is not None:
            config.save(directory / f"{name}.json")
            arguments += ["--longrope-config", str(directory / f"{name}.json")]
        command = pretrain_command(arguments, script=SCRIPT)
        return train([command], directory / name)

    return start


def documents(run: TrainingRun) -> list[int]:
    """How many documents each pack held."""
    return [int(count) for count in re.findall(r"> a pack of (\d+) documents", run.log)]


def test_all_ones_change_no_digit_of_packed_interleaved_partly_rotated_training(launch, packed):
    flags = [*packed, "--rotary-percent", "0.5", "--rotary-interleaved"]
    stock = launch("stock", *flags)
    ours = launch("ones", *flags, config=identity_config(10000.0, HEAD_DIM // 2, 128))
    assert "no --longrope-config, stock RoPE" in stock.log
    assert "attention factor 1 by rope" in ours.log
    assert len(stock.losses) == 2 and all(math.isfinite(loss) for loss in stock.numbers())
    assert ours.losses == stock.losses
    assert ours.gradient_norms == stock.gradient_norms
    if packed:
        assert min(documents(stock)) > 4
        assert documents(stock) == documents(ours)


def test_multi_token_prediction_on_packs_trains_alike_with_both_carriers(launch, packed):
    if not hasattr(argument_utils, "gpt_config_from_args"):
        pytest.skip("what the quickstart builds on 0.17 and 0.18 has no multi-token prediction")
    flags = [*packed, "--mtp-num-layers", "1", "--longrope-attention-factor-carrier"]
    softmax, rope = (
        launch(f"mtp-{carrier}", *flags, carrier, config=yarn_config(2.0))
        for carrier in ("softmax", "rope")
    )
    for name, run in (("softmax", softmax), ("rope", rope)):
        assert f"attention factor 1.08012 by {name}" in run.log
        assert len(run.losses) == 2
    predicted = [
        [float(loss) for loss in re.findall(r"mtp_1 loss: (\S+) \|", run.log)]
        for run in (softmax, rope)
    ]
    assert len(predicted[0]) == 2
    assert predicted[1] == pytest.approx(predicted[0], rel=1e-6)
    assert rope.numbers() == pytest.approx(softmax.numbers(), rel=1e-6)
