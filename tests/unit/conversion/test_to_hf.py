import json
import math
import shutil
from dataclasses import replace

import make_megatron_checkpoint as maker
import pytest
import torch
from safetensors import safe_open
from tiny_hf import tensors
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.config import FactorSet
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.conversion.verify import random_tokens
from megatron_longrope.errors import LongRopeError

SHORT = random_tokens(maker.VOCAB, maker.SHORT_TOKENS, 0)
LONG = random_tokens(maker.VOCAB, maker.LONG_TOKENS, 0)


def hf_logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def test_logits_agree_with_megatron_core_on_short_and_long_inputs(run, config, tmp_path):
    write_hf_folder(run.path, tmp_path / "hf", longrope_config=config)
    for name, tokens in (("short", SHORT), ("long", LONG)):
        ours = run.logits[name][..., : maker.VOCAB]
        theirs = hf_logits(tmp_path / "hf", tokens)
        assert theirs.shape == ours.shape
        assert (ours - theirs).abs().max() < 1e-5
        # the factors matter on these inputs, so the comparison above means something
        assert name == "long" or (ours - run.logits["plain"][..., : maker.VOCAB]).abs().max() > 1e-2


def test_without_a_configuration_the_folder_is_a_plain_llama(run, tmp_path):
    write_hf_folder(run.path, tmp_path / "hf", longrope_config=None)
    ours = run.logits["plain"][..., : maker.VOCAB]
    assert (ours - hf_logits(tmp_path / "hf", SHORT)).abs().max() < 1e-5
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["rope_theta"] == maker.BASE
    assert "rope_scaling" not in written
    assert not (tmp_path / "hf" / "longrope.json").exists()


def test_a_hybrid_checkpoint_gives_the_tensors_of_its_gpt_twin(
    untied_gqa, hybrid_runs, config, tmp_path
):
    for name, path in (("gpt", untied_gqa.path), ("hybrid", hybrid_runs["same"][0])):
        write_hf_folder(path, tmp_path / name, longrope_config=config)
    ours, theirs = tensors(tmp_path / "hybrid"), tensors(tmp_path / "gpt")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_hybrid_checkpoint_of_another_order_is_refused(hybrid_runs, config, tmp_path):
    with pytest.raises(
        ValueError, match=r"its layers are -\*\*--\* .* one MLP after each attention"
    ):
        write_hf_folder(hybrid_runs["other"][0], tmp_path / "hf", longrope_config=config)
    assert not (tmp_path / "hf").exists()


def test_loading_into_a_fresh_gpt_model_gives_the_same_logits(run):
    ours, theirs = (run.logits[name][..., : maker.VOCAB] for name in ("long", "loaded"))
    assert torch.equal(ours, theirs)


def test_the_model_card_states_factors_and_limits(untied_gqa, config, tmp_path):
    write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=config)
    card = (tmp_path / "hf" / "README.md").read_text()
    for part in (
        "long_factor, the set up to 256 tokens. ",
        "use_cache=False",
        "once per forward pass",
        "iteration 3",
    ):
        assert part in card
    assert "4.57 or newer unless a note below says otherwise" in card
    assert "vLLM 0.32 (measured) decides once" in card  # docs/serving.md


