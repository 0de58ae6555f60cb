"""Documents cut at sentence ends, with both kinds of tokenizers."""

import json

import pytest
from toy_tokenizers import save_fast, train_byte_level

from megatron_longrope.data.documents import check_set, read_documents
from megatron_longrope.data.mix import Source
from megatron_longrope.data.prepare import prepare
from megatron_longrope.data.segments import FixedSegments
from megatron_longrope.data.stream import make_encoder
from megatron_longrope.data.tokenizer import load_tokenizer

TEXTS = [
    " ".join(
        f"Dr. Smith measured window {k}-{j} with great care. Was it long? It was {j} tokens."
        for j in range(20)
    )
    for k in range(8)
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE in the Hugging Face format, as Llama-3 has."""
    return save_fast(train_byte_level(TEXTS, 400), tmp_path_factory.mktemp("hf") / "tokenizer")


@pytest.fixture(params=["sentencepiece", "byte_level"])
def tokenizer_path(request, model_path, byte_level):
    return model_path if request.param == "sentencepiece" else byte_level


@pytest.mark.parametrize(
    "text", [TEXTS[0], "", " a</s>b\n\n", "Höß 日本 🙂.\n\n  New. ", "x" * 50, "\n \n\t. . ."]
)
def test_starts_belong_to_the_same_tokens_and_cut_the_text_where_they_say(tokenizer_path, text):
    tokenizer = load_tokenizer(tokenizer_path)
    ids, starts = tokenizer.encode_with_starts(text)
    assert list(ids) == tokenizer.encode(text) and len(starts) == len(ids)
    assert list(starts) == sorted(starts)
    if text.isascii():
        for k in range(len(ids)):
            before = tokenizer.decode(ids[:k])
            assert starts[k] - len(before) in (0, 1)  # a leading space may not be counted
            assert text.startswith(before)


def test_sentence_ends_are_learned_from_all_of_a_long_document_beside_short_ones(tmp_path):
    """Abbreviations that stand behind the place where an equal share of the texts would end."""
    long = "A plain word. " * 2000 + TEXTS[0]
    texts = [long, *["Nothing to see here. Go on."] * 60]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    packing = FixedSegments(128, "pad", cut="sentences")
    sources = [Source("a", (str(source),))]
    splitter = make_encoder(None, packing, sources, [[source]], "text", "fail").splitter
    (whole,) = splitter.span_tokenize("It was Dr. Smith who measured it.")
    assert whole == (0, 33)


def test_every_piece_but_the_tail_ends_with_a_sentence(tmp_path, tokenizer_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    packing = FixedSegments(128, "pad", cut="sentences")
    prepare([source], tmp_path / "set", tokenizer_path, packing)
    tokenizer = load_tokenizer(tokenizer_path)
    assert check_set(tmp_path / "set") == []
    pieces = []
    for segment in read_documents(tmp_path / "set"):
        pieces.append(tokenizer.decode(segment[segment > tokenizer.eos_id]))
    assert "".join(pieces) == "".join(TEXTS)
    assert len(pieces) > 2 * len(TEXTS)
    for piece in pieces:
        assert piece.endswith((".", "?"))
        assert not piece.endswith("Dr.")  # learned from the text itself
