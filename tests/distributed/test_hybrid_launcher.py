"""HybridModel with the plugin's local spec trains on a CPU, from any script."""

import os
import shutil
from pathlib import Path

import launching
import pytest
import torch
from launching import pretrain_command, train
from tiny_training import EVALUATED, write_factors, write_ones

from megatron_longrope.config import LongRopeConfig

pytest.importorskip("megatron.training")
pytestmark = pytest.mark.slow

MODEL = [
    *EVALUATED[EVALUATED.index("--hidden-size") :],  # the pattern says how many layers
    *("--spec", "megatron_longrope.integration.hybrid_spec", "hybrid_stack_spec"),
    *("--hybrid-layer-pattern", "*-*-"),
]

# The data and the loss are the quickstart's, the model is built by hand as in all releases.
OWN_SCRIPT = """\
import inspect, sys
sys.path.insert(0, {quickstart!r})
import pretrain_gpt as base
from megatron.core.enums import ModelType
from megatron.core.transformer.spec_utils import import_module
from megatron.training import argument_utils, arguments, get_args, pretrain


def model_provider(pre_process=True, post_process=True, config=None, **options):
    from megatron_longrope.integration.hybrid_spec import HybridModel

    args = get_args()
    return HybridModel(
        config or arguments.core_transformer_config_from_args(args),
        import_module(args.spec),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        hybrid_layer_pattern=args.hybrid_layer_pattern,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        **options,
    )


if __name__ == "__main__":
    base.datasets_provider.is_distributed = True
    parsed = {{}}
    if "cfg_container" in inspect.signature(pretrain).parameters:  # not in megatron-core 0.17
        args = arguments.parse_and_validate_args()
        parsed["cfg_container"] = argument_utils.pretrain_cfg_container_from_args(args)
    pretrain(
        **parsed,
        train_valid_test_dataset_provider=base.datasets_provider,
        model_provider=model_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=base.forward_step,
        get_embedding_ranks=base.embedding_ranks,
    )
"""
NEIGHBOURS = ("hybrid_builders.py", "mamba_builders.py", "gpt_builders.py", "model_provider.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hybrid-launcher")


@pytest.fixture(
    scope="module",
    params=[
        "own",
        pytest.param(
            "pretrain_hybrid",
            marks=pytest.mark.skipif(
                "MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH is not set"
            ),
        ),
    ],
)
def script(request, directory) -> Path:
    """A script that trains HybridModel: one of our own, or an unmodified one of Megatron-LM."""
    folder = directory / request.param
    folder.mkdir()
    path = folder / f"{request.param}.py"
    if request.param == "own":
        path.write_text(OWN_SCRIPT.format(quickstart=str(launching.SCRIPT.parent)))
        return path
    checkout = Path(os.environ["MEGATRON_LM_PATH"])
    if not (checkout / path.name).is_file():
        pytest.skip(f"{checkout} has no {path.name}, which megatron-core has from 0.18 on")
    # The checkout's own megatron would come before the installed one.
    for name in (path.name, *NEIGHBOURS):
        if (checkout / name).is_file():
            shutil.copy(checkout / name, folder)
    return path


@pytest.fixture(scope="module")
def factors(directory) -> Path:
    return write_factors(directory / "factors.json")


@pytest.fixture(scope="module")
def run(script):
    """Train with the script and the given flags."""

    def start(name: str, *flags: str, processes: int = 1):
        command = pretrain_command([*MODEL, *flags], processes=processes, script=script)
        return train([command], script.parent / name)

    return start


@pytest.fixture(scope="module")
def stock(run):
    return run("stock")


@pytest.fixture(scope="module")
def extended(run, script, factors):
    """Three iterations with the factors, saved."""
    save = ["--save", str(script.parent / "checkpoint"), "--save-interval", "3"]
    return run("extended", *save, "--longrope-config", str(factors))


def test_a_factor_file_of_ones_prints_the_stock_losses_digit_for_digit(run, stock, directory):
    ours = run("ones", "--longrope-config", str(write_ones(directory / "ones.json")))
    assert "stock RoPE; attention sdpa" in stock.log
    assert "attention factor 1 by softmax; attention sdpa" in ours.log
    assert len(stock.losses) == 3
    assert ours.losses == stock.losses
    assert ours.gradient_norms == stock.gradient_norms
    assert ours.evaluations == stock.evaluations


def test_factors_change_the_losses(extended, stock):
    assert "attention factor 1.08012 by softmax; attention sdpa" in extended.log
    assert len(extended.losses) == 3
    assert extended.losses != stock.losses


def test_two_context_parallel_processes_train_like_one(run, script, extended, factors):
    flags = ["--load", str(script.parent / "checkpoint"), "--finetune"]
    flags += ["--longrope-config", str(factors)]
    one = run("one", *flags)
    two = run("two", *flags, "--context-parallel-size", "2", processes=2)
    assert len(one.losses) == 3
    assert two.numbers() == pytest.approx(one.numbers(), rel=1e-6)


def test_the_engine_reads_what_was_trained(script, extended, factors):
    from megatron_longrope.engine import load_engine

    engine = load_engine(script.parent / "checkpoint", device="cpu")
    assert engine.shape.hybrid_layer_pattern == "*-*-"
    assert engine.config == LongRopeConfig.load(factors)
    assert len(engine.model.decoder.layers) == 4
    tokens = torch.arange(128)[None]
    assert engine.nll(tokens).isfinite().all()
