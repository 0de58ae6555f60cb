"""Models, factor files and documents are checked before a weight is loaded."""

import json
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import make_megatron_checkpoint as maker
import numpy as np
import pytest
import torch
from search_data import make_search_data
from tiny_corpus import make_text

from megatron_longrope.config import FactorSet, identity_config
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.engine import loading
from megatron_longrope.evaluation.scored_documents import read_scored_documents
from megatron_longrope.evaluation.targets import (
    baselines_of,
    check_tokenizer_fits,
    config_sha256,
    labelled,
    open_models,
    targets_at,
)


def test_models_are_called_by_their_label_or_their_directory(untied_gqa, tmp_path):
    config = maker.longrope_config()
    write_hf_folder(untied_gqa.path, tmp_path / "exported", longrope_config=config)
    models = open_models([f"mine={untied_gqa.path}"], [str(tmp_path / "exported")])
    assert [model.label for model in models] == ["mine", "exported"]
    (target,) = targets_at(models[1:], [])
    assert target.label == "checkpoint" and target.config.max_length == maker.TARGET
    with pytest.raises(ValueError, match="'mine' stands for two models"):
        open_models([f"mine={untied_gqa.path}"], [f"mine={tmp_path / 'exported'}"])


@pytest.mark.parametrize("item", ["=x", "label="])
def test_a_label_without_a_path_is_refused(item):
    with pytest.raises(ValueError, match="write LABEL=PATH"):
        open_models([item], [])


def test_an_equals_sign_may_be_a_part_of_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=2e-5" / "ckpt").mkdir(parents=True)
    assert labelled(["lr=2e-5/ckpt", "best=lr=2e-5/ckpt"]) == [
        ("ckpt", "lr=2e-5/ckpt"),
        ("best", "lr=2e-5/ckpt"),
    ]
    with pytest.raises(ValueError, match="runs/lr=2e-5/typo"):
        open_models(["runs/lr=2e-5/typo"], [])


def test_no_model_at_all_is_refused():
    with pytest.raises(ValueError, match="--load or a Hugging Face folder with --hf"):
        open_models([], [])


def test_factors_of_another_model_are_refused_naming_both(untied_gqa, tmp_path):
    (model,) = open_models([str(untied_gqa.path)], [])
    config = replace(maker.longrope_config(), rotary_base=10000.0)
    config.save(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"other.json with .*rotary_base 10000"):
        targets_at([model], [str(tmp_path / "other.json")])


def test_factors_for_another_window_are_a_warning_for_each_model_and_file(tmp_path):
    shape = SimpleNamespace(rotary_base=10000.0, rotary_dim=16, max_position_embeddings=64)
    models = [
        SimpleNamespace(
            path=name, checkpoint=SimpleNamespace(shape=shape, longrope=None, directory=name)
        )
        for name in ("one", "two")
    ]
    files = []
    for window in (64, 128, 256):
        files.append(str(tmp_path / f"{window}.json"))
        identity_config(10000.0, 16, window).save(files[-1])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(2):
            targets_at(models, files)
    assert [str(item.message).partition(" is ")[0] for item in found] == [
        f"{path} has factors for a model with an original window of {window} tokens, that of {name}"
        for name in ("one", "two")
        for path, window in zip(files[1:], (128, 256), strict=True)
    ]


def test_a_length_beyond_the_factor_sets_is_refused_naming_the_file(untied_gqa, tmp_path):
    (model,) = open_models([str(untied_gqa.path)], [])
    maker.longrope_config().save(tmp_path / "f.json")
    files = [str(tmp_path / "f.json")]
    assert targets_at([model], files, [64, 256])[0].path == files[0]
    with pytest.raises(ValueError, match=r"f.json: sequence length 257 exceeds 256"):
        targets_at([model], files, [64, 257])


def test_the_hash_of_factors_ignores_where_they_come_from():
    config = maker.longrope_config()
    last = config.factor_sets[-1]
    renamed = config.with_factor_set(replace(last, origin={"by": "someone else"}))
    assert config_sha256(renamed) == config_sha256(config)
    changed = config.with_factor_set(FactorSet(last.max_length, last.rescale_factors, 4))
    assert config_sha256(changed) != config_sha256(config)
    assert config_sha256(replace(config, attention_factor=1.2)) != config_sha256(config)


def test_within_its_window_a_tuned_model_is_measured_once_and_as_it_was_trained(
    untied_gqa, monkeypatch
):
    (model,) = open_models([str(untied_gqa.path)], [])
    tuned = replace(maker.longrope_config(), attention_factor=1.19)
    monkeypatch.setattr("megatron_longrope.checkpoint.opening.model_config", lambda *_: tuned)
    found = list(baselines_of(model, ["pi", "ntk"], ["none", "su"], [64, 256, 512]))
    assert [(length, target.config) for length, target in found[:2]] == [(64, tuned), (256, tuned)]
    assert [(length, target.label, target.policy) for length, target in found[2:]] == [
        (512, "pi", "none"), (512, "pi", "su"), (512, "ntk", "none"), (512, "ntk", "su"),
    ]  # fmt: skip
    assert found[2][1].config.attention_factor_for(512) == 1.0


