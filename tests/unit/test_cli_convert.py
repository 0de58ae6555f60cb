"""`longrope convert`: what the commands print and write, and how they fail."""

import json
import shutil
from dataclasses import replace

import make_megatron_checkpoint as maker
import pytest
import tiny_hf
import torch
from safetensors.torch import load_file, save_file

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.cli import main
from megatron_longrope.cli.byte_progress import ByteProgress
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.conversion.to_hf import write_hf_folder


@pytest.fixture(scope="module")
def hf(megatron_runs, tmp_path_factory):
    """The checkpoint as a folder in several files."""
    path = tmp_path_factory.mktemp("hf") / "hf"
    write_hf_folder(
        megatron_runs["untied_gqa"].path,
        path,
        longrope_config=maker.longrope_config(),
        max_shard_bytes=60_000,
    )
    return path


@pytest.fixture
def checkpoint(untied_gqa, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(untied_gqa.path, tmp_path / "in" / "checkpoint")


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def to_hf(checkpoint, output, *more):
    return convert("to-hf", "--load", checkpoint, "--output", output, *more)


def refused(capsys, *arguments):
    """The sentence a command fails with."""
    capsys.readouterr()
    assert convert(*arguments) == 2
    error = capsys.readouterr().err.rpartition("\r")[2]  # behind transformers' progress bar
    *others, sentence = error.splitlines()
    assert sentence.startswith("longrope convert: error: ")
    assert not [line for line in others if "error" in line or "Traceback" in line]
    return sentence


# Broken input


def test_a_checkpoint_of_another_model_than_its_arguments_say_is_refused(
    checkpoint, tmp_path, capsys
):
    output = tmp_path / "out" / "hf"
    output.mkdir(parents=True)
    (output / "precious").touch()
    arguments = maker.arguments(2, True)
    common = next(checkpoint.glob("iter_*")) / "common.pt"  # read first where there is one
    for name, value in (("num_query_groups", 1), ("ffn_hidden_size", 80), ("num_layers", 5)):
        changed = {**vars(arguments), name: value}
        torch.save({"args": type(arguments)(**changed), "iteration": 3}, common)
        refused(capsys, "to-hf", "--load", checkpoint, "--output", output, "--overwrite")
        assert list(output.parent.rglob("*")) == [output, output / "precious"]


# Failures on the way


def test_an_interruption_says_what_is_left_and_the_same_command_goes_on(
    untied_gqa, tmp_path, monkeypatch, capsys
):
    from megatron_longrope.conversion import to_hf as module

    write = module.write_safetensors

    def interrupt(directory, plan, load, max_shard_bytes, progress):
        def once(done, total):
            progress(done, total)
            if done > total / 2:
                raise KeyboardInterrupt

        return write(directory, plan, load, 40_000, once)

    output = tmp_path / "out" / "hf"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_safetensors", interrupt)
        assert to_hf(untied_gqa.path, output, "--no-verify") == 130
    error = capsys.readouterr().err
    assert "complete files are kept in" in error and "interrupted" in error
    assert not output.exists()
    monkeypatch.setattr(
        module,
        "write_safetensors",
        lambda directory, plan, load, size, progress: write(
            directory, plan, load, 40_000, progress
        ),
    )
    assert to_hf(untied_gqa.path, output, "--no-verify") == 0
    assert "continuing an interrupted run: " in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["hf"]


# What is printed


def test_progress_is_lines_with_a_rate_where_there_is_no_terminal(capsys):
    progress = ByteProgress("writing")
    progress(0, 3_500_000)
    progress(1_000_000, 3_500_000)
    progress(3_500_000, 3_500_000)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("writing: 4/4 MB, ")
    assert line.endswith(" MB/s")


def test_memory_and_operations_of_a_verification_are_stated_and_can_be_spared(
    untied_gqa, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("megatron_longrope.conversion.verify._COMPARED_TOKENS", 16)
    assert to_hf(untied_gqa.path, tmp_path / "a", "--target-length", "256") == 0
    printed = capsys.readouterr().out
    assert (
        "verifying: holds the model in memory twice, in fp32, 0.0 GiB of weights, and about 0.0 "
        "GiB for an input of 128 tokens"
    ) in printed
    # Both models on 64 and 128 tokens, with 3 layers of 64 columns, 4 heads and 2 groups of 16.
    weights = 3 * 64 * (2 * 64 + 2 * 32 + 3 * 96) + 64 * 250
    total = 2 * (2 * weights * (64 + 128) + 2 * 3 * 64 * (64**2 + 128**2))
    assert f"takes {total:.1e} operations on the CPU, {total / 1e12:.3g} s at 10^12" in printed
    assert "no tokenizer included" in printed
    assert "stored in the checkpoint, up to 256 tokens" in printed
    assert "verified long      128 tokens" in printed
    assert to_hf(untied_gqa.path, tmp_path / "b", "--no-verify") == 0
    printed = capsys.readouterr().out
    assert "not verified (--no-verify)" in printed and "verifying" not in printed
    assert convert("verify", "--load", untied_gqa.path, "--hf", tmp_path / "a") == 0
    assert f"takes {total:.1e} operations" in capsys.readouterr().out


def test_a_verification_that_is_interrupted_keeps_the_files_as_it_announced(
    untied_gqa, tmp_path, monkeypatch, capsys
):
    def interrupt(checkpoint, config):
        assert "same command with --no-verify goes on" in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_longrope.conversion.verify.fp32_engine", interrupt)
    assert to_hf(untied_gqa.path, tmp_path / "hf") == 130
    assert to_hf(untied_gqa.path, tmp_path / "hf", "--no-verify") == 0
    assert "continuing an interrupted run: " in capsys.readouterr().out


def test_verify_compares_a_pair_of_either_origin_or_a_folder_alone(
    untied_gqa, hf, tmp_path, capsys
):
    imported = tmp_path / "imported"
    assert convert("from-hf", "--hf", hf, "--output", imported, "--no-verify") == 0
    capsys.readouterr()
    for load in (("--load", untied_gqa.path), ("--load", imported), ()):
        assert convert("verify", *load, "--hf", hf, "--json") == 0
        windows = json.loads(capsys.readouterr().out)["windows"]
        assert [item["window"] for item in windows] == ["short", "long"]
        assert all(item["max_abs_diff"] < 1e-4 for item in windows)
    assert convert("verify", "--hf", hf) == 0
    assert "stored in the folder, up to 256 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["exported", "imported", "imported from two dtypes", "kept"])
def test_a_narrower_dtype_widens_no_tolerance(untied_gqa, hf, tmp_path, capsys, way):
    folder, load, narrow = shutil.copytree(hf, tmp_path / "hf"), tmp_path / "load", "bfloat16"
    if way == "exported":
        load = untied_gqa.path
        assert to_hf(load, tmp_path / "narrow", "--dtype", narrow) == 0
        folder = tmp_path / "narrow"
    else:
        for path in folder.glob("*.safetensors") if way != "imported" else ():
            tensors = load_file(path)
            halves = {name: value for name, value in tensors.items() if "norm" not in name}
            tensors |= {name: value.to(torch.bfloat16) for name, value in halves.items()}
            save_file(tensors, path, metadata={"format": "pt"})
        dtype = "keep" if way == "kept" else narrow
        assert convert("from-hf", "--hf", folder, "--output", load, "--dtype", dtype) == 0
    dtypes = {info.dtype for info in MegatronCheckpoint.open(load).keys().values()}
    assert len(dtypes) == (2 if way == "kept" else 1)
    pair = ("verify", "--load", load, "--hf", folder)
    capsys.readouterr()
    assert convert(*pair, "--json") == 0
    windows = json.loads(capsys.readouterr().out)["windows"]
    assert all(item["max_abs_diff"] < 1e-5 for item in windows)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 5000.0
    config["rope_scaling"].pop("rope_theta", None)
    path.write_text(json.dumps(config))
    assert "transformers' logits differ from Megatron's by up to" in refused(capsys, *pair)


@pytest.mark.parametrize(
    "option", [("--target-length", "64"), ("--short-length", "8"), ("--drop-start-tokens",)]
)
def test_what_is_about_factors_is_refused_where_there_are_none(tmp_path, capsys, option):
    tiny_hf.make_hf_folder(tmp_path / "llama", "llama")
    sentence = refused(capsys, "verify", "--hf", tmp_path / "llama", *option)
    assert f"{option[0]} is about factors, and none are stored in the folder" in sentence


@pytest.mark.parametrize("way", ["drop", "keep"])
def test_verify_takes_the_sliding_window_that_its_refusal_advises(tmp_path, capsys, way):
    folder = tmp_path / "mistral"
    tiny_hf.make_hf_folder(folder, "mistral", sliding_window=16)
    assert "--sliding-window drop" in refused(capsys, "verify", "--hf", folder)
    assert convert("verify", "--hf", folder, "--sliding-window", way, "--json") == 0
    windows = json.loads(capsys.readouterr().out)["windows"]
    assert any(item["num_tokens"] > 16 for item in windows)
    assert all(item["max_abs_diff"] < 1e-4 for item in windows)


def test_inspect_says_where_a_checkpoint_comes_from(untied_gqa, hf, tmp_path, capsys):
    assert convert("inspect", untied_gqa.path, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["format"] == "torch_dist"
    assert (value["iteration"], value["samples"]) == (3, None)
    assert value["model"]["num_query_groups"] == 2
    assert value["longrope"]["rotary_base"] == maker.BASE
    assert value["tensors"]["output_layer.weight"] == {"shape": [256, 64], "dtype": "float32"}
    tensors = MegatronCheckpoint.open(untied_gqa.path).keys().values()
    assert value["num_parameters"] == sum(torch.Size(info.shape).numel() for info in tensors)
    assert value["num_bytes"] == 4 * value["num_parameters"]
    assert "0.18 or earlier" in value["release"] or "0.19 or later" in value["release"]
    assert convert("inspect", untied_gqa.path) == 0
    assert "factor sets up to 64, 256 tokens" in capsys.readouterr().out
    assert convert("from-hf", "--hf", hf, "--output", tmp_path / "x", "--no-verify") == 0
    capsys.readouterr()
    assert convert("inspect", tmp_path / "x") == 0
    printed = capsys.readouterr().out
    assert "release                    longrope convert from-hf (llama)" in printed
    assert "parallel sizes             tensor 1, pipeline 1" in printed


def test_inspect_counts_the_samples_seen(checkpoint, capsys):
    common = next(checkpoint.glob("iter_*")) / "common.pt"
    arguments = maker.arguments(2, True)
    arguments.global_batch_size, arguments.expert_model_parallel_size = 8, 2
    torch.save({"args": arguments, "iteration": 3}, common)
    assert convert("inspect", checkpoint) == 0
    printed = capsys.readouterr().out
    assert "24, of 64 tokens in the run that saved it" in printed
    assert "expert 2" in printed
    arguments.consumed_train_samples = 20  # a batch size that grew on the way
    torch.save({"args": arguments, "iteration": 3}, common)
    assert convert("inspect", checkpoint, "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"]["num_samples"] == 20


# Start tokens


@pytest.fixture
def with_start_tokens(config, tmp_path):
    """The tokens of a short set of ones do nothing."""
    sets = [replace(item, num_start_tokens=4) for item in config.factor_sets]
    sets[0] = replace(sets[0], rescale_factors=(1.0,) * 8)
    changed = replace(config, factor_sets=tuple(sets))
    changed.save(tmp_path / "start.json")
    return changed, tmp_path / "start.json"


def test_start_tokens_can_be_dropped_and_that_is_recorded(
    untied_gqa, with_start_tokens, tmp_path, capsys
):
    output = tmp_path / "hf"
    options = ("--longrope-config", with_start_tokens[1], "--drop-start-tokens")
    assert to_hf(untied_gqa.path, output, *options) == 0
    sentence = "long_factor (set up to 256 tokens): 4 start tokens dropped\n"
    assert sentence in capsys.readouterr().out
    assert sentence in (output / "README.md").read_text()
    exported = LongRopeConfig.load(output / "longrope.json")
    assert [item.num_start_tokens for item in exported.factor_sets] == [4, 0]
    assert exported.factor_sets[1].origin["dropped_start_tokens"] == 4
    assert exported.factor_sets[0] == with_start_tokens[0].factor_sets[0]
    assert convert("verify", "--load", untied_gqa.path, "--hf", output, *options) == 0


def test_the_short_set_of_a_longer_window_becomes_short_factor(untied_gqa, config, tmp_path):
    middle = FactorSet(128, (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7))
    config.with_factor_set(middle).save(tmp_path / "three.json")
    options = ("--longrope-config", tmp_path / "three.json", "--short-length", "128")
    assert to_hf(untied_gqa.path, tmp_path / "hf", *options) == 0
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["rope_parameters"]["short_factor"] == list(middle.rescale_factors)


def test_verify_takes_the_lengths_that_the_folder_was_exported_with(
    untied_gqa, config, tmp_path, capsys
):
    for length in (32, 512):
        config = config.with_factor_set(FactorSet(length, (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 2.0)))
    config.save(tmp_path / "four.json")
    pair = ("--load", untied_gqa.path, "--longrope-config", tmp_path / "four.json")
    lengths = ("--short-length", "32", "--target-length", "256")
    output = tmp_path / "hf"
    assert convert("to-hf", *pair, "--output", output, *lengths, "--no-verify") == 0
    capsys.readouterr()
    assert convert("verify", *pair, "--hf", output) == 0
    printed = capsys.readouterr().out
    assert "short length: 32 tokens, as the folder has it\ntarget length: 256 tokens" in printed
