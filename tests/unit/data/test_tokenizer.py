import hashlib
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import make_text
from toy_tokenizers import save_fast, train_byte_level

from megatron_longrope.data.tokenizer import decode_generated, load_tokenizer

CODE = "def f(x):\n    if x:\n\treturn 12345\r\n\n\n        # naïve 日本 🙂  \n"


@pytest.mark.parametrize("text", [CODE, "", " lead", "  two", "end  ", "\n\n", "nul\0x", "\ufeff"])
def test_round_trip_keeps_every_character(model_path, text):
    tokenizer = load_tokenizer(model_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_keeps_any_unicode_text(model_path):
    tokenizer = load_tokenizer(model_path)

    # U+2581 is sentencepiece's own stand-in for a space.
    characters = st.characters(exclude_categories=("Cs",), exclude_characters="\u2581")

    @settings(max_examples=200, deadline=None)
    @given(st.text(characters))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_special_ids_are_the_llama_ones_and_never_come_from_text(model_path):
    tokenizer = load_tokenizer(model_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 340)
    assert min(tokenizer.encode("<unk> <s> </s> <0x41>" + CODE)) > 2


def test_hash_is_the_one_of_the_model_file(model_path):
    expected = hashlib.sha256(model_path.read_bytes()).hexdigest()
    assert load_tokenizer(model_path).sha256 == expected


def test_unfit_paths_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist; give a sentencepiece \.model"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "x.model").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="cannot be loaded as a Hugging Face tokenizer"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    from tokenizers import processors

    inner = train_byte_level([make_text(seed, 100) for seed in range(5)], 400)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return save_fast(inner, tmp_path_factory.mktemp("hf"), model_max_length=8)


def test_hugging_face_folder_encodes_without_special_tokens(hf_folder):
    tokenizer = load_tokenizer(hf_folder)
    ids = tokenizer.encode(CODE)
    assert tokenizer.decode(ids) == CODE
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert min(ids) > 1 and max(ids) < tokenizer.vocab_size
    expected = hashlib.sha256((hf_folder / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer.sha256 == expected


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory):
    """A sentencepiece model that puts a space before every text, alone in a folder."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("prefixed")
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(make_text(seed, 100) for seed in range(20)),
            model_writer=file, model_type="bpe", vocab_size=340, byte_fallback=True,
            remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("kind", [None, "LlamaTokenizer"])
def test_a_folder_with_tokenizer_model_alone_has_sentencepieces_ids_and_hash(prefixed, kind):
    if kind:
        (prefixed / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    file, folder = load_tokenizer(prefixed / "tokenizer.model"), load_tokenizer(prefixed)
    for text in (" lead", "lead", "a  b", "\n x", CODE):
        assert folder.encode(text) == file.encode(text)
    assert (folder.bos_id, folder.eos_id, folder.vocab_size) == (1, 2, 340)
    assert folder.sha256 == file.sha256 and folder.path == str(prefixed)


def test_a_folder_may_add_special_tokens_but_none_that_is_found_in_text(prefixed, tmp_path):
    folder = shutil.copytree(prefixed, tmp_path / "added")
    added, settings = {"content": "<tab>", "special": True}, folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"added_tokens_decoder": {"340": added}}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 341
    assert decode_generated(tokenizer, [300, 340]) == tokenizer.decode([300]) != ""
    added["special"] = False
    settings.write_text(json.dumps({"added_tokens_decoder": {"340": added}}))
    with pytest.raises(ValueError, match=r"adds '<tab>' to the vocabulary of tokenizer\.model"):
        load_tokenizer(folder)


@pytest.mark.parametrize(("named", "ends"), [(None, [2]), (300, [2, 300]), ([2, 301], [2, 301])])
def test_every_token_that_ends_a_text_in_transformers_ends_it(prefixed, tmp_path, named, ends):
    folder = shutil.copytree(prefixed, tmp_path / "instruct")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    tokenizer = load_tokenizer(folder)
    assert list(tokenizer.end_ids) == ends
    assert list(load_tokenizer(prefixed).end_ids) == [2]
    assert decode_generated(tokenizer, [290, *ends]) == tokenizer.decode([290])
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"eos_token_id is '</s>'; it must be a token id or"):
        load_tokenizer(folder)


def test_the_hash_covers_settings_that_change_ids_and_no_others(prefixed, tmp_path):
    from transformers import AutoTokenizer

    (prefixed / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    AutoTokenizer.from_pretrained(prefixed).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    hashes = []
    for changes in ({}, {"model_max_length": 7}, {"add_prefix_space": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **changes}))
        hashes.append(load_tokenizer(tmp_path).sha256)
    stored = hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert hashes[0] == hashes[1] == stored != hashes[2]


def test_a_token_that_the_settings_add_gives_another_hash(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "added")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"400": {"content": "<tool>", "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    added, plain = load_tokenizer(folder), load_tokenizer(hf_folder)
    assert added.encode("<tool>") != plain.encode("<tool>")
    assert added.sha256 != plain.sha256


def test_a_tiktoken_vocabulary_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(
            ValueError, match=r"tokenizer\.model is a tiktoken vocabulary, not .*json"
        ):
            load_tokenizer(path)


def test_special_token_names_in_the_text_stay_text_with_hugging_face(hf_folder):
    tokenizer = load_tokenizer(hf_folder)
    ids = tokenizer.encode("a </s> b <s>")
    assert min(ids) > 1
    assert tokenizer.decode(ids) == "a </s> b <s>"
