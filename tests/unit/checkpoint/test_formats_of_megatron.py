"""The same weights in every format, written by Megatron's own training loop.

One process trains and saves torch_dist; other layouts load that and save it as `torch` with
Megatron's --ckpt-convert-format, so each file must hold the same bits.
"""

import functools
import shlex
from pathlib import Path

import pytest
import torch
from launching import pretrain_command, run
from tiny_training import MODEL, yarn_config

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.engine import load_engine

pytest.importorskip("megatron.training")
pytestmark = pytest.mark.slow

HELPERS = Path(__file__).parents[2] / "helpers"
TIED = [flag for flag in MODEL if flag != "--untie-embeddings-and-output-weights"]
PP2 = "--pipeline-model-parallel-size 2"
VPP = f"--tensor-model-parallel-size 2 {PP2} --num-layers-per-virtual-pipeline-stage 1"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("formats")
    yarn_config(2.0).save(directory / "factors.json")
    return directory


@pytest.fixture(scope="module")
def launch(directory):
    def start(name, model, flags, *, processes=1, script="pretrain_formats.py"):
        flags = [*model, "--num-layers", "4", *shlex.split(flags)]
        flags += ["--longrope-config", str(directory / "factors.json")]
        command = pretrain_command(flags, processes=processes, script=HELPERS / script)
        statuses, log = run([command], directory / f"run-{name}")
        assert statuses == [0], log[-3000:]

    return start


@pytest.fixture(scope="module")
def saved(directory, launch):
    """name -> torch_dist checkpoint and the same in `torch`, made when asked for."""

    @functools.cache
    def make(name):
        model, layout, processes = {"untied": (MODEL, VPP, 4), "tied": (TIED, PP2, 2)}[name]
        load, save = directory / name, directory / f"{name}-ranks"
        launch(name, model, f"--save {load} --save-interval 2")
        convert = f"--load {load} --ckpt-convert-format torch --ckpt-convert-save {save} {layout}"
        launch(f"{name}-ranks", model, convert, processes=processes)
        return load, save / "torch"

    return make


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert ours.shape == theirs.shape
    assert ours.longrope == theirs.longrope
    for name, info in theirs.keys().items():
        assert torch.equal(ours.tensor(name), theirs.tensor(name)), name
        if name.startswith("decoder.layers."):
            last = info.shape[0] - 1
            assert torch.equal(ours.tensor(name, last), theirs.tensor(name, last)), name


@pytest.mark.parametrize(
    ("name", "files"),
    [
        pytest.param("untied", 4, id="tp2-pp2-vpp2"),
        pytest.param("tied", 2, id="pp2-tied", marks=pytest.mark.one_release),
    ],
)
def test_ranks_files_hold_what_torch_dist_holds_bit_for_bit(saved, name, files):
    theirs, ours = map(MegatronCheckpoint.open, saved(name))
    assert (ours.format, theirs.format) == ("torch", "torch_dist")
    assert len(list(ours.directory.iterdir())) == files
    assert ours.iteration == theirs.iteration == 2
    assert_same(ours, theirs)
    names = set(ours.keys())
    assert ("output_layer.weight" in names) == (name == "untied")


def test_engine_and_conversion_make_the_same_of_both_formats(saved, tmp_path):
    tokens = torch.randint(255, (1, 96), generator=torch.Generator().manual_seed(0))
    theirs, ours = (
        load_engine(path, dtype=torch.float32).logits(tokens) for path in saved("untied")
    )
    assert torch.equal(ours, theirs)
    for index, path in enumerate(saved("untied")):
        write_hf_folder(path, tmp_path / str(index), longrope_config=None)
    first, second = (tmp_path / str(index) / "model.safetensors" for index in range(2))
    assert first.read_bytes() == second.read_bytes()


def test_megatron_fsdp_saves_what_plain_data_parallelism_saves(directory, launch):
    pytest.importorskip("einops", reason="Megatron-FSDP needs einops")
    still = "--lr 0 --weight-decay 0 --save-interval 2"  # the weights stay the initial ones
    launch("still", MODEL, f"{still} --save {directory / 'still'}")
    fsdp = (
        "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
        f"--ckpt-format fsdp_dtensor --no-save-optim --save {directory / 'fsdp'}"
    )
    launch("fsdp", MODEL, f"{still} {fsdp}", processes=2, script="pretrain_fsdp.py")
    theirs, ours = (MegatronCheckpoint.open(directory / name) for name in ("still", "fsdp"))
    assert (ours.format, ours.iteration) == ("fsdp_dtensor", 2)
    assert_same(ours, theirs)
