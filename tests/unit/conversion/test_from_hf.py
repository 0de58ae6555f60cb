import json
import shlex
import shutil
import subprocess
import sys

import pytest
import tiny_hf
import torch
import transformers
from legacy_ranks import write_legacy
from safetensors.torch import load_file, save_file
from tiny_hf import tensors
from tokenizers import Tokenizer, models
from torch.distributed.checkpoint import FileSystemReader

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.checkpoint.hf.checkpoint import HfCheckpoint
from megatron_longrope.cli import main
from megatron_longrope.config import LongRopeConfig, identity_config
from megatron_longrope.conversion.companions import copy_companions
from megatron_longrope.conversion.from_hf import write_checkpoint
from megatron_longrope.conversion.megatron_args import divisor_without_padding, padded_vocab_size
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.conversion.verify import verify_import
from megatron_longrope.engine import load_engine

LAYERS, WINDOW = 3, tiny_hf.WINDOW
HIDDEN, VOCAB = (tiny_hf.GEOMETRY[name] for name in ("hidden_size", "vocab_size"))
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.0, 4.0],
}
FAMILIES = {  # changes of tiny_hf's models
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {
        "max_position_embeddings": 2 * WINDOW,
        "original_max_position_embeddings": WINDOW // 2,
        "rope_parameters": LONGROPE,
        "sliding_window": 2 * WINDOW,  # not below the window, so of no effect
    },
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Random models of every family as `save_pretrained` writes them, made when asked for."""
    root = tmp_path_factory.mktemp("hf")

    def folder(family, dtype=torch.float32):
        path = root / f"{family}-{dtype}"
        if not path.exists():
            changes = {"num_hidden_layers": LAYERS, **FAMILIES[family]}
            tiny_hf.make_hf_folder(path, family, dtype, **changes)
        return path

    return folder


@pytest.fixture
def llama(folders, tmp_path):
    """A llama folder to damage."""
    return shutil.copytree(folders("llama"), tmp_path / "llama")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_refused(folder, sentence):
    """One sentence, and nothing left of the attempt."""
    with pytest.raises(ValueError, match=sentence) as caught:
        write_checkpoint(folder, folder.parent / "out")
    assert "\n" not in str(caught.value)
    assert [item for item in folder.parent.iterdir() if "out" in item.name] == []


# There and back; every family in single precision: test_readers.py


def test_half_precision_stays_as_it_was_there_and_back(folders, tmp_path):
    folder = folders("qwen3", torch.bfloat16)
    report = write_checkpoint(folder, tmp_path / "megatron")
    back = write_hf_folder(tmp_path / "megatron", tmp_path / "back", longrope_config=None)
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert report.num_tensors == back.num_tensors == len(before)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


def test_a_folder_in_several_files_gives_the_same_checkpoint(folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("qwen3"))
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    checkpoints = []
    for name, folder in (("one", folders("qwen3")), ("many", tmp_path / "hf")):
        write_checkpoint(folder, tmp_path / name)
        checkpoints.append(MegatronCheckpoint.open(tmp_path / name))
    one, many = checkpoints
    assert one.keys() == many.keys()
    names = list(one.keys())
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in names)


# What is written


def test_factors_of_phi3_are_beside_the_checkpoint_and_in_its_arguments(folders, tmp_path):
    report = write_checkpoint(folders("phi3"), tmp_path / "megatron")
    config = LongRopeConfig.load(tmp_path / "megatron" / "longrope.json")
    assert MegatronCheckpoint.open(tmp_path / "megatron").longrope == config
    assert report.longrope_config == config
    assert [item.max_length for item in config.factor_sets] == [WINDOW // 2, 2 * WINDOW]
    assert list(config.factor_sets[0].rescale_factors) == LONGROPE["short_factor"]
    assert list(config.factor_sets[1].rescale_factors) == LONGROPE["long_factor"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("phi3"))
    theirs = model.model.rotary_emb.attention_scaling
    assert config.attention_factor == pytest.approx(theirs, rel=1e-12)
    assert theirs > 1.1


def test_stored_arguments_describe_the_model(folders, tmp_path):
    report = write_checkpoint(folders("qwen3"), tmp_path / "megatron", tensor_model_parallel_size=2)
    checkpoint = MegatronCheckpoint.open(tmp_path / "megatron")
    assert checkpoint.shape == report.shape
    assert (checkpoint.shape.vocab_size, checkpoint.shape.padded_vocab_size) == (VOCAB, 256)
    assert checkpoint.iteration == 0
    assert checkpoint.longrope is None
    assert not hasattr(checkpoint.args, "tokenizer_model")  # the folder has none
    padding = checkpoint.tensor("embedding.word_embeddings.weight")[VOCAB:]
    assert padding.shape == (6, HIDDEN)
    assert not padding.any()


def test_a_tokenizer_beside_the_model_is_pointed_to(llama, tmp_path):
    (llama / "tokenizer.json").write_text("{}")
    report = write_checkpoint(llama, tmp_path / "megatron")
    args = MegatronCheckpoint.open(tmp_path / "megatron").args
    assert (args.tokenizer_type, args.tokenizer_model) == ("HuggingFaceTokenizer", str(llama))
    assert f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {llama}" in report.flags


def test_old_and_new_releases_find_the_common_state_and_every_extra_state(folders, tmp_path):
    write_checkpoint(folders("qwen3"), tmp_path / "megatron")
    release = tmp_path / "megatron" / "release"
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"
    in_file = MegatronCheckpoint.open(release.parent).common
    (release / "common.pt").unlink()
    in_shards = MegatronCheckpoint.open(release.parent).common
    assert in_file == in_shards
    assert in_file["checkpoint_version"] == 3.0
    names = FileSystemReader(release).read_metadata().state_dict_metadata
    for module in ("self_attention.linear_qkv", "self_attention.core_attention", "mlp.linear_fc2"):
        assert f"decoder.layers.{module}._extra_state/shard_{LAYERS - 1}_{LAYERS}" in names


def test_flags_of_a_model(folders, tmp_path):
    report = write_checkpoint(folders("qwen3", torch.bfloat16), tmp_path / "megatron")
    assert shlex.split(" ".join(report.flags)) == shlex.split(
        "--num-layers 3 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 "
        "--kv-channels 16 --num-query-groups 2 --seq-length 64 --max-position-embeddings 64 "
        "--position-embedding-type rope --rotary-base 10000 --normalization RMSNorm "
        "--norm-epsilon 1e-06 --attention-dropout 0.0 --hidden-dropout 0.0 "
        "--make-vocab-size-divisible-by 128 --padded-vocab-size 256 --swiglu --disable-bias-linear "
        "--group-query-attention --untie-embeddings-and-output-weights --qk-layernorm --bf16"
    )
    assert report.flags_beside_checkpoint_args == (
        "--norm-epsilon 1e-06",
        "--make-vocab-size-divisible-by 128",
        "--qk-layernorm",
        "--bf16",
    )


def test_padding_follows_megatrons_rule():
    assert padded_vocab_size(32000, 128, 1) == 32000
    assert padded_vocab_size(32001, 128, 8) == 32768
    assert divisor_without_padding(128256, 1) == 128
    assert divisor_without_padding(128256, 8) == 32
    assert divisor_without_padding(32001, 2) is None
    with pytest.raises(ValueError, match="--tensor-model-parallel-size 0 must be at least 1"):
        padded_vocab_size(250, 128, 0)


def test_neither_megatron_nor_a_process_group_is_needed_to_convert_and_to_read(folders, tmp_path):
    """In a process of its own: other tests have imported it."""
    write_checkpoint(folders("llama"), tmp_path / "first")
    first = MegatronCheckpoint.open(tmp_path / "first")
    stored = {name: first.tensor(name) for name in first.keys()}  # noqa: SIM118
    write_legacy(tmp_path / "legacy", stored, first.args, tp=2)
    code = (
        "import sys, torch\n"
        "sys.modules['megatron'] = None\n"
        "from megatron_longrope.checkpoint import MegatronCheckpoint\n"
        "from megatron_longrope.conversion.from_hf import write_checkpoint\n"
        "hf, legacy, output = sys.argv[1:]\n"
        "write_checkpoint(hf, output)\n"
        "for checkpoint in map(MegatronCheckpoint.open, (legacy, output)):\n"
        "    assert [checkpoint.args, *map(checkpoint.tensor, checkpoint.keys())]\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert 'transformers' not in sys.modules\n"
    )
    arguments = [str(folders("llama")), str(tmp_path / "legacy"), str(tmp_path / "megatron")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


# Files beside the weights


def test_small_files_are_copied_again_where_an_interruption_left_some(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    names = ("additional_chat_templates",)
    assert copy_companions(source, target, names) == copy_companions(source, target, names)
    assert (target / "additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"


def test_stop_tokens_sampling_settings_and_templates_come_back(llama, tmp_path):
    files = {
        "generation_config.json": json.dumps(
            {"eos_token_id": [0, 2], "do_sample": True, "temperature": 0.6}
        ),
        "tokenizer_config.json": '{"model_max_length": 100000, "bos_token": "<s>"}',
        "added_tokens.json": '{"<tool>": 249}',
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    }
    for name, text in files.items():
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text(text)
    edit_config(llama, bos_token_id=1, eos_token_id=[0, 2])
    write_checkpoint(llama, tmp_path / "megatron")
    for stray in (".DS_Store", "LICENSE"):
        (tmp_path / "megatron" / "hf" / stray).touch()
    for tokenizer in (None, llama):
        if tokenizer is not None:  # transformers must load what the user gives
            for name in ("tokenizer_config.json", "added_tokens.json"):
                (llama / name).unlink()
            core = Tokenizer(models.WordLevel({"a": 0, "</s>": 2}, unk_token="a"))
            core.save(str(llama / "tokenizer.json"))
            files = {name: files[name] for name in files if (llama / name).exists()}
        output = tmp_path / f"back-{tokenizer is None}"
        report = write_hf_folder(
            tmp_path / "megatron", output, longrope_config=None, tokenizer=tokenizer
        )
        assert report.tokenizer == (tokenizer or tmp_path / "megatron" / "hf")
        assert {name: (output / name).read_text() for name in files} == files
        config = json.loads((output / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, [0, 2])
        assert config["pad_token_id"] is None
    assert "No tokenizer" not in (tmp_path / "back-True" / "README.md").read_text()


def test_a_generation_config_gives_the_ids_that_config_json_lacks(llama, tmp_path):
    (llama / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    edit_config(llama, eos_token_id=None)
    write_checkpoint(llama, tmp_path / "megatron")
    write_hf_folder(tmp_path / "megatron", tmp_path / "back", longrope_config=None)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [0, 2]


def test_padding_is_left_out_where_the_import_says_how_much_it_is(llama, tmp_path):
    write_checkpoint(llama, tmp_path / "megatron")
    common = tmp_path / "megatron" / "release" / "common.pt"
    stored = torch.load(common, weights_only=False)
    stored["args"].vocab_size = None  # as a run without --vocab-size stores it
    torch.save(stored, common)

    def export(name):
        report = write_hf_folder(tmp_path / "megatron", tmp_path / name, longrope_config=None)
        return report.vocab_size, [text for text in report.remarks if "padding" in text]

    rows, (remark,) = export("known")
    assert rows == VOCAB and remark.startswith(f"{256 - VOCAB} rows of the embedding are left out")
    beside = tmp_path / "megatron" / "hf" / "config.json"
    beside.write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object, got list"):
        export("damaged")
    beside.unlink()
    rows, remarks = export("unknown")
    assert rows == 256 and "256 rows are padding, so all are exported" in remarks[0]


# Redundant tensors


def test_tensors_that_others_determine_are_left_out_and_reported(folders, tmp_path):
    folder = shutil.copytree(folders("qwen2"), tmp_path / "hf")
    stored = tensors(folder)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(stored, folder / "model.safetensors")
    report = write_checkpoint(folder, tmp_path / "megatron")
    assert report.left_out == (
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    assert report.num_tensors == len(stored) - 2
    stored["lm_head.weight"][0, 0] += 1
    save_file(stored, folder / "model.safetensors")
    assert_refused(folder, "lm_head.weight differs from model.embed_tokens.weight")


def test_a_tied_model_that_stores_only_the_output_layer_loads(folders, tmp_path):
    """transformers gives such a folder the same logits."""
    folder = shutil.copytree(folders("qwen2"), tmp_path / "hf")
    stored = tensors(folder)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    report = write_checkpoint(
        folder, tmp_path / "megatron", check=lambda path: verify_import(path, folder)
    )
    assert report.left_out == ()
    read = MegatronCheckpoint.open(tmp_path / "megatron").tensor("embedding.word_embeddings.weight")
    assert torch.equal(read[:VOCAB], stored["lm_head.weight"])


def test_a_tensor_that_the_index_lacks_is_read_as_transformers_reads_it(folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("qwen2"))
    folder = tmp_path / "hf"
    model.save_pretrained(folder, max_shard_size="20KB")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    stored, embedding = load_file(first), tensors(folder)["model.embed_tokens.weight"]
    save_file({**stored, "lm_head.weight": embedding.clone()}, first, metadata={"format": "pt"})
    report = write_checkpoint(
        folder, tmp_path / "megatron", check=lambda path: verify_import(path, folder)
    )
    assert report.left_out == ("lm_head.weight",)
    shutil.rmtree(tmp_path / "megatron")
    twice = {**load_file(second), **stored}
    save_file(twice, second, metadata={"format": "pt"})
    assert_refused(folder, f"{second.name}: holds tensor .*, and so does {first.name}")


# Other models


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt_neox"}, "'gpt_neox' is not supported; supported are: llama"),
        ({"architectures": ["LlamaForTokenClassification"]}, "supports LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.*activations other than SiLU"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5; .* heads of phi3 only"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
            "partial_rotary_factor = 0.75",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_type llama3 but no original_max_position_embeddings",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type 'dynamic', whose frequencies are no constants",
        ),
        ({"rope_parameters": {"rope_theta": 10000.5}}, "rope_theta = 10000.5.*integers only"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope but no original_max_position"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"rms_norm_eps": None}, "lacks rms_norm_eps"),
    ],
)
def test_a_model_that_is_not_supported_is_refused_by_name(llama, changes, sentence):
    edit_config(llama, **changes)
    assert_refused(llama, sentence)


def test_a_sliding_window_counts_when_it_is_in_use(folders, tmp_path):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "hf")
    edit_config(folder, sliding_window=16)
    write_checkpoint(folder, tmp_path / "unused")
    edit_config(folder, use_sliding_window=True, max_window_layers=2, layer_types=None)
    with pytest.raises(ValueError, match="sliding_window = 16"):
        write_checkpoint(folder, tmp_path / "used")
    mistral = shutil.copytree(folders("mistral"), tmp_path / "mistral")
    config = json.loads((mistral / "config.json").read_text())
    del config["sliding_window"]
    config["max_position_embeddings"] = 8192
    (mistral / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sliding_window = 4096"):  # transformers' default
        write_checkpoint(mistral, tmp_path / "absent")


# Broken folders


def rewrite(folder, change):
    stored = tensors(folder)
    change(stored)
    save_file(stored, folder / "model.safetensors")


def test_tensors_that_do_not_fit_are_refused_by_name(llama):
    original = tensors(llama)
    name = "model.layers.1.self_attn.k_proj.weight"
    for change, sentence in (
        (lambda stored: stored.pop(name), f"lacks tensor {name}, which a llama model"),
        (
            lambda stored: stored.update({"model.layers.1.self_attn.k_proj.bias": torch.ones(16)}),
            "holds tensor model.layers.1.self_attn.k_proj.bias, which a llama model",
        ),
        (
            lambda stored: stored.update({name: torch.ones(8, HIDDEN)}),
            rf"tensor {name} has shape \(8, 32\), config.json says \(16, 32\)",
        ),
        (
            lambda stored: stored.update({name: original[name].bfloat16()}),
            f"tensor {name} is torch.bfloat16.*choose one with --dtype",
        ),
        (
            lambda stored: stored.update({name: original[name].to(torch.int8)}),
            f"tensor {name} is of dtype I8",
        ),
    ):
        changed = dict(original)
        change(changed)
        save_file(changed, llama / "model.safetensors")
        assert_refused(llama, sentence)


def test_damaged_files_are_refused_by_name(folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("llama"))
    folder = tmp_path / "hf"
    model.save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert_refused(folder, f"{shard.name}: truncated or damaged")
    shard.unlink()
    assert_refused(folder, f"{shard.name}: missing")
    save_file({"other": torch.ones(1)}, shard)
    assert_refused(folder, f"{shard.name}: lacks tensor")
    shard.write_bytes(content)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    assert_refused(folder, "outside of the folder")


def test_two_sets_of_weights_are_refused_by_both_names(folders, tmp_path):
    """transformers loads the single file; the logits of the two differed by 6.9."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("llama"))
    folder = tmp_path / "hf"
    model.save_pretrained(folder, max_shard_size="20KB")
    shutil.copy(folders("llama") / "model.safetensors", folder)
    assert_refused(
        folder, "two sets of weights, model.safetensors, .*, and model.safetensors.index.json"
    )


@pytest.mark.parametrize(
    ("value", "dtype", "sentence"),
    [
        (float("nan"), None, "norm.weight holds NaN; the source is damaged or its training div"),
        (float("-inf"), torch.bfloat16, "norm.weight holds infinity"),
        (-1e6, torch.float16, r"norm.weight holds values up to 1e\+06, over 6.55e\+04, the .*of "),
        (3.4e38, torch.bfloat16, "convert with --dtype float32"),
    ],
)
def test_weights_that_are_or_would_become_infinite_are_refused_in_both_directions(
    llama, tmp_path, value, dtype, sentence
):
    for name in ("model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"):
        changed = tensors(llama)
        changed[name][3] = value
        damaged = shutil.copytree(llama, llama.parent / name)
        save_file(changed, damaged / "model.safetensors")
        with pytest.raises(ValueError, match=sentence.replace("norm.weight", name)):
            write_checkpoint(damaged, tmp_path / "out", dtype=dtype)
    if abs(value) < float("inf"):
        write_checkpoint(damaged, tmp_path / "megatron")
        disk = "embedding.word_embeddings.weight"
        with pytest.raises(ValueError, match=sentence.replace("norm.weight", f"{disk}.*")):
            write_hf_folder(
                tmp_path / "megatron", tmp_path / "out", longrope_config=None, dtype=dtype
            )
    assert not (tmp_path / "out").exists()


def test_pickles_and_empty_folders_are_refused_with_the_remedy(llama, tmp_path):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert_refused(llama, r"pytorch_model.bin, a pickle.*save_pretrained\(other\)")
    (llama / "pytorch_model.bin").unlink()
    assert_refused(llama, "nothing to convert")
    for name in ("model-00002-of-00002", "model-00001-of-00002"):
        (llama / f"{name}.safetensors").touch()
    assert_refused(
        llama,
        "holds model-00001-of-00002.safetensors and 1 more, but neither .*download "
        "model.safetensors.index.json and all that it names",
    )
    with pytest.raises(ValueError, match="no such folder; give a local Hugging Face folder"):
        write_checkpoint(tmp_path / "absent", tmp_path / "out")


# All or nothing


def test_what_exists_is_not_touched(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ValueError, match="exists already; give another --output"):
        write_checkpoint(folders("llama"), tmp_path / "out")
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["precious"]


def test_logits_that_differ_leave_no_checkpoint(folders, tmp_path):
    other = shutil.copytree(folders("llama"), tmp_path / "other")
    rewrite(other, lambda stored: stored["model.norm.weight"].mul_(1.1))
    original = folders("llama")
    with pytest.raises(
        ValueError,
        match=r"verification failed on 64 tokens .*, from position 0 on .*; nothing was written$",
    ):
        write_checkpoint(other, tmp_path / "out", check=lambda path: verify_import(path, original))
    assert [item.name for item in tmp_path.iterdir()] == ["other"]


def test_a_folder_that_transformers_cannot_load_is_one_sentence_with_the_remedy(folders, tmp_path):
    folder = shutil.copytree(folders("phi3"), tmp_path / "phi3")
    lists = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
    edit_config(folder, rope_parameters=None, rope_scaling={"type": "su", **lists})
    with pytest.raises(ValueError) as caught:
        write_checkpoint(folder, tmp_path / "out", check=lambda path: verify_import(path, folder))
    assert str(caught.value) == (
        f"{folder}: transformers {transformers.__version__} cannot load this folder (KeyError: "
        "\"Missing required keys in `rope_parameters` for 'rope_type'='longrope': "
        "{'original_max_position_embeddings'}\"); write 'longrope' in place of 'su' in rope_scaling"
        f"; complete files are kept in {tmp_path / '.out.converting'}; the same command "
        "with --no-verify continues after them, and removing that folder gives up the conversion"
    )
    write_checkpoint(folder, tmp_path / "unverified")  # the engine knows the old name
    edit_config(folder, rope_scaling={"type": "longrope", **lists})
    verify_import(tmp_path / "unverified", folder)


# Rotation


def test_partly_rotated_heads_become_megatrons_rotary_percent(tmp_path):
    """Phi-4-mini's; test_readers.py compares its logits."""
    tiny_hf.make_hf_folder(tmp_path / "hf", "phi3", partial_rotary_factor=0.75, hidden_size=64)
    report = write_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    assert report.shape.rotary_dim == 12
    assert "--rotary-percent 0.75" in report.flags


def test_a_scaled_base_is_verified_past_its_original_window_and_kept_by_an_export(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 600,
    }
    changes = {"rope_scaling": dict(scaling), "max_position_embeddings": 1024}
    tiny_hf.make_hf_folder(tmp_path / "hf", "llama", **changes)
    report = write_checkpoint(
        tmp_path / "hf",
        tmp_path / "megatron",
        check=lambda path: verify_import(path, tmp_path / "hf"),
    )
    windows = report.verification.windows
    assert [(item.window, item.num_tokens) for item in windows] == [
        ("short", 512),
        ("original window", 664),
    ]
    assert all(item.max_abs_diff < 1e-4 for item in windows)
    # None, "no factors", is the scaling that the model has, not plain RoPE.
    write_hf_folder(tmp_path / "megatron", tmp_path / "back", longrope_config=None)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["rope_scaling"] == scaling
    plain = identity_config(10000.0, 8, 1024)
    with pytest.raises(ValueError, match="multiplies plain RoPE, the model has RoPE scaled by ll"):
        write_hf_folder(tmp_path / "megatron", tmp_path / "plain", longrope_config=plain)
    for source in (tmp_path / "megatron", HfCheckpoint(tmp_path / "hf")):
        with pytest.raises(ValueError, match="multiplies plain RoPE, the model has RoPE scaled"):
            load_engine(source, longrope_config=plain)


# The command


def test_the_command_prints_what_was_verified_and_the_flags(folders, tmp_path, capsys):
    output = tmp_path / "my model"
    assert main(["convert", "from-hf", "--hf", str(folders("phi3")), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "verified short      32 tokens: max |logit difference| " in printed
    assert "verified long       96 tokens: max |logit difference| " in printed
    assert "vocabulary 250 padded to 256 rows (multiple of 128 x 1)" in printed
    assert "6 rows of padding are zero" in printed
    assert "--make-vocab-size-divisible-by 2 pads nothing" in printed
    block = printed.split("Megatron flags of this model:\n\n")[1].split("\n\n")[0]
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:2] == ["--load", str(output)]
    assert words[words.index("--longrope-config") + 1] == str(output / "longrope.json")
    assert "--use-checkpoint-args --norm-epsilon 1e-05 --make-vocab-size-div" in printed


# Sliding windows


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3"])
def test_a_dropped_window_gives_transformers_logits_without_one_past_it(folders, tmp_path, family):
    folder = shutil.copytree(folders(family), tmp_path / "hf")
    edit_config(folder, sliding_window=16)
    if family == "qwen2":
        kinds = ["full_attention", "sliding_attention", "sliding_attention"]
        edit_config(folder, use_sliding_window=True, max_window_layers=1, layer_types=kinds)
    with pytest.raises(ValueError, match=r"sliding_window = 16 .*--sliding-window drop"):
        write_checkpoint(folder, tmp_path / "refused")
    report = write_checkpoint(
        folder,
        tmp_path / "megatron",
        sliding_window="drop",
        check=lambda path: verify_import(path, folder, sliding_window="drop"),
    )
    assert report.dropped_window == 16
    windows = report.verification.windows
    assert any(item.num_tokens > 16 for item in windows)
    assert all(item.max_abs_diff < 1e-5 for item in windows)
    checkpoint = MegatronCheckpoint.open(tmp_path / "megatron")
    write_hf_folder(tmp_path / "megatron", tmp_path / "back", longrope_config=checkpoint.longrope)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert not config.get("use_sliding_window") and config.get("sliding_window") is None
    assert "within a sliding window of 16 tokens" in (tmp_path / "back" / "README.md").read_text()
    read_in_place = HfCheckpoint(folder, "drop")
    assert read_in_place.shape.max_position_embeddings == report.shape.max_position_embeddings


def test_a_window_that_transformers_does_not_read_is_none(llama, tmp_path):
    edit_config(llama, sliding_window=16)
    for way in ("refuse", "drop", "keep"):
        report = write_checkpoint(llama, tmp_path / way, sliding_window=way)
        assert report.shape.sliding_window is report.dropped_window is None


def test_a_window_that_is_not_in_use_is_not_said_to_be_dropped(folders, tmp_path):
    report = write_checkpoint(folders("qwen3"), tmp_path / "megatron", sliding_window="drop")
    assert report.dropped_window is None


@pytest.mark.parametrize(
    ("family", "ignored"),
    [("mistral", {"use_sliding_window": False, "max_window_layers": 9}), ("phi3", {})],
)
def test_a_kept_window_gives_transformers_logits_past_it_and_comes_back(
    folders, tmp_path, family, ignored
):
    folder = shutil.copytree(folders(family), tmp_path / "hf")
    edit_config(folder, sliding_window=16, **ignored)
    report = write_checkpoint(
        folder,
        tmp_path / "megatron",
        sliding_window="keep",
        check=lambda path: verify_import(path, folder, sliding_window="keep"),
    )
    windows = report.verification.windows
    assert any(item.num_tokens > 16 for item in windows)
    assert all(item.max_abs_diff < 1e-5 for item in windows)
    assert "--window-size '(15, 0)'" in report.flags
    checkpoint = MegatronCheckpoint.open(tmp_path / "megatron")
    assert checkpoint.shape.sliding_window == 16
    write_hf_folder(tmp_path / "megatron", tmp_path / "back", longrope_config=checkpoint.longrope)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["sliding_window"] == 16


def test_a_window_in_some_of_the_layers_cannot_be_kept(folders, tmp_path):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "hf")
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    edit_config(folder, sliding_window=16, use_sliding_window=True, layer_types=kinds)
    with pytest.raises(ValueError, match="a window of 16 tokens in some of the layers"):
        write_checkpoint(folder, tmp_path / "megatron", sliding_window="keep")
