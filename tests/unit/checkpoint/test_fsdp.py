"""fsdp_dtensor and torch_dcp, in checkpoints that are synthetic: see make_fsdp_checkpoint.py."""

import itertools
from pathlib import Path

import launching
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import FileSystemReader

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.conversion.to_hf import write_hf_folder

HELPER = Path(__file__).parents[2] / "helpers" / "make_fsdp_checkpoint.py"
FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture
def written(directory, arguments, tensors, expected_longrope):
    """Both formats, written once by two ranks."""
    if not (directory / "wanted.pt").exists():
        args = arguments(longrope_config_value=expected_longrope.to_dict())
        torch.save({"tensors": tensors, "args": args}, directory / "wanted.pt")
        done = launching.python(HELPER, directory)
        assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.fixture
def write(tmp_path, arguments):
    """A checkpoint of one process, with any state."""

    def make(model, **state):
        directory = tmp_path / "fsdp" / "iter_0000003"
        state = {"args": state.get("args") or arguments(), "iteration": 3, "model": model, **state}
        dcp.save(state, checkpoint_id=directory, no_dist=True)
        return directory

    return make


def layered(tensors):
    """Named as in a checkpoint of one process, linear_fc1 whole."""
    result = {}
    for name, value in tensors.items():
        head, found, tail = name.partition("decoder.layers.")
        if not found or head:
            result[f"module.{name}"] = value
        else:
            result |= {
                f"module.decoder.layers.{layer}.{tail}": item for layer, item in enumerate(value)
            }
    return result


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fsdp_dtensor", "torch_dcp"])
def test_sharded_layers_come_back_with_the_names_and_the_stacking_of_torch_dist(
    written, tensors, expected_longrope, variant
):
    checkpoint = MegatronCheckpoint.open(written / variant)
    assert checkpoint.format == "fsdp_dtensor"
    assert checkpoint.iteration == 3
    assert checkpoint.longrope == expected_longrope
    keys = checkpoint.keys()
    assert set(keys) == set(tensors)
    for name, expected in tensors.items():
        assert keys[name].shape == tuple(expected.shape)
        assert torch.equal(checkpoint.tensor(name), expected)
    assert torch.equal(checkpoint.tensor(FC1, layer=1), tensors[FC1][1])


@pytest.mark.slow
def test_one_layer_reads_nothing_of_the_others(written, tensors, monkeypatch):
    checkpoint = MegatronCheckpoint.open(written / "fsdp_dtensor")
    checkpoint.keys()
    read = []
    original = FileSystemReader.read_data

    def recorded(self, plan, planner):
        read.extend(item.storage_index.fqn for item in plan.items)
        return original(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", recorded)
    assert torch.equal(checkpoint.tensor(FC1, layer=1), tensors[FC1][1])
    stem = "model.module.decoder.layers.1.mlp.linear_fc1.weight"
    assert set(read) == {f"{stem}_w", f"{stem}_v"}


@pytest.mark.slow
def test_it_converts_to_the_folder_that_torch_dist_converts_to(
    written, make_checkpoint, expected_longrope, tmp_path
):
    torch_dist = make_checkpoint(longrope_config_value=expected_longrope.to_dict())
    for name, load in (("fsdp", written / "fsdp_dtensor"), ("dist", torch_dist)):
        write_hf_folder(load, tmp_path / name, longrope_config=expected_longrope)
    ours, theirs = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("fsdp", "dist")
    )
    assert ours == theirs


def test_megatron_bridges_run_config_describes_it(tensors, tmp_path):
    directory = tmp_path / "iter_0000003"
    dcp.save({"model": layered(tensors)}, checkpoint_id=directory, no_dist=True)
    model = {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
        "num_query_groups": 2, "kv_channels": 8, "seq_length": 16, "vocab_size": 50,
        "share_embeddings_and_output_weights": False,
    }  # fmt: skip
    (directory / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    checkpoint = MegatronCheckpoint.open(directory)
    assert (checkpoint.shape.vocab_size, checkpoint.shape.padded_vocab_size) == (50, 64)
    assert set(checkpoint.keys()) == set(tensors)


def test_norms_of_the_local_spec_get_the_fused_names(write, tensors):
    local = {
        name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
            "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
        ): value
        for name, value in layered(tensors).items()
    }
    assert "module.decoder.layers.0.input_layernorm.weight" in local
    checkpoint = MegatronCheckpoint.open(write(local))
    assert set(checkpoint.keys()) == set(tensors)
    assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "pattern",
    ["mlp.experts.linear_fc1.weight{}", "mlp.experts.local_experts.{}.linear_fc1.weight"],
    ids=["grouped", "sequential"],
)
def test_experts_are_stacked_within_their_layer(write, tensors, pattern):
    experts = torch.randn(2, 3, 6, 32)  # layers, experts, [gate; up], hidden
    model = layered(tensors)
    for layer, number in itertools.product(range(2), range(3)):
        name = f"module.decoder.layers.{layer}.{pattern.format(number)}"
        for half, value in zip("wv", experts[layer, number].chunk(2), strict=True):
            model[f"{name}_{half}"] = value.clone()
    checkpoint = MegatronCheckpoint.open(write(model))
    name = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert torch.equal(checkpoint.tensor(name), experts)
    assert torch.equal(checkpoint.tensor(name, layer=1), experts[1])


MLP = "module.decoder.layers.{}.mlp."
HALF = MLP.format(1) + "linear_fc1.weight"
FC2_OF_0, FC2_OF_1 = (MLP.format(layer) + "linear_fc2.weight" for layer in range(2))
EXPERT = MLP.format(0) + "experts.linear_fc2.weight"
DAMAGED = {
    "an expert": (
        lambda model: model.update({f"{EXPERT}{n}": torch.zeros(2, 2) for n in (0, 2)}),
        r"expert 1 lacks decoder\.layers\.0\.mlp\.experts",
    ),
    "half of a gated layer": (
        lambda model: model.update({f"{HALF}_w": model.pop(HALF)[:48].clone()}),
        r"only one half of decoder\.layers\.1\.mlp\.linear_fc1",
    ),
    "a tensor": (lambda model: model.pop(FC2_OF_0), r"iter_0000003: layer 0 lacks .*fc2\.weight"),
    "a layer": (
        lambda model: [model.pop(name) for name in list(model) if ".layers.1." in name],
        "holds 1 layers, its arguments say 2",
    ),
    "a shape": (
        lambda model: model.update({FC2_OF_1: torch.zeros(32, 40)}),
        r"layer 1 is \(32, 40\) float32, .* \(32, 48\) float32",
    ),
}


@pytest.mark.parametrize(("damage", "refusal"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_missing_or_of_another_shape_is_named(write, tensors, damage, refusal):
    model = layered(tensors)
    damage(model)
    with pytest.raises(ValueError, match=refusal):
        MegatronCheckpoint.open(write(model)).keys()


def test_tied_embeddings_appear_once(write, tensors, arguments):
    args = arguments(untie_embeddings_and_output_weights=False)
    checkpoint = MegatronCheckpoint.open(write(layered(tensors), args=args))
    assert set(checkpoint.keys()) == set(tensors) - {"output_layer.weight"}


def test_chunks_of_a_pipeline_are_refused(write, tensors):
    directory = write({}, model0=layered(tensors))
    with pytest.raises(ValueError, match="several chunks of a pipelined model"):
        MegatronCheckpoint.open(directory)


def test_torch_dist_without_its_description_is_recognised(make_checkpoint):
    directory = make_checkpoint() / "iter_0000003"
    (directory / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"if it is torch_dist, copy metadata\.json"):
        MegatronCheckpoint.open(directory)
