"""`--ckpt-format torch`, with ranks' files cut by tests/helpers/legacy_ranks.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from legacy_ranks import edit, write_legacy
from malicious import Malicious

import megatron_longrope
from megatron_longrope.checkpoint import MegatronCheckpoint

FC1 = "decoder.layers.mlp.linear_fc1.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.fixture
def write(tmp_path, tensors, arguments):
    """Writes `legacy/iter_0000003` in any parallel layout."""

    def make(*, model=None, changes=None, **layout):
        args = arguments(**(changes or {}))
        return write_legacy(
            tmp_path / "legacy", tensors if model is None else model, args, **layout
        )

    return make


@pytest.mark.parametrize("local", [False, True], ids=["te-spec", "local-spec"])
@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)])
def test_any_layout_gives_the_names_shapes_and_bits_of_torch_dist(
    write, tensors, make_checkpoint, tp, pp, vpp, local
):
    checkpoint = MegatronCheckpoint.open(write(tp=tp, pp=pp, vpp=vpp, local=local).parent)
    torch_dist = MegatronCheckpoint.open(make_checkpoint())
    assert (checkpoint.format, checkpoint.iteration) == ("torch", 3)
    assert checkpoint.shape == torch_dist.shape
    assert checkpoint.keys() == torch_dist.keys()
    assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in tensors)
    assert torch.equal(checkpoint.tensor(FC1, layer=1), tensors[FC1][1])


def test_a_run_config_describes_ranks_without_arguments(write, tensors):
    directory = write(tp=2)
    for rank in range(2):
        edit(directory / f"mp_rank_{rank:02d}", lambda state: state.pop("args"))
    model = {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
        "num_query_groups": 2, "kv_channels": 8, "seq_length": 16, "vocab_size": 50,
        "share_embeddings_and_output_weights": False, "tensor_model_parallel_size": 2,
        "gated_linear_unit": True, "activation_func": "silu",
    }  # fmt: skip
    (directory / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    checkpoint = MegatronCheckpoint.open(directory)
    assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in tensors)


def test_virtual_stages_come_in_the_order_of_the_model(write, tensors):
    # Seven layers in four chunks of 2, 2, 2, 1: pipeline rank 0 holds layers 0, 1 and 4, 5.
    deep = {
        name: torch.cat([value, value + 1, value + 2, value + 3])[:7]
        if name.startswith("decoder.layers.")
        else value
        for name, value in tensors.items()
    }
    directory = write(model=deep, changes={"num_layers": 7}, tp=2, pp=2, vpp=2)
    checkpoint = MegatronCheckpoint.open(directory)
    assert all(torch.equal(checkpoint.tensor(name), deep[name]) for name in deep)


def test_tied_embeddings_appear_once_though_the_last_stage_repeats_them(write, tensors):
    tied = {"untie_embeddings_and_output_weights": False}
    checkpoint = MegatronCheckpoint.open(write(changes=tied, pp=2))
    assert set(checkpoint.keys()) == set(tensors) - {"output_layer.weight"}
    name = "embedding.word_embeddings.weight"
    assert torch.equal(checkpoint.tensor(name), tensors[name])


def test_layers_of_a_hybrid_model_keep_their_numbers(write, tensors):
    directory = write(tp=2, local=True, changes={"hybrid_layer_pattern": "*-|*-"})
    moved = {"self_attention": 0, "input_layernorm": 0, "mlp": 1, "pre_mlp_layernorm": 1}

    def to_hybrid(state):  # attention and MLP of layer i become layers 2i and 2i + 1
        model = state["model"]
        for name in [name for name in model if name.startswith("decoder.layers.")]:
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            target = 2 * int(number) + moved[rest.partition(".")[0]]
            state.setdefault("new", {})[f"decoder.layers.{target}.{rest}"] = model.pop(name)
        model.update(state.pop("new"))

    for folder in directory.iterdir():
        edit(folder, to_hybrid)
    checkpoint = MegatronCheckpoint.open(directory)
    for name, expected in tensors.items():
        head, is_layer, tail = name.partition("decoder.layers.")
        if not is_layer or head:
            assert torch.equal(checkpoint.tensor(name), expected)
            continue
        for index, value in enumerate(expected):
            number = 2 * index + moved[tail.partition(".")[0]]
            assert torch.equal(checkpoint.tensor(f"decoder.layers.{number}.{tail}"), value)
    assert len(checkpoint.keys()) == 3 + 2 * 6


def test_an_ungated_mlp_is_joined_row_by_row(write, tensors):
    checkpoint = MegatronCheckpoint.open(write(changes={"swiglu": False}, tp=2))
    ours = checkpoint.tensor(FC1)
    (g0, g1), (u0, u1) = (half.chunk(2, dim=1) for half in tensors[FC1].chunk(2, dim=1))
    assert torch.equal(ours, torch.cat([g0, u0, g1, u1], dim=1))


@pytest.mark.parametrize("expert_tp", [1, 2])
def test_experts_of_all_ranks_are_stacked(tmp_path, write, arguments, expert_tp):
    directory = write(tp=2)
    moe = {
        "num_experts": 4,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": expert_tp,
    }
    gate_up = torch.randn(2, 4, 6, 32)  # layers, experts, [gate; up], hidden
    fc2 = torch.randn(2, 4, 32, 3 if expert_tp == 1 else 4)
    gate_up = gate_up if expert_tp == 1 else torch.randn(2, 4, 8, 32)
    for tp_rank in range(2):
        for ep_rank in range(2):
            if expert_tp == 1 and tp_rank != ep_rank:
                continue  # as on two ranks, each of which writes one file

            def to_experts(state, tp_rank=tp_rank, ep_rank=ep_rank):
                vars(state["args"]).update(moe)
                model = state["model"]
                for name in [name for name in model if ".mlp." in name]:
                    del model[name]
                for layer in range(2):
                    experts = f"decoder.layers.{layer}.mlp.experts.local_experts."
                    for index in range(2):
                        first = gate_up[layer, 2 * ep_rank + index]
                        second = fc2[layer, 2 * ep_rank + index]
                        if expert_tp == 2:
                            halves = [half.chunk(2)[tp_rank] for half in first.chunk(2)]
                            first, second = torch.cat(halves), second.chunk(2, dim=1)[tp_rank]
                        model[f"{experts}{index}.linear_fc1.weight"] = first.clone()
                        model[f"{experts}{index}.linear_fc2.weight"] = second.clone()

            target = directory / f"mp_rank_{tp_rank:02d}_{ep_rank:03d}"
            shutil.copytree(directory / f"mp_rank_{tp_rank:02d}", target)
            edit(target, to_experts)
    for tp_rank in range(2):
        shutil.rmtree(directory / f"mp_rank_{tp_rank:02d}")
    checkpoint = MegatronCheckpoint.open(directory)
    stem = "decoder.layers.mlp.experts.experts"
    assert torch.equal(checkpoint.tensor(f"{stem}.linear_fc1.weight"), gate_up)
    assert torch.equal(checkpoint.tensor(f"{stem}.linear_fc2.weight", layer=1), fc2[1])


def test_tensors_are_copies_that_outlive_the_file(write, tensors):
    directory = write()
    checkpoint = MegatronCheckpoint.open(directory)
    ours = checkpoint.tensor(FC1)
    ours.zero_()
    assert torch.equal(checkpoint.tensor(FC1), tensors[FC1])


@pytest.mark.slow
def test_the_optimizer_is_not_read_and_memory_stays_bounded(tmp_path, write):
    """Of a file of 304 MiB, the model's 104 MiB: less than the whole is ever in memory.

    A process of its own, whose peak no other test has raised.
    """
    directory = write()

    def enlarge(state):
        state["model"]["embedding.word_embeddings.weight"] = torch.zeros(13 << 18, 8)
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(200 << 18)

    edit(directory / "mp_rank_00", enlarge)
    code = """