def test_many_shards_with_an_index_load_like_one_file(untied_gqa, tmp_path):
    one = write_hf_folder(untied_gqa.path, tmp_path / "one", longrope_config=None)
    many = write_hf_folder(
        untied_gqa.path, tmp_path / "many", longrope_config=None, max_shard_bytes=40_000
    )
    assert one.files == ("model.safetensors",)
    assert len(many.files) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == many.num_bytes == one.num_bytes
    assert len(index["weight_map"]) == many.num_tensors
    whole = safe_open(tmp_path / "one" / "model.safetensors", "pt")
    for name, file in index["weight_map"].items():
        part = safe_open(tmp_path / "many" / file, "pt")
        assert torch.equal(part.get_tensor(name), whole.get_tensor(name))
    assert torch.equal(hf_logits(tmp_path / "one", SHORT), hf_logits(tmp_path / "many", SHORT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_converted_to_the_wanted_dtype(untied_gqa, tmp_path, dtype):
    report = write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=None, dtype=dtype)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    disk = MegatronCheckpoint.open(untied_gqa.path).tensor("decoder.final_layernorm.weight")
    assert {value.dtype for value in values.values()} == {dtype}
    assert torch.equal(values["model.norm.weight"], disk.to(dtype))
    assert report.num_bytes == sum(value.numel() * 2 for value in values.values())
    assert AutoConfig.from_pretrained(str(tmp_path / "hf")).dtype == dtype


def test_an_existing_folder_is_kept_unless_overwriting_succeeds(untied_gqa, config, tmp_path):
    output = tmp_path / "out" / "hf"
    output.mkdir(parents=True)
    (output / "precious").write_text("x")
    with pytest.raises(ValueError, match=r"exists already.*--overwrite"):
        write_hf_folder(untied_gqa.path, output, longrope_config=config)

    def fail(folder):
        assert (folder / "model.safetensors").exists()
        raise LongRopeError("not the same logits")

    with pytest.raises(ValueError, match="not the same logits"):
        write_hf_folder(untied_gqa.path, output, longrope_config=config, overwrite=True, check=fail)
    assert (output / "precious").exists()
    assert [item.name for item in output.parent.iterdir()] == ["hf"]
    write_hf_folder(untied_gqa.path, output, longrope_config=config, overwrite=True)
    assert not (output / "precious").exists()
    assert [item.name for item in output.parent.iterdir()] == ["hf"]


def test_a_failed_conversion_leaves_nothing_behind(untied_gqa, config, tmp_path):
    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=config, progress=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sets", "attention_factor", "other"),
    [
        ({64: 1.1}, 1.15, None),
        ({512: 1.3}, 1.25, None),  # a second search, with the attention factor of its window
        ({}, 1.2, "attention factor"),
        ({256: 1.3}, 1.2, "factors and attention factor"),
        ({128: 1.3, 256: None}, 1.15, "factors"),
    ],
)
def test_factors_that_the_checkpoint_was_not_tuned_with_are_remarked_on(
    untied_gqa, config, tmp_path, sets, attention_factor, other
):
    kept = [item for item in config.factor_sets if item.max_length not in sets]
    added = [FactorSet(length, (value,) * 8) for length, value in sets.items() if value]
    ordered = sorted([*kept, *added], key=lambda item: item.max_length)
    exported = replace(config, factor_sets=tuple(ordered), attention_factor=attention_factor)
    report = write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=exported)
    about = [text for text in report.remarks if "tuned with" in text]
    expected = f"the {other} for 256 tokens are not those that the checkpoint was tuned with"
    assert bool(about) == (other is not None) and all(expected in text for text in about)


def test_a_shorter_target_exports_the_set_that_covers_it(untied_gqa, config, tmp_path):
    write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=config, target_length=128)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["max_position_embeddings"] == 128
    assert math.isclose(written["rope_parameters"]["factor"], 2.0)


@pytest.mark.parametrize(("stated", "expected"), [(64, 256), (None, None), (4096, 4096)])
def test_a_generation_config_that_stops_below_the_window_is_raised(
    untied_gqa, config, tmp_path, stated, expected
):
    """As transformers' generate refuses a longer prompt under such a max_length."""
    save = shutil.copytree(untied_gqa.path, tmp_path / "save")
    beside = save / "hf"  # as an import leaves it
    beside.mkdir()
    (beside / "config.json").write_text("{}")
    (beside / "generation_config.json").write_text(json.dumps({"top_k": 5, "max_length": stated}))
    write_hf_folder(save, tmp_path / "hf", longrope_config=config)
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written == {"top_k": 5, "max_length": expected}


def test_a_folder_named_hf_beside_a_checkpoint_is_no_companion_unless_an_import_wrote_it(
    untied_gqa, config, tmp_path
):
    save = shutil.copytree(untied_gqa.path, tmp_path / "save")
    write_hf_folder(save, save / "hf", longrope_config=config)
    generation = save / "hf" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": 77}))
    write_hf_folder(save, tmp_path / "second", longrope_config=config)
    written = json.loads((tmp_path / "second" / "generation_config.json").read_text())
    assert written["eos_token_id"] is None