def test_a_policy_changes_no_angle_within_the_window_of_plain_rope(untied_gqa, monkeypatch):
    (model,) = open_models([str(untied_gqa.path)], [])
    plain = identity_config(10000.0, 16, 64)
    monkeypatch.setattr("megatron_longrope.checkpoint.opening.model_config", lambda *_: plain)
    (_, inside), (_, beyond) = baselines_of(model, ["pi"], ["su"], [64, 256])
    assert inside.config.factor_set_for(64).is_identity
    assert inside.config.attention_factor_for(64) == 1.0
    assert beyond.config.attention_factor_for(256) > 1.0


def test_the_default_dtype_of_a_cpu_never_stands_for_that_of_a_gpu(untied_gqa, monkeypatch):
    (full,) = open_models([str(untied_gqa.path)], [])
    shape = replace(full.checkpoint.shape, params_dtype=torch.bfloat16)

    def on(device, of, asked=None):
        monkeypatch.setattr(loading, "default_device", lambda: torch.device(device))
        checkpoint = SimpleNamespace(shape=of)
        return replace(full, checkpoint=checkpoint, dtype=asked).recorded_dtype

    assert (on("cpu", shape), on("cuda", shape)) == ("float32", "bfloat16")
    assert on("cuda", shape, "float32") == "float32"
    assert open_models([str(untied_gqa.path)], [], dtype="bfloat16")[0].recorded_dtype == "bfloat16"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(untied_gqa):
    models = open_models([str(untied_gqa.path)], [])
    check_tokenizer_fits(maker.VOCAB, None, "tokenizer t", models)
    with pytest.raises(ValueError, match=r"tokenizer t has 251 tokens, the vocabulary of .* 250; "):
        check_tokenizer_fits(maker.VOCAB + 1, None, "tokenizer t", models)


# Documents


def test_text_and_the_prepared_set_of_it_give_the_same_tokens(data, tmp_path):
    prepared = read_scored_documents(data["heldout"], None, 200, 3)
    (tmp_path / "books").mkdir()
    for path in (tmp_path / "books/a.jsonl", tmp_path / "held.json"):
        shutil.copy(f"{data['heldout']}.jsonl", path)
    for path in (f"{data['heldout']}.jsonl", f"{tmp_path}/books/", f"{tmp_path}/held.json"):
        text = read_scored_documents(path, data["tokenizer"], 200, 3)
        assert prepared.sha256 == text.sha256 and prepared.bos_id == text.bos_id == 1
        assert all(map(np.array_equal, prepared.tokens, text.tokens))


def test_short_documents_are_passed_over(data, tmp_path):
    texts = [make_text(1, 20), make_text(2, 400), make_text(3, 400)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = read_scored_documents(str(path), data["tokenizer"], 1001, 2)
    assert [len(tokens) for tokens in documents.tokens] == [len(text) for text in texts[1:]]
    with pytest.raises(ValueError, match="holds 2 documents of at least 1000 tokens, 3 needed"):
        read_scored_documents(str(path), data["tokenizer"], 1001, 3)


def test_bad_data_is_one_sentence(data, tmp_path):
    def refused(data_path, tokenizer, message):
        with pytest.raises(ValueError, match=message):
            read_scored_documents(str(data_path), tokenizer, 10, 1)

    tokenizer = data["tokenizer"]
    refused(tmp_path / "absent", None, "neither a prepared set .* nor a text file; check the path")
    refused(f"{data['heldout']}.jsonl", None, "is read as text .*; give the model's tokenizer")
    refused(tmp_path / "absent.jsonl", tokenizer, "neither a prepared set .* nor a text file")
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"fine so far\n\xff\xfe no longer")
    refused(broken, tokenizer, r"broken.txt:2: byte 0xff is not valid UTF-8")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(empty, tokenizer, "holds no document")


def test_a_set_made_with_another_tokenizer_is_refused(data, tmp_path):
    other = make_search_data(tmp_path)["tokenizer"]
    read_scored_documents(data["heldout"], data["tokenizer"], 10, 1)
    for path in (tmp_path / "tokenizer").glob("*.json"):
        path.write_text(path.read_text().replace('"</s>"', '"<end>"'))
    with pytest.raises(ValueError, match="made with another tokenizer than"):
        read_scored_documents(data["heldout"], other, 10, 1)


def test_a_tokenizer_without_bos_needs_a_token_more_of_a_document(data, tmp_path):
    tokenizer = make_search_data(tmp_path, bos=False)["tokenizer"]
    (tmp_path / "t.txt").write_text("x" * 100)
    text = str(tmp_path / "t.txt")
    assert read_scored_documents(text, tokenizer, 100, 1).bos_id is None
    with pytest.raises(ValueError, match="0 documents of at least 101 tokens"):
        read_scored_documents(text, tokenizer, 101, 1)
    assert read_scored_documents(text, tokenizer, 101, 1, bos=2).bos_id == 2
    prepared = f"{tmp_path}/heldout"
    assert read_scored_documents(prepared, None, 100, 1).bos_id is None
    assert read_scored_documents(prepared, None, 100, 1, bos=2).bos_id == 2
    with pytest.raises(ValueError, match="--bos 1000 is no token id; the tokenizer has 0 to 102"):
        read_scored_documents(prepared, None, 100, 1, bos=1000)
