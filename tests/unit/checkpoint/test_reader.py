import argparse
import enum
import os
import pickle
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from malicious import Malicious, by_getattr
from torch.distributed.checkpoint.metadata import Metadata

from megatron_longrope.checkpoint import MegatronCheckpoint


@pytest.mark.parametrize("layout", ["0.18", "0.19"])
def test_both_layouts_give_the_same_arguments_and_tensors(make_checkpoint, tensors, layout):
    save = make_checkpoint(layout=layout)
    checkpoint = MegatronCheckpoint.open(save)
    assert checkpoint.format == "torch_dist"
    assert checkpoint.iteration == 3
    assert checkpoint.args.num_layers == 2
    assert checkpoint.shape.vocab_size == 50
    assert checkpoint.shape.padded_vocab_size == 64
    assert checkpoint.longrope is None
    keys = checkpoint.keys()
    assert set(keys) == set(tensors)
    for name, expected in tensors.items():
        assert keys[name].shape == tuple(expected.shape)
        assert keys[name].dtype == torch.float32
        assert torch.equal(checkpoint.tensor(name), expected)


def test_one_layer_can_be_loaded_alone(make_checkpoint, tensors):
    checkpoint = MegatronCheckpoint.open(make_checkpoint())
    name = "decoder.layers.mlp.linear_fc1.weight"
    assert torch.equal(checkpoint.tensor(name, layer=1), tensors[name][1])
    with pytest.raises(ValueError, match="has no layer 2"):
        checkpoint.tensor(name, layer=2)


def test_the_longrope_configuration_comes_back_from_the_arguments(
    make_checkpoint, expected_longrope
):
    save = make_checkpoint(longrope_config_value=expected_longrope.to_dict())
    assert MegatronCheckpoint.open(save).longrope == expected_longrope


def test_an_invalid_stored_configuration_is_refused_with_the_directory(make_checkpoint):
    save = make_checkpoint(longrope_config_value={"schema": 7})
    with pytest.raises(ValueError, match=r"iter_0000003: stored longrope.*schema 7"):
        _ = MegatronCheckpoint.open(save).longrope


def test_an_iteration_directory_and_an_iteration_number_open_the_same(make_checkpoint):
    save = make_checkpoint()
    by_path = MegatronCheckpoint.open(save / "iter_0000003")
    assert by_path.directory == MegatronCheckpoint.open(save, iteration=3).directory
    with pytest.raises(ValueError, match=r"iter_0000009: no such iteration.*iter_0000003"):
        MegatronCheckpoint.open(save, iteration=9)
    with pytest.raises(ValueError, match="iteration 9 was asked for"):
        MegatronCheckpoint.open(save / "iter_0000003", iteration=9)


def test_without_a_tracker_file_the_only_checkpoint_is_read_and_several_are_named(make_checkpoint):
    save = make_checkpoint()
    (save / "latest_checkpointed_iteration.txt").unlink()
    assert MegatronCheckpoint.open(save).iteration == 3
    shutil.copytree(save / "iter_0000003", save / "iter_0000010")
    shutil.copytree(save / "iter_0000003", save / "release")
    with pytest.raises(
        ValueError,
        match=r"has no latest_.* and holds iter_0000003, iter_0000010, release; choose with "
        r"--iteration 3 or --iteration 10 or give .*release itself",
    ):
        MegatronCheckpoint.open(save)
    assert MegatronCheckpoint.open(save / "release").args.num_layers
    shutil.rmtree(save / "iter_0000003")
    shutil.rmtree(save / "iter_0000010")
    assert MegatronCheckpoint.open(save).directory.name == "release"


@pytest.fixture
def bridge(make_checkpoint, monkeypatch):
    """A checkpoint as Bridge leaves it, the model section of its run_config.yaml, and both read."""
    save = make_checkpoint()
    stored = MegatronCheckpoint.open(save)
    expected, args = stored.shape, stored.args
    # Bridge keeps neither arguments nor iteration in the common state.
    monkeypatch.setattr(type(stored), "common", {})

    def call(name):
        return {"_target_": name, "_call_": False}

    same = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
        "num_query_groups", "layernorm_epsilon", "rotary_base", "rotary_percent", "qk_layernorm",
        "add_qkv_bias", "add_bias_linear", "normalization", "seq_length", "vocab_size",
    )  # fmt: skip
    model = {name: getattr(args, name, None) for name in same} | {
        "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider",
        "activation_func": call("torch.nn.functional.silu"),
        "gated_linear_unit": True,
        "num_moe_experts": None,
        "params_dtype": call(str(expected.params_dtype)),
        "position_embedding_type": "rope",
        "rope_scaling": False,
        "rope_scaling_factor": 1.0,
        "seq_len_interpolation_factor": None,
        "share_embeddings_and_output_weights": not expected.untie_embeddings,
    }

    def read(model):
        described = save / "iter_0000003" / "run_config.yaml"
        described.write_text(yaml.safe_dump({"model": model, "train": {"train_iters": 3}}))
        return MegatronCheckpoint.open(save)

    # Bridge's window is that of the run, seq_length.
    expected = replace(expected, max_position_embeddings=expected.seq_length)
    return argparse.Namespace(save=save, model=model, read=read, expected=expected)


