import argparse
import json

import make_megatron_checkpoint as maker
import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.conversion.tokenizer import (
    TokenizerInfo,
    existing_tokenizer,
    write_tokenizer,
)

WORDS = ["the", "context", "window", "of", "a", "language", "model", "is", "extended", "rotary"]
TEXT = [f"{a} {b}, {c}! 12345 (x) Hello" for a in WORDS for b in WORDS for c in WORDS[:3]]
HELD_OUT = [f"  {a}{b}\t{c}\u00e9 \u6f22  " for a in WORDS[:6] for b in WORDS for c in WORDS[:3]]
SYMBOLS = ["<sep>", "<sep>.*", "\n"]
VARIANTS = {
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "defaults": {"model_type": "bpe"},
    "no prefix": {"model_type": "bpe", "add_dummy_prefix": False, "byte_fallback": True},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "symbols": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": SYMBOLS,
    },
    "unigram with symbols": {"model_type": "unigram", "user_defined_symbols": SYMBOLS[:2]},
    "line breaks kept": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    },
}


def train(directory, vocab_size=330, **options):
    prefix = directory / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(prefix),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return prefix.with_suffix(".model")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_converted_tokenizer_gives_sentencepiece_tokens(tmp_path, variant):
    path = train(tmp_path, **VARIANTS[variant])
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    folder = tmp_path / "hf"
    folder.mkdir()
    info = write_tokenizer(path, folder, max_length=64)
    assert info == TokenizerInfo(model.vocab_size(), bos_token_id=1, eos_token_id=2)
    loaded = AutoTokenizer.from_pretrained(str(folder))
    among = ("<sep>the", "the<sep>window  of", " the <sep> <sep>.*", "\nthe\n")
    for text in (*HELD_OUT, *among):
        assert loaded.encode(text, add_special_tokens=False) == model.encode(text)
    assert loaded.encode("the")[0] == loaded.bos_token_id == 1
    tokens = model.encode("the context window")
    assert loaded.decode(tokens) == model.decode(tokens)
    assert loaded.model_max_length == 64


def test_a_hugging_face_folder_is_copied(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    info = write_tokenizer(train(tmp_path, **VARIANTS["llama"]), first, 64)
    assert write_tokenizer(first, second, 64) == info
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_a_window_below_the_models_is_raised_and_no_number_is_no_limit(tmp_path):
    """vLLM takes the smaller of model_max_length and max_position_embeddings."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    write_tokenizer(train(tmp_path, **VARIANTS["llama"]), first, 64)
    settings = json.loads((first / "tokenizer_config.json").read_text())
    for stated, expected in ((None, None), ("long", "long"), (32, 128), (256, 256)):
        text = json.dumps({**settings, "model_max_length": stated})
        (first / "tokenizer_config.json").write_text(text)
        write_tokenizer(first, second, 128)
        copied = json.loads((second / "tokenizer_config.json").read_text())
        assert copied["model_max_length"] == expected


def test_a_tokenizer_with_holes_in_its_ids_is_as_large_as_its_largest_id(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    size = write_tokenizer(train(tmp_path, **VARIANTS["llama"]), first, 64).vocab_size
    inner = json.loads((first / "tokenizer.json").read_text())
    inner["model"]["vocab"]["\u2581far"] = 600
    (first / "tokenizer.json").write_text(json.dumps(inner))
    assert len(AutoTokenizer.from_pretrained(first)) == size + 1
    assert write_tokenizer(first, second, 64).vocab_size == 601


def test_a_folder_that_transformers_reads_otherwise_than_sentencepiece_is_refused(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    train(tmp_path, **VARIANTS["llama"]).rename(first / "tokenizer.model")
    (first / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match=r"other ids than sentencepiece .*--tokenizer .*\.model"):
        write_tokenizer(first, second, 64)


def test_a_path_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such tokenizer; give a Sent"):
        existing_tokenizer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no tokenizer files"):
        write_tokenizer(tmp_path / "empty", tmp_path, 64)
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        write_tokenizer(tmp_path / "text.model", tmp_path, 64)


def test_the_folder_knows_the_tokenizer_and_its_special_tokens(untied_gqa, config, tmp_path):
    path = train(tmp_path, vocab_size=100, model_type="bpe")
    write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=config, tokenizer=path)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)
    assert written["vocab_size"] == maker.VOCAB
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    assert AutoTokenizer.from_pretrained(str(tmp_path / "hf")).model_max_length == maker.TARGET


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(untied_gqa, tmp_path, monkeypatch):
    path = train(tmp_path, **VARIANTS["llama"])
    with pytest.raises(ValueError, match="tokens, the model's vocabulary 250"):
        write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=None, tokenizer=path)
    args = MegatronCheckpoint.args.func

    def without_vocabulary(self):
        return argparse.Namespace(**{**vars(args(self)), "vocab_size": None})

    monkeypatch.setattr(MegatronCheckpoint, "args", property(without_vocabulary))
    with pytest.raises(ValueError, match=r"has ids up to \d+, the model's embedding \d+ rows"):
        write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=None, tokenizer=path)
    assert not (tmp_path / "hf").exists()


def test_what_transformers_says_of_a_tokenizer_is_one_line(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer_config.json").write_text("{}")  # and no vocabulary
    with pytest.raises(ValueError, match="transformers cannot load this tokenizer: ") as caught:
        write_tokenizer(source, target, max_length=64)
    assert "\n" not in str(caught.value)