import sys
from megatron_longrope.checkpoint import MegatronCheckpoint as M
def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10
import torch.distributed.checkpoint
before = peak()
checkpoint = M.open(sys.argv[1])
assert checkpoint.keys() and peak() - before < 32, ("keys", peak() - before)
for _ in range(4):
    checkpoint.tensor("embedding.word_embeddings.weight")
assert peak() - before < 2 * 104 + 64, ("tensors", peak() - before)
"""
    subprocess.run(
        [sys.executable, "-c", code, str(directory)],
        check=True,
        cwd=Path(megatron_longrope.__file__).parents[1],
    )


def test_a_missing_rank_is_named(write):
    directory = write(tp=2, pp=2)
    shutil.rmtree(directory / "mp_rank_01_000")
    with pytest.raises(
        ValueError, match="tensor-parallel rank 1, pipeline rank 0 is missing; the run was tensor "
    ):
        MegatronCheckpoint.open(directory)


RANK = "mp_rank_01/model_optim_rng.pt"
BROKEN = {
    "missing": (lambda at: (at / RANK).unlink(), "missing"),
    "half": (lambda at: os.truncate(at / RANK, 5000), "truncated: .* copy it again"),
    "empty": (lambda at: os.truncate(at / RANK, 0), "truncated"),
    "text": (lambda at: (at / RANK).write_bytes(b"hello"), r"not an archive of torch\.save"),
}


@pytest.mark.parametrize(("damage", "refusal"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(write, damage, refusal):
    directory = write(tp=2)
    assert (directory / RANK).stat().st_size > 5000
    damage(directory)
    with pytest.raises(ValueError, match=f"{RANK}: {refusal}"):
        MegatronCheckpoint.open(directory)


@pytest.mark.parametrize("extra", ["mp_rank_02", "mp_rank_00_001"])
def test_a_rank_that_the_run_had_not_is_named(write, extra):
    directory = write(tp=2)
    shutil.copytree(directory / "mp_rank_00", directory / extra)
    with pytest.raises(ValueError, match=rf"{extra}: the run was tensor parallel 2 x pipeline"):
        MegatronCheckpoint.open(directory)


DAMAGED = {
    "another iteration": (
        {"tp": 2}, "01", lambda state: state.update(iteration=4),
        r"mp_rank_01/.*is of iteration 4, mp_rank_00 of 3",
    ),
    "another layout": (
        {"tp": 2}, "01", lambda state: vars(state["args"]).update(pipeline_model_parallel_size=2),
        r"mp_rank_01/.*pipeline parallel 2 with 1 chunks, mp_",
    ),
    "too few layers": (
        {"pp": 2}, "", lambda state: vars(state["args"]).update(num_layers=3),
        "holds 2 layers, its arguments say 3",
    ),
    "a part of another shape": (
        {"tp": 2}, "01", lambda state: state["model"].update({QKV: torch.zeros(8, 32)}),
        r"iter_0000003: .*qkv.* \(32, 32\) .* \(8, 32\) on rank 1",
    ),
    "a layer of another shape": (
        {}, "00", lambda state: state["model"].update({QKV: torch.zeros(8, 32)}),
        r"qkv.*of layer 1 is \(64, 32\).*layer 0 \(8, 32\)",
    ),
    "a tensor that one rank lacks": (
        {"tp": 2}, "01", lambda state: state["model"].pop(QKV),
        rf"mp_rank_01/.*{QKV} is in only one",
    ),
    "a split tensor of unknown kind": (
        {"tp": 2}, "",
        lambda state: state["model"].update({"decoder.layers.0.mixer.A_log": torch.ones(4)}),
        r"mixer\.A_log in 2 tensor-parallel parts",
    ),
    "a model from before megatron-core": (
        {}, "00", lambda state: state.update(model={"language_model": {}}),
        r"before megatron-core's classes; convert it",
    ),
    "the old order of qkv": (
        {}, "00", lambda state: state.update(checkpoint_version=1.0),
        r"checkpoint_version 1\.0.*order the rows of qkv",
    ),
    "chunks of wrong names": (
        {}, "00", lambda state: state.update(model1=state.pop("model")),
        "holds the models model1; expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "rank", "change", "refusal"), DAMAGED.values(), ids=DAMAGED)
def test_files_that_do_not_fit_together_are_refused_by_name(write, layout, rank, change, refusal):
    directory = write(**layout)
    for folder in sorted(directory.glob(f"mp_rank_{rank}*")):
        edit(folder, change)
    with pytest.raises(ValueError, match=refusal):
        MegatronCheckpoint.open(directory).keys()


class CudaGenerator:
    """Pickled as a generator of the random state of a run with CUDA graphs."""

    def __reduce__(self):
        state = (1, 2, torch.zeros(16, dtype=torch.uint8))
        return torch._C.Generator, (torch.device("cuda"),), state


@pytest.mark.parametrize("declared", [[], [torch._C.Generator]], ids=["alone", "with-megatron"])
def test_random_states_of_cuda_graphs_are_read_without_a_gpu(write, tensors, declared):
    directory = write()
    states = [{"rng_tracker_states": {"model-parallel-rng": CudaGenerator()}}]
    edit(directory / "mp_rank_00", lambda state: state.update(rng_state=states))
    with torch.serialization.safe_globals(declared):
        checkpoint = MegatronCheckpoint.open(directory)
        assert torch.equal(checkpoint.tensor(FC1), tensors[FC1])
        assert set(declared) <= set(torch.serialization.get_safe_globals())


class MaliciousTensor(torch.Tensor):
    path = None

    def __reduce_ex__(self, protocol):
        return os.system, (f"touch {self.path}",)


class Unknown(torch.Tensor):
    """A tensor of a class that only its writer has."""


def malicious_tensor(path):
    result = torch.zeros(2).as_subclass(MaliciousTensor)
    result.path = path
    return result


@pytest.mark.parametrize(
    "infect",
    [
        lambda state, evil, tensor: state.update(evil=evil),
        lambda state, evil, tensor: state["model"].update({QKV: tensor}),
    ],
    ids=["top", "tensor"],
)
def test_a_malicious_file_does_not_run(write, tmp_path, infect):
    marker = tmp_path / "executed"
    directory = write(tp=2)
    for rank in range(2):
        edit(
            directory / f"mp_rank_{rank:02d}",
            lambda state: infect(state, Malicious(marker), malicious_tensor(marker)),
        )
    with pytest.raises(ValueError, match=r"mp_rank_00/.*holds an object of class posix\.system"):
        MegatronCheckpoint.open(directory)
    assert not marker.exists()


def test_a_tensor_of_an_unknown_class_is_refused_by_name(write):
    directory = write()
    value = torch.zeros(2).as_subclass(Unknown)
    edit(directory / "mp_rank_00", lambda state: state["model"].update({QKV: value}))
    with pytest.raises(ValueError, match=r"class test_legacy\.Unknown, which is not one"):
        MegatronCheckpoint.open(directory)