def test_without_stored_arguments_megatron_bridges_run_config_describes_the_model(bridge):
    with pytest.raises(ValueError, match=r"no arguments; .*--num-layers, .*run_config\.yaml"):
        _ = MegatronCheckpoint.open(bridge.save).shape
    found = bridge.read(bridge.model)
    assert found.iteration == 3
    assert found.shape == bridge.expected
    assert found.longrope is None
    (bridge.save / "iter_0000003" / "run_config.yaml").write_text("model: [")
    with pytest.raises(ValueError, match=r"run_config\.yaml: cannot be read as YAML"):
        _ = MegatronCheckpoint.open(bridge.save).shape


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": True, "rope_scaling_factor": 32.0},
        {"scale_factor": 32.0, "old_context_len": 8192},  # Bridge 0.1 and 0.2
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_llama_3_of_megatron_bridge_is_no_plain_rope(bridge, fields, recwarn):
    model = bridge.model
    if "scale_factor" in fields:
        model = {name: value for name, value in model.items() if "rope_scaling" not in name}
    base = bridge.read({**model, **fields}).longrope.base_frequencies
    assert (base["rope_type"], base["factor"]) == ("llama3", 32.0)
    assert not recwarn  # Bridge gives the factor to the model


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"seq_len_interpolation_factor": 4.0}, "rotary_seq_len_interpolation_factor = 4.0"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type = 'yarn'"),
    ],
)
def test_other_positions_of_megatron_bridge_are_named(bridge, fields, name):
    assert bridge.read({**bridge.model, **fields}).shape.other_architecture.startswith(name)


def test_the_nested_fields_of_megatron_bridges_newest_recipes_are_read(bridge):
    outer = {
        "_target_", "position_embedding_type", "rope_scaling", "rope_scaling_factor",
        "rotary_base", "rotary_percent", "seq_len_interpolation_factor", "seq_length",
        "share_embeddings_and_output_weights", "vocab_size",
    }  # fmt: skip
    nested = {name: value for name, value in bridge.model.items() if name not in outer}
    model = {name: value for name, value in bridge.model.items() if name in outer}
    model["_builder_"] = "megatron.bridge.models.gpt.gpt_builder.GPTModelBuilder"
    nested["activation_func"] = "silu"
    assert bridge.read({**model, "transformer": nested}).shape == bridge.expected
    del nested["activation_func"]  # megatron-core's own as_dict leaves it out
    with pytest.raises(ValueError, match=r"says nothing of activation_func.*add `activation_func"):
        _ = bridge.read({**model, "transformer": nested}).shape


def test_a_wrong_path_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        MegatronCheckpoint.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not a Megatron checkpoint"):
        MegatronCheckpoint.open(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("banana")
    with pytest.raises(ValueError, match="'banana'; expected an iteration number"):
        MegatronCheckpoint.open(tmp_path)


def shard(directory):
    (path,) = directory.glob("*.distcp")
    return path


DAMAGED = {
    "a missing shard": (lambda at: shard(at).unlink(), r"\.distcp: missing"),
    "a cut shard": (lambda at: os.truncate(shard(at), 1000), r"\.distcp: truncated: 1000 bytes"),
    "empty metadata": (lambda at: (at / ".metadata").write_bytes(b""), "as checkpoint metadata"),
    "other metadata": (lambda at: (at / ".metadata").write_bytes(b"\x80\x04g"), "as checkpoint m"),
    "no metadata": (lambda at: (at / ".metadata").unlink(), r"\.metadata: missing"),
    "another format": (
        lambda at: (at / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        r"'zarr' is not supported; .* --ckpt-format torch_dist",
    ),
    "two formats": (lambda at: (at / "mp_rank_00").mkdir(), "files of two formats.*mp_rank.*distc"),
}


@pytest.mark.parametrize(("damage", "refusal"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_checkpoint_is_refused(make_checkpoint, damage, refusal):
    save = make_checkpoint()
    damage(save / "iter_0000003")
    with pytest.raises(ValueError, match=refusal):
        MegatronCheckpoint.open(save)


def test_overwritten_tensor_data_is_a_clear_error(make_checkpoint):
    save = make_checkpoint()
    path = shard(save / "iter_0000003")
    path.write_bytes(b"\0" * path.stat().st_size)
    checkpoint = MegatronCheckpoint.open(save)
    with pytest.raises(ValueError, match=r"output_layer\.weight' is damaged"):
        checkpoint.tensor("output_layer.weight")
    with pytest.raises(ValueError, match=r"common_state.*not readable as a torch archive"):
        _ = checkpoint.args


def test_enums_of_classes_that_are_not_imported_are_inert(make_checkpoint):
    save = make_checkpoint(layout="0.18", exit_signal=signal.SIGTERM)
    value = MegatronCheckpoint.open(save).args.exit_signal
    # Megatron, where another test has imported it, declares this enum safe; then it is itself.
    assert value == signal.SIGTERM or value.arguments == (signal.SIGTERM.value,)


class Backend(enum.Enum):
    """Stands for an enum of Megatron's."""

    auto = 5


Backend.__module__ = "megatron.core.transformer.enums"


@pytest.mark.parametrize("layout", ["0.18", "0.19"])
def test_enums_that_python_3_11_pickled_by_getattr_are_read(
    make_checkpoint, monkeypatch, tensors, layout
):
    with monkeypatch.context() as patch:
        patch.setattr(
            enum.Enum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name))
        )
        patch.setitem(sys.modules, Backend.__module__, argparse.Namespace(Backend=Backend))
        save = make_checkpoint(layout=layout, attention_backend=Backend.auto)
    metadata = (save / "iter_0000003" / ".metadata").read_bytes()
    assert b"getattr" in metadata and b"TORCH_CONTIGUOUS_FORMAT" in metadata
    checkpoint = MegatronCheckpoint.open(save)
    assert checkpoint.args.attention_backend.arguments[1] == "auto"
    assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in tensors)


def test_metadata_with_a_path_of_python_3_13_is_read(make_checkpoint):
    save = make_checkpoint()
    path = save / "iter_0000003" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    assert isinstance(metadata.storage_meta.checkpoint_id, Path)
    written = pickle.dumps(metadata, 2).replace(b"cpathlib\n", b"cpathlib._local\n")
    assert b"cpathlib._local\n" in written
    path.write_bytes(written)
    assert MegatronCheckpoint.open(save).iteration == 3


def test_metadata_of_torch_2_2_is_read(make_checkpoint, tensors):
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    save = make_checkpoint()
    path = save / "iter_0000003" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for item in metadata.state_dict_metadata.values():
        if hasattr(item, "properties"):
            item.properties = TensorProperties(dtype=item.properties.dtype)
    path.write_bytes(pickle.dumps(metadata))
    assert b"MEM_FORMAT_ENCODING" in path.read_bytes()
    checkpoint = MegatronCheckpoint.open(save)
    assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("layout", ["0.18", "0.19"])
def test_a_malicious_pickle_in_the_common_state_does_not_run(make_checkpoint, tmp_path, layout):
    marker = tmp_path / "executed"
    save = make_checkpoint(layout=layout, common={"args": Malicious(marker), "iteration": 1})
    with pytest.raises(ValueError, match=r"object of class posix\.system"):
        _ = MegatronCheckpoint.open(save).args
    assert not marker.exists()


def test_a_malicious_pickle_in_the_metadata_does_not_run(make_checkpoint, tmp_path):
    marker = tmp_path / "executed"
    save = make_checkpoint()
    (save / "iter_0000003" / ".metadata").write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(ValueError, match=r"posix\.system is not part of checkpoint metadata"):
        MegatronCheckpoint.open(save)
    assert not marker.exists()


@pytest.mark.parametrize("layout", ["0.18", "0.19"])
def test_a_chain_of_getattr_in_the_common_state_does_not_run(make_checkpoint, tmp_path, layout):
    marker = tmp_path / "executed"
    chain = by_getattr(argparse.Namespace, "_os", marker)
    save = make_checkpoint(layout=layout, common={"args": chain, "iteration": 1})
    with pytest.raises(ValueError, match=r"not readable: Trying to call reduce .* Opaque"):
        _ = MegatronCheckpoint.open(save).args
    assert not marker.exists()
    pickle.loads(pickle.dumps(chain))
    assert marker.exists()  # it would have


def test_a_chain_of_getattr_in_the_metadata_does_not_run(make_checkpoint, tmp_path):
    marker = tmp_path / "executed"
    chain = pickle.dumps(by_getattr(Metadata, "os", marker))
    save = make_checkpoint()
    (save / "iter_0000003" / ".metadata").write_bytes(chain)
    with pytest.raises(ValueError, match=r"builtins\.getattr of <class .*Metadata'>, which is not"):
        MegatronCheckpoint.open(save)
    assert not marker.exists()
    pickle.loads(chain)
    assert marker.exists()


def test_metadata_cannot_point_outside_the_checkpoint(make_checkpoint):
    save = make_checkpoint()
    path = save / "iter_0000003" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="outside the checkpoint"):
        MegatronCheckpoint.open(save)


def test_missing_and_mistyped_arguments_are_named(make_checkpoint):
    with pytest.raises(ValueError, match="argument num_layers is None"):
        _ = MegatronCheckpoint.open(make_checkpoint(num_layers=None)).shape


def test_heads_are_the_groups_without_grouped_queries(make_checkpoint):
    save = make_checkpoint(group_query_attention=False, num_query_groups=1)
    assert MegatronCheckpoint.open(save).shape.num_query_groups == 4
